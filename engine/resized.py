"""A base whose vocabulary was resized: what of it an adapter's file has to hold.

The rows of new tokens are in no published base, so an adapter that was trained over them is nothing without them. PEFT
writes the input and the output embedding then, under their own names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from engine.errors import CheckpointError
from engine.inject import base_modules, unwrapped
from engine.layers import AdapterLayer, SavedModule

if TYPE_CHECKING:
    from engine.model import PeftModel


def resized_embeddings(model: PeftModel, adapter: str, prefix: str) -> dict[str, Tensor]:
    """Key in the file -> weight of the base's embeddings, where their vocabulary is not that of the base's own config.

    Args:
        model: the model with the adapter.
        adapter: its config names the base.
        prefix: what stands before a module's name in the file.
    """
    base: Any = model.get_base_model()
    name = model.peft_config[adapter].base_model_name_or_path
    if not _was_resized(base, name):
        return {}
    found: dict[str, Tensor] = {}
    for find in (base.get_input_embeddings, base.get_output_embeddings):
        end = find()
        wanted = unwrapped(end) if isinstance(end, nn.Module) else None
        path, module = next(((p, m) for p, m in base_modules(base) if unwrapped(m) is wanted), ("", None))
        # A module that the adapter trains in full is in its file anyway.
        if isinstance(module, SavedModule) and adapter in module.copies:
            continue
        if isinstance(module, AdapterLayer):
            own = "base_layer." if adapter in module.adapters else ""
            found[f"{prefix}{path}.{own}weight"] = module._before.get("weight", module.base_layer.weight)  # type: ignore[arg-type]
        elif module is not None:
            found[f"{prefix}{path}.weight"] = unwrapped(module).weight  # type: ignore[assignment]
    return found


def _was_resized(base: Any, name: str | None) -> bool:
    """Whether the base has another vocabulary than its config on this machine; False where there is none to ask."""
    here = _vocabulary(getattr(base, "config", None))
    place = _config_file(name) if name and here else None
    if place is None or not hasattr(base, "get_output_embeddings"):
        return False
    try:
        origin = type(base.config).from_dict(json.loads(place.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return False
    there = _vocabulary(origin)
    return there is not None and there != here


def _vocabulary(config: Any) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None


def _config_file(name: str) -> Path | None:
    """The `config.json` of a local folder, a built-in model, or a hub id in the cache; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from engine.models.catalogue import BUILTIN

    folder = BUILTIN[name].config_folder if name in BUILTIN else Path(name)
    if (folder / "config.json").is_file():
        return folder / "config.json"
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def embeddings_in(model: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Key in the file -> the weight of the base's input or output embedding that it is for.

    Args:
        model: the base.
        tensors: what the file holds.
        prefix: what stands before a module's name in the file.

    Raises:
        CheckpointError: the vocabulary of the file is of another size than the base's.
    """
    found: dict[str, Tensor] = {}
    ends = {id(unwrapped(module)) for module in _ends(model)}
    for name, module in base_modules(model):
        key = f"{prefix}{name}.weight"
        if key not in tensors or isinstance(module, SavedModule) or id(unwrapped(module)) not in ends:
            continue
        weight = unwrapped(module).weight
        assert isinstance(weight, Tensor)
        rows, width = weight.shape
        if tensors[key].shape != weight.shape:
            asked = tuple(tensors[key].shape)
            hint = "Load the base that the adapter was trained on."
            if len(asked) == 2 and asked[1] == width:
                hint = f"Call model.resize_token_embeddings({asked[0]}) on the base before loading the adapter."
            raise CheckpointError(f"{key} has shape {asked} in the file and {(rows, width)} in the base.", hint)
        if weight.is_floating_point():
            found[key] = weight
    return found


def _ends(model: nn.Module) -> list[nn.Module]:
    """The input and output embeddings, where the model says which they are."""
    ends = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        find = getattr(model, name, None)
        try:
            end = find() if find else None
        except NotImplementedError:  # transformers' answer for models without one (vision towers)
            end = None
        if isinstance(end, nn.Module):
            ends.append(end)
    return ends
