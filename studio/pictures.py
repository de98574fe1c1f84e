"""Pictures as the pages show them: small ones inside the HTML itself, so that no folder has to be served."""

from __future__ import annotations

import base64
import functools
import io

from engine.data import PictureError, open_picture
from studio.markup import esc


@functools.lru_cache(maxsize=512)
def _encoded(reference: str, side: int) -> tuple[str, bool]:
    """The picture as a `data:` address, and whether it is smaller than it will be shown."""
    try:
        picture = open_picture(reference)
    except PictureError:
        return "", False
    small = max(picture.size) < side
    picture.thumbnail((2 * side, 2 * side))
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode(), small


def inlined(reference: str, side: int = 512) -> str:
    """A picture as a `data:` address, "" where there is none."""
    return _encoded(reference, side)[0] if reference else ""


def thumbnail(reference: str, words: str = "", side: int = 96) -> str:
    """An `<img>` of a picture by its reference; its words stand in where it cannot be opened."""
    source, small = _encoded(reference, side)
    if not source:
        return f'<span class="st-hint">picture missing {esc(words)}</span>'
    # Pixels of small ones are shown as they are, not blurred.
    kind = "st-thumb small" if small else "st-thumb"
    return f'<img class="{kind}" src="{source}" alt="{esc(words)}" style="height:{side}px" loading="lazy">'
