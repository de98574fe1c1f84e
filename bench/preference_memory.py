"""Peak memory of preference tuning against SFT on the same batches of tokens, each in a process of its own.

python -m bench.preference_memory [--model smollm2-135m-instruct] [--pairs 24] [--batch 4] [--times 3] [--json FILE]

SFT learns the same packed answers, chosen and rejected alike; preference tuning reads them once more before, as the
base, and holds no second model. `peak` is of the whole process (on a GPU: of torch's allocations), `training` what came
on top of the loaded base with its adapter.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from engine import threads
from engine.models import DEFAULT

KINDS = ("sft", "preference")
ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "examples" / "captain_preferences.jsonl"


def measure(kind: str, model: str, pairs: int, size: int) -> dict[str, float]:
    """MiB of one kind of training in this process."""
    threads.apply(None)
    import torch

    from engine import LoraConfig, get_peft_model
    from engine.data import load
    from engine.models.loading import load_causal_lm
    from engine.tasks.base import Loaded
    from engine.tasks.causal_lm import TASK as SFT
    from engine.tasks.preference import Preference
    from engine.train.job import TrainingSpec

    base, tokenizer = load_causal_lm(model)
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    loaded = Loaded(get_peft_model(base, config), tokenizer)
    training = TrainingSpec(batch_size=size, max_length=256)
    task = Preference()
    before = now(torch)
    # ORPO's rows are the same without the reference, so SFT pays for no pass that it does not need.
    rows = (
        (task if kind == "preference" else Preference("orpo"))
        .encode(load(SAMPLE).examples[:pairs], loaded, training, lambda phase, fraction, message: None)
        .rows
    )
    collate = task.collator(loaded)
    parameters = list(loaded.model.adapter_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    loaded.model.train()
    tokens = 0
    for start in range(0, len(rows), size):
        batch = {key: value.to(base.device) for key, value in collate(rows[start : start + size]).items()}
        part = task.loss(loaded.model, batch) if kind == "preference" else SFT.loss(loaded.model, batch)
        (part.total / part.count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += task.tokens(batch)
    peak = top(torch)
    return {"tokens": tokens, "peak": peak, "training": peak - before}


def now(torch: Any) -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.memory_allocated() / 2**20)
    import psutil

    return float(psutil.Process().memory_info().rss / 2**20)


def top(torch: Any) -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / 2**20)
    # Kilobytes on Linux, bytes on a Mac.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    """Both kinds in turns; the medians and their ratio."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.model, options.pairs, options.batch)))
        return
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    argv = ["--model", options.model, "--pairs", str(options.pairs), "--batch", str(options.batch)]
    for _ in range(options.times):
        for kind in KINDS:
            command = [sys.executable, "-m", "bench.preference_memory", *argv, "--only", kind]
            result = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=True)
            found[kind].append(json.loads(result.stdout.splitlines()[-1]))
    middle = {
        kind: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for kind, runs in found.items()
    }
    for kind, values in middle.items():
        print(f"{kind:12} {values['tokens']:6.0f} tokens  peak {values['peak']:7.0f} MiB  of it training ", end="")
        print(f"{values['training']:7.0f} MiB")
    ratios = {name: middle["preference"][name] / middle["sft"][name] for name in ("peak", "training")}
    print(f"preference / sft: peak {ratios['peak']:.3f}, training alone {ratios['training']:.3f}")
    if options.json:
        options.json.write_text(json.dumps({"model": options.model, **middle, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
