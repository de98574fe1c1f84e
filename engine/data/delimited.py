"""csv: which delimiter, which header, and every record with the physical line on which it starts."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

from engine.data.errors import DelimiterError, EmptyError, TooLargeError
from engine.data.roles import KNOWN_NAMES, normal
from engine.data.table import Limits, ProblemLog, Row, Scrubber, Table, held_rows

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}

_ONE_COLUMN = "\x1f"
"""Stands for "no delimiter": a character that text does not hold, so that quotes keep their meaning."""

_SAMPLE_LINES = 200
_RECOVERIES = 20


def read_csv(name: str, text: str, limits: Limits, tab_named: bool = False, level: bool = False) -> Table:
    """A csv as a table; `level` cuts and fills rows to the header's width instead of leaving them out.

    Raises:
        DelimiterError, EmptyError, TooLargeError: see `engine.data.errors`.
    """
    # The module-wide limit of the csv module (131,072) would cut off documents that ours allows; it only ever grows.
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    delimiter = _sniff(name, text)
    log = ProblemLog("line")
    if tab_named and delimiter in DELIMITERS and delimiter != "\t":
        log.fix(1, "", "not-tabs", f"The name says tab, and the {DELIMITERS[delimiter]} separates the cells here.")
    records = _records(name, text, delimiter, log)
    first = next(records, None)
    if first is None:
        raise EmptyError(f"{name} has no row.", "Give a header line, and at least one row below it.")
    line, names = first
    body: Iterator[tuple[int, list[str]]] = records
    if _is_data(names):
        log.fix(line, "", "no-header", "The first line looks like data, so the columns are called 1, 2, ... here.")
        columns = [f"column {number}" for number in range(1, len(names) + 1)]
        body = _chain(first, records)
    else:
        columns = _header(line, names, log)
    if len(columns) > limits.max_columns:
        raise TooLargeError(f"{name} has {len(columns):,} columns; at most {limits.max_columns:,} are read.")
    table = Table("csv", columns, held_rows(), log, delimiter="" if delimiter == _ONE_COLUMN else delimiter)
    _fill(name, table, body, limits, level)
    return table


def _chain(first: tuple[int, list[str]], rest: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str]]]:
    yield first
    yield from rest


def _records(name: str, text: str, delimiter: str, log: ProblemLog) -> Iterator[tuple[int, list[str]]]:
    """(starting line, cells) of each record that is not blank.

    A quote that is opened and never closed swallows the rest of the file. The reader only asks for a line beyond the
    last when it is inside a quote, which is how we notice; that record is skipped and reading goes on a line later.
    """
    start, offset, recoveries, found = 1, 0, 0, False
    while True:
        stream = io.StringIO(text, newline="")
        for _ in range(offset):
            stream.readline()
        ended = False

        def lines(stream: io.StringIO = stream) -> Iterator[str]:
            nonlocal ended
            yield from stream
            ended = True

        reader = csv.reader(lines(), delimiter=delimiter)
        start = offset + 1
        for record in reader:
            if ended:
                break
            if any(cell.strip() for cell in record):
                found = True
                yield start, record
            start = offset + reader.line_num + 1
        else:
            return
        recoveries += 1
        if not found:
            raise DelimiterError(
                f"The header of {name} (line {start}) opens a quote that is never closed.", "Correct the first line."
            )
        if recoveries > _RECOVERIES:
            raise DelimiterError(
                f"{name} has more than {_RECOVERIES} lines with a quote that is never closed; the last is {start:,}.",
                'Write a quote inside a cell twice (""), and put quotes around such a cell.',
            )
        log.skip(start, "", "open-quote", "A quote opens here and is never closed.")
        offset = start


def _fill(name: str, table: Table, body: Iterator[tuple[int, list[str]]], limits: Limits, level: bool) -> None:
    scrub = Scrubber(limits, table.log)
    columns, width = table.columns, len(table.columns)
    ragged: list[int] = []
    for line, cells in body:
        while len(cells) > width and not cells[-1].strip():
            cells.pop()
        if len(cells) != width:
            ragged.append(line)
            what = f"{len(cells)} cells, and the header has {width}."
        if len(cells) != width and not level:
            table.log.skip(line, "", "ragged", f"{what} Is a {_label(table.delimiter)} in a text without quotes?")
        else:
            if len(cells) != width:
                done = "Those beyond it were cut." if len(cells) > width else "The missing ones are empty."
                table.log.fix(line, "", "ragged", f"{what} {done}")
                cells = (cells + [""] * width)[:width]
            clean = scrub.row(line, dict(zip(columns, cells, strict=True)))
            if clean is not None:
                table.rows.append(Row(line, clean))
        if table.total > limits.max_rows:
            raise TooLargeError(f"{name} has more than {limits.max_rows:,} rows, and no more are read.", "Split it.")
    if not table.total:
        raise EmptyError(
            f"{name} has a header ({', '.join(columns)[:200]}) and no row below it.", "Add at least one row."
        )
    if len(ragged) * 2 > table.total:
        places = ", ".join(str(line) for line in ragged[:3])
        raise DelimiterError(
            f"{len(ragged):,} of the {table.total:,} rows of {name} do not have the {width} cells of the header when "
            f"cut at each {_label(table.delimiter)} (lines {places}{', ...' if len(ragged) > 3 else ''}).",
            'Put quotes (") around texts that contain the delimiter, or save the file with another one.',
        )


def _label(delimiter: str) -> str:
    return DELIMITERS.get(delimiter, "delimiter")


# --- the delimiter -------------------------------------------------------------------------------------------------


def _sniff(name: str, text: str) -> str:
    """The delimiter that cuts the header into the most known names and the first rows to the header's width."""
    sample = [line for _, line in zip(range(_SAMPLE_LINES), io.StringIO(text, newline=""), strict=False)]
    scores: dict[str, tuple[int, float, int]] = {}
    header: list[str] = []
    for delimiter in DELIMITERS:
        records = [record for record in csv.reader(iter(sample), delimiter=delimiter) if any(map(str.strip, record))]
        # The sample may end inside a quoted cell; its last record then says nothing.
        records = records[:-1] if len(sample) == _SAMPLE_LINES and len(records) > 2 else records
        header = records[0] if records else []
        if len(header) < 2:
            continue
        same = sum(len(record) == len(header) for record in records)
        known = sum(normal(cell) in KNOWN_NAMES for cell in header)
        scores[delimiter] = (known, round(same / len(records), 1), len(header))
    if not scores:
        return _one_column(name, header)
    best = max(scores, key=lambda delimiter: scores[delimiter])
    rivals = [other for other in scores if other != best and scores[other][:2] == scores[best][:2]]
    if rivals:
        raise DelimiterError(
            f"The delimiter of {name} is ambiguous: {DELIMITERS[best]} and {DELIMITERS[rivals[0]]} fit equally well.",
            "Save it with one delimiter, and quotes around texts that contain it.",
        )
    return best


