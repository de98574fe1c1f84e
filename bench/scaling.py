"""What a token costs as rows grow longer, and what a run holds in memory as the data grows.

python -m bench.scaling [--lengths 128 256 512 1024 2048] [--rows 1000 10000 100000 1000000] [--json FILE]

Lengths: training passes of LoRA on a small random Llama over packed batches of `TOKENS` tokens, whatever a row's
length; best of `REPEATS`. Rows: whole runs of three steps on the built-in tiny-llama over a jsonl file of so many short
rows, from reading to saving; the largest resident memory of the process. Each number is another process's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOKENS = 2048
REPEATS = 3
HELD_BACK = 64


def tokens_a_second(length: int) -> dict[str, float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from engine import LoraConfig, get_peft_model
    from engine.tasks.causal_lm import TASK, Tokens, pack

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=2048, max_position_embeddings=4096, **sizes))
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear")).train()
    rows = [Tokens(tuple(torch.randint(2048, (length,)).tolist()), (True,) * length) for _ in range(TOKENS // length)]
    batch, best = pack(rows), float("inf")
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        TASK.loss(model, batch).total.backward()
        best = min(best, time.perf_counter() - started)
    return {"tokens_per_s": TOKENS / best}


def run_over(count: int, path: Path, out: Path) -> dict[str, float]:
    from engine.train.events import Recorder
    from engine.train.job import JobSpec
    from engine.train.worker import run

    class Never:
        def poll(self) -> None:
            return None

    training = {"max_steps": 3, "batch_size": 8, "precision": "fp32", "max_length": 64, "eval_every": 3}
    spec = JobSpec.from_dict(
        {
            "model": "tiny-llama",
            "data": {"path": str(path), "eval_split": min(0.5, HELD_BACK / count)},
            "adapter": {"method": "lora", "r": 8},
            "training": training,
        }
    )
    started, recorder = time.perf_counter(), Recorder()
    assert run(spec, out, recorder, Never(), False) == "done"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "peak_bytes": peak,
        "seconds": time.perf_counter() - started,
        "train_rows": recorder.of("start")[0]["train_rows"],
    }


def child(*argv: str, home: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.scaling", "--child", *argv]
    answer = subprocess.run(command, env={**os.environ, "STUDIO_HOME": home}, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--rows", type=int, nargs="*", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, count, *places = args.child
        measure = tokens_a_second if kind == "length" else run_over
        made = measure(int(count), *map(Path, places))
        print(json.dumps(made))
        return
    results: dict[str, Any] = {"lengths": {}, "rows": {}}
    with tempfile.TemporaryDirectory() as home:
        for length in args.lengths:
            results["lengths"][length] = found = child("length", str(length), home=home)
            print(f"rows of {length:>5} tokens: {found['tokens_per_s']:>9,.0f} tokens/s", flush=True)
        for count in args.rows:
            path = Path(home) / f"{count}.jsonl"
            with path.open("w", encoding="utf-8") as stream:
                for number in range(count):
                    stream.write(json.dumps({"text": f"Row {number}: the ship met gull {number * 7 % 1000}."}) + "\n")
            results["rows"][count] = found = child("rows", str(count), str(path), f"{home}/run-{count}", home=home)
            print(
                f"{count:>9,} rows: {found['peak_bytes'] / 2**20:7,.0f} MiB at the most, {found['seconds']:6.1f} s",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
