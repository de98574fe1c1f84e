"""Layers that read the same input as one node: the values and gradients of each by itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import engine
from engine import bnb, kernels
from engine.adapters.lorafa import LoRAFAConfig
from engine.kernels.together import TogetherLinears
from tests.test_kernels import distance, llama, losses

SIZE, TOKENS = 64, 12


class Attention(nn.Module):
    """Three layers over one input, of other widths, and one over another; `order` is who is called when."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(SIZE, 64, bias=False), nn.Linear(SIZE, 32), nn.Linear(SIZE, 32)
        self.o = nn.Linear(32, SIZE)
        self.order = "qkv"

    def forward(self, x: Tensor) -> Tensor:
        found = {}
        for name in self.order:
            found[name] = getattr(self, name)(x)
        result: Tensor = self.o(found["q"][..., :32] * found["k"] + found.get("v", torch.zeros(())))
        return result


def adapted(kind: str = "plain", method: Any = engine.LoraConfig, base: nn.Module | None = None, **own: Any) -> Any:
    torch.manual_seed(0)
    module = base or Attention()
    if kind == "nf4":
        module = bnb.quantize_model(module, "nf4")
    config = method(**{"r": 4, "lora_alpha": 6, "target_modules": ["q", "k", "v", "o"], **own})
    model = engine.get_peft_model(module, config)
    if kind == "bf16":
        for layer in model.get_base_model().children():
            layer.base_layer.to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.train()


