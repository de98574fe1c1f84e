"""Several adapters and mixes in one batch: each row as if it were alone, from stacked products or a loop."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from engine import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from engine.adapters.base import AdapterConfig
from engine.bnb import quantize_model
from engine.errors import ConfigError, EngineError
from engine.generation import Answerer, Sampling, decode, encode_prompt
from engine.layers import AdapterLayer
from engine.models.loading import load_causal_lm
from engine.rows import mix_of
from tests import tiny
from tests.test_generation import QUESTION

Row = str | Mapping[str, float] | None
LINEARS = ["q_proj", "v_proj", "gate_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4},
    "wide": {"r": 12, "lora_alpha": 30, "lora_bias": True},
    "rs": {"r": 3, "use_rslora": True},
    "pissa": {"r": 5, "init_lora_weights": "pissa"},
    "dropped": {"r": 2, "lora_dropout": 0.5},
    "few": {"r": 6, "target_modules": ["v_proj"]},
}
NO_START = [name for name in KINDS if name != "pissa"]
ROWS: list[Row] = [*KINDS, None, {"plain": 0.5, "wide": -0.7}, {"rs": -1.5, "pissa": 2.0, "few": 0.25}]


def attached(base: nn.Module, configs: Mapping[str, AdapterConfig], size: float = 0.2) -> PeftModel:
    model: Any = None
    for name, config in configs.items():
        if model is None:
            model = get_peft_model(base, config, name)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        tiny.shake(model, size)
    model.eval()
    assert isinstance(model, PeftModel)
    return model


def loras(base: nn.Module, targets: list[str], **more: AdapterConfig) -> PeftModel:
    kinds = {name: {"target_modules": targets, **fields} for name, fields in KINDS.items()}
    return attached(base, {**{name: LoraConfig(**fields) for name, fields in kinds.items()}, **more})


@torch.no_grad()
def alone(model: PeftModel, row: Row, x: torch.Tensor) -> torch.Tensor:
    """By the switchboard, without rows, and so without stacks."""
    model.set_adapter_weights({} if row is None else {row: 1.0} if isinstance(row, str) else row)
    return model(input_ids=x).logits[0]


def agree(model: PeftModel, rows: Sequence[Row], tolerance: float = 1e-5) -> None:
    """Each row of a mixed batch is what it is alone, and no two are equal."""
    x = tiny.ids(len(rows))
    with torch.no_grad():
        found = model(input_ids=x, adapter_names=rows).logits
        # Also the kept stacks, and all beams of a row.
        assert torch.equal(model(input_ids=x, adapter_names=rows).logits, found)
    scale = float(found.abs().max())
    single = [alone(model, row, x[i : i + 1]) for i, row in enumerate(rows)]
    for row, one, other in zip(rows, single, found, strict=True):
        assert float((one - other).abs().max()) <= tolerance * max(scale, 1), row
    base = [alone(model, None, x[i : i + 1]) for i in range(len(rows))]
    moved = [float((a - b).abs().max()) for a, b in zip(single, base, strict=True)]
    assert all(size > 50 * tolerance * max(scale, 1) for row, size in zip(rows, moved, strict=True) if row is not None)


def stacks(model: PeftModel) -> list[AdapterLayer]:
    return [layer for _, layer in model.wrappers() if isinstance(layer, AdapterLayer) and layer.stack._made]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:2], ROWS[-2:], [{"plain": w, "wide": 1 - w} for w in (0, 0.3, 0.6, 1)]])
def test_rows_are_what_they_are_alone(rows: list[Row]) -> None:
    model = loras(tiny.llama(), LINEARS)
    agree(model, rows)
    assert len(stacks(model)) >= 2
    assert all(not layer.stack.left for layer in stacks(model))


def test_sliders_over_few_adapters_share_their_matrices() -> None:
    model = loras(tiny.llama(), LINEARS)
    grid: list[Row] = [{"plain": w / 8, "wide": 1 - w / 8} for w in range(1, 8)]
    agree(model, grid)
    assert not any(layer.stack._by_row for layer in stacks(model))
    agree(model, ["plain", "plain", "rs"])
    assert all(layer.stack._by_row for layer in stacks(model))


def test_conv1d() -> None:
    agree(loras(tiny.gpt2(), ["c_attn", "c_fc"], few=LoraConfig(r=6, target_modules=["c_attn"])), ROWS)


def test_bf16_to_its_rounding() -> None:
    """No farther from the same model in float32 than each adapter alone is, and by single roundings at one layer."""
    model = attached(
        tiny.llama().bfloat16(), {n: LoraConfig(**{"target_modules": LINEARS, **KINDS[n]}) for n in NO_START}
    )
    rows: list[Row] = [*NO_START, {"plain": 0.5, "wide": -0.7}, {"rs": -1.5, "few": 0.25}]
    exact, x = copy.deepcopy(model).float(), tiny.ids(len(rows))
    with torch.no_grad():
        found = model(input_ids=x, adapter_names=rows).logits
    assert stacks(model)[0].stack._a.dtype is torch.float32
    for i, row in enumerate(rows):
        right, single = (alone(m, row, x[i : i + 1]) for m in (exact, model))
        assert float((found[i] - right).abs().mean()) <= 1.3 * float((single - right).abs().mean()), row
    layer, wide = (m.get_base_model().model.layers[0].self_attn.v_proj for m in (model, exact))
    inputs = torch.randn(len(rows), 3, 32, dtype=torch.bfloat16)
    model.switchboard.rows = exact.switchboard.rows = [mix_of(row) for row in rows]
    with torch.no_grad():
        near, right = layer(inputs), wide(inputs.float())
    assert near.dtype is torch.bfloat16
    assert float((near - right).abs().max()) <= 2**-7 * float(right.abs().max())


def test_nf4_base() -> None:
    base = quantize_model(tiny.llama(), "nf4")
    model = attached(base, {n: LoraConfig(**{"target_modules": LINEARS, **KINDS[n]}) for n in NO_START})
    agree(model, ["plain", "wide", None, {"rs": -1.5, "few": 0.25}])
    assert stacks(model)


def test_other_methods_stand_beside_stacks() -> None:
    model = loras(
        tiny.llama(),
        LINEARS,
        dora=LoraConfig(r=4, use_dora=True, target_modules=LINEARS),
        ia3=IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        biased=LoraConfig(r=4, bias="lora_only", target_modules=["q_proj"]),
    )
    agree(model, ["dora", "ia3", "plain", None, "biased", {"dora": 0.6, "ia3": -0.4, "rs": 0.8}, {"ia3": 0.5}])
    left = {name for layer in stacks(model) for name in layer.stack.left}
    assert left == {"dora", "ia3", "biased"}


def test_stacks_follow_their_tensors() -> None:
    model = loras(tiny.llama(), LINEARS)
    rows: list[Row] = ["plain", {"wide": 0.5, "rs": 1.0}, None]
    agree(model, rows)
    layer = stacks(model)[0]
    weights: Any = layer.adapters["plain"]
    with torch.no_grad():
        weights.lora_B.weight.mul_(-3)
    agree(model, rows)
    weights.lora_A.weight = nn.Parameter(weights.lora_A.weight.detach() * 2)
    agree(model, rows)
    weights.lora_A.weight.data = weights.lora_A.weight.data * -1
    agree(model, rows)
    weights.scale *= 4
    agree(model, rows)
    weights.lora_B.weight.data.mul_(2)
    agree(model.train().eval(), rows)
    model.delete_adapter("plain")
    model.add_adapter("plain", LoraConfig(r=7, target_modules=["gate_proj", "q_proj"]))
    model.set_adapter("plain")
    agree(tiny.shake(model), rows)  # type: ignore[arg-type]
    agree(copy.deepcopy(model), rows)
    assert not copy.deepcopy(layer).stack._made
    agree(model.double(), rows, 1e-10)


def test_training_in_eval_mode_by_an_optimizer_that_tells_nothing() -> None:
    """bitsandbytes changes numbers without a word to the tensor that holds them."""
    model = loras(tiny.llama(), LINEARS)
    rows: list[Row] = ["plain", None]
    agree(model, rows)
    model.set_adapter("plain")
    model(input_ids=tiny.ids(2), labels=tiny.ids(2)).loss.backward()
    for parameter in model.adapter_parameters("plain").values():
        parameter.data.mul_(-2)
    agree(model, rows)


@pytest.mark.parametrize("mode", [True, False])
def test_gradients_go_by_the_loop(mode: bool) -> None:
    model = loras(tiny.llama(), LINEARS)
    model.set_adapter(["plain", "wide"])
    x, rows = tiny.ids(3), ["plain", {"wide": -0.5, "plain": 1.0}, None]
    model.train(mode)
    model(input_ids=x, labels=x, adapter_names=rows).loss.backward()
    assert not stacks(model)
    assert all(p.grad is not None and p.grad.any() for p in model.adapter_parameters("plain").values())


def test_saved_modules_answer_by_row() -> None:
    configs = {n: LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]) for n in ("a", "b")}
    model = attached(tiny.llama(), configs)
    agree(model, ["a", None, {"a": 0.4, "b": -0.9}, "b"])


def columns(model: Any, tokenizer: Any, who: list[Row], sampling: Sampling) -> list[str]:
    found, reasons = [""] * len(who), [""] * len(who)
    for piece in decode(model, tokenizer, encode_prompt(tokenizer, QUESTION), who, sampling):
        found[piece.index] += piece.text
        reasons[piece.index] += piece.reason
    assert all(reasons)
    return [f"{text} [{reason}]" for text, reason in zip(found, reasons, strict=True)]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_columns_say_what_they_say_alone(temperature: float) -> None:
    base, tokenizer = load_causal_lm("tiny-llama", precision="fp32")
    prompts: dict[str, Any] = {
        "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "prefix": PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        "dora": LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]),
    }
    model = loras(base, ["q_proj", "down_proj"], **prompts)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter *= 0.7
    who: list[Row] = [
        "wide",
        None,
        {"plain": 0.8, "rs": -0.8},
        "prompt",
        {"prompt": 1, "prefix": 1, "few": 2.0},
        "dora",
    ]
    sampling = Sampling(max_new_tokens=16, temperature=temperature, seed=5)
    together = columns(model, tokenizer, who, sampling)
    assert together == [columns(model, tokenizer, [row], sampling)[0] for row in who]
    assert len(set(together)) >= 5


def test_columns_that_cannot_be_answered() -> None:
    base, tokenizer = load_causal_lm("tiny-llama", precision="fp32")
    sampling = Sampling(max_new_tokens=2)
    with pytest.raises(ConfigError, match="'a' cannot answer: the model carries no adapters"):
        columns(base, tokenizer, ["a"], sampling)
    model = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "a")
    asked: list[tuple[list[Any], str]] = [
        ([None] * 9, "9 columns were asked for; needed: at most 8"),
        (["b"], "no adapter 'b'"),
        ([{"b": 1.0}], "no adapter 'b'"),
        ([{"a": 0.5}], "virtual tokens are read whole or not"),
        ([{"a": "much"}], "needed: 1 or 0|read whole or not|finite number"),
        ([3], "needed: a mapping"),
    ]
    for who, words in asked:
        with pytest.raises(ConfigError, match=words):
            columns(model, tokenizer, who, sampling)
    plain = attached(tiny.llama(), {"a": LoraConfig(r=2, target_modules=["q_proj"])})
    plain.merge_adapter(["a"])
    with pytest.raises(EngineError, match="needs unmerged adapters"), torch.no_grad():
        plain(input_ids=tiny.ids(2), adapter_names=["a", None])


def test_answerer_takes_mixes(tmp_path: Any) -> None:
    base, _ = load_causal_lm("tiny-llama", precision="fp32")
    for name, rank in (("one", 3), ("two", 5)):
        fresh = get_peft_model(copy.deepcopy(base), LoraConfig(r=rank, target_modules="all-linear"))
        tiny.shake(fresh, 0.02 * rank).save_pretrained(tmp_path / name)
    answerer = Answerer("tiny-llama", "fp32")
    for name in ("one", "two"):
        answerer.attach(name, tmp_path / name)
    who: list[Row] = ["one", {"one": 0.5, "two": 0.5}, None]
    found = ["", "", ""]
    for piece in answerer.stream(QUESTION, who, Sampling(max_new_tokens=8, temperature=0)):
        found[piece.index] += piece.text
    model: Any = answerer.model
    model.set_adapter_weights({"one": 0.5, "two": 0.5})
    pieces = decode(
        model, answerer.tokenizer, encode_prompt(answerer.tokenizer, QUESTION), [], Sampling(8, temperature=0)
    )
    assert found[1] == "".join(piece.text for piece in pieces) and len(set(found)) == 3
    with pytest.raises(ConfigError, match="no adapter 'three'"):
        list(answerer.stream(QUESTION, [{"three": 1.0}], Sampling()))
