"""From process start to the first page: the studio against an empty Gradio app, in turn, in one environment.

    python bench/startup.py [--runs 5]

Prints one JSON object: seconds of each run, medians, and the ratio of the medians (the studio's target: at most 1.3).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EMPTY = (
    "import sys, gradio as gr\nwith gr.Blocks() as app:\n    pass\napp.launch(server_port=int(sys.argv[1]), quiet=True)"
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def seconds_to_first_page(argv: list[str], port: int, home: str) -> float:
    """Start the process, ask for `/` until it answers 200, end the process."""
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "STUDIO_HOME": home}
    started = time.perf_counter()
    child = subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while time.perf_counter() - started < 120:
            if child.poll() is not None:
                raise SystemExit(f"{argv} ended with status {child.returncode} before it served")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    if answer.status == 200 and answer.read():
                        return time.perf_counter() - started
            except (urllib.error.URLError, OSError):
                time.sleep(0.02)
        raise SystemExit(f"{argv} did not serve within 120 s")
    finally:
        child.terminate()
        child.wait(timeout=30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    times: dict[str, list[float]] = {"studio": [], "empty": []}
    with tempfile.TemporaryDirectory() as home:
        for number in range(runs + 1):
            for name in times:
                port = free_port()
                command = (
                    ["app.py", "--port", str(port), "--no-browser"] if name == "studio" else ["-c", EMPTY, str(port)]
                )
                taken = seconds_to_first_page([sys.executable, *command], port, home)
                if number:  # the first of each warms the disk's cache
                    times[name].append(round(taken, 3))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        json.dumps(
            {
                "seconds": times,
                "median": medians,
                "ratio": round(medians["studio"] / medians["empty"], 3),
                "machine": {
                    "cpus": os.cpu_count(),
                    "processor": platform.processor(),
                    "python": platform.python_version(),
                },
            }
        )
    )


if __name__ == "__main__":
    main()
