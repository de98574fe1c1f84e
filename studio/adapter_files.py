"""Adapters as files: what one holds, read without torch, and uploads taken apart under names of our own.

Only safetensors and JSON are ever opened. A zip is read where it is; no name in it becomes a path.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from engine.data.errors import ArchiveError, TooLargeError
from engine.data.sources import Source, ZipSource
from engine.data.table import Limits
from engine.errors import CheckpointError, ModelError, UnsafeFileError
from engine.exporting import SIDECARS as SIDECARS
from engine.models.folders import PICKLES, check_safetensors

CONFIG, WEIGHTS, ENCODER = "adapter_config.json", "adapter_model.safetensors", "prompt_encoder.safetensors"
ENCODERS = ("text_encoder", "text_encoder_2")
FOREIGN = "foreign.safetensors"
"""A file in kohya's or diffusers' format, before it is converted."""

# An upload is 100 MB at most, and tensors hardly pack: what unpacks to far more is a trap.
LIMITS = Limits(max_pictures=2_000, max_picture_bytes=256 * 2**20, max_unpacked_zip=2**30)
_LONGEST_JSON = 2 * 2**20
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_TASKS = {"CAUSAL_LM": "causal_lm", "SEQ_2_SEQ_LM": "seq2seq", "SEQ_CLS": "classification"}


@dataclass(frozen=True)
class Facts:
    """What an adapter's files say of it.

    Attributes:
        base: the base that its config names; "" where it names none.
        task: the task by its config or its layers' names, "" where neither says.
        method: the registry's name of its method.
        rank: rank, or number of virtual tokens; None where the method has neither.
        targets: the modules that it changes, in words.
        parameters: numbers in its file.
        bytes: of its tensors' files.
        whole: modules that it trains in full, or biases of the base: what no combination can hold.
    """

    base: str
    task: str
    method: str
    rank: int | None
    targets: str
    parameters: int
    bytes: int
    whole: str = ""


def facts(folder: Path) -> Facts:
    """Read an adapter's folder in PEFT's format.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    config = read_json(folder / CONFIG)
    files = [folder / WEIGHTS, *(folder / name / WEIGHTS for name in ENCODERS if (folder / name / WEIGHTS).is_file())]
    headers = [header(path) for path in files]
    keys = [key for found in headers for key in found]
    targets = config.get("target_modules")
    named = targets if isinstance(targets, str) else ", ".join(sorted(map(str, targets or ())))
    whole = list(map(str, config.get("modules_to_save") or ()))
    whole += [f"bias={config['bias']}"] if config.get("bias") not in (None, "none") else []
    return Facts(
        base=str(config.get("base_model_name_or_path") or ""),
        task="text_to_image" if _of_a_unet(keys) else _TASKS.get(str(config.get("task_type")), ""),
        method=_method(config),
        rank=_rank(config),
        targets=named,
        parameters=sum(prod(tensor["shape"]) for found in headers for tensor in found.values()),
        bytes=sum(path.stat().st_size for path in files),
        whole=", ".join(whole),
    )


def _method(config: Mapping[str, Any]) -> str:
    kind = str(config.get("peft_type", "")).lower()
    variants = {"use_dora": "dora", "use_lorafa": "lorafa", "use_qalora": "qalora"}
    found = next((method for flag, method in variants.items() if config.get(flag)), "lora")
    return found if kind == "lora" else kind


