"""Attention of short rows by matrix products: each row as it is alone."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import engine
from engine import kernels
from engine.kernels import packed, rows
from engine.kernels.packed import RowsAttention
from engine.kernels.rows import ShortRows, groups
from tests.test_kernels import distance, llama

MIXED = [5, 1, 9, 8, 5]


@pytest.fixture(autouse=True)
def forgotten() -> None:
    """What other tests' blocks and rooms have led to."""
    rows._known.cache_clear()


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
@pytest.mark.parametrize("lengths", [MIXED, [7], [6, 6, 6], [7, 9, 8]], ids=str)
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
    assert all(one.order is None for one in found)
    (like,) = groups([7, 9, 8], 4, torch.device("cpu"))
    assert like.order is not None and like.slots is not None and like.tokens is not None
    assert torch.equal(like.order[like.tokens], like.slots)
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


def of_a_batch(rows_of: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(rows_of, length, heads, 8).to(dtype).transpose(1, 2) for heads in (4, 2, 2)]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_without_a_mask(batch: int) -> None:
    own = of_a_batch(batch, 6, torch.float32)
    found = results(ShortRows.apply, own, [6] * batch, 0.3)

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([plain(*(t[i : i + 1] for t in (q, k, v)), [6]) for i in range(batch)])

    for one, wanted in zip(found, results(alone, [t.double() for t in own]), strict=True):
        assert one.shape == wanted.shape and distance(one, wanted) < 1e-5


def visible(kind: str, batch: int, queries: int, keys: int) -> Tensor:
    """(batch, 1, queries, keys): a causal row after a prefix, one filled up on the left, every key but some."""
    mask = torch.ones(batch, 1, queries, keys).tril(keys - queries).bool()
    if kind == "padded":
        mask[0, :, :, :2] = False
        mask[0, :, :2] = False
    elif kind == "bidirectional":
        mask[:] = True
        mask[1, :, :, -3:] = False
    return mask


@pytest.mark.parametrize("block", [256, 4])
@pytest.mark.parametrize(("kind", "keys"), [("prefix", 9), ("padded", 6), ("bidirectional", 6), ("bidirectional", 11)])
def test_a_batch_with_a_mask(monkeypatch: pytest.MonkeyPatch, kind: str, keys: int, block: int) -> None:
    monkeypatch.setattr(rows, "_ROOM", 4 * 2 * 4 * keys * block)
    monkeypatch.setattr(rows, "_BLOCK", 32 if block == 4 else 256)
    torch.manual_seed(0)
    shapes = [(6, 4), (keys, 2), (keys, 2)]
    own = [torch.randn(2, length, heads, 8).transpose(1, 2) for length, heads in shapes]
    mask = visible(kind, 2, 6, keys)
    found = results(ShortRows.apply, own, [6, 6], 0.3, rows.sight_of(mask, False, 2, 6))
    if block == 4:
        assert rows.whole(own[0], own[1])[0].block == 4

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)

    for one, wanted in zip(found, results(reference, [t.double() for t in own]), strict=True):
        assert one.shape == wanted.shape and distance(one, wanted) < 1e-5


def test_every_query_sees_every_key_without_a_mask() -> None:
    own = of_a_batch(2, 6, torch.float32)
    found = results(ShortRows.apply, own, [6, 6], 0.3, rows.sight_of(None, False, 2, 6))

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, *(t.repeat_interleave(2, 1) for t in (k, v)), scale=0.3)

    for one, wanted in zip(found, results(reference, [t.double() for t in own]), strict=True):
        assert distance(one, wanted) < 1e-5


@pytest.mark.parametrize(
    ("why", "taken"),
    [("causal", True), ("not causal", True), ("mask", True), ("no gradient", False), ("float32", False),
     ("fewer queries", False), ("dropout", False), ("disabled", False), ("biased", False)],
)  # fmt: skip
def test_which_batches_go_by_products(monkeypatch: pytest.MonkeyPatch, why: str, taken: bool) -> None:
    calls: list[int] = []
    real = ShortRows.apply
    monkeypatch.setattr(ShortRows, "apply", lambda *args: calls.append(1) or real(*args))
    q, k, v = of_a_batch(2, 6, torch.float32 if why == "float32" else torch.bfloat16)
    if why == "fewer queries":
        q = q[:, :, -2:]
    module: Any = torch.nn.Module()
    module.is_causal = why != "not causal"
    module.num_key_value_groups = 2
    q.requires_grad_(why != "no gradient")
    mask = visible("padded", 2, 6, 6) if why in ("mask", "biased") else None
    if why == "biased":
        mask = mask.to(q.dtype)
    options = {"scaling": 0.3, "dropout": 0.5 if why == "dropout" else 0.0}
    with kernels.disabled() if why == "disabled" else contextlib.nullcontext():
        out, _ = packed.attention(module, q, k, v, mask, **options)
    assert bool(calls) is taken
    if taken:
        wanted, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=0.3)
        assert out.shape == wanted.shape and distance(out, wanted) < 1e-2


def test_an_encoder_keeps_its_own_masks() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = BertForSequenceClassification(BertConfig(**shape, vocab_size=50, hidden_dropout_prob=0.0,
                                                    attention_probs_dropout_prob=0.0)).to(torch.bfloat16)  # fmt: skip
    config = engine.LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    model: Any = engine.get_peft_model(base, config).train()
    batch = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.tensor([0, 1]),
             "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}  # fmt: skip
    loss = model(**batch).loss
    assert base.config._attn_implementation == packed.OWN and not packed.installed(model)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with kernels.disabled():
        plain = model(**batch).loss
        plain.backward()
    assert abs(float((loss - plain).detach())) < 0.02
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and float(parameter.grad.norm()) > 1e-4:
            assert distance(found[name], parameter.grad) < 0.1, name


def test_a_model_in_half_precision_is_asked_at_its_first_training_pass() -> None:
    base = llama().to(torch.bfloat16)
    base.model.layers[0].eval()
    model: Any = engine.get_peft_model(base, engine.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    base.model.layers[1].train()
    assert base.config._attn_implementation == "sdpa"
    ids = torch.arange(40).view(2, 20)
    model.eval()(input_ids=ids)
    assert base.config._attn_implementation == "sdpa"
    model.train()
    base.model.layers[0].eval()
    loss = model(input_ids=ids, labels=ids).loss
    assert base.config._attn_implementation == packed.NAME
    assert base.model.layers[1].training and not base.model.layers[0].training
    with kernels.disabled():
        assert abs(float((loss - model(input_ids=ids, labels=ids).loss).detach())) < 0.02
    model.unload()
    assert base.config._attn_implementation == "sdpa"
