"""A LoRA alone as GGUF, which llama.cpp puts over its base (`--lora FILE`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

from engine.adapters.base import AdapterConfig
from engine.adapters.lowrank import LowRankConfig
from engine.adapters.starts import takes_from_base
from engine.checkpoint import PREFIX, read_config, read_weights
from engine.errors import ConfigError
from engine.llamacpp import ADAPTERS
from engine.llamacpp.files import FILE_TYPES, KINDS, Entry, Names, check_family, write

_FACTORS = (".lora_A.weight", ".lora_B.weight")
_MERGE = "Merge it into its base, and export that."


def write_adapter(folder: str | Path, base: Any, path: str | Path, name: str = "") -> Path:
    """Write a LoRA of a Llama from its folder in PEFT's format; it appears whole or not at all.

    A (r, in) and B (out, r) are kept in float32. llama.cpp scales by alpha / r with one alpha for all layers, so what a
    layer's scale is beyond that (rsLoRA, patterns) goes into its B.

    Args:
        folder: the adapter.
        base: transformers' config of its base; its weights are not needed.
        path: a name that ends in `.gguf`.
        name: what the file says that it is.

    Raises:
        ConfigError: a base of another family, another method than LoRA, or a part that the format has no place for.
        CheckpointError, UnsafeFileError: the folder is no adapter, or another kind of file name.
    """
    check_family(base)
    config = _checked(read_config(folder))
    entries = _entries(read_weights(folder), config, base)

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        if name:
            writer.add_name(name)
        writer.add_file_type(FILE_TYPES["f32"])
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config.lora_alpha))

    return write(Path(path), describe, entries)


def _checked(config: AdapterConfig) -> LowRankConfig:
    """The config, if it is a plain LoRA's: refuses what llama.cpp's adapters have no place for, all of it at once."""
    if not isinstance(config, LowRankConfig) or config.method not in ADAPTERS:
        raise ConfigError(
            f"The adapter is a {config.method} adapter, and llama.cpp has LoRA alone; needed: {' or '.join(ADAPTERS)}.",
            _MERGE,
        )
    faults = []
    if config.bias != "none" or config.lora_bias:
        faults.append("it trains biases")
    if config.modules_to_save:
        faults.append(f"it trains {', '.join(config.modules_to_save)} in full")
    if takes_from_base(config.init_lora_weights):
        faults.append(f"its start ({config.init_lora_weights}) is not taken off; save it again here")
    if not config.lora_alpha:
        faults.append("lora_alpha is 0, which llama.cpp reads as the rank")
    if faults:
        listed = "\n".join(f"- {fault}" for fault in faults)
        raise ConfigError("The adapter has parts that llama.cpp's LoRA has no place for:\n" + listed, _MERGE)
    return config


def _entries(tensors: Mapping[str, Tensor], config: LowRankConfig, base: Any) -> list[Entry]:
    strange = [key for key in tensors if not key.startswith(PREFIX) or not key.endswith(_FACTORS)]
    if strange:
        raise ConfigError(
            f"The adapter has {strange[0]}, and llama.cpp's LoRA has a place for linear layers' A and B alone.", _MERGE
        )
    names, entries = Names(base), []
    modules = dict.fromkeys(key.removeprefix(PREFIX).removesuffix(key[-len(_FACTORS[0]) :]) for key in tensors)
    for module in modules:
        if module == "lm_head" and base.tie_word_embeddings:
            raise ConfigError("The adapter changes lm_head, which is the embedding of this base.", _MERGE)
        a, b = (tensors.get(f"{PREFIX}{module}{factor}") for factor in _FACTORS)
        if a is None or b is None or a.dim() != 2 or b.shape[1] != a.shape[0]:
            raise ConfigError(f"The factors of {module} do not belong together.", "Save the adapter again.")
        scaled = names.rows(module, b.float()) * _beyond(config, module, a.shape[0])
        place = names.of(f"{module}.weight")
        for factor, tensor in (("lora_a", a), ("lora_b", scaled)):
            entries.append(Entry(f"{place}.{factor}", tuple(tensor.shape), KINDS["f32"], tensor.float))
    return entries


def _beyond(config: LowRankConfig, module: str, rank: int) -> float:
    """The layer's scale over llama.cpp's, alpha / r with the file's alpha and the layer's own rank."""
    return config.scale(module) * rank / config.lora_alpha
