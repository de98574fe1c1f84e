"""A mixed batch at one layer: what each row's adapters add, LoRA's thin products stacked for all rows at once.

With adapters 1..k of ranks r_j in the batch, A = [A_1; ...; A_k]: (R, in), B = [B_1, ..., B_k]^T: (R, out), and for
batch row n the factors m_n: (R), which are w_nj s_j at adapter j's places, 0 for the adapters that the row has not:

    y_n += ((x_n A^T) * m_n) B + sum_j w_nj s_j b_j

That is one pair of products where a loop over adapters takes 2 k, or, where rows have few adapters each, a pair of
batched products in which each row meets its own part of A and B alone. PiSSA's offset counts as more rank: [A; A0] and
[B, -B0].

The stacks are kept while the rows and the adapters' tensors stay as they are, as from one generated token to the next.
They carry no gradient: where one is wanted, in training, and for all other methods, each adapter computes its change of
its rows by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.adapters.base import Mix
from engine.adapters.lowrank import LowRankLinear
from engine.errors import EngineError

if TYPE_CHECKING:
    from engine.layers import AdapterLayer

# Above so many rows a loop over adapters has large products, and a stack for each row would be large too.
MOST_ROWS = 16


def parts(layer: AdapterLayer, x: Tensor, rows: Sequence[Mix]) -> Iterator[tuple[str, float, Tensor]]:
    """(adapter, weight, the batch rows that have it so); a batch n times as long holds n beams a row, in order.

    Raises:
        EngineError: an adapter is merged, or the batch is no multiple of the rows.
    """
    times = _times(layer, x, rows)
    for adapter, weight in dict.fromkeys(term for mix in rows for term in mix):
        if layer.holds(adapter):
            index = [i * times + k for i, mix in enumerate(rows) if (adapter, weight) in mix for k in range(times)]
            yield adapter, weight, torch.tensor(index, device=x.device)


def _times(layer: AdapterLayer, x: Tensor, rows: Sequence[Mix]) -> int:
    if layer.merged:
        raise EngineError(
            f"A mixed batch needs unmerged adapters; {', '.join(layer.merged)} is merged.",
            "Call unmerge_adapter() first.",
        )
    if x.shape[0] % len(rows):
        raise EngineError(
            f"adapter_names has {len(rows)} names and the batch {x.shape[0]} rows; needed: one name a row."
        )
    return x.shape[0] // len(rows)


def changed(layer: AdapterLayer, x: Tensor, y: Tensor, out: Tensor, rows: list[Mix]) -> Tensor:
    """`out` with what each row's adapters add to it.

    Args:
        x: the layer's input, as it came.
        y: the base layer's output for `x`, which methods that build on it read.
        out: the base layer's output, for a shifted input where adapters shift it.
    """
    stack = layer.stack.fitting(layer, x, rows)
    if stack is not None:
        _times(layer, x, rows)
        out = stack.added(x, out)
        if not stack.left:
            return out
        rows = [tuple(term for term in mix if term[0] in stack.left) for mix in rows]
    for adapter, weight, index in parts(layer, x, rows):
        change = layer._change(adapter, x.index_select(0, index), y.index_select(0, index), weight)
        if change is not None:
            out = out.index_add(0, index, change.to(out.dtype).expand(len(index), *out.shape[1:]))
    return out


class Stack:
    """The stacked tensors of one layer for the rows of one batch, and the tensors that they were made of.

    Attributes:
        left: adapters of the rows that are not in the stack.
    """

    def __init__(self) -> None:
        self._clear()

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles of a model start empty: their tensors are others.
        return (Stack, ())

    def forget(self) -> None:
        if self._rows is not None:
            self._clear()

    def _clear(self) -> None:
        self._rows: list[Mix] | None = None
        self._made: dict[str, LowRankLinear] = {}
        self._marks = _Marks()
        self.left: frozenset[str] = frozenset()

    def fitting(self, layer: AdapterLayer, x: Tensor, rows: list[Mix]) -> Stack | None:
        """The stack for these rows and this input, made anew where anything changed; None where a loop has to do it."""
        if len(rows) > MOST_ROWS or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        if not self._holds(layer, x, rows):
            self._make(layer, x, rows)
        return self if self._made else None

    def _holds(self, layer: AdapterLayer, x: Tensor, rows: list[Mix]) -> bool:
        if self._rows != rows or self._type is not x.dtype or self._device != x.device:
            return False
        here = layer.adapters._modules
        return all(map(is_, map(here.get, self._made), self._made.values())) and self._marks.hold()

    def _make(self, layer: AdapterLayer, x: Tensor, rows: list[Mix]) -> None:
        self.forget()
        names = [name for name in dict.fromkeys(name for mix in rows for name, _ in mix) if layer.holds(name)]
        fit = {name: weights for name in names if (weights := _stackable(layer, name)) is not None}
        self._rows, self._type, self._device = rows, x.dtype, x.device
        self.left = frozenset(names) - fit.keys()
        if not fit:
            return
        self._made, self._marks = fit, _Marks(list(fit.values()))
        # On a CPU products this thin are faster in float32, casts included.
        wide = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
        place: dict[str, Any] = {"dtype": wide, "device": x.device}
        matrices = [weights.matrices() for weights in fit.values()]
        a = torch.cat([a for a, _ in matrices]).to(**place)
        b = torch.cat([b.T for _, b in matrices]).to(**place)
        shares = [[dict(mix).get(name, 0.0) * weights.scale for name, weights in fit.items()] for mix in rows]
        owner = [j for j, (matrix, _) in enumerate(matrices) for _ in range(len(matrix))]
        factors = torch.tensor([[share[j] for j in owner] for share in shares], **place)
        own = [[i for i, j in enumerate(owner) if share[j]] for share in shares]
        width = max(len(places) for places in own)
        self._wide, self._by_row = wide, len(rows) * width < 2 * len(owner)
        self._bias = _biases(list(fit.values()), shares, place)
        if self._by_row:
            index = torch.tensor([places + [0] * (width - len(places)) for places in own], device=x.device)
            kept = torch.tensor([[1.0] * len(p) + [0.0] * (width - len(p)) for p in own], **place)
            a, b = a[index].transpose(1, 2), b[index] * (factors.gather(1, index) * kept)[..., None]
        else:
            a, factors = a.T, factors[:, None]
        self._a, self._b, self._factors = a, b, factors

    def added(self, x: Tensor, out: Tensor) -> Tensor:
        """`out` (rows * beams, ..., out) plus the change, for `x` (rows * beams, ..., in)."""
        rows, y = len(self._a) if self._by_row else len(self._factors), out
        if x.dim() != 3 or len(x) != rows:
            x, y = x.reshape(rows, -1, x.shape[-1]), out.reshape(rows, -1, out.shape[-1])
        if x.dtype is not self._wide:
            x = x.to(self._wide)
        if self._by_row:
            h = torch.bmm(x, self._a)
            found = torch.baddbmm(y, h, self._b) if y.dtype is h.dtype else y + torch.bmm(h, self._b).to(y.dtype)
        else:
            found = y + ((x @ self._a).mul_(self._factors) @ self._b).to(y.dtype)
        if self._bias is not None:
            found = found + self._bias.to(found.dtype)
        return found if y is out else found.view(out.shape)


def _stackable(layer: AdapterLayer, name: str) -> LowRankLinear | None:
    """An adapter's weights if `LowRankLinear.delta` is all that it does here, and it drops nothing out."""
    weights = layer.adapters._modules.get(name)
    if not isinstance(weights, LowRankLinear) or type(weights).delta is not LowRankLinear.delta:
        return None
    if name in layer.biases or weights.training or weights.shifts_input or weights.lora_A.weight.is_meta:
        return None
    # An inference tensor counts no versions, so that nobody could tell when it changes.
    return None if any(tensor.is_inference() for tensor in weights.state_dict(keep_vars=True).values()) else weights


