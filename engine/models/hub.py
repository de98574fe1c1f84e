"""Models of the Hugging Face hub: which files are taken, and the process that takes them. Torch-free.

Only safetensors weights, configuration and tokenizer files are asked for; pickles and Python files never are.
`python -m engine.models.hub OWNER/NAME` is the child that talks to the hub and prints JSON lines.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import EngineError, ModelError, UnsafeFileError
from engine.models import folders
from engine.models.progress import ChildFailed, Progress, folder_size, module, module_environment, run, silent

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ID = re.compile(f"{_PART}/{_PART}")
_WANTED = ("*.json", "*.txt", "*.model", "*.jinja")

FIRST_SIGN_SECONDS = 12.0
STALL_SECONDS = 60.0
_CHILD_SETTINGS = {
    "HF_HUB_ETAG_TIMEOUT": "5",
    "HF_HUB_DOWNLOAD_TIMEOUT": "20",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def check_id(name: str) -> str:
    """`name`, if it is a hub id (`owner/name`).

    Raises:
        ModelError: it is not; the form needed is given.
    """
    if not _ID.fullmatch(name) or ".." in name or "--" in name or name.endswith((".git", "-", ".")):
        raise ModelError(
            f"{name!r} is neither a built-in model, nor an existing folder, nor a hub id.",
            "Hub ids look like owner/name, with letters, digits, dots, dashes and underscores; a local folder is "
            "given by its full path.",
        )
    return name


def snapshot(hub_id: str, on_progress: Progress = silent, *, config_only: bool = False) -> Path:
    """The local folder of a hub model, fetched into the hub's own cache where it is not there yet.

    Args:
        hub_id: `owner/name`.
        on_progress: told the bytes fetched so far.
        config_only: fetch `config.json` alone, for counting parameters.

    Raises:
        UnsafeFileError: the weights are pickles only.
        ModelError: the id does not exist, access is gated, the hub cannot be reached, or the disk is too small.
    """
    check_id(hub_id)
    found: dict[str, Any] = {}

    def heard(message: dict[str, Any]) -> None:
        found.update(message)

    def size() -> int:
        return folder_size(Path(found["cache"])) if "cache" in found else 0

    def grown(now: int) -> None:
        if found.get("total"):
            fetched = min(now, found["total"])
            share = f"{fetched / 1e6:.0f} of {found['total'] / 1e6:.0f} MB"
            on_progress("fetching", fetched / found["total"], f"{hub_id}: {share}")

    on_progress("looking", None, f"Asking the Hugging Face hub for {hub_id}")
    arguments = [hub_id, "--config-only"] if config_only else [hub_id]
    try:
        run(
            module("engine.models.hub", *arguments),
            environment={**module_environment(), **_CHILD_SETTINGS},
            measure=size,
            on_message=heard,
            on_size=grown,
            first_sign=FIRST_SIGN_SECONDS,
            stall=STALL_SECONDS,
        )
    except ChildFailed as failure:
        raise _as_error(hub_id, failure) from failure
    return Path(found["path"])


def is_cached(hub_id: str) -> bool:
    """Whether the hub's own cache on this machine has the model's tokenizer."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(hub_id, "tokenizer_config.json"), str)


def download_pinned(
    hub_id: str, revision: str, files: Sequence[str], into: Path, on_size: Any, keep: Sequence[int] = ()
) -> None:
    """Fetch exactly these files of one revision into a folder. The caller checks their hashes.

    Raises:
        ChildFailed: the hub does not answer, or not with these files.
    """
    arguments = [hub_id, "--revision", revision, "--into", str(into), "--files", *files]
    run(
        module("engine.models.hub", *arguments),
        environment={**module_environment(), **_CHILD_SETTINGS},
        measure=lambda: folder_size(into),
        on_size=on_size,
        first_sign=FIRST_SIGN_SECONDS,
        stall=STALL_SECONDS,
        keep=keep,
    )
    shutil.rmtree(into / ".cache", ignore_errors=True)


def choose_files(sizes: Mapping[str, int], hub_id: str) -> list[str]:
    """The files to take out of a repository's listing (name -> bytes): top level, safetensors, configuration.

    Raises:
        UnsafeFileError, ModelError: as `folders.check_names`.
    """
    top = [name for name in sizes if "/" not in name]
    if folders.PIPELINE in top and folders.CONFIG not in top:
        return _pipeline_files(sizes)
    folders.check_names(top, f"The hub model {hub_id}")
    # Some repositories carry the same weights twice, in one file and in shards; one of them is enough.
    weights = [folders.WEIGHTS] if folders.WEIGHTS in top else fnmatch.filter(top, "model-*-of-*.safetensors")
    described = [name for name in top if any(fnmatch.fnmatch(name, pattern) for pattern in _WANTED)]
    return sorted({*weights, *described})


