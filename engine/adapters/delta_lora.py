"""Delta-LoRA: the base moves with the adapter (Zi et al., 2023, https://arxiv.org/abs/2309.02411).

    y = W_t x + s B_t A_t x,   A: (r, in), B: (out, r),   s = alpha / r, no dropout
    W_{t+1} = W_t + lambda s (B_{t+1} A_{t+1} - B_t A_t)   after step t > K

so the frozen matrix learns too, from the change of the product instead of a gradient. The sum telescopes:

    W_T = W_0 + lambda s (B_T A_T - B_K A_K)

Here W stays W_0; the layer adds the second term to s B A x, with A and B in it taken as constants, as W is in the
paper. It is the same function with the same gradients, to rounding; the base is left alone, so it may be quantised and
shared, and the trained change is a plain LoRA of rank 2r: [(1 + lambda) B, -lambda B_K] [A; A_K].
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
    Attached,
    PeftType,
    compute_cast,
    features,
    layer_kind,
    master,
    target_faults,
)


@dataclass(frozen=True, kw_only=True)
class DeltaLoraConfig(AdapterConfig):
    """Delta-LoRA's settings, in the manner of `LoraConfig`.

    Attributes:
        r: rank.
        lora_alpha: the change is scaled by lora_alpha / r.
        delta_lambda: how much the base moves with each change of the product; 0 is LoRA.
        start_step: K, the steps that train as LoRA does before the base moves; 0 moves it from the first on.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in `LoraConfig`.
    """

    PEFT_TYPE: ClassVar[PeftType] = PeftType.DELTA_LORA
    UNUSED: ClassVar[Mapping[str, Any]] = {"auto_mapping": None}

    r: int = 8
    lora_alpha: float = 8
    delta_lambda: float = 2.0
    start_step: int = 500
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def faults(self) -> list[str]:
        found = []
        for label, low in (("r", 1), ("start_step", 0)):
            value = getattr(self, label)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                found.append(f"{label} is {value!r}; needed: a whole number from {low}")
        for label in ("lora_alpha", "delta_lambda"):
            value = getattr(self, label)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                found.append(f"{label} is {value!r}; needed: a number, 0 or more")
        if self.lora_alpha == 0:
            found.append("lora_alpha is 0; needed: a number above 0")
        return found + target_faults(self)


class DeltaLoraWeights(AdapterWeights):
    """A and B, and their snapshot of step K, at nn.Linear or GPT-2's Conv1D.

    `begun` says whether the base moves by now: it is in files and checkpoints with the snapshot. `moving` is the same,
    known without a look at the device.
    """

    start_A: Tensor
    start_B: Tensor
    begun: Tensor

    def __init__(self, base: nn.Module, config: DeltaLoraConfig, module: str) -> None:
        super().__init__()
        weight = base.weight
        assert isinstance(weight, Tensor)
        n_in, n_out = features(base)
        self.r, self.scale = config.r, config.lora_alpha / config.r
        self.share = config.delta_lambda
        self.transposed = layer_kind(base) == CONV1D
        self.moving = False
        place: dict[str, Any] = {"device": weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(n_in, self.r, bias=False, **place)
        self.lora_B = nn.Linear(self.r, n_out, bias=False, **place)
        self.register_buffer("start_A", torch.zeros(self.r, n_in, **place))
        self.register_buffer("start_B", torch.zeros(n_out, self.r, **place))
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        if not config.start_step:
            self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        """Take the snapshot; from now on the base moves."""
        self.start_A.copy_(self.lora_A.weight)
        self.start_B.copy_(self.lora_B.weight)
        self.begun.fill_(True)
        self.moving = True

    def restored(self) -> None:
        self.moving = bool(self.begun)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.begun.is_meta:
            self.restored()

    def delta(self, x: Tensor, y: Tensor, base: nn.Module, weight: float) -> Tensor:
        a, b = self.lora_A.weight, self.lora_B.weight
        if self.moving:
            a = torch.cat([a, a.detach(), self.start_A])
            b = torch.cat([b, self.share * b.detach(), -self.share * self.start_B], dim=1)
        return F.linear(F.linear(x, compute_cast(a, x)) * (self.scale * weight), compute_cast(b, x))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A and B of the plain LoRA with the same scale: rank r before the base moves, 2r after."""
        a, b = master(self.lora_A.weight), master(self.lora_B.weight)
        if not self.moving:
            return a, b
        start_a, start_b = master(self.start_A), master(self.start_B)
        return torch.cat([a, start_a]), torch.cat([(1 + self.share) * b, -self.share * start_b], dim=1)

    def delta_weight(self, base: nn.Module) -> Tensor:
        a, b = self.matrices()
        change = (b @ a) * self.scale
        return change.T if self.transposed else change

    def export(self) -> dict[str, Tensor]:
        return self.slots()

    def slots(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


def after_step(adapter: Attached, step: int) -> None:
    """The snapshot, after step K; a training that goes on with a loaded adapter keeps the one it has."""
    if step < adapter.config.start_step:
        return
    for weights in adapter.layers.values():
        if not weights.moving:
            weights.begin()


def as_lora(adapter: Attached) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The whole change as a plain LoRA with the same scale."""
    config: DeltaLoraConfig = adapter.config
    tensors = {}
    for module, weights in adapter.layers.items():
        a, b = weights.matrices()
        tensors[module] = {"lora_A.weight": a, "lora_B.weight": b}
    times = 2 if any(weights.moving for weights in adapter.layers.values()) else 1
    return {"r": times * config.r, "lora_alpha": times * config.lora_alpha}, tensors


def build(base: nn.Module, config: DeltaLoraConfig, module: str) -> DeltaLoraWeights:
    """Delta-LoRA's matrices for one base layer, on its device, in float32."""
    return DeltaLoraWeights(base, config, module)


SPEC = AdapterSpec(
    name="delta_lora",
    title="Delta-LoRA",
    paper="https://arxiv.org/abs/2309.02411",
    config=DeltaLoraConfig,
    build=build,
    layers=(LINEAR, CONV1D),
    mergeable=True,
    mixable=True,
    identity_at_start=True,
    after_step=after_step,
    as_lora=as_lora,
    formats=("Adapter Studio", "PEFT (as plain LoRA)"),
)
