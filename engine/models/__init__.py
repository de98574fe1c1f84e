"""Base models: the catalogue, finding and fetching, loading. Names are imported on first use; none imports torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.models.catalogue import BUILTIN, DEFAULT, TOY, BaseModel, describe
    from engine.models.fetch import ensure, is_ready, resolve, resolve_config

__all__ = ["BUILTIN", "DEFAULT", "TOY", "BaseModel", "describe", "ensure", "is_ready", "resolve", "resolve_config"]

_FETCHING = ("ensure", "is_ready", "resolve", "resolve_config")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # On first use, so that `python -m engine.models.fetch` does not find itself imported already.
    module = "engine.models.fetch" if name in _FETCHING else "engine.models.catalogue"
    return getattr(importlib.import_module(module), name)
