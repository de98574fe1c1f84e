"""Full fine-tuning and every method on one task: accuracy, trained parameters, size of the result, memory, time.

    python -m bench.leaderboard --data FILE.csv [--seeds 0 1 2] [--only lora full ...] [--epochs 3]
    python -m bench.leaderboard --draw

`scripts/debian_sections.py FILE.csv` makes the data. Every run is `python -m engine train` in a process of its own,
with the same rows held back for a seed. A run that `bench/results/leaderboard.json` has already is not repeated, so it
can be cut off at any time. Learning rates were chosen on seed 100, which is not reported: `--sweep` tries `RATES`.
`--draw` writes the table and the picture of docs/leaderboard.md from the results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "leaderboard.json"
SWEPT = 100
RATES = (0.3, 1.0, 3.0)
"""What `--sweep` multiplies a contender's learning rate by."""


@dataclass(frozen=True)
class Contender:
    """A row of the leaderboard: an adapter's fields (none for full fine-tuning) and its learning rate."""

    title: str
    rate: float
    adapter: dict[str, Any] = field(default_factory=dict)

    def job(self, data: Path, seed: int, epochs: float, rate: float) -> dict[str, Any]:
        """The job, as YAML would hold it."""
        kind: dict[str, Any] = {"adapter": self.adapter} if self.adapter else {"full": True}
        return {
            "task": "classification",
            "model": "minilm",
            "data": {"path": str(data), "eval_split": 0.25},
            **kind,
            "training": {
                "epochs": epochs,
                "batch_size": 16,
                "learning_rate": rate,
                "warmup_ratio": 0.1,
                "schedule": "linear",
                "max_length": 64,
                "precision": "fp32",
                "seed": seed,
                "eval_every": 1_000_000,
                "checkpoint_every": 1_000_000,
            },
        }


_PAIR = ["query", "value"]
_LINEAR = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


def _low_rank(method: str, r: int = 8, **more: Any) -> dict[str, Any]:
    return {"method": method, "r": r, "lora_alpha": 2 * r, "target_modules": _PAIR, **more}


CONTENDERS = {
    "full": Contender("Full fine-tuning", 0.0002),
    "lora": Contender("LoRA, query and value", 0.003, _low_rank("lora")),
    "lora-all": Contender("LoRA, every linear layer", 0.002, _low_rank("lora", 4, target_modules=_LINEAR)),
    # The base was trained on the mean of its tokens: its pooler has learned nothing yet and needs a higher rank.
    "lora-pooler": Contender(
        "LoRA, every linear layer and the pooler",
        0.003,
        _low_rank(
            "lora",
            4,
            target_modules=[*_LINEAR, "pooler.dense"],
            rank_pattern={"pooler.dense": 32},
            alpha_pattern={"pooler.dense": 64},
        ),
    ),
    "dora": Contender("DoRA", 0.009, _low_rank("dora")),
    "adalora": Contender(
        "AdaLoRA",
        0.015,
        {"method": "adalora", "init_r": 12, "target_r": 8, "lora_alpha": 32, "target_modules": _PAIR},
    ),
    "delta_lora": Contender("Delta-LoRA", 0.003, _low_rank("delta_lora")),
    "lorafa": Contender("LoRA-FA", 0.009, _low_rank("lorafa")),
    "qalora": Contender("QA-LoRA", 0.009, _low_rank("qalora")),
    "ia3": Contender(
        "IA3",
        0.03,
        {
            "method": "ia3",
            "target_modules": ["key", "value", "output.dense"],
            "feedforward_modules": ["output.dense"],
        },
    ),
    "vera": Contender("VeRA", 0.03, {"method": "vera", "r": 256, "target_modules": _PAIR}),
    "mora": Contender("MoRA", 0.006, {"method": "mora", "r": 8, "target_modules": _PAIR}),
    "loha": Contender("LoHa", 0.009, {"method": "loha", "r": 8, "alpha": 16, "target_modules": _PAIR}),
    "lokr": Contender("LoKr", 0.009, {"method": "lokr", "r": 8, "alpha": 16, "target_modules": _PAIR}),
    "prompt_tuning": Contender("Prompt tuning", 0.09, {"method": "prompt_tuning", "num_virtual_tokens": 20}),
    "p_tuning": Contender(
        "P-Tuning", 0.009, {"method": "p_tuning", "num_virtual_tokens": 20, "encoder_hidden_size": 128}
    ),
    "prefix_tuning": Contender("P-Tuning v2 (prefixes)", 0.03, {"method": "prefix_tuning", "num_virtual_tokens": 20}),
}
"""Name -> contender, in the order of the table before it is sorted."""


