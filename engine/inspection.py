"""What an adapter will cost, from the model's shapes alone (torch's meta device: no weights are read)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from engine.adapters import ADAPTERS
from engine.adapters.base import AdapterConfig, TaskType
from engine.checkpoint import exported_tensors
from engine.errors import ConfigError
from engine.joined import parts_of
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


def count(
    model: str, adapter: Mapping[str, Any], task: str = "causal_lm", options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Parameters of an adapter on a base, which has the head of `task`.

    `options` are the task's, as in a job: with `train_text_encoder` the text encoders and their adapters count too.

    Returns:
        `trainable`, `parameters` (base and adapter), `base` (without the adapter), `share` of the first two,
        `adapter_bytes` of the saved files (without their headers), and `targets`: the last part of the names -> how
        many modules.

    Raises:
        ConfigError, TargetError, ModelError: as training with these settings would.
    """
    from engine.models.loading import meta_model
    from engine.tasks import get_task
    from engine.tasks.base import Joining, Loaded

    chosen = get_task(task, options)
    config = adapter_config(adapter, chosen.task_type)
    base = meta_model(model, task=task)
    adapted = get_peft_model(base, config)
    whole: nn.Module = adapted
    if isinstance(chosen, Joining) and chosen.joins:
        from engine.models.pipelines import meta_pipeline

        whole = chosen.together(Loaded(base, meta_pipeline(model, base)), adapted)
    parts = list(parts_of(whole).values())
    trainable, total = (sum(numbers) for numbers in zip(*(p.get_nb_trainable_parameters() for p in parts), strict=True))
    own = sum(p.numel() for part in parts for p in part.adapter_parameters("default").values())
    layers = [layer for part in parts for layer in part._layers["default"] if isinstance(layer, AdapterLayer)]
    tensors = [tensor for part in parts for tensor in exported_tensors(part, "default").values()]
    return {
        "trainable": trainable,
        "parameters": total,
        "base": total - own,
        "share": trainable / total,
        "adapter_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "targets": dict(Counter(layer.module_name.rsplit(".", 1)[-1] for layer in layers)),
    }
