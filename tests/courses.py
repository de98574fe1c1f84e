"""Courses of runs made of numbers, as events, and runs of a studio that look as if they had taken them."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from typing import Any

from engine.train.job import DataSpec, JobSpec, TrainingSpec
from studio import states
from studio.context import Studio
from studio.datasets import Datasets

Event = dict[str, Any]

ERRORS = {
    "diverged": {
        "code": "diverged",
        "message": "Step 41 gave a loss of nan and a gradient norm of nan: the run diverged. The last checkpoint "
        "is kept.",
        "hint": "Lower the learning rate or lengthen the warm-up; then start a new run or resume with them.",
    },
    "memory": {
        "code": "memory",
        "message": "The machine ran out of memory. 4.00 GiB more were asked for, and 1.20 GiB were free.",
        "hint": "This fits: training.batch_size: 2, training.gradient_accumulation: 4 (predicted 3.1 GB).",
        "remedy": {"training.batch_size": 2, "training.gradient_accumulation": 4},
    },
    "lost": {
        "code": "lost",
        "message": "The run's process is gone (signal 9): it was killed, the machine restarted, or memory ran out.",
        "hint": "Resume goes on from the last checkpoint; if it happens again, use a smaller batch or max length.",
    },
}


def events(
    loss: Callable[[float], float],
    checks: Callable[[float], float] | None = None,
    *,
    steps: int = 100,
    total: int | None = None,
    every: int = 10,
    noise: float = 0.05,
    rows: int = 270,
    seed: int = 0,
    memory: int = 900_000_000,
) -> list[Event]:
    """A run whose training loss is `loss(share of the steps)`, times noise, and its evaluations `checks(share)`."""
    drawn, total = random.Random(seed), total or steps
    start = {"total_steps": total, "train_rows": rows, "eval_rows": 30, "memory_limit": 8 * 10**9}
    found: list[Event] = [{"type": "start", **start}]
    if checks:
        found.append({"type": "eval", "step": 0, "loss": checks(0.0)})
    for step in range(1, steps + 1):
        share = step / total
        value = loss(share) * math.exp(drawn.gauss(0, noise))
        found.append(
            {
                "type": "step",
                "step": step,
                "loss": value,
                "lr": 2e-4 * (1 - share),
                "grad_norm": 1.4 * math.exp(drawn.gauss(0, 0.2)),
                "tokens_per_s": 1400 + 40 * drawn.gauss(0, 1),
                "memory": memory + 3_000_000 * min(step, 20),
                "epoch": step * 8 / rows,
                "eta_s": (total - step) * 1.5,
            }
        )
        if checks and step % every == 0:
            found.append({"type": "eval", "step": step, "loss": checks(share) * math.exp(drawn.gauss(0, noise / 20))})
    return found


def healthy(**options: Any) -> list[Event]:
    return events(lambda x: 0.7 + 2.3 * math.exp(-6 * x), lambda x: 0.8 + 2.2 * math.exp(-6 * x), **options)


def overfitting(**options: Any) -> list[Event]:
    return events(
        lambda x: 0.05 + 2.9 * math.exp(-6 * x),
        lambda x: 1.6 + 1.4 * math.exp(-14 * x) + 1.5 * max(0.0, x - 0.3),
        **options,
    )


def flat(level: float = 3.0, **options: Any) -> list[Event]:
    return events(lambda x: level, lambda x: level * (1 - 0.002 * x), **options)


def rising(**options: Any) -> list[Event]:
    shape = lambda x: 3.0 if x < 0.025 else 5.9 + 2 * math.exp(-20 * x)  # noqa: E731
    return events(shape, lambda x: 3.0 if x == 0 else 5.9, **options)


def run_of(
    studio: Studio,
    name: str,
    course: list[Event],
    state: str = states.DONE,
    error: str | None = None,
    checkpoint: bool = False,
    log: str = "",
    **changes: Any,
) -> str:
    """A run in this state that took the course; its rows are a small data set that the studio knows."""
    rows = studio.home / "rows.csv"
    if not rows.exists():
        lines = [f'"What is {i} plus {i}?","It is {2 * i}, matey."' for i in range(300)]
        rows.write_text("\n".join(["instruction,output", *lines]))
    kept = Datasets(studio.store, studio.home).bring_in(rows, "captain.csv")
    dataset = studio.store.dataset(str(kept.id))
    training = {"max_steps": 100, "batch_size": 8, "max_length": 128, "eval_every": 10, **changes}
    adapter = {"method": "lora", "r": 32, "lora_alpha": 64, "lora_dropout": 0.05, "target_modules": "all-linear"}
    spec = JobSpec(
        model="tiny-llama",
        data=DataSpec(path=dataset["path"], format=dataset["format"], columns=dataset["columns"]),
        adapter=adapter,
        training=TrainingSpec(**training),
        name=name,
    )
    run = studio.jobs.submit(spec, dataset["id"])
    for event in course:
        studio.store.add_event(run, event)
    fault = ERRORS[error] if error else None
    if fault:
        studio.store.add_event(run, {"type": "error", **fault})
    shown = {key: fault[key] for key in ("code", "message", "hint")} if fault else None
    ended = {} if state in states.LIVE else {"ended": time.time()}
    studio.store.update_run(run, state=state, started=time.time() - 180, error=shown, **ended)
    folder = studio.jobs.folder(run)
    if checkpoint:
        (folder / "checkpoints" / "step-000020").mkdir(parents=True)
    if log:
        (folder / "worker.log").write_text(log)
    return run
