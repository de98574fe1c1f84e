"""Another forward for a module, beside its class's own: the module in it is the copy's in a copy and the replica's in a
replica."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

_REPLICATE = "_replicate_for_data_parallel"


def bind(module: nn.Module, forward: Callable[..., Any]) -> None:
    """`module(x)` is `forward(module, x)` from now on."""
    module.__dict__["forward"] = functools.partial(forward, module)
    # nn.DataParallel copies what stands in a module's dictionary, and the replica would go on to ask the original.
    module.__dict__[_REPLICATE] = functools.partial(_replica, module)


def unbind(module: nn.Module, forward: Callable[..., Any]) -> None:
    """The class's own forward again, where the module has this one."""
    mine = module.__dict__.get("forward")
    if isinstance(mine, functools.partial) and mine.func is forward:
        del module.__dict__["forward"], module.__dict__[_REPLICATE]


def is_watched(module: nn.Module) -> bool:
    """Whether somebody listens to a module's calls or has replaced them: hooks, another forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


def _replica(module: nn.Module) -> nn.Module:
    replica: nn.Module = type(module)._replicate_for_data_parallel(module)
    bind(replica, module.__dict__["forward"].func)
    return replica
