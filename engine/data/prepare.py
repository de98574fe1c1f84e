"""`prepare`: every row checked and brought into one form; whatever is left out or changed is reported by its line."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.data.conversations import Fixes, RowFault, flatten_tree, flatten_trees, text_of, to_messages
from engine.data.errors import NothingLeftError
from engine.data.formats import columns_for
from engine.data.held import Held, repeats
from engine.data.ingest import read
from engine.data.labels import check_classes, labels_of
from engine.data.pairs import image_of, parallel_of, preference_of
from engine.data.table import Cells, Limits, Problem, ProblemLog, Row, Table

Example = dict[str, Any]
_OF_ROW: dict[str, Callable[[Cells, Mapping[str, str]], tuple[Example, Fixes]]] = {
    "parallel": parallel_of,
    "labels": labels_of,
    "preferences": preference_of,
    "images": image_of,
    "pictures": image_of,
}


@dataclass
class Prepared:
    """Rows ready to be encoded.

    `kept + skipped == total`: a row is either an example or a problem of severity `skip`. For conversation trees that
    come as one message a row, a tree counts as one row.

    Attributes:
        format: a key of `FORMATS`.
        columns: role -> column, as used.
        examples: in the order of the file, each with its `line`: `{"messages": [{"role", "content"}, ...]}`,
            `{"prompt", "completion"}`, `{"text"}`, `{"source", "target"}`, `{"text", "labels": [class, ...]}` or
            `{"prompt": [{"role", "content"}, ...], "chosen", "rejected"}` or `{"image": reference, "text"}` (the text
            is "" where nothing is said of any picture).
        problems: the first of each code, in the order of the file.
        counts: problem code -> how many.
        total: rows in the file.
        skipped: rows left out.
        fixed: changes made to rows that were kept.
        duplicates: examples that repeat an earlier one word for word; they are kept.
        unit: what `line` counts: `line`, `row` or `picture`.
    """

    format: str
    columns: Mapping[str, str]
    examples: Held[Example] | list[Example]
    problems: list[Problem] = field(default_factory=list)
    counts: Mapping[str, int] = field(default_factory=dict)
    total: int = 0
    skipped: int = 0
    fixed: int = 0
    duplicates: int = 0
    unit: str = "line"

    @property
    def kept(self) -> int:
        return len(self.examples)


def load(
    path: str | Path,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    *,
    limits: Limits | None = None,
    formats: Sequence[str] | None = None,
) -> Prepared:
    """`read` and `prepare` in one; what a run calls with its job's `data` and its task's formats."""
    return prepare(read(path, limits=limits), format, columns, formats)


def prepare(
    table: Table,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    formats: Sequence[str] | None = None,
) -> Prepared:
    """Bring each row into its canonical form.

    Args:
        table: from `read`.
        format: a key of `FORMATS`; recognised when left out.
        columns: role -> column, where the names do not say it.
        formats: what the caller can take. A table that can be read in several ways is read as one of these.

    Raises:
        NotTakenError: the format is clear, and not one of `formats`.
        ClassesError: the labels are no classes.
        FormatError: the format is unknown or not clear.
        ColumnError: a column is missing.
        NothingLeftError: every row was skipped; the three most common reasons are named.
    """
    found = columns_for(table, format, columns, formats)
    assert found.name is not None
    log = ProblemLog(table.unit)
    log.extend(table.log)
    examples: Held[Example] | list[Example]
    if found.name == "oasst":
        examples = _trees(table, found.columns, log)
    else:
        kept = Held[Example]()
        for row in table.rows:
            example = _row(found.name, row, found.columns, log)
            if example:
                kept.append(example)
        examples = kept.settled()
    total = len(examples) + log.skipped
    if not examples:
        raise _nothing_left(table, total, log)
    if found.name == "labels":
        check_classes(examples, found.columns["label"], log)
    duplicates = _note_duplicates(examples, log)
    log.items.sort(key=lambda problem: problem.line)
    return Prepared(
        found.name,
        dict(found.columns),
        examples,
        log.items,
        log.counts,
        total,
        log.skipped,
        log.fixed,
        duplicates,
        table.unit,
    )


def _row(name: str, row: Row, columns: Mapping[str, str], log: ProblemLog) -> Example | None:
    try:
        if name in ("messages", "sharegpt"):
            role = "messages" if name == "messages" else "conversations"
            messages, fixes = to_messages(row.cells.get(columns[role]), columns[role])
            for code, message in fixes:
                log.fix(row.line, columns[role], code, message)
            return {"messages": messages, "line": row.line}
        if name == "alpaca":
            return {"messages": _alpaca(row.cells, columns), "line": row.line}
        if name in _OF_ROW:
            example, fixes = _OF_ROW[name](row.cells, columns)
            for code, message in fixes:
                log.fix(row.line, "", code, message)
            return {**example, "line": row.line}
        roles = ("prompt", "completion") if name == "prompt_completion" else ("text",)
        return {**{role: text_of(row.cells, columns[role]) for role in roles}, "line": row.line}
    except RowFault as fault:
        log.skip(row.line, fault.column, fault.code, fault.message)
        return None


def _alpaca(cells: Cells, columns: Mapping[str, str]) -> list[dict[str, str]]:
    asked = text_of(cells, columns["instruction"])
    extra = text_of(cells, columns["input"], required=False) if "input" in columns else ""
    system = text_of(cells, columns["system"], required=False) if "system" in columns else ""
    answer = text_of(cells, columns["output"])
    turns = [("user", f"{asked}\n\n{extra}" if extra else asked), ("assistant", answer)]
    return [{"role": role, "content": text} for role, text in ([("system", system)] if system else []) + turns]


def _trees(table: Table, columns: Mapping[str, str], log: ProblemLog) -> list[Example]:
    """One example a tree: at each message the reply with the best rank."""
    if set(columns) == {"message_id"}:
        paths = [(row.line, flatten_tree(row.cells.get(columns["message_id"]))) for row in table.rows]
    else:
        paths = flatten_trees(table.rows, columns, log)
    examples = []
    for line, turns in paths:
        try:
            messages, fixes = to_messages(turns, "")
        except RowFault as fault:
            log.skip(line, fault.column, fault.code, fault.message)
            continue
        for code, message in fixes:
            log.fix(line, "", code, message)
        examples.append({"messages": messages, "line": line})
    return examples


def _note_duplicates(examples: Sequence[Example], log: ProblemLog) -> int:
    # Hashes instead of texts, eight bytes a row: a million rows would otherwise be held twice.
    keys = array("q", (hash(repr([v for name, v in example.items() if name != "line"])) for example in examples))
    found = 0
    for number, first in repeats(keys):
        line, before = examples[number]["line"], examples[first]["line"]
        if line != before:
            found += 1
            log.note(line, "", "duplicate", f"The same as {log.unit} {before}; both are kept.")
    return found


def _nothing_left(table: Table, total: int, log: ProblemLog) -> NothingLeftError:
    skips = [problem for problem in log.items if problem.severity == "skip"]
    first = {problem.code: problem for problem in reversed(skips)}
    common = Counter({code: log.counts[code] for code in first}).most_common(3)
    reasons = "; ".join(
        f"{count:,} x {first[code].message} (first: {log.unit} {first[code].line})" for code, count in common
    )
    return NothingLeftError(
        f"Nothing is left of the {total:,} rows of {table.name or 'the data'}: {reasons or 'there is no row'}",
        "Check that the columns have the right roles, and correct the rows.",
    )
