"""What attaching an adapter needs besides its weights: modules trained in full, and biases of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from engine import prompts
from engine.adapters.base import CONV1D, AdapterConfig, Switchboard, layer_kind
from engine.errors import ConfigError, TargetError
from engine.inject import HEADS, base_modules, module_at, unwrapped, wrap
from engine.layers import AdapterLayer, SavedModule, Wrapper
from engine.model_state import ModelState, spec_of
from engine.rows import Row


def refuse_both(model: nn.Module, targets: Sequence[str], saved: Sequence[str]) -> None:
    """A module is adapted or trained in full, not both, whichever adapter asks."""
    twice = [name for name in targets if name in saved or isinstance(module_at(model, name), SavedModule)]
    twice += [name for name in saved if isinstance(module_at(model, name), AdapterLayer)]
    if twice:
        raise TargetError(
            f"{', '.join(dict.fromkeys(twice))}: asked for both as a target and in modules_to_save.",
            "Take it out of one of the two.",
        )


def saved_names(model: nn.Module, config: Any) -> list[str]:
    """Modules trained in full: those asked for, and the head of a classifier, which starts at random."""
    asked = list(getattr(config, "modules_to_save", None) or ())
    heads = HEADS.get(config.task_type, ())
    wanted = [*asked, *heads]
    every = [name for name, _ in base_modules(model)]
    # PEFT's rule: a name's ending, wherever it begins, so that `classifier` is DistilBERT's `pre_classifier` too.
    ending = [name for name in every if any(name.endswith(item) for item in wanted)]
    found = [name for name in ending if not any(name.startswith(f"{outer}.") for outer in ending)]
    for name in found:
        if not all(parameter.is_floating_point() for parameter in unwrapped(module_at(model, name)).parameters()):
            raise TargetError(
                f"modules_to_save names {name}, which is quantised and cannot be trained in full.",
                "Adapt it as a target instead, or load it in full precision.",
            )
    for item in asked:
        # PEFT writes every name that a head can have into its files.
        if item not in heads and not any(name.endswith(item) for name in found):
            raise TargetError(
                f"modules_to_save names {item!r}, which {type(model).__name__} does not have.",
                f"Its direct parts are: {', '.join(n for n, _ in model.named_children())}.",
            )
    return found


def oriented(model: nn.Module, config: AdapterConfig, targets: Sequence[str]) -> AdapterConfig:
    """The config with `fan_in_fan_out` as the layers have it, which is what PEFT's files say."""
    if not targets or not hasattr(config, "fan_in_fan_out"):
        return config
    kinds = {layer_kind(unwrapped(module_at(model, name))) for name in targets}
    return config.replace(fan_in_fan_out=CONV1D in kinds)


def check_weights(model: ModelState, weights: Mapping[str, float]) -> None:
    """Whether a live mix can have these weights.

    Raises:
        ConfigError: they are no finite numbers by adapters' names, or one of the adapters cannot be mixed.
    """
    if not isinstance(weights, Mapping):
        raise ConfigError(
            f"The weights are {weights!r}; needed: a mapping of adapters' names to numbers.",
            "Write set_adapter_weights({'one': 0.7, 'two': 0.3}), or set_adapter([...]) for weights of 1.",
        )
    for name, value in weights.items():
        spec = spec_of(model._known(name))
        if spec.prompt is not None:
            prompts.check_weight(name, spec.title, value)
        elif not spec.mixable and len(weights) > 1:
            raise ConfigError(f"{name!r} is a {spec.title} adapter, which cannot be mixed with others.")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"The weight of {name!r} is {value!r}; needed: a finite number.")


def check_row(model: ModelState, row: Row) -> None:
    """Whether a row of a batch can have this adapter or mix.

    Raises:
        ConfigError: an adapter is not attached, or see `check_weights`.
    """
    if isinstance(row, str) and row != "__base__":
        model._known(row)
    elif row is not None and not isinstance(row, str):
        check_weights(model, row)


def own_biases(
    model: nn.Module, switchboard: Switchboard, adapter: str, config: Any, targets: Sequence[str]
) -> list[Wrapper]:
    """A trainable copy of the base biases, so that training them leaves the base as it was."""
    mode = getattr(config, "bias", "none")
    if mode == "none":
        return []
    names = [name for name, _ in base_modules(model)] if mode == "all" else list(targets)
    added: list[Wrapper] = []
    for name in names:
        module = module_at(model, name)
        bias = unwrapped(module)._parameters.get("bias")
        if bias is None or isinstance(module, SavedModule):
            continue
        layer = wrap(model, name, switchboard)
        layer.biases[adapter] = nn.Parameter(bias.detach().float().clone())
        if name not in targets:
            added.append(layer)
    return added
