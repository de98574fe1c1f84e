"""Train and evaluation rows, the same on every machine, with no question in both."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from engine.errors import ConfigError

Example = dict[str, Any]


def split(examples: Sequence[Example], share: float, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Hold back `share` of the examples (0 to 0.5) for evaluation.

    Examples with the same question go to the same side, or the evaluation would reward memory. Which side is decided
    by SHA-256 of seed and question, so neither platform nor process matters. Both parts keep the order they came in.
    With two questions or more and `share` above 0, each part has at least one example; where all examples share one
    question they all go to training.

    Raises:
        ConfigError: `share` is not within 0 to 0.5.
    """
    if not 0 <= share <= 0.5:
        raise ConfigError(f"The share held back is {share}; needed: 0 to 0.5.")
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(_question(example), []).append(index)
    if share == 0 or len(groups) < 2:
        return list(examples), []
    order = sorted(groups, key=lambda question: hashlib.sha256(f"{seed}\0{question}".encode()).digest())
    wanted = max(1, round(share * len(examples)))
    held: set[int] = set()
    for question in order:
        if len(held) + len(groups[question]) <= wanted:
            held.update(groups[question])
    if not held:
        # Every question comes more often than rows were wanted: the rarest goes whole, the first of these by hash.
        held.update(groups[min(order, key=lambda question: len(groups[question]))])
    training = [example for index, example in enumerate(examples) if index not in held]
    return training, [example for index, example in enumerate(examples) if index in held]


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
