"""GGUF, the file of llama.cpp and what is built on it: merged models and LoRAs of the Llama family. Torch-free.

The file is laid out by `gguf`, llama.cpp's own package; without it nothing here writes. `model.write_model` writes a
whole model, `adapter.write_adapter` a LoRA alone; `vocabulary.py` says a tokenizer in llama.cpp's terms, `files.py` is
what both share. See docs/export.md.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, EngineError
from engine.models import folders, hub
from engine.models.catalogue import BUILTIN, canonical
from engine.models.fetch import local_folder

PACKAGE = "gguf"
INSTALL = "pip install gguf==0.19.0"
"""What installs the converter."""

PRECISIONS = ("f16", "bf16", "f32", "q8_0")
"""How a model's matrices can be written; vectors are always float32."""

FAMILIES = ("llama",)
"""The `model_type` of configs that are converted."""

ADAPTERS = ("lora", "lorafa")
"""Methods whose file is a plain LoRA, the only adapter that llama.cpp has."""


class ConverterError(ConfigError):
    """The package that lays GGUF files out is not installed."""

    code = "converter"


def installed() -> bool:
    """Whether the converter is there; it is not imported."""
    return importlib.util.find_spec(PACKAGE) is not None


def check_installed() -> None:
    """Refuse to write without the converter.

    Raises:
        ConverterError: with the command that installs it.
    """
    if not installed():
        raise ConverterError(
            f"GGUF files are written by the package {PACKAGE}, which is not installed.", f"Install it: {INSTALL}"
        )


def check_precision(precision: Any) -> str:
    """A precision of `PRECISIONS`.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise ConfigError(f"The precision is {str(precision)[:40]!r}; needed: one of {', '.join(PRECISIONS)}.")
    return precision


def base_config(name: str) -> Mapping[str, Any]:
    """A base's `config.json` where it is on this machine, in the hub's cache too; empty where it is not.

    Nothing is fetched, and nothing of the base but this file is opened.
    """
    name = canonical(name)
    try:
        place = local_folder(name)
        if place is None and name in BUILTIN:
            place = BUILTIN[name].config_folder
        if place is None:
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(hub.check_id(name), folders.CONFIG)
            return folders.read_json(Path(found)) if isinstance(found, str) else {}
        return folders.read_json(place / folders.CONFIG)
    except (EngineError, OSError, ValueError):  # opening the base says why it cannot be had
        return {}
