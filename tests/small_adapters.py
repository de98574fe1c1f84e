"""Real adapters of the toys, made in a moment: random values, large enough to be heard."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from engine.train.job import DataSpec, JobSpec
from studio import states
from studio.context import Studio


def write(folder: Path, config: Any, base: str = "tiny-llama", seed: int = 0, size: float = 0.05) -> Path:
    """An adapter's folder in PEFT's format; `config` is an engine config."""
    import torch

    from engine.checkpoint import save_adapter
    from engine.model import get_peft_model
    from engine.models.catalogue import BUILTIN
    from engine.models.loading import load_causal_lm
    from engine.models.pipelines import load_pipeline

    drawn = BUILTIN[base].tasks == ("text_to_image",)
    model = load_pipeline(base, precision="fp32").unet if drawn else load_causal_lm(base, precision="fp32")[0]
    torch.manual_seed(seed)
    made = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.adapter_parameters().values():
            parameter += torch.randn(parameter.shape, generator=generator) * size
    return save_adapter(made, folder)


def lora(**changes: Any) -> Any:
    """A LoRA config for the tiny Llama."""
    from engine import LoraConfig

    fields: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**fields, **changes})


def finished_run(studio: Studio, name: str, config: Any, seed: int = 0, model: str = "tiny-llama") -> str:
    """A run that ended with this adapter, as far as anybody can see; returns the run's id."""
    task = "text_to_image" if model == "tiny-sd" else "causal_lm"
    run = studio.jobs.submit(JobSpec(model=model, task=task, data=DataSpec(path="rows.jsonl"), name=name))
    write(studio.jobs.folder(run) / "adapter", config, model, seed)
    studio.store.update_run(run, state=states.DONE, started=time.time() - 60, ended=time.time())
    return run
