"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

A tensor's key is `base_model.model.<module>.<name>` without the adapter's name. Only safetensors is ever opened.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine import hooks
from engine.adapters import ADAPTERS
from engine.adapters.base import (
    CONV1D,
    EMBEDDING,
    LINEAR,
    AdapterConfig,
    AdapterWeights,
    PeftType,
    SharedState,
    features,
    filled_from_file,
    layer_kind,
)
from engine.adapters.virtual import EMBEDDINGS, VirtualTokens
from engine.errors import CheckpointError, ConfigError, EngineError, UnsafeFileError
from engine.inject import base_modules, unwrapped
from engine.layers import AdapterLayer, SavedModule, Wrapper
from engine.resized import embeddings_in, resized_embeddings

if TYPE_CHECKING:
    from engine.model import PeftModel

PREFIX = "base_model.model."
SHARED = "base_model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ENCODERS = ("text_encoder", "text_encoder_2")  # folders in that of a UNet's adapter: its parts for the text encoders
# What makes a prompt adapter's table while it is trained; PEFT's format has no place for it.
ENCODER, ENCODED = "prompt_encoder.safetensors", "prompt_encoder."
SAVED_EMBEDDINGS = ("embed_tokens", "lm_head")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def adapter_folder(model_id: str | Path, every: bool = False) -> Path:
    """The local folder of an adapter; a hub id is fetched first (its config and safetensors files only).

    `every` also fetches the adapters in folders below.

    Raises:
        CheckpointError: there is no such folder and the hub does not have it or does not answer.
    """
    folder = Path(model_id)
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(str(model_id)):
        raise CheckpointError(f"There is no adapter folder {str(model_id)!r}.", "Give a folder or a hub id owner/name.")
    from huggingface_hub import snapshot_download

    try:
        deep = "*" if every else ""
        return Path(
            snapshot_download(str(model_id), allow_patterns=[deep + name for name in (CONFIG, WEIGHTS, ENCODER)])
        )
    except Exception as error:  # the hub's client raises many kinds, each meaning "not to be had"
        raise CheckpointError(
            f"The adapter {str(model_id)!r} is not a local folder and could not be fetched from the hub: {error}",
            "Check the name and the connection.",
        ) from error


def read_config(model_id: str | Path) -> AdapterConfig:
    """The adapter's config, as the class of its method.

    Raises:
        CheckpointError: the file is missing, is not JSON, or names a method that is not here.
        ConfigError: it asks for something that the method does not do.
    """
    path = adapter_folder(model_id) / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} holds no {CONFIG}, so it is not an adapter.", "Give the folder that save_pretrained wrote."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    kind = raw.get("peft_type") if isinstance(raw, dict) else None
    for spec in ADAPTERS.values():
        if spec.config.PEFT_TYPE.value == kind:
            return spec.config.from_dict(raw)
    raise CheckpointError(
        f"{path} has peft_type {kind!r}, which is not a method of this version.",
        f"Methods here: {', '.join(dict.fromkeys(spec.config.PEFT_TYPE.value for spec in ADAPTERS.values()))}.",
    )


def read_weights(model_id: str | Path) -> dict[str, Tensor]:
    """Key -> tensor of the adapter's safetensors file, on the CPU; a prompt encoder's keys are `prompt_encoder.<name>`.

    Raises:
        UnsafeFileError: there is only a pickle, which could run code.
        CheckpointError: the file is missing or damaged.
    """
    folder = adapter_folder(model_id)
    path = folder / WEIGHTS
    if not path.is_file():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            raise UnsafeFileError(
                f"{folder} holds the adapter as a pickle only, which could run code when opened.",
                f"Load it where you trust it and save it with safe_serialization=True as {WEIGHTS}.",
            )
        raise CheckpointError(f"{folder} holds no {WEIGHTS}.", "Give the folder that save_pretrained wrote.")
    tensors = _tensors_of(path)
    if (folder / ENCODER).is_file():
        tensors |= {ENCODED + name: tensor for name, tensor in _tensors_of(folder / ENCODER).items()}
    return tensors


