"""LoRA-FA: LoRA with A frozen (Zhang et al., 2023, https://arxiv.org/abs/2308.03303).

    y = W x + s B A drop(x),   A: (r, in) random and never trained, B: (out, r) zero and trained,   s = alpha / r

The backward pass needs A x, of r values a token, instead of x, and the optimizer half of LoRA's moments. Its file is a
plain LoRA, with `use_lorafa` in the config so that training can go on; PEFT ignores that field and computes the same.

`engine.train.optim.create_lorafa_optimizer` is the later form, PEFT's: B's gradient projected by (A A^T)^-1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from engine.adapters.base import CONV1D, CONV2D, LINEAR, AdapterSpec, layer_kind
from engine.adapters.lowrank import LowRankConfig, LowRankConv2d, LowRankLinear, LowRankWeights


@dataclass(frozen=True, kw_only=True)
class LoRAFAConfig(LowRankConfig):
    """LoRA-FA's settings; see `LowRankConfig`. The same as `LoraConfig(use_lorafa=True)`."""

    use_lorafa: bool = True

    def faults(self) -> list[str]:
        found = super().faults()
        if self.use_lorafa is not True:
            found.append(f"use_lorafa is {self.use_lorafa!r}; needed: True, or a LoraConfig")
        return found


class LoRAFALinear(LowRankLinear):
    """LoRA-FA at nn.Linear or Conv1D."""

    frozen = ("lora_A.weight",)


class LoRAFAConv2d(LowRankConv2d):
    """LoRA-FA at nn.Conv2d."""

    frozen = ("lora_A.weight",)


_KINDS: dict[str, Any] = {LINEAR: LoRAFALinear, CONV1D: LoRAFALinear, CONV2D: LoRAFAConv2d}


def build(base: nn.Module, config: LowRankConfig, module: str) -> LowRankWeights:
    """LoRA-FA's weights for one base layer, on its device, in float32, A without gradient."""
    weights: Any = _KINDS[str(layer_kind(base))](base, config, module)
    weights.lora_A.weight.requires_grad_(False)
    return weights  # type: ignore[no-any-return]


SPEC = AdapterSpec(
    name="lorafa",
    title="LoRA-FA",
    paper="https://arxiv.org/abs/2308.03303",
    config=LoRAFAConfig,
    build=build,
    layers=tuple(_KINDS),
    mergeable=True,
    mixable=True,
    identity_at_start=True,
)
