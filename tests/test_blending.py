"""Blends: what is heard live is what is kept, for every type, and the model is as before afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import DoRAConfig, IA3Config, LoraConfig, MoRAConfig, PeftModel, reduce_lora_rank
from engine.blending import BLEND, KEPT, Blender, blend_error, combine, save_blend
from engine.combinations import COMBINATIONS, LIVE, Blend
from engine.errors import ConfigError
from engine.resize import rank_errors
from tests import tiny
from tests.test_mixing import dense, model_with

WEIGHTS = {"one": 0.7, "two": -0.4}


def of_loras(first: int = 4, second: int = 4) -> Any:
    return model_with(
        tiny.llama,
        {
            "one": LoraConfig(r=first, lora_alpha=9, target_modules=["q_proj", "down_proj"]),
            "two": LoraConfig(r=second, target_modules=["q_proj", "v_proj"]),
        },
    )


def of_ia3s() -> Any:
    first = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    second = IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    return model_with(tiny.llama, {"one": first, "two": second})


def heard(model: Any, blend: Blend, blender: Blender | None = None) -> torch.Tensor:
    with (blender or Blender()).applied({"model": model}, blend):
        return tiny.logits(model)


def reopened(folder: Path) -> torch.Tensor:
    return tiny.logits(PeftModel.from_pretrained(tiny.llama(), folder))


@pytest.mark.parametrize("build", [lambda: of_loras(4, 3), of_ia3s], ids=["loras of unequal ranks", "ia3"])
def test_what_is_heard_live_is_exactly_what_is_kept(build: Any, tmp_path: Path) -> None:
    model, blend = build(), Blend(WEIGHTS)
    before = tiny.logits(model)
    live = heard(model, blend)
    assert save_blend({"model": model}, blend, tmp_path) < 1e-5
    assert (reopened(tmp_path) - live).abs().max() < 1e-5
    assert (live - before).abs().max() > 1e-3
    assert not {BLEND, KEPT} & {*model.peft_config} and torch.equal(tiny.logits(model), before)


@pytest.mark.parametrize("how", COMBINATIONS)
def test_every_type_is_heard_as_it_is_kept(how: str, tmp_path: Path) -> None:
    model, blend = of_loras(), Blend(WEIGHTS, how, density=0.4, seed=5)
    told = heard(model, blend)
    save_blend({"model": model}, blend, tmp_path)
    assert (reopened(tmp_path) - told).abs().max() < 1e-5
    assert (told - heard(model, Blend(WEIGHTS))).abs().max() > (1e-4 if how not in ("cat", "svd") else -1)


def test_a_combination_is_made_once_for_its_settings_and_taken_off_with_clear() -> None:
    model, blender = of_loras(), Blender()
    heard(model, Blend(WEIGHTS, "svd"), blender)
    first = model._layers[BLEND]
    heard(model, Blend(WEIGHTS, "svd"), blender)
    assert model._layers[BLEND] is first
    heard(model, Blend({"one": 1.0}, "svd"), blender)
    assert model._layers[BLEND] is not first
    blender.clear()
    assert set(model.peft_config) == {"one", "two"}


def test_a_part_without_any_of_the_adapters_answers_as_the_base() -> None:
    model = model_with(tiny.llama, {"other": LoraConfig(r=2, target_modules=["q_proj"])})
    model.set_adapter("other")
    with Blender().applied({"unet": of_loras(), "text_encoder": model}, Blend(WEIGHTS)):
        assert torch.equal(tiny.logits(model), tiny.logits(tiny.llama()))
    assert not model.switchboard.disabled and model.active_adapters == ["other"]


def test_other_methods_become_the_nearest_lora_and_the_error_is_told(tmp_path: Path) -> None:
    model = model_with(
        tiny.llama,
        {"one": DoRAConfig(r=4, target_modules=["q_proj"]), "two": MoRAConfig(r=4, target_modules=["q_proj"])},
    )
    errors = []
    for rank in (2, 8):
        blend = Blend(WEIGHTS, rank=rank)
        errors.append(save_blend({"model": model}, blend, tmp_path / str(rank)))
        combine(model, blend, "kept")
        assert blend_error(model, blend, "kept") == pytest.approx(errors[-1])
        off = sum(float((dense(model, {"kept": 1.0})[n] - m).square().sum()) for n, m in dense(model, WEIGHTS).items())
        whole = sum(float(m.square().sum()) for m in dense(model, WEIGHTS).values())
        assert errors[-1] == pytest.approx((off / whole) ** 0.5, rel=1e-6)
        model.delete_adapter("kept")
    assert errors[0] > errors[1] > 0


def test_what_cannot_be_a_blend_says_every_fault_at_once() -> None:
    with pytest.raises(ConfigError) as fault:
        Blend({"one": float("nan")}, "louder", rank=0, density=0)
    assert all(word in fault.value.message for word in ("nan", "louder", "rank", "density"))
    with pytest.raises(ConfigError, match="empty"):
        Blend({}, LIVE)
    with pytest.raises(ConfigError, match="attached here"):
        save_blend({"model": of_loras()}, Blend({"nobody": 1.0}), Path("unused"))


def test_rank_errors_are_those_of_reducing() -> None:
    told = rank_errors(of_loras(), "one")
    assert len(told) == 4 and told == sorted(told, reverse=True) and told[-1] == 0
    for r in (1, 3):
        model = of_loras()
        before = dense(model, {"one": 1.0})
        reduce_lora_rank(model, r, adapter_name="one")
        after = dense(model, {"one": 1.0})
        off = sum(float((after[name] - change).square().sum()) for name, change in before.items())
        assert told[r - 1] == pytest.approx(
            (off / sum(float(c.square().sum()) for c in before.values())) ** 0.5, rel=1e-4
        )
