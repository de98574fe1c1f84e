"""Layers that read the same input - queries, keys and values; a gate and its factor - as one autograd node.

    y_i = W_i x + b_i + s_i B_i A_i x
    h = A x,   A = [A_1; A_2; ...]
    dx = sum_i W_i^T dy_i + A^T dh,   dh_i = s_i B_i^T dy_i,   dA = dh^T x,   dB_i = s_i dy_i^T h_i

One thin product takes the place of one a layer wherever the input is read, and the input's gradient is summed up in
place, where autograd would add whole tensors.

Which layers belong together is seen, not assumed: the layers of one module note in its first pass who was called with
the very same tensor, one right after the other. From then on the first of them computes for all in training, and the
others hand out what is there. A pass that goes another way ends that for good. The first pass differs from the others
in the last digits, so that `engine.train.loop` sees to it that there has been one before it begins.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from engine import kernels
from engine.kernels.linear import Parts, Product, frozen_weight, whole

MOST_BROKEN = 8
"""So many passes may break off in the middle before a module's layers compute by themselves."""


class TogetherLinears(torch.autograd.Function):
    """(y_1, y_2, ...) from x and A_1, B_1, A_2, B_2, ..."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, products: tuple[Product, ...], *factors: Tensor) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        ctx.kinds = [factor.dtype for factor in factors]
        ctx.ranks = [a.shape[0] for a in factors[::2]]
        every = torch.cat(factors[::2]).to(x.dtype)
        ups = [b.to(x.dtype) for b in factors[1::2]]
        h = torch.mm(flat, every.t())
        outs = []
        for product, b, part in zip(products, ups, h.split(ctx.ranks, 1), strict=True):
            y = product.answered(x)
            y.view(-1, y.shape[-1]).addmm_(part, b.t(), alpha=product.factor)
            outs.append(whole(y))
        # LoRA-FA: where no A learns, nothing reads the input.
        kept = x if any(ctx.needs_input_grad[2::2]) else None
        ctx.shape = x.shape
        ctx.save_for_backward(kept, h, every, *ups, *(frozen_weight(product.base) for product in products))
        ctx.products = products
        return tuple(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h, every, *others = ctx.saved_tensors
        products: tuple[Product, ...] = ctx.products
        ups, weights = others[: len(products)], others[len(products) :]
        rows = [h.new_zeros(h.shape[0], up.shape[0]) if dy is None else dy.reshape(-1, dy.shape[-1])
                for dy, up in zip(grads, ups, strict=True)]  # fmt: skip
        dh = torch.cat([torch.mm(dy, b) for dy, b in zip(rows, ups, strict=True)], 1)
        factors = {product.factor for product in products}
        common = products[0].factor
        if len(factors) > 1:
            for part, product in zip(dh.split(ctx.ranks, 1), products, strict=True):
                part.mul_(product.factor)
            common = 1.0
        dx: Tensor | None = None
        if ctx.needs_input_grad[0]:
            for product, dy, weight in zip(products, rows, weights, strict=True):
                matrix = product.matrix(weight, dy.dtype)
                dx = torch.mm(dy, matrix) if dx is None else dx.addmm_(dy, matrix)
            assert dx is not None
            dx = dx.addmm_(dh, every, alpha=common).view(ctx.shape)
        wanted, found = ctx.needs_input_grad[2:], list[Tensor | None]()
        das: tuple[Tensor | None, ...] = (None,) * len(products)
        if any(wanted[::2]):
            das = torch.mm(dh.t(), x.reshape(-1, x.shape[-1])).split(ctx.ranks)
        for number, (product, dy, part) in enumerate(zip(products, rows, h.split(ctx.ranks, 1), strict=True)):
            da, db = das[number], None
            if wanted[2 * number + 1]:
                db = torch.mm(dy.t(), part).to(ctx.kinds[2 * number + 1]).mul_(product.factor)
            if da is not None and wanted[2 * number]:
                found.append(da.to(ctx.kinds[2 * number]).mul_(common))
            else:
                found.append(None)
            found.append(db)
        return dx, None, *found


def outputs(x: Tensor, parts: list[Parts]) -> tuple[Tensor, ...]:
    """Each layer's output; `fits` said yes to all of them."""
    factors = [tensor for part in parts for tensor in (part.a, part.b)]
    return TogetherLinears.apply(x, tuple(part.product for part in parts), *factors)  # type: ignore[no-any-return]


