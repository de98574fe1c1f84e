"""The ways in which several adapters become one, and their settings. Torch-free, so that a page can offer them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import ConfigError

PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATIONS = ("svd", "cat", "linear", *PRUNING, *(f"{name}_svd" for name in PRUNING))
"""The types of `add_weighted_adapter`."""

LIVE = "live"
"""Not a type of file but of answering: every adapter stays whole, and each weight is a number that is looked up."""


@dataclass(frozen=True)
class Blend:
    """Adapters with weights, and how they become one.

    Attributes:
        weights: adapter -> weight; 0 leaves one out, a negative weight takes it away.
        how: `live`, or one of COMBINATIONS.
        rank: the most that the rank of a combination by singular values may be; None: the largest of the adapters'.
        density: share of entries that a pruning type keeps.
        seed: of the entries that DARE drops.

    Raises:
        ConfigError: all faults at once.
    """

    weights: Mapping[str, float]
    how: str = LIVE
    rank: int | None = None
    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        found = [] if self.weights else ["weights is empty; needed: at least one adapter with its weight"]
        for name, value in self.weights.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                found.append(f"the weight of {name!r} is {value!r}; needed: a finite number")
        if self.how not in (LIVE, *COMBINATIONS):
            found.append(f"how is {self.how!r}; needed: {LIVE}, {', '.join(COMBINATIONS)}")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            found.append(f"rank is {self.rank!r}; needed: a whole number from 1, or None")
        if isinstance(self.density, bool) or not isinstance(self.density, int | float) or not 0 < self.density <= 1:
            found.append(f"density is {self.density!r}; needed: above 0 up to 1")
        if found:
            raise ConfigError("This mix cannot be made:\n" + "\n".join(f"- {fault}" for fault in found))
