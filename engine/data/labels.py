"""Classes of a text: one label, or a list of them, as names."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from engine.data.conversations import Fixes, RowFault, as_text, text_of
from engine.data.errors import ClassesError
from engine.data.fixes import way
from engine.data.table import Cells, ProblemLog, Table

_WHOLE = re.compile(r"([+-]?\d+)\.0+")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_MANY = 20
"""Rows from which labels that never come again are refused."""


def labels_of(cells: Cells, columns: Mapping[str, str]) -> tuple[dict[str, Any], Fixes]:
    """`{"text", "labels": [name, ...]}`. A list, or its JSON text, holds any number of labels, also none.

    A whole number is the same class as a number and as text: 1, 1.0, "1" and "1.0" are "1".

    Raises:
        RowFault: the text or the label is missing or is neither text, number nor a list of these.
    """
    column = columns["label"]
    value: Any = cells.get(column)
    fixes: Fixes = []
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    found = value if isinstance(value, list) else [value]
    labels: list[str] = []
    for one in found:
        if isinstance(one, list | dict):
            raise RowFault("not-a-label", f"A label is a {type(one).__name__}; needed: text or a number.", column)
        plain = as_text(one, f"The label in {column!r}", column).strip()
        whole = _WHOLE.fullmatch(plain)
        name = whole[1] if whole else plain
        if name != str(one) and not isinstance(one, bool):
            fixes.append(("changed-label", f"The label {one!r} is read as {name!r}."))
        if name in labels:
            fixes.append(("repeated-label", f"The label {name!r} stood there twice."))
        else:
            labels.append(name)
    return {"text": text_of(cells, columns["text"]), "labels": labels}, fixes


def _alike(labels: Iterable[str]) -> dict[str | float, list[str]]:
    """The spellings of each class: those that differ in case only, or are one number."""
    alike: dict[str | float, list[str]] = defaultdict(list)
    for label in labels:
        alike[float(label) if _NUMBER.fullmatch(label) else label.casefold()].append(label)
    return alike


def joined(table: Table, columns: Mapping[str, str], fixes: Mapping[str, str]) -> dict[str, str]:
    """Label -> the spelling that it is joined with, the most frequent one; empty unless the fixes say so."""
    if way(fixes, "similar-labels") != "join":
        return {}
    counts: Counter[str] = Counter()
    for row in table.rows:
        with suppress(RowFault):
            counts.update(labels_of(row.cells, columns)[0]["labels"])
    found = {}
    for names in _alike(counts).values():
        best = max(names, key=lambda name: counts[name])
        found.update({name: best for name in names if name != best})
    return found


def rare(
    examples: Sequence[dict[str, Any]], column: str, fixes: Mapping[str, str], log: ProblemLog, gone: Container[int]
) -> set[int]:
    """The places of rows whose class has no other row, where the fixes leave them out; they are told.

    Args:
        examples: all rows.
        column: of the labels.
        fixes: that of `rare-label` counts.
        log: where it is told.
        gone: places that are left out already.
    """
    if way(fixes, "rare-label") != "skip":
        return set()
    left = [place for place in range(len(examples)) if place not in gone]
    counts = Counter(label for place in left for label in examples[place]["labels"])
    found = set()
    for place in left:
        example = examples[place]
        only = next((label for label in example["labels"] if counts[label] == 1), None)
        if only is not None:
            found.add(place)
            log.skip(example["line"], column, "rare-label", f"The class {only!r} has this one row.")
    return found


def check_classes(examples: Sequence[dict[str, Any]], column: str, log: ProblemLog) -> None:
    """Whether there is something to tell apart; what is doubtful becomes a note.

    Raises:
        ClassesError: all rows have the same label, or each row has one of its own.
    """
    first: dict[str, int] = {}
    counts: Counter[str] = Counter()
    for example in examples:
        counts.update(example["labels"])
        for label in example["labels"]:
            first.setdefault(label, example["line"])
    if len({frozenset(example["labels"]) for example in examples}) < 2:
        only = ", ".join(map(repr, examples[0]["labels"])) or "no label"
        raise ClassesError(
            f"All {len(examples):,} rows have the same class in the column {column!r}: {only}.",
            "A classifier needs two classes or more: add rows of another class, or choose another column.",
        )
    if len(examples) >= _MANY and len(counts) >= len(examples) and max(counts.values()) == 1:
        raise ClassesError(
            f"Each of the {len(examples):,} rows has a label of its own in the column {column!r}, such as "
            f"{next(iter(counts))[:60]!r}.",
            "Classes have to come again, or nothing can be learned about them: choose the column of the class.",
        )
    numbers = [label for label in counts if _NUMBER.fullmatch(label)]
    for value, names in _alike(counts).items():
        if len(names) > 1:
            both, how = " and ".join(map(repr, names)), "in case only" if isinstance(value, str) else "in spelling only"
            log.note(first[names[1]], column, "similar-labels", f"{both} differ {how}, and are {len(names)} classes.")
    if numbers and len(numbers) == len(counts):
        shown = ", ".join(sorted(numbers, key=float)[:8]) + (", ..." if len(numbers) > 8 else "")
        message = f"The labels are numbers ({shown}); they are taken as names of {len(numbers)} classes, not as sizes."
        log.note(first[numbers[0]], column, "number-labels", message)
    for label in [name for name, count in counts.items() if count == 1]:
        log.note(first[label], column, "rare-label", f"The class {label!r} has this one row.")
