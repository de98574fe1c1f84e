"""What a folder must hold to be loaded as a base model. Torch-free; nothing of the folder is executed.

Weights come from safetensors only: a pickle (`pytorch_model.bin`, `.pt`, `.ckpt`) can run code when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.errors import ModelError, UnsafeFileError

CONFIG = "config.json"
PIPELINE = "model_index.json"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
PART_WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scheduler.bin")
_LONGEST_HEADER = 100_000_000


def check_folder(folder: Path) -> Path:
    """`folder`, if it holds a base model that can be loaded safely.

    Raises:
        UnsafeFileError: its weights are pickles, or its index names a file outside the folder.
        ModelError: it is missing, has no `config.json`, no weights, or a weight file is damaged.
    """
    if not folder.is_dir():
        raise ModelError(f"The model folder {folder} does not exist.", "Check the path.")
    names = [entry.name for entry in folder.iterdir()]
    if PIPELINE in names and CONFIG not in names:
        return _check_pipeline(folder)
    check_names(names, f"The folder {folder}")
    read_json(folder / CONFIG)
    for shard in _shards(folder):
        check_safetensors(shard)
    return folder


def _check_pipeline(folder: Path) -> Path:
    """A diffusers pipeline: known classes only, each part's weights safetensors and whole."""
    where = f"The folder {folder}"
    index = read_json(folder / PIPELINE)
    check_pipeline_index(index, where)
    for part in PARTS:
        if not isinstance(index.get(part), list) or index[part][0] is None:
            continue
        names = [entry.name for entry in (folder / part).iterdir()] if (folder / part).is_dir() else []
        found = [name for name in names if name.endswith(".safetensors")]
        read_json(folder / part / CONFIG)
        if not found:
            pickles = [name for name in names if name.endswith(PICKLES)]
            if pickles:
                raise UnsafeFileError(
                    f"{where} holds the weights of its {part} as {pickles[0]}, which can run code when opened; "
                    "this program opens safetensors only.",
                    "Choose a version of the model with safetensors.",
                )
            raise ModelError(f"{where} has no weights for its {part}.", "Copy or fetch the model again.")
        for name in found:
            check_safetensors(folder / part / name)
    return folder


def check_pipeline_index(index: dict[str, Any], where: str) -> None:
    """Refuse a pipeline whose parts are not diffusers' and transformers' own.

    Raises:
        UnsafeFileError: a part is code that comes with the model.
        ModelError: it is no Stable Diffusion.
    """
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise ModelError(
            f"{where} is a pipeline of the kind {str(kind)[:80]!r}; needed: {' or '.join(PIPELINES)}.",
            "Choose a Stable Diffusion 1, 2 or XL pipeline.",
        )
    for part, value in index.items():
        known = not isinstance(value, list) or value[0] in (None, "diffusers", "transformers", "stable_diffusion")
        if not known and not part.startswith("_"):
            raise UnsafeFileError(
                f"{where} wants its {part} from {str(value[0])[:80]!r}: Python code that comes with the model is never "
                "run.",
                "Choose a pipeline whose parts are diffusers' and transformers' own.",
            )


def check_names(names: Iterable[str], where: str) -> None:
    """Refuse a set of top-level file names that cannot be a safe base model; `where` begins the sentence.

    Raises:
        UnsafeFileError: there are weights, but only as pickles.
        ModelError: no `config.json`, or no weights under transformers' standard names.
    """
    names = set(names)
    if CONFIG not in names and "adapter_config.json" in names:
        raise ModelError(
            f"{where} holds an adapter, not a base model: adapter_config.json is there, {CONFIG} is not.",
            "Choose the base that the adapter was made for, and load the adapter onto it.",
        )
    if CONFIG not in names:
        raise ModelError(
            f"{where} has no {CONFIG}, so it is not a model that transformers can load.",
            "Choose the folder that save_pretrained() wrote.",
        )
    if WEIGHTS in names or INDEX in names:
        return
    pickles = sorted(name for name in names if name.endswith(PICKLES) and name not in _NOT_WEIGHTS)
    if pickles:
        raise UnsafeFileError(
            f"{where} holds its weights as {', '.join(pickles[:3])}, which can run code when opened; "
            "this program opens safetensors only.",
            "If you trust the file, convert it once: load it with transformers in a separate environment and call "
            "model.save_pretrained(folder), which writes model.safetensors.",
        )
    other = sorted(name for name in names if name.endswith(".safetensors"))
    found = f" (found {', '.join(other[:3])})" if other else ""
    raise ModelError(
        f"{where} has no weights under the name {WEIGHTS} or {INDEX}{found}.",
        "Choose the folder that save_pretrained() wrote.",
    )


def check_safetensors(path: Path) -> None:
    """Compare a safetensors file's length with what its header announces; quick, reads the header only.

    Raises:
        ModelError: the file is missing, cut off, or is not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if start.startswith(b"version "):
                raise ModelError(
                    f"{path} is a Git LFS pointer, not the weights themselves.", "Run `git lfs pull` in its folder."
                )
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise ValueError(f"its header cannot be {length} bytes long in a file of {size} bytes")
            header = json.loads(file.read(length))
        tensors = [value for name, value in header.items() if name != "__metadata__"]
        needed = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors), default=0)
        if size != needed:
            raise ValueError(f"it has {size} bytes, its header announces {needed}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"The weights {path} are damaged: {error}.", "Copy or fetch the model again.") from error


def head_of(folder: Path) -> str:
    """The file that says what the folder holds: a pipeline's index, or a model's config."""
    return PIPELINE if (folder / PIPELINE).is_file() and not (folder / CONFIG).is_file() else CONFIG


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        ModelError: the file is missing, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}.", "Copy or fetch the model again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}; needed: a JSON object.", "Fetch the model again.")
    return content


def sha256(path: Path) -> str:
    """The SHA-256 of a file as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shards(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    named = read_json(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise ModelError(f"{folder / INDEX} has no weight_map of file names.", "Fetch the model again.")
    shards = sorted(set(named.values()))
    for name in shards:
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise UnsafeFileError(
                f"{folder / INDEX} names {name!r} as weights; needed: a safetensors file in the same folder.",
                "Fetch the model again from a source that you trust.",
            )
    return [folder / name for name in shards]
