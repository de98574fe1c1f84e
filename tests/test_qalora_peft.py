"""QA-LoRA against its formula, against the PEFT library's form, and merged into the zeros of a quantised base."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import engine
from engine.errors import ConfigError, TargetError
from engine.quantized import QuantizedLinear
from tests import tiny
from tests.differential import gradients, peft, save, train_steps

TARGETS = ["q_proj", "down_proj"]
FIELDS: dict[str, Any] = {
    "r": 4, "lora_alpha": 6, "use_qalora": True, "qalora_group_size": 8, "target_modules": TARGETS,
    "task_type": "CAUSAL_LM",
}  # fmt: skip


def their_config() -> Any:
    """PEFT offers QA-LoRA at GPTQ layers only; that layer class also runs over a plain linear layer."""
    from peft.tuners.lora.gptq import GPTQLoraLinear

    config = peft.LoraConfig(**FIELDS)
    config._register_custom_module({nn.Linear: GPTQLoraLinear})
    return config


def theirs_from(folder: Path | None = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if folder is None:
            return peft.get_peft_model(tiny.llama(), their_config()).eval()
        return peft.PeftModel.from_pretrained(tiny.llama(), folder, config=their_config()).eval()


def test_pefts_form_both_directions(tmp_path: Path) -> None:
    theirs = tiny.shake(theirs_from(), 0.05)
    their_file = save(theirs, tmp_path / "theirs")
    ours = engine.PeftModel.from_pretrained(tiny.llama(), tmp_path / "theirs", is_trainable=True).eval()
    assert ours.peft_config["default"].method == "qalora"
    assert (tiny.logits(theirs) - tiny.logits(tiny.llama())).abs().max() > 1e-2
    assert (tiny.logits(ours) - tiny.logits(theirs)).abs().max() < 1e-5
    our_file = save(ours, tmp_path / "ours")
    assert our_file.keys() == their_file.keys()
    assert all(torch.equal(our_file[key], their_file[key]) for key in their_file)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["use_qalora"], config["qalora_group_size"]) == ("LORA", True, 8)
    assert (tiny.logits(theirs_from(tmp_path / "ours")) - tiny.logits(theirs)).abs().max() < 1e-5
    merged = copy.deepcopy(ours).merge_and_unload()
    assert (tiny.logits(merged) - tiny.logits(theirs)).abs().max() < 1e-5
    mine, other = gradients(ours, tmp_path / "g1"), gradients(theirs, tmp_path / "g2")
    assert all(torch.allclose(mine[key], other[key], atol=1e-5) for key in other)


def test_twenty_steps_as_peft_takes_them(tmp_path: Path) -> None:
    theirs = theirs_from()
    save(theirs, tmp_path)
    ours = engine.PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    mine, other = train_steps(ours, 20), train_steps(theirs, 20)
    assert other[0] - other[-1] > 0.02
    assert max(abs(a - b) for a, b in zip(mine, other, strict=True)) < 1e-4


def adapter_over(layer: nn.Module, **fields: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    config = engine.QALoRAConfig(**{"r": 3, "lora_alpha": 6, "qalora_group_size": 4, "target_modules": ["0"], **fields})
    model = tiny.shake(engine.get_peft_model(nn.Sequential(layer), config).double())
    return model, model.adapter_parameters()


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 3), (True, 6 / 3**0.5)])
def test_against_the_formula(rslora: bool, scale: float) -> None:
    """y = W x + s B A AvgPool_g(x), the pooling by torch's own average."""
    layer = nn.Linear(12, 5).double()
    model, parts = adapter_over(layer, use_rslora=rslora)
    x = torch.randn(7, 12).double()
    pooled = nn.functional.avg_pool1d(x[:, None], 4)[:, 0]
    expected = layer(x) + scale * pooled @ parts["0.lora_A.weight"].T @ parts["0.lora_B.weight"].T
    assert parts["0.lora_A.weight"].shape == (3, 3)
    assert torch.allclose(model(x), expected, atol=1e-12)
    model.merge_adapter()
    assert torch.allclose(model(x), expected, atol=1e-12)


