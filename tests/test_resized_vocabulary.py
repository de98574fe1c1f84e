"""An adapter over a base with added tokens: the embeddings go into its file, as in PEFT's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import engine
from tests import tiny
from tests.differential import save


def base(folder: Path, tie: bool, rows: int = 70, seed: int = 3) -> Any:
    """The base of a folder with its vocabulary resized; the new rows depend on the seed."""
    if not (folder / "config.json").exists():
        tiny.llama(tie).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model.eval()


def answer(model: Any) -> torch.Tensor:
    ids = tiny.ids()
    ids[0, 0] = 68
    return model(input_ids=ids).logits


CASES = [(False, ["q_proj"]), (True, ["q_proj"]), (False, ["q_proj", "embed_tokens"])]


@pytest.mark.parametrize(("tie", "targets"), CASES)
def test_new_rows_are_saved_as_peft_saves_them(tie: bool, targets: list[str], tmp_path: Path) -> None:
    fields: dict[str, Any] = {"r": 4, "target_modules": targets, "task_type": "CAUSAL_LM"}
    ours = tiny.shake(engine.get_peft_model(base(tmp_path / "base", tie), engine.LoraConfig(**fields)))
    ours.save_pretrained(tmp_path / "ours")
    mine = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    theirs = save(peft.get_peft_model(base(tmp_path / "base", tie), peft.LoraConfig(**fields)), tmp_path / "theirs")
    assert theirs.keys() <= mine.keys() and {k: mine[k].shape for k in theirs} == {
        k: v.shape for k, v in theirs.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(base(tmp_path / "base", tie, seed=4), tmp_path / "ours").eval()
    assert (answer(again) - answer(ours)).abs().max() < 1e-5


@pytest.mark.parametrize("tie", [False, True])
def test_new_rows_come_back(tie: bool, tmp_path: Path) -> None:
    config = engine.LoraConfig(r=4, target_modules=["q_proj"])
    ours = tiny.shake(engine.get_peft_model(base(tmp_path / "base", tie), config))
    ours.save_pretrained(tmp_path / "ours")
    again = engine.PeftModel.from_pretrained(base(tmp_path / "base", tie, seed=4), tmp_path / "ours")
    assert torch.equal(answer(again), answer(ours))


def test_a_base_that_was_not_resized_stays_out_of_the_file(tmp_path: Path) -> None:
    config = engine.LoraConfig(r=4, target_modules=["q_proj"])
    engine.get_peft_model(base(tmp_path / "base", False, tiny.VOCABULARY), config).save_pretrained(tmp_path / "ours")
    assert all(".lora_" in key for key in load_file(tmp_path / "ours" / "adapter_model.safetensors"))
