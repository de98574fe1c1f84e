"""Attention of packed rows: each row as it is alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import engine
from engine import kernels
from engine.kernels import packed
from engine.kernels.packed import RowsAttention
from engine.models.loading import load_causal_lm
from engine.tasks.base import Loaded
from engine.tasks.causal_lm import TASK, Tokens, pack
from tests.test_kernels import distance, llama

LENGTHS = [5, 1, 9]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Row by row, in torch's reference formula."""
    parts = []
    for one, two, three in zip(q.split(LENGTHS, 2), k.split(LENGTHS, 2), v.split(LENGTHS, 2), strict=True):
        times = one.shape[1] // two.shape[1]
        scores = one @ two.repeat_interleave(times, 1).transpose(2, 3) * 0.3
        unseen = torch.ones(scores.shape[-2:]).triu(1).bool()
        weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        parts.append(weights @ three.repeat_interleave(times, 1))
    return torch.cat(parts, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [1, 2, 4])
def test_values_and_gradients(shared: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), 8) for heads in (4, 4 // shared, 4 // shared)]
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    out, wanted = RowsAttention.apply(*inputs, LENGTHS, 0.3), plain(*exact)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    (out.float() * weight).sum().backward()
    (wanted * weight).sum().backward()
    limit = 1e-5 if dtype is torch.float32 else 1e-2
    assert distance(out, wanted) < limit
    for one, other in zip(inputs, exact, strict=True):
        assert one.grad is not None and other.grad is not None and distance(one.grad, other.grad) < limit


def rows() -> list[Tokens]:
    flags = [(False, True, True, True, True), (False, False), (False, *(True,) * 8)]
    return [Tokens(tuple(range(3, 3 + len(own))), own) for own in flags]


def trained(model: Any) -> Any:
    config = engine.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    made = engine.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    return made.train()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_and_unpacked_losses_and_gradients_agree(checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = trained(llama())
    assert packed.install(model)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.get_base_model().enable_input_require_grads()
    found: list[dict[str, Tensor]] = []
    for batches in ([pack(rows(), apart=True)], [pack([row]) for row in rows() if row.targets]):
        model.zero_grad()
        total = torch.stack([TASK.loss(model, batch).total for batch in batches]).sum()
        total.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": total.detach(), **grads})
    assert len(found[0]) > 1
    for name, value in found[0].items():
        assert distance(value, found[1][name]) < 1e-5, name


def test_the_tasks_batches_carry_lengths_and_the_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(llama())
    batch = TASK.collator(Loaded(model, None))(rows())
    assert batch["row_lengths"].tolist() == [5, 2, 9]
    calls: list[int] = []
    real = RowsAttention.apply

    def counted(*args: Any) -> Any:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(RowsAttention, "apply", counted)
    fast = float(TASK.loss(model, batch).total.detach())
    assert len(calls) == 2
    with kernels.disabled():
        masked = float(TASK.loss(model, batch).total.detach())
    assert len(calls) == 2 and abs(fast - masked) < 1e-4
    del batch["row_lengths"]
    assert abs(float(TASK.loss(model, batch).total.detach()) - masked) < 1e-4 and len(calls) == 2


def test_rows_longer_than_a_sliding_window_keep_the_mask() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 50, "sliding_window": 6}  # fmt: skip
    model = MistralForCausalLM(MistralConfig(**shape)).eval()
    collate = TASK.collator(Loaded(model, None))
    assert "row_lengths" not in collate(rows())
    if model.config._attn_implementation == packed.NAME:
        assert "row_lengths" in collate(rows()[:2])
    found = float(TASK.loss(model, collate(rows())).total.detach())
    alone = sum(float(TASK.loss(model, pack([row])).total.detach()) for row in rows() if row.targets)
    assert abs(found - alone) < 1e-3


def test_a_model_that_reads_its_mask_is_left_alone() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, attn_implementation="eager"))
    assert not packed.install(model) and model.config._attn_implementation == "eager"


def test_answers_and_saved_configs_are_as_before(tmp_path: Path) -> None:
    model, _ = load_causal_lm("tiny-llama", precision="fp32")
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert packed.install(model)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), before)
    model.save_pretrained(tmp_path)
    assert packed.NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_dropout_of_attention_takes_the_mask() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, sum(LENGTHS), 8) for _ in range(3))
    module = torch.nn.Identity().eval()
    mask = packed.as_mask(torch.tensor(LENGTHS))
    torch.manual_seed(1)
    found, _ = packed.attention(module, q, k, v, mask, dropout=0.5, scaling=0.3)
    torch.manual_seed(1)
    wanted = F.scaled_dot_product_attention(q, k, v, packed._blocks(LENGTHS, q.device), dropout_p=0.5, scale=0.3)
    assert torch.equal(found, wanted.transpose(1, 2))
