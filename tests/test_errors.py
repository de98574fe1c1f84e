"""What errors say: what was asked, what there is, what to do. `tests/test_api.py` holds what they leave behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from engine import (
    DoRAConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_config,
    get_peft_model,
    set_peft_model_state_dict,
)
from engine.errors import CheckpointError, ConfigError, EngineError, TargetError
from tests import tiny


def targets_that_match_nothing(folder: Path) -> None:
    get_peft_model(tiny.llama(), LoraConfig(target_modules=["querry", "valu"]))


def a_pattern_that_matches_nothing(folder: Path) -> None:
    get_peft_model(tiny.llama(), LoraConfig(target_modules=r".*\.v_prok"))


def wrong_kind_of_module(folder: Path) -> None:
    get_peft_model(tiny.llama(), LoraConfig(target_modules=["self_attn"]))


def missing_saved_module(folder: Path) -> None:
    get_peft_model(tiny.llama(), LoraConfig(modules_to_save=["classifier_head"]))


def wrong_shapes(folder: Path) -> None:
    model = get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    state = {key: torch.zeros(3, 5) for key in model.state_dict() if ".lora_" in key}
    set_peft_model_state_dict(model, {key.replace(".adapters.default", ""): value for key, value in state.items()})


def another_base(folder: Path) -> None:
    first = LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path="owner/llama")
    get_peft_model(tiny.llama(), first).save_pretrained(folder)
    config = tiny.llama().config
    config.num_hidden_layers = 3
    PeftModel.from_pretrained(type(tiny.llama())(config), folder)


def unknown_config_key(folder: Path) -> None:
    get_peft_config({"peft_type": "LORA", "r": 4, "lora_alhpa": 16, "peft_version": "0.21.2"})


def unknown_method(folder: Path) -> None:
    get_peft_config({"peft_type": "LORAX"})


def unknown_method_in_a_file(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORAX"}))
    PeftConfig.from_pretrained(folder)


def nan_in_a_merge(folder: Path) -> None:
    model = tiny.shake(get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"])))
    with torch.no_grad():
        next(iter(model.adapter_parameters().values()))[0, 0] = float("nan")
    model.merge_and_unload()


def a_tied_head(folder: Path) -> None:
    get_peft_model(tiny.llama(tie=True), LoraConfig(target_modules=["lm_head"])).merge_adapter()


def _packed() -> nn.Module:
    """A linear layer whose weight holds codes instead of numbers, as int8 and 4-bit layers do."""
    model = nn.ModuleDict({"proj": nn.Linear(8, 8, bias=False)})
    model["proj"].weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    return model


def a_method_on_a_quantised_base(folder: Path) -> None:
    get_peft_model(_packed(), DoRAConfig(target_modules=["proj"]))


def merging_into_a_quantised_base(folder: Path) -> None:
    get_peft_model(_packed(), LoraConfig(target_modules=["proj"])).merge_adapter()


# What happens -> (kind of error, words that must be there: the asked, the present, the way out).
CASES: dict[Callable[[Path], None], tuple[type[EngineError], tuple[str, ...]]] = {
    targets_that_match_nothing: (
        TargetError,
        ("querry", "valu", "Nearest names: ", "v_proj", "all-linear", "gate_proj"),
    ),
    a_pattern_that_matches_nothing: (TargetError, ("v_prok", "Nearest names: v_proj", "all-linear", "o_proj")),
    wrong_kind_of_module: (TargetError, ("self_attn", "LlamaAttention", "linear", "exclude_modules")),
    missing_saved_module: (TargetError, ("classifier_head", "LlamaForCausalLM", "lm_head")),
    wrong_shapes: (CheckpointError, ("q_proj.lora_A", "(3, 5)", "(4, 32)", "check r")),
    another_base: (CheckpointError, ("2 tensors", "model.layers.2.self_attn.q_proj", "owner/llama", "load that base")),
    unknown_config_key: (ConfigError, ("lora_alhpa is not a field of LoraConfig", "mean lora_alpha", "Take these")),
    unknown_method: (ConfigError, ("LORAX", "registered", "LOKR")),
    unknown_method_in_a_file: (CheckpointError, ("LORAX", "Methods here", "LORA", "LOKR")),
    nan_in_a_merge: (EngineError, ("q_proj", "not finite", "earlier checkpoint")),
    a_tied_head: (TargetError, ("lm_head", "embed_tokens", "untie")),
    a_method_on_a_quantised_base: (TargetError, ("DoRA", "proj is quantised", "use LoRA")),
    merging_into_a_quantised_base: (TargetError, ("proj is quantised", "full precision")),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_what_is_said(case: Callable[[Path], None], tmp_path: Path) -> None:
    kind, words = CASES[case]
    with pytest.raises(kind) as caught:
        case(tmp_path)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert not [word for word in words if word not in text], text


def test_three_nearest_names_the_best_of_each_first() -> None:
    with pytest.raises(TargetError) as caught:
        get_peft_model(tiny.llama(), LoraConfig(target_modules=["zzz_q_proj", "down_prj"]))
    nearest = caught.value.message.split("Nearest names: ")[1].rstrip(".").split(", ")
    assert len(nearest) == 3 and nearest[:2] == ["q_proj", "down_proj"]
    listed = caught.value.hint.split("named: ")[1].split(";")[0].split(", ")
    assert set(listed) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
