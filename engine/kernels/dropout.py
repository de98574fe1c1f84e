"""Dropout's mask from few random bits.

torch draws a number of the wanted type for each value, which on a processor takes longer than the layer that the mask
is for. 16 bits decide as well: a value is dropped with probability round(p 2^16) / 2^16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_STEPS = 1 << 16


def mask_like(x: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """0 with probability p, else 1 / (1 - p), in the shape and type of x; drawn from `generator`, or torch's own."""
    if x.device.type != "cpu":
        return torch.empty_like(x).bernoulli_(1 - p, generator=generator).div_(1 - p)
    dropped = round(p * _STEPS)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(
        torch.iinfo(torch.int64).min, None, generator=generator
    )
    numbers = words.view(torch.int16)[: x.numel()].view(x.shape)
    return (numbers >= dropped - _STEPS // 2).to(x.dtype).mul_(_STEPS / (_STEPS - dropped))


class Dropout(nn.Dropout):
    """`nn.Dropout` with that mask."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        if torch.compiler.is_compiling():
            return super().forward(x)
        return x * mask_like(x, self.p)
