"""A linear layer with a 4-bit weight in groups, each with a scale and a zero: the base that QA-LoRA merges into.

    W[o, i] = scale[k, o] (code[o, i] - zero[k, o]),   k = i // group_size,   code in 0 ... 15

Scale and zero follow from the group's least and greatest value; the zero is no whole number, and may move, which
takes up any change of W that is constant over a group. Two codes are stored in a byte.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the field's usual name)
from torch import Tensor, nn

from engine.errors import TargetError
from engine.inject import base_modules, linear_suffixes, matches, replace_module, wrappers

LEVELS = 15


class PackedCodes(nn.Parameter):
    """Two 4-bit codes in each byte; counts as twice its elements."""


class QuantizedLinear(nn.Linear):
    """y = W x + b with W in 4 bits.

    Attributes:
        weight: (out, in / 2), a byte each: the codes of inputs 2j (low half) and 2j + 1 (high half).
        scales, zeros: (in / group_size, out).
        bias: (out) or None.
    """

    scales: Tensor
    zeros: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = codes.shape
        self.group_size = self.in_features // scales.shape[0]
        packed = codes[:, 0::2] | codes[:, 1::2] << 4
        # As int8, the type that transformers takes for quantised: T5 would cast its activations to any other.
        self.weight = PackedCodes(packed.view(torch.int8), requires_grad=False)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        own = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", own)

    @classmethod
    def from_linear(cls, linear: nn.Linear, group_size: int = 32, name: str = "the layer") -> QuantizedLinear:
        """Quantise a linear layer by rounding to the nearest level.

        Raises:
            TargetError: the inputs do not fall into groups of that (even) size, or the weight is not finite.
        """
        weight = linear.weight.detach()
        n_out, n_in = weight.shape
        if group_size < 2 or group_size % 2 or n_in % group_size:
            raise TargetError(
                f"{name} has {n_in} inputs, which do not fall into groups of {group_size}; needed: an even group size "
                "that divides them.",
                "Choose another group size, or leave this layer out.",
            )
        if not weight.is_floating_point() or not torch.isfinite(weight).all():
            raise TargetError(f"{name} is quantised already or not finite.", "Load the base in full precision.")
        groups = weight.to(torch.promote_types(weight.dtype, torch.float32)).view(n_out, -1, group_size)
        low, high = groups.aminmax(dim=-1)
        scales = (high - low) / LEVELS
        # A group of equal values, or of ones too close for its type, is its zero alone.
        scales = torch.where(scales > torch.finfo(scales.dtype).tiny, scales, torch.ones_like(scales))
        zeros = -low / scales
        codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, LEVELS).to(torch.uint8)
        made = cls(codes.view(n_out, n_in), scales.T.contiguous(), zeros.T.contiguous(), linear.bias)
        made.train(linear.training)
        return made

    def dequantized(self) -> Tensor:
        """W, (out, in), in the type of the scales."""
        packed = self.weight.view(torch.uint8)
        codes = torch.stack([packed & LEVELS, packed >> 4], dim=-1).view(self.out_features, -1, self.group_size)
        w = (codes.to(self.scales.dtype) - self.zeros.T[..., None]) * self.scales.T[..., None]
        return w.view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantized().to(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"


def quantize_linears(model: nn.Module, target_modules: Any, group_size: int = 32) -> nn.Module:
    """Replace a model's linear layers by 4-bit ones, in place.

    Args:
        model: a model without adapters.
        target_modules: names, endings of names, or one regular expression, as in `LoraConfig`.
        group_size: how many inputs share a scale and a zero.

    Raises:
        TargetError: nothing matches, or a layer cannot be quantised; the model is as before.
    """
    if next(wrappers(model), None) is not None:
        raise TargetError("The model carries adapters, which were made for its weights.", "Call unload() first.")
    wanted = [(name, module) for name, module in base_modules(model) if matches(name, target_modules)]
    found = [(name, module) for name, module in wanted if type(module) is nn.Linear]
    if not found:
        raise TargetError(
            f"No linear layer of {type(model).__name__} matches target_modules={target_modules!r}.",
            f"Linear layers that can be named: {', '.join(linear_suffixes(model)) or 'none'}.",
        )
    made = [(name, QuantizedLinear.from_linear(module, group_size, name)) for name, module in found]
    for name, module in made:
        replace_module(model, name, module)
    return model
