"""A linear layer with a low-rank adapter as one autograd node.

    LoRA   y = W x + b + s B A drop(x)
    DoRA   y = g v + b,   v = W x + s B A drop(x),   g = m / n with n taken as a constant

In plain autograd the input is saved by each product that reads it (once more behind dropout, with its mask), and DoRA
saves its output several times. Here a node saves x and h = A drop(x), (tokens, r), in the type that they came in:

- the mask of dropout is drawn again from its seed, and is the one that the plain formula draws;
- the thin products go into the base's output and into the input's gradient in place;
- DoRA's v, which the gradient of m needs, is kept where a layer has more inputs than outputs, so that it is small and
  dear to compute again. Where it has more outputs, y is kept and v = y / g: the activation function that follows such a
  layer keeps y anyway. In a square layer, or under a bias, v is computed again from the base's weight.

A and B are float32 masters: they are cast to the input's type inside, and their gradients come back in their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine import bnb
from engine.adapters.base import CONV1D, LINEAR, layer_kind
from engine.kernels.binding import is_watched
from engine.kernels.dropout import drawn_seed, mask_like

_PLAIN = (nn.Linear,)


def fits(base: nn.Module, x: Tensor) -> bool:
    """Whether the node can stand for `base`: a frozen linear layer, Conv1D or 4-bit layer as its class made it."""
    if not _is_plain(base) or not x.is_floating_point() or x.dim() < 2 or not x.numel():
        return False
    if torch.is_autocast_enabled(x.device.type) or torch._C._are_functorch_transforms_active():
        return False
    if any(parameter.requires_grad for parameter in base._parameters.values() if parameter is not None):
        return False
    return bnb.is_packed(base) or base.weight.dtype == x.dtype


def _is_plain(base: nn.Module) -> bool:
    """No hook or replaced forward (offloading, for one) that backward would miss."""
    kind = type(base) in _PLAIN or layer_kind(base) == CONV1D or type(base).__name__ == bnb.FOUR
    return kind and not is_watched(base)


@dataclass(slots=True)
class Product:
    """One layer's adapter as the node sees it; tensors that need a gradient are given apart.

    Attributes:
        base: the frozen layer.
        factor: s times the mixing weight.
        drop: the probability of dropout; 0 outside training.
        offset: PiSSA's A0 and B0, or None.
        norm: DoRA's n, (out), or None.
        seed: of the mask that was drawn.
        codes: of a 4-bit base, as the forward pass read them.
    """

    base: nn.Module
    factor: float
    drop: float = 0.0
    offset: tuple[Tensor, Tensor] | None = None
    norm: Tensor | None = None
    seed: int = 0
    codes: tuple[Tensor, Any] | None = None

    def answered(self, x: Tensor) -> Tensor:
        """The base layer's output, in one piece."""
        if bnb.is_packed(self.base):
            self.codes = bnb.codes_of(self.base)
        return self.base(x).contiguous()  # type: ignore[no-any-return]

    def forward(
        self, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, m: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(y, h, what DoRA's backward reads v from, or None); A and B in the type of x."""
        y = self.answered(x)
        flat, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        h = torch.mm(self._dropped(flat), a.t())
        own = getattr(self.base, "bias", None)
        if m is not None and own is not None:
            out = out - own.to(y.dtype)
        _add_product(out, h, b.t(), self.factor)
        if bias is not None:
            out += bias.to(out.dtype) * self.factor
        if self.offset is not None:
            a0, b0 = (t.to(x.dtype) for t in self.offset)
            _add_product(out, torch.mm(flat, a0.t()), b0.t(), -self.factor)
        if m is None:
            return y, h, None
        # g - 1 before the cast: in bf16 a gain near 1 would lose its difference from 1.
        scaled = torch.addcmul(out, out, (self._gain(m) - 1).to(out.dtype))
        y = (scaled if own is None else scaled.add_(own.to(y.dtype))).view(y.shape)
        return y, h, out if self._keeps_v(x, y) else y if self._keeps_y(x, y) else None

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        m: Tensor | None,
        h: Tensor,
        v: Tensor | None,
        weight: Tensor | None,
        wanted: tuple[bool, bool, bool, bool, bool],
        kind: torch.dtype,
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x, A, B, the adapter's bias and m, where `wanted`; those of A and B in the type `kind`."""
        flat = x.reshape(-1, x.shape[-1])
        dy = grad.reshape(-1, grad.shape[-1])
        dm: Tensor | None = None
        if m is not None:
            assert self.norm is not None
            if wanted[4]:
                dm = (_column_dots(dy, self._v(flat, grad, b, m, h, v, weight)) / self.norm).to(m.dtype)
            dy = torch.addcmul(dy, dy, (self._gain(m) - 1).to(dy.dtype))
        dh = torch.mm(dy.to(x.dtype), b)
        da = db = dbias = dx = None
        dropped: Tensor | None = None
        if self.drop and (wanted[0] or wanted[1]):
            dropped = self._mask(flat)
        if wanted[1]:
            source = flat if dropped is None else flat * dropped
            da = torch.mm(dh.t(), source).to(kind).mul_(self.factor)
        if wanted[2]:
            db = torch.mm(dy.t().to(x.dtype), h).to(kind).mul_(self.factor)
        if wanted[3]:
            dbias = dy.sum(0, dtype=torch.float32) * self.factor
        if wanted[0]:
            dx = self._input_gradient(dy, weight).to(x.dtype)
            if dropped is None:
                dx.addmm_(dh, a, alpha=self.factor)
            else:
                dx.addcmul_(torch.mm(dh, a), dropped, value=self.factor)
            if self.offset is not None:
                a0, b0 = (t.to(x.dtype) for t in self.offset)
                dx.addmm_(torch.mm(dy.to(x.dtype), b0), a0, alpha=-self.factor)
            dx = dx.view(x.shape)
        return dx, da, db, dbias, dm

    def _gain(self, m: Tensor) -> Tensor:
        assert self.norm is not None
        return m / self.norm

    def _keeps_v(self, x: Tensor, y: Tensor) -> bool:
        return x.shape[-1] > y.shape[-1]

    def _keeps_y(self, x: Tensor, y: Tensor) -> bool:
        # With a bias in it, y would have to be large beside it.
        return x.shape[-1] < y.shape[-1] and getattr(self.base, "bias", None) is None

    def _v(
        self, flat: Tensor, y: Tensor, b: Tensor, m: Tensor, h: Tensor, kept: Tensor | None, weight: Tensor | None
    ) -> Tensor:
        """DoRA's v, (tokens, out); `y` has the output's shape."""
        if kept is not None and self._keeps_v(flat, y):
            return kept
        gain = self._gain(m)
        # A gain of 0 has taken v from y. (Shapes without numbers, engine.memory's, have none.)
        if kept is not None and (type(kept).__name__ == "FakeTensor" or bool((gain != 0).all())):
            return kept.view(-1, kept.shape[-1]) / gain.to(kept.dtype)
        v = torch.mm(flat, self.matrix(weight, flat.dtype).t()).addmm_(h, b.t(), alpha=self.factor)
        if self.offset is not None:
            a0, b0 = (t.to(flat.dtype) for t in self.offset)
            _add_product(v, torch.mm(flat, a0.t()), b0.t(), -self.factor)
        return v

    def matrix(self, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The base's weight as (out, in)."""
        if weight is None:
            assert self.codes is not None
            return bnb.decoded(self.codes, dtype)
        return weight.t() if layer_kind(self.base) != LINEAR else weight

    def _input_gradient(self, dy: Tensor, weight: Tensor | None) -> Tensor:
        return torch.mm(dy, self.matrix(weight, dy.dtype))

    def _dropped(self, flat: Tensor) -> Tensor:
        if not self.drop:
            return flat
        self.seed = drawn_seed(flat)
        return flat * mask_like(flat, self.drop, self.seed)

    def _mask(self, flat: Tensor) -> Tensor:
        """0, or 1 / (1 - p) where the value was kept: the mask of the forward pass, drawn again."""
        return mask_like(flat, self.drop, self.seed)


def _add_product(out: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    if out.dtype == left.dtype:
        out.addmm_(left, right, alpha=factor)
    else:
        out += torch.mm(left, right) * factor


def _column_dots(one: Tensor, other: Tensor) -> Tensor:
    """sum over tokens of one * other, (columns), in float32 or wider."""
    wide = torch.promote_types(one.dtype, torch.float32)
    return (one * other).sum(0, dtype=wide) if one.dtype == wide else (one.to(wide) * other).sum(0)


class AdaptedLinear(torch.autograd.Function):
    """`Product` over x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, m: Tensor | None, product: Product
    ) -> Tensor:
        ctx.kind = a.dtype
        a, b = a.to(x.dtype), b.to(x.dtype)
        y, h, v = product.forward(x, a, b, bias, m)
        need_x = ctx.needs_input_grad[1] or m is not None
        ctx.save_for_backward(x if need_x else None, a, b, m, h, v, frozen_weight(product.base))
        ctx.product, ctx.shape = product, x.shape
        # Where y itself is kept for v, a change of it in place has to be seen: a view raises.
        return y if v is y else whole(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, m, h, v, weight = ctx.saved_tensors
        if x is None:
            # LoRA-FA: nothing reads the input, only its shape and type matter.
            x = grad.new_empty(1, dtype=h.dtype).expand(ctx.shape)
        wanted = (*ctx.needs_input_grad[:5],)
        return *ctx.product.backward(grad, x, a, b, m, h, v, weight, wanted, ctx.kind), None


def frozen_weight(base: nn.Module) -> Tensor | None:
    """What backward needs of the base: its weight as it is now, or None where that is dequantised again.

    Not the parameter: a merge gives that another tensor, and an earlier pass may still be waiting for its backward.
    """
    return None if bnb.is_packed(base) else base.weight.detach()  # type: ignore[operator]


def whole(y: Tensor) -> Tensor:
    """An output that may be changed in place, as a layer's own: autograd forbids that for a view."""
    alias: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return alias


@dataclass(frozen=True, slots=True)
class Parts:
    """What an adapter's weights give to a node: A (r, in), B (out, r), its bias and DoRA's m (out), and the rest."""

    a: Tensor
    b: Tensor
    bias: Tensor | None
    m: Tensor | None
    product: Product

    def output(self, x: Tensor) -> Tensor:
        """The base layer's output with the adapter's."""
        if torch.is_grad_enabled():
            return AdaptedLinear.apply(x, self.a, self.b, self.bias, self.m, self.product)  # type: ignore[no-any-return]
        return self.product.forward(x, self.a.to(x.dtype), self.b.to(x.dtype), self.bias, self.m)[0]
