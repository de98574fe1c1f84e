"""The second half of a gated MLP as one autograd node.

    y = W_down a + s B A drop(a),   a = act(W_gate x) * (W_up x)

Plain autograd keeps the gate, its activation, the other factor and, for the adapter, their product: four tensors of the
MLP's width. The node keeps the two projections and computes the rest again, which takes no matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from engine import kernels
from engine.kernels.binding import bind, is_watched, unbind
from engine.kernels.linear import Product, frozen_weight, whole
from engine.layers import AdapterLayer

DOWN = "down_proj"
_PARTS = ("gate_proj", "up_proj", DOWN, "act_fn")


class GatedDown(torch.autograd.Function):
    """`Product` over act(gate) * up."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        m: Tensor | None,
        act: nn.Module,
        product: Product,
    ) -> Tensor:
        ctx.kind = a.dtype
        a, b = a.to(gate.dtype), b.to(gate.dtype)
        y, h, v = product.forward(act(gate) * up, a, b, bias, m)
        ctx.save_for_backward(gate, up, a, b, m, h, v, frozen_weight(product.base))
        ctx.product, ctx.act = product, act
        return y if v is y else whole(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, a, b, m, h, v, weight = ctx.saved_tensors
        inputs = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        with torch.enable_grad():
            source = gate.detach().requires_grad_()
            activated = ctx.act(source)
        x = activated.detach() * up
        wanted = (inputs, *ctx.needs_input_grad[2:6])
        dx, *others = ctx.product.backward(grad, x, a, b, m, h, v, weight, wanted, ctx.kind)
        dgate = dup = None
        if dx is not None:
            del x
            dup = dx * activated.detach()
            (dgate,) = torch.autograd.grad(activated, source, dx.mul_(up))
        return dgate, dup, *others, None, None


def forward(mlp: Any, x: Tensor) -> Tensor:
    """A gated MLP's forward pass, the second half fused where that is possible."""
    down, act = mlp.down_proj, mlp.act_fn
    if not (kernels.enabled() and torch.is_grad_enabled() and isinstance(down, AdapterLayer)) or is_watched(down):
        # The node makes no call of the layer.
        return type(mlp).forward(mlp, x)  # type: ignore[no-any-return]
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    parts = down.parts(gate)
    if parts is None:
        return down(act(gate) * up)  # type: ignore[no-any-return]
    tensors = (parts.a, parts.b, parts.bias, parts.m)
    return GatedDown.apply(gate, up, *tensors, act, parts.product)  # type: ignore[no-any-return]


def install(mlp: nn.Module) -> bool:
    """Give an MLP the fused forward if it is a gated one: by its parts' names, and by what it computes."""
    if "forward" in mlp.__dict__ or not all(hasattr(mlp, part) for part in _PARTS):
        return False
    if not isinstance(mlp.act_fn, nn.Module) or next(mlp.act_fn.parameters(), None) is not None:
        return False
    if getattr(mlp.act_fn, "inplace", False):
        return False
    if not _computes_gated(type(mlp), type(mlp.act_fn)):
        return False
    bind(mlp, forward)
    return True


def remove(mlp: nn.Module) -> None:
    """The class's own forward again."""
    unbind(mlp, forward)


_known: dict[tuple[type[nn.Module], type[nn.Module]], bool] = {}


def _computes_gated(mlp: type[nn.Module], act: type[nn.Module]) -> bool:
    """Whether a class's own forward is the formula above: it is asked, with numbers for its layers.

    So no weight is read, and a model without storage can be asked too.
    """
    if (mlp, act) not in _known:
        said = _asked(mlp, act)
        if said is None:
            return False
        _known[mlp, act] = said
    return _known[mlp, act]


@torch.no_grad()
def _asked(mlp: Any, act: Any) -> bool | None:
    """None where it could not answer: a class that needs more than these, or a place without numbers."""

    class Times(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor + 1

    try:
        probe = mlp.__new__(mlp)
        nn.Module.__init__(probe)
        probe.gate_proj, probe.up_proj, probe.down_proj, probe.act_fn = Times(2.0), Times(3.0), Times(5.0), act()
        x = torch.tensor([[[0.3, -0.7, 1.9]]], dtype=torch.float64)
        wanted = probe.down_proj(probe.act_fn(probe.gate_proj(x)) * probe.up_proj(x))
        found = probe(x)
        return isinstance(found, Tensor) and bool(torch.equal(found, wanted))
    except Exception:
        return None
