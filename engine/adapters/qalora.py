"""QA-LoRA: quantisation-aware low-rank adaptation (Xu et al., 2023, https://arxiv.org/abs/2309.14717).

    y = W x + s B A p,   A: (r, in / g), B: (out, r),   s = alpha / r,   p_k = the mean of x over its k-th group of g

All inputs of a group share one column of A, so the change of the weight is constant over each group,

    dW[o, i] = s (B A)[o, i // g] / g

and a base quantised in groups takes it up in its zeros, exactly and without losing its 4 bits
(`engine.quantized.QuantizedLinear`, W = scale (code - zero)):

    zero -= s (B A)^T / (g scale)

Into a plain weight dW is merged as it stands. Dropout acts on p.

`LoraConfig(use_qalora=True)` is PEFT's form, kept for its files: there p is multiplied by in / g, the number of groups,
which makes the change's size depend on the layer's width. Here that factor is part of the scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from engine.adapters.base import CONV1D, LINEAR, AdapterSpec, PeftType, features
from engine.adapters.lowrank import LowRankConfig, LowRankLinear
from engine.errors import TargetError
from engine.quantized import QuantizedLinear


@dataclass(frozen=True, kw_only=True)
class QALoRAConfig(LowRankConfig):
    """QA-LoRA's settings in the paper's form; see `LowRankConfig` for the fields that it shares with LoRA.

    Attributes:
        qalora_group_size: g, inputs per group; for an exact merge into a quantised base a multiple of its group size.
    """

    PEFT_TYPE: ClassVar[PeftType] = PeftType.QALORA
    UNUSED: ClassVar[Mapping[str, Any]] = {"auto_mapping": None}

    use_qalora: bool = True
    qalora_group_size: int = 32

    def faults(self) -> list[str]:
        found = super().faults()
        if self.use_qalora is not True:
            found.append(f"use_qalora is {self.use_qalora!r}; needed: True, or a LoraConfig")
        return found


class QALoRALinear(LowRankLinear):
    """QA-LoRA at nn.Linear, W: (out, in), or at GPT-2's Conv1D, W: (in, out); the base may be quantised."""

    def sides(self, base: nn.Module, config: LowRankConfig, module: str) -> tuple[int, int]:
        n_in, n_out = features(base)
        self.group = config.qalora_group_size
        if n_in % self.group:
            raise TargetError(
                f"QA-LoRA pools groups of qalora_group_size={self.group} inputs, and {module} has {n_in}.",
                "Choose a size that divides them, or leave this module out with exclude_modules.",
            )
        groups = n_in // self.group
        if config.PEFT_TYPE is PeftType.LORA:
            self.scale *= groups
        return groups, n_out

    def delta(self, x: Tensor, y: Tensor, base: nn.Module, weight: float) -> Tensor:
        return super().delta(x.unflatten(-1, (-1, self.group)).mean(-1), y, base, weight)

    def _pooled_change(self) -> Tensor:
        """s B A / g: what each input of a group adds, (out, in / g)."""
        a, b = self.matrices()
        return (b @ a) * (self.scale / self.group)

    def delta_weight(self, base: nn.Module) -> Tensor:
        change = self._pooled_change().repeat_interleave(self.group, dim=1)
        return change.T if self.transposed else change

    def merge_changes(self, base: nn.Module, module: str) -> dict[str, Tensor]:
        if not isinstance(base, QuantizedLinear):
            return super().merge_changes(base, module)
        if self.group % base.group_size:
            raise TargetError(
                f"{module} is quantised in groups of {base.group_size}, and this adapter's change is constant over "
                f"groups of {self.group} only, so that the zeros cannot take it up.",
                f"Train with a qalora_group_size that is a multiple of {base.group_size}.",
            )
        change = self._pooled_change().repeat_interleave(self.group // base.group_size, dim=1)
        return {"zeros": -change.T / base.scales.to(change.dtype)}


def build(base: nn.Module, config: LowRankConfig, module: str) -> QALoRALinear:
    """QA-LoRA's weights for one base layer, on its device, in float32."""
    return QALoRALinear(base, config, module)


SPEC = AdapterSpec(
    name="qalora",
    title="QA-LoRA",
    paper="https://arxiv.org/abs/2309.14717",
    config=QALoRAConfig,
    build=build,
    layers=(LINEAR, CONV1D),
    mergeable=True,
    mixable=True,
    identity_at_start=True,
    formats=("Adapter Studio", "PEFT"),
)
