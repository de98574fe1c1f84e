"""Pictures with captions: a folder or a zip of them becomes a `Table` with the columns `image` and `text`.

Captions stand in `metadata.jsonl` or `metadata.csv` (`file_name` and `text`, as the `datasets` library reads them),
or in a `.txt` of the same name beside each picture. A zip is read where it is: nothing of it is ever unpacked to disk,
so no name in it can lead anywhere. A picture is known by a reference, `FOLDER/cat.png` or `FILE.zip!cat.png`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from engine.data.encoding import decode
from engine.data.errors import ArchiveError, EmptyError, FileError, PictureError, TooLargeError
from engine.data.fixes import words
from engine.data.sources import FolderSource, Source, ZipSource, read_member
from engine.data.table import Limits, ProblemLog, Row, Table, safe_text

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv")
CAPTIONS = ("text", "caption", "prompt", "description", "additional_feature", "캡션", "설명")
NAMES = ("file_name", "image", "file", "filename", "path", "파일")
_MARK = ".zip!"
_LONGEST_TEXT = 20_000_000
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")


_DEEP = ("deep", "It has 16 or more bits a colour; 8 are kept.")


def is_pictures(path: Path) -> bool:
    """Whether a path is one that `read_pictures` takes."""
    return path.is_dir() or path.suffix.lower() == ".zip"


def read_pictures(path: str | Path, limits: Limits | None = None, fixes: Mapping[str, str] | None = None) -> Table:
    """The pictures of a folder or a zip and what is said of them; each picture is opened once to see that it can be.

    A row's `line` counts the pictures, or the lines of the metadata. A picture that cannot be used, or of which nothing
    is said while something is said of others, is skipped and reported; one that is converted is reported and kept. A
    row's cells also have the `digest` of the picture's file, by which equal ones are known.

    Raises:
        ArchiveError: no zip, encrypted, or a name in it leads out of it.
        TooLargeError: more files, or more bytes unpacked, than the limits allow.
        EmptyError: there is no picture.
        FileError: the path cannot be opened.
    """
    limits, path = limits or Limits(), Path(path)
    try:
        source: Source = FolderSource(path) if path.is_dir() else ZipSource(path, limits)
    except OSError as error:
        raise FileError(f"{path.name} cannot be opened: {error.strerror or error}.", "Check its rights.") from error
    shown = [name for name in source.names if _visible(name)]
    pictures = [name for name in shown if _is_picture(name)]
    left_out = [one for one in source.left_out if _visible(one[0])]
    if not pictures:
        kinds = ", ".join(sorted({Path(name).suffix.lower() for name in shown if Path(name).suffix})[:8])
        raise EmptyError(
            f"{path.name} holds no picture ({', '.join(PICTURES)}){'; it has ' + kinds if kinds else ''}."
            f"{' ' + left_out[0][2] if left_out else ''}",
            "Give pictures with a .txt of the same name beside each, or with a metadata.csv (file_name, text).",
        )
    if len(pictures) > limits.max_pictures:
        raise TooLargeError(
            f"{path.name} holds {len(pictures):,} pictures; at most {limits.max_pictures:,} are read.", "Split it."
        )
    log = ProblemLog("picture")
    said, used = _captions(source, shown, pictures, log)
    captioned = any(text for _, _, text in said)
    if captioned and (instead := words(fixes or {}, "no-caption")):
        said = [(line, name, text or _filled(line, name, instead, log)) for line, name, text in said]
    rows = []
    for line, name, text in said:
        digest = _usable(source, name, text, line, captioned, log, limits)
        if digest:
            caption = {"text": text} if captioned else {}
            rows.append(Row(line, {"image": source.reference(name), **caption, "digest": digest}))
    _tell_the_rest(left_out, [name for name in shown if name not in used and not _is_picture(name)], said, log)
    columns = ["image", "text"] if captioned else ["image"]
    return Table("pictures", columns, rows, log, name=path.name)


def _tell_the_rest(
    left_out: Iterable[tuple[str, str, str]], unused: Iterable[str], said: list[tuple[int, str, str]], log: ProblemLog
) -> None:
    """What was not looked at is said too: pictures count as skipped rows, other files are noted."""
    last = max((line for line, _, _ in said), default=0)
    for name, code, message in left_out:
        if _is_picture(name):
            last += 1
            log.skip(last, "", code, message)
        else:
            log.note(0, "", code, message)
    for name in unused:
        if name.lower().endswith(_ARCHIVES):
            log.note(0, "", "nested-archive", f"{name[:80]} is an archive inside; it was not opened.")
        else:
            log.note(0, "", "unused-file", f"{name[:80]} is no picture that is read here, and no words of one.")


def open_picture(reference: str, max_pixels: int = Limits().max_pixels) -> Image.Image:
    """A picture by its reference as RGB: turned as its camera says, transparent parts white, the first of its frames.

    Raises:
        PictureError: it is not there, damaged, or has more than `max_pixels`.
    """
    where, mark, member = reference.partition(_MARK)
    name = PurePosixPath(member or reference).name
    try:
        raw = read_member(Path(where + ".zip"), member, Limits()) if mark else Path(reference).read_bytes()
    except (OSError, ArchiveError, TooLargeError) as error:
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
            # Not `n_frames`, for which a GIF is read to its end: a small file may hold millions.
            if getattr(picture, "is_animated", False):
                changed.append(("animated", "It has more than one frame; the first is used."))
                picture.seek(0)
            # Pillow halves colours of 16 bits while it reads them, and only its decoder's settings say so.
            if ";16" in str(getattr(picture, "tile", "")) and not picture.mode.startswith("I"):
                changed.append(_DEEP)
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
        changed.append(_DEEP)
    elif picture.mode == "CMYK":
        changed.append(("cmyk", "Its colours are meant for print (CMYK) and were turned into RGB."))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        whole = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole)
    return picture.convert("RGB")


# --- captions ------------------------------------------------------------------------------------------------------


def _captions(
    source: Source, shown: Iterable[str], pictures: list[str], log: ProblemLog
) -> tuple[list[tuple[int, str, str]], set[str]]:
    """(line, picture, what is said of it or "") for every row, and the files that the words come from."""
    shown = set(shown)
    used: set[str] = set()
    tables = [name for name in shown if PurePosixPath(name).name.lower() in METADATA]
    if not tables:
        return [(n, name, _beside(source, name, shown, used, log)) for n, name in enumerate(pictures, 1)], used
    # The one nearest the root: an archive often has one folder around everything.
    table = min(tables, key=lambda name: (name.count("/"), not name.lower().endswith(".jsonl"), name))
    used.add(table)
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
    found += [(last + n, name, _beside(source, name, shown, used, log)) for n, name in enumerate(rest, 1)]
    return found, used


def _beside(source: Source, picture: str, shown: Iterable[str], used: set[str], log: ProblemLog) -> str:
    for other in (f"{picture.rpartition('.')[0]}.txt", f"{picture}.txt", f"{picture.rpartition('.')[0]}.caption"):
        if other in shown and source.size(other) <= _LONGEST_TEXT:
            used.add(other)
            try:
                text, _ = decode(other, source.read(other))
            except OSError as error:
                log.note(0, "", "unread-words", f"{other[:80]} cannot be read: {error}.")
                return ""
            return safe_text(text.strip())
    return ""


def _metadata(source: Source, name: str) -> Iterable[tuple[int, Mapping[str, Any]]]:
    if source.size(name) > _LONGEST_TEXT * 5:
        raise TooLargeError(f"{name} is {source.size(name) / 2**20:,.0f} MiB long.", "Split the data set.")
    try:
        text, _ = decode(name, source.read(name))
    except OSError as error:
        raise ArchiveError(f"{name} cannot be read: {error}.", "Pack it again, or give a .txt beside each.") from error
    if name.lower().endswith(".csv"):
        try:
            yield from ((n, cells) for n, cells in enumerate(csv.DictReader(io.StringIO(text)), 1))
        except csv.Error as error:
            raise FileError(f"{name} is no csv that can be read: {error}.", "Keep file_name and text.") from error
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        except (ValueError, RecursionError):
            cells = None
        yield number, cells if isinstance(cells, dict) else {}


def _filled(line: int, name: str, instead: str, log: ProblemLog) -> str:
    log.fix(line, "", "no-caption", f"Nothing is said of {PurePosixPath(name).name}; it gets {instead[:60]!r}.")
    return instead


def _usable(source: Source, name: str, text: str, line: int, captioned: bool, log: ProblemLog, limits: Limits) -> str:
    """The digest of a picture that can be used, "" of one that cannot; the log knows why."""
    short = PurePosixPath(name).name
    if captioned and not text:
        log.skip(line, "", "no-caption", f"Nothing is said of {short}: there is no .txt beside it and no metadata row.")
        return ""
    if source.size(name) > limits.max_picture_bytes:
        most = f"at most {limits.max_picture_bytes / 2**20:,.0f} are opened"
        log.skip(line, "", "picture-too-large", f"{short} has {source.size(name) / 2**20:,.0f} MiB; {most}.")
        return ""
    try:
        raw = source.read(name)
        _, changed = _decoded(short, raw, limits.max_pixels)
    except PictureError as error:
        log.skip(line, "", error.code, error.message)
        return ""
    except OSError as error:
        log.skip(line, "", PictureError.code, f"{short} cannot be read: {error}.")
        return ""
    for code, message in changed:
        log.fix(line, "", code, f"{short}: {message}")
    return hashlib.sha256(raw).hexdigest()[:16]


def _is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURES)


def _visible(name: str) -> bool:
    """Without what systems leave in folders: `.DS_Store`, `__MACOSX/._cat.png`."""
    return not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