def _pipeline_files(sizes: Mapping[str, int]) -> list[str]:
    """Of a diffusers pipeline: its parts' configs, texts and weights; no variants, no single-file checkpoints."""
    found = [folders.PIPELINE]
    for name in sizes:
        part, _, file = name.partition("/")
        if part in folders.PARTS:
            shards = fnmatch.fnmatch(file, "*-of-*.safetensors") or file.endswith(".safetensors.index.json")
            if file == folders.CONFIG or file in folders.PART_WEIGHTS or (shards and ".fp16" not in file):
                found.append(name)
        elif part in ("tokenizer", "tokenizer_2", "scheduler") and file.endswith((".json", ".txt")):
            found.append(name)
    return sorted(found)


def _as_error(hub_id: str, failure: ChildFailed) -> EngineError:
    report = failure.report
    if report.get("code") in (ModelError.code, UnsafeFileError.code):
        kind = UnsafeFileError if report["code"] == UnsafeFileError.code else ModelError
        return kind(report["message"], report.get("hint", ""))
    return ModelError(
        f"The Hugging Face hub could not be reached for {hub_id}: {failure}.",
        "Check the connection, or use a model folder on this machine; tiny-llama works without any connection.",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The child: look, choose, fetch; one JSON object a line, errors included."""
    parser = argparse.ArgumentParser(prog="python -m engine.models.hub", description=main.__doc__)
    parser.add_argument("hub_id", type=check_id)
    parser.add_argument("--revision")
    parser.add_argument("--into", type=Path)
    parser.add_argument("--files", nargs="+")
    parser.add_argument("--config-only", action="store_true")
    options = parser.parse_args(argv)
    try:
        if options.files:
            path = _take(options.hub_id, options.revision, options.files, options.into)
        else:
            path = _look_and_take(options.hub_id, options.config_only)
    except EngineError as error:
        _say(error.to_event())
        return 1
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        _say({"type": "error", "code": "unreachable", "message": f"{type(error).__name__}: {reason}"})
        return 1
    _say({"type": "done", "path": str(path)})
    return 0


def _look_and_take(hub_id: str, config_only: bool) -> Path:
    """The snapshot of the newest revision; without a connection, the one in the cache, if it is whole."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        info = HfApi().model_info(hub_id, files_metadata=True, timeout=5)
    except GatedRepoError as error:
        raise ModelError(
            f"{hub_id} is gated: its owner gives access on request only.",
            f"Ask for access at https://huggingface.co/{hub_id}, then log in with `hf auth login` on this machine.",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no model {hub_id} on the Hugging Face hub, or it is private.",
            "Check the spelling; for a private model log in with `hf auth login` on this machine.",
        ) from error
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code == 404:
            raise ModelError(f"There is no model {hub_id} on the Hugging Face hub.", "Check the spelling.") from error
        return _cached(hub_id, config_only, error)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    names = choose_files(sizes, hub_id)
    if config_only:
        known = (folders.CONFIG, folders.PIPELINE, *(f"{part}/{folders.CONFIG}" for part in folders.PARTS))
        names = [name for name in names if name in known]
    total = sum(sizes[name] for name in names)
    cache = Path(constants.HF_HUB_CACHE)
    _check_space(cache, total, hub_id)
    _say({"type": "plan", "total": total, "cache": str(cache / f"models--{hub_id.replace('/', '--')}")})
    return Path(snapshot_download(hub_id, revision=info.sha, allow_patterns=names, etag_timeout=5))


def _cached(hub_id: str, config_only: bool, reason: Exception) -> Path:
    """The newest usable snapshot in the cache, whichever program put it there; without one, `reason` is raised.

    Looked for here because huggingface_hub finds a snapshot offline only by the branch that it was fetched from.
    """
    from huggingface_hub import constants

    snapshots = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}" / "snapshots"
    for folder in sorted(snapshots.glob("*"), key=lambda place: place.stat().st_mtime, reverse=True):
        try:
            if config_only:
                folders.read_json(folder / folders.head_of(folder))
            else:
                folders.check_folder(folder)
        except EngineError:
            continue
        return folder
    raise reason


def _take(hub_id: str, revision: str, files: Sequence[str], into: Path) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    # Asked first because it fails at once without a connection; snapshot_download tries again for a long time.
    HfApi().model_info(hub_id, revision=revision, timeout=5)
    return Path(
        snapshot_download(hub_id, revision=revision, allow_patterns=list(files), local_dir=into, etag_timeout=5)
    )


def _check_space(folder: Path, needed: int, what: str) -> None:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed * 1.05:
        raise ModelError(
            f"{what} needs {needed / 1e9:.1f} GB on the disk of {folder}; {free / 1e9:.1f} GB are free.",
            "Free some space, or choose a smaller model.",
        )


def _say(message: Mapping[str, Any]) -> None:
    print(json.dumps(message, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    sys.exit(main())
