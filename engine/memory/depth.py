"""A step over a stack of equal blocks, from the same step over four of them.

In a stack of L equal blocks every block adds the same in the forward pass and ends the same in the backward pass. So
four are run, the first, two between and the last, and what happens between two marks of one of the two is repeated:

    forward    0 | 1 2            | 3, head          four blocks
               0 | 1 2 1 2 ... 2  | 3, head          L blocks
    backward   3 | 2 1            | 0                and so on

Within a repeated stretch the sum rises or falls by the same each time, so its largest is in the first or in the last.
This is no estimate: whoever counts all L finds the same. It is done only where the blocks are alike by their modules,
settings and shapes (`find`), and where the two between turn out to do the same (`lengthened`).
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.adapters.prefix_tuning import PrefixTokens
from engine.memory.allocations import Span

KEPT = 4
"""Blocks that are run."""

_SECOND = ("forward 2", "backward 1")
"""Of two that are repeated, the later."""

_BETWEEN = ("forward 1", "forward 2", "backward 2", "backward 1")

_ORDER = re.compile(
    "before,(?:(?:forward 0,forward 1,forward 2,forward 3,head,)+copies end,backward,"
    "(?:backward 2,backward 1,backward 0,)+graph ends,)+"
)
_PLACES = ("layer_idx", "module_name")
"""Attributes that say where a block stands, and change nothing of what it does."""

_PLAIN = (bool, int, float, str, type(None), torch.dtype)


class UnevenError(Exception):
    """The blocks do not all do the same, so that all have to be run."""


@dataclass(frozen=True)
class Stack:
    """The blocks of a model, all alike.

    Attributes:
        owner: the module that has them. name: under which name. blocks: all of them.
    """

    owner: nn.Module
    name: str
    blocks: nn.ModuleList

    @property
    def left_out(self) -> int:
        return len(self.blocks) - KEPT

    def parameters(self, trained: Mapping[str, nn.Parameter], count: int) -> dict[str, nn.Parameter]:
        """What is trained outside of the blocks and in the first `count` of them."""
        others = {id(parameter) for block in self.blocks[count:] for parameter in block.parameters()}
        return {name: parameter for name, parameter in trained.items() if id(parameter) not in others}

    @contextmanager
    def shortened(self) -> Iterator[None]:
        """The model with the first four blocks alone."""
        setattr(self.owner, self.name, self.blocks[:KEPT])
        try:
            yield
        finally:
            setattr(self.owner, self.name, self.blocks)

    @contextmanager
    def marked(self, mark: Callable[[str], None]) -> Iterator[None]:
        """Within, `mark` is called as the shortened model comes to `forward I`, to `head` and to `backward I`.

        The backward pass of block I begins when the gradient of the next block's input is there. Blocks that run again
        within a backward pass (gradient checkpointing) mark nothing.
        """

        def entering(number: int) -> Callable[..., None]:
            def hook(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
                if _in_backward():
                    return
                mark(f"forward {number}")
                given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
                hidden = next((value for value in given if value.requires_grad), None)
                if number and hidden is not None:
                    hidden.register_hook(lambda gradient: mark(f"backward {number - 1}"))

            return hook

        def leaving(*_: Any) -> None:
            if not _in_backward():
                mark("head")

        kept = list(self.blocks)[:KEPT]
        handles = [block.register_forward_pre_hook(entering(i), with_kwargs=True) for i, block in enumerate(kept)]
        handles.append(kept[-1].register_forward_hook(leaving))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def find(model: nn.Module) -> Stack | None:
    """The stack of a model (with its adapter) that can be shortened; None where something may depend on the depth."""
    config: Any = getattr(model, "config", None)
    found = _lists(model)
    if len(found) != 1 or config is None or getattr(config, "is_encoder_decoder", False):
        return None
    owner, name, blocks = found[0]
    # A prefix has keys and values for each block.
    prefix = any(isinstance(module, PrefixTokens) for module in model.modules())
    if prefix or len(blocks) <= KEPT or not _even(config, len(blocks)):
        return None
    trained = [id(p) for block in blocks for p in block.parameters() if p.requires_grad]
    first = _signature(blocks[0])
    if len(trained) != len(set(trained)) or any(_signature(block) != first for block in blocks[1:]):
        return None
    return Stack(owner, name, blocks)


def _lists(module: nn.Module) -> list[tuple[nn.Module, str, nn.ModuleList]]:
    """The lists of modules, outermost ones: (what has it, name, list)."""
    found = []
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            found.append((module, name, child))
        else:
            found += _lists(child)
    return found


def _even(config: Any, depth: int) -> bool:
    """Whether a config has no setting block by block, and drops none by chance."""
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == depth and any(item != value[0] for item in value):
            return False
        if name.endswith("layerdrop") and value:
            return False
    return True


def _signature(block: nn.Module) -> list[Any]:
    """Everything of a block that can tell what it computes, its place apart."""
    found: list[Any] = []
    for name, module in block.named_modules():
        found += [name, type(module)]
        found += [(key, _plain(value)) for key, value in vars(module).items() if key not in _PLACES]
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        found.append((name, _plain(tensor)))
    return found


def _plain(value: Any) -> Any:
    """What of a value can be compared: itself, a tensor's shape, else its type."""
    if isinstance(value, Tensor):
        return type(value), value.shape, value.stride(), value.dtype, value.requires_grad
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(item.name, _plain(getattr(value, item.name))) for item in dataclasses.fields(value)]
    return type(value)


