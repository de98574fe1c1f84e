"""Changing an adapter's rank between two stages of training."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from engine.adapters.lora import LoraConfig
from engine.adapters.lowrank import LowRankLinear
from engine.errors import ConfigError
from engine.inject import AdapterLayer
from engine.model import PeftModel, spec_of


@torch.no_grad()
def expand_lora_rank(
    model: PeftModel,
    config: LoraConfig,
    adapter_name: str = "default",
    optimizer: torch.optim.Optimizer | None = None,
) -> PeftModel:
    """Raise a LoRA adapter's rank without changing what it computes.

    With scale s before and s' after: A' = [A; A_new] and B' = [B s/s', 0], so that s' B' A' = s B A. The new rows of A
    start Kaiming-uniform, the new columns of B at zero (both at zero would never get a gradient).

    Args:
        model: the model with the adapter.
        config: gives the new `r`, `lora_alpha`, `use_rslora`, `rank_pattern` and `alpha_pattern`; all else stays.
        adapter_name: the adapter to expand.
        optimizer: its moments are carried over: zeros for the new entries, and B's scaled as its gradient is.

    Raises:
        ConfigError: the new rank is smaller, the adapter is not LoRA on linear layers, or is merged.
    """
    before = model._known(adapter_name)
    if not isinstance(before, LoraConfig) or not isinstance(config, LoraConfig) or before.method != "lora":
        raise ConfigError(f"expand_lora_rank serves LoRA adapters; {adapter_name!r} is {spec_of(before).title}.")
    names = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    after = dataclasses.replace(before, **{name: getattr(config, name) for name in names})
    layers = [layer for layer in model._layers[adapter_name] if isinstance(layer, AdapterLayer)]
    for layer in layers:
        if adapter_name not in layer.adapters:
            continue
        if not isinstance(layer.adapters[adapter_name], LowRankLinear) or adapter_name in layer.merged:
            raise ConfigError(f"{layer.module_name} cannot be expanded: it is merged, or not a linear layer.")
        if after.rank_of(layer.module_name) < before.rank_of(layer.module_name):
            raise ConfigError(
                f"r is {after.rank_of(layer.module_name)} at {layer.module_name}, where it was "
                f"{before.rank_of(layer.module_name)}; needed: at least as much."
            )
    for layer in layers:
        if adapter_name in layer.adapters:
            _expand(layer, after, adapter_name, optimizer)
    model.peft_config[adapter_name] = after
    return model


def _expand(layer: AdapterLayer, after: LoraConfig, adapter: str, optimizer: torch.optim.Optimizer | None) -> None:
    old: Any = layer.adapters[adapter]
    plain = dataclasses.replace(after, init_lora_weights=True)
    new = LowRankLinear(layer.base_layer, plain, layer.module_name)
    r, ratio = old.r, old.scale / new.scale
    new.lora_A.weight[:r] = old.lora_A.weight
    new.lora_B.weight[:, :r] = old.lora_B.weight * ratio
    pairs: list[tuple[Any, Any, float]] = [
        (old.lora_A.weight, new.lora_A.weight, 1.0),
        (old.lora_B.weight, new.lora_B.weight, 1 / ratio),
    ]
    if old.offset_A is not None:
        # Rows and columns of zeros change nothing, and make the exported rank 2 r, as the exported config says.
        more = new.r - old.offset_A.shape[0]
        new.offset_A = nn.functional.pad(old.offset_A, (0, 0, 0, more))
        new.offset_B = nn.functional.pad(old.offset_B * ratio, (0, more))
    if old.lora_B.bias is not None:
        new.lora_B.bias.copy_(old.lora_B.bias * ratio)
        pairs.append((old.lora_B.bias, new.lora_B.bias, 1 / ratio))
    for before, now, gradient in pairs:
        now.requires_grad_(before.requires_grad)
        if optimizer is not None:
            _carry_over(optimizer, before, now, gradient)
    new.train(old.training)
    layer.adapters[adapter] = new


def _carry_over(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, gradient: float) -> None:
    """Put `new` in the place of `old`; a first moment scales with the gradient, a second one with its square."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if not state:
        return
    moved: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == old.shape:
            grown = torch.zeros_like(new, dtype=value.dtype)
            grown[tuple(slice(0, n) for n in value.shape)] = value * (gradient**2 if "sq" in name else gradient)
            value = grown
        moved[name] = value
    optimizer.state[new] = moved
