"""Rows that repeat one another: word for word, or the same question with another answer."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from engine.data.fixes import way
from engine.data.held import repeats
from engine.data.table import ProblemLog

Example = dict[str, Any]


class Keys:
    """Two hashes a row, eight bytes each: a million rows would otherwise be held twice."""

    def __init__(self) -> None:
        self.whole = array("q")
        self.asked = array("q")

    def add(self, example: Example, digest: str = "") -> None:
        """The next row; `digest` stands for its picture's content."""
        parts = [value for name, value in example.items() if name not in ("line", "image")]
        self.whole.append(hash((digest or example.get("image", ""), repr(parts))))
        asked = _asked(example, digest)
        # Rows without a question are told apart by their number: none asks what another does.
        self.asked.append(hash(asked) if asked is not None else -len(self.asked) - 2)


def _asked(example: Example, digest: str) -> tuple[str, str] | None:
    """What the row's answer is an answer to; None where there is no such thing."""
    if "messages" in example:
        turns = example["messages"]
        last = max((n for n, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
        return ("messages", repr(turns[:last]))
    if "chosen" in example:
        # The same two answers, once the other way round.
        return ("pair", repr((example["prompt"], sorted((example["chosen"], example["rejected"])))))
    if "image" in example:
        return ("image", digest) if digest and example["text"] else None
    if "labels" in example:
        return ("labels", example["text"])
    role = next((role for role in ("prompt", "source") if role in example), None)
    return (role, example[role]) if role else None


def sifted(examples: Sequence[Example], keys: Keys, fixes: Mapping[str, str], log: ProblemLog) -> tuple[set[int], int]:
    """The places that the fixes leave out, and how many repeats are kept; all of them are told.

    Args:
        examples: the rows.
        keys: of each row.
        fixes: those of `duplicate` and `other-answer` count.
        log: where what is found and done is told.
    """
    gone: set[int] = set()
    kept = 0
    skip = way(fixes, "duplicate") == "skip"
    repeated: set[int] = set()
    for place, first in repeats(keys.whole):
        line, before = examples[place]["line"], examples[first]["line"]
        if line == before:
            continue
        repeated.add(place)
        if skip:
            gone.add(place)
            log.skip(line, "", "duplicate", f"The same as {log.unit} {before}, which is kept.")
        else:
            kept += 1
            log.note(line, "", "duplicate", f"The same as {log.unit} {before}; both are kept.")
    _other_answers(examples, keys, way(fixes, "other-answer"), log, repeated, gone)
    return gone, kept


def _other_answers(
    examples: Sequence[Example], keys: Keys, how: str, log: ProblemLog, repeated: set[int], gone: set[int]
) -> None:
    groups: dict[int, list[int]] = {}
    for place, first in repeats(keys.asked):
        groups.setdefault(first, []).append(place)
    for first, later in groups.items():
        before = examples[first]["line"]
        others = [place for place in later if keys.whole[place] != keys.whole[first]]
        others = [place for place in others if examples[place]["line"] != before]
        if not others:
            continue
        for place in [first, *later] if how == "skip-all" else others:
            line = examples[place]["line"]
            if how and place not in gone:
                gone.add(place)
                what = (
                    "Other rows ask" if how == "skip-all" else f"{log.unit.capitalize()} {before}, which is kept, asks"
                )
                log.skip(line, "", "other-answer", f"{what} the same with another answer.")
            elif not how and place not in repeated and place not in gone:
                what = f"{log.unit.capitalize()} {before} asks the same with another answer"
                log.note(line, "", "other-answer", f"{what}; both are kept.")
