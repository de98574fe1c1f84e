"""The first page in a real Chromium: the studio against an empty Gradio app, in turn, in one environment.

    python bench/page.py [--runs 7]

Both servers stand; each round opens a fresh browser context (nothing cached) for each of them and presses the first
button as soon as it can be seen. Three times from the navigation on: `seen`, the heading and a button that takes a
press; `built`, the page as Gradio has drawn it; `answered`, what the press asked for (the next step of the path; in the
empty app, whose only parts are a heading and a button, a line of text). Prints one JSON object: milliseconds of each
run, their medians, the median of the rounds' ratios (the target for `seen`: at most 1.3), and what the page is made of:
bytes of its config, components, callbacks, their triggers and load events.
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
KINDS = ("seen", "built", "answered")
QUIET = 1.0
"""Seconds before each round, so that what the page before left to do is not part of this one."""
EMPTY = """
import sys, gradio as gr
with gr.Blocks() as app:
    gr.HTML('<h2 id="head">Ready</h2>')
    said = gr.HTML("", elem_id="said")
    gr.Button("Go", elem_id="go").click(lambda: '<p id="answer">Here</p>', None, said)
app.launch(server_port=int(sys.argv[1]), quiet=True)
"""
# What is looked for: the heading, the first button, the page itself as Gradio has drawn it, the answer to the press.
PARTS = {
    "empty": ("#head", "#go", "#go", "#answer"),
    "studio": ("h2.page-title", "[data-goal=chat]", "#start-board [data-goal=chat]", "#start-board .gd-steps"),
}
# Looks at every frame, from the first on, and keeps when each was first there.
WATCH = """([head, button, built, answer]) => {
  const shown = (one) => one.getClientRects().length && !one.disabled;
  const there = (name) => [...document.querySelectorAll(name)].find(shown);
  const times = (window.times = {});
  const look = () => {
    const now = performance.now();
    const first = !times.seen && there(head) && there(button);
    if (first) {
      times.seen = now;
      first.click();
    }
    if (there(built) || times.answered) times.built ??= now;
    if (there(answer)) times.answered = times.answered ?? now;
    if (!times.answered || !times.built) requestAnimationFrame(look);
  };
  look();
}"""


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
    """Milliseconds from the navigation on until each of the three was there."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    try:
        page = context.new_page()
        start = f"({WATCH})({json.dumps(PARTS[name])})"
        page.add_init_script(f"document.addEventListener('readystatechange', () => {{ {start} }}, {{once: true}})")
        page.goto(address, wait_until="commit")
        page.wait_for_function("() => window.times?.answered && window.times.built", timeout=120_000)
        return {kind: round(when) for kind, when in page.evaluate("window.times").items()}
    finally:
        context.close()


def made_of(address: str) -> dict[str, int]:
    """What a page is made of."""
    raw = urllib.request.urlopen(f"{address}/config", timeout=30).read()
    config = json.loads(raw)
    triggers = [event for call in config["dependencies"] for _, event in call["targets"]]
    return {
        "config_bytes": len(raw),
        "page_bytes": len(urllib.request.urlopen(address, timeout=30).read()),
        "components": len(config["components"]),
        "callbacks": len(config["dependencies"]),
        "triggers": len(triggers),
        "load_events": triggers.count("load"),
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
                    time.sleep(QUIET)
                    taken = opened(browser, name, addresses[name])
                    if number:  # the first of each warms the server and the disk's cache
                        found[name].append(taken)
            browser.close()
            parts = {name: made_of(address) for name, address in addresses.items()}
    kinds = {kind: {name: [row[kind] for row in rows] for name, rows in found.items()} for kind in KINDS}
    ratios = {kind: [a / b for a, b in zip(by["studio"], by["empty"], strict=True)] for kind, by in kinds.items()}
    print(
        json.dumps(
            {
                "ratio": {kind: round(statistics.median(values), 3) for kind, values in ratios.items()},
                "median": {kind: {n: statistics.median(v) for n, v in by.items()} for kind, by in kinds.items()},
                "milliseconds": kinds,
                "made_of": parts,
                "cpus": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
