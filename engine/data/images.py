"""Pictures with captions: a folder or a zip of them becomes a `Table` with the columns `image` and `text`.

Captions stand in `metadata.jsonl` or `metadata.csv` (`file_name` and `text`, as the `datasets` library reads them),
or in a `.txt` of the same name beside each picture. A zip is read where it is: nothing of it is ever unpacked to disk,
so no name in it can lead anywhere. A picture is known by a reference, `FOLDER/cat.png` or `FILE.zip!cat.png`.
"""

from __future__ import annotations

import csv
import io
import json
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from PIL import Image, ImageOps, UnidentifiedImageError

from engine.data.encoding import decode
from engine.data.errors import ArchiveError, EmptyError, FileError, PictureError, TooLargeError
from engine.data.table import Limits, ProblemLog, Row, Table, safe_text

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv")
CAPTIONS = ("text", "caption", "prompt", "description", "additional_feature", "캡션", "설명")
NAMES = ("file_name", "image", "file", "filename", "path", "파일")
_MARK = ".zip!"
_LONGEST_TEXT = 20_000_000
_END = b"PK\x05\x06"
_END64 = b"PK\x06\x06"


class Source(Protocol):
    """A folder or a zip: its files by name (with `/`), and their bytes."""

    names: list[str]

    def size(self, name: str) -> int: ...

    def read(self, name: str) -> bytes: ...

    def reference(self, name: str) -> str: ...


@dataclass
class _Folder:
    path: Path
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        root = self.path.resolve()
        for file in sorted(self.path.rglob("*")):
            # A link could lead out of the folder that was named.
            if file.is_file() and file.resolve().is_relative_to(root):
                self.names.append(file.relative_to(self.path).as_posix())

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def reference(self, name: str) -> str:
        return str(self.path.absolute() / name)


@dataclass
class _Zip:
    path: Path
    limits: Limits
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_directory(self.path, self.limits)
        try:
            with zipfile.ZipFile(self.path) as opened:
                self.entries = {entry.filename: entry for entry in opened.infolist() if not entry.is_dir()}
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise ArchiveError(f"{self.path.name} is no zip that can be read: {error}.", "Pack it again.") from error
        for name, entry in self.entries.items():
            _check_entry(self.path.name, name, entry)
        unpacked = sum(entry.file_size for entry in self.entries.values())
        if unpacked > self.limits.max_unpacked_zip:
            raise TooLargeError(
                f"{self.path.name} would be {unpacked / 2**30:,.1f} GiB unpacked; at most "
                f"{self.limits.max_unpacked_zip / 2**30:,.0f} GiB are read.",
                "Take out what is no picture, make the pictures smaller, or split the archive.",
            )
        self.names = sorted(self.entries)

    def size(self, name: str) -> int:
        return self.entries[name].file_size

    def read(self, name: str) -> bytes:
        return _read_member(self.path, name, self.limits.max_picture_bytes)

    def reference(self, name: str) -> str:
        return f"{self.path.absolute()}!{name}"


def is_pictures(path: Path) -> bool:
    """Whether a path is one that `read_pictures` takes."""
    return path.is_dir() or path.suffix.lower() == ".zip"


def read_pictures(path: str | Path, limits: Limits | None = None) -> Table:
    """The pictures of a folder or a zip and what is said of them; each picture is opened once to see that it can be.

    A row's `line` counts the pictures, or the lines of the metadata. A picture that cannot be used, or of which nothing
    is said while something is said of others, is skipped and reported; one that is converted is reported and kept.

    Raises:
        ArchiveError: no zip, encrypted, or a name in it leads out of it.
        TooLargeError: more files, or more bytes unpacked, than the limits allow.
        EmptyError: there is no picture.
        FileError: the path cannot be opened.
    """
    limits, path = limits or Limits(), Path(path)
    try:
        source: Source = _Folder(path) if path.is_dir() else _Zip(path, limits)
    except OSError as error:
        raise FileError(f"{path.name} cannot be opened: {error.strerror or error}.", "Check its rights.") from error
    shown = [name for name in source.names if _visible(name)]
    pictures = [name for name in shown if name.lower().endswith(PICTURES)]
    if not pictures:
        kinds = ", ".join(sorted({Path(name).suffix.lower() for name in shown if Path(name).suffix})[:8])
        raise EmptyError(
            f"{path.name} holds no picture ({', '.join(PICTURES)}){'; it has ' + kinds if kinds else ''}.",
            "Give pictures with a .txt of the same name beside each, or with a metadata.csv (file_name, text).",
        )
    if len(pictures) > limits.max_pictures:
        raise TooLargeError(
            f"{path.name} holds {len(pictures):,} pictures; at most {limits.max_pictures:,} are read.", "Split it."
        )
    log = ProblemLog("picture")
    said = _captions(source, shown, pictures, log)
    captioned = any(text for _, _, text in said)
    rows = [
        Row(line, {"image": source.reference(name), **({"text": text} if captioned else {})})
        for line, name, text in said
        if _usable(source, name, text, line, captioned, log, limits)
    ]
    columns = ["image", "text"] if captioned else ["image"]
    return Table("pictures", columns, rows, log, name=path.name)


