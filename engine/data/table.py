"""What a file becomes: `Table`, with its rows, their place in the file, and the problems met on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from engine.data.held import Held, json_of
from engine.records import Codec, json_bytes

Cells = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """What a file may hold before it is refused.

    Attributes:
        max_bytes: size of the file on disk.
        max_rows: rows in the file.
        max_columns: different column names.
        max_cell: characters in one cell (longer: the row is skipped).
        max_unpacked: bytes of a Parquet file once decompressed and decoded.
        max_nested: opening brackets in a JSON file; each becomes a list or mapping in memory.
        max_depth: lists and mappings inside each other in one cell.
        max_pictures: pictures in a folder or zip.
        max_pixels: of one picture.
        max_picture_bytes: of one picture's file.
        max_zip_bytes: size of a zip on disk.
        max_unpacked_zip: bytes of all its files together.
    """

    max_bytes: int = 100 * 2**20
    max_rows: int = 1_000_000
    max_columns: int = 1_000
    max_cell: int = 1_000_000
    max_unpacked: int = 512 * 2**20
    max_nested: int = 10_000_000
    max_depth: int = 64
    max_pictures: int = 100_000
    max_pixels: int = 50_000_000
    max_picture_bytes: int = 64 * 2**20
    max_zip_bytes: int = 4 * 2**30
    max_unpacked_zip: int = 8 * 2**30


class Row(NamedTuple):
    """One row.

    Attributes:
        line: 1-based; the physical line where the row starts (csv, jsonl, txt), else the number of the row.
        cells: column -> value; a column that this row does not have is left out.
    """

    line: int
    cells: Cells


def _to_bytes(row: Row) -> bytes:
    return json_bytes([row.line, row.cells])


def held_rows() -> Held[Row]:
    """Where a reader puts a table's rows."""
    return Held(Codec(_to_bytes, lambda raw: Row(*json_of(raw))))


@dataclass(frozen=True, slots=True)
class Problem:
    """Something about one row, or about the file's header.

    Attributes:
        line: as in `Row`; 0 for the file as a whole.
        column: the column's name, or "" where the whole row is meant.
        code: stable short name, for counting.
        message: one sentence for a person, without the line number.
        severity: `skip` (the row is left out), `fix` (something was changed and the row is kept) or `note`
            (the row is kept as it is).
        unit: what `line` counts: `line`, `row` or `picture`.
    """

    line: int
    column: str
    code: str
    message: str
    severity: str
    unit: str = "line"

    def __str__(self) -> str:
        if not self.line:
            return self.message
        where = f"{self.unit.capitalize()} {self.line}"
        return f"{where}, column {self.column!r}: {self.message}" if self.column else f"{where}: {self.message}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and tables."""
        names = ("line", "unit", "column", "code", "message", "severity")
        return {name: getattr(self, name) for name in names}


class ProblemLog:
    """Collects problems: exact counts of all, and the first `keep` of each code, so a bad file stays small.

    Attributes:
        items: the problems kept, in the order in which they were met.
        counts: code -> how many there were.
        skipped: rows left out.
        fixed: rows kept after a change (a row with two changes counts twice).
    """

    def __init__(self, unit: str, keep: int = 1_000) -> None:
        self.unit = unit
        self.keep = keep
        self.items: list[Problem] = []
        self.counts: dict[str, int] = {}
        self.skipped = 0
        self.fixed = 0

    def _add(self, line: int, column: str, code: str, message: str, severity: str) -> None:
        seen = self.counts.get(code, 0)
        self.counts[code] = seen + 1
        if seen < self.keep:
            self.items.append(Problem(line, column, code, message, severity, self.unit))

    def skip(self, line: int, column: str, code: str, message: str) -> None:
        """The row at `line` is left out. To be called once a row."""
        self.skipped += 1
        self._add(line, column, code, message, "skip")

    def fix(self, line: int, column: str, code: str, message: str) -> None:
        """Something was changed and the row is kept."""
        self.fixed += 1
        self._add(line, column, code, message, "fix")

    def note(self, line: int, column: str, code: str, message: str) -> None:
        """Worth knowing; nothing was changed."""
        self._add(line, column, code, message, "note")

    def extend(self, other: ProblemLog) -> None:
        """Take over what another log holds."""
        self.items += other.items
        for code, count in other.counts.items():
            self.counts[code] = self.counts.get(code, 0) + count
        self.skipped += other.skipped
        self.fixed += other.fixed


