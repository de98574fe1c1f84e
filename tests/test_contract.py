"""What every adapter method must keep, run over the registry and every kind of layer that a method claims.

A new method is tested by standing in the registry; FITTING needs a line only where its defaults don't fit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import PeftModel, get_peft_model
from engine.adapters import ADAPTERS
from engine.adapters.base import CONV1D, CONV2D, EMBEDDING, LINEAR, PROMPT
from engine.errors import EngineError
from engine.inspection import adapter_config
from engine.model import spec_of
from studio import forms, presets
from tests import tiny

# A model for each kind of layer, and the names of such layers in it.
LAYERS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    LINEAR: (tiny.llama, ["q_proj", "down_proj"]),
    CONV1D: (tiny.gpt2, ["c_attn", "c_fc"]),
    EMBEDDING: (tiny.llama, ["embed_tokens"]),
    CONV2D: (tiny.pixels, ["first", "second"]),
    PROMPT: (tiny.llama, []),
}
# Settings for methods whose defaults are too large for models this small.
FITTING: dict[str, dict[str, Any]] = {
    "delta_lora": {"start_step": 0},
    "mora": {"r": 4},
    "qalora": {"qalora_group_size": 8},
    **{name: {"num_virtual_tokens": 4} for name in ("prompt_tuning", "p_tuning", "prefix_tuning")},
}
# What a method writes beside the two files that all have.
BESIDE: dict[str, list[str]] = {"p_tuning": ["prompt_encoder.safetensors"]}
CASES = [(name, kind) for name in ADAPTERS for kind in LAYERS]


def config(name: str, targets: list[str], **more: Any) -> Any:
    if PROMPT not in ADAPTERS[name].layers:
        more["target_modules"] = targets
    return ADAPTERS[name].config(**FITTING.get(name, {}), **more)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest) -> tuple[str, Callable[[], nn.Module], list[str]]:
    name, kind = request.param
    if kind not in ADAPTERS[name].layers:
        pytest.skip(f"{name} does not claim {kind}")
    return name, *LAYERS[kind]


def test_identity_at_start_and_only_adapter_gradients(case: Any) -> None:
    name, build, targets = case
    model = get_peft_model(build(), config(name, targets))
    if ADAPTERS[name].identity_at_start:
        assert torch.equal(tiny.logits(model), tiny.logits(build()))
    tiny.shake(model)
    tiny.logits(model).square().sum().backward()
    own = {id(p) for p in model.adapter_parameters().values()}
    for path, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in own), path
        assert parameter.requires_grad == (id(parameter) in own), path


def test_merged_equals_unmerged_twice_and_back(case: Any) -> None:
    name, build, targets = case
    if not ADAPTERS[name].mergeable:
        pytest.skip("not mergeable")
    model = tiny.shake(get_peft_model(build(), config(name, targets)))
    before, weights = tiny.logits(model), copy.deepcopy(build().state_dict())
    model.merge_adapter()
    once = tiny.logits(model)
    model.merge_adapter()
    assert torch.equal(once, tiny.logits(model))
    assert (once - before).abs().max() < 1e-5
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), tiny.logits(build()))
    assert torch.equal(once, tiny.logits(model))
    model.unmerge_adapter()
    assert torch.equal(before, tiny.logits(model))
    plain = model.merge_and_unload()
    assert (tiny.logits(plain) - before).abs().max() < 1e-5
    assert plain.state_dict().keys() == weights.keys()


def test_disable_and_unload_restore_the_base_bit_for_bit(case: Any) -> None:
    name, build, targets = case
    model = tiny.shake(get_peft_model(build(), config(name, targets)))
    base = tiny.logits(build())
    assert not torch.equal(tiny.logits(model), base)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), base)
    plain = model.unload()
    assert torch.equal(tiny.logits(plain), base)
    for (key, a), (_, b) in zip(plain.state_dict().items(), build().state_dict().items(), strict=True):
        assert torch.equal(a, b), key


def test_save_and_load(case: Any, tmp_path: Path) -> None:
    name, build, targets = case
    model = tiny.shake(get_peft_model(build(), config(name, targets)))
    model.save_pretrained(tmp_path)
    files = ["adapter_config.json", "adapter_model.safetensors", *BESIDE.get(name, [])]
    assert sorted(p.name for p in tmp_path.iterdir()) == files
    again = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    assert again.get_nb_trainable_parameters()[0] == 0
    trainable = PeftModel.from_pretrained(build(), tmp_path, is_trainable=True)
    assert trainable.get_nb_trainable_parameters()[0] == model.get_nb_trainable_parameters()[0]


def test_switching_weights_and_deletion(case: Any, tmp_path: Path) -> None:
    name, build, targets = case
    model = get_peft_model(build(), config(name, targets), "one")
    tiny.shake(model, 0.2)
    one = tiny.logits(model)
    model.add_adapter("two", config(name, targets))
    assert torch.equal(tiny.logits(model), one)
    model.set_adapter("two")
    tiny.shake(model, 0.3)
    two = tiny.logits(model)
    assert not torch.equal(one, two)
    model.set_adapter("one")
    assert torch.equal(tiny.logits(model), one)
    if ADAPTERS[name].mixable:
        model.set_adapter_weights({"one": 1.0, "two": 0.0})
        assert torch.equal(tiny.logits(model), one)
        model.set_adapter_weights({"one": 0.5, "two": -0.7})
        mixed = tiny.logits(model)
        assert not torch.equal(mixed, one)
        if ADAPTERS[name].mergeable:
            model.merge_adapter()
            assert (tiny.logits(model) - mixed).abs().max() < 1e-5
            model.unmerge_adapter()
    model.delete_adapter("one")
    assert model.active_adapters == ["two"]
    model.set_adapter("two")
    assert torch.equal(tiny.logits(model), two)
    assert not any("one" in key.split(".") for key in model.state_dict())
    with pytest.raises(EngineError, match="no adapter 'one'"):
        model.set_adapter("one")


def test_copies_are_independent(case: Any) -> None:
    name, build, targets = case
    model = tiny.shake(get_peft_model(build(), config(name, targets)))
    before = tiny.logits(model)
    twin = copy.deepcopy(model)
    tiny.shake(twin, 0.5)
    assert torch.equal(tiny.logits(model), before)
    with twin.disable_adapter():
        assert torch.equal(tiny.logits(model), before)
        assert torch.equal(tiny.logits(twin), tiny.logits(build()))


def test_meta_device_counts(case: Any) -> None:
    name, build, targets = case
    real = get_peft_model(build(), config(name, targets)).get_nb_trainable_parameters()
    with torch.device("meta"):
        shapes = build()
    assert get_peft_model(shapes, config(name, targets)).get_nb_trainable_parameters() == real


def test_autocast_bf16(case: Any) -> None:
    name, build, targets = case
    model = tiny.shake(get_peft_model(build(), config(name, targets)))
    exact = tiny.logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        rough = tiny.logits(model).float()
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_mixed_batch_equals_separate_runs(name: str) -> None:
    targets = ["q_proj", "down_proj", *(["embed_tokens"] if EMBEDDING in ADAPTERS[name].layers else [])]
    model = get_peft_model(tiny.llama(), config(name, targets), "one")
    tiny.shake(model, 0.2)
    model.add_adapter("two", config(name, ["v_proj"]))
    model.set_adapter("two")
    tiny.shake(model, 0.3)
    x = tiny.ids(3)
    together = model(x, adapter_names=["one", None, "two"]).logits
    for row, adapter in enumerate(("one", None, "two")):
        if adapter is None:
            with model.disable_adapter():
                alone = model(x[row : row + 1]).logits
        else:
            model.set_adapter(adapter)
            alone = model(x[row : row + 1]).logits
        # Virtual tokens have logits too, before the row's own.
        assert (together[row, -x.shape[1] :] - alone[0, -x.shape[1] :]).abs().max() < 1e-5
    model.set_adapter(["one", "two"])
    model(x, adapter_names=["one", "two", "two"]).logits.square().sum().backward()
    assert all(p.grad is not None for p in model.adapter_parameters("one").values())


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    gradients = []
    for recompute in (False, True):
        model = get_peft_model(tiny.llama(), config(name, ["q_proj", "down_proj"]))
        tiny.shake(model).train()
        if recompute:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model(tiny.ids(), use_cache=False).logits.square().mean().backward()
        gradients.append({k: p.grad.clone() for k, p in model.adapter_parameters().items()})
    for key, value in gradients[0].items():
        assert torch.allclose(value, gradients[1][key], atol=1e-6), key


@pytest.mark.parametrize("name", list(ADAPTERS))
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}], ids=["greedy", "beams", "sample"]
)
def test_generate_equals_the_merged_model(name: str, how: dict[str, Any]) -> None:
    model = tiny.shake(get_peft_model(tiny.llama(), config(name, ["q_proj", "down_proj"])), 0.3)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0, **how}
    torch.manual_seed(0)
    ours = model.generate(input_ids=tiny.ids(), **settings)
    mixed = None
    if not how.get("do_sample"):
        mixed = model.generate(input_ids=tiny.ids(), adapter_names=["default", "__base__"], **settings)
        base = tiny.llama().generate(input_ids=tiny.ids(), **settings)
        assert torch.equal(mixed[0], ours[0])
        assert torch.equal(mixed[1], base[1])
    if ADAPTERS[name].mergeable:
        torch.manual_seed(0)
        assert torch.equal(ours, model.merge_and_unload().generate(input_ids=tiny.ids(), **settings))


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_the_form_of_the_method_makes_configs(name: str) -> None:
    form = presets.methods()[name]
    assert (form.title, form.paper) == (ADAPTERS[name].title, ADAPTERS[name].paper)
    plain = {field.name: forms.read_default(field) for field in form.fields}
    for preset in ({}, *form.presets.values()):
        made = adapter_config({"method": name, **plain, **preset}, None)
        assert spec_of(made) is ADAPTERS[name]
