"""LoHa: low-rank Hadamard product (FedPara, Hyeon-Woo et al., 2021, https://arxiv.org/abs/2108.06098; LyCORIS,
https://arxiv.org/abs/2309.14859).

    y = W x + s ((A1 B1) o (A2 B2)) x,   A: (out, r), B: (r, in),   s = alpha / r,   o: entry by entry

The change has rank up to r^2. It is itself a product of rank r^2, of the row-wise products of A1 with A2 and the
column-wise ones of B1 with B2,

    (A1 B1) o (A2 B2) = P Q,   P[o, (i, j)] = A1[o, i] A2[o, j],   Q[(i, j), n] = B1[i, n] B2[j, n]

and where r^2 (in + out) < in out the layer computes P (Q x) and never forms a matrix of the base's size.

A convolution's kernel is taken as a matrix (out, in kh kw), or, with use_effective_conv2d, factored by modes (the
paper's proposition 3): K = (T1 x A1 x B1) o (T2 x A2 x B2) with T: (r, r, kh, kw), A: (r, out), B: (r, in).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

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
class LoHaConfig(LycorisConfig):
    """LoHa's settings; see `LycorisConfig`. A linear layer has 2 r (in + out) parameters."""

    PEFT_TYPE: ClassVar[PeftType] = PeftType.LOHA


class _Hadamard(torch.autograd.Function):
    """(A1 B1) o (A2 B2), keeping only the factors for the backward pass; the products are as big as the weight."""

    @staticmethod
    def forward(ctx: Any, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(a1, b1, a2, b2)
        return (a1 @ b1) * (a2 @ b2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        a1, b1, a2, b2 = ctx.saved_tensors
        grad = grads[0].to(a1.dtype)
        first = grad * (a2 @ b2)
        found = first @ b1.T, a1.T @ first
        second = grad * (a1 @ b1)
        return *found, second @ b2.T, a2.T @ second


class LoHaWeights(LycorisWeights):
    """Two pairs of factors, and for convolutions by modes their two cores."""

    hada_t1: nn.Parameter | None
    hada_t2: nn.Parameter | None

    def __init__(self, base: nn.Module, config: LoHaConfig, module: str) -> None:
        super().__init__(base, config, module)
        r, n_out, n_in = self.r, self.shape[0], self.shape[1]
        if not self.by_modes:
            n_in = math.prod(self.shape[1:])
        self.hada_w1_a = self.empty(*((r, n_out) if self.by_modes else (n_out, r)))
        self.hada_w1_b = self.empty(r, n_in)
        self.hada_w2_a = self.empty(*((r, n_out) if self.by_modes else (n_out, r)))
        self.hada_w2_b = self.empty(r, n_in)
        self.hada_t1 = self.empty(r, r, *self.shape[2:]) if self.by_modes else None
        self.hada_t2 = self.empty(r, r, *self.shape[2:]) if self.by_modes else None
        groups = base.groups if isinstance(base, nn.Conv2d) else 1
        self.thin = not self.by_modes and groups == 1 and r * r * (n_in + n_out) < n_in * n_out
        for parameter in self.parameters():
            if not parameter.is_meta:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        if config.init_weights and not self.hada_w2_b.is_meta:
            nn.init.zeros_(self.hada_w2_b)

    def change(self) -> Tensor:
        if self.hada_t1 is not None and self.hada_t2 is not None:
            first = torch.einsum("ijkl,jr,ip->prkl", self.hada_t1, self.hada_w1_b, self.hada_w1_a)
            return first * torch.einsum("ijkl,jr,ip->prkl", self.hada_t2, self.hada_w2_b, self.hada_w2_a)
        product: Tensor = _Hadamard.apply(self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)
        return product.reshape(self.shape)

    def apply_thin(self, x: Tensor, base: nn.Module) -> Tensor | None:
        if not self.thin:
            return None
        p = (self.hada_w1_a[:, :, None] * self.hada_w2_a[:, None, :]).flatten(1)
        q = (self.hada_w1_b[:, None, :] * self.hada_w2_b[None, :, :]).flatten(0, 1)
        h = applied(compute_cast(q, x).reshape(-1, *self.shape[1:]), x, base)
        p = compute_cast(p, x)
        return F.conv2d(h, p[:, :, None, None]) if self.kind == CONV2D else F.linear(h, p)


def build(base: nn.Module, config: LoHaConfig, module: str) -> LoHaWeights:
    """LoHa's factors for one base layer, on its device, in float32."""
    return LoHaWeights(base, config, module)


SPEC = AdapterSpec(
    name="loha",
    title="LoHa",
    paper="https://arxiv.org/abs/2108.06098",
    config=LoHaConfig,
    build=build,
    layers=(LINEAR, CONV1D, CONV2D),
    mergeable=True,
    mixable=True,
    identity_at_start=True,
    formats=("PEFT", "kohya"),
)
