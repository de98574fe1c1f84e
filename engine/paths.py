"""Where things lie: `STUDIO_HOME` and its folders. Names from outside never become paths unchecked."""

from __future__ import annotations

import os
import re
from pathlib import Path

from engine.errors import UnsafeFileError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

REPOSITORY = Path(__file__).resolve().parent.parent


def studio_home() -> Path:
    """The folder for runs, data, models and the database: `$STUDIO_HOME`, else `~/.adapter-studio`."""
    home = Path(os.environ.get("STUDIO_HOME") or Path.home() / ".adapter-studio").expanduser().resolve()
    home.mkdir(parents=True, exist_ok=True)
    return home


def inside(root: Path, name: str) -> Path:
    """`root/name`, where `name` is one plain folder or file name.

    Raises:
        UnsafeFileError: the name holds a separator, `..`, a control character, or leads out of `root`.
    """
    root = root.resolve()
    plain = isinstance(name, str) and _NAME.fullmatch(name) is not None
    path = (root / name).resolve() if plain else root
    if not plain or path.parent != root:
        raise UnsafeFileError(
            f"The name {name!r} cannot be used as a file name here.",
            "Use letters, digits, dots, dashes and underscores only, starting with a letter or digit.",
        )
    return path