def _one_column(name: str, header: list[str]) -> str:
    """A single column is fine when its name is one name; otherwise the delimiter is one that we do not know."""
    cell = header[0].strip() if header else ""
    parts = [part for part in re.split(r"[^\w]+", cell.lower()) if part]
    if sum(part in KNOWN_NAMES for part in parts) > 1 or re.search(r"\w\s*[\^~:#/\\]+\s*\w", cell):
        raise DelimiterError(
            f"The header of {name} cannot be cut into columns: {cell[:100]!r}.",
            f"Needed between the cells: {', '.join(DELIMITERS.values())}. Save the file with one of these.",
        )
    return _ONE_COLUMN


# --- the header ----------------------------------------------------------------------------------------------------


def _is_data(names: list[str]) -> bool:
    """Whether a first line is a row of data: nothing known in it, but a sentence, a number or a link."""
    cells = [name.strip() for name in names]
    if any(normal(cell) in KNOWN_NAMES for cell in cells):
        return False
    return any(
        len(cell) > 60
        or len(cell.split()) > 5
        or (len(cell.split()) > 1 and cell.endswith((".", "?", "!", "\u3002", "\uff1f", "\uff01")))
        or re.fullmatch(r"[-+]?\d+([.,]\d+)*%?|https?://\S+", cell)
        for cell in cells
    )


def _header(line: int, names: list[str], log: ProblemLog) -> list[str]:
    """Column names: trimmed, none empty, none twice."""
    names = [name.replace("\0", "").strip() for name in names]
    while names and not names[-1]:
        names.pop()
    columns: dict[str, None] = {}
    for number, name in enumerate(names, 1):
        free = name or f"column {number}"
        if not name:
            log.fix(line, free, "unnamed-column", f"Column {number} has no name; it is called {free!r} here.")
        count = 1
        while free in columns:
            count += 1
            free = f"{name} ({count})"
        if count > 1:
            log.fix(line, name, "duplicate-column", f"Two columns have this name; this one is called {free!r} here.")
        columns[free] = None
    return list(columns)
