"""LoKr: low-rank Kronecker product (LyCORIS, Yeh et al., 2023, https://arxiv.org/abs/2309.14859).

    y = W x + s (W1 kron W2) x,   W1: (l, m), W2: (k, n),   out = l k, in = m n,   s = alpha / r

W2 is a product of A2: (k, r) and B2: (r, n) where r is less than half of the larger of k and n, else a full matrix; W1
is full unless decompose_both asks for factors and r is small enough. With X the input as a matrix (m, n),

    (W1 kron W2) x = W1 X W2^T, row by row,

so the layer never forms the product: it costs 1/l + 1/n of a layer of the base's size. A convolution applies W2 as a
kernel (k, n, kh, kw) to each of the m groups of channels and mixes the groups with W1; with use_effective_conv2d W2 is
factored by modes, T2: (r, r, kh, kw), A2: (r, k), B2: (r, n).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 (the field's usual name)
from torch import Tensor, nn

from engine.adapters.base import (
    CONV1D,
    CONV2D,
    LINEAR,
    AdapterSpec,
    PeftType,
    applied,
    compute_cast,
)
from engine.adapters.lycoris import LycorisConfig, LycorisWeights


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(LycorisConfig):
    """LoKr's settings; see `LycorisConfig` for the rest.

    Attributes:
        decompose_both: factor W1 too where r is less than half of the larger of its sides.
        decompose_factor: l and m are this number where it divides out and in, else their largest divisor up to it
            and up to their square root; -1 for the square root alone.
        rank_dropout_scale: raise what rank_dropout keeps, so that the mean stays.
        init_weights: True starts with W1 = 0; `"lycoris"` with W2 = 0; False with a random change.
    """

    PEFT_TYPE: ClassVar[PeftType] = PeftType.LOKR
    STARTS: ClassVar[tuple[bool | str, ...]] = (True, False, "lycoris")

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False

    def faults(self) -> list[str]:
        found, factor = super().faults(), self.decompose_factor
        if isinstance(factor, bool) or not isinstance(factor, int) or (factor < 1 and factor != -1):
            found.append(f"decompose_factor is {factor!r}; needed: a whole number from 1, or -1")
        return found


def factors(size: int, limit: int = -1) -> tuple[int, int]:
    """`size` as a product: of `limit` and the rest where that divides, else of its largest divisor up to it and the
    square root of `size`, and the rest."""
    if limit > 0 and size % limit == 0:
        return limit, size // limit
    top = math.isqrt(size) if limit == -1 else min(limit, math.isqrt(size))
    first = next(divisor for divisor in range(top, 0, -1) if size % divisor == 0)
    return first, size // first


class LoKrWeights(LycorisWeights):
    """W1 and W2, each whole or in factors; those that do not apply are None and not in the file."""

    lokr_w1: nn.Parameter | None
    lokr_w1_a: nn.Parameter | None
    lokr_w1_b: nn.Parameter | None
    lokr_w2: nn.Parameter | None
    lokr_w2_a: nn.Parameter | None
    lokr_w2_b: nn.Parameter | None
    lokr_t2: nn.Parameter | None

    def __init__(self, base: nn.Module, config: LoKrConfig, module: str) -> None:
        super().__init__(base, config, module)
        self.rescale_dropout = config.rank_dropout_scale
        r, kernel = self.r, self.shape[2:]
        self.l, self.k = factors(self.shape[0], config.decompose_factor)
        self.m, self.n = factors(self.shape[1], config.decompose_factor)
        whole_1 = not (config.decompose_both and r < max(self.l, self.m) / 2)
        whole_2 = r >= max(self.k, self.n) / 2
        modes = self.by_modes and not whole_2
        self.lokr_w1 = self.empty(self.l, self.m) if whole_1 else None
        self.lokr_w1_a = None if whole_1 else self.empty(self.l, r)
        self.lokr_w1_b = None if whole_1 else self.empty(r, self.m)
        self.lokr_w2 = self.empty(self.k, self.n, *kernel) if whole_2 else None
        self.lokr_w2_a = None if whole_2 else self.empty(*((r, self.k) if modes else (self.k, r)))
        self.lokr_w2_b = None if whole_2 else self.empty(r, self.n if modes else self.n * math.prod(kernel))
        self.lokr_t2 = self.empty(r, r, *kernel) if modes else None
        self.thin = not isinstance(base, nn.Conv2d) or base.groups == 1
        if self.device.type != "meta":
            self._initialise(config.init_weights)

    def _initialise(self, how: bool | str) -> None:
        for parameter in self.parameters():
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        zero = None
        if how == "lycoris":
            zero = self.lokr_w2 if self.lokr_w2 is not None else self.lokr_w2_b
        elif how:
            zero = self.lokr_w1 if self.lokr_w1 is not None else self.lokr_w1_a
        if zero is not None:
            nn.init.zeros_(zero)

    def first(self) -> Tensor:
        """W1, (l, m)."""
        if self.lokr_w1 is not None:
            return self.lokr_w1
        assert self.lokr_w1_a is not None and self.lokr_w1_b is not None
        return self.lokr_w1_a @ self.lokr_w1_b

    def second(self) -> Tensor:
        """W2, (k, n) or (k, n, kh, kw)."""
        if self.lokr_w2 is not None:
            return self.lokr_w2
        assert self.lokr_w2_a is not None and self.lokr_w2_b is not None
        if self.lokr_t2 is not None:
            return torch.einsum("ijkl,ip,jr->prkl", self.lokr_t2, self.lokr_w2_a, self.lokr_w2_b)
        return (self.lokr_w2_a @ self.lokr_w2_b).reshape(self.k, self.n, *self.shape[2:])

    def change(self) -> Tensor:
        first, second = self.first(), self.second()
        return torch.kron(first[:, :, None, None] if second.dim() == 4 else first, second.contiguous())

    def apply_thin(self, x: Tensor, base: nn.Module) -> Tensor | None:
        if not self.thin:
            return None
        first = compute_cast(self.first(), x)
        if self.kind == CONV2D:
            parts = x.reshape(-1, self.n, *x.shape[-2:])
            h = applied(compute_cast(self.second(), x), parts, base)
            return _mixed(first, h.reshape(*x.shape[:-3], self.m, -1)).reshape(*x.shape[:-3], -1, *h.shape[-2:])
        parts = x.reshape(*x.shape[:-1], self.m, self.n)
        a, b = self.lokr_w2_a, self.lokr_w2_b
        if a is not None and b is not None and self.r * (self.k + self.n) < self.k * self.n:
            h = F.linear(F.linear(parts, compute_cast(b, x)), compute_cast(a, x))
        else:
            h = F.linear(parts, compute_cast(self.second(), x))
        return _mixed(first, h).flatten(-2)


def _mixed(first: Tensor, h: Tensor) -> Tensor:
    """W1 times each matrix (m, ...) of a batch, as one matrix product.

    torch.matmul would choose its way by whether a gradient is asked for, and with it the last digits.
    """
    rows = h.transpose(-1, -2)
    return torch.mm(rows.reshape(-1, rows.shape[-1]), first.T).reshape(*rows.shape[:-1], -1).transpose(-1, -2)


def build(base: nn.Module, config: LoKrConfig, module: str) -> LoKrWeights:
    """LoKr's factors for one base layer, on its device, in float32."""
    return LoKrWeights(base, config, module)


SPEC = AdapterSpec(
    name="lokr",
    title="LoKr",
    paper="https://arxiv.org/abs/2309.14859",
    config=LoKrConfig,
    build=build,
    layers=(LINEAR, CONV1D, CONV2D),
    mergeable=True,
    mixable=True,
    identity_at_start=True,
    formats=("PEFT", "kohya", "diffusers"),
)
