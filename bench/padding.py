"""How much of a run's batches is padding, with rows in random order and with rows of like length together.

python -m bench.padding [JOB.yaml ...] [--batch-size 8] [--epochs 3] [--json FILE]

No weight is read and nothing is trained: rows are encoded and batched as the loop does it (`engine.memory.Job`).
Decoder models pack their rows, unless virtual tokens stand before them; the third case pads for that reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from engine.memory.predicting import Job
from engine.paths import REPOSITORY
from engine.train.job import JobSpec
from engine.train.order import length_of, step_rows

EXAMPLES = REPOSITORY / "examples"
ORDERS = {"random": False, "by length": True}


def cases() -> dict[str, JobSpec]:
    """The padded jobs of examples/, and preferences behind a prefix."""
    named = {name: JobSpec.from_file(EXAMPLES / f"{name}.yaml") for name in ("translate_tiny", "preference_tiny")}
    behind = dataclasses.replace(named.pop("preference_tiny"), adapter={"method": "prefix_tuning"})
    topics = JobSpec.from_file(EXAMPLES / "topics_minilm.yaml")
    return {**named, "topics_minilm": topics, "preference behind a prefix": behind}


def share(spec: JobSpec, batch_size: int, epochs: int) -> dict[str, float]:
    """Order -> the share of the batches' positions that are padding."""
    job = Job(spec)
    task: Any = job.rows.task
    collate = task.collator(job.model.loaded)
    length = length_of(task, collate)
    per_step = batch_size * spec.training.gradient_accumulation
    steps = epochs * -(-len(job.encoded) // per_step)
    found = {}
    for name, grouped in ORDERS.items():
        whole = real = 0
        stream = step_rows(job.encoded, per_step, spec.training.seed, 0, length if grouped else None)
        for rows in itertools.islice(stream, steps):
            for start in range(0, len(rows), batch_size):
                batch = collate(rows[start : start + batch_size])
                targets = batch["labels"].numel() if "labels" in batch else 0
                whole += batch["input_ids"].numel() + targets
                real += task.tokens(batch)
        found[name] = 1 - real / whole
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", type=Path)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    specs = {path.stem: JobSpec.from_file(path) for path in args.jobs} or cases()
    results = {name: share(spec, args.batch_size, args.epochs) for name, spec in specs.items()}
    for name, shares in results.items():
        print(f"{name:30}" + "".join(f"{order}: {value:6.1%}   " for order, value in shares.items()))
    if args.json:
        args.json.write_text(json.dumps({"batch_size": args.batch_size, "padding": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