def run_one(name: str, data: Path, seed: int, epochs: float, rate: float) -> dict[str, Any]:
    """Train one contender and measure it.

    Raises:
        RuntimeError: the run failed; the message ends with its last words.
    """
    contender = CONTENDERS[name]
    with tempfile.TemporaryDirectory(prefix="leaderboard-") as folder:
        job, out = Path(folder) / "job.yaml", Path(folder) / "out"
        job.write_text(json.dumps(contender.job(data, seed, epochs, rate)), encoding="utf-8")
        argv = [sys.executable, "-m", "bench.leaderboard", "--measure", str(job), str(out)]
        answer = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
        if answer.returncode != 0:
            raise RuntimeError(f"{name}, seed {seed}: {(answer.stdout + answer.stderr)[-2000:]}")
        found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
        made = out / ("adapter" if contender.adapter else "model")
        found["bytes"] = sum(path.stat().st_size for path in made.glob("*.safetensors"))
    return {"contender": name, "seed": seed, "epochs": epochs, "learning_rate": rate, **found}


def measure(job: Path, out: Path) -> dict[str, Any]:
    """Run the engine as a child and read its events; the peak is the child's resident memory."""
    argv = [sys.executable, "-m", "engine", "train", str(job), "--out", str(out), "--json"]
    child = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    events = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    if child.returncode != 0:
        raise RuntimeError((child.stdout + child.stderr)[-1500:])
    of = {event["type"]: event for event in events}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    steps = [event for event in events if event["type"] == "step"]
    return {
        "accuracy": of["eval"]["metrics"]["accuracy"],
        "macro_f1": of["eval"]["metrics"]["macro_f1"],
        "eval_loss": of["eval"]["loss"],
        "trainable": of["start"]["trainable"],
        "parameters": of["start"]["parameters"],
        "steps": len(steps),
        "seconds": of["done"]["seconds"],
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": peak,
    }


def read_results() -> dict[str, Any]:
    """The file as it stands, or an empty one."""
    if RESULTS.exists():
        found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
        return found
    return {"machine": {}, "data": {}, "sweep": [], "runs": []}


def write_results(results: dict[str, Any]) -> None:
    """Beside its place first, so that a cut leaves the former file."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    draft = RESULTS.with_suffix(".draft")
    draft.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(RESULTS)


def describe(data: Path, results: dict[str, Any]) -> None:
    """Note the machine and the data; other data than before needs another file."""
    rows = data.read_bytes()
    about = {"sha256": hashlib.sha256(rows).hexdigest(), "rows": rows.count(b"\n") - 1}
    if results["data"] and results["data"] != about:
        raise SystemExit(f"{RESULTS} holds results on other rows than {data}; move it away first.")
    results["data"] = about
    results["machine"] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", choices=CONTENDERS)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(measure(*asked.measure)))
        return 0
    if asked.data:
        _run_all(asked)
    if asked.draw or asked.data:
        from bench.leaderboard_page import draw

        draw(read_results())
    return 0


def _run_all(asked: argparse.Namespace) -> None:
    results = read_results()
    describe(asked.data, results)
    kept = results["sweep" if asked.sweep else "runs"]
    plan = [
        (name, seed, CONTENDERS[name].rate * factor)
        for seed in ([SWEPT] if asked.sweep else asked.seeds)
        for name in asked.only or CONTENDERS
        for factor in (RATES if asked.sweep else (1.0,))
    ]
    for number, (name, seed, rate) in enumerate(plan, start=1):
        key = (name, seed, rate, asked.epochs)
        if any((r["contender"], r["seed"], r["learning_rate"], r["epochs"]) == key for r in kept):
            continue
        begun = time.perf_counter()
        found = run_one(name, asked.data.resolve(), seed, asked.epochs, rate)
        kept.append(found)
        write_results(results)
        print(
            f"{number}/{len(plan)} {name} seed {seed} rate {rate:.2g}: accuracy {found['accuracy']:.3f}, "
            f"{found['trainable']:,} parameters, {time.perf_counter() - begun:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
