"""A run of two processes, as the queue starts it: one curve, one writer, and what a person can ask of it."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.train.job import DataSpec, JobSpec, TrainingSpec
from studio import process, states
from studio.jobs import Jobs
from studio.store import Store
from tests import small_llama

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    monkeypatch.setenv("STUDIO_MODELS", str(tmp_path))
    store = Store(tmp_path / "home")
    jobs = Jobs(store, tmp_path / "home")
    yield jobs
    jobs.close()
    for row in store.runs():
        process.end(row["pid"], row["pid_started"], grace=0.0)


def spec(folder: Path, steps: int) -> JobSpec:
    """A job over a small Llama; steps of 6 rows, which two processes share unevenly in batches of 2."""
    if not (folder / "base").exists():
        small_llama.build(folder / "base")
        chance = random.Random(0)
        rows = [{"text": " ".join(chance.choices(["hello", "world"], k=chance.randint(3, 20)))} for _ in range(40)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    training = TrainingSpec(
        max_steps=steps, batch_size=2, gradient_accumulation=3, learning_rate=0.02, precision="fp32", eval_every=5,
        checkpoint_every=5, loss_on="all", max_length=32, threads=1,
    )  # fmt: skip
    data = DataSpec(path=str(folder / "rows.jsonl"), eval_split=0.1)
    adapter = {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    return JobSpec(model=str(folder / "base"), data=data, adapter=adapter, training=training, name="two")


def wait(true: Callable[[], bool], jobs: Jobs, run_id: str, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        row = jobs.store.run(run_id)
        assert time.monotonic() < deadline and row["state"] != states.FAILED, (row, jobs.log_tail(run_id)[-3000:])
        time.sleep(0.2)


def losses(jobs: Jobs, run_id: str) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in jobs.store.by_step(run_id, "step")}


def test_two_processes_train_one_run_that_can_be_stopped_and_goes_on(jobs: Jobs, tmp_path: Path) -> None:
    run_id = jobs.submit(spec(tmp_path, 2000), processes=2)
    assert jobs.store.run(run_id)["processes"] == 2
    jobs.start_queue(every=0.2)
    wait(lambda: len(losses(jobs, run_id)) >= 6, jobs, run_id)
    row = jobs.store.run(run_id)
    assert row["machine"] == process.machine()
    both = process.members(row["pid"], row["pid_started"])
    others = [each for each in both if each.pid != row["pid"] and "engine" in each.cmdline()]
    assert len(others) == 1 and str(jobs.folder(run_id) / "spec.yaml") in others[0].cmdline()
    jobs.checkpoint(run_id)
    wait(lambda: len(jobs.store.since(run_id, 0, ["checkpoint"])) >= 2, jobs, run_id)
    jobs.stop(run_id)
    wait(lambda: jobs.store.run(run_id)["state"] == states.STOPPED, jobs, run_id)
    wait(lambda: process.members(row["pid"], row["pid_started"]) == [], jobs, run_id)
    assert jobs.has_adapter(run_id) and jobs.has_checkpoint(run_id)
    steps = [event["step"] for event in jobs.store.since(run_id, 0, ["step"])]
    assert steps == list(range(1, len(steps) + 1)), "the second process emits nothing"

    reached = max(steps)
    jobs.resume(run_id)
    wait(lambda: max(losses(jobs, run_id)) > reached + 2, jobs, run_id)
    jobs.pause(run_id)
    wait(lambda: jobs.store.run(run_id)["state"] == states.PAUSED, jobs, run_id)


def test_two_processes_have_the_curve_of_one(jobs: Jobs, tmp_path: Path) -> None:
    one, two = jobs.submit(spec(tmp_path, 6)), jobs.submit(spec(tmp_path, 6), processes=2)
    jobs.start_queue(every=0.2)
    for run_id in (one, two):
        wait(lambda run_id=run_id: jobs.store.run(run_id)["state"] == states.DONE, jobs, run_id)  # type: ignore[misc]
    alone, shared = losses(jobs, one), losses(jobs, two)
    assert set(alone) == set(shared) == set(range(1, 7))
    assert all(abs(alone[step] - shared[step]) < 1e-4 for step in alone)
    assert alone[6] < alone[1]


def test_the_end_of_one_process_ends_the_run_with_a_reason(jobs: Jobs, tmp_path: Path) -> None:
    run_id = jobs.submit(spec(tmp_path, 2000), processes=2)
    jobs.start_queue(every=0.2)
    wait(lambda: len(losses(jobs, run_id)) >= 2, jobs, run_id)
    row = jobs.store.run(run_id)
    (other,) = [
        each
        for each in process.members(row["pid"], row["pid_started"])
        if each.pid != row["pid"] and "engine" in each.cmdline()
    ]
    other.kill()
    deadline = time.monotonic() + 120
    while jobs.store.run(run_id)["state"] not in states.FINISHED and time.monotonic() < deadline:
        time.sleep(0.2)
    row = jobs.store.run(run_id)
    assert row["state"] == states.FAILED and row["error"]["code"] == "training", row["error"]
    assert "2 processes" in row["error"]["message"] and "Resume" in row["error"]["hint"]


@pytest.mark.parametrize("processes", [0, -1, 1000])
def test_a_number_of_processes_that_cannot_be_is_refused(jobs: Jobs, tmp_path: Path, processes: int) -> None:
    with pytest.raises(ConfigError, match=f"processes is {processes}"):
        jobs.submit(JobSpec(model="tiny-llama", data=DataSpec(path="rows.jsonl")), processes=processes)
    assert jobs.store.runs() == [] and list((jobs.home / "runs").glob("*")) == []
