"""VeRA: vector-based random matrix adaptation (Kopiczko et al., 2023, https://arxiv.org/abs/2310.11454).

    y = W x + b * (B (d * (A drop(x)))),   d: (r), starts at d_initial,   b: (out), starts at zero

A (r, largest in) and B (largest out, r) are random, frozen and shared by all layers of the adapter; a layer uses the
first columns of A and the first rows of B. They follow from the seed `projection_prng_key` as PEFT draws them, bit for
bit: a CPU generator, A first, uniform in +-sqrt(3) sqrt(2 / columns).
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
    SharedState,
    compute_cast,
    features,
    layer_kind,
    master,
    target_faults,
)
from engine.kernels.dropout import Dropout


@dataclass(frozen=True, kw_only=True)
class VeraConfig(AdapterConfig):
    """VeRA's settings, by PEFT's names.

    Attributes:
        r: rank of the shared projections; a layer trains r + out parameters.
        target_modules, layers_to_transform, layers_pattern, modules_to_save: as in `LoraConfig`.
        projection_prng_key: seed of the shared projections.
        save_projection: writes the projections into the file too; without, the seed alone has to do.
        vera_dropout: share of the adapter's input that training drops.
        d_initial: first value of d.
        bias: `none`; `vera_only` also trains the adapted layers' biases; `all` trains every bias of the model.
        init_weights: False starts with b = 1 and d ~ N(0, 1): not the identity.
        fan_in_fan_out: kept for PEFT's format; the engine reads it off the layer.
    """

    PEFT_TYPE: ClassVar[PeftType] = PeftType.VERA
    UNUSED: ClassVar[Mapping[str, Any]] = {"auto_mapping": None}

    r: int = 256
    target_modules: list[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def faults(self) -> list[str]:
        found = []
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            found.append(f"r is {self.r!r}; needed: a whole number from 1")
        key = self.projection_prng_key
        if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < 2**64:
            found.append(f"projection_prng_key is {key!r}; needed: a whole number from 0 below 2^64")
        if not isinstance(self.vera_dropout, int | float) or not 0 <= self.vera_dropout < 1:
            found.append(f"vera_dropout is {self.vera_dropout!r}; needed: 0 up to, but not including, 1")
        if not isinstance(self.d_initial, int | float) or not math.isfinite(self.d_initial):
            found.append(f"d_initial is {self.d_initial!r}; needed: a number")
        if self.bias not in ("none", "all", "vera_only"):
            found.append(f"bias is {self.bias!r}; needed: none, all or vera_only")
        return found + target_faults(self)


class VeraProjections(SharedState):
    """The frozen A and B of one adapter, as large as its largest layer needs."""

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, bases: Mapping[str, nn.Module], config: VeraConfig) -> None:
        super().__init__()
        self.saved = config.save_projection
        sizes = [features(base) for base in bases.values()]
        n_in, n_out = max(i for i, _ in sizes), max(o for _, o in sizes)
        weight = next(iter(bases.values())).weight
        assert isinstance(weight, Tensor)
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        for name, shape in (("vera_A", (config.r, n_in)), ("vera_B", (n_out, config.r))):
            place = "meta" if weight.is_meta else "cpu"
            drawn = torch.empty(shape, device=place, dtype=torch.float32)
            if not weight.is_meta:
                bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
                drawn.uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn.to(weight.device))

    def export(self) -> dict[str, Tensor]:
        return super().export() if self.saved else {}


class VeraWeights(AdapterWeights):
    """VeRA at nn.Linear or GPT-2's Conv1D: the two vectors."""

    def __init__(self, base: nn.Module, config: VeraConfig, shared: VeraProjections) -> None:
        super().__init__()
        self.n_in, self.n_out = features(base)
        self.transposed = layer_kind(base) == CONV1D
        self._shared = (shared,)
        self.dropout = Dropout(config.vera_dropout) if config.vera_dropout else nn.Identity()
        weight = base.weight
        assert isinstance(weight, Tensor)
        place: dict[str, Any] = {"device": weight.device, "dtype": torch.float32}
        b, d = torch.zeros(self.n_out, **place), torch.full((config.r,), float(config.d_initial), **place)
        if not config.init_weights:
            b, d = torch.ones_like(b), torch.randn_like(d)
        self.vera_lambda_b, self.vera_lambda_d = nn.Parameter(b), nn.Parameter(d)

    def projections(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """This layer's part of A, (r, in), and of B, (out, r)."""
        shared = self._shared[0]
        return shared.vera_A[:, : self.n_in].to(device), shared.vera_B[: self.n_out].to(device)

    def delta(self, x: Tensor, y: Tensor, base: nn.Module, weight: float) -> Tensor:
        a, b = self.projections(x.device)
        h = F.linear(self.dropout(x), compute_cast(a, x)) * compute_cast(self.vera_lambda_d, x)
        return F.linear(h, compute_cast(b, x)) * (compute_cast(self.vera_lambda_b, x) * weight)

    def delta_weight(self, base: nn.Module) -> Tensor:
        a, b = self.projections(self.vera_lambda_b.device)
        change = (master(self.vera_lambda_b)[:, None] * b) @ (master(self.vera_lambda_d)[:, None] * a)
        return change.T if self.transposed else change


def build(base: nn.Module, config: VeraConfig, module: str, shared: VeraProjections) -> VeraWeights:
    """VeRA's vectors for one base layer, on its device, in float32."""
    return VeraWeights(base, config, shared)


SPEC = AdapterSpec(
    name="vera",
    title="VeRA",
    paper="https://arxiv.org/abs/2310.11454",
    config=VeraConfig,
    build=build,
    layers=(LINEAR, CONV1D),
    mergeable=True,
    mixable=True,
    identity_at_start=True,
    share=VeraProjections,
)
