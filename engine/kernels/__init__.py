"""Fused forms of what training does most: the same values and gradients, fewer saved tensors and fewer passes.

`linear` is a layer with LoRA or DoRA as one autograd node, `together` several that read one input, `gated` a gated
MLP's second half, `norm` a frozen RMS norm, `loss` the cross-entropy without a table of logits, `packed` the
attention of rows that share a batch row and `rows` that of short ones; `binding` gives a module another forward. Each
has the plain formula beside it: with `disabled()` the engine takes that, and the tests hold both equal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_state = {"enabled": True}


def enabled() -> bool:
    """Whether fused forms are used: not under `disabled()`, nor while torch.compile traces the model."""
    return _state["enabled"] and not torch.compiler.is_compiling()


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """The plain formulas inside the block, for comparison."""
    before = _state["enabled"]
    _state["enabled"] = False
    try:
        yield
    finally:
        _state["enabled"] = before
