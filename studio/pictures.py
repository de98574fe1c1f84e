"""Pictures as the pages show them: small ones inside the HTML itself, so that no folder has to be served."""

from __future__ import annotations

import base64
import functools
import io

from engine.data import PictureError, open_picture
from studio.markup import esc


@functools.lru_cache(maxsize=512)
def _encoded(reference: str, side: int) -> str:
    try:
        picture = open_picture(reference)
    except PictureError:
        return ""
    # Tiny pictures are enlarged as they are, large ones made small.
    picture.thumbnail((2 * side, 2 * side))
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def thumbnail(reference: str, words: str = "", side: int = 96) -> str:
    """An `<img>` of a picture by its reference; its words stand in where it cannot be opened."""
    source = _encoded(reference, side)
    if not source:
        return f'<span class="st-hint">picture missing {esc(words)}</span>'
    return f'<img class="st-thumb" src="{source}" alt="{esc(words)}" style="height:{side}px" loading="lazy">'
