"""What a `PeftModel` is made of, and how its parts are looked up and counted."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from engine import bnb, hooks
from engine.adapters import ADAPTERS
from engine.adapters.base import AdapterConfig, AdapterSpec, AdapterWeights, Switchboard
from engine.errors import ConfigError
from engine.inject import wrappers
from engine.kernels import packed
from engine.layers import AdapterLayer, Wrapper


def spec_of(config: AdapterConfig) -> AdapterSpec:
    """The registry's record for a config.

    Raises:
        ConfigError: the config belongs to no method of the registry.
    """
    method = str(getattr(config, "method", None))
    if method in ADAPTERS:
        return ADAPTERS[method]
    raise ConfigError(f"{type(config).__name__} belongs to no adapter method that is registered here.")


TUNER_CALLS = frozenset(
    {
        "active_adapter",
        "active_adapters",
        "add_weighted_adapter",
        "delete_adapter",
        "disable_adapter_layers",
        "enable_adapter_layers",
        "merge_adapter",
        "merge_and_unload",
        "set_adapter",
        "unload",
        "unmerge_adapter",
    }
)
"""What PEFT's scripts also call on `model.base_model`."""


class BaseModel(nn.Module):
    """Holds the model one level down, so that parameters carry PEFT's prefix `base_model.model.`.

    It sees the adapters of the `PeftModel` around it (the same dictionaries), for calls that PEFT puts here.
    """

    def __init__(self, model: nn.Module, around: ModelState) -> None:
        super().__init__()
        self.model = model
        self.peft_config, self._layers, self.switchboard = around.peft_config, around._layers, around.switchboard
        self.belong_to(around)

    def belong_to(self, around: ModelState) -> None:
        """Weakly: a cycle would keep the weights in memory until Python looks for cycles."""
        object.__setattr__(self, "_around", weakref.ref(around))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_around"}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def update_and_allocate(self, global_step: int) -> dict[str, int] | None:
        """For a loop of one's own, between `optimizer.step()` and `zero_grad()`: what a method does after a step.

        AdaLoRA divides its ranks anew, Delta-LoRA takes its snapshot; for other methods nothing happens.

        Args:
            global_step: optimizer steps taken, from 1.

        Returns:
            Module name -> rank of every adapted layer if one of them changed, else None.
        """
        changed: dict[str, int] = {}
        for name in self.switchboard.weights:
            if not self.peft_config[name].inference_mode:
                changed |= hooks.after_step(self, name, global_step) or {}
        return changed or None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "_around"):
                raise
        if name in TUNER_CALLS:
            around = self._around()
            if around is not None:
                return getattr(around, name)
        return getattr(self.model, name)


class ModelState(nn.Module):
    """A base model, its adapters' configs and layers, and the switchboard that they share.

    Attributes:
        base_model: the base, one level down.
        peft_config: adapter name -> its config.
        switchboard: which adapters contribute.
        shared: adapter name -> what its layers share, if anything.
        prompts: adapter name -> its virtual tokens, if that is what it is.
        merge_errors: module name -> what the last merge into quantised layers cost there.
    """

    base_model: BaseModel
    peft_config: dict[str, AdapterConfig]
    switchboard: Switchboard
    shared: nn.ModuleDict
    prompts: nn.ModuleDict
    merge_errors: dict[str, bnb.MergeError]
    _layers: dict[str, list[Wrapper]]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.base_model.belong_to(self)
        packed.arrived(self.get_base_model())

    def get_base_model(self) -> nn.Module:
        model: nn.Module = self.base_model.model
        return model

    @property
    def active_adapters(self) -> list[str]:
        return list(self.switchboard.weights)

    def _known(self, name: str) -> AdapterConfig:
        if name not in self.peft_config:
            raise ConfigError(
                f"There is no adapter {name!r}.", f"This model has: {', '.join(self.peft_config) or 'none'}."
            )
        return self.peft_config[name]

    def wrappers(self) -> Iterator[tuple[str, Wrapper]]:
        return wrappers(self.get_base_model())

    def adapter_parameters(self, adapter: str = "default") -> dict[str, nn.Parameter]:
        """What an adapter trains, by name: `<module>.lora_A.weight`, `<module>.bias`, `<saved module>.weight`."""
        found: dict[str, nn.Parameter] = {}
        for layer in self._layers[adapter]:
            if isinstance(layer, AdapterLayer):
                if adapter in layer.adapters:
                    weights = layer.adapters[adapter]
                    assert isinstance(weights, AdapterWeights)
                    for name, parameter in weights.named_parameters():
                        if name not in weights.frozen:
                            found[f"{layer.module_name}.{name}"] = parameter
                if adapter in layer.biases:
                    found[f"{layer.module_name}.bias"] = layer.biases[adapter]
            else:
                for name, parameter in layer.copies[adapter].named_parameters():
                    found[f"{layer.module_name}.{name}"] = parameter
        if adapter in self.prompts:
            found |= {f"prompt_encoder.{name}": p for name, p in self.prompts[adapter].named_parameters()}
        return found

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters; a packed 4-bit weight counts for the values it stands for.

        A bias that is trained in a copy counts once, as in PEFT, which trains the base's own.
        """
        trainable = total = 0
        for _, layer in self.wrappers():
            if isinstance(layer, AdapterLayer) and len(layer.biases):
                total -= layer.base_layer.bias.numel()  # type: ignore[operator]
        for parameter in self.parameters():
            count = parameter.numel()
            if type(parameter).__name__ in ("Params4bit", "PackedCodes"):
                count *= 2 * parameter.element_size()
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the base and its adapters; unlike transformers' count, with the scales of quantised layers."""
        return bnb.memory_footprint(self, return_buffers)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )
