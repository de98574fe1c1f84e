"""LoRA against the PEFT library, both directions: files, outputs, gradients, training, merging, generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import engine
from tests import differential, tiny
from tests.differential import load, peft, save, train_steps

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    ("llama", {"target_modules": r".*\.1\.(self_attn\.[qk]_proj|mlp\.up_proj)", "lora_alpha": 3}),
    (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"0.*up_proj": 5}},
    ),
    ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    ("llama", {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}),
    ("llama", {"target_modules": ["q_proj"], "lora_bias": True}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["o_proj", "gate_proj"]}),
    ("gpt2", {}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "bias": "lora_only"}),
    ("t5", {}),
    ("t5", {"target_modules": ["q", "v", "wi", "wo"]}),
    ("bert", {}),
    ("bert", {"target_modules": "all-linear"}),
]
IDS = differential.ids_of(CASES)


def make(library: Any, family: str, extra: dict[str, Any]) -> Any:
    return differential.make(library, "LoraConfig", family, {"r": 4, **extra})


@pytest.mark.parametrize(("family", "extra"), CASES, ids=IDS)
def test_files_outputs_and_gradients(family: str, extra: dict[str, Any], tmp_path: Path) -> None:
    differential.same_files_outputs_gradients("LoraConfig", family, {"r": 4, **extra}, tmp_path)


@pytest.mark.parametrize(("family", "extra"), CASES, ids=IDS)
def test_fresh_adapters_have_the_same_parameters(family: str, extra: dict[str, Any]) -> None:
    differential.same_fresh_parameters("LoraConfig", family, {"r": 4, **extra})


@pytest.mark.parametrize(("family", "extra"), CASES, ids=IDS)
def test_merged_weights(family: str, extra: dict[str, Any], tmp_path: Path) -> None:
    differential.same_merged_weights("LoraConfig", family, {"r": 4, **extra}, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pissa_trains_alike_and_leaves_as_plain_lora(family: str, init: str, tmp_path: Path) -> None:
    """The randomised SVD starts elsewhere in each library; both must reproduce the base at the start."""
    ours = make(engine, family, {"init_lora_weights": init, "target_modules": "all-linear", "lora_alpha": 6})
    base = tiny.logits(tiny.FAMILIES[family]())
    assert (tiny.logits(ours) - base).abs().max() < 1e-5
    if init == "pissa":
        theirs = make(peft, family, {"init_lora_weights": init, "target_modules": "all-linear", "lora_alpha": 6})
        losses = [train_steps(model, 8) for model in (ours, theirs)]
        assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4
    else:
        train_steps(ours, 8)
    trained = tiny.logits(ours.eval())
    assert (trained - base).abs().max() > 1e-2
    save(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 12, True)
    for library in (engine, peft):
        assert (tiny.logits(load(library, family, tmp_path)) - trained).abs().max() < 1e-5


def test_gaussian_start() -> None:
    torch.manual_seed(0)
    model = make(engine, "llama", {"init_lora_weights": "gaussian", "target_modules": ["q_proj"]})
    a = torch.cat([p for n, p in model.adapter_parameters().items() if "lora_A" in n])
    assert abs(float(a.std()) - 1 / 4) < 0.03
    assert not any(p.any() for n, p in model.adapter_parameters().items() if "lora_B" in n)


EVERYWHERE = {"r": 4, "target_modules": "all-linear"}


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_thirty_steps_from_the_same_weights(family: str, tmp_path: Path) -> None:
    differential.same_training("LoraConfig", family, EVERYWHERE, tmp_path, 30)


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

    theirs = tiny.shake(peft.get_peft_model(plain(), peft.LoraConfig(r=3, target_modules=["first", "second", "head"])))
    save(theirs, tmp_path)
    ours = engine.PeftModel.from_pretrained(plain(), tmp_path)
    assert (
        tiny.logits(ours) - theirs(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)))
    ).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64], ids=["float64"])
def test_against_the_formula(dtype: torch.dtype) -> None:
    """y = W x + s B A x, s = alpha / r or alpha / sqrt(r), written out densely."""
    for rslora, scale in ((False, 6 / 4), (True, 6 / 2)):
        layer = nn.Sequential(nn.Linear(5, 3)).to(dtype)
        w, b = layer[0].weight.detach().clone(), layer[0].bias.detach().clone()
        config = engine.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=["0"])
        model = tiny.shake(engine.get_peft_model(layer, config).to(dtype))
        parts = model.adapter_parameters()
        x = torch.randn(7, 5, dtype=dtype)
        expected = x @ (w + scale * parts["0.lora_B.weight"] @ parts["0.lora_A.weight"]).T + b
        assert torch.allclose(model(x), expected, atol=1e-12)


def test_dropout_is_on_the_adapters_input_alone() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(400, 400))
    base = layer[0]
    model = tiny.shake(engine.get_peft_model(layer, engine.LoraConfig(r=2, lora_dropout=0.5, target_modules=["0"])))
    model.train()
    x = torch.ones(1, 400)
    a, b = (model.adapter_parameters()[f"0.lora_{k}.weight"] for k in "AB")
    with torch.no_grad():
        changes = torch.stack([model(x) - base(x) for _ in range(4000)]).mean(0)
    expected = (8 / 2) * (x @ a.T @ b.T)
    assert (changes - expected).norm() < 0.15 * expected.norm()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
