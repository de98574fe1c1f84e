"""Attention of short rows by matrix products: each row as it is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import packed, rows
from engine.kernels.packed import RowsAttention
from engine.kernels.rows import ShortRows, groups
from tests.test_kernels import distance

MIXED = [5, 1, 9, 8, 5]


def inputs(lengths: list[int], shared: int, dtype: torch.dtype, value_size: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(4, 8), (4 // shared, 8), (4 // shared, value_size)]
    return [torch.randn(1, sum(lengths), heads, size).to(dtype).transpose(1, 2) for heads, size in shapes]


def plain(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Row by row, in the formula as it is written."""
    parts = []
    for one, two, three in zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True):
        times = one.shape[1] // two.shape[1]
        scores = one @ two.repeat_interleave(times, 1).transpose(2, 3) * 0.3
        unseen = torch.ones(scores.shape[-2:]).triu(1).bool()
        parts.append(scores.masked_fill(unseen, -torch.inf).softmax(-1) @ three.repeat_interleave(times, 1))
    return torch.cat(parts, 2)


def results(node: Any, tensors: list[Tensor], *arguments: Any) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = node(*leaves, *arguments)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


@pytest.mark.parametrize("block", [256, 4])
@pytest.mark.parametrize("lengths", [MIXED, [7], [6, 6, 6]], ids=str)
@pytest.mark.parametrize("shared", [1, 2, 4])
def test_values_and_gradients(monkeypatch: pytest.MonkeyPatch, shared: int, lengths: list[int], block: int) -> None:
    monkeypatch.setattr(rows, "_BLOCK", block)
    own = inputs(lengths, shared, torch.float32)
    exact = results(plain, [t.double() for t in own], lengths)
    for found, wanted in zip(results(ShortRows.apply, own, lengths, 0.3), exact, strict=True):
        assert distance(found, wanted) < 1e-5


@pytest.mark.parametrize("block", [256, 4])
def test_bf16_errs_no_more_than_its_rounding(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(rows, "_BLOCK", block)
    own = inputs(MIXED, 2, torch.bfloat16)
    exact = results(plain, [t.double() for t in own], MIXED)
    for found, wanted in zip(results(ShortRows.apply, own, MIXED, 0.3), exact, strict=True):
        assert found.dtype == torch.bfloat16 and distance(found, wanted) < 1e-2


def test_values_of_another_size() -> None:
    own = inputs(MIXED, 1, torch.float32, value_size=3)
    exact = results(plain, [t.double() for t in own], MIXED)
    for found, wanted in zip(results(ShortRows.apply, own, MIXED, 0.3), exact, strict=True):
        assert found.shape == wanted.shape and distance(found, wanted) < 1e-5


def test_what_is_kept_for_backward_stays_small() -> None:
    def kept(length: int) -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        own = [t.requires_grad_() for t in inputs([length], 1, torch.float32)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ShortRows.apply(*own, [length], 0.3)
        return total - sum(t.numel() for t in own)

    assert kept(16) == 4 * 16 * 16
    assert kept(400) == 0


def test_rows_of_like_length_are_computed_together() -> None:
    found = groups(MIXED, 4, torch.device("cpu"))
    assert [(one.count, one.width) for one in found] == [(2, 9), (2, 5), (1, 1)]
    every = torch.cat([one.tokens for one in found if one.tokens is not None])
    assert every.sort().values.tolist() == list(range(sum(MIXED)))
    (alone,) = groups([6, 6, 6], 4, torch.device("cpu"))
    assert (alone.count, alone.width, alone.tokens) == (3, 6, None)


def test_many_rows_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_ROOM", 4 * 4 * 6 * 6 * 2)
    assert [one.count for one in groups([6] * 5, 4, torch.device("cpu"))] == [2, 2, 1]
    own = inputs([6] * 5, 2, torch.float32)
    for found, wanted in zip(
        results(ShortRows.apply, own, [6] * 5, 0.3),
        results(plain, [t.double() for t in own], [6] * 5),
        strict=True,
    ):
        assert distance(found, wanted) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "length", "chosen"),
    [
        (torch.bfloat16, 9, ShortRows),
        (torch.bfloat16, rows.LONGEST + 1, RowsAttention),
        (torch.float32, 9, RowsAttention),
    ],
)
def test_which_form_is_taken(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, length: int, chosen: Any) -> None:
    taken: list[Any] = []
    for node in (ShortRows, RowsAttention):
        real = node.apply

        def counted(*args: Any, node: Any = node, real: Any = real) -> Any:
            taken.append(node)
            return real(*args)

        monkeypatch.setattr(node, "apply", counted)
    own = inputs([length], 2, dtype)
    packed.attention(torch.nn.Identity(), *own, packed.as_mask(torch.tensor([length])), scaling=0.3)
    assert taken == [chosen]
