"""A frozen RMS norm as one autograd node.

    y = w x n,   n = 1 / sqrt(mean(x^2) + eps)
    dx = n (g - x n^2 mean(g x)),   g = w dy

The models' own code widens x to float32 and lets autograd keep that copy beside the numbers of each step; the node
keeps x as it came and n, one number a token, and goes over x half as often in its backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from engine import kernels
from engine.kernels.binding import bind, unbind

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Not float64: the models' own code takes float32 for that too."""
_EPS = ("variance_epsilon", "eps")


class FrozenNorm(torch.autograd.Function):
    """(any, d) from x (any, d) and a weight (d) that learns nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        # float32 goes away here where x is narrower; where it is not, `wide` is x itself.
        return (wide * scale if wide is x else wide.mul_(scale)).to(x.dtype).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        wide, gradient = _wide(x), _wide(grad * weight)
        share = (gradient * wide).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(x.shape[-1])
        return gradient.mul_(scale).addcmul_(wide, share, value=-1).to(x.dtype), None, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def forward(norm: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A norm's forward pass, as one node where that is possible."""
    weight = norm.weight
    if (
        args
        or kwargs
        or not (kernels.enabled() and torch.is_grad_enabled() and x.requires_grad)
        or weight.requires_grad
        or weight.dtype != x.dtype
        or x.dtype not in _TYPES
        or hasattr(weight, "placements")
        or torch._C._are_functorch_transforms_active()
    ):
        return type(norm).forward(norm, x, *args, **kwargs)  # type: ignore[no-any-return]
    return FrozenNorm.apply(x, weight, eps_of(norm))  # type: ignore[no-any-return]


def eps_of(norm: nn.Module) -> float | None:
    """A norm's epsilon, or None where it has none under a known name."""
    found = (norm.__dict__.get(name) for name in _EPS)
    return next((value for value in found if isinstance(value, float)), None)


def install(model: nn.Module) -> None:
    """Give the model's RMS norms the fused forward: known by what their class computes."""
    for module in model.modules():
        if isinstance(module._parameters.get("weight"), Tensor) and _is_norm(module):
            bind(module, forward)


def remove(model: nn.Module) -> None:
    """The classes' own forward again."""
    for module in model.modules():
        unbind(module, forward)


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters["weight"]
    if weight is None or weight.dim() != 1 or len(module._parameters) != 1 or module._modules or module._buffers:
        return False
    if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks or eps_of(module) is None:
        return False
    return _computes_norm(type(module))


_known: dict[type[nn.Module], bool] = {}


def _computes_norm(norm: type[nn.Module]) -> bool:
    """Whether a class's own forward is the formula above, to the bit; it is asked with numbers of ours."""
    if norm not in _known:
        said = [_asked(norm, dtype) for dtype in (torch.float32, torch.bfloat16)]
        if None in said:
            return False
        _known[norm] = all(said)
    return _known[norm]


def _asked(norm: type[nn.Module], dtype: torch.dtype) -> bool | None:
    """None where it could not answer: a class that needs more than these, or a place without numbers."""
    probe: Any = norm.__new__(norm)
    nn.Module.__init__(probe)
    # Large enough to show.
    probe.__dict__.update(dict.fromkeys(_EPS, 0.25))
    try:
        probe.weight = nn.Parameter(torch.tensor([0.5, 1.5, -2.25], dtype=dtype), requires_grad=False)
        x = torch.tensor([[0.3, -0.7, 1.9], [11.0, 0.0, -0.4]], dtype=dtype, requires_grad=True)
        wanted = probe(x)
        return isinstance(wanted, Tensor) and torch.equal(wanted, FrozenNorm.apply(x, probe.weight, 0.25))
    except Exception:
        return None
