"""A base in full precision beside a quantised one, and adapters carried over to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from engine import bnb, hooks
from engine.errors import ConfigError, ModelError, TargetError

if TYPE_CHECKING:
    from engine.merging import Merging
    from engine.model import PeftModel


def full_base(model: nn.Module) -> nn.Module:
    """The model that `model` was loaded from, anew and not quantised, in evaluation mode on its device.

    It comes in the type of the weights that are not in codes, so that both compute alike.

    Raises:
        ModelError: it does not say where it came from, or cannot be loaded from there.
    """
    from engine.models.fetch import resolve
    from engine.models.loading import quiet

    name = getattr(model, "name_or_path", None)
    if not name:
        raise ModelError(
            f"This {type(model).__name__} does not say where it was loaded from.",
            "Load the base in full precision and hand it over: merge_into_full(base).",
        )
    device = next(model.parameters()).device
    own = next(p.dtype for name, p in model.named_parameters() if p.is_floating_point() and ".adapters." not in name)
    loader: Any = type(model)
    with quiet():
        try:
            fresh: nn.Module = loader.from_pretrained(
                resolve(name), dtype=own, use_safetensors=True, local_files_only=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"{name} cannot be loaded in full precision: {error}.", "Hand the base over.") from error
    fresh.name_or_path = fresh.config.name_or_path = name  # type: ignore[union-attr]
    return fresh.to(device).eval()


def transplanted(model: Merging, base: nn.Module, names: Sequence[str]) -> PeftModel:
    """Another base of the same shape with copies of these adapters, active with the same weights.

    Raises:
        TargetError: `base` is quantised.
        ConfigError: no adapter is named.
    """
    from engine.checkpoint import adapter_state, write_weights
    from engine.model import model_class

    if next(bnb.packed_layers(base), None) is not None:
        raise TargetError(
            f"The base to merge into is quantised itself ({type(base).__name__}).",
            "Load it with quantization: none.",
        )
    source: Any = model
    twin: PeftModel | None = None
    for name in names:
        source._known(name)
        settings = hooks.saved_config(source, name).replace(inference_mode=True)
        if twin is None:
            twin = model_class(settings)(base, settings, name)
        else:
            twin.add_adapter(name, settings)
        write_weights(twin, name, adapter_state(source, name))
    if twin is None:
        raise ConfigError("No adapter is active, so there is nothing to merge.", "Call set_adapter first.")
    twin.set_adapter_weights({name: source.switchboard.weights.get(name, 1.0) for name in names})
    return twin
