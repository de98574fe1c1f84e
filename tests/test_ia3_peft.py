"""IA3 against the PEFT library in both directions, and against its formula."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import engine
from engine.errors import ConfigError, EngineError, TargetError
from tests import differential, tiny
from tests.differential import peft

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    ("llama", {"target_modules": "all-linear", "feedforward_modules": ["o_proj", "up_proj"]}),
    (
        "llama",
        {"target_modules": r".*\.1\.(self_attn\.[qk]_proj|mlp\.\w+_proj)", "feedforward_modules": r".*\.up_proj"},
    ),
    ("llama", {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": [], "modules_to_save": ["lm_head"]}),
    ("gpt2", {}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    ("t5", {}),
    ("t5", {"target_modules": ["q", "wi", "wo", "o"], "feedforward_modules": ["o"]}),
    ("bert", {}),
    ("bert", {"target_modules": "all-linear", "exclude_modules": ["pooler.dense"], "feedforward_modules": ["query"]}),
]
each_case = pytest.mark.parametrize(("family", "fields"), CASES, ids=differential.ids_of(CASES))
each_generator = pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])


@each_case
def test_files_outputs_and_gradients(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    differential.same_files_outputs_gradients("IA3Config", family, fields, tmp_path)


@each_case
def test_fresh_adapters_have_the_same_parameters(family: str, fields: dict[str, Any]) -> None:
    differential.same_fresh_parameters("IA3Config", family, fields)


@each_case
def test_merged_weights(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    differential.same_merged_weights("IA3Config", family, fields, tmp_path)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_twenty_steps_from_the_same_weights(family: str, tmp_path: Path) -> None:
    differential.same_training("IA3Config", family, {"target_modules": "all-linear"}, tmp_path, rate=2e-2)


@pytest.mark.parametrize("beams", [1, 3])
@each_generator
def test_generation(family: str, beams: int, tmp_path: Path) -> None:
    differential.same_generation("IA3Config", family, {}, tmp_path, beams)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
@pytest.mark.parametrize("targets", [None, "all-linear", ["c_proj", "wo", "down_proj", "output.dense"]])
def test_our_fresh_files_open_in_peft(family: str, targets: Any, tmp_path: Path) -> None:
    """Where the input is scaled is decided here and written out in a form that PEFT accepts."""
    ours = tiny.shake(differential.make(engine, "IA3Config", family, {"target_modules": targets}))
    differential.save(ours, tmp_path)
    theirs = differential.load(peft, family, tmp_path)
    assert (tiny.logits(theirs) - tiny.logits(ours)).abs().max() < 1e-5


@pytest.mark.parametrize("inner", [[], ["first", "second", "head"]], ids=["outputs", "inputs"])
def test_convolutions(inner: list[str], tmp_path: Path) -> None:
    fields = {"target_modules": ["first", "second", "head"], "feedforward_modules": inner}
    differential.same_convolutions("IA3Config", fields, tmp_path)


def test_against_the_formula() -> None:
    """y = l * (W x + b), y = W (l * x) + b, and l = 1 + sum w_i (l_i - 1) for several, written out in float64."""
    torch.manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64)
    for inner in (False, True):
        layer = nn.Sequential(nn.Linear(5, 3)).double()
        w, b = layer[0].weight.detach().clone(), layer[0].bias.detach().clone()
        config = engine.IA3Config(target_modules=["0"], feedforward_modules=["0"] if inner else [])
        model = engine.get_peft_model(layer, config, "one")
        model.add_adapter("two", config)
        model.double()
        shift = 0.0
        for name, weight in (("one", 0.7), ("two", -0.4)):
            model.set_adapter(name)
            tiny.shake(model, 0.5)
            l = model.adapter_parameters(name)["0.ia3_l"].detach().flatten()  # noqa: E741 (the paper's letter)
            alone = (x * l) @ w.T + b if inner else l * (x @ w.T + b)
            assert torch.allclose(model(x), alone, atol=1e-12)
            shift = shift + weight * (l - 1)
        model.set_adapter_weights({"one": 0.7, "two": -0.4})
        both = (x * (1 + shift)) @ w.T + b if inner else (1 + shift) * (x @ w.T + b)
        assert torch.allclose(model(x), both, atol=1e-12)
        model.merge_adapter()
        assert torch.allclose(model(x), both, atol=1e-12)


def test_beside_lora_the_changes_add_up() -> None:
    """y = W x + (l - 1) W x + s B A x, whatever the order, and merged together from the base's own weight."""
    answers = []
    for order in (("ia3", "lora"), ("lora", "ia3")):
        model = engine.get_peft_model(tiny.llama(), engine.LoraConfig(r=2, target_modules=["q_proj"]), "lora")
        model.add_adapter("ia3", engine.IA3Config(target_modules=["q_proj", "down_proj"]))
        for name in ("lora", "ia3"):
            model.set_adapter(name)
            tiny.shake(model, 0.3)
        model.set_adapter(order)
        answers.append(tiny.logits(model))
        model.merge_adapter()
        assert (tiny.logits(model) - answers[0]).abs().max() < 1e-5
        model.unmerge_adapter()
        model.merge_adapter([order[0]])
        model.merge_adapter([order[1]])
        assert (tiny.logits(model) - answers[0]).abs().max() < 1e-5
    assert (answers[0] - answers[1]).abs().max() < 1e-5
    model.unmerge_adapter()
    model.merge_adapter(["lora"])
    with pytest.raises(EngineError, match="builds on the base weight"):
        tiny.logits(model)


