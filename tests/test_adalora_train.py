"""AdaLoRA through the training loop: ranks cut and told, the method's term apart, and exact resumption."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.errors import ConfigError
from engine.train.job import JobSpec
from tests.test_train import ROWS, At, events_until, losses, start_worker, train


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def job(rows: Path, adapter: dict[str, Any] | None = None, **training: Any) -> JobSpec:
    settings = {"max_steps": 12, "batch_size": 4, "learning_rate": 1e-2, "precision": "fp32", "max_length": 96}
    method = {"method": "adalora", "init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "lora_alpha": 32}
    return JobSpec.from_dict(
        {
            "model": "tiny-llama",
            "data": {"path": str(rows), "eval_split": 0.1},
            "adapter": {**method, "lora_dropout": 0.1, "target_modules": "all-linear", **(adapter or {})},
            "training": {**settings, **training},
        }
    )


def test_ranks_are_cut_to_the_budget_and_told_at_each_change(rows: Path, tmp_path: Path) -> None:
    state, recorder = train(job(rows, {"tfinal": 1, "deltaT": 4}), tmp_path / "run")
    assert state == "done"
    told = recorder.of("rank")
    # Cuts come every fourth step, and at the last but one; nothing changes after that.
    assert [event["step"] for event in told] == [4, 8, 11]
    totals = [sum(event["ranks"].values()) for event in told]
    layers = len(told[0]["ranks"])
    assert totals == sorted(totals, reverse=True) and totals[0] < 4 * layers and totals[-1] == 2 * layers
    assert len(set(told[-1]["ranks"].values())) > 1
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["total_step"] == 12
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for module, rank in told[-1]["ranks"].items():
        assert sum(config["rank_pattern"][f"{module}.lora_E"]) == rank
        assert tensors[f"base_model.model.{module}.lora_A"].shape[0] == rank


def test_the_orthogonal_term_is_reported_apart_and_falls(rows: Path, tmp_path: Path) -> None:
    plain = {"lora_dropout": 0.0, "orth_reg_weight": 0.0}
    _, without = train(job(rows, plain), tmp_path / "without")
    _, recorder = train(job(rows, plain | {"orth_reg_weight": 0.5}), tmp_path / "with")
    assert all("extra_loss" not in event for event in without.of("step"))
    term = [event["extra_loss"] for event in recorder.of("step")]
    assert term[-1] < 0.9 * term[0] and term[0] > 0.1
    # The same start: the first step's loss is the task's alone in both, and the gradients then differ.
    assert losses(recorder)[1] == pytest.approx(losses(without)[1], abs=1e-6)
    assert recorder.of("step")[0]["grad_norm"] > without.of("step")[0]["grad_norm"] + 1e-3


@pytest.mark.parametrize("kill_at", [5, 10])
def test_kill_9_then_resume_ends_like_the_uninterrupted_run(kill_at: int, rows: Path, tmp_path: Path) -> None:
    spec = job(rows, checkpoint_every=3)
    spec.save(tmp_path / "job.yaml")
    _, whole = train(JobSpec.from_file(tmp_path / "job.yaml"), tmp_path / "whole")
    worker = start_worker(tmp_path / "job.yaml", tmp_path / "run")
    before = events_until(worker, lambda e: e["type"] == "step" and e["step"] == kill_at)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    state, after = train(spec, tmp_path / "run", resume=True)
    first = (kill_at // 3) * 3
    assert state == "done" and after.of("start")[0]["first_step"] == first
    curve = {e["step"]: e["loss"] for e in before if e["type"] == "step"} | losses(after)
    assert max(abs(curve[step] - loss) for step, loss in losses(whole).items()) < 1e-4
    expected = {event["step"]: event["ranks"] for event in whole.of("rank")}
    assert {e["step"]: e["ranks"] for e in after.of("rank")} == {s: r for s, r in expected.items() if s > first}
    same_files(tmp_path / "whole", tmp_path / "run")


def test_stopped_and_resumed_the_adapter_is_the_same(rows: Path, tmp_path: Path) -> None:
    """A stop writes the ranks as they are; going on is not disturbed by it."""
    train(job(rows), tmp_path / "whole")
    state, recorder = train(job(rows), tmp_path / "run", At(9, "stop"))
    assert state == "stopped" and 4 <= recorder.events[-1]["step"] < 9
    train(job(rows), tmp_path / "run", resume=True)
    same_files(tmp_path / "whole", tmp_path / "run")


def same_files(one: Path, two: Path) -> None:
    configs = [json.loads((run / "adapter" / "adapter_config.json").read_text()) for run in (one, two)]
    assert configs[0] == configs[1]
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two))
    assert all(torch.allclose(first[key], second[key], atol=1e-4) for key in first)


def test_a_schedule_that_does_not_fit_is_refused_before_the_first_step(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tinit is 10 and its tfinal 3, and the training has 12 steps"):
        train(job(rows, {"tinit": 10}), tmp_path / "run")