def open_picture(reference: str, max_pixels: int = Limits().max_pixels) -> Image.Image:
    """A picture by its reference as RGB: turned as its camera says, transparent parts white, the first of its frames.

    Raises:
        PictureError: it is not there, damaged, or has more than `max_pixels`.
    """
    where, mark, member = reference.partition(_MARK)
    name = PurePosixPath(member or reference).name
    try:
        if mark:
            raw = _read_member(Path(where + ".zip"), member, Limits().max_picture_bytes)
        else:
            raw = Path(reference).read_bytes()
    except (OSError, KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise PictureError(f"The picture {name} cannot be opened: {error}.", "Give the data set again.") from error
    return _decoded(name, raw, max_pixels)[0]


def _decoded(name: str, raw: bytes, max_pixels: int) -> tuple[Image.Image, list[tuple[str, str]]]:
    """The picture as RGB and what was changed to get there."""
    changed: list[tuple[str, str]] = []
    try:
        with warnings.catch_warnings():
            # Its limit is a warning up to twice as large; ours is an error, and is checked before a pixel is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture: Image.Image = Image.open(io.BytesIO(raw))
            if picture.width * picture.height > max_pixels:
                raise PictureError(
                    f"The picture {name} has {picture.width:,} x {picture.height:,} pixels; at most {max_pixels:,} are "
                    "opened.",
                    "Make it smaller.",
                    code="picture-too-large",
                )
            frames = getattr(picture, "n_frames", 1)
            if frames > 1:
                changed.append(("animated", f"It has {frames} frames; the first is used."))
                picture.seek(0)
            picture.load()
            return _as_rgb(ImageOps.exif_transpose(picture), changed), changed
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        # Pillow's own limit, by the header alone.
        raise PictureError(
            f"The picture {name} has far more than the {max_pixels:,} pixels that are opened: {error}.",
            "Make it smaller.",
            code="picture-too-large",
        ) from error
    # Pillow's decoders raise many kinds for a damaged file, SyntaxError and struct.error among them.
    except Exception as error:
        # Pillow's words for an unknown kind name an object in memory.
        why = "its bytes are of no kind that is known" if isinstance(error, UnidentifiedImageError) else str(error)
        raise PictureError(
            f"The picture {name} is damaged or no picture: {why}.", "Save it again as PNG or JPEG."
        ) from error


def _as_rgb(picture: Image.Image, changed: list[tuple[str, str]]) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        import numpy as np

        values = np.asarray(picture).astype(np.float64)
        # 16 bits as they are; other depths by their own range, since they say none.
        top = 65535.0 if picture.mode.startswith("I;16") or values.max(initial=0) <= 65535 else values.max()
        picture = Image.fromarray(np.clip(values / max(top, 1.0) * 255, 0, 255).astype(np.uint8))
        changed.append(("deep", "It has 16 or more bits a colour; 8 are kept."))
    elif picture.mode == "CMYK":
        changed.append(("cmyk", "Its colours are meant for print (CMYK) and were turned into RGB."))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        whole = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole)
    return picture.convert("RGB")


# --- captions ------------------------------------------------------------------------------------------------------


def _captions(source: Source, shown: Iterable[str], pictures: list[str], log: ProblemLog) -> list[tuple[int, str, str]]:
    """(line, picture, what is said of it or "") for every row."""
    shown = set(shown)
    tables = [name for name in shown if PurePosixPath(name).name.lower() in METADATA]
    if not tables:
        return [(n, name, _beside(source, name, shown)) for n, name in enumerate(pictures, 1)]
    # The one nearest the root: an archive often has one folder around everything.
    table = min(tables, key=lambda name: (name.count("/"), not name.lower().endswith(".jsonl"), name))
    around = table.rpartition("/")[0]
    found: list[tuple[int, str, str]] = []
    named: set[str] = set()
    for line, cells in _metadata(source, table):
        plain = {key.strip().lower(): value for key, value in cells.items() if isinstance(key, str)}
        name = next((str(plain[key]) for key in NAMES if plain.get(key)), "").replace("\\", "/")
        text = next((value for key in CAPTIONS if isinstance(value := plain.get(key), str) and value.strip()), "")
        full = f"{around}/{name}" if around else name
        if full not in shown:
            log.skip(line, "", "no-picture", f"{table} names {name[:80]!r}, which is not there.")
            continue
        named.add(full)
        found.append((line, full, safe_text(text.strip())))
    last = max((line for line, _, _ in found), default=0)
    rest = [name for name in pictures if name not in named]
    return [*found, *((last + n, name, _beside(source, name, shown)) for n, name in enumerate(rest, 1))]