def step(model: Any, x: Tensor, run: Any = None) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(5)
    out = (run or model)(x)
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    assert x.grad is not None
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "input": x.grad, **found}


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each group had that was computed."""
    seen: list[int] = []
    real = TogetherLinears.apply

    def counted(x: Tensor, products: Any, *factors: Tensor) -> Any:
        seen.append(len(products))
        return real(x, products, *factors)

    monkeypatch.setattr(TogetherLinears, "apply", counted)
    return seen


def compared(model: Any, x: Tensor, run: Any = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    for _ in range(2):
        step(model, x, run)
    fused = step(model, x, run)
    with kernels.disabled():
        plain = step(model, x, run)
    assert fused.keys() == plain.keys() and len(fused) > 5
    return fused, plain


@pytest.mark.parametrize("kind", ["plain", "nf4"])
@pytest.mark.parametrize("method", [engine.LoraConfig, LoRAFAConfig])
def test_values_and_gradients(groups: list[int], method: Any, kind: str) -> None:
    fused, plain = compared(adapted(kind, method), torch.randn(2, TOKENS, SIZE))
    assert groups == [3, 3]
    for name, value in plain.items():
        assert distance(fused[name], value) < 1e-5, name


def test_ranks_and_scales_of_each_layer(groups: list[int]) -> None:
    model = adapted(rank_pattern={"k": 2}, alpha_pattern={"v": 31})
    fused, plain = compared(model, torch.randn(TOKENS, SIZE))
    assert groups == [3, 3]
    for name, value in plain.items():
        assert distance(fused[name], value) < 1e-5, name


def test_bf16_errs_no_more_than_the_plain_formula(groups: list[int]) -> None:
    model = adapted("bf16")
    x = torch.randn(TOKENS, SIZE).bfloat16()
    fused, plain = compared(model, x)
    assert groups == [3, 3]
    exact = copy.deepcopy(model)
    for layer in exact.get_base_model().children():
        layer.base_layer.double()
    with kernels.disabled():
        truth = step(exact, x.double())
    for name, value in truth.items():
        assert distance(fused[name], value) < 1.1 * distance(plain[name], value) + 2e-3, name


@pytest.mark.parametrize("mixed", [False, True])
def test_part_of_the_layers(groups: list[int], mixed: bool) -> None:
    """Two of three have an adapter; or what is called between two of them does not belong to them."""
    model = adapted(target_modules=["q", "v", "o"] if mixed else ["q", "k"])
    fused, plain = compared(model, torch.randn(TOKENS, SIZE))
    assert groups == [2, 2]
    for name, value in plain.items():
        assert distance(fused[name], value) < 1e-5, name


@pytest.mark.parametrize("own", [{"lora_dropout": 0.3}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_what_needs_a_node_of_its_own_has_it(groups: list[int], own: dict[str, Any]) -> None:
    fused, plain = compared(adapted(**own), torch.randn(TOKENS, SIZE))
    assert groups == []
    for name, value in plain.items():
        assert distance(fused[name], value) < 1e-5, name


@pytest.mark.parametrize("order", ["kqv", "qk", "qkqv"])
def test_a_pass_that_goes_another_way_than_the_first(groups: list[int], order: str) -> None:
    model, x = adapted(), torch.randn(TOKENS, SIZE)
    for _ in range(2):
        step(model, x)
    model.get_base_model().order = order
    for _ in range(2):
        found = step(model, x)
    with kernels.disabled():
        plain = step(model, x)
    for name, value in plain.items():
        assert distance(found[name], value) < 1e-5, name
    # Nothing is held back for a call that never comes.
    seen = len(groups)
    step(model, x)
    assert order == "kqv" or len(groups) == seen


def test_another_input_between_two_calls(groups: list[int]) -> None:
    class Other(Attention):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.o(self.q(x)[..., :32] * self.k(x * 1.0) + self.v(x))
            return result

    fused, plain = compared(adapted(base=Other()), torch.randn(TOKENS, SIZE))
    assert groups == []
    for name, value in plain.items():
        assert distance(fused[name], value) < 1e-5, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(groups: list[int], reentrant: bool) -> None:
    model = adapted()
    run = lambda value: checkpoint(model, value, use_reentrant=reentrant)  # noqa: E731
    if not reentrant:
        # As a loop's look at the model before its first step does.
        with torch.no_grad():
            model(torch.randn(2, SIZE))
    fused, plain = compared(model, torch.randn(TOKENS, SIZE), run)
    assert groups and set(groups) == {3}
    for name, value in plain.items():
        assert distance(fused[name], value) < 1e-5, name


def test_a_checkpointed_pass_is_repeated_in_the_form_it_began_in(groups: list[int]) -> None:
    model, x = adapted(), torch.randn(TOKENS, SIZE).requires_grad_()
    out: Any = checkpoint(model, x, use_reentrant=False)
    with torch.no_grad():
        model(x)
        model(x)
    out.sum().backward()
    assert x.grad is not None and not groups


def test_a_mixed_batch_ends_no_group(groups: list[int]) -> None:
    """A checkpointed pass that waits for its backward is repeated in the form that it began in."""
    model = adapted()
    model.add_adapter("other", engine.LoraConfig(r=2, target_modules=["q", "k", "v"], init_lora_weights=False))
    model.set_adapter("default")
    model.train()
    first, second = (torch.randn(2, SIZE).requires_grad_() for _ in range(2))
    with torch.no_grad():
        model(first)
    out: Any = checkpoint(model, first, use_reentrant=False)
    mixed = model(second, adapter_names=["default", "other"])
    (out.sum() + mixed.sum()).backward()
    assert first.grad is not None and second.grad is not None and set(groups) == {3} and len(groups) == 2


def test_a_pass_that_breaks_off_leaves_nothing_and_ends_nothing(groups: list[int]) -> None:
    model, x = adapted(), torch.randn(TOKENS, SIZE)
    before = [step(model, x) for _ in range(2)][1]
    layer: Any = model.get_base_model().k
    handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x.clone().requires_grad_())
    handle.remove()
    assert layer.siblings._ready
    model.eval()
    assert not layer.siblings._ready and layer.siblings._source is None
    model.train()
    groups.clear()
    handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x.clone().requires_grad_())
    handle.remove()
    after = step(model, x)
    assert groups == [3, 3] and distance(after["output"], before["output"]) < 1e-6


def test_lorafa_keeps_no_input(groups: list[int]) -> None:
    kept: list[int] = []
    model, x = adapted(method=LoRAFAConfig), torch.randn(TOKENS, SIZE)
    for _ in range(2):
        wanted = step(model, x)
    source = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        model(source)
    assert groups and source.data_ptr() not in kept
    assert set(wanted) > {"output", "input"}


def test_copies_and_later_adapters_watch_anew(groups: list[int]) -> None:
    model, x = adapted(target_modules=["q", "k"]), torch.randn(TOKENS, SIZE)
    for _ in range(2):
        before = step(model, x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    fused, plain = compared(twin, x)
    for name, value in plain.items():
        assert distance(fused[name], value) < 1e-5, name
    assert distance(step(model, x)["output"], before["output"]) < 1e-6
    model.add_adapter("wider", engine.LoraConfig(r=2, target_modules=["q", "k", "v"], init_lora_weights=False))
    model.set_adapter("wider")
    groups.clear()
    fused, plain = compared(model.train(), x)
    assert groups == [3, 3]
    for name, value in plain.items():
        assert distance(fused[name], value) < 1e-5, name


def test_a_whole_model(groups: list[int]) -> None:
    model: Any = engine.get_peft_model(
        llama(), engine.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    )
    model.train()
    losses(model)
    loss, found = losses(model)
    # Queries, keys and values; the gate and its factor; of two blocks.
    assert groups == [3, 2] * 2
    with kernels.disabled():
        plain_loss, plain = losses(model)
    assert abs(loss - plain_loss) < 1e-5
    for name, value in plain.items():
        assert distance(found[name], value) < 2e-5, name
