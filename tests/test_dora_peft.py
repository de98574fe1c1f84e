"""DoRA against the PEFT library, both directions, and against its formula written out densely."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import engine
from engine.errors import ConfigError, EngineError
from tests import differential, tiny
from tests.differential import load, peft, save

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"0.*up_proj": 5}},
    ),
    ("llama", {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("gpt2", {}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "lora_dropout": 0.1}),
    ("t5", {"target_modules": ["q", "v", "wi", "wo"]}),
    ("bert", {}),
    ("bert", {"target_modules": "all-linear", "init_lora_weights": "gaussian"}),
]
EACH = pytest.mark.parametrize(("family", "extra"), CASES, ids=differential.ids_of(CASES))
EVERYWHERE = {"r": 4, "use_dora": True, "target_modules": "all-linear"}


@EACH
def test_files_outputs_and_gradients(family: str, extra: dict[str, Any], tmp_path: Path) -> None:
    differential.same_files_outputs_gradients("LoraConfig", family, {"r": 4, "use_dora": True, **extra}, tmp_path)


@EACH
def test_fresh_adapters_have_the_same_parameters(family: str, extra: dict[str, Any]) -> None:
    differential.same_fresh_parameters("LoraConfig", family, {"r": 4, "use_dora": True, **extra})


@EACH
def test_merged_weights(family: str, extra: dict[str, Any], tmp_path: Path) -> None:
    differential.same_merged_weights("LoraConfig", family, {"r": 4, "use_dora": True, **extra}, tmp_path)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_twenty_steps_from_the_same_weights(family: str, tmp_path: Path) -> None:
    differential.same_training("LoraConfig", family, EVERYWHERE, tmp_path)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generation(family: str, beams: int, tmp_path: Path) -> None:
    differential.same_generation("LoraConfig", family, EVERYWHERE, tmp_path, beams)


def test_conv2d_against_peft_without_dilation(tmp_path: Path) -> None:
    def plain() -> nn.Module:
        model = tiny.pixels()
        model.second.dilation = (1, 1)
        model.second.padding_mode = "zeros"
        return model

    config = peft.LoraConfig(r=3, use_dora=True, target_modules=["first", "second", "head"])
    theirs = tiny.shake(peft.get_peft_model(plain(), config))
    their_file = save(theirs, tmp_path / "theirs")
    ours = engine.PeftModel.from_pretrained(plain(), tmp_path / "theirs")
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    assert (ours(x) - theirs(x)).abs().max() < 1e-5
    our_file = save(ours, tmp_path / "ours")
    assert {k: v.shape for k, v in our_file.items()} == {k: v.shape for k, v in their_file.items()}
    mine, other = ours.merge_and_unload().state_dict(), theirs.merge_and_unload().state_dict()
    assert all(torch.allclose(mine[key], other[key], atol=1e-5) for key in other)


def test_both_configs_are_one_method_in_one_format(tmp_path: Path) -> None:
    made = []
    for config in (engine.DoRAConfig(r=3), engine.LoraConfig(r=3, use_dora=True)):
        assert config.method == "dora"
        torch.manual_seed(0)
        made.append(engine.get_peft_model(tiny.llama(), config))
    assert all(torch.equal(a, b) for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True))
    for name, model in zip("ab", made, strict=True):
        tiny.shake(model).save_pretrained(tmp_path / name)
    texts = [(tmp_path / name / "adapter_config.json").read_text() for name in "ab"]
    assert texts[0] == texts[1]
    assert (json.loads(texts[0])["peft_type"], json.loads(texts[0])["use_dora"]) == ("LORA", True)
    again = engine.PeftModel.from_pretrained(tiny.llama(), tmp_path / "a")
    assert torch.equal(tiny.logits(again), tiny.logits(made[1]))


def test_pissa_leaves_with_its_magnitudes(tmp_path: Path) -> None:
    fields = {"r": 4, "use_dora": True, "init_lora_weights": "pissa", "target_modules": "all-linear"}
    ours = differential.make(engine, "LoraConfig", "llama", fields)
    assert (tiny.logits(ours) - tiny.logits(tiny.llama())).abs().max() < 1e-5
    tiny.shake(ours, 0.05)
    save(ours, tmp_path)
    for library in (engine, peft):
        assert (tiny.logits(load(library, "llama", tmp_path)) - tiny.logits(ours)).abs().max() < 1e-5


def dense(w: torch.Tensor, parts: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    """(m / ||V||) V by rows, V = W + s B A, the norm without gradient."""
    v = w + scale * parts["0.lora_B.weight"] @ parts["0.lora_A.weight"]
    norm = v.detach().square().sum(1).sqrt()
    return (parts["0.lora_magnitude_vector"] / norm)[:, None] * v


def test_against_the_formula() -> None:
    layer = nn.Sequential(nn.Linear(5, 3)).double()
    w, b = layer[0].weight.detach().clone(), layer[0].bias.detach().clone()
    model = engine.get_peft_model(layer, engine.DoRAConfig(r=4, lora_alpha=6, target_modules=["0"])).double()
    assert torch.allclose(model.adapter_parameters()["0.lora_magnitude_vector"], w.norm(dim=1), atol=1e-6)
    parts = tiny.shake(model).adapter_parameters()
    x, pull = torch.randn(7, 5).double(), torch.randn(7, 3).double()
    expected = x @ dense(w, parts, 6 / 4).T + b
    assert torch.allclose(model(x), expected, atol=1e-12)
    for ours, plain in zip(
        torch.autograd.grad((model(x) * pull).sum(), list(parts.values())),
        torch.autograd.grad((expected * pull).sum(), list(parts.values())),
        strict=True,
    ):
        assert torch.allclose(ours, plain, atol=1e-12)


def test_dropout_leaves_the_magnitude_term_alone() -> None:
    """(g - 1) W x takes all of x; only B A x sees the dropped input."""
    layer = nn.Sequential(nn.Linear(400, 40))
    w, b = layer[0].weight.detach().clone(), layer[0].bias.detach().clone()
    model = engine.get_peft_model(layer, engine.DoRAConfig(r=2, lora_dropout=0.5, target_modules=["0"]))
    with torch.no_grad():
        model.adapter_parameters()["0.lora_magnitude_vector"].mul_(1.5)
    model.train()
    x = torch.randn(3, 400)
    assert torch.allclose(model(x), 1.5 * x @ w.T + b, atol=1e-4)


@pytest.mark.parametrize("foreach", [False, True])
def test_the_kept_norms_never_lag_behind(foreach: bool) -> None:
    """In evaluation the norms are kept; each way in which weights change must be seen."""
    layer = nn.Sequential(nn.Linear(5, 3))
    model = tiny.shake(engine.get_peft_model(layer, engine.DoRAConfig(r=4, lora_alpha=4, target_modules=["0"]))).eval()
    own: Any = model.base_model.model[0]
    x = torch.randn(2, 5)

    def right(model: Any) -> bool:
        base = model.get_base_model()[0].base_layer
        return torch.allclose(model(x), x @ dense(base.weight, model.adapter_parameters(), 1).T + base.bias, atol=1e-5)

    with torch.inference_mode():
        assert right(model)
    with torch.no_grad():
        first = own.adapters["default"].norm(own.base_layer)
        assert own.adapters["default"].norm(own.base_layer) is first
    optimizer = torch.optim.SGD(model.adapter_parameters().values(), lr=0.5, foreach=foreach)
    model(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert right(model)
    # bitsandbytes' optimizers change numbers without a word to the tensor that holds them.
    model(x).square().sum().backward()
    for parameter in model.adapter_parameters().values():
        parameter.data.mul_(0.7)
    with torch.no_grad():
        assert right(model)
    with torch.no_grad():
        own.base_layer.weight.mul_(2)
    assert right(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.adapter_parameters()["0.lora_A.weight"].add_(1)
    assert right(twin) and right(model)
    model.train()
    for parameter in model.adapter_parameters().values():
        parameter.data.mul_(1.5)
    assert right(model)
    model.eval()
    assert right(model)
    # W may hold a row of zeros: no division by its norm.
    empty = nn.Sequential(nn.Linear(5, 3))
    nn.init.zeros_(empty[0].weight)
    assert torch.isfinite(engine.get_peft_model(empty, engine.DoRAConfig(target_modules=["0"]))(x)).all()


def test_autocast_does_not_reach_the_norms() -> None:
    layer = nn.Sequential(nn.Linear(50, 30))
    model = tiny.shake(engine.get_peft_model(layer, engine.DoRAConfig(target_modules=["0"]))).train()
    own: Any = model.base_model.model[0]
    exact = own.adapters["default"].norm(own.base_layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(own.adapters["default"].norm(own.base_layer), exact)


def test_merging_one_after_the_other_is_merging_both() -> None:
    model = engine.get_peft_model(tiny.llama(), engine.DoRAConfig(r=4), "one")
    tiny.shake(model, 0.2)
    model.add_adapter("two", engine.DoRAConfig(r=4))
    model.set_adapter("two")
    tiny.shake(model, 0.3)
    model.set_adapter_weights({"one": 0.5, "two": -0.7})
    live = tiny.logits(model)
    model.merge_adapter(["one"])
    model.merge_adapter(["two"])
    assert (tiny.logits(model) - live).abs().max() < 1e-5
    model.unmerge_adapter()
    assert torch.equal(tiny.logits(model), live)


def test_a_half_precision_base_gives_the_norms_of_its_values() -> None:
    layer = nn.Sequential(nn.Linear(64, 3000)).bfloat16()
    model = tiny.shake(engine.get_peft_model(layer, engine.DoRAConfig(r=4, lora_alpha=4, target_modules=["0"])))
    own: Any = model.base_model.model[0]
    parts = model.adapter_parameters()
    assert all(p.dtype == torch.float32 for p in parts.values())
    v = own.base_layer.weight.double() + (parts["0.lora_B.weight"] @ parts["0.lora_A.weight"]).double()
    weights, exact, plain = own.adapters["default"], v.norm(dim=1), own.base_layer.weight.double().norm(dim=1)
    assert torch.allclose(weights.eval().norm(own.base_layer).double(), exact, rtol=1e-6)
    # In training what the adapter changes of a norm is rounded as bfloat16 is.
    found = weights.train().norm(own.base_layer).double()
    assert (found - exact).norm() < 2**-8 * (exact - plain).norm()
    assert model(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16


def test_what_dora_refuses() -> None:
    with pytest.raises(ConfigError, match="lora_bias is True with use_dora"):
        engine.LoraConfig(use_dora=True, lora_bias=True)
    with pytest.raises(ConfigError, match="use_dora is False"):
        engine.DoRAConfig(use_dora=False)
    model = engine.get_peft_model(tiny.llama(), engine.DoRAConfig(), "one")
    model.add_adapter("two", engine.DoRAConfig())
    with pytest.raises(ConfigError, match="'one' is a DoRA adapter; only LoRA"):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "both", "cat")
    with pytest.raises(ConfigError, match="serves LoRA adapters; 'one' is DoRA"):
        engine.expand_lora_rank(model, engine.LoraConfig(r=16), "one")
    model.set_adapter(["one", "two"])
    model.merge_adapter(["one"])
    with pytest.raises(EngineError, match=r"'two' builds on the base weight of .*q_proj, which now holds 'one'"):
        tiny.logits(model)