class _Marks:
    """What adapters' weights at one layer were: scales, tensors, the tensors' versions and places in memory.

    It is asked at each layer for each token, so it looks into the dictionaries that hold the tensors.
    """

    def __init__(self, own: Sequence[LowRankLinear] = ()) -> None:
        self._own = own
        holders = [h for weights in own for module in weights.modules() for h in (module._parameters, module._buffers)]
        self._slots: list[tuple[dict[str, Any], str]] = [(holder, name) for holder in holders for name in holder]
        self._tensors = [holder[name] for holder, name in self._slots]
        self._there = [tensor for tensor in self._tensors if tensor is not None]
        self._versions, self._places, self._scales = self._now()

    def hold(self) -> bool:
        """Whether all is as it was. Changes through `.data` that stay in place escape this, as they escape autograd."""
        if not all(map(is_, [holder[name] for holder, name in self._slots], self._tensors)):
            return False
        return (self._versions, self._places, self._scales) == self._now()

    def _now(self) -> tuple[list[int], list[int], list[tuple[float, bool]]]:
        there = self._there
        scales = [(weights.scale, weights.training) for weights in self._own]
        return [t._version for t in there], [t.data_ptr() for t in there], scales


def _biases(own: Sequence[LowRankLinear], shares: Sequence[Sequence[float]], place: dict[str, Any]) -> Tensor | None:
    """sum_j w_nj s_j b_j of each row: (rows, 1, out); None if no adapter has a bias."""
    found = [(j, weights.lora_B.bias) for j, weights in enumerate(own) if weights.lora_B.bias is not None]
    if not found:
        return None
    weights = torch.tensor([[share[j] for j, _ in found] for share in shares], **place)
    return (weights @ torch.stack([bias.to(**place) for _, bias in found]))[:, None]
