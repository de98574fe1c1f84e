"""`read`: a file of any kind we know, checked before it is opened, as a `Table`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.data.columnar import read_parquet
from engine.data.delimited import read_csv
from engine.data.encoding import decode
from engine.data.errors import EmptyError, FileError, JsonError, KindError, TooLargeError
from engine.data.fixes import checked, way
from engine.data.images import read_pictures
from engine.data.table import Limits, ProblemLog, Row, Scrubber, Table, held_rows

KINDS: dict[str, str] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "txt",
    ".zip": "pictures",
}
"""File name ending -> kind."""

_ACCEPTED = "csv, tsv, json, jsonl, parquet, txt or (with pictures) zip"

_ENDS = re.compile(r"\r\n|\r|\n")

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"PAR1", "a Parquet file"),
    (b"PK\x03\x04", "a zip archive (or an Excel or Word file)"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive"),
    (b"Rar!", "a rar archive"),
    (b"%PDF", "a PDF"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"\x7fELF", "a program"),
    (b"ARROW1", "an Arrow file"),
    (b"\x80\x04\x95", "a pickle"),
    (b"\x80\x05\x95", "a pickle"),
)


def read(path: str | Path, *, limits: Limits | None = None, fixes: Mapping[str, str] | None = None) -> Table:
    """Read a csv, tsv, json, jsonl, parquet or txt file, or a folder or zip of pictures (`engine.data.images`).

    The name's ending decides the kind; the content is checked against it. Rows that cannot be read are skipped
    and reported with their place; a file that cannot be used at all raises.

    Args:
        path: the file or folder.
        limits: what is refused.
        fixes: of `engine.data.fixes`; those that are for `prepare` are left to it.

    Raises:
        DataError: with a code of its own for each cause (`engine.data.errors`).
    """
    limits, fixes = limits or Limits(), checked(fixes)
    path = Path(path)
    if path.is_dir():
        return read_pictures(path, limits, fixes)
    kind = _check_file(path, limits)
    if kind == "pictures":
        return read_pictures(path, limits, fixes)
    # The bytes are held by nobody here, so that they can go when they have become text.
    if kind == "parquet":
        table = read_parquet(path, _bytes_of(path, limits), limits)
    else:
        table = _read_text(path, kind, _bytes_of(path, limits), limits, fixes)
    if len(table.columns) > limits.max_columns:
        raise TooLargeError(
            f"{path.name} has {len(table.columns):,} different columns; at most {limits.max_columns:,} are read.",
            "Keep the columns that hold the text, and drop the rest.",
        )
    table.name = path.name
    return table


def _bytes_of(path: Path, limits: Limits) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise FileError(f"{path.name} cannot be opened: {error.strerror or error}.", "Check its rights.") from error
    if len(raw) > limits.max_bytes:
        raise _too_many_bytes(path.name, len(raw), limits.max_bytes)
    if not raw or raw.isspace():
        raise EmptyError(f"{path.name} is empty.", "Give a file with at least one row.")
    return raw


def fingerprint(source: str | Path | bytes) -> str:
    """The content's SHA-256, first 16 hex digits: equal for equal content, whatever the name.

    Of a folder: of its files' names and contents.
    """
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()[:16]
    if Path(source).is_dir():
        files = sorted(path for path in Path(source).rglob("*") if path.is_file())
        parts = [f"{path.relative_to(source).as_posix()}\0{fingerprint(path)}" for path in files]
        return fingerprint("\0".join(parts).encode())
    try:
        with open(source, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    except OSError as error:
        raise FileError(f"{Path(source).name} cannot be opened: {error.strerror or error}.") from error


def _check_file(path: Path, limits: Limits) -> str:
    """The kind by name, after the checks that need no content."""
    if not path.is_file():
        raise FileError(f"There is no file {str(path)!r}.", "Check the name and the folder.")
    size = path.stat().st_size
    if size == 0:
        raise EmptyError(f"{path.name} is empty (0 bytes).", "Give a file with at least one row.")
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        ending = path.suffix or "no ending"
        hint = f"Give a {_ACCEPTED} file."
        if path.suffix.lower() in (".xlsx", ".xls", ".ods"):
            hint = "In the spreadsheet program choose Save as, and then CSV UTF-8."
        elif path.suffix.lower() in (".gz", ".bz2", ".xz", ".zst"):
            hint = f"Unpack it, and give the {_ACCEPTED} file inside."
        raise KindError(f"{path.name} has {ending!r} as its ending, which is not read.", hint)
    if size > (limits.max_zip_bytes if kind == "pictures" else limits.max_bytes):
        raise _too_many_bytes(path.name, size, limits.max_zip_bytes if kind == "pictures" else limits.max_bytes)
    return kind


def _too_many_bytes(name: str, size: int, most: int) -> TooLargeError:
    return TooLargeError(
        f"{name} is {size / 2**20:,.1f} MiB; at most {most / 2**20:,.0f} MiB are read.",
        "Split the file, or keep the columns that hold the text.",
    )


def _check_magic(name: str, raw: bytes) -> None:
    found = next((what for magic, what in _MAGIC if raw.startswith(magic)), None)
    if found is None and re.match(rb"\s*<(!doctype html|html)\b", raw[:512], re.IGNORECASE):
        found = "a web page (was the download page saved?)"
    if found:
        raise KindError(
            f"{name} is {found}, not what its name says.",
            "Give the file its true ending." if raw.startswith(b"PAR1") else f"Give a {_ACCEPTED} file.",
        )


def _read_text(path: Path, kind: str, raw: bytes, limits: Limits, fixes: Mapping[str, str]) -> Table:
    _check_magic(path.name, raw)
    text, encoding = decode(path.name, raw)
    del raw
    if not text or text.isspace():
        raise EmptyError(f"{path.name} holds only white space.", "Give a file with at least one row.")
    if kind == "csv":
        level = way(fixes, "ragged") == "trim"
        table = read_csv(path.name, text, limits, path.suffix.lower() in (".tsv", ".tab"), level)
    elif kind == "txt":
        table = _read_txt(path.name, text, limits)
    else:
        table = _read_json(path.name, text, kind, limits)
    table.encoding = encoding
    return table


def _lines(text: str) -> Iterator[tuple[int, str]]:
    r"""Physical lines with their numbers; `\n`, `\r\n` and `\r` end a line, U+2028 and form feeds do not."""
    start, number = 0, 1
    # Piece by piece: a stream over the text would be a copy of four bytes a character.
    for end in _ENDS.finditer(text):
        yield number, text[start : end.start()]
        start, number = end.end(), number + 1
    if start < len(text):
        yield number, text[start:]


# --- txt -----------------------------------------------------------------------------------------------------------


def _read_txt(name: str, text: str, limits: Limits) -> Table:
    """Paragraphs that blank lines separate; one row a line where there are no blank lines between."""
    body = text.strip("\r\n")
    paragraphs = any(not line.strip() for _, line in _lines(body))
    log = ProblemLog("line")
    scrub = Scrubber(limits, log)
    rows = held_rows()

    def add(start: int, lines: list[str]) -> None:
        cells = scrub.row(start, {"text": "\n".join(lines)})
        if cells is not None:
            rows.append(Row(start, cells))
        _check_rows(name, len(rows) + log.skipped, limits)

    start, held = 0, list[str]()
    for number, line in _lines(text):
        if line.strip():
            start = start if held else number
            held.append(line)
        if held and not (paragraphs and line.strip()):
            add(start, held)
            held = []
    if held:
        add(start, held)
    return Table("txt", ["text"], rows, log)


def _check_rows(name: str, count: int, limits: Limits) -> None:
    if count > limits.max_rows:
        raise TooLargeError(
            f"{name} has more than {limits.max_rows:,} rows, and no more are read.", "Split the file, or sample it."
        )


# --- json and jsonl ------------------------------------------------------------------------------------------------


def _read_json(name: str, text: str, kind: str, limits: Limits) -> Table:
    """A list of objects, or one object a line; whichever the content is, whatever the name says."""
    if text.count("[") + text.count("{") > limits.max_nested:
        raise TooLargeError(
            f"{name} opens more than {limits.max_nested:,} lists and objects.", "Split the file into smaller ones."
        )
    if kind == "jsonl" and not text.lstrip().startswith("["):
        return _read_jsonl(name, text, limits)
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise _too_deep(name) from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and (kind == "jsonl" or _is_object(text.lstrip().split("\n", 1)[0])):
            return _read_jsonl(name, text, limits)
        raise JsonError(
            f"{name} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}.",
            "Correct that place, or write one object a line and name the file .jsonl.",
        ) from error
    except ValueError as error:
        raise JsonError(f"{name} holds a number that is too long to read.", "Write it as text, in quotes.") from error
    return _from_objects(name, content, limits)


def _too_deep(name: str) -> JsonError:
    return JsonError(
        f"{name} has lists or objects nested too deeply to be data.", "Needed: a list of objects with text in them."
    )


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _from_objects(name: str, content: Any, limits: Limits) -> Table:
    if isinstance(content, dict):
        lists = [value for value in content.values() if _is_rows(value)]
        content = content["data"] if _is_rows(content.get("data")) else lists[0] if len(lists) == 1 else content
    if isinstance(content, list) and not content:
        raise EmptyError(f"{name} is an empty list.", "Give a file with at least one row.")
    if not isinstance(content, list):
        what = "one object" if isinstance(content, dict) else "a single value"
        raise JsonError(f"{name} holds {what}, not rows.", 'Needed: [{...}, {...}] or {"data": [{...}, {...}]}.')
    _check_rows(name, len(content), limits)
    log = ProblemLog("row")
    table = Table("json", [], held_rows(), log)
    scrub = Scrubber(limits, log)
    seen: dict[str, None] = {}
    for number, item in enumerate(content, 1):
        _add_object(number, item, table, scrub, seen)
    table.columns = list(seen)
    if not table.rows:
        raise JsonError(f"None of the {len(content):,} items of {name} is an object with text.", _first(log))
    return table


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and (not value or isinstance(value[0], dict))


def _add_object(number: int, item: Any, table: Table, scrub: Scrubber, seen: dict[str, None]) -> None:
    if not isinstance(item, dict):
        what = {"list": "a list", "str": "a text", "NoneType": "null"}.get(type(item).__name__, "a single value")
        table.log.skip(number, "", "not-an-object", f'This is {what}; needed: an object such as {{"text": "..."}}.')
        return
    if not item:
        table.log.skip(number, "", "empty-row", "The object is empty.")
        return
    cells = scrub.row(number, item)
    if cells is not None:
        cells = {scrub.text(column).strip(): value for column, value in cells.items()}
        seen.update(dict.fromkeys(cells))
        table.rows.append(Row(number, cells))


def _first(log: ProblemLog) -> str:
    return f"The first: {log.items[0]}" if log.items else ""


def _read_jsonl(name: str, text: str, limits: Limits) -> Table:
    log = ProblemLog("line")
    table = Table("jsonl", [], held_rows(), log)
    scrub = Scrubber(limits, log)
    seen: dict[str, None] = {}
    for number, line in _lines(text):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            log.skip(number, "", "bad-json", f"Not valid JSON at character {error.colno}: {error.msg}.")
        except ValueError:
            log.skip(number, "", "bad-json", "A number is too long to read; write it as text, in quotes.")
        except RecursionError:
            log.skip(number, "", "too-deep", f"Lists inside lists go deeper than {limits.max_depth} levels.")
        else:
            _add_object(number, item, table, scrub, seen)
        _check_rows(name, table.total, limits)
    table.columns = list(seen)
    if not table.rows:
        deep = set(log.counts) == {"too-deep"}
        raise _too_deep(name) if deep else JsonError(f"No line of {name} could be read as a JSON object.", _first(log))
    return table
