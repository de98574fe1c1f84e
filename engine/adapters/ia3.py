"""IA3: infused adapter by inhibiting and amplifying inner activations (Liu et al., 2022).

https://arxiv.org/abs/2205.05638

    y = l * (W x + b),   l: (out), or, at the feed-forward block's last layer,   y = W (l * x) + b,   l: (in)

with l = 1 at the start. Several adapters with weights w_i act as l = 1 + sum_i w_i (l_i - 1): a weight of 0 is the
base, and the order of adapters makes no difference. The layers compute x + x (l - 1): l - 1 is small, and keeps its
digits in bf16, where l itself, near 1, has only steps of 1/128.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engine.adapters.base import (
    CONV1D,
    CONV2D,
    LINEAR,
    AdapterConfig,
    AdapterSpec,
    AdapterWeights,
    PeftType,
    layer_kind,
    master,
    target_faults,
)
from engine.errors import TargetError

# The layer that takes the feed-forward block's inner activations back to the model's width, by its usual names.
_FEEDFORWARD = (
    "down_proj",
    "wo",
    "w2",
    "fc2",
    "fc_out",
    "lin2",
    "mlp.c_proj",
    "dense_4h_to_h",
    "output.dense",
    "ff.net.2",
)


@dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    """IA3's settings, by PEFT's names.

    Attributes:
        target_modules: names or name endings, one regular expression for whole names, `"all-linear"`, or None for
            the architecture's keys, values and last feed-forward layer.
        feedforward_modules: those of the targets whose input is scaled instead of the output, by ending or regular
            expression; None for the last layers of feed-forward blocks, by their usual names. As in PEFT, an ending
            need not begin at a dot.
        exclude_modules: names, endings or one regular expression to leave out.
        modules_to_save: further modules that are trained in full and saved with the adapter.
        init_ia3_weights: False starts l from N(0, 1) instead of 1: not the identity.
        fan_in_fan_out: kept for PEFT's format; the engine reads it off the layer.
    """

    PEFT_TYPE: ClassVar[PeftType] = PeftType.IA3
    UNUSED: ClassVar[Mapping[str, Any]] = {"auto_mapping": None}
    TARGET_RULES: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("k_proj", "v_proj", "down_proj"),
        ("k_proj", "v_proj", "fc2"),
        ("k_proj", "v_proj", "fc_out"),
        ("k_proj", "v_proj", "w2"),
        ("k_proj", "v_proj", "mlp.c_proj"),
        ("k", "v", "wo"),
        ("key", "value", "output.dense"),
        ("key_proj", "value_proj", "output.dense"),
        ("k_lin", "v_lin", "lin2"),
        ("c_attn", "mlp.c_proj"),
        ("query_key_value", "dense_4h_to_h"),
        ("qkv_proj", "down_proj"),
        ("qkv_proj", "fc_out"),
        ("Wqkv", "down_proj"),
        ("to_k", "to_v", "ff.net.2"),
        ("in_proj", "output.dense"),
        # Mixtures of experts keep their feed-forward weights in one tensor, which is no layer.
        ("k_proj", "v_proj"),
    )

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    feedforward_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True

    def faults(self) -> list[str]:
        found = target_faults(self, "feedforward_modules")
        if not isinstance(self.init_ia3_weights, bool):
            found.append(f"init_ia3_weights is {self.init_ia3_weights!r}; needed: True or False")
        return found

    def settled(self, modules: Sequence[str]) -> IA3Config:
        """feedforward_modules in a form that PEFT accepts: a part of target_modules where they are two lists.

        Raises:
            TargetError: a name of feedforward_modules is no ending of any target.
        """
        wanted = self.feedforward_modules
        if isinstance(wanted, list):
            lost = [item for item in wanted if not any(name.endswith(item) for name in modules)]
            if lost:
                raise TargetError(
                    f"feedforward_modules names {', '.join(map(repr, lost))}, and no target's name ends so.",
                    f"The targets end in: {', '.join(sorted({name.rsplit('.', 1)[-1] for name in modules}))}.",
                )
            if isinstance(self.target_modules, list) and not set(wanted) <= set(self.target_modules):
                wanted = f".*({'|'.join(map(re.escape, wanted))})"
        elif wanted is None:
            wanted = [item for item in _FEEDFORWARD if any(_ends(name, item) for name in modules)]
            if isinstance(self.target_modules, list):
                inner = [name for name in modules if any(_ends(name, item) for item in wanted)]
                named = [item for item in self.target_modules if any(name.endswith(item) for name in inner)]
                # A target such as GPT-2's c_proj may name other layers too; then a pattern has to tell them apart.
                exact = inner == [name for name in modules if any(name.endswith(item) for item in named)]
                wanted = named if exact else f"(.*\\.)?({'|'.join(map(re.escape, wanted))})"
        return dataclasses.replace(self, feedforward_modules=wanted)

    def scales_input(self, module: str) -> bool:
        """Whether `module` is one of the feedforward_modules."""
        wanted = self.feedforward_modules or ()
        if isinstance(wanted, str):
            return re.fullmatch(wanted, module) is not None
        return any(module.endswith(item) for item in wanted)


def _ends(name: str, item: str) -> bool:
    return name == item or name.endswith("." + item)


class IA3Output(AdapterWeights):
    """l scales the output, bias included. Its shape in the file is (out, 1), for convolutions (1, out, 1, 1)."""

    reads_base: ClassVar[bool] = True

    def __init__(self, base: nn.Module, config: IA3Config) -> None:
        super().__init__()
        self.kind = layer_kind(base)
        _, n_out = _width(base)
        self.ia3_l = _vector((1, n_out, 1, 1) if self.kind == CONV2D else (n_out, 1), base, config)

    def delta(self, x: Tensor, y: Tensor, base: nn.Module, weight: float) -> Tensor:
        change = (self.ia3_l if self.kind == CONV2D else self.ia3_l.flatten()) - 1
        return y * (change * weight).to(y.dtype)

    def delta_weight(self, base: nn.Module) -> Tensor:
        weight, change = _weight(base), master(self.ia3_l).flatten() - 1
        return weight * (change if self.kind == CONV1D else change.reshape(-1, *[1] * (weight.dim() - 1)))

    def delta_bias(self, base: nn.Module) -> Tensor | None:
        bias = base._parameters.get("bias")
        return None if bias is None else master(bias) * (master(self.ia3_l).flatten() - 1)


class IA3Input(AdapterWeights):
    """l scales the input. Its shape in the file is (1, in), for convolutions (1, in, 1, 1)."""

    reads_base: ClassVar[bool] = True
    shifts_input: ClassVar[bool] = True

    def __init__(self, base: nn.Module, config: IA3Config) -> None:
        super().__init__()
        self.kind = layer_kind(base)
        n_in, _ = _width(base)
        self.ia3_l = _vector((1, n_in, 1, 1) if self.kind == CONV2D else (1, n_in), base, config)

    def shift_input(self, x: Tensor, weight: float) -> Tensor:
        change = (self.ia3_l if self.kind == CONV2D else self.ia3_l.flatten()) - 1
        return x * (change * weight).to(x.dtype)

    def delta(self, x: Tensor, y: Tensor, base: nn.Module, weight: float) -> None:
        return None

    def delta_weight(self, base: nn.Module) -> Tensor:
        weight, change = _weight(base), master(self.ia3_l).flatten() - 1
        if self.kind == CONV1D:
            return weight * change[:, None]
        if isinstance(base, nn.Conv2d):
            # A group's kernels see that group's channels only: W is (out, in / groups, kh, kw).
            change = change.reshape(base.groups, 1, -1).expand(-1, base.out_channels // base.groups, -1)
            return weight * change.reshape(base.out_channels, -1, 1, 1)
        return weight * change


def _weight(base: nn.Module) -> Tensor:
    assert isinstance(base.weight, Tensor)
    return master(base.weight)


def _width(base: nn.Module) -> tuple[int, int]:
    """(in, out) of a layer."""
    if isinstance(base, nn.Linear):
        # Not the weight's shape: 4-bit weights are packed.
        return base.in_features, base.out_features
    if isinstance(base, nn.Conv2d):
        return base.in_channels, base.out_channels
    n_in, n_out = _weight(base).shape
    return n_in, n_out


def _vector(shape: tuple[int, ...], base: nn.Module, config: IA3Config) -> nn.Parameter:
    assert isinstance(base.weight, Tensor)
    start = torch.ones if config.init_ia3_weights else torch.randn
    return nn.Parameter(start(*shape, device=base.weight.device, dtype=torch.float32))


def build(base: nn.Module, config: IA3Config, module: str) -> AdapterWeights:
    """IA3's vector for one base layer, on its device, in float32."""
    return IA3Input(base, config) if config.scales_input(module) else IA3Output(base, config)


SPEC = AdapterSpec(
    name="ia3",
    title="IA3",
    paper="https://arxiv.org/abs/2205.05638",
    config=IA3Config,
    build=build,
    layers=(LINEAR, CONV1D, CONV2D),
    mergeable=True,
    mixable=True,
    identity_at_start=True,
)
