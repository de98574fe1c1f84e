"""A step over a deep stack, worked out from four of its blocks: what running all of them says, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.memory import depth
from engine.memory.allocations import Span
from engine.memory.predicting import Job
from engine.models.catalogue import BUILTIN_FOLDER
from engine.train.job import JobSpec

DEEP = 12
ALL = "all-linear"


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with twelve blocks and no weights: nothing here reads them."""
    return model_folder(tmp_path_factory.mktemp("models") / "deep", {"num_hidden_layers": DEEP})


def model_folder(folder: Path, changes: dict[str, Any], kept: bool = True) -> Path:
    """A model's folder with the toy's tokenizer, its config changed or replaced."""
    source = BUILTIN_FOLDER / "tiny-llama"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text()) if kept else {}
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file({"none": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def job(model: Path, adapter: Any, more: dict[str, Any] | None = None, **training: Any) -> JobSpec:
    return JobSpec.from_dict(
        {
            "model": str(model),
            "data": {"path": "none.jsonl"},
            "adapter": adapter or {},
            "full": not adapter,
            "training": {"max_steps": 2, "batch_size": 4, "precision": "fp32", "max_length": 96} | training,
            **(more or {}),
        }
    )


def compared(spec: JobSpec, device: str = "cpu", shapes: Any = ((1, 8), (16, 96))) -> Job:
    """The job, after its predictions were found equal to those of all blocks."""
    short, whole = Job(spec, device), Job(spec, device, whole=True)
    assert whole.simulation.stack is None
    for batch, length in shapes:
        assert short.predict(batch, length) == whole.predict(batch, length), (batch, length)
    return short


@pytest.mark.parametrize(
    ("adapter", "training", "more"),
    [
        ({"method": "lora", "r": 4}, {}, {}),
        ({"method": "lora", "r": 4, "lora_dropout": 0.1, "target_modules": ALL}, {"precision": "bf16"}, {}),
        ({"method": "lora", "r": 4, "target_modules": ALL}, {"gradient_checkpointing": True}, {}),
        ({"method": "lora", "r": 4, "bias": "all"}, {"gradient_accumulation": 2, "loraplus_ratio": 4.0}, {}),
        ({"method": "lora", "r": 4, "modules_to_save": ["lm_head"]}, {}, {}),
        ({"method": "lora", "r": 4, "target_modules": ALL}, {}, {"quantization": "nf4"}),
        ({"method": "lora", "r": 4}, {"gradient_checkpointing": True}, {"quantization": "int8"}),
        ({"method": "lora", "r": 4}, {}, {"task": "preference"}),
        ({"method": "lora", "r": 4}, {}, {"task": "classification"}),
        ({"method": "dora", "r": 4, "target_modules": ALL}, {"gradient_checkpointing": True}, {}),
        ({"method": "dora", "r": 4}, {"precision": "bf16"}, {}),
        ({"method": "ia3"}, {}, {}),
        ({"method": "adalora", "init_r": 6, "target_r": 4}, {}, {}),
        ({"method": "vera", "r": 16}, {"precision": "bf16"}, {}),
        ({"method": "prompt_tuning", "num_virtual_tokens": 8}, {}, {}),
        ({}, {}, {}),
        ({}, {"precision": "bf16", "gradient_checkpointing": True}, {}),
        ({}, {"optimizer": "adafactor", "max_grad_norm": 0.0}, {}),
        ({}, {"optimizer": "adamw_8bit"}, {}),
    ],
)
def test_four_blocks_say_what_all_say(deep: Path, adapter: Any, training: Any, more: Any) -> None:
    """A batch for which the optimizer's step is the peak of full fine-tuning, and one for which the passes are."""
    found = compared(job(deep, adapter, more, **training))
    assert found.simulation.stack is not None and found.simulation.stack.left_out == DEEP - depth.KEPT


def test_on_a_card_too(deep: Path) -> None:
    lora = {"method": "lora", "r": 4}
    for optimizer, offload in (("paged_adamw_8bit", False), ("adamw", True)):
        found = compared(job(deep, lora, optimizer=optimizer, activation_offload=offload), "cuda")
        assert found.simulation.stack is not None
