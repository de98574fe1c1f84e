"""Prefixes in a model's key-value cache, under gradient checkpointing too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import EngineError


def filled(base: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]], cache: Any, forgetful: bool) -> Any:
    """A cache that holds the prefixes.

    Args:
        base: the model that will read it.
        pairs: keys and values of each layer, (batch, heads, n, head width).
        cache: an empty one to fill, or None for a new one.
        forgetful: make one that stays as it is whatever it is given, for layers that are run twice.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    config: Any = base.config
    if forgetful:
        return _forgetful(pairs, bool(config.is_encoder_decoder))
    if cache is None:
        cache = DynamicCache(config=config)
        if config.is_encoder_decoder:
            cache = EncoderDecoderCache(cache, DynamicCache(config=config))
    own = getattr(cache, "self_attention_cache", cache)
    for layer, (keys, values) in enumerate(pairs):
        own.update(keys, values, layer)
    return cache


def compute_type(base: nn.Module) -> torch.dtype:
    """The type of a model's activations."""
    weight = base.get_input_embeddings().weight  # type: ignore[operator]
    dtype: torch.dtype = weight.dtype
    return dtype


def _forgetful(pairs: Sequence[tuple[Tensor, Tensor]], two: bool) -> Any:
    """A cache that answers with the prefix before whatever it is given, and keeps nothing.

    Gradient checkpointing runs layers twice; a cache that grows would be longer the second time.
    """
    from transformers import DynamicCache, EncoderDecoderCache
    from transformers.cache_utils import DynamicLayer

    class Layer(DynamicLayer):  # type: ignore[misc]
        def __init__(self, owner: Any, pair: tuple[Tensor, Tensor] | None) -> None:
            super().__init__()
            self.owner, self.is_initialized = owner, True
            if pair is not None:
                self.keys, self.values = pair

        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self.owner.was_read = True
            if self.keys is None:
                return keys, values
            return torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)

        def get_seq_length(self) -> int:
            return 0 if self.keys is None else int(self.keys.shape[-2])

    class Never(dict[int, bool]):
        def __setitem__(self, key: int, value: bool) -> None:
            """Cross-attention is computed anew each time."""

    own = DynamicCache()
    cache = EncoderDecoderCache(own, DynamicCache()) if two else own
    cache.was_read = False
    own.layers = [Layer(cache, pair) for pair in pairs]
    if two:
        cache.cross_attention_cache.layers = [Layer(own, None) for _ in pairs]
        cache.is_updated = Never()
    return cache


@contextmanager
def kept_under_checkpointing(modules: Sequence[nn.Module]) -> Iterator[None]:
    """transformers takes the cache from layers that are recomputed; one that keeps nothing may stay.

    Raises:
        EngineError: the recomputing is reentrant, through which no gradient reaches a prefix.
    """
    layers = [module for module in modules if hasattr(module, "_can_checkpoint_with_cache")]
    # A stack that hands its layers no cache while recomputing (GPT-2's); T5's attention reads the flag for itself.
    stacks = [m for m in modules if m not in layers and any(part in layers for part in m.modules())]
    for module in modules:
        function: Any = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(function, "keywords", {}).get("use_reentrant", False):
            raise EngineError(
                "Reentrant gradient checkpointing passes no gradient to a prefix.",
                "Turn it on with use_reentrant=False.",
            )
    for module in layers:
        module._can_checkpoint_with_cache = True  # type: ignore[assignment]
    for module in stacks:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in layers:
            del module._can_checkpoint_with_cache
        for module in stacks:
            module.gradient_checkpointing = True  # type: ignore[assignment]