@pytest.mark.parametrize(("group", "base_group"), [(4, 4), (12, 4), (6, 2)])
def test_merged_into_the_zeros_exactly(group: int, base_group: int) -> None:
    torch.manual_seed(0)
    base = QuantizedLinear.from_linear(nn.Linear(12, 5).double(), base_group)
    codes, scales, zeros = base.weight.clone(), base.scales.clone(), base.zeros.clone()
    dense = base.dequantized()
    model, parts = adapter_over(base, qalora_group_size=group)
    x = torch.randn(7, 12).double()
    before = model(x)
    b_a = parts["0.lora_B.weight"] @ parts["0.lora_A.weight"]
    expected = zeros.clone()
    for k in range(12 // base_group):
        expected[k] -= (6 / 3) * b_a[:, k * base_group // group].detach() / group / scales[k]
    model.merge_adapter()
    assert torch.allclose(base.zeros, expected, atol=1e-12)
    assert torch.equal(base.weight, codes) and torch.equal(base.scales, scales)
    assert torch.allclose(model(x), before, atol=1e-12)
    change = (6 / 3) * b_a.repeat_interleave(group, 1) / group
    assert torch.allclose(base.dequantized(), dense + change, atol=1e-12)
    model.merge_adapter()
    assert torch.allclose(model(x), before, atol=1e-12)
    model.unmerge_adapter()
    assert torch.equal(base.zeros, zeros)
    plain = model.merge_and_unload()
    assert isinstance(plain[0], QuantizedLinear) and torch.allclose(plain(x), before, atol=1e-12)


def test_a_quantised_language_model_trains_merges_and_travels(tmp_path: Path) -> None:
    def quantised() -> nn.Module:
        return engine.quantize_linears(tiny.llama(), ["q_proj", "down_proj", "o_proj"], 8)

    config = engine.QALoRAConfig(r=4, qalora_group_size=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    base, model = tiny.logits(quantised()), engine.get_peft_model(quantised(), config)
    assert torch.equal(tiny.logits(model), base)
    losses = train_steps(model, 15, 3e-2)
    assert losses[0] - losses[-1] > 0.02
    trained = tiny.logits(model.eval())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "QALORA"
    again = engine.PeftModel.from_pretrained(quantised(), tmp_path)
    assert torch.equal(tiny.logits(again), trained)
    with again.disable_adapter():
        assert torch.equal(tiny.logits(again), base)
    again.merge_adapter()
    assert (tiny.logits(again) - trained).abs().max() < 1e-5
    assert (tiny.logits(again.merge_and_unload()) - trained).abs().max() < 1e-5
    # PEFT must refuse the paper's form, not misread it as its own.
    with pytest.raises((ValueError, KeyError), match="QALORA"):
        peft.PeftModel.from_pretrained(tiny.llama(), tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"qalora_group_size": 0}, "qalora_group_size is 0"),
        ({"use_qalora": False}, "use_qalora is False"),
        ({"use_dora": True}, "use_dora and use_qalora are True"),
        ({"lora_bias": True}, "lora_bias is True with use_qalora"),
        ({"init_lora_weights": "pissa"}, "'pissa' with use_qalora"),
    ],
)
def test_config_faults(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        engine.QALoRAConfig(**fields)


def test_refusals() -> None:
    with pytest.raises(TargetError, match=r"groups of qalora_group_size=5 inputs, and .*q_proj has 32"):
        engine.get_peft_model(tiny.llama(), engine.QALoRAConfig(qalora_group_size=5, target_modules=TARGETS))
    model, _ = adapter_over(QuantizedLinear.from_linear(nn.Linear(12, 5).double(), 4), qalora_group_size=6)
    with pytest.raises(TargetError, match="groups of 4, and this adapter's change is constant over groups of 6"):
        model.merge_adapter()
    lora = engine.LoraConfig(r=2, target_modules=["0"])
    model = engine.get_peft_model(nn.Sequential(QuantizedLinear.from_linear(nn.Linear(12, 5), 4)), lora)
    with pytest.raises(TargetError, match="0 is quantised"):
        model.merge_adapter()