def _rank(config: Mapping[str, Any]) -> int | None:
    for name in ("target_r", "r", "num_virtual_tokens"):
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _of_a_unet(keys: Sequence[str]) -> bool:
    return any(part in key for key in keys for part in ("down_blocks", "up_blocks", "mid_block"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of an adapter's folder, of a few megabytes at most.

    Raises:
        CheckpointError: it is missing, too long or no object.
    """
    try:
        if path.stat().st_size > _LONGEST_JSON:
            raise ValueError(f"it is longer than {_LONGEST_JSON:,} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"{path.name} cannot be read: {why}.", "Save the adapter again.") from error
    return found


def header(path: Path) -> dict[str, Any]:
    """Key -> dtype and shape of a safetensors file's tensors; the tensors themselves are not read.

    Raises:
        CheckpointError: the file is missing, cut off or no safetensors.
    """
    try:
        check_safetensors(path)
    except ModelError as error:
        reason = str(error.__cause__ or error.message).replace(str(path), "it").rstrip(".")
        if isinstance(error.__cause__, OSError):
            reason = error.__cause__.strerror or "it is missing"
        raise CheckpointError(f"{path.name} is damaged: {reason}.", "Copy or download it again.") from error
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        found: dict[str, Any] = json.loads(file.read(length))
    return {key: value for key, value in found.items() if key != "__metadata__"}


# --- what was uploaded ----------------------------------------------------------------------------------------------


@dataclass
class _Loose:
    """Files that were uploaded side by side, by their bare names."""

    paths: Mapping[str, Path]
    names: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names = sorted(self.paths)

    def size(self, name: str) -> int:
        return self.paths[name].stat().st_size

    def read(self, name: str) -> bytes:
        return self.paths[name].read_bytes()

    def reference(self, name: str) -> str:
        return name


def unpack(paths: Sequence[Path], into: Path) -> str:
    """Copy what an upload has of an adapter into a folder, under names of our own; says what it is.

    Args:
        paths: a zip alone, or an adapter's files: safetensors, and `adapter_config.json` where it has one.
        into: an empty folder.

    Returns:
        `peft` (the folder can be read by `facts`), or `foreign`: one file for Stable Diffusion (`FOREIGN`) to convert.

    Raises:
        UnsafeFileError: a pickle instead of safetensors.
        CheckpointError: no adapter, several, or a damaged one.
        ArchiveError, TooLargeError: a zip that is none, encrypted, too large, or with names that lead out of it.
    """
    source = _source(paths)
    names = [name for name in source.names if not _hidden(name)]
    configs = sorted((name for name in names if PurePosixPath(name).name == CONFIG), key=lambda name: name.count("/"))
    if configs:
        _take_folder(source, names, _root(configs), into)
        facts(into)
        return "peft"
    found = [name for name in names if name.lower().endswith(".safetensors")]
    if not found:
        raise _no_adapter(names)
    if len(found) > 1:
        raise CheckpointError(
            f"There are {len(found)} safetensors files and no {CONFIG}: {', '.join(_short(n) for n in found[:3])}.",
            f"Give one adapter at a time; one in PEFT's format needs its {CONFIG} beside it.",
        )
    _copy(source, found[0], into / FOREIGN)
    keys = header(into / FOREIGN)
    if keys and all(key.startswith("base_model.") for key in keys):
        raise CheckpointError(
            f"{_short(found[0])} is an adapter in PEFT's format without its {CONFIG}.", f"Give both, {CONFIG} too."
        )
    if not any(key.startswith(_KOHYA) for key in keys) and not _lora_keys(keys):
        raise CheckpointError(
            f"{_short(found[0])} is no adapter that is known here.",
            f"Known: PEFT's two files ({CONFIG}, {WEIGHTS}), and kohya's and diffusers' for Stable Diffusion.",
        )
    return "foreign"


def _source(paths: Sequence[Path]) -> Source:
    if not paths:
        raise CheckpointError("No file was sent.", f"Send a zip, or {CONFIG} and {WEIGHTS}, or a safetensors file.")
    zips = [path for path in paths if path.suffix.lower() == ".zip"]
    if not zips:
        return _Loose({path.name: path for path in paths})
    if len(paths) > 1:
        raise CheckpointError("A zip and other files were sent together.", "Send the zip alone.")
    try:
        return ZipSource(zips[0], LIMITS)
    except TooLargeError as error:
        raise TooLargeError(error.message, "Pack the adapter's own files alone.") from error


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _short(name: str) -> str:
    return PurePosixPath(name).name[:60]


def _root(configs: Sequence[str]) -> str:
    """The folder in the upload that is the adapter: with the UNet's in it or below it, the text encoders' beside."""
    folders = [str(PurePosixPath(name).parent) for name in configs]
    tops = [folder for folder in folders if PurePosixPath(folder).name not in ENCODERS]
    if len(tops) != 1:
        shown = ", ".join("the top" if folder == "." else folder[:60] for folder in folders[:4])
        raise CheckpointError(f"There are {len(folders)} adapters in it: {shown}.", "Give one adapter at a time.")
    return tops[0]


def _take_folder(source: Source, names: Sequence[str], root: str, into: Path) -> None:
    start = "" if root == "." else root + "/"
    # Where the parts of a pipeline lie side by side, the encoders are beside the UNet's folder.
    above = str(PurePosixPath(root).parent) if PurePosixPath(root).name == "unet" else root
    beside = "" if above == "." else above + "/"
    wanted = {start + name: into / name for name in (CONFIG, WEIGHTS, ENCODER, *SIDECARS)}
    for encoder in ENCODERS:
        wanted |= {f"{beside}{encoder}/{name}": into / encoder / name for name in (CONFIG, WEIGHTS)}
    if start + WEIGHTS not in names:
        raise _no_adapter([name for name in names if name.startswith(start)])
    for name, place in wanted.items():
        if name in names:
            _copy(source, name, place)


def _copy(source: Source, name: str, place: Path) -> None:
    if place.suffix == ".json" and source.size(name) > _LONGEST_JSON:
        raise CheckpointError(f"{_short(name)} is {source.size(name):,} bytes long.", "Save the adapter again.")
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.write_bytes(source.read(name))
    except OSError as error:
        raise ArchiveError(f"{_short(name)} cannot be read: {error}.", "Pack it again, or send it again.") from error


def _no_adapter(names: Sequence[str]) -> CheckpointError | UnsafeFileError:
    pickles = [name for name in names if name.lower().endswith(PICKLES)]
    if pickles:
        return UnsafeFileError(
            f"{_short(pickles[0])} is a pickle, which could run code when opened; it was not opened.",
            "Get the adapter as safetensors, or convert it where you trust it.",
        )
    shown = ", ".join(_short(name) for name in names[:4]) or "nothing"
    return CheckpointError(f"There is no {WEIGHTS} in it; it has {shown}.", "Give an adapter's files or a zip of them.")


def _lora_keys(keys: Mapping[str, Any]) -> bool:
    parts = (".lora_A.", ".lora_B.", ".lora.down.", ".lora.up.", "lora_linear_layer", ".hada_", ".lokr_")
    return any(part in key for key in keys for part in parts)
