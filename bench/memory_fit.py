"""Predicted against measured peak memory of training, each run a whole process of its own.

python -m bench.memory_fit [NAME ...] [--json bench/results/memory_fit.json]

Each case is a job of three steps, two of them of more. `measured` is the largest resident memory of the training
process (`ru_maxrss` of `python -m engine train`), `predicted` what `engine.memory.predict` says of the same job before.
smollm2-135m-instruct has to be fetched before (`python -m engine.models.fetch smollm2-135m-instruct`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from bench.measuring import ROOT, run_child
from engine import threads
from engine.memory import predict
from engine.train.job import JobSpec

EXAMPLES = ROOT / "examples"
SMOL, TINY = "smollm2-135m-instruct", "tiny-llama"
_LINEAR = {"target_modules": "all-linear"}


def _job(model: str, adapter: dict[str, Any], batch: int, length: int, **more: Any) -> dict[str, Any]:
    """A job over rows that fill `length`, unless `more` names other data."""
    training = {"max_steps": 3, "batch_size": batch, "max_length": length, "precision": "fp32", "loss_on": "all"}
    training |= more.pop("training", {})
    return {"model": model, "adapter": adapter, "data": {"path": "", "eval_split": 0.05}, "training": training, **more}


CASES: dict[str, dict[str, Any]] = {
    "lora-fp32": _job(SMOL, {"method": "lora", "r": 8, **_LINEAR}, 1, 512),
    "lora-fp32-batch-8": _job(SMOL, {"method": "lora", "r": 8, **_LINEAR}, 8, 128),
    "lora-bf16": _job(SMOL, {"method": "lora", "r": 8, **_LINEAR}, 1, 512, training={"precision": "bf16"}),
    "dora": _job(SMOL, {"method": "dora", "r": 8, **_LINEAR}, 4, 128),
    "full": _job(SMOL, {}, 1, 128, full=True),
    "full-tiny": _job(TINY, {}, 8, 512, full=True),
    "nf4": _job(SMOL, {"method": "lora", "r": 8, **_LINEAR}, 1, 512, quantization="nf4"),
    "checkpointing": _job(
        SMOL, {"method": "lora", "r": 8, **_LINEAR}, 8, 128, training={"gradient_checkpointing": True}
    ),
    "prefix": _job(SMOL, {"method": "prefix_tuning", "num_virtual_tokens": 20}, 4, 128),
    "chats": _job(
        TINY,
        {"method": "lora", "r": 8},
        32,
        512,
        data={"path": str(EXAMPLES / "lighthouse.jsonl"), "eval_split": 0.1},
        training={"loss_on": "answers"},
    ),
    "chats-bf16": _job(
        SMOL,
        {"method": "lora", "r": 8, **_LINEAR},
        8,
        512,
        data={"path": str(EXAMPLES / "lighthouse.jsonl"), "eval_split": 0.1},
        training={"loss_on": "answers", "precision": "bf16", "max_steps": 16},
    ),
    "chats-bf16-tiny": _job(
        TINY,
        {"method": "lora", "r": 8, **_LINEAR},
        8,
        128,
        data={"path": str(EXAMPLES / "lighthouse.jsonl"), "eval_split": 0.1},
        training={"loss_on": "answers", "precision": "bf16", "max_steps": 36, "sample_prompts": ["What is a tiger?"]},
    ),
    "seq2seq": _job(
        "tiny-t5",
        {"method": "lora", "r": 8},
        64,
        128,
        task="seq2seq",
        data={"path": str(EXAMPLES / "old_english.csv"), "eval_split": 0.02},
    ),
    "classification": _job(
        "minilm",
        {"method": "lora", "r": 8},
        32,
        128,
        task="classification",
        data={"path": str(EXAMPLES / "question_topics.csv"), "eval_split": 0.05},
    ),
}


def run_case(name: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train one job in a process of its own, and predict it in another; bytes."""
    job = {**job, "data": dict(job["data"])}
    if not job["data"]["path"]:
        job["data"]["path"] = str(_long_rows(folder))
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    predicted = _predict(path)
    measured = run_child(
        [sys.executable, "-m", "engine", "train", str(path), "--out", str(folder / name), "--json"]
    ).peak
    return {"measured": measured, "predicted": predicted}


def _predict(path: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.memory_fit", "--predict", str(path)]
    result = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{path.name}: {result.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def _long_rows(folder: Path, count: int = 24) -> Path:
    """Texts of about 3,000 words each, so that every row is cut to the job's length."""
    path = folder / "long.jsonl"
    if not path.exists():
        rows = [json.loads(line) for line in (EXAMPLES / "small_functions.jsonl").read_text("utf-8").splitlines()]
        words = " ".join(str(value) for row in rows for value in row.values()).split()
        texts = [" ".join((words[i * 97 :] + words)[:3000]) for i in range(count)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def table(cases: dict[str, Any]) -> list[str]:
    """The cases as a Markdown table, in MB."""
    lines = ["| case | predicted | measured | error |", "|---|---|---|---|"]
    for name, case in cases.items():
        wanted, got = case["predicted"]["peak"], case["measured"]
        lines.append(f"| {name} | {wanted / 1e6:,.0f} MB | {got / 1e6:,.0f} MB | {wanted / got - 1:+.1%} |")
    errors = [abs(case["predicted"]["peak"] / case["measured"] - 1) for case in cases.values()]
    return [*lines, "", f"Largest error {max(errors):.1%}, mean {sum(errors) / len(errors):.1%}."]


def main() -> None:
    """All cases, or those that are named; results of the others stay in the file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(CASES)}")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--predict", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.predict:
        threads.apply(None)
        print(json.dumps(predict(JobSpec.from_file(options.predict)).to_dict()))
        return
    unknown = sorted(set(options.names) - CASES.keys())
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}")
    found: dict[str, Any] = {}
    if options.json and options.json.exists():
        found = json.loads(options.json.read_text(encoding="utf-8"))["cases"]
    with tempfile.TemporaryDirectory(prefix="memory-fit-") as folder:
        for name in options.names or CASES:
            found[name] = run_case(name, CASES[name], Path(folder))
            print(table({name: found[name]})[2], flush=True)
            if options.json:
                _write(options.json, found)
    print("\n".join(table({name: found[name] for name in CASES if name in found})))


def _write(path: Path, cases: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "engine", "doctor", "--json"]
    result = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=True)
    machine = json.loads(result.stdout)
    kept = {key: machine[key] for key in ("system", "python", "processor", "cores", "threads", "memory", "packages")}
    ordered = {name: cases[name] for name in CASES if name in cases}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": kept, "cases": ordered}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
