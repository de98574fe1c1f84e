"""How many GFLOP/s matrix products reach with each thread setting; each setting in a process of its own.

python bench/threads.py [--threads 1 2] [--busy 1] [--seconds 1.5] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SIZE = 1024
POLICIES = ("default", "passive")
PRECISIONS = ("fp32", "bf16")


def measure(seconds: float) -> dict[str, float]:
    """GFLOP/s of square products in this process, as its environment was set before it began."""
    import torch

    found = {}
    for precision in PRECISIONS:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        left, right = torch.randn(SIZE, SIZE, dtype=dtype), torch.randn(SIZE, SIZE, dtype=dtype)
        for _ in range(5):
            left @ right
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            left @ right
            done += 1
        found[precision] = 2 * SIZE**3 * done / (time.perf_counter() - start) / 1e9
    return found


def in_process(count: int, policy: str, seconds: float) -> dict[str, float]:
    """`measure` in a new process with this thread count and waiting policy."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}
    environment.pop("OMP_WAIT_POLICY", None)
    if policy != "default":
        environment["OMP_WAIT_POLICY"] = policy
    command = [sys.executable, __file__, "--child", "--seconds", str(seconds)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(answer.stdout)
    return result


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes that keep `count` CPUs busy, as other programs on a shared machine do."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main() -> None:
    """How many GFLOP/s matrix products reach with each thread setting."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--busy", type=int, default=0, help="CPUs that other processes keep busy meanwhile")
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=3, help="on a shared machine the best round says most")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.seconds)))
        return
    rows = []
    heads = "".join(f"{name + ' best':>12}{name + ' worst':>12}" for name in PRECISIONS)
    print(f"{'threads':>7}  {'waiting':8}{heads}")
    for count in options.threads:
        for policy in POLICIES:
            with neighbours(options.busy):
                rounds = [in_process(count, policy, options.seconds) for _ in range(options.rounds)]
            row = {name: sorted(found[name] for found in rounds) for name in PRECISIONS}
            rows.append({"threads": count, "policy": policy, "gflops": row})
            cells = "".join(f"{row[name][-1]:12.0f}{row[name][0]:12.0f}" for name in PRECISIONS)
            print(f"{count:>7}  {policy:8}{cells}", flush=True)
    if options.json:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        about = {"machine": platform.platform(), "cpus": os.cpu_count(), "load": load, "busy": options.busy}
        options.json.write_text(json.dumps({**about, "size": SIZE, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
