"""What an adapter will cost, from the model's shapes alone (torch's meta device: no weights are read)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from engine.adapters import ADAPTERS
from engine.adapters.base import AdapterConfig, TaskType
from engine.checkpoint import exported_tensors
from engine.errors import ConfigError
from engine.layers import AdapterLayer
from engine.model import get_peft_model


def adapter_config(adapter: Mapping[str, Any], task_type: TaskType | None, base: str | None = None) -> AdapterConfig:
    """A job's `adapter` section as the method's config.

    Raises:
        ConfigError: an unknown method or field, or values that cannot work.
    """
    from dataclasses import fields

    spec = ADAPTERS[str(adapter.get("method"))]
    known = {item.name for item in fields(spec.config)}
    wrong = [key for key in adapter if key != "method" and key not in known]
    if wrong:
        raise ConfigError(
            f"{spec.title} has no field {', '.join(map(repr, wrong))}.", f"Its fields: {', '.join(sorted(known))}."
        )
    values = {key: value for key, value in adapter.items() if key != "method"}
    try:
        config = spec.config(**{"task_type": task_type, "base_model_name_or_path": base, **values})
    except TypeError as error:
        raise ConfigError(f"The adapter's fields have wrong types: {error}.") from error
    return config


def count(model: str, adapter: Mapping[str, Any], task: str = "causal_lm") -> dict[str, Any]:
    """Parameters of an adapter on a base, which has the head of `task`.

    Returns:
        `trainable`, `parameters` (base and adapter), `base` (without the adapter), `share` of the first two,
        `adapter_bytes` of the saved file (without its header), and `targets`: the last part of the names -> how many
        modules.

    Raises:
        ConfigError, TargetError, ModelError: as training with these settings would.
    """
    from engine.models.loading import meta_model
    from engine.tasks import get_task

    config = adapter_config(adapter, get_task(task).task_type)
    peft_model = get_peft_model(meta_model(model, task=task), config)
    trainable, total = peft_model.get_nb_trainable_parameters()
    layers = [layer for layer in peft_model._layers["default"] if isinstance(layer, AdapterLayer)]
    tensors = exported_tensors(peft_model, "default").values()
    return {
        "trainable": trainable,
        "parameters": total,
        "base": total - sum(p.numel() for p in peft_model.adapter_parameters("default").values()),
        "share": trainable / total,
        "adapter_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "targets": dict(Counter(layer.module_name.rsplit(".", 1)[-1] for layer in layers)),
    }
