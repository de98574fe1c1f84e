"""Changing ranks: the function and the moments stay when it grows, the nearest change is left when it shrinks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import IA3Config, LoraConfig, PeftModel, expand_lora_rank, get_peft_model, reduce_lora_rank
from engine.errors import ConfigError
from tests import tiny
from tests.test_mixing import changes, nearest

KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (tiny.llama, {"target_modules": ["q_proj", "down_proj"], "lora_bias": True}),
    "rslora": (tiny.llama, {"target_modules": ["q_proj"], "use_rslora": True, "alpha_pattern": {"1.*q_proj": 3}}),
    "conv1d": (tiny.gpt2, {"target_modules": ["c_attn"]}),
    "embedding": (tiny.llama, {"target_modules": ["embed_tokens"]}),
    "convolution": (tiny.pixels, {"target_modules": ["first", "second"]}),
    "pissa": (tiny.llama, {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
}


@pytest.fixture(params=list(KINDS))
def model(request: pytest.FixtureRequest) -> Any:
    build, fields = KINDS[request.param]
    return tiny.shake(get_peft_model(build(), LoraConfig(r=6, lora_alpha=9, **fields)), 0.2)


def same_elsewhere(model: Any, tmp: Path) -> None:
    """The adapter's file gives the same outputs on a fresh base."""
    model.save_pretrained(tmp)
    for build, fields in KINDS.values():
        if fields["target_modules"] == model.peft_config["default"].target_modules:
            again = PeftModel.from_pretrained(build(), tmp)
            assert (tiny.logits(again) - tiny.logits(model)).abs().max() < 1e-5
            return
    raise AssertionError("no such model")


def test_reduced_to_the_nearest_of_the_rank(model: Any, tmp_path: Path) -> None:
    dense = changes(model, "default")
    trainable = [p.requires_grad for p in model.adapter_parameters().values()]
    scales = {layer.module_name: layer.adapters["default"].scale for layer in model._layers["default"]}
    report = reduce_lora_rank(model, 3)
    for module, change in changes(model, "default").items():
        best = nearest(dense[module], 3)
        assert torch.allclose(change, best, atol=1e-5), module
        error = float((best - dense[module]).norm() / dense[module].norm())
        assert report[module].error == pytest.approx(error, abs=1e-5)
        assert report[module].after == 3 and error > 0.05
    for layer in model._layers["default"]:
        assert layer.adapters["default"].scale == pytest.approx(scales[layer.module_name])
    assert [p.requires_grad for p in model.adapter_parameters().values()] == trainable
    same_elsewhere(model, tmp_path)
    tiny.logits(model).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in model.adapter_parameters().values())


def test_reduced_by_energy(model: Any, tmp_path: Path) -> None:
    dense, before = changes(model, "default"), tiny.logits(model)
    report = reduce_lora_rank(model, energy=0.8)
    for module, item in report.items():
        squares = torch.linalg.svdvals(dense[module].flatten(1)).square()
        shares = squares.cumsum(0) / squares.sum()
        assert shares[item.after - 1] >= 0.8 and (item.after == 1 or shares[item.after - 2] < 0.8)
        assert item.error == pytest.approx(float((1 - shares[item.after - 1]).clamp(min=0).sqrt()), abs=1e-4)
        assert model.peft_config["default"].rank_of(module) == item.after
        assert torch.allclose(changes(model, "default")[module], nearest(dense[module], item.after), atol=1e-5)
    assert not torch.equal(tiny.logits(model), before)
    same_elsewhere(model, tmp_path)


def test_all_the_energy_is_the_same_function(model: Any) -> None:
    before = tiny.logits(model)
    report = reduce_lora_rank(model, energy=1.0)
    assert (tiny.logits(model) - before).abs().max() < 1e-5
    assert all(item.error < 1e-5 for item in report.values())


def test_a_rank_that_is_not_needed_goes_and_a_fresh_adapter_still_learns() -> None:
    model = tiny.shake(get_peft_model(tiny.llama(), LoraConfig(r=3, target_modules=["q_proj"])), 0.3)
    before = tiny.logits(model)
    expand_lora_rank(model, LoraConfig(r=16, lora_alpha=4))
    assert {item.after for item in reduce_lora_rank(model, energy=1 - 1e-9).values()} == {3}
    assert (tiny.logits(model) - before).abs().max() < 1e-5
    for targets in (["q_proj"], ["embed_tokens"]):
        fresh = get_peft_model(tiny.llama(), LoraConfig(r=8, target_modules=targets))
        assert {item.error for item in reduce_lora_rank(fresh, 2).values()} == {0.0}
        tiny.logits(fresh).square().mean().backward()
        assert any(p.grad.abs().max() > 0 for p in fresh.adapter_parameters().values())


def test_expansion_keeps_function_and_moments(model: Any, tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW(model.adapter_parameters().values(), lr=1e-3)
    for _ in range(2):
        tiny.logits(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = tiny.logits(model)
    old = {name: (p, optimizer.state[p]) for name, p in model.adapter_parameters().items()}
    scales = {layer.module_name: layer.adapters["default"].scale for layer in model._layers["default"]}
    expand_lora_rank(model, LoraConfig(r=10, lora_alpha=40), optimizer=optimizer)
    assert (tiny.logits(model) - before).abs().max() < 2e-5
    for name, parameter in model.adapter_parameters().items():
        ratio = 1.0 if "_A" in name else (40 / 10) / scales[re.sub(r"\.lora.*", "", name)]
        corner = tuple(slice(0, n) for n in old[name][0].shape)
        state = optimizer.state[parameter]
        assert torch.allclose(state["exp_avg"][corner], old[name][1]["exp_avg"] * ratio, rtol=1e-5)
        assert torch.allclose(state["exp_avg_sq"][corner], old[name][1]["exp_avg_sq"] * ratio**2, rtol=1e-5)
    tiny.logits(model).square().mean().backward()
    # What is new learns: its half of the pair that is not zero gives the other half a gradient.
    names = [name for name in old if "embedding_A" in name or "lora_B.weight" in name]
    for name in names:
        gradient = model.adapter_parameters()[name].grad
        new = gradient[6:] if "embedding_A" in name else gradient[:, 6:]
        assert new.abs().max() > 0, name
    optimizer.step()
    same_elsewhere(model, tmp_path)


def test_what_is_refused() -> None:
    model = get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    model.add_adapter("other", IA3Config(target_modules=["v_proj"]))
    for call, words in (
        ({}, "needs a rank r, an energy share"),
        ({"r": 0}, "r is 0"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"r": 2, "adapter_name": "other"}, "serves LoRA adapters; 'other' is IA3"),
        ({"r": 2, "adapter_name": "nobody"}, "no adapter 'nobody'"),
    ):
        with pytest.raises(ConfigError, match=words):
            reduce_lora_rank(model, **call)
    model.merge_adapter()
    with pytest.raises(ConfigError, match=r"merged into .*q_proj"):
        reduce_lora_rank(model, 2)
    with pytest.raises(ConfigError, match=r"merged into .*q_proj"):
        expand_lora_rank(model, LoraConfig(r=8))
