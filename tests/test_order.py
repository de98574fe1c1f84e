"""The order of rows: of like length together where batches are padded, and in random order where they are not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from engine.memory.predicting import Job
from engine.train.events import Recorder
from engine.train.job import JobSpec
from engine.train.order import length_of, step_rows
from engine.train.worker import run

PREFIX = {"method": "prefix_tuning", "num_virtual_tokens": 4}
LORA = {"method": "lora", "r": 2, "lora_dropout": 0.0}


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, Path]:
    chance = random.Random(0)
    texts = [" ".join(chance.choices(["sea", "ship", "gull"], k=chance.randint(1, 30))) for _ in range(48)]
    kinds: dict[str, list[dict[str, Any]]] = {
        "causal_lm": [{"text": text} for text in texts],
        "preference": [{"prompt": "Say.", "chosen": t, "rejected": f"no {t} no"} for t in texts],
        "seq2seq": [{"source": text, "target": text} for text in texts],
    }
    found = {}
    for task, lines in kinds.items():
        found[task] = tmp_path / f"{task}.jsonl"
        found[task].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return found


def job(rows: dict[str, Path], task: str, adapter: dict[str, Any], **training: Any) -> JobSpec:
    settings = {"max_steps": 6, "batch_size": 4, "precision": "fp32", "max_length": 128, "learning_rate": 1e-3}
    return JobSpec.from_dict(
        {
            "task": task,
            "model": "tiny-t5" if task == "seq2seq" else "tiny-llama",
            "data": {"path": str(rows[task]), "eval_split": 0},
            "adapter": adapter,
            "training": settings | training,
        }
    )


def padding(spec: JobSpec, steps: int = 12) -> float:
    """The share of padding in the first batches, in the order that the job asks for."""
    made = Job(spec)
    task: Any = made.rows.task
    collate = task.collator(made.model.loaded)
    length = length_of(task, collate) if spec.training.group_by_length else None
    stream = step_rows(made.encoded, spec.training.batch_size, 0, 0, length)
    batches = [collate(next(stream)) for _ in range(steps)]
    sizes = [batch["input_ids"].numel() + batch.get("labels", batch["input_ids"][:0]).numel() for batch in batches]
    return 1 - sum(task.tokens(batch) for batch in batches) / sum(sizes)


@pytest.mark.parametrize("task", ["causal_lm", "preference", "seq2seq"])
def test_rows_of_like_length_leave_less_padding(task: str, rows: dict[str, Path]) -> None:
    adapter = LORA if task == "seq2seq" else PREFIX
    grouped, random_order = (padding(job(rows, task, adapter, group_by_length=on)) for on in (True, False))
    assert random_order > 0.2 and grouped < 0.6 * random_order


@pytest.mark.parametrize(
    ("task", "adapter", "padded"), [("causal_lm", LORA, False), ("causal_lm", PREFIX, True), ("seq2seq", LORA, True)]
)
def test_a_run_groups_padded_rows_alone_and_where_its_job_asks(
    task: str, adapter: dict[str, Any], padded: bool, rows: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    grouped: list[bool] = []

    def watched(rows: Any, per_step: int, seed: int, first: int, length: Any) -> Any:
        grouped.append(length is not None)
        return step_rows(rows, per_step, seed, first, length)

    monkeypatch.setattr("engine.train.loop.step_rows", watched)
    never = type("Never", (), {"poll": lambda self: None})()
    for on in (True, False):
        spec = job(rows, task, adapter, group_by_length=on, max_steps=1)
        assert run(spec, tmp_path / str(on), Recorder(), never, False) == "done"
    assert grouped == [padded, False]
