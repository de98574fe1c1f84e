"""LoHa against the PEFT library in both directions, and against its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import engine
from engine.errors import ConfigError
from tests import differential, tiny
from tests.differential import peft

# At r 2 the layers take the thin way, at 8 the dense one.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"r": 2, "alpha": 3, "target_modules": "all-linear"}),
    ("llama", {"target_modules": r".*\.1\.(self_attn\.[qk]_proj|mlp\.up_proj)"}),
    (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"0.*up_proj": 5}},
    ),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("t5", {"r": 2}),
    ("t5", {"target_modules": ["q", "v", "wi", "wo"]}),
    ("bert", {"r": 2, "target_modules": "all-linear", "exclude_modules": ["key"]}),
]
each_case = pytest.mark.parametrize(("family", "fields"), CASES, ids=differential.ids_of(CASES))


@each_case
def test_files_outputs_and_gradients(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    differential.same_files_outputs_gradients("LoHaConfig", family, fields, tmp_path, 0.3)


@each_case
def test_fresh_adapters_have_the_same_parameters(family: str, fields: dict[str, Any]) -> None:
    differential.same_fresh_parameters("LoHaConfig", family, fields)


@each_case
def test_merged_weights(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    differential.same_merged_weights("LoHaConfig", family, fields, tmp_path)


@pytest.mark.parametrize("r", [2, 8])
# PEFT refuses GPT-2's Conv1D for this method.
@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_twenty_steps_from_the_same_weights(family: str, r: int, tmp_path: Path) -> None:
    fields = {"target_modules": "all-linear", "r": r, "alpha": 32}
    differential.same_training("LoHaConfig", family, fields, tmp_path, rate=5e-3)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generation(family: str, beams: int, tmp_path: Path) -> None:
    differential.same_generation("LoHaConfig", family, {"target_modules": "all-linear"}, tmp_path, beams)


@pytest.mark.parametrize("by_modes", [False, True])
@pytest.mark.parametrize("r", [1, 3])
def test_convolutions(r: int, by_modes: bool, tmp_path: Path) -> None:
    fields = {"r": r, "target_modules": ["first", "second", "head"], "use_effective_conv2d": by_modes}
    # PEFT's own backward pass of kernels by modes multiplies with the other factor's core for these two.
    wrong = ("hada_w1_a", "hada_w2_a") if by_modes else ()
    differential.same_convolutions("LoHaConfig", fields, tmp_path, wrong)


@pytest.mark.parametrize(("r", "thin"), [(2, True), (6, False)])
@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_against_the_formula(r: int, thin: bool, conv1d: bool) -> None:
    """y = W x + s ((A1 B1) o (A2 B2)) x, written out in float64, by both ways of computing it."""
    layer = tiny.gpt2().transformer.h[0].mlp.c_fc if conv1d else nn.Linear(32, 40)
    model = engine.get_peft_model(nn.Sequential(layer).double(), engine.LoHaConfig(r=r, alpha=5, target_modules=["0"]))
    assert model.get_base_model()[0].adapters["default"].thin == thin
    tiny.shake(model.double(), 0.5)
    w = (layer.weight.T if conv1d else layer.weight).detach()
    a1, b1, a2, b2 = (model.adapter_parameters()[f"0.hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    change = torch.stack([torch.outer(a1[:, i], b1[i]) for i in range(r)]).sum(0)
    change = change * torch.stack([torch.outer(a2[:, i], b2[i]) for i in range(r)]).sum(0)
    x = torch.randn(7, 32, dtype=torch.float64)
    expected = x @ (w + 5 / r * change).T + layer.bias
    assert torch.allclose(model(x), expected, atol=1e-10)
    mine = torch.autograd.grad(model(x).square().sum(), (a1, b1, a2, b2))
    for own, dense in zip(mine, torch.autograd.grad(expected.square().sum(), (a1, b1, a2, b2)), strict=True):
        assert torch.allclose(own, dense, rtol=1e-9, atol=1e-9)


def test_convolution_against_the_formula() -> None:
    """The kernel by modes, index by index, with its gradients, at a reflecting convolution (PEFT pads with zeros)."""
    model = engine.get_peft_model(
        tiny.pixels(), engine.LoHaConfig(r=2, alpha=3, target_modules=["second"], use_effective_conv2d=True)
    )
    tiny.shake(model.double(), 0.5)
    p = {name.removeprefix("second.hada_"): value for name, value in model.adapter_parameters().items()}
    kernel = torch.zeros(8, 8, 3, 3, dtype=torch.float64)
    parts = []
    for n in "12":
        part = kernel.clone()
        for i in range(2):
            for j in range(2):
                outer = torch.outer(p[f"w{n}_a"][i], p[f"w{n}_b"][j])
                part = part + outer[:, :, None, None] * p[f"t{n}"][i, j]
        parts.append(part)
    plain = tiny.pixels().double()
    weight = plain.second.weight.detach() + 1.5 * parts[0] * parts[1]
    del plain.second.weight
    plain.second.weight = weight
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.allclose(model(x), plain(x), atol=1e-10)
    own = torch.autograd.grad(model(x).square().sum(), list(p.values()))
    for name, mine, dense in zip(p, own, torch.autograd.grad(plain(x).square().sum(), list(p.values())), strict=True):
        assert torch.allclose(mine, dense, atol=1e-9), name


def flat(**fields: Any) -> tuple[Any, torch.Tensor]:
    """One layer of zeros whose change is 1 everywhere, and an input of one 1."""
    layer = nn.Linear(3, 400, bias=False)
    nn.init.zeros_(layer.weight)
    model = engine.get_peft_model(nn.Sequential(layer), engine.LoHaConfig(r=1, alpha=1, target_modules=["0"], **fields))
    with torch.no_grad():
        for parameter in model.adapter_parameters().values():
            parameter.fill_(1)
    return model, torch.tensor([[1.0, 0.0, 0.0]])


def test_rank_dropout_drops_outputs_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    model, x = flat(rank_dropout=0.4)
    answer = model.train()(x)
    share = (answer == 0).float().mean()
    assert 0.3 < share < 0.5
    assert abs(answer.mean() - 1) < 1e-4
    assert torch.equal(model.eval()(x), torch.ones(1, 400))


def test_module_dropout_skips_the_layer_and_still_goes_backward() -> None:
    torch.manual_seed(0)
    model, x = flat(module_dropout=0.5)
    model.train()
    seen = set()
    for _ in range(40):
        answer = model(x)
        answer.sum().backward()
        assert answer.unique().numel() == 1
        seen.add(answer[0, 0].item())
    assert seen == {0.0, 1.0}
    assert torch.equal(model.eval()(x), torch.ones(1, 400))


def test_what_it_refuses_and_what_peft_does() -> None:
    with pytest.raises(ConfigError) as caught:
        engine.LoHaConfig(r=0, alpha=-1, rank_dropout=1, init_weights="lycoris", layers_pattern="h")
    for field in ("r is 0", "alpha is -1", "rank_dropout is 1", "init_weights is 'lycoris'", "layers_pattern"):
        assert field in str(caught.value)
    with pytest.raises(TypeError, match="not supported"):
        differential.make(peft, "LoHaConfig", "gpt2", {"target_modules": ["c_attn"]})
    model = differential.make(engine, "LoHaConfig", "gpt2", {"init_weights": False})
    assert not torch.equal(tiny.logits(model), tiny.logits(tiny.gpt2()))
