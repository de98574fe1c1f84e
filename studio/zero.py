"""ZeroGPU: on a Hugging Face Space of that kind a function gets a GPU only while it runs under `spaces.GPU`.

Everywhere else, and without the package `spaces`, nothing changes. `spaces` runs the function in a child of its own, in
a thread, and sends its arguments and its result there and back by pickle: so they have to be plain.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

MOST_SECONDS = 120
"""What a Space gives one call at most, for visitors without a subscription."""


def on_gpu(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, with a GPU while it runs where ZeroGPU lends one."""
    # Asked first, as `spaces` does itself: the import takes Gradio along, which a worker has no use for.
    if os.environ.get("SPACES_ZERO_GPU", "").lower() not in ("1", "t", "true"):
        return function
    try:
        import spaces  # type: ignore[import-not-found] # there on ZeroGPU Spaces alone
    except ImportError:
        return function
    decorated: Callable[P, R] = spaces.GPU(duration=MOST_SECONDS)(function)
    return decorated
