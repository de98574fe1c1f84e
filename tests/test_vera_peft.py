"""VeRA against the PEFT library, both directions, and against its formula written out densely."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import engine
from engine.checkpoint import raw_state, restore_raw_state
from engine.errors import CheckpointError, ConfigError, TargetError
from tests import differential, tiny
from tests.differential import load, make, peft, save

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"target_modules": "all-linear", "projection_prng_key": 5}),
    ("llama", {"target_modules": ["q_proj", "down_proj"], "save_projection": False}),
    ("llama", {"target_modules": ["q_proj", "k_proj"], "bias": "vera_only", "d_initial": 0.5}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": "all"}),
    ("llama", {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("gpt2", {}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    ("t5", {"target_modules": ["q", "v", "wi", "wo"]}),
    ("bert", {}),
    ("bert", {"target_modules": "all-linear", "save_projection": False}),
]
EACH = pytest.mark.parametrize(("family", "extra"), CASES, ids=differential.ids_of(CASES))
EVERYWHERE = {"r": 6, "target_modules": "all-linear", "d_initial": 1.0}


@EACH
def test_files_outputs_and_gradients(family: str, extra: dict[str, Any], tmp_path: Path) -> None:
    differential.same_files_outputs_gradients("VeraConfig", family, {"r": 6, **extra}, tmp_path)


@EACH
def test_fresh_adapters_have_the_same_parameters_and_projections(family: str, extra: dict[str, Any]) -> None:
    differential.same_fresh_parameters("VeraConfig", family, {"r": 6, **extra})
    ours, theirs = (make(library, "VeraConfig", family, {"r": 6, **extra}) for library in (engine, peft))
    for name in ("vera_A", "vera_B"):
        other = getattr(theirs.base_model, name)["default"]
        assert torch.equal(getattr(ours.shared["default"], name), other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.get_peft_model_state_dict(theirs)
    mine = engine.get_peft_model_state_dict(ours)
    assert all(torch.equal(mine[key], other[key]) for key in mine)


@EACH
def test_merged_weights(family: str, extra: dict[str, Any], tmp_path: Path) -> None:
    differential.same_merged_weights("VeraConfig", family, {"r": 6, **extra}, tmp_path)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_twenty_steps_from_the_same_weights(family: str, tmp_path: Path) -> None:
    differential.same_training("VeraConfig", family, EVERYWHERE, tmp_path)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generation(family: str, beams: int, tmp_path: Path) -> None:
    differential.same_generation("VeraConfig", family, EVERYWHERE, tmp_path, beams)


def test_against_the_formula() -> None:
    """y = W x + b * (B (d * (A x))), with the parts of A and B that a smaller layer takes."""
    layers = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 8)).double()
    copies = copy.deepcopy(layers)
    model = engine.get_peft_model(layers, engine.VeraConfig(r=4, target_modules=["0", "1"])).double()
    parts = tiny.shake(model, 0.5).adapter_parameters()
    a, b = model.shared["default"].vera_A, model.shared["default"].vera_B
    assert (a.shape, b.shape) == ((4, 5), (8, 4))
    x = expected = torch.randn(7, 5).double()
    for name, layer in copies.named_children():
        n_out, n_in = layer.weight.shape
        lambda_b, lambda_d = (parts[f"{name}.vera_lambda_{part}"] for part in "bd")
        weight = layer.weight + torch.diag(lambda_b) @ b[:n_out] @ torch.diag(lambda_d) @ a[:, :n_in]
        expected = expected @ weight.T + layer.bias
    assert torch.allclose(model(x), expected, atol=1e-12)


def test_the_projections_are_held_once_and_go_with_the_model(tmp_path: Path) -> None:
    config = engine.VeraConfig(r=6, target_modules=["q_proj", "down_proj"])
    model = tiny.shake(engine.get_peft_model(tiny.llama(), config, "one"))
    assert [key for key in model.state_dict() if "vera_A" in key] == ["shared.one.vera_A"]
    assert not any("vera_A" in name for name, _ in model.named_parameters())
    before = tiny.logits(model)
    twin = copy.deepcopy(model)
    twin.shared["one"].vera_A.zero_()
    assert torch.equal(tiny.logits(twin), tiny.logits(tiny.llama()))
    assert torch.equal(tiny.logits(model), before)
    # Each adapter has projections of its own, so seeds and ranks may differ, which PEFT refuses.
    model.add_adapter("two", engine.VeraConfig(r=3, projection_prng_key=9, target_modules=["v_proj"]))
    assert torch.equal(tiny.logits(model), before)
    model.delete_adapter("one")
    assert list(model.shared) == ["two"]
    plain = model.merge_and_unload()
    assert not list(model.shared) and plain.state_dict().keys() == tiny.llama().state_dict().keys()


def test_projections_of_the_file_win_over_the_seed(tmp_path: Path) -> None:
    """Another machine's generator may draw otherwise; what the file holds is what was trained with."""
    theirs = tiny.shake(make(peft, "VeraConfig", "llama", {"r": 6}))
    save(theirs, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.vera_A"] = tensors["base_model.vera_A"] * 2
    save_file(tensors, path)
    ours = load(engine, "llama", tmp_path, is_trainable=True)
    assert (tiny.logits(ours) - tiny.logits(load(peft, "llama", tmp_path))).abs().max() < 1e-5
    # So does a training checkpoint.
    again = make(engine, "VeraConfig", "llama", {"r": 6})
    restore_raw_state(again, "default", raw_state(ours, "default"))
    assert torch.equal(tiny.logits(again), tiny.logits(ours))
    del tensors["base_model.vera_B"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"base_model\.vera_B"):
        load(engine, "llama", tmp_path)


def test_dropout_is_on_the_adapters_input_alone() -> None:
    layer = nn.Sequential(nn.Linear(40, 8))
    base = layer[0]
    model = tiny.shake(engine.get_peft_model(layer, engine.VeraConfig(r=2, vera_dropout=0.5, target_modules=["0"])))
    x = torch.ones(1, 40)
    expected = model.eval()(x) - base(x)
    model.train()
    assert not torch.equal(model(x), model(x))
    mean = torch.stack([model(x) - base(x) for _ in range(2000)]).mean(0)
    assert (mean - expected).norm() < 0.2 * expected.norm()


def test_what_vera_refuses() -> None:
    with pytest.raises(ConfigError) as error:
        engine.VeraConfig(r=0, projection_prng_key=-1, vera_dropout=1, d_initial=float("nan"), bias="lora_only")
    for field in (
        "r is 0",
        "projection_prng_key is -1",
        "vera_dropout is 1",
        "d_initial is nan",
        "bias is 'lora_only'",
    ):
        assert field in str(error.value)
    with pytest.raises(TargetError, match=r"embed_tokens \(Embedding\)"):
        engine.get_peft_model(tiny.llama(), engine.VeraConfig(target_modules=["embed_tokens"]))
