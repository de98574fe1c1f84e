"""Early stopping: when a run ends, what it keeps, and that a resumed run does the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_train import Never, data, job, train  # noqa: F401

from engine.errors import ConfigError
from engine.train.job import JobSpec

PATIENCE = 2


class PauseAfter:
    """Asks for a pause once so many steps are done."""

    def __init__(self, polls: int) -> None:
        self.polls = polls

    def poll(self) -> str | None:
        self.polls -= 1
        return "pause" if self.polls < 0 else None


def forgetful(data: Path, **training: Any) -> JobSpec:  # noqa: F811
    """A job whose evaluation gets worse after a few steps: few rows, a high rate, much capacity."""
    rows = [{"instruction": f"Word {i}?", "output": f"{i * 7919 % 1009} {i * 104729 % 997}"} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"max_steps": 60, "learning_rate": 2e-2, "eval_every": 4, "checkpoint_every": 8, "schedule": "constant"}
    settings["warmup_ratio"] = 0.0
    spec = job(data, **settings | {"early_stopping_patience": PATIENCE} | training)
    return JobSpec.from_dict(spec.to_dict() | {"data": {"path": str(data), "eval_split": 0.34}})


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def test_a_run_ends_when_evaluations_stop_improving_and_keeps_the_best(data: Path, tmp_path: Path) -> None:  # noqa: F811
    state, recorder = train(forgetful(data), tmp_path / "run")
    done, evals = recorder.of("done")[0], recorder.of("eval")
    counted = {event["step"]: event["loss"] for event in evals if event["step"]}
    best = min(counted, key=lambda step: counted[step])
    assert state == "done" and done["early"] and done["step"] < 60
    assert done["step"] == best + 4 * PATIENCE == max(counted)
    assert (done["best_step"], done["eval_loss"]) == (best, counted[best])
    assert not (tmp_path / "run" / "best").exists()

    # What is kept is what a run that ends at the best step has, weight for weight.
    train(forgetful(data, max_steps=best, early_stopping_patience=None), tmp_path / "short")
    kept, short = adapter(tmp_path / "run"), adapter(tmp_path / "short")
    assert kept.keys() == short.keys() and all(torch.equal(kept[name], short[name]) for name in kept)


def test_without_patience_the_run_goes_on(data: Path, tmp_path: Path) -> None:  # noqa: F811
    _, recorder = train(forgetful(data, max_steps=24, early_stopping_patience=None), tmp_path / "run")
    done = recorder.of("done")[0]
    assert done["step"] == 24 and "best_step" not in done


@pytest.mark.parametrize("pause_at", [5, 11])
def test_a_resumed_run_stops_where_the_uninterrupted_one_does(pause_at: int, data: Path, tmp_path: Path) -> None:  # noqa: F811
    _, whole = train(forgetful(data), tmp_path / "whole")
    state, _ = train(forgetful(data), tmp_path / "run", PauseAfter(pause_at))
    assert state == "paused"
    state, recorder = train(forgetful(data), tmp_path / "run", resume=True)
    keys = ("step", "best_step", "eval_loss", "early")
    assert state == "done"
    assert {key: recorder.of("done")[0][key] for key in keys} == {key: whole.of("done")[0][key] for key in keys}
    kept, wanted = adapter(tmp_path / "run"), adapter(tmp_path / "whole")
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)


def test_a_lost_best_is_told_and_counted_anew(data: Path, tmp_path: Path) -> None:  # noqa: F811
    train(forgetful(data), tmp_path / "run", PauseAfter(8))
    for path in (tmp_path / "run" / "best").iterdir():
        path.unlink()
    _, recorder = train(forgetful(data), tmp_path / "run", resume=True)
    assert any("early stopping counts from here" in event["message"] for event in recorder.of("warning"))
    assert recorder.of("done")[0]["best_step"] > 4


def test_patience_without_rows_to_evaluate_on_is_refused(data: Path) -> None:  # noqa: F811
    plain = job(data, early_stopping_patience=3).to_dict()
    with pytest.raises(ConfigError, match="early_stopping_patience is 3 and"):
        JobSpec.from_dict(plain | {"data": {"path": str(data), "eval_split": 0.0}})


def test_every_step_says_what_memory_it_holds(data: Path, tmp_path: Path) -> None:  # noqa: F811
    _, recorder = train(job(data, max_steps=2), tmp_path / "run")
    start, done = recorder.of("start")[0], recorder.of("done")[0]
    # The kernel counts the two apart, and some pages late.
    assert all(50_000_000 < event["memory"] <= 1.02 * done["peak_bytes"] for event in recorder.of("step"))
    assert done["peak_bytes"] < start["memory_limit"]