def fits(part: Parts | None, x: Tensor) -> bool:
    """Whether a layer is a plain LoRA layer: dropout, an offset, a bias or magnitudes need a node of their own."""
    if part is None or part.bias is not None or part.m is not None:
        return False
    product = part.product
    return not product.drop and product.offset is None and product.norm is None and part.a.device == x.device


def unseen(model: nn.Module) -> bool:
    """Whether some of a model's adapted layers have not been through any pass yet."""
    found = (module.__dict__.get("siblings") for module in model.modules())
    return any(isinstance(one, Siblings) and one.unseen for one in found)


class Siblings:
    """The adapted layers of one module, and who of them reads the same input.

    It belongs to these very layers: a copy of the model begins anew.
    """

    def __init__(self) -> None:
        self._groups: dict[int, list[Any]] | None = None
        self._refused: set[tuple[Any, ...]] = set()
        self._ready: dict[int, Tensor] = {}
        self._source: Tensor | None = None
        self.forget()

    def __reduce__(self) -> tuple[type[Siblings], tuple[()]]:
        return Siblings, ()

    def forget(self) -> None:
        """Watch the next training pass anew: a layer has come or gone."""
        self._groups, self._ready, self._source = None, {}, None
        self._refused, self._broken = set(), 0
        self._runs: list[list[Any]] = []
        self._read: weakref.ref[Tensor] | None = None

    def release(self) -> None:
        """Let go of what a pass that broke off has left."""
        self._ready, self._source = {}, None

    @property
    def unseen(self) -> bool:
        """Whether no pass has shown yet who belongs together."""
        return self._groups is None and not self._runs

    def output(self, layer: Any, x: Tensor) -> Tensor | None:
        """The layer's output where the group has it, or None: then the layer is to compute it by itself."""
        learns = torch.is_grad_enabled() and layer.training
        if not learns and self._ready:
            self.release()
        if not learns and (self._groups is not None or torch.is_grad_enabled()):
            return None
        if not kernels.enabled():
            return None
        if self._groups is None:
            if learns and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
                # Activations may be checkpointed, and a pass that began in one form is to be repeated in that form.
                self._settle()
            else:
                self._note(layer, x)
        if self._groups is None or not learns:
            return None
        group = self._groups.get(id(layer))
        if self._ready and (group is None or x is self._source):
            return self._handed_out(layer, x)
        if group is None:
            return None
        if self._ready:
            # The pass before this one broke off between the layers of a group.
            self.release()
            self._broken += 1
            if self._broken > MOST_BROKEN:
                self._groups = {}
                return None
        board = layer.switchboard
        if board.disabled or board.rows is not None or torch.is_autocast_enabled(x.device.type):
            return None
        # Most often for good: to ask each time would cost what is won elsewhere.
        asked = (id(layer), *board.weights)
        if asked in self._refused:
            return None
        parts = [member.parts(x) for member in group]
        if not all(fits(part, x) for part in parts):
            self._refused.add(asked)
            return None
        first, *others = outputs(x, parts)
        self._ready = {id(member): out for member, out in zip(group[1:], others, strict=True)}
        self._source = x
        return first

    def _handed_out(self, layer: Any, x: Tensor) -> Tensor | None:
        found = self._ready.pop(id(layer), None) if x is self._source else None
        if found is None:
            # The model went another way than before.
            self._ready, self._groups = {}, {}
        if not self._ready:
            self._source = None
        return found

    def _note(self, layer: Any, x: Tensor) -> None:
        """A call of the first pass; at the first layer's second call the pass is known."""
        if self._runs and self._runs[0][0] is layer:
            self._settle()
        elif self._read is not None and self._read() is x:
            self._runs[-1].append(layer)
        else:
            self._runs.append([layer])
            self._read = weakref.ref(x)

    def _settle(self) -> None:
        every = [id(member) for run in self._runs for member in run]
        once = len(set(every)) == len(every)
        self._groups = {id(run[0]): run for run in self._runs if len(run) > 1} if once else {}
        self._runs, self._read = [], None
