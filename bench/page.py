"""The first page in a real Chromium: the studio against an empty Gradio app, in turn, in one environment.

    python bench/page.py [--runs 7]

Both servers stand; each round opens a fresh browser context (nothing cached) for each of them. For the studio the clock
ends when the Start page's heading is seen and its first button answers to a click; for the empty app, when the line of
text that is its only part is seen. Prints one JSON object: milliseconds of each run, their medians, the median of the
rounds' ratios (the target: at most 1.3), and what the page is made of: bytes of its config, components, load events.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from startup import free_port

ROOT = Path(__file__).resolve().parent.parent
EMPTY = (
    "import sys, gradio as gr\nwith gr.Blocks() as app:\n    gr.HTML('<h2 id=\"ready\">Ready</h2>')\n"
    "app.launch(server_port=int(sys.argv[1]), quiet=True)"
)
SEEN = {
    "empty": "() => document.querySelector('#ready')?.getClientRects().length > 0",
    "studio": "() => { const b = document.querySelector('#start-ready, #start-toy');"
    " return Boolean(b && b.getClientRects().length && !b.disabled); }",
}
PAINTED = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0"


@contextmanager
def serving(argv: list[str], port: int, home: str) -> Iterator[str]:
    """A server until the end of the block."""
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "STUDIO_HOME": home}
    child = subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            if child.poll() is not None:
                raise SystemExit(f"{argv} ended with status {child.returncode} before it served")
            try:
                urllib.request.urlopen(address, timeout=5).read()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        child.terminate()
        child.wait(timeout=30)


def opened(browser: Any, name: str, address: str) -> dict[str, float]:
    """Milliseconds from the navigation to a page that can be used, and to its first paint."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    try:
        page = context.new_page()
        page.goto(address, wait_until="commit")
        page.wait_for_function(SEEN[name], timeout=120_000, polling=20)
        taken = page.evaluate("performance.now()")
        return {"ready": round(taken), "painted": round(page.evaluate(PAINTED))}
    finally:
        context.close()


def made_of(address: str) -> dict[str, int]:
    """What a page is made of."""
    raw = urllib.request.urlopen(f"{address}/config", timeout=30).read()
    config = json.loads(raw)
    loads = sum(1 for call in config["dependencies"] if any(event == "load" for _, event in call["targets"]))
    return {
        "config_bytes": len(raw),
        "page_bytes": len(urllib.request.urlopen(address, timeout=30).read()),
        "components": len(config["components"]),
        "callbacks": len(config["dependencies"]),
        "load_events": loads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("STUDIO_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    ports = {"studio": free_port(), "empty": free_port()}
    found: dict[str, list[dict[str, float]]] = {"studio": [], "empty": []}
    with tempfile.TemporaryDirectory() as home:
        studio = [sys.executable, "app.py", "--port", str(ports["studio"]), "--no-browser"]
        empty = [sys.executable, "-c", EMPTY, str(ports["empty"])]
        with (
            serving(studio, ports["studio"], home) as first,
            serving(empty, ports["empty"], home) as second,
            sync_playwright() as playwright,
        ):
            addresses = {"studio": first, "empty": second}
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            for number in range(runs + 1):
                for name in found if number % 2 else reversed(found):
                    taken = opened(browser, name, addresses[name])
                    if number:  # the first of each warms the server and the disk's cache
                        found[name].append(taken)
            browser.close()
            parts = {name: made_of(address) for name, address in addresses.items()}
    ready = {name: [row["ready"] for row in rows] for name, rows in found.items()}
    ratios = [a / b for a, b in zip(ready["studio"], ready["empty"], strict=True)]
    print(
        json.dumps(
            {
                "milliseconds": ready,
                "median": {name: statistics.median(values) for name, values in ready.items()},
                "painted": {name: statistics.median(row["painted"] for row in rows) for name, rows in found.items()},
                "ratio": round(statistics.median(ratios), 3),
                "made_of": parts,
                "cpus": os.cpu_count(),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
