"""What merging leaves behind: after an error, while adapters are switched, and while others are attached."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from engine import DoRAConfig, LoraConfig, PeftModel, get_peft_model
from engine.errors import EngineError
from tests import tiny

TARGETS = ["q_proj", "v_proj"]


def two(first: Any = None, second: Any = None) -> PeftModel:
    """Adapters a (active) and b on the tiny Llama."""
    model = tiny.shake(get_peft_model(tiny.llama(), first or LoraConfig(r=4, target_modules=TARGETS), "a"))
    model.add_adapter("b", second or LoraConfig(r=6, lora_alpha=24, target_modules=TARGETS))
    model.set_adapter("b")
    tiny.shake(model, 0.3)
    model.set_adapter("a")
    return model


def alone(model: PeftModel, name: str) -> torch.Tensor:
    model.set_adapter(name)
    return tiny.logits(model)


def damage(model: PeftModel, adapter: str = "a") -> None:
    """NaN in the last of the adapter's layers."""
    with torch.no_grad():
        list(model.adapter_parameters(adapter).values())[-1][0, 0] = float("nan")


@pytest.mark.parametrize("merge", [PeftModel.merge_adapter, PeftModel.merge_and_unload])
def test_a_refused_merge_changes_no_layer(merge: Callable[[PeftModel], Any]) -> None:
    model = two()
    damage(model)
    with pytest.raises(EngineError, match="not finite; nothing is merged"):
        merge(model)
    assert not model.merged_layers()
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), tiny.logits(tiny.llama()))
    assert torch.equal(tiny.logits(model.unload()), tiny.logits(tiny.llama()))


@pytest.mark.parametrize("merge", [PeftModel.merge_adapter, PeftModel.merge_and_unload])
def test_a_bias_without_a_place_is_refused_before_any_layer_changes(merge: Callable[[PeftModel], Any]) -> None:
    model = tiny.shake(get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj", "down_proj"], lora_bias=True)))
    with pytest.raises(EngineError, match="no bias to merge"):
        merge(model)
    assert torch.equal(tiny.logits(model.unload()), tiny.logits(tiny.llama()))


@pytest.mark.parametrize("merge", [PeftModel.merge_adapter, PeftModel.merge_and_unload])
def test_what_was_merged_before_a_refused_merge_stays_merged(merge: Callable[..., Any]) -> None:
    model = two()
    damage(model, "b")
    model.merge_adapter(["a"])
    merged = tiny.logits(model)
    with pytest.raises(EngineError, match="not finite"):
        merge(model, adapter_names=["a", "b"])
    assert all(layer.merged == {"a": 1.0} for layer in model.merged_layers()) and len(model.merged_layers()) == 4
    assert torch.equal(tiny.logits(model), merged)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), tiny.logits(tiny.llama()))


def test_switching_unmerges_as_in_peft() -> None:
    model = two()
    b, a = alone(model, "b"), alone(model, "a")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="'a' was merged"):
        assert torch.equal(alone(model, "b"), b)
    assert torch.equal(alone(model, "a"), a)
    model.set_adapter_weights({"a": 0.5, "b": 0.25})
    mixed = tiny.logits(model)
    model.set_adapter("a")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="unmerged"):
        model.set_adapter_weights({"a": 0.5, "b": 0.25})
    assert torch.equal(tiny.logits(model), mixed)
    theirs = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=4, target_modules=TARGETS), "a")
    theirs.add_adapter("b", peft.LoraConfig(r=6, lora_alpha=24, target_modules=TARGETS))
    theirs.merge_adapter()
    with pytest.warns(UserWarning, match="[Uu]nmerging"):
        theirs.set_adapter("b")
    assert not any(getattr(module, "merged", False) for module in theirs.modules())


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=TARGETS, bias="lora_only"),
        LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"),
        DoRAConfig(r=4, target_modules=TARGETS),
    ],
    ids=["bias", "pissa", "dora"],
)
def test_an_adapter_attached_while_another_is_merged_starts_from_the_base(config: Any) -> None:
    model = tiny.shake(get_peft_model(tiny.llama(), LoraConfig(target_modules=TARGETS, bias="lora_only"), "a"), 0.3)
    live = tiny.logits(model)
    model.merge_adapter()
    merged = tiny.logits(model)
    model.add_adapter("b", config)
    assert torch.equal(tiny.logits(model), merged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = alone(model, "b")
    assert (started - tiny.logits(tiny.llama())).abs().max() < 1e-5
    assert torch.equal(alone(model, "a"), live)


@pytest.mark.parametrize("targets", [TARGETS, ["embed_tokens", "q_proj"]])
def test_an_adapter_loads_while_another_is_merged(targets: list[str], tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=targets)
    model = tiny.shake(get_peft_model(tiny.llama(), config), 0.3)
    live = tiny.logits(model)
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    merged = tiny.logits(model)
    model.load_adapter(tmp_path, "b")
    assert torch.equal(tiny.logits(model), merged)
    with pytest.warns(UserWarning, match="unmerged"):
        model.set_adapter("b")
    assert torch.equal(tiny.logits(model), live)
