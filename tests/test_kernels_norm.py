"""A frozen RMS norm as one node: the class's own values and gradients, in less room."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import engine
from engine import kernels
from engine.kernels import norm
from engine.kernels.norm import FrozenNorm
from tests.test_kernels import distance, llama, losses

SIZE = 24


def made(kind: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = kind(SIZE, eps=1e-2)
    nn.init.uniform_(module.weight, -2, 2)  # type: ignore[arg-type]
    module = module.to(dtype).requires_grad_(False)
    norm.install(module)
    return module


def results(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = module(x)
    (gradient,) = torch.autograd.grad(out, x, torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
    return out.detach(), gradient


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm, T5LayerNorm])
@pytest.mark.parametrize("shape", [(2, 5, SIZE), (1, 3, 4, SIZE)])
def test_values_and_gradients(kind: Any, shape: tuple[int, ...]) -> None:
    module, x = made(kind), torch.randn(shape)
    out, gradient = results(module, x)
    assert "FrozenNorm" in type(module(x.requires_grad_()).grad_fn).__name__
    with kernels.disabled():
        plain, plain_gradient = results(module, x)
    assert torch.equal(out, plain) and distance(gradient, plain_gradient) < 1e-5


def test_bf16_errs_no_more_than_the_class_itself() -> None:
    module, x = made(LlamaRMSNorm, torch.bfloat16), torch.randn(40, SIZE).bfloat16()
    out, gradient = results(module, x)
    with kernels.disabled():
        plain, plain_gradient = results(module, x)
        x64 = x.double().requires_grad_()
        exact = x64 * (x64.square().mean(-1, keepdim=True) + 1e-2).rsqrt() * module.weight.double()  # type: ignore[operator]
        weight = torch.linspace(-1, 1, out.numel()).view(out.shape).bfloat16().double()
        (truth,) = torch.autograd.grad(exact, x64, weight)
    assert torch.equal(out, plain)
    assert distance(gradient, truth) < 1.05 * distance(plain_gradient, truth) + 1e-4


def test_large_values_in_double_precision() -> None:
    x = (torch.randn(3, SIZE, dtype=torch.float64) * 10).requires_grad_()
    weight = torch.randn(SIZE, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda value: FrozenNorm.apply(value, weight, 0.3), (x,))


def test_only_the_input_and_a_number_a_token_are_kept() -> None:
    module, kept = made(LlamaRMSNorm, torch.bfloat16), []
    x = torch.randn(40, SIZE).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
    shapes = sorted((tuple(t.shape), t.dtype) for t in kept)
    assert shapes == [((SIZE,), torch.bfloat16), ((40, 1), torch.float32), ((40, SIZE), torch.bfloat16)]


class Capped(LlamaRMSNorm):  # type: ignore[misc]
    """Built like an RMS norm, and another formula."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        result: Tensor = super().forward(hidden_states).clamp(-1, 1)
        return result


@pytest.mark.parametrize(
    "module", [GemmaRMSNorm(SIZE), Capped(SIZE), nn.LayerNorm(SIZE)], ids=lambda m: type(m).__name__
)
def test_other_norms_are_left_alone(module: nn.Module) -> None:
    norm.install(module)
    assert "forward" not in module.__dict__


def test_a_norm_that_learns_takes_its_own_forward() -> None:
    module = made(LlamaRMSNorm).requires_grad_()
    out = module(torch.randn(3, SIZE))
    assert "FrozenNorm" not in type(out.grad_fn).__name__
    out.sum().backward()
    assert module.weight.grad is not None


@pytest.mark.parametrize("method", [engine.LoraConfig, engine.IA3Config, engine.PrefixTuningConfig])
def test_a_model_has_them_with_every_method_and_loses_them_with_its_adapter(method: Any) -> None:
    base = llama()
    own = {"num_virtual_tokens": 4} if method is engine.PrefixTuningConfig else {}
    model = engine.get_peft_model(base, method(task_type="CAUSAL_LM", **own)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    assert isinstance(base.model.norm.forward.func, type(norm.forward))  # type: ignore[union-attr]
    loss, found = losses(model)
    with kernels.disabled():
        plain_loss, plain = losses(model)
    assert abs(loss - plain_loss) < 1e-5 and found
    for name, value in plain.items():
        assert distance(found[name], value) < 2e-5, name
    twin: Any = copy.deepcopy(model)
    twin.get_base_model().model.norm.weight.data.mul_(3)
    assert abs(losses(model)[0] - loss) < 1e-6 and abs(losses(twin)[0] - loss) > 1e-4
    plain_model: Any = model.unload()
    assert not any("forward" in module.__dict__ for module in plain_model.modules())
