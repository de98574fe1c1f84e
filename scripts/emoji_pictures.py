"""Noto's colour emoji as pictures with their English names, for the small picture models and the samples.

    apt-get download fonts-noto-color-emoji && dpkg-deb -x fonts-noto-color-emoji*.deb font
    npm pack cldr-annotations-full && tar xzf cldr-annotations-full-*.tgz
    pip install fonttools

The font is under the SIL Open Font License 1.1, the names (Unicode CLDR) under the Unicode License.
"""

from __future__ import annotations

import colorsys
import io
import json
import random
from pathlib import Path

from PIL import Image, ImageOps

FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
NAMES = "annotations/en/annotations.json"
SIDE = 64
# Signs rather than things: a picture of them says nothing to a person.
SIGNS = ("button", "o’clock", "thirty", "arrow", "Japanese", "sign", "square", "circle", "triangle", "hand", "finger")
COLOURS = {
    "red": (214, 48, 49),
    "orange": (240, 147, 43),
    "yellow": (249, 220, 92),
    "green": (70, 160, 90),
    "blue": (52, 103, 205),
    "purple": (130, 80, 180),
    "grey": (140, 145, 150),
    "black": (20, 20, 24),
}


def emoji(font: Path, annotations: Path) -> dict[str, Image.Image]:
    """Name -> the picture with its transparency, in the order of code points."""
    from fontTools.ttLib import TTFont

    names = json.loads((annotations / NAMES).read_text(encoding="utf-8"))["annotations"]["annotations"]
    opened = TTFont(font / FONT)
    strike, codes = opened["CBDT"].strikeData[0], opened.getBestCmap()
    found: dict[str, Image.Image] = {}
    for code in sorted(codes):
        spoken = names.get(chr(code), {}).get("tts")
        if code < 0x1F300 or not spoken or codes[code] not in strike:
            continue
        name = spoken[0].lower()
        if ":" in name or any(sign.lower() in name for sign in SIGNS):
            continue
        drawn = Image.open(io.BytesIO(strike[codes[code]].imageData)).convert("RGBA")
        found[name] = ImageOps.pad(drawn, (128, 128), color=(0, 0, 0, 0))
    return found


def on_ground(
    drawn: Image.Image,
    ground: tuple[int, int, int] = (255, 255, 255),
    part: float = 0.9,
    shift: tuple[int, int] = (0, 0),
) -> Image.Image:
    """The picture at `part` of a square of `SIDE` pixels, on a plain ground."""
    side = round(SIDE * part)
    small = drawn.resize((side, side), Image.Resampling.LANCZOS)
    whole = Image.new("RGB", (SIDE, SIDE), ground)
    whole.paste(small, ((SIDE - side) // 2 + shift[0], (SIDE - side) // 2 + shift[1]), small)
    return whole


def blueprint(drawn: Image.Image, part: float = 0.9) -> Image.Image:
    """White lines on deep blue: the style that the sample for pictures teaches."""
    grey = ImageOps.autocontrast(ImageOps.invert(on_ground(drawn, part=part).convert("L")))
    return ImageOps.colorize(grey, black=(16, 42, 120), white=(225, 238, 255))


def varied(
    drawn: Image.Image, rng: random.Random, free_ground: bool = True, ground: tuple[int, int, int] | None = None
) -> Image.Image:
    """The picture moved, scaled and mirrored a little, sometimes on another ground."""
    if ground is None:
        ground = (255, 255, 255)
        free = free_ground and rng.random() < 0.7
    else:
        free = False
    if free:
        hue, light, strength = rng.random(), rng.uniform(0.05, 0.95), rng.random()
        ground = tuple(round(255 * value) for value in colorsys.hls_to_rgb(hue, light, strength))
    turned = ImageOps.mirror(drawn) if rng.random() < 0.5 else drawn
    reach = 4 if free_ground else 2
    shift = (rng.randint(-reach, reach), rng.randint(-reach, reach))
    return on_ground(turned, ground, rng.uniform(0.72, 0.95), shift)
