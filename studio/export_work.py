"""Exports and pushes, as the adapter worker does them: files under `works/<id>/out`, or an upload."""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from engine import exporting
from engine.exporting import NAME
from studio import cards, hub
from studio.store import Row

if TYPE_CHECKING:
    from studio.adapter_worker import Work


def export(work: Work) -> Row:
    """An adapter as a file or folder for other programs, under `works/<id>/out`."""
    asked, library = work.asked, work.studio.library
    row, form = library.usable(asked["adapter"]), asked["form"]
    out, name, source = work.folder / "out", slug(row["name"]), library.folder(row)
    out.mkdir()
    if form == "peft":
        work.tell("Packing")
        place = _zipped(row, source, out / f"{name}.zip")
    elif form == "merged":
        place = _merged(work, row, out / f"{name}-merged")
    elif form == "gguf-adapter":
        work.tell("Writing the file")
        place = exporting.write_gguf_adapter(row["base"], source, out / f"{name}-lora.gguf", row["name"])
    elif form == "gguf":
        answerer, precision = work.opened([row], precision=exporting.merging_precision(form)), asked["precision"]
        place = exporting.write_gguf(
            answerer, NAME, out / f"{name}-{precision}.gguf", precision, row["name"], work.tell
        )
    else:
        from engine.formats import write_diffusers, write_kohya

        answerer = work.opened([row])
        work.tell("Writing the file")
        write = write_kohya if form == "kohya" else write_diffusers
        place = write(answerer.parts, out / f"{name}.safetensors", NAME)
    return {
        "path": place.relative_to(work.folder).as_posix(),
        "bytes": _length(place),
        "message": f"{place.name} is ready.",
        "adapter": row["id"],
        "form": form,
    }


def slug(name: str) -> str:
    """A name as a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:60] or "adapter"


def _length(place: Path) -> int:
    return sum(path.stat().st_size for path in ([place] if place.is_file() else place.rglob("*")) if path.is_file())


def _zipped(row: Row, folder: Path, place: Path) -> Path:
    """The adapter's files and its card in a zip; tensors do not pack, so they are stored as they are."""
    with zipfile.ZipFile(place, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.name.startswith(".") and path.name != cards.CARD:
                archive.write(path, path.relative_to(folder).as_posix())
        archive.writestr(cards.CARD, cards.card(row, "adapter"))
    return place


def _merged(work: Work, row: Row, place: Path, repository: str = "") -> Path:
    exporting.write_merged(work.opened([row]), row["base"], work.studio.library.folder(row), place, work.tell)
    cards.finish_merged(row, place, repository)
    return place


def push(work: Work) -> Row:
    """An adapter, or its base with it, into a new repository of the hub; what was laid out for it goes again."""
    asked, library = work.asked, work.studio.library
    row, place = library.usable(asked["adapter"]), work.folder / "push"
    try:
        if asked["what"] == "merged":
            _merged(work, row, place, asked["repository"])
        else:
            place.mkdir()
            cards.lay_out_adapter(row, library.folder(row), place, asked["repository"])
        length = _length(place)
        url = hub.upload(place, asked["repository"], asked["private"], f"Upload {row['name']}", work.tell)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return {"url": url, "bytes": length, "message": f"{row['name']} is on the hub.", "adapter": row["id"]}
