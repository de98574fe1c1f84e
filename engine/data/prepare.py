"""`prepare`: every row checked and brought into one form; whatever is left out or changed is reported by its line."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.data.conversations import Fixes, RowFault, flatten_tree, flatten_trees, text_of, to_messages
from engine.data.errors import NothingLeftError
from engine.data.fixes import checked, way, words
from engine.data.formats import Format, columns_for
from engine.data.held import Held
from engine.data.ingest import read
from engine.data.labels import check_classes, joined, labels_of, rare
from engine.data.pairs import image_of, parallel_of, preference_of
from engine.data.repeated import Keys, sifted
from engine.data.table import Cells, Limits, Problem, ProblemLog, Row, Table
from engine.records import Chosen, Rows

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
        duplicates: kept examples that repeat an earlier one word for word.
        unit: what `line` counts: `line`, `row` or `picture`.
    """

    format: str
    columns: Mapping[str, str]
    examples: Rows[Example] | list[Example]
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
    fixes: Mapping[str, str] | None = None,
) -> Prepared:
    """`read` and `prepare` in one; what a run calls with its job's `data` and its task's formats."""
    return prepare(read(path, limits=limits, fixes=fixes), format, columns, formats, fixes)


def prepare(
    table: Table,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    formats: Sequence[str] | None = None,
    fixes: Mapping[str, str] | None = None,
) -> Prepared:
    """Bring each row into its canonical form.

    Args:
        table: from `read`.
        format: a key of `FORMATS`; recognised when left out.
        columns: role -> column, where the names do not say it.
        formats: what the caller can take. A table that can be read in several ways is read as one of these.
        fixes: of `engine.data.fixes`. Those for reading count where the table was read with them.

    Raises:
        FixError: a fix that does not exist.
        NotTakenError: the format is clear, and not one of `formats`.
        ClassesError: the labels are no classes.
        FormatError: the format is unknown or not clear.
        ColumnError: a column is missing.
        NothingLeftError: every row was skipped; the three most common reasons are named.
    """
    fixes = checked(fixes)
    found = columns_for(table, format, columns, formats)
    assert found.name is not None
    log = ProblemLog(table.unit)
    log.extend(table.log)
    examples, keys = _examples(table, found, fixes, log)
    total = len(examples) + log.skipped
    if examples:
        gone, duplicates = sifted(examples, keys, fixes, log)
        if found.name == "labels":
            gone |= rare(examples, found.columns["label"], fixes, log, gone)
        if gone:
            examples = Chosen(examples, array("I", (n for n in range(len(examples)) if n not in gone)))
    if not examples:
        raise _nothing_left(table, total, log)
    if found.name == "labels":
        check_classes(examples, found.columns["label"], log)
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


def _examples(
    table: Table, found: Format, fixes: Mapping[str, str], log: ProblemLog
) -> tuple[Rows[Example] | list[Example], Keys]:
    """The rows that can be used, and what tells those that repeat one another."""
    assert found.name is not None
    keys, kept = Keys(), Held[Example]()
    made: Iterable[tuple[Example, str]]
    if found.name == "oasst":
        made = ((example, "") for example in _trees(table, found.columns, log))
    else:
        rows = ((_row(found.name, row, found.columns, fixes, log), row) for row in table.rows)
        pictured = table.kind == "pictures"
        made = ((example, row.cells.get("digest", "") if pictured else "") for example, row in rows if example)
    spelling = joined(table, found.columns, fixes) if found.name == "labels" else {}
    for example, digest in made:
        other = [label for label in example.get("labels", ()) if label in spelling]
        if other:
            message = f"The class {other[0]!r} is joined with {spelling[other[0]]!r}."
            log.fix(example["line"], found.columns["label"], "similar-labels", message)
            example["labels"] = list(dict.fromkeys(spelling.get(label, label) for label in example["labels"]))
        keys.add(example, digest)
        kept.append(example)
    return kept.settled(), keys


def _row(name: str, row: Row, columns: Mapping[str, str], fixes: Mapping[str, str], log: ProblemLog) -> Example | None:
    """One row as an example; None where it is left out, and the log knows why. Empty cells are filled if so fixed."""
    cells = row.cells
    while True:
        try:
            example, changes = _made(name, cells, columns)
        except RowFault as fault:
            filled = words(fixes, fault.code)
            # Of a cell that is blank itself: one empty turn is no reason to write over a conversation.
            if not filled or name not in _FILLED or str(cells.get(fault.column) or "").strip():
                log.skip(row.line, fault.column, fault.code, fault.message)
                return None
            log.fix(row.line, fault.column, fault.code, f"{fault.message} It gets {filled[:60]!r}.")
            cells = {**cells, fault.column: filled}
            continue
        left_out = next((change for change in changes if way(fixes, change[0]) == "skip"), None)
        if left_out is not None:
            log.skip(row.line, "", *left_out)
            return None
        for code, message in changes:
            log.fix(row.line, columns.get(_SPOKEN.get(name, ""), ""), code, message)
        return _trimmed({**example, "line": row.line}, fixes, log)


_SPOKEN = {"messages": "messages", "sharegpt": "conversations"}
"""Format -> the role whose column a change is told of."""
_FILLED = ("alpaca", "prompt_completion", "text", "parallel", "labels", "preferences")
"""The formats whose roles are texts, so that words can stand in for an empty one."""


def _made(name: str, cells: Cells, columns: Mapping[str, str]) -> tuple[Example, Fixes]:
    """A row's example without its line, and what was changed."""
    if name in _SPOKEN:
        column = columns[_SPOKEN[name]]
        messages, fixes = to_messages(cells.get(column), column)
        return {"messages": messages}, fixes
    if name == "alpaca":
        return {"messages": _alpaca(cells, columns)}, []
    if name in _OF_ROW:
        return _OF_ROW[name](cells, columns)
    roles = ("prompt", "completion") if name == "prompt_completion" else ("text",)
    return {role: text_of(cells, columns[role]) for role in roles}, []


def _trimmed(example: Example, fixes: Mapping[str, str], log: ProblemLog) -> Example | None:
    """The example with what was decided on spaces around its texts; plain text to continue keeps them unsaid."""
    if set(example) == {"text", "line"}:
        return example
    if not any(text != text.strip() for text in _texts(example)):
        return example
    how, line = way(fixes, "outer-spaces"), example["line"]
    if how == "skip":
        log.skip(line, "", "outer-spaces", "Spaces or empty lines stand around a text.")
        return None
    if how != "trim":
        log.note(line, "", "outer-spaces", "Spaces or empty lines stand around a text; they are learned too.")
        return example
    log.fix(line, "", "outer-spaces", "Spaces or empty lines around a text were taken away.")
    return {
        name: value.strip()
        if isinstance(value, str) and name != "image"
        else [{**turn, "content": turn["content"].strip()} for turn in value]
        if name in ("messages", "prompt")
        else value
        for name, value in example.items()
    }


def _texts(example: Example) -> Iterator[str]:
    for name, value in example.items():
        if name in ("messages", "prompt") and isinstance(value, list):
            yield from (turn["content"] for turn in value)
        elif isinstance(value, str) and name != "image":
            yield value


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
