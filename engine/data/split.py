"""Train and evaluation rows, the same on every machine, with no question in both."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
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
    return " ".join(words.casefold().split())
