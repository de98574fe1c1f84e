"""What can be asked of adapters beside mixing them: import, another rank. Each starts `studio.works`' work.

What lets them leave is `studio.exporting`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.models.catalogue import BUILTIN, canonical
from studio import adapter_files, demo
from studio import bases as allowed
from studio.adapter_words import resize_refusal
from studio.context import Studio
from studio.library import checked_name
from studio.mixing import asked_as
from studio.store import StateError

LARGEST_RANK = 512
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def bases(studio: Studio) -> list[str]:
    """The bases that an imported adapter can be said to belong to: the library's, the runs', and built-in ones."""
    runs = [row["model"] for row in studio.store.runs()]
    return list(dict.fromkeys([*studio.library.bases(), *runs, *BUILTIN]))


def known_base(studio: Studio, base: str) -> str:
    """A base by the name that it has here, "" for one that cannot be used: a file must not name a path to be opened.

    Known are the bases of `bases`, models of the hub by `owner/name`, and folders of the home folder.
    """
    base = canonical(str(base or "").strip())
    if base in bases(studio):
        return base
    if _HUB_ID.fullmatch(base) and ".." not in base and not Path(base).exists():
        return base
    place = Path(base)
    inside = place.is_absolute() and any(place.resolve().is_relative_to(it) for it in allowed.folders(studio.home))
    return str(place.resolve()) if inside and place.is_dir() else ""


def bring_in(studio: Studio, paths: Sequence[Path], name: str = "", base: str = "") -> str:
    """Start importing an adapter; returns the id of the work.

    Args:
        studio: whose library it goes to.
        paths: what was uploaded: a zip, or the files of one adapter.
        name: what it is called; the file's name when left out.
        base: the base that it belongs to; what its config says when left out.

    Raises:
        CheckpointError, UnsafeFileError, ArchiveError, TooLargeError: it is no adapter that can be opened safely.
        ConfigError: its base is not known.
        StateError: other work is under way.
    """
    demo.check_feature("import")
    names = [path.name for path in paths]
    first = next((one for one in names if not one.endswith(".json")), "adapter")
    name = checked_name(name.strip() if isinstance(name, str) and name.strip() else Path(first).stem[:60] or "adapter")
    if studio.works.present() is not None:
        raise StateError("Other work on adapters is under way; one thing is done at a time.", "Wait, or stop it.")
    work = studio.works.reserve()
    try:
        draft = studio.works.folder(work) / "draft"
        draft.mkdir()
        form = adapter_files.unpack(paths, draft)
        found = adapter_files.facts(draft) if form == "peft" else None
        told = found.base if found else ""
        belongs = known_base(studio, base or told)
        if not belongs:
            said = f" It says {told[:80]!r}, which is not known here." if told and not base else ""
            raise ConfigError(
                f"Which base does {name!r} belong to?{said or ' Its file does not say.' if not base else ''}",
                "Choose the base that it was trained on: a built-in one, or a model of the hub as owner/name.",
            )
        task = _task(belongs, found)
        if form == "foreign" and task != "text_to_image":
            raise ConfigError(
                f"{first!r} is a file for Stable Diffusion, and {belongs} is no such base.",
                "Choose the Stable Diffusion that it was trained on.",
            )
        asked = {"form": form, "name": name, "base": belongs, "task": task, "file": first}
        return studio.works.start("import", f"Importing {name}", asked, work)
    except BaseException:
        studio.works.drop(work)
        raise


def _task(base: str, found: adapter_files.Facts | None) -> str:
    """What the adapter is for: by its files, else by its base."""
    builtin = BUILTIN.get(base)
    if found is None:
        return "text_to_image" if builtin is None or "text_to_image" in builtin.tasks else builtin.tasks[0]
    first = asked_as(builtin.tasks[0]) if builtin else "causal_lm"
    return found.task or first


def resize(studio: Studio, adapter: str, rank: Any, name: str = "") -> str:
    """Start making an adapter of another rank; returns the id of the work.

    Raises:
        ConfigError: a rank that cannot be, the one that it has, or a method without ranks.
        UnknownError, StateError, CheckpointError: the adapter is not there, or other work is under way.
    """
    row = studio.library.usable(adapter)
    rank = checked_rank(row, rank)
    if rank == row["rank"]:
        raise ConfigError(f"{row['name']!r} has rank {rank} already.", "Choose another rank.")
    name = checked_name(name or f"{row['name'][:100]} r{rank}")
    return studio.works.start("resize", f"Saving {name}", {"adapter": adapter, "rank": rank, "name": name})


def checked_rank(row: dict[str, Any], rank: Any) -> int:
    """A rank that the adapter can be brought to.

    Raises:
        ConfigError: it cannot.
    """
    if resize_refusal(row):
        raise ConfigError(f"The rank of {row['name']!r} cannot be changed. {resize_refusal(row)}", "Choose a LoRA.")
    whole = isinstance(rank, int | float) and not isinstance(rank, bool) and float(rank).is_integer()
    if not whole or not 1 <= rank <= LARGEST_RANK:
        raise ConfigError(f"The rank is {str(rank)[:20]}; needed: a whole number from 1 to {LARGEST_RANK}.")
    return int(rank)


def rank_errors(studio: Studio, adapter: str) -> list[float]:
    """What lowering an adapter's rank would cost: entry r - 1 is the relative error at rank r.

    Raises:
        ConfigError: a method without ranks.
        InferenceError: the inference process reported something.
    """
    row = studio.library.usable(adapter)
    checked_rank(row, 1)
    version, folder = studio.library.version(row), studio.library.folder(row)
    return studio.inference.rank_errors(row["base"], version, folder, asked_as(row["task"]))