@pytest.mark.parametrize("beside", ["dora", "ia3"])
def test_beside_a_reader_of_the_output_the_changes_add_up(beside: str) -> None:
    """A shifted input reaches no other adapter: DoRA, or IA3 at the output, reads the base's own output."""
    plain = {"dora": engine.DoRAConfig(r=2, target_modules=["down_proj"])}
    plain["ia3"] = engine.IA3Config(target_modules=["down_proj"], feedforward_modules=[])
    model = engine.get_peft_model(tiny.llama(), plain[beside], "reader")
    model.add_adapter("shifter", engine.IA3Config(target_modules=["down_proj"]))
    for name in ("reader", "shifter"):
        model.set_adapter(name)
        tiny.shake(model, 0.3)
    model.set_adapter_weights({"reader": 0.7, "shifter": -0.4})
    before = tiny.logits(model)
    model.merge_adapter()
    assert (tiny.logits(model) - before).abs().max() < 1e-5


def test_a_wide_start_in_bf16_keeps_small_factors() -> None:
    """l - 1 = 1/300 is below bf16's step near 1; what is added to the output keeps it."""
    layer = nn.Sequential(nn.Linear(4, 4, bias=False)).bfloat16()
    model = engine.get_peft_model(layer, engine.IA3Config(target_modules=["0"], feedforward_modules=[]))
    with torch.no_grad():
        model.adapter_parameters()["0.ia3_l"].fill_(1 + 1 / 300)
    wrapped = model.get_base_model()[0]
    y = torch.ones(1, 4, dtype=torch.bfloat16)
    change = wrapped.adapters["default"].delta(y, y, wrapped.base_layer, 1.0)
    assert change.dtype == torch.bfloat16
    assert (change.float() - 1 / 300).abs().max() < 1e-4


def test_random_start_is_not_the_identity() -> None:
    config = engine.IA3Config(target_modules=["q_proj"], feedforward_modules=[], init_ia3_weights=False)
    model = engine.get_peft_model(tiny.llama(), config)
    assert (tiny.logits(model) - tiny.logits(tiny.llama())).abs().max() > 1e-3


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no target's name ends so"):
        engine.get_peft_model(tiny.llama(), engine.IA3Config(target_modules=["q_proj"], feedforward_modules=["dwn"]))
    with pytest.raises(TargetError, match="cannot serve"):
        engine.get_peft_model(tiny.llama(), engine.IA3Config(target_modules=["embed_tokens"]))
    with pytest.raises(ConfigError, match="not a regular expression"):
        engine.IA3Config(feedforward_modules="(")
    model = engine.get_peft_model(tiny.llama(), engine.IA3Config())
    with pytest.raises(ConfigError, match="only LoRA adapters"):
        model.add_weighted_adapter(["default"], [1.0], "both", "cat")
    differential.save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engine.PeftModel.from_pretrained(tiny.llama(), tmp_path).active_adapters == ["default"]
