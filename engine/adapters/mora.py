"""MoRA: high-rank updating with a square matrix (Jiang et al., 2024, https://arxiv.org/abs/2405.12130).

    y = W x + decompress(M compress(drop(x))),   M: (r', r'), zero at the start,   r' = floor(sqrt((in + out) r) + 1/2)

so that M has about the parameters of a LoRA of rank r, at a rank of up to r'. For type 6, r' is lowered to an even
number. x is padded with its own beginning to a multiple of r' and seen as blocks x_0, x_1, ... of length r'.

- Type 1 (sharing, equation 6; for a large r): compress is the sum of the blocks, decompress repeats M's output up to
  `out`.
- Type 6 (rotation, equation 9; for a small r): block j is rotated as RoPE rotates position j, its pair (i, i + r'/2) by
  j 10000^(-2i/r'); M acts on each block; decompress joins the results, then cuts them off at `out` or
  repeats them up to it.

There is no alpha: M's scale is the learning rate's matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 (the field's usual name)
from torch import Tensor, nn

from engine.adapters.base import (
    CONV1D,
    LINEAR,
    AdapterConfig,
    AdapterSpec,
    AdapterWeights,
    PeftType,
    compute_cast,
    features,
    layer_kind,
    master,
    target_faults,
)
from engine.errors import TargetError
from engine.kernels.dropout import Dropout

SHARING, ROTATION = 1, 6


@dataclass(frozen=True, kw_only=True)
class MoRAConfig(AdapterConfig):
    """MoRA's settings, in the manner of `LoraConfig`.

    Attributes:
        r: the rank of the LoRA with as many parameters; M's size follows from it at each layer.
        mora_type: 6 (rotation) for a small r, 1 (sharing) for a large one.
        mora_dropout: share of the adapter's input that training drops.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in `LoraConfig`.
        bias: `none`; `mora_only` also trains the adapted layers' biases; `all` trains every bias of the model.
    """

    PEFT_TYPE: ClassVar[PeftType] = PeftType.MORA
    UNUSED: ClassVar[Mapping[str, Any]] = {"auto_mapping": None}

    r: int = 8
    mora_type: int = ROTATION
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    mora_dropout: float = 0.0
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def faults(self) -> list[str]:
        found = []
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            found.append(f"r is {self.r!r}; needed: a whole number from 1")
        if isinstance(self.mora_type, bool) or self.mora_type not in (SHARING, ROTATION):
            found.append(f"mora_type is {self.mora_type!r}; needed: 1 (sharing) or 6 (rotation)")
        if not isinstance(self.mora_dropout, int | float) or not 0 <= self.mora_dropout < 1:
            found.append(f"mora_dropout is {self.mora_dropout!r}; needed: 0 up to, but not including, 1")
        if self.bias not in ("none", "all", "mora_only"):
            found.append(f"bias is {self.bias!r}; needed: none, all or mora_only")
        return found + target_faults(self)


def square_size(n_in: int, n_out: int, r: int, mora_type: int) -> int:
    """r', the side of M."""
    side = int(math.sqrt((n_in + n_out) * r) + 0.5)
    return side // 2 * 2 if mora_type == ROTATION else side


class MoRAWeights(AdapterWeights):
    """MoRA at nn.Linear, W: (out, in), or at GPT-2's Conv1D, W: (in, out)."""

    def __init__(self, base: nn.Module, config: MoRAConfig, module: str) -> None:
        super().__init__()
        n_in, self.n_out = features(base)
        self.rotates = config.mora_type == ROTATION
        self.transposed = layer_kind(base) == CONV1D
        self.side = side = square_size(n_in, self.n_out, config.r, config.mora_type)
        if not 0 < side <= n_in:
            raise TargetError(
                f"MoRA with r={config.r} makes a square matrix of {side} at {module}, which has {n_in} inputs; needed: "
                f"from 1 up to {n_in}.",
                "Lower r, or leave this module out with exclude_modules.",
            )
        self.blocks = -(-n_in // side)
        self.padding = self.blocks * side - n_in
        self.dropout = Dropout(config.mora_dropout) if config.mora_dropout else nn.Identity()
        weight = base.weight
        assert isinstance(weight, Tensor)
        self.mora_M = nn.Parameter(torch.zeros(side, side, device=weight.device, dtype=torch.float32))

    def _rotated(self, blocks: Tensor) -> Tensor:
        """Block j turned by RoPE's angles of position j; `blocks`: (..., number of blocks, r')."""
        wide = torch.promote_types(blocks.dtype, torch.float32)
        half = torch.arange(self.side // 2, device=blocks.device, dtype=wide)
        position = torch.arange(self.blocks, device=blocks.device, dtype=wide)
        angle = position[:, None] * 10000.0 ** (-2 * half / self.side)
        cos, sin = angle.cos().to(blocks.dtype), angle.sin().to(blocks.dtype)
        first, second = blocks.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def change(self, x: Tensor, matrix: Tensor) -> Tensor:
        """decompress(M compress(x)); x: (..., in), the result: (..., out)."""
        if self.padding:
            x = torch.cat([x, x[..., : self.padding]], dim=-1)
        blocks = x.unflatten(-1, (self.blocks, self.side))
        out = F.linear(self._rotated(blocks), matrix).flatten(-2) if self.rotates else F.linear(blocks.sum(-2), matrix)
        times = -(-self.n_out // out.shape[-1])
        return (torch.cat([out] * times, dim=-1) if times > 1 else out)[..., : self.n_out]

    def delta(self, x: Tensor, y: Tensor, base: nn.Module, weight: float) -> Tensor:
        return self.change(self.dropout(x), compute_cast(self.mora_M, x) * weight)

    def delta_weight(self, base: nn.Module) -> Tensor:
        matrix = master(self.mora_M)
        # The change is linear in x: its rows at the unit vectors are the columns of dW.
        columns = self.change(torch.eye(features(base)[0], dtype=matrix.dtype, device=matrix.device), matrix)
        return columns if self.transposed else columns.T


def build(base: nn.Module, config: MoRAConfig, module: str) -> MoRAWeights:
    """MoRA's matrix for one base layer, on its device, in float32."""
    return MoRAWeights(base, config, module)


SPEC = AdapterSpec(
    name="mora",
    title="MoRA",
    paper="https://arxiv.org/abs/2405.12130",
    config=MoRAConfig,
    build=build,
    layers=(LINEAR, CONV1D),
    mergeable=True,
    mixable=True,
    identity_at_start=True,
    formats=("Adapter Studio",),
)
