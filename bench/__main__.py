"""All rows of speed and memory against PEFT and TRL in one go: `make bench`.

    python -m bench [NAME ...] [--draw]

Runs the benchmarks one after another, each in a process of its own, keeps their rows in bench/results/bench.json with
the machine they were measured on, and writes docs/benchmarks.md. With names, the rows of the others stay. `--draw` only
writes the page again. A benchmark that is not there or fails is named on the page, and its earlier rows go.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.bench_page import BENCHES, RESULTS, draw
from bench.measuring import ROOT, machine, write
from engine.models import DEFAULT


def measure(name: str) -> dict[str, Any]:
    """One benchmark's rows, or why there are none."""
    if importlib.util.find_spec(f"bench.{name}") is None:
        return {"left_out": "it is not in this version"}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path, started = Path(folder) / "rows.json", time.perf_counter()
        command = [sys.executable, "-m", f"bench.{name}", "--json", str(path)]
        ended = subprocess.run(command, cwd=ROOT, env=environment(), check=False)
        if ended.returncode or not path.exists():
            return {"left_out": f"it ended with status {ended.returncode}"}
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    seconds = round(time.perf_counter() - started)
    return {"command": f"python -m bench.{name}", "seconds": seconds, "rows": rows}


def environment() -> dict[str, str]:
    """What all benchmarks run in; both sides get the threads' waiting policy that our worker sets for itself."""
    return {**os.environ, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY") or "passive"}


def main() -> None:
    """All benchmarks, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(BENCHES)}")
    parser.add_argument("--draw", action="store_true", help="only write the page again")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - BENCHES.keys())
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}")
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if not options.draw:
        os.environ.update(environment())
        subprocess.run([sys.executable, "-m", "engine.models.fetch", DEFAULT], cwd=ROOT, check=True, stdout=sys.stderr)
        about = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), **machine()}
        for name in options.names or BENCHES:
            print(f"== bench.{name}", file=sys.stderr, flush=True)
            found[name] = {**about, **measure(name)}
            write(RESULTS, {key: found[key] for key in BENCHES if key in found})
    draw(found)


if __name__ == "__main__":
    main()
