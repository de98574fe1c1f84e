"""Seconds of one training step (forward and backward above a frozen base) in fp32 and in bf16, in turns.

python -m bench.precision [--model smollm2-135m-instruct] [--tokens 512] [--steps 4] [--threads 2]

CPU seconds are the ones to compare on a shared machine; the turns let both precisions meet the same neighbours.
"""

from __future__ import annotations

import argparse
import time

from engine import threads
from engine.models import DEFAULT
from engine.models.loading import auto_precision, load_causal_lm


def main() -> None:
    """Seconds of one training step in fp32 and in bf16."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    threads.apply(options.threads)
    import torch

    models = {precision: load_causal_lm(options.model, precision=precision)[0] for precision in ("fp32", "bf16")}
    for model in models.values():
        model.requires_grad_(False)
        # As an adapter in the first layer would: gradients flow back through every layer, no base weight gets one.
        model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())
    rows = torch.randint(20, model.config.vocab_size, (1, options.tokens), device=model.device)
    taken: dict[str, list[tuple[float, float]]] = {precision: [] for precision in models}
    for _ in range(options.steps + 1):
        for precision, model in models.items():
            wall, cpu = time.perf_counter(), time.process_time()
            model(rows, labels=rows, use_cache=False).loss.backward()
            taken[precision].append((time.process_time() - cpu, time.perf_counter() - wall))
    print(f"{options.tokens} tokens, {torch.get_num_threads()} threads, auto chooses {auto_precision(model.device)}")
    for precision, times in taken.items():
        # The first step also sets up memory and kernels.
        cpu_best, wall_best = (min(column) for column in zip(*times[1:], strict=True))
        print(f"{precision}: {cpu_best:.2f} CPU seconds, {wall_best:.2f} seconds (best of {options.steps})")


if __name__ == "__main__":
    main()
