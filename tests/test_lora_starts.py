"""LoRA's further starts against the PEFT library and against their definitions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import engine
from engine.errors import TargetError
from tests import tiny
from tests.differential import load, make, peft, save, train_steps

FIELDS: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_olora_starts_and_trains_as_in_peft(family: str, tmp_path: Path) -> None:
    fields = {**FIELDS, "init_lora_weights": "olora"}
    ours, theirs = make(engine, "LoraConfig", family, fields), make(peft, "LoraConfig", family, fields)
    base = tiny.logits(tiny.FAMILIES[family]())
    assert (tiny.logits(ours) - base).abs().max() < 1e-5
    # A classifier's head starts at random in neither library; both hold the base's.
    if family != "bert":
        losses = [train_steps(model, 20) for model in (ours, theirs)]
        assert losses[0][0] - losses[0][-1] > 0.02
        assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4
    tiny.shake(ours, 0.05)
    tiny.shake(theirs, 0.05)
    trained = tiny.logits(ours.eval())
    assert (trained - tiny.logits(theirs.eval())).abs().max() < 1e-3
    assert (trained - base).abs().max() > 1e-2
    save(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 12, True)
    for library in (engine, peft):
        assert (tiny.logits(load(library, family, tmp_path)) - trained).abs().max() < 1e-5
    with ours.disable_adapter(), torch.no_grad():
        base = tiny.logits(tiny.FAMILIES[family]())
        assert torch.equal(tiny.logits(ours), base)


def test_olora_at_conv1d_factors_the_matrix_that_acts(tmp_path: Path) -> None:
    """PEFT factors GPT-2's weight as stored, (in, out), which fits only square layers."""
    ours = make(engine, "LoraConfig", "gpt2", {**FIELDS, "init_lora_weights": "olora"})
    base = tiny.gpt2()
    assert (tiny.logits(ours) - tiny.logits(base)).abs().max() < 1e-5
    w = base.transformer.h[0].attn.c_attn.weight.T
    q, upper = torch.linalg.qr(w)
    parts = ours.adapter_parameters()
    assert torch.allclose(parts["transformer.h.0.attn.c_attn.lora_A.weight"], upper[:4], atol=1e-6)
    assert torch.allclose(parts["transformer.h.0.attn.c_attn.lora_B.weight"], q[:, :4], atol=1e-6)
    tiny.shake(ours, 0.05)
    save(ours, tmp_path)
    assert (tiny.logits(load(peft, "gpt2", tmp_path)) - tiny.logits(ours)).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_orthogonal_starts_and_trains_as_in_peft(family: str, tmp_path: Path) -> None:
    fields = {**FIELDS, "init_lora_weights": "orthogonal", "use_rslora": True}
    torch.manual_seed(5)
    ours = make(engine, "LoraConfig", family, fields)
    for name, a in ours.adapter_parameters().items():
        if "lora_A" in name:
            b = ours.adapter_parameters()[name.replace("lora_A", "lora_B")]
            assert a.any() and b.any() and float((b @ a).abs().max()) < 1e-6
    base = tiny.logits(tiny.FAMILIES[family]())
    assert (tiny.logits(ours) - base).abs().max() < 1e-5
    # Its file is a plain LoRA of the same rank; PEFT goes on from it.
    ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (4, "orthogonal")
    theirs = load(peft, family, tmp_path, is_trainable=True)
    losses = [train_steps(model, 20) for model in (ours, theirs)]
    assert losses[0][0] - losses[0][-1] > 0.02
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4


def test_orthogonal_draws_by_the_law_of_peft() -> None:
    for library in (engine, peft):
        config = library.LoraConfig(r=8, init_lora_weights="orthogonal", target_modules=["0"])
        model = library.get_peft_model(nn.Sequential(nn.Linear(300, 200)), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                # The r/2 rows in use have squares that sum to r/2; hence a variance of 1/2, divided by 100.
                assert float(parameter.detach().std()) == pytest.approx(0.1 * 0.5**0.5, rel=0.05), name


def test_with_dora_and_patterns(tmp_path: Path) -> None:
    fields = {**FIELDS, "init_lora_weights": "olora", "use_dora": True, "rank_pattern": {"q_proj": 2}}
    ours = tiny.shake(make(engine, "LoraConfig", "llama", fields), 0.05)
    save(ours, tmp_path)
    for library in (engine, peft):
        assert (tiny.logits(load(library, "llama", tmp_path)) - tiny.logits(ours)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"init_lora_weights": "orthogonal", "r": 3}, "even rank"),
        ({"init_lora_weights": "olora", "r": 200}, "at least that many singular values"),
        ({"init_lora_weights": "olora", "target_modules": ["embed_tokens"]}, "embed_tokens is an embedding"),
        ({"init_lora_weights": "orthogonal", "target_modules": ["embed_tokens"]}, "embed_tokens is an embedding"),
    ],
)
def test_refusals(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(TargetError, match=words):
        engine.get_peft_model(tiny.llama(), engine.LoraConfig(**{"target_modules": ["q_proj"], **fields}))


def test_a_base_that_is_not_finite_cannot_be_factored() -> None:
    layer = nn.Sequential(nn.Linear(8, 8))
    layer[0].weight.data[0, 0] = torch.nan
    with pytest.raises(TargetError, match="not finite"):
        engine.get_peft_model(layer, engine.LoraConfig(r=2, target_modules=["0"], init_lora_weights="olora"))
