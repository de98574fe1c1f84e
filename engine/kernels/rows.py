"""Attention of short rows by matrix products in half precision.

    P = softmax(s Q K^T),  O = P V
    dV = P^T dO,  dP = dO V^T,  dS = P (dP - rowsum(P dP)),  dQ = s dS K,  dK = s dS^T Q

torch's kernel for processors takes one row at a time, and its backward pass is slow in half precision. Here rows of
like length lie side by side, (rows, heads, longest), filled up, and go through batched products together.
Queries go in blocks, each of a causal row against the keys up to its end, so that of a long row little more than the
half that is seen is computed. P is kept for the backward pass while it is no larger than Q, K and V, and computed again
otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LONGEST = 1024
"""Tokens of a row. From there on the scores, whose number grows with its square, cost more than torch's kernel."""
_BLOCK = 256
_LIKE = 0.75  # the shortest row of a group over its longest
_ROOM = 1 << 24  # bytes of a group's scores


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are computed together.

    Attributes:
        count: rows.
        width: tokens of the longest.
        tokens: positions in the batch, (tokens of the group); None for all of them, in their order.
        slots: where they lie in (count * width), likewise.
        filled: for each slot the token that it takes; where a row has ended, its first one.
        order: the slots in the order of the tokens, where these are all of the batch.
        block: queries that are computed at a time.
    """

    count: int
    width: int
    tokens: Tensor | None = None
    slots: Tensor | None = None
    filled: Tensor | None = None
    order: Tensor | None = None
    block: int = 256

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(first, end) of each block of queries."""
        for start in range(0, self.width, self.block):
            yield start, min(start + self.block, self.width)

    def taken(self, flat: Tensor, zeros: bool) -> Tensor:
        """(count * width, any) of (T, any).

        Where a row is shorter than the longest there are `zeros`, or what no other token sees and nobody takes: that
        is enough but for gradients from above, which would go into the keys.
        """
        if self.tokens is None or self.slots is None or self.filled is None:
            return flat
        if not zeros:
            return flat.index_select(0, self.filled)
        padded = flat.new_zeros(self.count * self.width, flat.shape[1])
        return padded.index_copy_(0, self.slots, flat.index_select(0, self.tokens))

    def given(self, padded: Tensor, flat: Tensor) -> None:
        """The inverse: into (T, any)."""
        if self.tokens is None or self.slots is None:
            flat.copy_(padded)
        elif self.order is not None:
            torch.index_select(padded, 0, self.order, out=flat)
        else:
            flat.index_copy_(0, self.tokens, padded.index_select(0, self.slots))

    def folded(self, x: Tensor, shared: int, zeros: bool = False) -> Tensor:
        """(B, H, T, d) as (count * shared, H / shared * width, d): the heads that read the same keys in one matrix."""
        heads, size = x.shape[1], x.shape[3]
        flat = self.taken(x.transpose(1, 2).reshape(-1, heads * size), zeros)
        parts = flat.view(self.count, -1, shared, heads // shared, size)
        return parts.permute(0, 2, 3, 1, 4).reshape(self.count * shared, -1, size)

    def unfolded(self, x: Tensor, width: int, shared: int, flat: Tensor) -> None:
        """The inverse of `folded`, into (B T, H d)."""
        size = x.shape[-1]
        parts = x.view(self.count, shared, -1, width, size).permute(0, 3, 1, 2, 4)
        self.given(parts.reshape(self.count * width, -1), flat)


def fits(q: Tensor, lengths: Sequence[int]) -> bool:
    """Whether this form is the faster one."""
    return q.dtype == torch.bfloat16 and q.device.type == "cpu" and max(lengths) <= LONGEST


def whole(q: Tensor, k: Tensor) -> list[Group]:
    """The rows of a batch as they are, (B, H, queries, d) and (B, H, keys, d)."""
    count, heads, width = q.shape[:3]
    fitting = _ROOM // (4 * count * heads * k.shape[2])
    return [Group(count, width, block=min(max(fitting, _BLOCK // 8), _BLOCK))]


def groups(lengths: Sequence[int], heads: int, device: torch.device) -> list[Group]:
    """Rows of like length together."""
    if torch._C._len_torch_dispatch_stack():
        # Tensors that are made under another mode are its own.
        return _groups(tuple(lengths), heads, device)
    return _known(tuple(lengths), heads, device)


def _groups(lengths: tuple[int, ...], heads: int, device: torch.device) -> list[Group]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    members: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        width = lengths[members[-1][0]] if members else 0
        room = 4 * heads * min(width, _BLOCK) * width * (len(members[-1]) + 1) if members else 0
        if members and lengths[row] >= _LIKE * width and room <= _ROOM:
            members[-1].append(row)
        else:
            members.append([row])
    if len(members) == 1 and len(set(lengths)) == 1:
        return [Group(len(lengths), lengths[0], block=_BLOCK)]
    found: list[Group] = []
    for rows in members:
        width = lengths[rows[0]]
        tokens = [starts[row] + offset for row in rows for offset in range(lengths[row])]
        slots = [number * width + offset for number, row in enumerate(rows) for offset in range(lengths[row])]
        filled = [starts[row] + (at if at < lengths[row] else 0) for row in rows for at in range(width)]
        order = sorted(range(len(tokens)), key=tokens.__getitem__) if len(members) == 1 else None
        taken, lying, filling = (torch.tensor(places, device=device) for places in (tokens, slots, filled))
        back = None if order is None else lying[torch.tensor(order, device=device)]
        found.append(Group(len(rows), width, taken, lying, filling, back, _BLOCK))
    return found


# All layers of a step ask for the same.
_known = functools.lru_cache(maxsize=4)(_groups)


@dataclass(frozen=True, slots=True)
class Sight:
    """What the queries of a row see.

    Attributes:
        causal: each token those up to itself, where there is no mask.
        mask: (B or 1, 1, queries or 1, keys), True where a query sees a key.
        seeing: (B, queries, 1), 0 for queries that see nothing, which give 0; None where all see something.
    """

    causal: bool = True
    mask: Tensor | None = None
    seeing: Tensor | None = None

    def end(self, end: int, keys: int) -> int:
        """How many keys a block of queries that ends there needs."""
        return end if self.causal and self.mask is None else keys

    def hide(self, scores: Tensor, start: int, count: int) -> None:
        """Writes over what the queries from `start`, (count * heads, queries, keys), do not see."""
        queries, keys = scores.shape[1:]
        if self.mask is not None:
            own = self.mask if self.mask.shape[2] == 1 else self.mask[:, :, start : start + queries]
            scores.view(count, -1, queries, keys).masked_fill_(~own, torch.finfo(scores.dtype).min)
        elif self.causal:
            unseen = torch.full((queries, queries), -torch.inf, dtype=scores.dtype, device=scores.device)
            scores[:, :, keys - queries :] += unseen.triu_(1)

    def of_queries(self, flat: Tensor) -> Tensor:
        """(B T, any), with zeros for the queries that see nothing."""
        return flat if self.seeing is None else flat * self.seeing.flatten(0, 1).to(flat.dtype)


CAUSAL = Sight()


def sight_of(mask: Tensor | None, causal: bool, batch: int, queries: int) -> Sight:
    """From what models hand to their attention."""
    if mask is None:
        return Sight(causal)
    seeing = mask.any(-1).expand(batch, 1, queries).transpose(1, 2)
    return Sight(False, mask, seeing)


def _block_of(x: Tensor, width: int, start: int, end: int) -> Tensor:
    """The block's queries of each head, from (any, heads * width, d)."""
    if end - start == width:
        return x
    return x.view(x.shape[0], -1, width, x.shape[2])[:, :, start:end].reshape(x.shape[0], -1, x.shape[2])


def _shares(q: Tensor, k: Tensor, start: int, queries: int, scale: float, sight: Sight, count: int) -> Tensor:
    """softmax(s Q K^T) of a block of queries against the keys that it needs, in the type of q."""
    scores = torch.bmm(q, k.transpose(1, 2)).float().mul_(scale)
    sight.hide(scores.view(-1, queries, k.shape[1]), start, count)
    return torch.softmax(scores, -1).to(q.dtype)


class ShortRows(torch.autograd.Function):
    """(B, H, T, d) from q (B, H, T, d), k and v (B, H or fewer, keys, d).

    `lengths` are those of the rows as they lie end to end in the batch, (B T) tokens. Other than causal rows have to be
    those of the batch.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, sight: Sight = CAUSAL
    ) -> Tensor:
        heads, shared, total = q.shape[1], k.shape[1], q.shape[0] * q.shape[2]
        # In the layout of the projections, so that what follows needs no copy.
        out = q.new_empty(total, heads * v.shape[3])
        alone = sight.causal and sight.mask is None
        parts = groups(lengths, heads, q.device) if alone else whole(q, k)
        kept: list[Tensor | None] = []
        for group in parts:
            one, two, three = (group.folded(t, shared) for t in (q, k, v))
            pieces = []
            shares = None
            for start, end in group.blocks():
                rows, seen = _block_of(one, group.width, start, end), sight.end(end, two.shape[1])
                shares = _shares(rows, two[:, :seen], start, end - start, scale, sight, group.count)
                pieces.append(torch.bmm(shares, three[:, :seen]))
            group.unfolded(_joined(pieces, heads // shared), group.width, shared, out)
            small = two.shape[1] * heads <= q.shape[3] * (heads + 2 * shared)
            kept.append(shares if small and len(pieces) == 1 else None)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.parts, ctx.scale, ctx.sight = parts, scale, sight
        return sight.of_queries(out).view(q.shape[0], q.shape[2], heads, -1).transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        shared, sight = k.shape[1], ctx.sight
        if sight.seeing is not None:
            grad = grad * sight.seeing[:, None].to(grad.dtype)
        found = [t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]) for t in (q, k, v)]
        for group, shares in zip(ctx.parts, kept, strict=True):
            one, two, three = (group.folded(t, shared) for t in (q, k, v))
            above = group.folded(grad, shared, zeros=True)
            results = _gradients(one, two, three, above, shares, group, ctx.scale, sight)
            keys = two.shape[1]
            for result, width, into in zip(results, (group.width, keys, keys), found, strict=True):
                group.unfolded(result, width, shared, into.flatten(2).flatten(0, 1))
        return *(t.transpose(1, 2) for t in found), None, None, None


def _joined(pieces: list[Tensor], heads: int) -> Tensor:
    """The blocks of queries of each head one after another again."""
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([piece.view(piece.shape[0], heads, -1, piece.shape[2]) for piece in pieces], 2)


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, shares: Tensor | None, group: Group, scale: float, sight: Sight
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of q, k and v, each folded."""
    pieces: list[Tensor] = []
    width = group.width
    dk = dv = None
    for start, end in group.blocks():
        rows, above = (_block_of(t, width, start, end) for t in (q, grad))
        seen = sight.end(end, k.shape[1])
        keys, values = k[:, :seen], v[:, :seen]
        p = _shares(rows, keys, start, end - start, scale, sight, group.count) if shares is None else shares
        ds = torch.bmm(above, values.transpose(1, 2)).float()
        # The scale here once in place of twice below.
        ds = torch._softmax_backward_data(ds, p.float(), -1, torch.float32).mul_(scale).to(q.dtype)
        pieces.append(torch.bmm(ds, keys))
        own = torch.bmm(ds.transpose(1, 2), rows), torch.bmm(p.transpose(1, 2), above)
        if end - start == width:
            return pieces[0], *own
        if dk is None or dv is None:
            # A key's gradient is a sum over the blocks: in float32, or each would round it.
            dk, dv = (t.new_zeros(t.shape, dtype=torch.float32) for t in (k, v))
        dk[:, :seen] += own[0]
        dv[:, :seen] += own[1]
    assert dk is not None and dv is not None
    return _joined(pieces, q.shape[1] // width), dk.to(k.dtype), dv.to(v.dtype)
