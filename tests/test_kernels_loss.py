"""Cross-entropy in chunks against the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import engine
from engine import kernels
from engine.kernels import loss
from engine.kernels.loss import TokenLosses, output_layer
from engine.tasks.causal_lm import TASK, Tokens, pack, pad_rows
from tests import tiny
from tests.test_kernels import distance, llama


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two tokens and windows of one, so that every test has several and a rest."""
    monkeypatch.setattr(loss, "_LEAST", 2)
    monkeypatch.setattr(loss, "_ROOM", 1)
    monkeypatch.setattr(loss, "_WINDOW", 1)


def both(hidden: Tensor, head: nn.Linear, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses, gradient) of the chunked form and of the plain one, under other weights for each token."""
    weights = torch.linspace(-1, 2, len(targets))
    found: list[Tensor] = []
    for chunked in (True, False):
        x = hidden.clone().requires_grad_()
        if chunked:
            losses = TokenLosses.apply(x, head.weight, head.bias, targets)
        else:
            losses = F.cross_entropy(head(x).float(), targets, reduction="none")
        (losses * weights).sum().backward()
        assert x.grad is not None
        found += [losses.detach(), x.grad]
    return found[0], found[1], found[2], found[3]


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients(chunks: None, bias: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=bias).requires_grad_(False)
    losses, gradient, plain, plain_gradient = both(torch.randn(7, 16) * 3, head, torch.randint(50, (7,)))
    assert distance(losses, plain) < 1e-6
    assert distance(gradient, plain_gradient) < 1e-5


def test_bf16_errs_no_more_than_the_plain_form(chunks: None) -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False).requires_grad_(False)
    hidden, targets = torch.randn(7, 16), torch.randint(50, (7,))
    half, exact = head.to(torch.bfloat16), nn.Linear(16, 50, bias=False)
    exact.weight = nn.Parameter(half.weight.double(), requires_grad=False)
    losses, gradient, plain, plain_gradient = both(hidden.to(torch.bfloat16), half, targets)
    _, _, truth, true_gradient = both(hidden.to(torch.bfloat16).double(), exact, targets)
    assert distance(losses, truth) < 1.2 * distance(plain, truth) + 1e-3
    assert distance(gradient, true_gradient) < 1.2 * distance(plain_gradient, true_gradient) + 1e-3


def test_large_logits_do_not_overflow(chunks: None) -> None:
    head = nn.Linear(4, 6, bias=False).requires_grad_(False)
    losses, gradient, plain, _ = both(torch.full((3, 4), 1e4), head, torch.tensor([0, 1, 2]))
    assert torch.isfinite(losses).all() and torch.isfinite(gradient).all()
    assert distance(losses, plain) < 1e-6


def rows() -> list[Tokens]:
    learned = [(False, True, True), (False, False, True, True, True), (False, True)]
    return [Tokens(tuple(range(1, 1 + len(flags))), flags) for flags in learned]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("adapter", [None, "lora", "prompt"])
def test_the_tasks_loss(chunks: None, layout: str, adapter: str | None) -> None:
    model: Any = llama().requires_grad_(False)
    if adapter == "lora":
        config: Any = engine.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = engine.get_peft_model(model, config)
    elif adapter == "prompt":
        if layout == "packed":
            pytest.skip("virtual tokens stand before one row")
        model = engine.get_peft_model(model, engine.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    batch = pack(rows()) if layout == "packed" else pad_rows(rows(), 0)
    assert output_layer(model) is not None
    found = compared(model, batch, learns=adapter is not None)
    for name, value in found[True].items():
        assert distance(value, found[False][name]) < 1e-5, name


def compared(model: Any, batch: dict[str, Tensor], learns: bool) -> dict[bool, dict[str, Tensor]]:
    """Chunked or not -> the loss and the gradients."""
    found: dict[bool, dict[str, Tensor]] = {}
    for chunked in (True, False):
        model.zero_grad()
        with kernels.disabled() if not chunked else torch.enable_grad():
            total = TASK.loss(model, batch).total
        if learns:
            total.backward()
        found[chunked] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found[chunked]["loss"] = total.detach()
    assert not learns or len(found[True]) > 1
    return found


def test_a_t5_with_its_scaled_output() -> None:
    from engine.tasks.seq2seq import TASK as SEQ2SEQ

    model = tiny.FAMILIES["t5"]().requires_grad_(False).eval()
    labels = torch.tensor([[5, 6, -100], [7, 8, 9]])
    batch = {"input_ids": torch.tensor([[3, 4], [5, 6]]), "labels": labels,
             "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=labels)}  # fmt: skip
    assert output_layer(model) is not None
    chunked = SEQ2SEQ.loss(model, batch)
    with kernels.disabled():
        plain = SEQ2SEQ.loss(model, batch)
    assert chunked.count == plain.count == 5 and abs(float(chunked.total - plain.total)) < 1e-4


@pytest.mark.parametrize("what", ["capped", "trained", "adapted", "hooked"])
def test_other_output_layers_are_left_alone(what: str) -> None:
    model: Any = llama().requires_grad_(False)
    if what == "capped":
        from transformers import Gemma2Config, Gemma2ForCausalLM

        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
                 "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 50}  # fmt: skip
        model = Gemma2ForCausalLM(Gemma2Config(**shape)).requires_grad_(False)
    elif what == "trained":
        model.lm_head.weight.requires_grad_()
    elif what == "adapted":
        model = engine.get_peft_model(model, engine.LoraConfig(r=2, target_modules=["lm_head"]))
    else:
        model.lm_head.register_forward_hook(lambda module, inputs, out: out * 2)
    assert output_layer(model) is None
    batch = pad_rows(rows(), 0)
    total = TASK.loss(model, batch).total
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
    plain = F.cross_entropy(logits[batch["sources"]], batch["targets"], reduction="sum")
    assert abs(float(total.detach()) - float(plain.detach())) < 1e-4


def test_no_table_of_logits_is_kept(chunks: None) -> None:
    model: Any = llama(vocab_size=3000).requires_grad_(False)
    model = engine.get_peft_model(model, engine.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    TASK.loss(model, pack(rows()))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        TASK.loss(model, pack(rows()))
    assert kept and not any(t.shape[-1] == 3000 for t in kept if t.dim() > 1)