def _tensors_of(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", "Copy it again, or train the adapter again.") from error


def adapter_state(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """The adapter's tensors under their keys in the file."""
    return {
        key: tensor.detach().to("cpu").contiguous() for key, tensor in exported_tensors(model, adapter_name).items()
    }


def exported_tensors(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """Key in the file -> the adapter's tensor, where it lies."""
    state: dict[str, Tensor] = {}
    prefix = _prefix(model, adapter_name)
    for layer in model._layers[adapter_name]:
        for name, tensor in _tensors(layer, adapter_name).items():
            state[f"{prefix}{layer.module_name}.{name}"] = tensor
    if adapter_name in model.prompts:
        state[EMBEDDINGS] = _prompt(model, adapter_name).export()
    if adapter_name in model.shared:
        state |= {f"{SHARED}{name}": tensor for name, tensor in _shared(model, adapter_name).export().items()}
    return state


def _prefix(model: PeftModel, adapter: str) -> str:
    """PEFT wraps the base once less for prompt methods, so saved modules' keys lack a `model.`."""
    return SHARED if adapter in model.prompts else PREFIX


def _prompt(model: PeftModel, adapter: str) -> VirtualTokens:
    prompt = model.prompts[adapter]
    assert isinstance(prompt, VirtualTokens)
    return prompt


def _shared(model: PeftModel, adapter: str) -> SharedState:
    shared = model.shared[adapter]
    assert isinstance(shared, SharedState)
    return shared


def _tensors(layer: Wrapper, adapter: str) -> dict[str, Tensor]:
    if isinstance(layer, SavedModule):
        return dict(layer.copies[adapter].state_dict())
    found: dict[str, Tensor] = {}
    if adapter in layer.adapters:
        found.update(_weights(layer, adapter).export())
        if layer_kind(layer.base_layer) == EMBEDDING and layer.module_name.rpartition(".")[2] in SAVED_EMBEDDINGS:
            # PEFT saves the own weight of a targeted embedding of this name, and looks for it.
            found["base_layer.weight"] = _own_weight(layer)
    if adapter in layer.biases:
        found[_bias_key(layer, adapter)] = layer.biases[adapter]
    return found


def _bias_key(layer: AdapterLayer, adapter: str) -> str:
    return "base_layer.bias" if adapter in layer.adapters else "bias"


def save_adapter(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> Path:
    """Write one adapter; each file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = adapter_state(model, adapter_name)
    resized = resized_embeddings(model, adapter_name, _prefix(model, adapter_name))
    state |= {key: tensor.detach().to("cpu").contiguous() for key, tensor in resized.items()}
    # Two keys over one memory (tied modules) would be refused by safetensors.
    state = {key: tensor.clone() for key, tensor in state.items()}
    encoder = _prompt(model, adapter_name).sidecar() if adapter_name in model.prompts else {}
    if encoder:
        write_safetensors(folder / ENCODER, {n: t.detach().to("cpu").contiguous() for n, t in encoder.items()})
    else:
        (folder / ENCODER).unlink(missing_ok=True)
    return _write(folder, state, hooks.saved_config(model, adapter_name))


def _write(folder: Path, state: Mapping[str, Tensor], config: AdapterConfig) -> Path:
    plain = config.replace(inference_mode=True).to_dict()
    write_safetensors(folder / WEIGHTS, state)
    write_text(folder / CONFIG, json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return folder


def save_as_lora(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> Path:
    """Write an adapter whose change is one of low rank as a plain LoRA, which any tool for LoRA loads.

    Raises:
        ConfigError: the adapter's method cannot be written so.
    """
    config = model._known(adapter_name)
    found = hooks.as_lora(model, adapter_name)
    if found is None and config.peft_type is PeftType.LORA:
        return save_adapter(model, folder, adapter_name)
    if found is None:
        able = [spec.title for spec in ADAPTERS.values() if spec.as_lora or spec.config.PEFT_TYPE is PeftType.LORA]
        raise ConfigError(
            f"{adapter_name!r} is a {ADAPTERS[config.method].title} adapter, which is not written as a plain LoRA.",
            f"Methods that are: {', '.join(able)}. Or merge it (merge_and_unload) and save the model.",
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plain, layers = found
    state: dict[str, Tensor] = {}
    for layer in model._layers[adapter_name]:
        named = _tensors(layer, adapter_name)
        if isinstance(layer, AdapterLayer) and adapter_name in layer.adapters:
            bias = _bias_key(layer, adapter_name)
            named = layers[layer.module_name] | ({bias: named[bias]} if bias in named else {})
        for name, tensor in named.items():
            state[f"{PREFIX}{layer.module_name}.{name}"] = tensor.detach().to("cpu").contiguous().clone()
    return _write(folder, state, plain)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    place = draft(path)
    save_file(dict(tensors), place, metadata=metadata or {"format": "pt"})
    publish(place, path)


def write_text(path: Path, text: str) -> None:
    place = draft(path)
    place.write_text(text, encoding="utf-8")
    publish(place, path)


def draft(path: Path) -> Path:
    """An empty file beside `path` to write into, for `publish`."""
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(number)
    return Path(name)


def publish(place: Path, path: Path) -> None:
    """A draft on the disk first, then under its name: a crash in between leaves the former file."""
    with open(place, "rb+") as handle:
        os.fsync(handle.fileno())
    # mkstemp makes files for the owner alone; an adapter is to be readable like any other file of the person's.
    mask = os.umask(0)
    os.umask(mask)
    place.chmod(0o666 & ~mask)
    place.replace(path)


@torch.no_grad()
def write_weights(model: PeftModel, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy a file's tensors into an attached adapter.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape; nothing has been changed then.
    """
    places: dict[str, Tensor] = {}
    kept: dict[str, AdapterLayer] = {}
    for layer in model._layers[adapter_name]:
        start = f"{_prefix(model, adapter_name)}{layer.module_name}."
        if isinstance(layer, SavedModule):
            places |= {start + name: tensor for name, tensor in layer.copies[adapter_name].state_dict().items()}
            continue
        if adapter_name in layer.adapters:
            places |= {start + name: p for name, p in _weights(layer, adapter_name).slots().items()}
            # PEFT also brings an output layer's weight where one is targeted.
            if layer_kind(layer.base_layer) == EMBEDDING or f"{start}base_layer.weight" in tensors:
                kept[f"{start}base_layer.weight"] = layer
        if adapter_name in layer.biases:
            places[start + _bias_key(layer, adapter_name)] = layer.biases[adapter_name]
    if adapter_name in model.shared:
        # A file may bring what its config says can be made again; then it counts.
        needed = _shared(model, adapter_name).export()
        for name, place in model.shared[adapter_name].named_buffers():
            if name in needed or SHARED + name in tensors:
                places[SHARED + name] = place
    if adapter_name in model.prompts:
        places[EMBEDDINGS] = torch.empty(_prompt(model, adapter_name).shape, device="meta")
    resized = embeddings_in(model.get_base_model(), tensors, _prefix(model, adapter_name))
    resized = {key: place for key, place in resized.items() if key not in places}
    encoder = {k.removeprefix(ENCODED): t for k, t in tensors.items() if k.startswith(ENCODED) and EMBEDDINGS in places}
    missing = [key for key in places if key not in tensors]
    extra = [key for key in tensors if key not in {*places, *kept, *resized} and not (encoder and ENCODED in key)]
    if missing or extra:
        raise _other_base(model, adapter_name, missing, extra)
    for key, place in places.items():
        if tensors[key].shape != place.shape:
            raise CheckpointError(
                f"{key} has shape {tuple(tensors[key].shape)} in the file and {tuple(place.shape)} in the model.",
                f"{_origin(model, adapter_name)} Or check r.",
            )
    for key, layer in kept.items():
        _check_embedding(key, _own_weight(layer), tensors.get(key))
    if EMBEDDINGS in places:
        del places[EMBEDDINGS]
        _write_prompt(model, adapter_name, tensors[EMBEDDINGS], encoder)
    for key, place in (places | resized).items():
        place.copy_(tensors[key])
    _restored(model, adapter_name)


def _restored(model: PeftModel, adapter: str) -> None:
    for layer in model._layers[adapter]:
        if isinstance(layer, AdapterLayer) and adapter in layer.adapters:
            _weights(layer, adapter).restored()


def _weights(layer: AdapterLayer, adapter: str) -> AdapterWeights:
    weights = layer.adapters[adapter]
    assert isinstance(weights, AdapterWeights)
    return weights


def _write_prompt(model: PeftModel, adapter: str, table: Tensor, encoder: Mapping[str, Tensor]) -> None:
    trained = any(parameter.requires_grad for parameter in model.prompts[adapter].parameters())
    if not _prompt(model, adapter).restore(table, encoder):
        warnings.warn(
            f"{ENCODER} beside the adapter {adapter!r} makes other virtual tokens than the adapter holds; it is left "
            "out, and training would go on with the tokens themselves.",
            stacklevel=2,
        )
    # Its parameters may be new ones.
    model._trainable(adapter, trained)


def _own_weight(layer: AdapterLayer) -> Tensor:
    """The base layer's weight without what is merged into it."""
    weight: Tensor = layer._before.get("weight", layer.base_layer.weight)  # type: ignore[arg-type]
    return weight


def _check_embedding(key: str, weight: Tensor, saved: Tensor | None) -> None:
    """A file may bring the base's own embedding (PEFT saves it): it has to be this base's, for it is shared by all."""
    if saved is None:
        return
    if saved.shape != weight.shape:
        raise CheckpointError(
            f"{key} has shape {tuple(saved.shape)} in the file and {tuple(weight.shape)} in the model.",
            "The vocabulary was resized before training: resize the base's embeddings to the same size first.",
        )
    here = weight.detach().to("cpu")
    if not (torch.equal(saved.to(here.dtype), here) or torch.equal(saved, here.to(saved.dtype))):
        raise CheckpointError(
            f"{key}: the adapter was trained over another base embedding than this model's.",
            "Load the base that it was trained on; the embedding belongs to the base, which adapters never change.",
        )


def _origin(model: PeftModel, adapter_name: str) -> str:
    """What to do about another base than the adapter's."""
    name = model.peft_config[adapter_name].base_model_name_or_path
    if name:
        return f"The adapter was made for {name!r}; load that base."
    return (
        f"Its {CONFIG} does not name the base that it was made for: load the one that it was trained on, with layers "
        "of these names and shapes."
    )


def _other_base(model: PeftModel, adapter: str, missing: list[str], extra: list[str]) -> CheckpointError:
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors that the model needs are not in the file (first: {missing[0]})")
    if extra:
        parts.append(f"{len(extra)} tensors of the file have no place in the model (first: {extra[0]})")
    return CheckpointError(
        f"The adapter does not fit this model: {'; '.join(parts)}.",
        _origin(model, adapter),
    )


def as_trained(base: nn.Module, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> AdapterConfig:
    """The config of what a file holds over this base.

    PEFT pools inputs for `use_qalora` at GPTQ layers alone; over any other base it trains a plain LoRA and writes
    `use_qalora` all the same. A's width tells.
    """
    if config.peft_type is not PeftType.LORA or not getattr(config, "use_qalora", False):
        return config
    layers = {name: unwrapped(module) for name, module in base_modules(base)}
    for key, tensor in tensors.items():
        layer = layers.get(key.removeprefix(PREFIX).removesuffix(".lora_A.weight"))
        whole = layer is not None and layer_kind(layer) in (LINEAR, CONV1D) and features(layer)[0] == tensor.shape[-1]
        if key.endswith(".lora_A.weight") and whole:
            return config.replace(use_qalora=False)
    return config


def load_adapter(model: PeftModel, model_id: str | Path, adapter_name: str, is_trainable: bool = False) -> None:
    """Attach an adapter from a folder or hub id under a name; on any error the model is as before."""
    config, tensors = read_config(model_id), read_weights(model_id)
    config = as_trained(model.get_base_model(), config, tensors)
    # Frozen until the file's tensors are in: no start is drawn (or a tokenizer fetched for it) only to be replaced.
    with filled_from_file():
        model.add_adapter(adapter_name, config.replace(inference_mode=True))
    try:
        write_weights(model, adapter_name, tensors)
        model.peft_config[adapter_name] = model.peft_config[adapter_name].replace(inference_mode=not is_trainable)
    except CheckpointError:
        active = dict(model.switchboard.weights)
        model.delete_adapter(adapter_name)
        model.switchboard.weights = active
        raise


def saved_adapters(model_id: str | Path, base: nn.Module) -> dict[str, Path]:
    """Name -> folder of every adapter that one `save_pretrained` wrote: `default` lies in the folder itself.

    Where `base` is a UNet, what lies beside its adapter in `text_encoder` is a part of that adapter, for another model.

    Raises:
        CheckpointError: there is none.
    """
    folder = adapter_folder(model_id, every=True)
    found = {"default": folder} if (folder / CONFIG).is_file() else {}
    others = ENCODERS if found and hasattr(base, "down_blocks") else ()
    for path in sorted(folder.iterdir()):
        if (path / CONFIG).is_file() and path.name not in others:
            if path.name in found:
                raise CheckpointError(f"{folder} holds an adapter 'default' itself and one in {path.name}.")
            found[path.name] = path
    if not found:
        raise CheckpointError(
            f"{folder} holds no {CONFIG}, and neither do the folders in it, so there is no adapter to load.",
            "Give the folder that save_pretrained wrote.",
        )
    return found


def load_adapters(model: PeftModel, folders: Mapping[str, Path], is_trainable: bool = False) -> None:
    """Attach adapters (name -> folder); on any error the model is as before."""
    active, before = dict(model.switchboard.weights), set(model.peft_config)
    try:
        for name, folder in folders.items():
            load_adapter(model, folder, name, is_trainable)
    except EngineError:
        for name in set(model.peft_config) - before:
            model.delete_adapter(name)
        model.switchboard.weights = active
        raise


def _raw(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """What `raw_state` copies, where it lies."""
    found: dict[str, Tensor] = {}
    for layer in model._layers[adapter_name]:
        if isinstance(layer, SavedModule):
            parts: dict[str, Any] = dict(layer.copies[adapter_name].state_dict())
        else:
            parts = dict(layer.adapters[adapter_name].state_dict()) if adapter_name in layer.adapters else {}
            if adapter_name in layer.biases:
                parts["own_bias"] = layer.biases[adapter_name]
        found |= {f"{layer.module_name}.{name}": tensor for name, tensor in parts.items()}
    if adapter_name in model.shared:
        found |= {SHARED + name: tensor for name, tensor in model.shared[adapter_name].named_buffers()}
    if adapter_name in model.prompts:
        found |= {ENCODED + name: tensor for name, tensor in model.prompts[adapter_name].state_dict().items()}
    return found


def raw_state(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """What resuming needs: the parameters as they are trained, and the frozen buffers beside them."""
    return {name: tensor.detach().to("cpu").clone() for name, tensor in _raw(model, adapter_name).items()}


@torch.no_grad()
def restore_raw_state(model: PeftModel, adapter_name: str, state: Mapping[str, Tensor]) -> None:
    """The inverse of `raw_state`.

    Raises:
        CheckpointError: the checkpoint holds other tensors than this adapter.
    """
    own = _raw(model, adapter_name)
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())
        raise CheckpointError(
            f"The checkpoint does not belong to this adapter: {len(odd)} tensors differ (first: {odd[0]}).",
            "Resume with the job that wrote it.",
        )
    for name, tensor in own.items():
        tensor.copy_(state[name])
    _restored(model, adapter_name)
