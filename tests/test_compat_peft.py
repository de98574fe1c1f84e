"""Files and calls of the PEFT library that its users rely on beyond the plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine.errors import CheckpointError
from tests import tiny
from tests.differential import peft


def resized(tie: bool, size: int, seed: int) -> Any:
    """A base with new tokens, whose rows differ from seed to seed."""
    base: Any = tiny.llama(tie)
    base.resize_token_embeddings(size, mean_resizing=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        for end in (base.get_input_embeddings(), base.get_output_embeddings()):
            end.weight[tiny.VOCABULARY :].normal_()
    return base


def peft_folder(folder: Path, size: int | None = None, tie: bool = False, **fields: Any) -> torch.Tensor:
    """An adapter that PEFT wrote, and its answers."""
    base = tiny.llama(tie) if size is None else resized(tie, size, 5)
    model = tiny.shake(peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **fields))).eval()
    model.save_pretrained(folder, save_embedding_layers="auto" if size is None else True)
    return tiny.logits(model)


def test_a_targeted_head_loads(tmp_path: Path) -> None:
    expected = peft_folder(tmp_path, target_modules=["q_proj", "lm_head"])
    ours = engine.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    torch.testing.assert_close(tiny.logits(ours), expected, rtol=1e-5, atol=1e-5)


def test_a_head_of_another_base_is_refused(tmp_path: Path) -> None:
    peft_folder(tmp_path, target_modules=["q_proj", "lm_head"])
    base = tiny.llama()
    with torch.no_grad():
        base.lm_head.weight.add_(1.0)
    with pytest.raises(CheckpointError, match="lm_head"):
        engine.PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("tie", [False, True])
def test_a_resized_vocabulary_loads(tie: bool, tmp_path: Path) -> None:
    expected = peft_folder(tmp_path, 70, tie, target_modules=["q_proj"])
    ours = engine.PeftModel.from_pretrained(resized(tie, 70, 6), tmp_path)
    torch.testing.assert_close(tiny.logits(ours), expected, rtol=1e-5, atol=1e-5)


def test_a_base_that_was_not_resized_says_so(tmp_path: Path) -> None:
    peft_folder(tmp_path, 70, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"resize_token_embeddings\(70\)"):
        engine.PeftModel.from_pretrained(tiny.llama(), tmp_path)


def test_modules_to_save_are_found_by_the_end_of_the_name(tmp_path: Path) -> None:
    expected = peft_folder(tmp_path, target_modules=["q_proj"], modules_to_save=["head"])
    ours = engine.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert "lm_head.weight" in ours.adapter_parameters()
    torch.testing.assert_close(tiny.logits(ours), expected, rtol=1e-5, atol=1e-5)