def lengthened(
    spans: Sequence[Span], left_out: int, missing: Mapping[str, int], kept: Mapping[str, int]
) -> tuple[Counter[str], Counter[str]]:
    """A step over all blocks: part -> bytes at its peak, and part -> bytes that the left out ones have at its end.

    Args:
        spans: of the step over four of them.
        left_out: blocks that were not run.
        missing: part -> bytes that the left out ones have from the beginning.
        kept: part -> bytes of what began in one of the blocks between and is there at the end.

    Raises:
        UnevenError: the two blocks between do not do the same, or other things happened than forward and backward.
    """
    if not _ORDER.fullmatch("".join(f"{span.name}," for span in spans)):
        raise UnevenError("they are run in another order")
    offset, best = Counter(missing), Counter[str]()
    peak = -1
    for place, span in enumerate(spans):
        if span.name in _SECOND:
            if _course(spans[place - 1]) != _course(span):
                raise UnevenError("they do not all do the same")
            offset.update(times(difference(span.after, span.before), left_out))
        if span.peak + offset.total() > peak:
            peak, best = span.peak + offset.total(), summed(span.at_peak, offset)
        if span.name not in _BETWEEN:
            offset.subtract(times(_ended_together(span), left_out))
    stays = difference(offset, summed(missing, times(kept, left_out)))
    if any(stays.values()):
        raise UnevenError(f"{dict(stays)} is more than what they keep")
    return best, offset


def _ended_together(span: Span) -> Counter[str]:
    """Part -> bytes that each of the blocks between loses in this stretch, which belongs to none of them.

    Some of what a block takes ends with that of all others: a weight's copy under autocast when the forward pass is
    over, what a node of autograd holds when the graph ends. What ends of one block alone is its neighbour's doing.
    """
    first, second = (summed(span.ended[f"forward {i}"], span.ended[f"backward {i}"]) for i in (1, 2))
    if not first.total() or not second.total():
        return Counter()
    if first != second or span.peak > span.before.total():
        raise UnevenError("what ends of them ends while something else goes on")
    return first


def _course(span: Span) -> tuple[Counter[str], Counter[str]]:
    """What a stretch does, wherever it begins."""
    return difference(span.after, span.before), difference(span.at_peak, span.before)


def difference(after: Mapping[str, int], before: Mapping[str, int]) -> Counter[str]:
    """Part by part; Counter's own minus would leave out what is less."""
    found = Counter(after)
    found.subtract(before)
    return found


def summed(first: Mapping[str, int], second: Mapping[str, int]) -> Counter[str]:
    """Part by part."""
    found = Counter(first)
    found.update(second)
    return found


def times(parts: Mapping[str, int], count: int) -> Counter[str]:
    """Each part so many times."""
    return Counter({part: count * size for part, size in parts.items()})


def extended(three: Mapping[str, int], four: Mapping[str, int], left_out: int) -> Counter[str]:
    """What grows by the same with each block, from what it is with three and with four of them."""
    return summed(four, times(difference(four, three), left_out))
