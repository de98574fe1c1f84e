"""What the run doctor can say: its findings, and their texts. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BAD, WARN, NOTE, GOOD = "bad", "warn", "note", "good"
"""How much a finding matters: it cannot succeed like this; it will do worse than it could; to know; all is well."""

TEXTS: Mapping[str, tuple[str, str]] = {
    "memory": (
        "Memory ran out",
        "A step with batches of {rows} needs more memory than there is.",
    ),
    "memory-likely": (
        "Memory probably ran out",
        "The process was ended from outside, and held {held} of {limit} after its last step.",
    ),
    "diverged": (
        "The run diverged",
        "Steps that are too big do that: the learning rate is {rate}, and step {step} gave no finite number.",
    ),
    "rate-high": (
        "The learning rate is too high",
        "The training loss rose instead of falling: {start} at the start, {now} over the last {steps} steps, at a"
        " rate of {rate}.",
    ),
    "overfitting": (
        "Overfitting",
        "For {checks} checks the evaluation has been above its best ({best} at step {step}, now {now}), while the"
        " training loss fell from {before} to {after}: the rows are learned by heart.",
    ),
    "rate-low": (
        "The learning rate is too low",
        "After {steps} steps the loss is where it was ({start}, now {now}). The rate is {rate}; this method "
        "usually needs {usual}.",
    ),
    "flat": (
        "It is not learning",
        "After {steps} steps the loss is where it was ({start}, now {now}), at a rate of {rate}.",
    ),
    "spikes": (
        "The loss jumps",
        "{count} of the last {steps} steps gave more than twice the loss around them; the highest was {loss}, at "
        "step {step}.",
    ),
    "few-rows": (
        "There are few rows",
        "It learns from {rows} rows. That can be enough for a style; for anything else, more rows help more than "
        "any setting.",
    ),
    "repeated": (
        "The rows were seen many times",
        "Each of the {rows} rows was seen {times} times. The evaluation was best at step {step}; what came after "
        "did not help.",
    ),
    "repeated-unchecked": (
        "The rows were seen many times",
        "Each of the {rows} rows was seen {times} times, and none are held back to check on: they may be learned "
        "by heart.",
    ),
    "early": (
        "Stopped early",
        "Evaluations after step {step} were no better, so the run ended at step {last}. What it had learned at "
        "step {step} is kept (evaluation {loss}).",
    ),
    "best": (
        "The best is kept",
        "What it had learned at step {step}, the best evaluation ({loss}), is kept.",
    ),
    "healthy": (
        "The curve looks healthy",
        "The evaluation fell from {start} to {now} in {steps} steps, and nothing points to trouble.",
    ),
    "healthy-unchecked": (
        "The curve looks healthy",
        "The training loss fell from {start} to {now} in {steps} steps, and nothing points to trouble.",
    ),
}
"""Key -> what it is, in a few words, and the evidence, with the names of the finding's values in braces."""


@dataclass(frozen=True)
class Finding:
    """One thing that a run's curve says.

    Attributes:
        code: a stable short name.
        severity: `BAD`, `WARN`, `NOTE` or `GOOD`.
        values: the numbers, as text.
        changes: what to change (`engine.train.job.changed`); empty where nothing is to be done, or nobody knows.
        text: key of `TEXTS`; the code by default.
    """

    code: str
    severity: str
    values: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""

    @property
    def title(self) -> str:
        """What it is."""
        return TEXTS[self.text or self.code][0]

    @property
    def why(self) -> str:
        """The evidence, not yet filled in."""
        return TEXTS[self.text or self.code][1]

    def words(self) -> str:
        """Title and evidence in one line."""
        return f"{self.title}: {self.why.format(**self.values)}"
