"""Every method of the registry, with the form's defaults, learns the sample on the built-in toy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.adapters import ADAPTERS
from engine.paths import REPOSITORY
from engine.train.events import Recorder
from engine.train.job import JobSpec
from engine.train.worker import run
from studio import forms, presets

STEPS = 24
# How far the evaluation loss must fall, from 3.2. A broken adapter, or a learning rate of 0, leaves it where it is.
MARGIN = 0.3


class Onward:
    def poll(self) -> None:
        return None


def job(method: str, rate: float | None = None) -> JobSpec:
    form = presets.methods()[method]
    adapter = {field.name: forms.read_default(field) for field in form.fields}
    training: dict[str, Any] = {"learning_rate": 0.002, **form.training}
    if rate is not None:
        training["learning_rate"] = rate
    return JobSpec.from_dict(
        {
            "model": "tiny-llama",
            "data": {"path": str(REPOSITORY / "examples" / "lighthouse.jsonl"), "eval_split": 0.1},
            "adapter": {"method": method, **{k: v for k, v in adapter.items() if v is not None}},
            "training": {"max_steps": STEPS, "batch_size": 8, "max_length": 128, "eval_every": STEPS, **training},
        }
    )


def losses(spec: JobSpec, out: Path) -> tuple[float, float]:
    seen = Recorder()
    assert run(spec, out, seen, Onward()) == "done"
    (done,) = seen.of("done")
    return done["first_eval_loss"], done["eval_loss"]


@pytest.mark.parametrize("method", list(ADAPTERS))
def test_the_forms_defaults_learn(method: str, tmp_path: Path) -> None:
    first, last = losses(job(method), tmp_path)
    assert last < first - MARGIN


@pytest.mark.parametrize("method", ["lora", "adalora", "p_tuning"])
def test_without_a_learning_rate_nothing_is_learned(method: str, tmp_path: Path) -> None:
    first, last = losses(job(method, 1e-12), tmp_path)
    assert abs(last - first) < MARGIN / 10
