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


def bound(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether the module has this forward."""
    mine = module.__dict__.get("forward")
    return isinstance(mine, functools.partial) and mine.func is forward


def unbind(module: nn.Module, forward: Callable[..., Any]) -> None:
    """The class's own forward again, where the module has this one."""
    if bound(module, forward):
        del module.__dict__["forward"], module.__dict__[_REPLICATE]


def _replica(module: nn.Module) -> nn.Module:
    replica: nn.Module = type(module)._replicate_for_data_parallel(module)
    bind(replica, module.__dict__["forward"].func)
    return replica
