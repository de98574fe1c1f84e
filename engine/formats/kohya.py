"""kohya's format of Stable Diffusion adapters, with LyCORIS's keys for LoHa and LoKr.

    lora_unet_<layer>.lora_down.weight (r, in)   .lora_up.weight (out, r)   .alpha   .dora_scale (out, 1)
    W' = W + alpha / r  up down,   with dora_scale m:  W' = m / ||W + ...|| (W + ...), row by row

`lora_te_` is the text encoder of Stable Diffusion 1 and 2, `lora_te1_` and `lora_te2_` those of XL.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoint import write_safetensors
from engine.errors import CheckpointError
from engine.formats.names import CLIP_PREFIX, Names, layers_per_block, to_original
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

# The longer ones first: each key belongs to the first that it starts with.
PREFIXES = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
}
_TO_PEFT = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "dora_scale": "lora_magnitude_vector",
    "lora_mid.weight": "lora_mid.weight",
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
_FROM_PEFT = {peft: kohya for kohya, peft in _TO_PEFT.items()}


def read_kohya(path: str | Path, models: Mapping[str, nn.Module | None] | None = None) -> dict[str, AdapterPart]:
    """Component (`unet`, `text_encoder`, `text_encoder_2`) -> its adapter.

    Args:
        path: a safetensors file, or a folder that holds one.
        models: component -> model, to find the layers by; those not given are read by the usual names.

    Raises:
        UnsafeFileError: the file is a pickle; it is not opened.
        CheckpointError: keys that belong to no layer or no method (all are named), or a damaged file.
    """
    tensors, _ = read_tensors(path)
    models = models or {}
    names = {component: Names(models.get(component), component) for component in COMPONENTS}
    found: dict[str, dict[str, Factors]] = {}
    strange: list[str] = []
    lost: list[str] = []
    for key, tensor in tensors.items():
        prefix = next((start for start in PREFIXES if key.startswith(start)), None)
        flat, _, suffix = key.partition(".")
        if prefix is None or (suffix != "alpha" and suffix not in _TO_PEFT):
            strange.append(key)
            continue
        component = PREFIXES[prefix]
        module = names[component].flat(flat.removeprefix(prefix))
        if module is None:
            lost.append(key)
            continue
        part = found.setdefault(component, {}).setdefault(module, Factors())
        if suffix == "alpha":
            part.alpha = float(tensor)
        else:
            part.tensors[_TO_PEFT[suffix]] = tensor
    if strange or lost or not found:
        raise unknown_keys(path, "a kohya adapter", [*strange, *lost], strange)
    parts = {}
    for component, modules in found.items():
        what = f"{Path(path).name} ({component})"
        for module, part in modules.items():
            _normalise(module, part, what)
        parts[component] = assemble(modules, names[component].layers, what)
    return parts


def _normalise(module: str, part: Factors, what: str) -> None:
    """PEFT's form of what only kohya's family has: a middle convolution, and magnitudes as a matrix."""
    own = part.tensors
    middle = own.pop("lora_mid.weight", None)
    if middle is not None and "lora_A.weight" in own:
        # up (1x1) of mid (k x k) of down (1x1) is up of one k x k convolution.
        down = own["lora_A.weight"].flatten(1)
        own["lora_A.weight"] = torch.einsum("ijkl,jn->inkl", middle.float(), down.float())
    magnitude = own.get("lora_magnitude_vector")
    if magnitude is None:
        return
    up = own.get("lora_B.weight")
    if up is None:
        raise CheckpointError(
            f"{what} has dora_scale at {module}, which is no LoRA layer; DoRA over LoHa or LoKr is not done here.",
            "Merge it into the base where it was trained.",
        )
    if magnitude.numel() != up.shape[0] or magnitude.shape[0] != up.shape[0]:
        raise CheckpointError(
            f"{what}: dora_scale of {module} has shape {tuple(magnitude.shape)}; needed: one magnitude for each of the "
            f"{up.shape[0]} outputs.",
            "It was trained with magnitudes of the inputs (wd_on_output off); merge it into the base there.",
        )
    flat = magnitude.flatten()
    own["lora_magnitude_vector"] = flat.view(1, -1, 1, 1) if up.dim() == 4 else flat


def write_kohya(
    models: Mapping[str, PeftModel],
    path: str | Path,
    adapter_name: str = "default",
    dtype: torch.dtype = torch.float32,
    original_names: bool | None = None,
) -> Path:
    """Write one adapter of each model into a file for kohya's readers (A1111, ComfyUI, diffusers, ...).

    Args:
        models: component -> model with the adapter.
        path: the file, ending in .safetensors; it appears whole or not at all.
        adapter_name: the adapter's name, the same on each model.
        dtype: float16 halves the file, as most do.
        original_names: name the UNet's blocks as the original code does (`input_blocks_...`); None does it for SDXL,
            as kohya does.

    Raises:
        ConfigError: something that the format has no place for (another method, biases, modules trained in full).
    """
    path = checked_target(models, path)
    xl = "text_encoder_2" in models or _is_xl(models.get("unet"))
    tensors: dict[str, Tensor] = {}
    ranks: Counter[tuple[int, float]] = Counter()
    method = "lora"
    for component, model in models.items():
        config, layers = layers_of(model, adapter_name, "kohya's format")
        method = config.method
        namer = _Namer(component, model, xl, xl if original_names is None else original_names)
        for layer in layers:
            own, alpha = _kohya_tensors(layer)
            start = namer(layer.name)
            tensors |= {f"{start}.{key}": tensor.to(dtype).contiguous() for key, tensor in own.items()}
            tensors[f"{start}.alpha"] = torch.tensor(alpha, dtype=dtype)
            ranks[layer.rank, alpha] += 1
    (rank, alpha), _ = ranks.most_common(1)[0]
    write_safetensors(path, tensors, _metadata(method, rank, alpha))
    return path


def _kohya_tensors(layer: Layer) -> tuple[dict[str, Tensor], float]:
    """A layer's tensors by kohya's suffixes, and its alpha."""
    own, scale = dict(layer.tensors), layer.scale
    if "lokr_w1" in own and "lokr_w2" in own:
        # Nothing is factored, so readers take the scale as 1: it goes into the tensor.
        own["lokr_w1"] = own["lokr_w1"] * scale
        scale = 1.0
    magnitude = own.get("lora_magnitude_vector")
    if magnitude is not None:
        own["lora_magnitude_vector"] = magnitude.reshape(-1, *[1] * (own["lora_B.weight"].dim() - 1))
    return {_FROM_PEFT[key]: tensor for key, tensor in own.items()}, scale * layer.rank


def _metadata(method: str, rank: int, alpha: float) -> dict[str, str]:
    """What kohya's readers look for in the file's header."""
    made: dict[str, str] = {"format": "pt", "ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    if method == "lora":
        return {**made, "ss_network_module": "networks.lora"}
    args: dict[str, Any] = {"algo": method} if method != "dora" else {"algo": "lora", "dora_wd": True}
    return {**made, "ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(args)}


def _is_xl(unet: nn.Module | None) -> bool:
    """Whether a UNet takes SDXL's second text encoder and sizes."""
    return getattr(getattr(unet, "config", None), "addition_embed_type", None) == "text_time"


class _Namer:
    """Layer name -> kohya's name with its prefix."""

    def __init__(self, component: str, model: PeftModel, xl: bool, original: bool) -> None:
        base = model.get_base_model()
        self.modules = [name for name, _ in base_modules(base)]
        self.per_block = layers_per_block(base)
        self.original = original and component == "unet"
        # Newer encoders have no text_model part; files keep it.
        part_of_clip = component != "unet" and any(n == "encoder" or n.startswith("encoder.") for n in self.modules)
        self.more = CLIP_PREFIX if part_of_clip else ""
        encoder = "lora_te1_" if xl else "lora_te_"
        self.prefix = {"unet": "lora_unet_", "text_encoder": encoder, "text_encoder_2": "lora_te2_"}[component]

    def __call__(self, name: str) -> str:
        if self.original:
            return self.prefix + to_original(name, self.modules, self.per_block)
        return self.prefix + (self.more + name).replace(".", "_")
