"""Trains the toys by the shipped samples and presets, and keeps what their losses did: tests/data/courses.json.

    python scripts/courses.py [NAME ...]

The run doctor must find these runs healthy, at every moment. Takes about half an hour on two cores; with names, the
others stay as they are.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.paths import REPOSITORY
from engine.train.events import Recorder
from engine.train.job import JobSpec
from engine.train.worker import run
from studio import recipes
from studio.samples import SAMPLES

KEPT = REPOSITORY / "tests" / "data" / "courses.json"
EXAMPLES = REPOSITORY / "examples"
FIELDS = ("type", "step", "loss", "grad_norm", "total_steps", "train_rows", "eval_rows", "memory", "memory_limit")


class Never:
    """A control that asks for nothing."""

    def poll(self) -> str | None:
        return None


def of_sample(name: str) -> JobSpec:
    """A sample's job; its prompts cost time and say nothing of the curve."""
    spec = SAMPLES[name].spec()
    return dataclasses.replace(spec, training=dataclasses.replace(spec.training, sample_prompts=()))


def of_preset(task: str, preset: str, model: str, rows: str, **training: Any) -> JobSpec:
    """A preset's job on rows of the examples."""
    form = recipes.task_of(task)
    recipe = recipes.of_preset(form, form.presets[preset])
    return JobSpec.from_dict(
        {
            "model": model,
            "task": task,
            "data": {"path": str(EXAMPLES / rows), "eval_split": recipe["eval_split"]},
            "adapter": {key: value for key, value in recipe["adapter"].items() if value is not None},
            "training": {**recipe["training"], "sample_prompts": [], **training},
            "options": recipe["options"],
            "quantization": recipe["quantization"],
        }
    )


def chat(preset: str, rows: str = "lighthouse.jsonl") -> JobSpec:
    return of_preset("causal_lm", preset, "tiny-llama", rows)


def single_rows(rows: str, eval_split: float) -> JobSpec:
    """One row a step, the noisiest that a run can be."""
    spec = of_preset("causal_lm", "quick-look", "tiny-llama", rows, batch_size=1, max_steps=150, eval_every=30)
    return dataclasses.replace(spec, data=dataclasses.replace(spec.data, eval_split=eval_split))


JOBS: dict[str, Callable[[], JobSpec]] = {
    "toy": lambda: of_sample("toy"),
    "old-english": lambda: of_sample("old-english"),
    "captions": lambda: of_sample("captions"),
    "pictures": lambda: of_sample("pictures"),
    "preferences": lambda: of_sample("preferences"),
    "quick-look": lambda: chat("quick-look"),
    "conservative": lambda: chat("conservative"),
    "aggressive": lambda: chat("aggressive"),
    "low-memory": lambda: chat("low-memory"),
    "code": lambda: chat("code", "small_functions.jsonl"),
    "completion": lambda: chat("completion", "small_functions.jsonl"),
    "dpo": lambda: of_preset("preference", "dpo", "tiny-llama", "captain_preferences.jsonl"),
    "single-rows": lambda: single_rows("lighthouse.jsonl", 0.1),
    "single-rows-unchecked": lambda: single_rows("small_functions.jsonl", 0.0),
}


def course(spec: JobSpec) -> dict[str, Any]:
    """The job, its rows by their file's name, and its events as far as the doctor reads them, to five digits."""
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        run(spec, Path(folder) / "run", recorder, Never())
    events = [short(event) for event in recorder.events if event["type"] in ("start", "step", "eval")]
    plain = spec.to_dict()
    plain["data"]["path"] = Path(spec.data.path).name
    return {"spec": plain, "events": events}


def short(event: dict[str, Any]) -> dict[str, Any]:
    return {
        key: float(f"{event[key]:.5g}") if isinstance(event[key], float) else event[key]
        for key in FIELDS
        if key in event
    }


def main() -> None:
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    for name in sys.argv[1:] or JOBS:
        print(name, flush=True)
        kept[name] = course(JOBS[name]())
        KEPT.parent.mkdir(exist_ok=True)
        lines = (f"{json.dumps(key)}: {json.dumps(kept[key], separators=(',', ':'))}" for key in sorted(kept))
        KEPT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
