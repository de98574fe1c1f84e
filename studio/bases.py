"""Which bases may be named from outside: a model's name that comes from a request must not open any folder it likes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, UnsafeFileError
from engine.models.catalogue import canonical
from engine.models.fetch import hub_id, local_folder
from studio import demo

_NAMES = ("base_model_name_or_path", "tokenizer_name_or_path")


def folders(home: Path) -> list[Path]:
    """Where models of one's own may lie: the home folder, and those that `$STUDIO_MODELS` names (as `$PATH` does)."""
    named = [Path(part).expanduser() for part in os.environ.get("STUDIO_MODELS", "").split(os.pathsep) if part]
    return [place.resolve() for place in (home, *named)]


def checked(home: Path, name: Any) -> str:
    """A base's name as it was given, if it may be used: a built-in one, one of the hub, or a folder of `folders`.

    Raises:
        ConfigError, ModelError: it is no name.
        UnsafeFileError: it leads to another folder of this machine.
        DemoError: the demo does not offer it.
    """
    if not isinstance(name, str):
        raise ConfigError(f"The base model is {repr(name)[:40]}; needed: its name.", "Choose a base model.")
    place = local_folder(name)
    if place is not None and not any(place.resolve().is_relative_to(root) for root in folders(home)):
        raise UnsafeFileError(
            f"The folder {name[:200]!r} is not among those that this studio opens.",
            "Put the model below models/ in the home folder, or start the studio with STUDIO_MODELS=FOLDER.",
        )
    if place is None:
        hub_id(canonical(name))
    demo.check_model(name)
    return name


def check_adapter(home: Path, adapter: Mapping[str, Any]) -> None:
    """Refuse an adapter's fields that would open a folder, or hand a loader arguments of one's own.

    Raises:
        UnsafeFileError, ConfigError, ModelError, DemoError: as `checked`.
    """
    for key in _NAMES:
        if adapter.get(key) is not None:
            checked(home, adapter[key])
    if adapter.get("tokenizer_kwargs"):
        raise UnsafeFileError(
            "tokenizer_kwargs are arguments for a loader of files; the studio takes none.", "Leave them out."
        )
