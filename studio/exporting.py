"""How adapters leave: files for other programs, a push to the hub. Each starts `studio.works`' work."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from engine import llamacpp
from engine.errors import CheckpointError, ConfigError, EngineError
from engine.models.fetch import local_folder
from studio import cards, demo, hub, states
from studio.context import Studio
from studio.export_words import FORMS, export_refusal
from studio.store import StateError

PUSHED = ("peft", "merged")
"""Forms that can be pushed: the adapter's files, or the whole model."""


def export(studio: Studio, adapter: str, form: str, precision: str = "f16") -> str:
    """Start writing an adapter in a form of `FORMS`; returns the id of the work.

    Args:
        studio: whose adapter it is.
        adapter: its id.
        form: of `FORMS`.
        precision: of a GGUF model, one of `engine.llamacpp.PRECISIONS`; other forms have none.

    Raises:
        ConfigError: an unknown form or precision, or one that has no place for the adapter.
        UnknownError, StateError, CheckpointError: the adapter is not there, or other work is under way.
    """
    row = studio.library.usable(adapter)
    if not isinstance(form, str) or form not in FORMS:
        raise ConfigError(f"There is no form {str(form)[:40]!r}.", f"Known: {', '.join(FORMS)}.")
    llamacpp.check_precision(precision)
    demo.check_feature(form)
    why = export_refusal(row, form)
    if why:
        raise ConfigError(f"{row['name']!r} cannot be exported as a {FORMS[form][0]}. {why}", "Choose another form.")
    asked = {"adapter": adapter, "form": form, **({"precision": precision} if form == "gguf" else {})}
    return studio.works.start("export", f"Exporting {row['name']}: {FORMS[form][0]}", asked)


def drop_former(studio: Studio, work: str) -> None:
    """Once an export is done, older ones of the same go from the disk, but for a model that something here builds on.

    The same is: of the same adapter, in the same form and precision.
    """
    asked = studio.works.get(work)["asked"]
    sql = "SELECT id FROM works WHERE kind = 'export' AND id <> ? AND state = ?"
    same = [asked["adapter"], asked["form"], asked.get("precision")]
    for name in ("adapter", "form", "precision"):
        sql += f" AND json_extract(asked, '$.{name}') IS ?"
    used = _bases(studio)
    for row in studio.store.db.query(sql, [work, states.DONE, *same]):
        out = studio.works.folder(row["id"]) / "out"
        if not any(place.is_relative_to(out.resolve()) for place in used):
            shutil.rmtree(out, ignore_errors=True)


def _bases(studio: Studio) -> list[Path]:
    """The folders that runs, adapters and mixes name as their base, whosever they are, in the bin too."""
    sql = "SELECT model FROM runs UNION SELECT base FROM adapters UNION SELECT base FROM mixes"
    found = []
    for (name,) in studio.store.db.execute(sql).fetchall():
        # A name that no folder can have was never opened as one.
        with contextlib.suppress(EngineError):
            place = local_folder(name)
            if place is not None:
                found.append(place.resolve())
    return found


def exported(studio: Studio, work: str) -> Path:
    """The file that an export wrote, to be sent to whoever asked.

    Raises:
        UnknownError: there is no such work.
        StateError: it is no export, has not come to an end, or wrote a folder, which is not sent.
        CheckpointError: the file is gone.
    """
    row = studio.works.get(work)
    if row["kind"] != "export" or row["state"] != states.DONE:
        raise StateError(f"{row['title']}: there is no file to download.", "Export an adapter first, and let it end.")
    root = studio.works.folder(work).resolve()
    place = (root / str(row["result"]["path"])).resolve()
    if not place.is_relative_to(root) or not place.exists():
        raise CheckpointError("The exported file is gone from the home folder.", "Export it again.")
    if place.is_dir():
        raise StateError(
            "A merged model is a folder; it is not sent.", f"Take it from works/{work} in the home folder."
        )
    return place


def check_push(studio: Studio, adapter: str, repository: Any, what: Any, private: Any) -> dict[str, Any]:
    """What is asked of a push, checked: plain data for the work, without the token.

    Raises:
        DemoError: the demo pushes nothing.
        HubError: the server has no token, or is offline.
        ConfigError: no repository's name, or a form that is not pushed or has no place for the adapter.
        UnknownError, StateError, CheckpointError: the adapter is not there.
    """
    demo.check_feature("push")
    why = hub.refusal()
    if why:
        raise hub.HubError(f"Nothing can be pushed. {why}")
    row = studio.library.usable(adapter)
    if not isinstance(what, str) or what not in PUSHED:
        raise ConfigError(f"{str(what)[:40]!r} cannot be pushed.", f"Known: {', '.join(PUSHED)}.")
    if not isinstance(private, bool):
        raise ConfigError(f"private is {str(private)[:40]!r}; needed: true or false.")
    no = export_refusal(row, what)
    if no:
        raise ConfigError(f"{row['name']!r} cannot be pushed as a {FORMS[what][0]}. {no}", "Push the adapter.")
    return {"adapter": adapter, "repository": hub.checked_repository(repository), "what": what, "private": private}


def push(studio: Studio, adapter: str, repository: Any, what: Any = "peft", private: Any = True) -> str:
    """Start uploading an adapter, or its base with it, to a new repository of the hub; returns the id of the work.

    Raises:
        StateError: other work is under way; and as `check_push`.
    """
    asked = check_push(studio, adapter, repository, what, private)
    name = studio.library.get(adapter)["name"]
    return studio.works.start("push", f"Pushing {name} to {asked['repository']}", asked)


def pushed_files(studio: Studio, adapter: str) -> list[str]:
    """The files that pushing an adapter alone would upload.

    Raises:
        UnknownError, StateError, CheckpointError: the adapter is not there.
    """
    row = studio.library.usable(adapter)
    return [*cards.adapter_names(studio.library.folder(row)), cards.CARD]