@dataclass
class Table:
    """A file as columns and rows.

    Attributes:
        kind: `csv`, `json`, `jsonl`, `parquet` or `txt`, by content; `pictures` for a folder or zip of them.
        columns: names in the order of the file.
        rows: the rows that could be read.
        log: what was skipped or changed while reading.
        delimiter: for csv, what separates the cells.
        encoding: for text files, how the bytes were read.
    """

    kind: str
    columns: list[str]
    rows: Held[Row] | list[Row]
    log: ProblemLog
    delimiter: str = ""
    encoding: str = ""
    name: str = ""

    @property
    def unit(self) -> str:
        """What a row's `line` counts: `line`, `row` or `picture`."""
        return self.log.unit

    @property
    def problems(self) -> list[Problem]:
        """The first of each code; `log.counts` has how many there were."""
        return self.log.items

    @property
    def skipped(self) -> int:
        """Rows of the file that are not in `rows`."""
        return self.log.skipped

    @property
    def total(self) -> int:
        """Rows in the file, readable or not."""
        return len(self.rows) + self.log.skipped


@dataclass
class Scrubber:
    """Makes values safe to show and store: no null characters, no half surrogates, only JSON's types, not too deep.

    A half surrogate cannot be written as UTF-8, so one row of them would break the page, the database and the
    tokenizer alike.
    """

    limits: Limits
    log: ProblemLog
    found: set[str] = field(default_factory=set)

    def row(self, line: int, cells: Cells) -> Cells | None:
        """The cells made safe; None when the row had to be skipped (the log knows why)."""
        clean: Cells = {}
        for column, value in cells.items():
            self.found.clear()
            value = self.value(value, 1)
            for code, message in _SCRUB_FAULTS.items():
                if code in self.found:
                    self.log.skip(line, column, code, message(self.limits))
                    return None
            if "bad-characters" in self.found:
                self.log.fix(line, column, "bad-characters", "Null or half characters were taken out.")
            clean[column] = value
        return clean

    def value(self, value: Any, depth: int) -> Any:
        """One value made safe; faults are added to `found`."""
        if isinstance(value, str):
            return self.text(value)
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, float):
            return value if value - value == 0 else None
        if isinstance(value, list | tuple | dict):
            if depth >= self.limits.max_depth:
                self.found.add("too-deep")
                return None
            if isinstance(value, dict):
                return {self.text(str(key)): self.value(item, depth + 1) for key, item in value.items()}
            return [self.value(item, depth + 1) for item in value]
        if isinstance(value, bytes):
            try:
                return self.text(value.decode("utf-8"))
            except UnicodeDecodeError:
                self.found.add("not-text")
                return None
        return str(value)

    def text(self, text: str) -> str:
        if len(text) > self.limits.max_cell:
            self.found.add("cell-too-long")
            return ""
        safe = safe_text(text)
        if safe != text:
            self.found.add("bad-characters")
        return safe


def safe_text(text: str) -> str:
    """Text without null characters, which files and databases stop at, and without half surrogates."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            # A pair of escapes split over two halves is one character; only what stays half is replaced.
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text.replace("\0", "")


_SCRUB_FAULTS: dict[str, Callable[[Limits], str]] = {
    "too-deep": lambda limits: f"Lists inside lists go deeper than {limits.max_depth} levels.",
    "cell-too-long": lambda limits: f"A text is longer than {limits.max_cell:,} characters.",
    "not-text": lambda limits: "Bytes that are not text (an image, a sound?).",
}
