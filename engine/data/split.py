"""Train and evaluation rows, the same on every machine, with no question in both."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError
from engine.records import Chosen, Rows

Example = dict[str, Any]


def split(examples: Sequence[Example], share: float, seed: int = 0) -> tuple[Sequence[Example], Sequence[Example]]:
    """Hold back `share` of the examples (0 to 0.5) for evaluation.

    Examples with the same question go to the same side, or the evaluation would reward memory. Which side is decided
    by SHA-256 of seed and question, so neither platform nor process matters. Both parts keep the order they came in.
    With two questions or more and `share` above 0, each part has at least one example; where all examples share one
    question they all go to training. Of many examples (`engine.data.held`) the parts are views.

    Raises:
        ConfigError: `share` is not within 0 to 0.5.
    """
    if not 0 <= share <= 0.5:
        raise ConfigError(f"The share held back is {share}; needed: 0 to 0.5.")
    if share == 0 or not examples:
        return _part(examples, range(len(examples))), []
    import numpy as np

    # A question stands for itself by the first eight bytes of its SHA-256, which order the questions too.
    keys = np.fromiter((_place(seed, example) for example in examples), np.uint64, len(examples))
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[0]]) != 0)
    counts = np.diff(starts, append=len(keys))
    if len(starts) < 2:
        return _part(examples, range(len(examples))), []
    wanted, taken, held = max(1, round(share * len(examples))), 0, np.zeros(len(examples), dtype=bool)
    for start, count in zip(starts, counts, strict=True):
        if taken == wanted:
            break
        if taken + count <= wanted:
            held[order[start : start + count]] = True
            taken += count
    if not taken:
        # Every question comes more often than rows were wanted: the rarest goes whole, the first of these by hash.
        rarest = int(np.argmin(counts))
        held[order[starts[rarest] : starts[rarest] + counts[rarest]]] = True
    return _part(examples, np.flatnonzero(~held)), _part(examples, np.flatnonzero(held))


def _place(seed: int, example: Example) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{_question(example)}".encode()).digest()[:8], "big")


def _part(examples: Sequence[Example], numbers: Iterable[int]) -> Sequence[Example]:
    if isinstance(examples, Rows):
        return Chosen(examples, array("I", numbers))
    return [examples[number] for number in numbers]


def _question(example: Example) -> str:
    """What must not be on both sides: the turns before the first answer, the whole prompt, or the text itself."""
    if "messages" in example:
        asked = []
        for message in example["messages"]:
            if message["role"] == "assistant":
                break
            asked.append(message["content"])
        words = "\0".join(asked)
    elif "chosen" in example:
        words = "\0".join(message["content"] for message in example["prompt"])
    else:
        words = next(str(example[role]) for role in ("prompt", "source", "text") if role in example)
    return _plain(words)


def _plain(words: str) -> str:
    return " ".join(words.casefold().split())


@dataclass(frozen=True)
class Leaks:
    """Rows held back that training has seen in some way, so that an evaluation on them says less.

    Attributes:
        rows: the same words, all of them.
        questions: the same question.
        answers: the same answer, of `LONG` characters or more; classes do not count.
        lines: where the first rows of any of these kinds stand.
    """

    rows: int = 0
    questions: int = 0
    answers: int = 0
    lines: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.rows or self.questions or self.answers)


LONG = 20
"""Characters from which equal answers are no chance."""
_LISTED = 5


def leaks(train: Sequence[Example], held: Sequence[Example]) -> Leaks:
    """What stands on both sides, whatever has parted them; texts count without regard to case and spaces."""
    seen: dict[str, set[int]] = {"rows": set(), "questions": set(), "answers": set()}
    for example in train:
        for kind, mark in _marks(example):
            seen[kind].add(mark)
    counts = dict.fromkeys(seen, 0)
    lines: list[int] = []
    for example in held:
        met = [kind for kind, mark in _marks(example) if mark in seen[kind]]
        for kind in met:
            counts[kind] += 1
        if met and len(lines) < _LISTED:
            lines.append(example["line"])
    return Leaks(**counts, lines=tuple(lines))


def _marks(example: Example) -> Iterator[tuple[str, int]]:
    yield "rows", hash(tuple(_words([value for name, value in example.items() if name != "line"])))
    yield "questions", hash(_question(example))
    if "labels" in example or "image" in example:
        return
    if "messages" in example:
        answer = next((turn["content"] for turn in reversed(example["messages"]) if turn["role"] == "assistant"), "")
    else:
        answer = next((str(example[role]) for role in ("completion", "target", "chosen") if role in example), "")
    if len(_plain(answer)) >= LONG:
        yield "answers", hash(_plain(answer))


def _words(value: Any) -> Iterator[str]:
    """Every text in a row, plain, in its order."""
    if isinstance(value, list):
        for one in value:
            yield from _words(one)
    elif isinstance(value, dict):
        yield from _words(list(value.values()))
    else:
        yield _plain(str(value))
