"""diffusers' formats of Stable Diffusion adapters.

    unet.<layer>.lora_A.weight, .lora_B.weight, .lora_magnitude_vector       also .lora.down.weight, .lora.up.weight
    text_encoder.<layer>.lora_linear_layer.down.weight, .up.weight           also .lora_A.weight, .lora_B.weight
    unet.<layer>.lokr_w1, ...                                                as PEFT names them

Without alphas in the file or its header the scale is 1 (alpha = rank). The oldest files, with attention processors
(`...attn1.processor.to_q_lora.down.weight`, the UNet without a prefix), are read too.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.adapters.base import AdapterConfig
from engine.adapters.lowrank import LowRankConfig
from engine.checkpoint import write_safetensors
from engine.errors import CheckpointError, ConfigError
from engine.formats.names import CLIP_PREFIX, Names
from engine.formats.parts import (
    COMPONENTS,
    AdapterPart,
    Factors,
    Layer,
    assemble,
    checked_target,
    layers_of,
    read_tensors,
    unknown_keys,
)
from engine.inject import base_modules
from engine.model import PeftModel

# Where diffusers keeps the adapters' configs in a file's header: {"unet.r": 4, ...}.
CONFIGS = "lora_adapter_metadata"
_OLD_LAYERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_ENDINGS = (
    (re.compile(r"(.+)\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight"), ""),
    (re.compile(r"(.+)\.lora(?:_linear_layer)?\.(down|up)\.weight"), ""),
    (re.compile(r"(.+)\.(lora_[AB]\.weight|lora_B\.bias|lora_magnitude_vector|lokr_(?:w1|w2|t2)(?:_[ab])?)"), ""),
    (re.compile(r"(.+)\.lora_magnitude_vector\.weight"), "lora_magnitude_vector"),
    (re.compile(r"(.+)\.(alpha)"), "alpha"),
)
_SIDES = {"down": "lora_A.weight", "up": "lora_B.weight"}


def split_key(key: str) -> tuple[str, str, str] | None:
    """(component, layer, PEFT's name of the tensor or `alpha`) of a key, or None."""
    key = key.replace(".processor.", ".")
    component = next((name for name in COMPONENTS if key.startswith(name + ".")), None)
    rest = key.removeprefix(f"{component}.")
    for pattern, name in _ENDINGS:
        found = pattern.fullmatch(rest)
        if found is None:
            continue
        parts = found.groups()
        if len(parts) == 3:
            layer = parts[1] + (".0" if parts[1] == "to_out" else "")
            if component not in (None, "unet"):
                layer = _OLD_LAYERS[parts[1]]
            module, tensor = f"{parts[0]}.{layer}", _SIDES[parts[2]]
        else:
            module, tensor = parts[0], name or _SIDES.get(parts[1], parts[1])
        # Keys without a prefix are the UNet's in the oldest files; such names all begin like this.
        if component is None and not re.match(r"(down_blocks|mid_block|up_blocks|conv_|time_emb|add_emb)", module):
            return None
        return component or "unet", module, tensor
    return None


def read_diffusers(path: str | Path, models: Mapping[str, nn.Module | None] | None = None) -> dict[str, AdapterPart]:
    """Component (`unet`, `text_encoder`, `text_encoder_2`) -> its adapter.

    Args:
        path: a safetensors file, or a folder that holds one.
        models: component -> model, to check the layers by; those not given are read as they are named.

    Raises:
        UnsafeFileError: the file is a pickle; it is not opened.
        CheckpointError: keys that belong to no layer or no method (all are named), or a damaged file.
    """
    tensors, header = read_tensors(path)
    models = models or {}
    names = {component: Names(models.get(component), component) for component in COMPONENTS}
    found: dict[str, dict[str, Factors]] = {}
    strange: list[str] = []
    lost: list[str] = []
    for key, tensor in tensors.items():
        parts = split_key(key)
        module = names[parts[0]].dotted(parts[1]) if parts else None
        if parts is None or module is None:
            (strange if parts is None else lost).append(key)
            continue
        part = found.setdefault(parts[0], {}).setdefault(module, Factors())
        if parts[2] == "alpha":
            part.alpha = float(tensor)
        else:
            part.tensors[parts[2]] = tensor
    if strange or lost or not found:
        raise unknown_keys(path, "a diffusers adapter", [*strange, *lost], strange)
    configs = _configs(header, path)
    made = {}
    for component, modules in found.items():
        what = f"{Path(path).name} ({component})"
        ready = assemble(modules, names[component].layers, what)
        own = {key.removeprefix(component + "."): v for key, v in configs.items() if key.startswith(component + ".")}
        made[component] = dataclasses.replace(ready, config=_merged(ready.config, own)) if own else ready
    return made


def _configs(header: Mapping[str, str], path: str | Path) -> dict[str, Any]:
    try:
        raw = json.loads(header.get(CONFIGS) or "{}")
    except ValueError as error:
        raise CheckpointError(f"{Path(path).name} has a damaged header: {CONFIGS} is no JSON ({error}).") from error
    return raw if isinstance(raw, dict) else {}


def _merged(inferred: AdapterConfig, own: Mapping[str, Any]) -> AdapterConfig:
    """The header's config, with the layers that the tensors are of."""
    return type(inferred).from_dict({**own, "target_modules": inferred.target_modules})  # type: ignore[attr-defined]


def write_diffusers(
    models: Mapping[str, PeftModel],
    path: str | Path,
    adapter_name: str = "default",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write one adapter of each model into a file that diffusers' `load_lora_weights` reads.

    The scale goes into the second factor, so that readers that know no alphas get it right too. LoKr is read by the
    UNet's own `load_lora_adapter`.

    Args:
        models: component -> model with the adapter.
        path: the file, ending in .safetensors (diffusers' usual name: pytorch_lora_weights.safetensors).
        adapter_name: the adapter's name, the same on each model.
        dtype: of the file's tensors.

    Raises:
        ConfigError: something that the format has no place for (LoHa and other methods, biases, modules trained in
            full).
    """
    path = checked_target(models, path)
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {}
    for component, model in models.items():
        config, layers = layers_of(model, adapter_name, "diffusers' format")
        if config.method == "loha":
            raise ConfigError(
                f"{adapter_name!r} is a LoHa adapter, which diffusers does not read.",
                "Write it with write_kohya, which A1111 and ComfyUI read.",
            )
        clip = component != "unet" and any(n.startswith("encoder.") for n, _ in base_modules(model.get_base_model()))
        for layer in layers:
            name = f"{component}.{CLIP_PREFIX if clip else ''}{layer.name}"
            for key, tensor in _scaled(layer).items():
                if component != "unet" and key in ("lora_A.weight", "lora_B.weight"):
                    key = f"lora_linear_layer.{'down' if key == 'lora_A.weight' else 'up'}.weight"
                elif component != "unet" and key == "lora_magnitude_vector":
                    key += ".weight"
                tensors[f"{name}.{key}"] = tensor.to(dtype).contiguous()
        if not isinstance(config, LowRankConfig):
            header |= {f"{component}.{key}": value for key, value in _unscaled(config, layers).items()}
    more = {CONFIGS: json.dumps(header, sort_keys=True)} if header else {}
    write_safetensors(path, tensors, {"format": "pt", **more})
    return path


def _scaled(layer: Layer) -> dict[str, Tensor]:
    own = dict(layer.tensors)
    for key in ("lora_B.weight", "lora_B.bias", "lokr_w1", "lokr_w1_a"):
        if key in own:
            own[key] = own[key] * layer.scale
    return own


def _unscaled(config: Any, layers: list[Layer]) -> dict[str, Any]:
    """The config of tensors that hold their scale: alpha = rank everywhere."""
    names = sorted(layer.name for layer in layers)
    plain: dict[str, Any] = config.replace(
        alpha=config.r, alpha_pattern=dict(config.rank_pattern), inference_mode=True, target_modules=names
    ).to_dict()
    return plain
