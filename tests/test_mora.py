"""MoRA against the paper, written out densely in float64; PEFT does not have the method."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import engine
from engine.errors import ConfigError, TargetError
from tests import differential, tiny
from tests.differential import peft

# (in, out, r): blocks that fit exactly, that need padding, one block only, outputs shorter and longer than the blocks.
SHAPES = [(8, 10, 2), (16, 16, 2), (12, 40, 1), (13, 5, 2), (30, 7, 1), (20, 61, 3), (9, 20, 4)]


def dense(matrix: list[list[float]], n_in: int, n_out: int, kind: int) -> torch.Tensor:
    """dW, entry by entry, from the paper's equations 6 and 9."""
    side = len(matrix)
    blocks = math.ceil(n_in / side)
    change = torch.zeros(n_out, n_in, dtype=torch.float64)
    for place in range(blocks * side):
        source, j, k = place % n_in, place // side, place % side
        # What input x[source] = 1 puts into the block: (index, value) pairs.
        put = [(k, 1.0)]
        if kind == 6:
            i = k % (side // 2)
            angle = j * 10000 ** (-2 * i / side)
            if k < side // 2:
                put = [(i, math.cos(angle)), (i + side // 2, math.sin(angle))]
            else:
                put = [(i, -math.sin(angle)), (i + side // 2, math.cos(angle))]
        length = side if kind == 1 else blocks * side
        for row in range(n_out):
            at = row % length
            if kind == 6 and at // side != j:
                continue
            change[row, source] += sum(matrix[at % side][index] * value for index, value in put)
    return change


@pytest.mark.parametrize("kind", [1, 6])
@pytest.mark.parametrize(("n_in", "n_out", "r"), SHAPES)
def test_against_the_formula(n_in: int, n_out: int, r: int, kind: int) -> None:
    side = math.floor(math.sqrt((n_in + n_out) * r) + 0.5)
    side -= side % 2 if kind == 6 else 0
    layer = nn.Sequential(nn.Linear(n_in, n_out)).double()
    w, b = layer[0].weight.detach().clone(), layer[0].bias.detach().clone()
    config = engine.MoRAConfig(r=r, mora_type=kind, target_modules=["0"])
    if side > n_in:
        with pytest.raises(TargetError, match=f"square matrix of {side} at 0, which has {n_in} inputs"):
            engine.get_peft_model(layer, config)
        return
    model = tiny.shake(engine.get_peft_model(layer, config).double(), 1.0)
    matrix = model.adapter_parameters()["0.mora_M"]
    assert matrix.shape == (side, side)
    change = dense(matrix.tolist(), n_in, n_out, kind)
    x = torch.randn(2, 3, n_in).double()
    assert torch.allclose(model(x), x @ (w + change).T + b, atol=1e-12)
    model.merge_adapter()
    assert torch.allclose(model.get_base_model()[0].base_layer.weight, w + change, atol=1e-12)


def test_the_shapes_cover_every_branch() -> None:
    seen = set()
    for n_in, n_out, r in SHAPES:
        side = math.floor(math.sqrt((n_in + n_out) * r) + 0.5)
        seen.add((side > n_in, n_in % side == 0, n_out > side, n_out > side * math.ceil(n_in / side)))
    assert {branch[0] for branch in seen} == {branch[1] for branch in seen} == {True, False}
    assert {branch[2] for branch in seen} == {branch[3] for branch in seen} == {True, False}


@pytest.mark.parametrize("kind", [1, 6])
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_families_train_merge_and_come_back(family: str, kind: int, tmp_path: Path) -> None:
    fields = {"r": 4, "mora_type": kind, "target_modules": "all-linear"}
    model = differential.make(engine, "MoRAConfig", family, fields)
    if family != "bert":
        losses = differential.train_steps(model, 20)
        assert losses[0] - losses[-1] > 0.02
        model.eval()
    else:
        tiny.shake(model)
    outputs = tiny.logits(model)
    tensors = differential.save(model, tmp_path)
    assert {key.rsplit(".", 1)[-1] for key in tensors if "classifier" not in key} == {"mora_M"}
    assert torch.equal(tiny.logits(differential.load(engine, family, tmp_path)), outputs)
    assert (tiny.logits(model.merge_and_unload()) - outputs).abs().max() < 1e-5


def test_both_types_and_two_ranks_live_on_one_model() -> None:
    """The authors' code keeps one table of angles a layer, which the second adapter then takes wrongly."""
    model = engine.get_peft_model(tiny.llama(), engine.MoRAConfig(r=2), "small")
    alone = tiny.logits(tiny.shake(model))
    model.add_adapter("large", engine.MoRAConfig(r=7))
    model.add_adapter("sharing", engine.MoRAConfig(r=7, mora_type=1))
    for name in ("large", "sharing"):
        model.set_adapter(name)
        tiny.shake(model)
    model.set_adapter_weights({"small": 1.0, "large": -0.5, "sharing": 0.5})
    live = tiny.logits(model)
    model.merge_adapter()
    assert (tiny.logits(model) - live).abs().max() < 1e-5
    model.unmerge_adapter()
    model.set_adapter("small")
    assert torch.equal(tiny.logits(model), alone)


@pytest.mark.parametrize("kind", [1, 6])
def test_as_many_parameters_as_lora(kind: int) -> None:
    layer = nn.Sequential(nn.Linear(576, 1536))
    model = engine.get_peft_model(layer, engine.MoRAConfig(r=8, mora_type=kind, target_modules=["0"]))
    assert abs(model.get_nb_trainable_parameters()[0] / (8 * (576 + 1536)) - 1) < 0.02


def test_peft_refuses_the_file(tmp_path: Path) -> None:
    model = engine.get_peft_model(tiny.llama(), engine.MoRAConfig(r=4))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MORA"
    assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "adapter_model.safetensors").values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((KeyError, ValueError)):
            peft.PeftModel.from_pretrained(tiny.llama(), tmp_path)


def test_dropout_is_on_the_adapters_input_alone() -> None:
    layer = nn.Sequential(nn.Linear(40, 8))
    base = layer[0]
    model: Any = engine.get_peft_model(layer, engine.MoRAConfig(r=2, mora_dropout=0.5, target_modules=["0"]))
    tiny.shake(model)
    x = torch.ones(1, 40)
    expected = model.eval()(x) - base(x)
    model.train()
    assert not torch.equal(model(x), model(x))
    mean = torch.stack([model(x) - base(x) for _ in range(2000)]).mean(0)
    assert (mean - expected).norm() < 0.2 * expected.norm()


def test_what_mora_refuses() -> None:
    with pytest.raises(ConfigError) as error:
        engine.MoRAConfig(r=0, mora_type=3, mora_dropout=1, bias="lora_only")
    for fault in ("r is 0", "mora_type is 3", "mora_dropout is 1", "bias is 'lora_only'"):
        assert fault in str(error.value)
    with pytest.raises(TargetError, match=r"embed_tokens \(Embedding\)"):
        engine.get_peft_model(tiny.llama(), engine.MoRAConfig(target_modules=["embed_tokens"]))
