"""What the methods of LyCORIS (https://arxiv.org/abs/2309.14859) share: settings, dropouts, a change of the weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engine.adapters.base import (
    CONV1D,
    CONV2D,
    AdapterConfig,
    AdapterWeights,
    applied,
    by_pattern,
    compute_cast,
    layer_kind,
    master,
    target_faults,
)


@dataclass(frozen=True, kw_only=True)
class LycorisConfig(AdapterConfig):
    """What the methods of LyCORIS (https://arxiv.org/abs/2309.14859) share, by PEFT's names.

    Attributes:
        r: rank.
        alpha: the change is scaled by alpha / r.
        rank_dropout: share of the output channels for which training drops the change.
        module_dropout: share of the training steps in which a layer's change is left out.
        use_effective_conv2d: factor convolutions with kernels larger than 1x1 mode by mode instead of as a matrix.
        target_modules: names or name endings, one regular expression for whole names, `"all-linear"`, or None for
            the architecture's usual attention projections.
        exclude_modules: names, endings or one regular expression to leave out.
        layers_to_transform: only these layer numbers. layers_pattern: the list's name before the number.
        rank_pattern, alpha_pattern: name ending or regular expression -> r or alpha for those modules.
        modules_to_save: further modules that are trained in full and saved with the adapter.
        init_weights: True starts as the identity; False with a random change.
    """

    UNUSED: ClassVar[Mapping[str, Any]] = {"auto_mapping": None}
    STARTS: ClassVar[tuple[bool | str, ...]] = (True, False)

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    init_weights: bool | str = True

    def faults(self) -> list[str]:
        found = target_faults(self)
        for label, value in (("r", self.r), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                found.append(f"{label} is {value!r}; needed: a whole number from 1")
        for label, alpha in (
            ("alpha", self.alpha),
            *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items()),
        ):
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
                found.append(f"{label} is {alpha!r}; needed: a finite number above 0")
        for label in ("rank_dropout", "module_dropout"):
            share = getattr(self, label)
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
                found.append(f"{label} is {share!r}; needed: 0 up to, but not including, 1")
        if self.init_weights not in self.STARTS:
            found.append(f"init_weights is {self.init_weights!r}; needed: one of {', '.join(map(repr, self.STARTS))}")
        return found

    def rank_of(self, module: str) -> int:
        return int(by_pattern(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """s = alpha / r at `module`."""
        return float(by_pattern(self.alpha_pattern, module, self.alpha)) / self.rank_of(module)


class LycorisWeights(AdapterWeights):
    """A change dW of the weight that is a product of small factors, and LyCORIS's two kinds of dropout.

    Subclasses give `change`, dW as (out, ...) in the base's shape without the scale, and may give `apply_thin`,
    dW x without forming dW.
    """

    def __init__(self, base: nn.Module, config: LycorisConfig, module: str) -> None:
        super().__init__()
        assert isinstance(base.weight, Tensor)
        self.kind = layer_kind(base)
        self.r = config.rank_of(module)
        self.scale = config.scale(module)
        self.rank_dropout = config.rank_dropout
        self.rescale_dropout = True
        self.module_dropout = config.module_dropout
        if isinstance(base, nn.Conv2d):
            self.shape = tuple(base.weight.shape)
        elif isinstance(base, nn.Linear):
            # Not the weight's shape: 4-bit weights are packed.
            self.shape = (base.out_features, base.in_features)
        else:
            self.shape = (base.weight.shape[1], base.weight.shape[0])
        self.device = base.weight.device
        # A 1x1 kernel has no modes to factor.
        self.by_modes = config.use_effective_conv2d and len(self.shape) == 4 and self.shape[2:] != (1, 1)

    def empty(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(*shape, device=self.device, dtype=torch.float32))

    def change(self) -> Tensor:
        """dW / s, (out, in) or (out, in / groups, kh, kw)."""
        raise TypeError(f"{type(self).__name__} does not say what it changes")

    def apply_thin(self, x: Tensor, base: nn.Module) -> Tensor | None:
        """dW x / s without forming dW, or None where forming it is cheaper or the only way."""
        return None

    def delta(self, x: Tensor, y: Tensor, base: nn.Module, weight: float) -> Tensor:
        if self.training and self.module_dropout and torch.rand(()).item() < self.module_dropout:
            # Zeros that belong to the graph: with one adapted layer there must be something to go backward through.
            idle = sum((parameter.sum() * 0 for parameter in self.parameters()), torch.zeros((), device=y.device))
            return idle.to(y.dtype).expand_as(y)
        out = self.apply_thin(x, base)
        if out is None:
            out = applied(compute_cast(self.change(), x), x, base)
        out = out * (self.scale * weight)
        if self.training and self.rank_dropout:
            out = out * self._kept(out)
        return out

    def _kept(self, out: Tensor) -> Tensor:
        """0 for the dropped output channels; the others are raised so that the mean stays."""
        n_out = self.shape[0]
        kept = (torch.rand(n_out, device=out.device) >= self.rank_dropout).to(out.dtype)
        if self.rescale_dropout:
            kept = kept * (n_out / kept.sum(dtype=torch.float32).clamp(min=1)).to(out.dtype)
        return kept[:, None, None] if self.kind == CONV2D else kept

    def delta_weight(self, base: nn.Module) -> Tensor:
        change = master(self.change()) * self.scale
        return change.T if self.kind == CONV1D else change
