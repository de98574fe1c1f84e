"""Slips of a caller that would pass without a word, or with the wrong one."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import engine
from engine import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from engine.errors import CheckpointError, ConfigError
from engine.train.job import JobSpec
from tests import tiny
from tests.differential import save
from tests.test_adalora_train import job, rows  # noqa: F401 (a fixture)
from tests.test_train import train


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LoraConfig(lora_aplha=3), ("lora_aplha", "mean lora_alpha?", "Its fields are")),  # type: ignore[call-arg]
        (lambda: LoraConfig(zzz=3, rr=2), ("zzz", "rr", "LoraConfig")),  # type: ignore[call-arg]
        (lambda: IA3Config(8), ("8 has no name",)),  # type: ignore[misc]
    ],
)
def test_unknown_fields_name_the_nearest(call: Callable[[], Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert not [word for word in words if word not in str(caught.value)]


def test_configs_are_copied_and_pickled() -> None:
    config = LoraConfig(r=3)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config.replace() == config


@pytest.mark.parametrize("weights", [["default"], "default", {"default": float("inf")}, {"default": float("nan")}])
def test_weights_that_cannot_be(weights: Any) -> None:
    model = get_peft_model(tiny.llama(), LoraConfig())
    with pytest.raises(ConfigError, match="needed: a"):
        model.set_adapter_weights(weights)
    assert model.switchboard.weights == {"default": 1.0}


def test_no_active_config() -> None:
    model = get_peft_model(tiny.llama(), LoraConfig())
    model.set_adapter_weights({})
    with pytest.raises(ConfigError, match="set_adapter with one of: default"):
        _ = model.active_peft_config
    model.delete_adapter("default")
    with pytest.raises(ConfigError, match="No adapter is active"):
        _ = model.active_peft_config


def test_an_unnamed_base_is_said_to_be_one(tmp_path: Path) -> None:
    get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    config = tiny.llama().config
    for change in ({"num_hidden_layers": 3}, {"hidden_size": 64}):
        other = type(tiny.llama())(type(config)(**{**config.to_dict(), **change}))
        with pytest.raises(CheckpointError) as caught:
            PeftModel.from_pretrained(other, tmp_path)
        assert "does not name the base" in str(caught.value) and "load that base" not in str(caught.value)


def test_names_that_match_nothing_beside_others_are_told() -> None:
    with pytest.warns(UserWarning, match="names 'qery', 'v_prj', which LlamaForCausalLM does not have.*v_proj"):
        model = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj", "qery", "v_prj"]))
    assert {name.rsplit(".", 1)[-1] for name, _ in model.wrappers()} == {"q_proj"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj", "layers.0.self_attn.v_proj"]))
        get_peft_model(tiny.llama(), LoraConfig(target_modules="all-linear"))


def test_expanding_other_modules_is_refused() -> None:
    model = tiny.shake(get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])))
    before = tiny.logits(model)
    for change in ({"target_modules": ["o_proj"]}, {"target_modules": ["q_proj"]}, {"use_dora": True}):
        with pytest.raises(ConfigError, match="expand_lora_rank was given"):
            engine.expand_lora_rank(model, LoraConfig(r=16, **change))
    for same in (None, ["v_proj", "q_proj"], r".*\.[qv]_proj"):
        engine.expand_lora_rank(model, LoraConfig(r=16, target_modules=same))
    assert (tiny.logits(model) - before).abs().max() < 1e-5


def test_too_few_steps_for_adalora_are_refused_before_loading(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("engine.models.loading.load_causal_lm", load)
    schedule = {"tinit": 40, "tfinal": 3}
    spec = job(rows, schedule)
    long = JobSpec.from_dict({**spec.to_dict(), "training": {"epochs": 0.5, "batch_size": 4}})
    for asked in (spec, long):
        with pytest.raises(ConfigError, match="tinit is 40 and its tfinal 3") as caught:
            train(asked, tmp_path / "run")
        assert "Train longer" in caught.value.hint
    model = get_peft_model(tiny.llama(), AdaLoraConfig(tinit=5, tfinal=5))
    with pytest.raises(ConfigError, match="has 10 steps") as caught:
        engine.prepare_training(model, total_steps=10)
    assert caught.value.hint


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "AdaLoraConfig"])
def test_fan_in_fan_out_is_written_as_peft_writes_it(kind: str, tmp_path: Path) -> None:
    extra = {"total_step": 9} if kind == "AdaLoraConfig" else {}
    for family, wrong in (("gpt2", False), ("llama", True)):
        fields = {"fan_in_fan_out": wrong, **extra}
        found = []
        for library in (engine, peft):
            folder = tmp_path / f"{library.__name__}-{family}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                save(library.get_peft_model(tiny.FAMILIES[family](), getattr(library, kind)(**fields)), folder)
            found.append(json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"])
        assert found == [not wrong, not wrong]
    assert get_peft_model(tiny.gpt2(), VeraConfig(r=4, target_modules=["c_attn"])).active_peft_config.fan_in_fan_out  # type: ignore[attr-defined]


@pytest.mark.parametrize(("family", "target"), [("gpt2", "wte"), ("t5", "shared"), ("llama", "embed_tokens")])
def test_targeted_embeddings_bring_their_base_where_peft_does(family: str, target: str, tmp_path: Path) -> None:
    model = tiny.shake(get_peft_model(tiny.FAMILIES[family](), LoraConfig(r=2, target_modules=[target])))
    model.save_pretrained(tmp_path)
    theirs = peft.get_peft_model(tiny.FAMILIES[family](), peft.LoraConfig(r=2, target_modules=[target]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keys = peft.get_peft_model_state_dict(theirs).keys()
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == keys
    again = PeftModel.from_pretrained(tiny.FAMILIES[family](), tmp_path)
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    answer = peft.PeftModel.from_pretrained(tiny.FAMILIES[family](), tmp_path).eval()
    assert (tiny.logits(answer) - tiny.logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_all_parameters_count_as_in_peft(bias: str) -> None:
    fields = {"r": 4, "target_modules": ["q_proj", "v_proj"], "bias": bias, "modules_to_save": ["lm_head"]}
    ours, theirs = (lib.get_peft_model(tiny.llama(), lib.LoraConfig(**fields)) for lib in (engine, peft))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def test_pefts_qalora_over_a_dense_base_is_a_plain_lora(tmp_path: Path) -> None:
    fields = {"r": 4, "use_qalora": True, "qalora_group_size": 8, "target_modules": ["q_proj", "down_proj"]}
    theirs = tiny.shake(peft.get_peft_model(tiny.llama(), peft.LoraConfig(**fields)).eval())
    save(theirs, tmp_path)
    ours = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert (tiny.logits(ours) - tiny.logits(theirs)).abs().max() < 1e-5
    ours.load_adapter(tmp_path, "second")
    ours.set_adapter("second")
    assert (tiny.logits(ours) - tiny.logits(theirs)).abs().max() < 1e-5
