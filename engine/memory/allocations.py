"""An allocator that only counts: every storage that torch makes adds its bytes, its end takes them away again.

Run a training step on tensors without data (torch's `FakeTensorMode`) under `Allocations`, and its peak is what the
same step needs with data. torch chooses its kernels by shape and device, so that attention, autocast, gradient
checkpointing and whatever the wrappers save is followed as it is, not as somebody once wrote it down.

Integers stay real in such a step: positions and masks are read by the model's own code, and cost next to nothing.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_DEVICE = torch.ops.prim.device.default
"""What torch asks of a tensor more often than it computes anything."""


def _gemm_4bit(arguments: Sequence[Any]) -> int:
    """bitsandbytes' CPU kernel dequantises the whole weight, in the activations' type, and then multiplies."""
    x, shape = arguments[0], arguments[2]
    return int(math.prod(shape) * x.element_size())


def _update_8bit(arguments: Sequence[Any]) -> int:
    """bitsandbytes' CPU step takes both moments, the gradient, the root and the quotient in float32 at once."""
    return int(5 * 4 * arguments[2].numel())


Hidden = Mapping[str, Callable[[Sequence[Any]], int]]
HIDDEN: Hidden = {"bitsandbytes::gemm_4bit": _gemm_4bit}
"""Operators that allocate within themselves what torch is not told of -> bytes, from their arguments."""
HIDDEN_ON_CPU: Hidden = {**HIDDEN, "bitsandbytes::optimizer_update_8bit_blockwise": _update_8bit}


@dataclass
class Span:
    """A stretch of a step, from one mark to the next.

    Attributes:
        name: what happens in it.
        before: part -> bytes at its beginning. after: at its end.
        peak: the largest sum within it. at_peak: part -> bytes then.
        ended: name of the stretch in which they began -> part -> bytes of what ended in this one.
    """

    name: str
    before: Counter[str]
    after: Counter[str]
    peak: int
    at_peak: Counter[str]
    ended: defaultdict[str, Counter[str]]


class Allocations(TorchDispatchMode):
    """Counts the bytes of live storages by what they are for.

    Attributes:
        live: part -> bytes now. total: their sum.
        peak: the largest sum so far; since the last mark, where there is one.
        at_peak: `live` at that moment.
        part: what new storages are taken for; those whose last dimension is `vocabulary` are `logits`.
    """

    def __init__(self, vocabulary: int = 0, hidden: Hidden = HIDDEN_ON_CPU) -> None:
        super().__init__()
        self.hidden = hidden
        self.vocabulary = vocabulary
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self.part = "activations"
        # Storage's address -> its bytes, its part, what tells its end, and the stretch in which it began.
        self._known: dict[int, tuple[int, str, Any, str]] = {}
        # Operator -> the bytes that it hides, and whether masks may stand among its arguments.
        self._operators: dict[Any, tuple[Callable[[Sequence[Any]], int] | None, bool]] = {}
        self._spans: list[Span] = []

    def restart(self, peak: int | None = None, at_peak: Counter[str] | None = None) -> None:
        """Look for a new peak: from this one on, or from what is there now."""
        self.peak = self.total if peak is None else peak
        self.at_peak = Counter(self.live if at_peak is None else at_peak)

    def mark(self, name: str) -> None:
        """What `name` says begins here, with a peak of its own."""
        self._end_span()
        self.restart()
        self._spans.append(Span(name, Counter(self.live), Counter(), 0, Counter(), defaultdict(Counter)))

    def spans(self) -> list[Span]:
        """What happened between the marks, which are forgotten; the last one ends here."""
        self._end_span()
        found, self._spans = self._spans, []
        return found

    def begun_in(self, *names: str) -> Counter[str]:
        """Part -> bytes of what is there and began in these stretches."""
        found: Counter[str] = Counter()
        for size, part, _, begun in self._known.values():
            if begun in names:
                found[part] += size
        return found

    def _end_span(self) -> None:
        if self._spans:
            last = self._spans[-1]
            last.after, last.peak, last.at_peak = Counter(self.live), self.peak, self.at_peak

    @contextmanager
    def allocating(self, part: str) -> Iterator[None]:
        """What is new within belongs to `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def hold(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count these tensors as `part`, whatever they were taken for before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            found = self._known.get(storage._cdata)
            if found is None:
                self._add(tensor, part)
            elif found[1] != part:
                size, former, end, begun = found
                self._known[storage._cdata] = (size, part, end, begun)
                self.live[former] -= size
                self.live[part] += size

    def touch(self, size: int) -> None:
        """Bytes that are there for a moment."""
        self._note(size)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE:
            return args[0].device
        if func not in self._operators:
            name = func._schema.name
            self._operators[func] = self.hidden.get(name), name.startswith(("aten::index", "aten::_index_put"))
        hidden, masked = self._operators[func]
        if hidden:
            self.touch(hidden(args))
        if masked:
            args = _by_number(args)
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self._add(out, self.part)
        else:
            for value in tree_iter(out):
                if isinstance(value, Tensor):
                    self._add(value, self.part)
        return out

    def _add(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = int(storage.nbytes())
        if self.vocabulary and part == "activations" and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary:
            part = "logits"

        def ended(_: Any) -> None:
            size, part, _, begun = self._known.pop(key)
            self.live[part] -= size
            self.total -= size
            if self._spans:
                self._spans[-1].ended[begun][part] += size

        begun = self._spans[-1].name if self._spans else ""
        self._known[key] = (size, part, weakref.ref(storage, ended), begun)
        self.live[part] += size
        self.total += size
        self._note()

    def _note(self, extra: int = 0) -> None:
        total = self.total + extra
        if total > self.peak:
            self.peak = total
            self.at_peak = self.live + Counter({"activations": extra})


def _by_number(args: Sequence[Any]) -> Sequence[Any]:
    """Masks among an index as the places where they are true: without data, torch could not tell how many there are."""
    if len(args) < 2 or not isinstance(args[1], list | tuple):
        return args
    places: list[Any] = []
    for index in args[1]:
        mask = isinstance(index, Tensor) and index.dtype is torch.bool and not isinstance(index, FakeTensor)
        places += index.nonzero().unbind(1) if mask else [index]
    return (args[0], places, *args[2:])
