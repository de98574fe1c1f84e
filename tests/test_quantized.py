"""The 4-bit linear layer, and every method over quantised bases: it trains there, or says why not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import engine
from engine import get_peft_model
from engine.adapters import ADAPTERS
from engine.adapters.base import LINEAR
from engine.errors import EngineError, TargetError
from engine.quantized import QuantizedLinear
from tests import tiny

TARGETS = ["q_proj", "down_proj"]
FITTING: dict[str, dict[str, Any]] = {"mora": {"r": 4}, "qalora": {"qalora_group_size": 16}}
# What a quantised base cannot serve, and the words of the refusal.
REFUSED = {"dora": "norms of the base weight's rows, and .* is quantised"}


def test_codes_are_the_nearest_levels() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 6)
    layer = QuantizedLinear.from_linear(linear, 4)
    w, step = layer.dequantized(), layer.scales.T.repeat_interleave(4, 1)
    assert (w - linear.weight).abs().le(step / 2 + 1e-6).all()
    assert layer.weight.numel() == 16 * 6 / 2 and layer.weight.element_size() == 1
    groups, exact = w.view(6, 4, 4), linear.weight.view(6, 4, 4)
    # The ends of each group's range are levels themselves.
    assert torch.allclose(groups.amin(-1), exact.amin(-1), atol=1e-6)
    assert torch.allclose(groups.amax(-1), exact.amax(-1), atol=1e-6)
    x = torch.randn(3, 16)
    assert torch.allclose(layer(x), x @ w.T + linear.bias, atol=1e-6)
    twin = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(twin.weight, layer.weight) and type(twin.weight).__name__ == "PackedCodes"
    assert twin(x.bfloat16()).dtype == torch.bfloat16
    again = QuantizedLinear.from_linear(nn.Linear(16, 6), 4)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


def test_constant_groups_and_refusals() -> None:
    linear = nn.Linear(8, 3)
    nn.init.constant_(linear.weight, 0.3)
    assert torch.equal(QuantizedLinear.from_linear(linear, 4).dequantized(), linear.weight)
    for size in (3, 16, 1):
        with pytest.raises(TargetError, match=f"8 inputs, which do not fall into groups of {size}"):
            QuantizedLinear.from_linear(linear, size)
    linear.weight.data[0, 0] = torch.inf
    with pytest.raises(TargetError, match="not finite"):
        QuantizedLinear.from_linear(linear, 4)
    model = tiny.llama()
    with pytest.raises(TargetError, match=r"No linear layer of .*'q_prj'"):
        engine.quantize_linears(model, ["q_prj"])
    with pytest.raises(TargetError, match="carries adapters"):
        engine.quantize_linears(get_peft_model(model, engine.LoraConfig()).get_base_model(), ["q_proj"])


def test_parameters_count_for_what_they_stand_for() -> None:
    plain = get_peft_model(tiny.llama(), engine.LoraConfig()).get_nb_trainable_parameters()
    small = engine.quantize_linears(tiny.llama(), TARGETS, 8)
    assert get_peft_model(small, engine.LoraConfig()).get_nb_trainable_parameters() == plain


def in_groups() -> nn.Module:
    return engine.quantize_linears(tiny.llama(), TARGETS, 8)


def in_bits(bits: int) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny.llama()
    for name, module in list(model.named_modules()):
        if name.rsplit(".", 1)[-1] in TARGETS:
            assert isinstance(module, nn.Linear)
            sizes = {"bias": module.bias is not None}
            if bits == 4:
                small = bnb.nn.Linear4bit(module.in_features, module.out_features, compute_dtype=torch.float32, **sizes)
            else:
                small = bnb.nn.Linear8bitLt(module.in_features, module.out_features, has_fp16_weights=False, **sizes)
            small.load_state_dict(module.state_dict())
            model.set_submodule(name, small.to("cpu"))
    model.requires_grad_(False)
    # bitsandbytes quantises when a layer moves to its device.
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt" and module.weight.dtype.is_floating_point:
            quantised = module.weight._quantize("cpu")
            module.weight = quantised
    return model


BASES = {"groups": in_groups, "bnb4": lambda: in_bits(4), "bnb8": lambda: in_bits(8)}


@pytest.mark.parametrize("kind", list(BASES))
@pytest.mark.parametrize("name", [name for name in ADAPTERS if LINEAR in ADAPTERS[name].layers])
def test_every_method_trains_on_a_quantised_base_or_refuses_it(name: str, kind: str) -> None:
    base = BASES[kind]()
    kinds = {type(m).__name__ for n, m in base.named_modules() if n.rsplit(".", 1)[-1] in TARGETS}
    assert kinds == {{"groups": "QuantizedLinear", "bnb4": "Linear4bit", "bnb8": "Linear8bitLt"}[kind]}
    assert not base.get_submodule("model.layers.0.mlp.down_proj").weight.is_floating_point()
    config = ADAPTERS[name].config(target_modules=TARGETS, **FITTING.get(name, {}))
    if name in REFUSED:
        with pytest.raises(TargetError, match=REFUSED[name]):
            get_peft_model(base, config)
        return
    with torch.no_grad():
        before = tiny.logits(base)
        model = get_peft_model(base, config)
        start = tiny.logits(model)
    if ADAPTERS[name].identity_at_start:
        assert torch.equal(start, before)
    parameters = list(model.adapter_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=tiny.ids(4), labels=tiny.ids(4)).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(tiny.logits(model), before)
    if kind != "groups":
        merges_and_unmerges(model)
    elif name != "qalora":
        with pytest.raises(EngineError, match="quantised"):
            model.merge_adapter()


def merges_and_unmerges(model: Any) -> None:
    """Into bitsandbytes' layers: near what was trained, with the error told, and back to the bit."""
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        base = tiny.logits(model)
    with torch.no_grad():
        live = tiny.logits(model)
        model.merge_adapter()
        merged = tiny.logits(model)
        assert {name.rsplit(".", 1)[-1] for name in model.merge_errors} == set(TARGETS)
        assert all(0 < error.weight < 0.35 and error.change > 0 for error in model.merge_errors.values())
        # A change that is smaller than the rounding (IA3's here, in 4 bits) does not survive it, and the errors say so.
        if max(error.change for error in model.merge_errors.values()) < 0.5:
            assert (merged - live).norm() < (base - live).norm()
        with model.disable_adapter():
            assert torch.equal(tiny.logits(model), base)
        assert torch.equal(tiny.logits(model), merged)
        model.unmerge_adapter()
        assert torch.equal(tiny.logits(model), live) and not model.merge_errors


@pytest.mark.parametrize("kind", list(BASES))
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_starts_that_factor_the_weight_refuse_a_quantised_one(kind: str, how: str) -> None:
    with pytest.raises(TargetError, match=r"factors the base weight, and .* is quantised"):
        get_peft_model(BASES[kind](), engine.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=how))


@pytest.mark.parametrize("kind", list(BASES))
def test_orthogonal_needs_the_shape_alone(kind: str) -> None:
    base = BASES[kind]()
    with torch.no_grad():
        before = tiny.logits(base)
        model = get_peft_model(base, engine.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="orthogonal"))
        assert (tiny.logits(model) - before).abs().max() < 1e-5


@pytest.mark.parametrize("kind", list(BASES))
def test_a_quantised_module_cannot_be_trained_in_full(kind: str) -> None:
    with pytest.raises(TargetError, match=r"modules_to_save names .*down_proj.*quantised"):
        get_peft_model(BASES[kind](), engine.LoraConfig(target_modules=["q_proj"], modules_to_save=["down_proj"]))