def _beside(source: Source, picture: str, shown: Iterable[str]) -> str:
    for other in (f"{picture.rpartition('.')[0]}.txt", f"{picture}.txt", f"{picture.rpartition('.')[0]}.caption"):
        if other in shown and source.size(other) <= _LONGEST_TEXT:
            text, _ = decode(other, source.read(other))
            return safe_text(text.strip())
    return ""


def _metadata(source: Source, name: str) -> Iterable[tuple[int, Mapping[str, Any]]]:
    if source.size(name) > _LONGEST_TEXT * 5:
        raise TooLargeError(f"{name} is {source.size(name) / 2**20:,.0f} MiB long.", "Split the data set.")
    text, _ = decode(name, source.read(name))
    if name.lower().endswith(".csv"):
        yield from ((n, cells) for n, cells in enumerate(csv.DictReader(io.StringIO(text)), 1))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        except (ValueError, RecursionError):
            cells = None
        yield number, cells if isinstance(cells, dict) else {}


def _usable(source: Source, name: str, text: str, line: int, captioned: bool, log: ProblemLog, limits: Limits) -> bool:
    short = PurePosixPath(name).name
    if captioned and not text:
        log.skip(line, "", "no-caption", f"Nothing is said of {short}: there is no .txt beside it and no metadata row.")
        return False
    if source.size(name) > limits.max_picture_bytes:
        most = f"at most {limits.max_picture_bytes / 2**20:,.0f} are opened"
        log.skip(line, "", "picture-too-large", f"{short} has {source.size(name) / 2**20:,.0f} MiB; {most}.")
        return False
    try:
        _, changed = _decoded(short, source.read(name), limits.max_pixels)
    except PictureError as error:
        log.skip(line, "", error.code, error.message)
        return False
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        log.skip(line, "", PictureError.code, f"{short} cannot be read: {error}.")
        return False
    for code, message in changed:
        log.fix(line, "", code, f"{short}: {message}")
    return True


def _visible(name: str) -> bool:
    """Without what systems leave in folders: `.DS_Store`, `__MACOSX/._cat.png`."""
    return not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


# --- zip -----------------------------------------------------------------------------------------------------------


def _check_directory(path: Path, limits: Limits) -> None:
    """Refuse a zip by the numbers at its end, before a table of a million entries is built in memory.

    Raises:
        ArchiveError: there is no such end.
        TooLargeError: it lists more files than the limits allow.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 65_557))
        tail = file.read()
        place = tail.rfind(_END)
        if place < 0 or len(tail) < place + 22:
            raise ArchiveError(f"{path.name} is no zip, or was cut off.", "Pack it again, or fetch it again.")
        count, length = struct.unpack("<HI", tail[place + 10 : place + 16])
        if count == 0xFFFF or length == 0xFFFFFFFF:
            wide = tail.rfind(_END64)
            if wide < 0 or len(tail) < wide + 48:
                raise ArchiveError(f"{path.name} is no zip, or was cut off.", "Pack it again, or fetch it again.")
            count, length = struct.unpack("<QQ", tail[wide + 32 : wide + 48])
    # Each picture may have a text beside it; a table of so many names is a few megabytes.
    most = 3 * limits.max_pictures
    if count > most or length > 512 * most:
        raise TooLargeError(f"{path.name} lists {count:,} files; at most {most:,} are read.", "Split it.")


def _check_entry(archive: str, name: str, entry: zipfile.ZipInfo) -> None:
    parts = re.split(r"[/\\]", name)
    if ".." in parts or name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name) or "\0" in name:
        raise ArchiveError(
            f"{archive} holds the name {name[:80]!r}, which leads out of the archive.", "Pack it again without it."
        )
    if entry.flag_bits & 0x1:
        raise ArchiveError(f"{archive} is encrypted ({name[:80]}).", "Pack it again without a password.")


def _read_member(path: Path, name: str, limit: int) -> bytes:
    """At most `limit` bytes of a file in a zip, whatever its header promises."""
    with zipfile.ZipFile(path) as opened, opened.open(name) as member:
        raw = member.read(limit + 1)
    if len(raw) > limit:
        raise OSError(f"it is longer than {limit / 2**20:,.0f} MiB")
    return raw
