"""What a prediction is, and whether it fits. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from engine.errors import ConfigError

GB = 10**9
PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits")
TIGHT = 0.85
"""From this share of the budget on a fit is tight: other programs, or a longer row, may take the rest."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Prediction:
    """Bytes at the peak of one optimizer step, by what they are for.

    Attributes:
        weights: the base, quantised layers by their codes and scales.
        adapter: what the adapter adds to it, its further buffers too.
        gradients: of what is trained.
        optimizer: its state.
        activations: what the forward pass keeps and both passes work with.
        logits: of the output layer, with the loss over them.
        slack: freed memory that the C library keeps in pieces too small for what is asked for next (docs/memory.md).
        overhead: the process itself: interpreter, libraries, tokenizer.
        peak_loading: of the base, before any of the rest but `overhead` is there; not a part of `total`.
        peak_checkpoint: while a checkpoint is written; not a part of `total`.
        batch_size: rows of the batch. tokens: tokens that the model reads for it. length: of its longest row.
        measured_rows: the batch is made of the job's own rows, not of rows of `length` tokens each.
        device: `cpu` or `cuda`.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    slack: int
    overhead: int
    peak_loading: int
    peak_checkpoint: int
    batch_size: int
    tokens: int
    length: int
    measured_rows: bool
    device: str = "cpu"

    @property
    def total(self) -> int:
        """Peak bytes of a training step, the process included."""
        return sum(getattr(self, name) for name, _ in _SHOWN)

    @property
    def peak(self) -> int:
        """The largest of the step's, the loading's and the checkpoint's peaks: what has to be there."""
        return max(self.total, self.peak_loading, self.peak_checkpoint)

    def lines(self) -> list[str]:
        """For people: one part a line, then the sums."""
        found = [f"{label:<28}{size(getattr(self, name)):>12}" for name, label in _SHOWN]
        found.append(f"{'peak of training':<28}{size(self.total):>12}")
        found.append(f"{'peak while loading':<28}{size(self.peak_loading):>12}")
        found.append(f"{'peak of a checkpoint':<28}{size(self.peak_checkpoint):>12}")
        rows = "the job's own rows" if self.measured_rows else "rows of the full length"
        found.append(f"batch of {self.batch_size}: {self.tokens} tokens, longest row {self.length} ({rows})")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, `total` and `peak` included."""
        return {item.name: getattr(self, item.name) for item in fields(self)} | {
            "total": self.total,
            "peak": self.peak,
        }


_SHOWN = (
    ("weights", "base weights"),
    ("adapter", "adapter"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer"),
    ("activations", "activations"),
    ("logits", "logits and loss"),
    ("slack", "allocator's slack"),
    ("overhead", "process and libraries"),
)


def fits(prediction: Prediction, budget: int) -> str:
    """`fits`, `tight` (from 85 % of the budget on) or `exceeds`; `budget` in bytes."""
    if prediction.peak > budget:
        return "exceeds"
    return "tight" if prediction.peak >= TIGHT * budget else "fits"


def size(count: float) -> str:
    """Bytes for people: `812 MB`, `3.42 GB`; thousands, not 1,024s."""
    return f"{count / GB:.2f} GB" if abs(count) >= GB else f"{count / 10**6:.1f} MB"


def parse_size(text: str) -> int:
    """`8GB`, `7.5 GiB`, `512M` or a number of bytes.

    Raises:
        ConfigError: anything else, or nothing.
    """
    match = _SIZE.fullmatch(text)
    found = int(float(match[1]) * _UNITS[(match[2] or "").lower()]) if match else 0
    if not found:
        raise ConfigError(f"The budget is {text!r}; needed: a size such as 8GB, 7.5GiB or 512MB.")
    return found
