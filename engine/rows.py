"""Mixed batches: the rows of a call, for as long as it runs and wherever its layers run again.

Gradient checkpointing runs layers a second time in the backward pass, when another call may be under way; so what a
module checkpoints with is, during a mixed call, one that brings that call's rows along. transformers and diffusers keep
it at the module as `_gradient_checkpointing_func`, torch's CheckpointWrapper as `checkpoint_fn`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.adapters.base import Mix, Switchboard
from engine.errors import ConfigError, EngineError

Row = str | Mapping[str, float] | None
"""What a caller gives for a batch row: an adapter's name, a mix as name -> weight, or None for the base alone."""
_CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")
# What a model reads first, in the order in which it counts as the batch.
_INPUTS = (
    "inputs",
    "input_ids",
    "inputs_embeds",
    "input_values",
    "input_features",
    "pixel_values",
    "sample",
    "encoder_outputs",
    "decoder_input_ids",
    "decoder_inputs_embeds",
)


def mix_of(row: Row) -> Mix:
    """A row's adapters with their weights; those of weight 0 are none."""
    if row is None or row == "__base__":
        return ()
    if isinstance(row, str):
        return ((row, 1.0),)
    return tuple((name, float(weight)) for name, weight in row.items() if weight)


def check_attached(rows: Sequence[Row], attached: Mapping[str, Any]) -> None:
    """Whether every adapter of the rows is one of `attached`.

    Raises:
        ConfigError: one is not.
    """
    for name in dict.fromkeys(name for row in rows for name, _ in mix_of(row)):
        if name not in attached:
            raise ConfigError(f"There is no adapter {name!r} here.", f"Attached: {', '.join(attached) or 'none'}.")


@contextmanager
def mixed(board: Switchboard, base: nn.Module, rows: list[Mix]) -> Iterator[None]:
    """The switchboard with these rows inside the block, and in what is computed again for it later."""
    changed = [
        (module, name, function)
        # Without gradients nothing is computed again, and a look at thousands of modules for each token takes long.
        for module in (base.modules() if torch.is_grad_enabled() else ())
        for name in _CHECKPOINTS
        if callable(function := module.__dict__.get(name))
    ]
    before, board.rows = board.rows, rows
    try:
        for module, name, function in changed:
            setattr(module, name, _with_rows(board, rows, function))
        yield
    finally:
        board.rows = before
        for module, name, function in changed:
            setattr(module, name, function)


def _with_rows(board: Switchboard, rows: list[Mix], checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def again(*inner: Any, **named: Any) -> Any:
            before, board.rows = board.rows, rows
            try:
                return function(*inner, **named)
            finally:
                board.rows = before

        return checkpoint(again, *args, **kwargs)

    return run


def check_count(rows: Sequence[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """One name for each row of the call's input.

    Raises:
        EngineError: there are more or fewer.
    """
    batch = _batch(args, kwargs)
    if batch is not None and batch != len(rows):
        raise EngineError(
            f"adapter_names has {len(rows)} names and the batch {batch} rows; needed: one name a row.",
            "Name an adapter or a mix (name -> weight) for each row, None or '__base__' for the base alone.",
        )


def _batch(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Rows of the input; None if no tensor shows them."""
    for value in (*args[:1], *(kwargs.get(name) for name in _INPUTS), *args[1:], *kwargs.values()):
        if value is not None and hasattr(value, "last_hidden_state"):
            value = value.last_hidden_state
        if isinstance(value, Tensor) and value.dim():
            return int(value.shape[0])
    return None
