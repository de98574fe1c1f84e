"""Contact sheets: pictures or texts of the same rows side by side, so that a change is seen at a glance."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_CELL, _GAP, _HEAD = 160, 8, 22
Cell = Image.Image | str


def sheet(heads: Sequence[str], rows: Sequence[Sequence[Cell]], cell: int = _CELL) -> Image.Image:
    """A table of cells, each a picture or a text, under their heads.

    Small pictures are enlarged without smoothing, so that their pixels are seen as they are.
    """
    width = len(heads) * (cell + _GAP) + _GAP
    whole = Image.new("RGB", (width, _HEAD + len(rows) * (cell + _GAP) + _GAP), "white")
    draw = ImageDraw.Draw(whole)
    for column, head in enumerate(heads):
        draw.text((_GAP + column * (cell + _GAP), 4), head, fill="black", font=ImageFont.load_default(13))
    for number, row in enumerate(rows):
        top = _HEAD + number * (cell + _GAP)
        for column, content in enumerate(row):
            left = _GAP + column * (cell + _GAP)
            if isinstance(content, str):
                text = "\n".join(textwrap.wrap(content, max(8, cell // 8))[: cell // 16])
                draw.multiline_text((left, top), text, fill="black", font=ImageFont.load_default(13))
            else:
                whole.paste(_fitted(content, cell), (left, top))
    return whole


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    grown = side / max(picture.size)
    size = (max(1, round(picture.width * grown)), max(1, round(picture.height * grown)))
    return picture.resize(size, Image.Resampling.NEAREST if grown > 1 else Image.Resampling.LANCZOS)


def write_picture(picture: Image.Image, path: Path) -> Path:
    """A PNG that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    picture.save(draft, "PNG")
    draft.replace(path)
    return path
