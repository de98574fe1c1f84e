"""What a method wants done around training, for the one loop and for a person's own.

The hooks stand in the method's record (`engine.adapters.base.AdapterSpec`); methods without them cost nothing here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from engine.adapters import ADAPTERS
from engine.adapters.base import AdapterConfig, Attached
from engine.layers import AdapterLayer

if TYPE_CHECKING:
    from engine.model import PeftModel
    from engine.model_state import BaseModel


# What a config says about base, targets and further trained parts, and goes into the config of its plain LoRA.
_KEPT_BY_LORA = (
    "base_model_name_or_path",
    "revision",
    "task_type",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "bias",
)


def _hook(model: PeftModel | BaseModel, adapter: str, name: str) -> Any:
    return getattr(ADAPTERS[model.peft_config[adapter].method], name)


def attached(model: PeftModel | BaseModel, adapter: str) -> Attached:
    """The adapter's config and its weights at each layer."""
    layers = {
        layer.module_name: layer.adapters[adapter]
        for layer in model._layers[adapter]
        if isinstance(layer, AdapterLayer) and adapter in layer.adapters
    }
    return Attached(model.peft_config[adapter], layers)


def prepare_training(model: PeftModel, adapter: str = "default", total_steps: int | None = None) -> None:
    """Tell the method how long training will be; the loop calls it before the first step, or before it resumes.

    Args:
        total_steps: optimizer steps of the whole training; None where the config says it (AdaLoRA's `total_step`).

    Raises:
        ConfigError: the config's schedule does not fit into so many steps.
    """
    hook = _hook(model, adapter, "prepare_training")
    if hook:
        model.peft_config[adapter] = hook(attached(model, adapter), total_steps)


def extra_loss(model: PeftModel | BaseModel, adapter: str = "default") -> Tensor | None:
    """The method's own term of the loss, weighted; None where it has none."""
    hook = _hook(model, adapter, "extra_loss")
    found: Tensor | None = hook(attached(model, adapter)) if hook else None
    return found


def after_step(model: PeftModel | BaseModel, adapter: str, step: int) -> dict[str, int] | None:
    """What the method does after optimizer step `step` (from 1), with the gradients still there.

    Returns:
        Module name -> rank of every adapted layer if one of them changed, else None.
    """
    hook = _hook(model, adapter, "after_step")
    found: dict[str, int] | None = hook(attached(model, adapter), step) if hook else None
    return found


def saved_config(model: PeftModel, adapter: str) -> AdapterConfig:
    """The config that goes into the adapter's file."""
    hook = _hook(model, adapter, "saved_config")
    found: AdapterConfig = hook(attached(model, adapter)) if hook else model.peft_config[adapter].exported()
    return found


def as_lora(model: PeftModel, adapter: str) -> tuple[AdapterConfig, dict[str, dict[str, Tensor]]] | None:
    """The adapter's change as a plain LoRA: its config, and tensors by module and name; None if it has no such form."""
    from engine.adapters.lora import LoraConfig

    hook = _hook(model, adapter, "as_lora")
    if not hook:
        return None
    settings, tensors = hook(attached(model, adapter))
    config = model.peft_config[adapter]
    kept = {name: getattr(config, name) for name in _KEPT_BY_LORA if hasattr(config, name)}
    return LoraConfig(**kept, **settings), tensors
