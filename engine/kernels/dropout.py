"""Dropout's mask from few random bits.

torch draws a number of the wanted type for each value, which on a processor takes longer than the layer that the mask
is for. 16 bits decide as well: a value is dropped with probability round(p 2^16) / 2^16.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor, nn

_STEPS = 1 << 16


def drawn_seed(x: Tensor) -> int:
    """A seed for one mask, from torch's generator of the processor: one draw, which no other thread can come between.

    Shapes without numbers (engine.memory's) have none to draw.
    """
    if type(x).__name__ == "FakeTensor" or x.is_meta:
        return 0
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


def mask_like(x: Tensor, p: float, seed: int) -> Tensor:
    """0 with probability p, else 1 / (1 - p), in the shape and type of x; a seed's mask is the same each time."""
    generator = torch.Generator("cpu" if x.is_meta else x.device)
    generator.manual_seed(seed)
    if x.device.type != "cpu":
        # In the order of the shape, whatever the strides of x: backward may have it otherwise.
        return torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - p, generator=generator).div_(1 - p)
    dropped = round(p * _STEPS)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(
        torch.iinfo(torch.int64).min, None, generator=generator
    )
    # 1 or 0, in place: comparing into booleans and widening them takes longer than drawing the numbers.
    kept = words.view(torch.int16)[: x.numel()].view(x.shape).ge_(dropped - _STEPS // 2)
    factor = _STEPS / (_STEPS - dropped)
    if x.element_size() != kept.element_size():
        return kept.to(x.dtype).mul_(factor)
    return kept.mul_(_bits(factor, x.dtype)).view(x.dtype)


def _bits(value: float, dtype: torch.dtype) -> int:
    """A number's 16 bits in half precision as an integer; without tensors, which may hold no numbers here."""
    if dtype == torch.float16:
        return int.from_bytes(struct.pack("<e", value), "little")
    wide = int.from_bytes(struct.pack("<f", value), "little")
    return (wide + 0x7FFF + (wide >> 16 & 1)) >> 16


class Dropout(nn.Dropout):
    """`nn.Dropout` with that mask."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        if torch.compiler.is_compiling():
            return super().forward(x)
        return x * mask_like(x, self.p, drawn_seed(x))
