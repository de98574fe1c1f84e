"""LoRA-FA: A frozen, files that PEFT reads as LoRA, and the optimizer with the projected gradient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import engine
from engine.errors import ConfigError
from tests import tiny
from tests.differential import load, make, peft, save, train_steps

FIELDS: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_trains_as_a_lora_whose_a_is_frozen_by_hand(family: str, tmp_path: Path) -> None:
    ours = make(engine, "LoRAFAConfig", family, FIELDS)
    save(ours, tmp_path / "start")
    theirs = load(peft, family, tmp_path / "start", is_trainable=True)
    for name, parameter in theirs.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    mine, other = train_steps(ours, 20), train_steps(theirs, 20)
    assert other[0] - other[-1] > 0.02
    assert max(abs(a - b) for a, b in zip(mine, other, strict=True)) < 1e-4
    before, after = save(ours, tmp_path / "end"), load(peft, family, tmp_path / "end")
    assert (tiny.logits(after) - tiny.logits(ours.eval())).abs().max() < 1e-5
    start = save(load(engine, family, tmp_path / "start"), tmp_path / "again")
    for key, value in start.items():
        assert torch.equal(value, before[key]) == ("lora_A" in key), key


def test_training_goes_on_from_a_file_with_a_still_frozen(tmp_path: Path) -> None:
    model = tiny.shake(make(engine, "LoRAFAConfig", "llama", FIELDS))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["use_lorafa"]) == ("LORA", True)
    again = load(engine, "llama", tmp_path, is_trainable=True)
    assert again.peft_config["default"].method == "lorafa"
    assert list(again.adapter_parameters()) == list(model.adapter_parameters())
    assert not any("lora_A" in name for name in again.adapter_parameters())
    assert "use_lorafa" not in engine.LoraConfig().to_dict()
    with pytest.raises(ConfigError, match="use_dora and use_lorafa are True"):
        engine.LoraConfig(use_dora=True, use_lorafa=True)


def test_the_backward_pass_keeps_no_input() -> None:
    """x, of d values a row, is not saved where A is frozen: A x, of r values, is enough."""

    def kept(config: Any) -> int:
        model = engine.get_peft_model(nn.Sequential(nn.Linear(256, 8)), config).train()
        saved: list[torch.Tensor] = []
        x = torch.randn(64, 256, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            model(x)
        return sum(t.shape == (64, 256) for t in saved)

    assert kept(engine.LoraConfig(r=2, target_modules=["0"])) == 1
    assert kept(engine.LoRAFAConfig(r=2, target_modules=["0"])) == 0
