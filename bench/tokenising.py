"""Rows a second into tokens: one call of the tokenizer a row, many rows a call, and from an earlier run's file.

python -m bench.tokenising [--rows 5000] [--base tiny-llama] [--json FILE]

Rows are those of examples/lighthouse.jsonl (chats) and examples/old_english.csv (as plain texts), repeated with a
number so that no two are the same. No weight is read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import LlamaConfig

from engine.data import load
from engine.models.loading import load_tokenizer
from engine.paths import REPOSITORY, studio_home
from engine.tasks.base import Loaded
from engine.tasks.causal_lm import TASK, encode_example
from engine.train.job import TrainingSpec

REPEATS = 4


class NoModel(nn.Module):
    """What the task asks a model for before it encodes: its config."""

    config = LlamaConfig(max_position_embeddings=2048)


def rows(kind: str, count: int) -> list[dict[str, Any]]:
    """So many rows of one kind, each a little different."""
    if kind == "chats":
        found = load(REPOSITORY / "examples" / "lighthouse.jsonl").examples
        turns = [turn["messages"] for turn in itertools.islice(itertools.cycle(found), count)]
        return [
            {"messages": [{**turn, "content": f"{number} {turn['content']}"} for turn in row]}
            for number, row in enumerate(turns)
        ]
    pairs = load(REPOSITORY / "examples" / "old_english.csv").examples
    texts = [f"{pair['source']} = {pair['target']}" for pair in pairs]
    return [{"text": f"{number} {text}"} for number, text in enumerate(itertools.islice(itertools.cycle(texts), count))]


def rate(count: int, work: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
    """The best of `REPEATS`, for other programs may be running beside."""
    best = math.inf
    for _ in range(REPEATS):
        before()
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return count / best


def measure(examples: Sequence[dict[str, Any]], loaded: Loaded) -> dict[str, float]:
    """Way -> rows a second."""
    training, quiet = TrainingSpec(max_length=2048), lambda phase, share, message: None
    memory = Loaded(loaded.model, loaded.processor)

    def forget() -> None:
        shutil.rmtree(studio_home() / "cache", ignore_errors=True)

    def one_by_one() -> None:
        for example in examples:
            for _ in encode_example(example, loaded.processor, "answers"):
                pass

    return {
        "one by one": rate(len(examples), one_by_one),
        "together": rate(len(examples), lambda: TASK.encode(examples, memory, training, quiet)),
        "first run, kept": rate(len(examples), lambda: TASK.encode(examples, loaded, training, quiet), forget),
        "second run": rate(len(examples), lambda: TASK.encode(examples, loaded, training, quiet)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--base", default="tiny-llama")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        tokenizer = load_tokenizer(args.base)
        os.environ["STUDIO_HOME"] = home
        loaded = Loaded(NoModel(), tokenizer, cache=Path(home))
        results = {}
        for kind in ("chats", "texts"):
            examples = rows(kind, args.rows)
            TASK.encode(examples[:100], Loaded(loaded.model, tokenizer), TrainingSpec(), lambda *_: None)
            results[kind] = measure(examples, loaded)
            print(f"{kind:8}" + "   ".join(f"{way}: {value:,.0f}" for way, value in results[kind].items()) + " rows/s")
    if args.json:
        machine = f"{os.cpu_count()} CPUs, {platform.processor() or platform.machine()}"
        args.json.write_text(json.dumps({"machine": machine, "rows": args.rows, "rates": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
