"""Sums of several adapters' tensors, with and without pruning, and the nearest matrix of a given rank.

- `magnitude_prune`: keep each tensor's `density` largest entries, then the weighted sum.
- `dare_linear` (Yu et al., 2023, https://arxiv.org/abs/2311.03099): drop entries at random, divide by the density, sum.
- `ties` (Yadav et al., 2023, https://arxiv.org/abs/2306.01708): prune by magnitude, elect each entry's sign, and take
  the mean of the entries that have it. `dare_ties`: the same over randomly dropped entries.

As in PEFT the sign is elected before the weights are applied, and the mean counts entries, not weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import ConfigError

Pair = tuple[Tensor, Tensor]
DRIVERS = (None, "gesvd", "gesvdj", "gesvda")
SIGN_METHODS = ("total", "frequency")


@dataclass(frozen=True)
class Recipe:
    """How tensors become one.

    Attributes:
        how: `linear`, `magnitude_prune`, `ties`, `dare_linear` or `dare_ties`.
        density: share of each tensor's entries that pruning keeps, above 0 up to 1; unused by `linear`.
        sign: `total` elects the sign of the sum of the entries, `frequency` the sign that most entries have.
        generator: draws DARE's masks, on the CPU, so that a seed gives the same on every device; None: torch's own.
    """

    how: str
    density: float | None = None
    sign: str = "total"
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.sign not in SIGN_METHODS:
            raise ConfigError(f"majority_sign_method is {self.sign!r}; needed: {' or '.join(SIGN_METHODS)}.")
        if self.how == "linear":
            return
        share = self.density
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(
                f"density is {share!r}; {self.how} needs the share of entries to keep, above 0 up to 1.",
                "Give density=0.5, say.",
            )

    def combine(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """One tensor from several of the same shape."""
        stacked = torch.stack([self._pruned(tensor) for tensor in tensors])
        factors = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device)
        weighted = stacked * factors.view(-1, *[1] * (stacked.dim() - 1))
        if not self.how.endswith("ties"):
            return weighted.sum(0)
        signs = stacked.sign()
        votes = stacked.sum(0) if self.sign == "total" else signs.sum(0)
        agrees = signs == torch.where(votes >= 0, 1, -1)
        return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)

    def _pruned(self, tensor: Tensor) -> Tensor:
        if self.how == "linear" or self.density is None or self.density == 1:
            return tensor
        if self.how.startswith("dare"):
            chance = torch.full(tensor.shape, self.density, dtype=torch.float32)
            kept = torch.bernoulli(chance, generator=self.generator)
            return tensor * kept.to(tensor) / self.density
        largest = tensor.abs().flatten().topk(int(self.density * tensor.numel())).indices
        pruned = torch.zeros_like(tensor).flatten()
        pruned[largest] = tensor.flatten()[largest]
        return pruned.view_as(tensor)


def core(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD (U, S, V^T) of sum_i B_i A_i without forming it, as far as the sum of the ranks reaches.

    Two QR decompositions of the stacked thin matrices and an SVD of their small core: for B (out, k), A (k, in)
    the cost is O((in + out) k^2 + k^3) instead of O(in out min(in, out)).
    """
    a, b = torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs], dim=1)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vt @ q_a.T


def dense_svd(matrix: Tensor, driver: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of a matrix; `driver` counts on CUDA alone, where there is a choice."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False, driver=driver if matrix.is_cuda else None)
    return u, s, vt


def cut(parts: tuple[Tensor, Tensor, Tensor], rank: int, clamp: float | None = None) -> Pair:
    """(A, B) of at most that rank nearest to U S V^T, the singular values shared evenly.

    With `clamp` they all go to B, and both matrices are cut off at that quantile of their entries, as PEFT does.
    """
    u, s, vt = parts[0][:, :rank], parts[1][:rank], parts[2][:rank]
    if clamp is None:
        root = torch.sqrt(s)
        # Where there is nothing, A keeps a direction: with both at zero no training could move them.
        return torch.where(s > 0, root, 1)[:, None] * vt, u * root
    limit = _quantile(torch.cat([(u * s).flatten(), vt.flatten()]), clamp)
    return vt.clamp(-limit, limit), (u * s).clamp(-limit, limit)


def _quantile(values: Tensor, share: float) -> float:
    """Linear between neighbours; torch.quantile stops at 16 million values."""
    ordered = values.sort().values
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))
