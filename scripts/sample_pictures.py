"""Write the sample data sets of pictures: emoji on coloured grounds with captions, and emoji as blueprints.

    python scripts/sample_pictures.py --font font --annotations package --out examples

`scripts/emoji_pictures.py` says where the pictures come from.
"""

from __future__ import annotations

import argparse
import io
import random
import zipfile
from collections.abc import Sequence
from pathlib import Path

from emoji_pictures import COLOURS, blueprint, emoji, on_ground
from PIL import Image

GROUNDS = 160
BLUEPRINTS = 48


def write(path: Path, rows: Sequence[tuple[Image.Image, str]]) -> None:
    """A zip of pictures with `metadata.csv`; the same bytes for the same rows."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        lines = ["file_name,text"]
        for number, (picture, text) in enumerate(rows):
            name = f"{number:03}.png"
            out = io.BytesIO()
            picture.quantize(48).save(out, "PNG", optimize=True)
            archive.writestr(zipfile.ZipInfo(name), out.getvalue())
            lines.append(f"{name},{text}")
        archive.writestr(zipfile.ZipInfo("metadata.csv"), "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font", type=Path, required=True, help="the unpacked Debian package")
    parser.add_argument("--annotations", type=Path, required=True, help="the unpacked npm package")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pictures = emoji(args.font, args.annotations)
    rng = random.Random(0)
    plain = [name for name in pictures if "," not in name and len(name.split()) <= 2]
    grounds = []
    for name in rng.sample(plain, GROUNDS):
        colour = rng.choice(list(COLOURS))
        article = "an" if colour == "orange" else "a"
        picture = on_ground(pictures[name], COLOURS[colour], 0.85)
        grounds.append((picture, f"{name} on {article} {colour} background"))
    write(args.out / "emoji_grounds.zip", grounds)
    drawn = rng.sample(plain, BLUEPRINTS)
    write(args.out / "emoji_blueprints.zip", [(blueprint(pictures[name]), f"{name} blueprint") for name in drawn])


if __name__ == "__main__":
    main()
