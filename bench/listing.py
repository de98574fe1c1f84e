"""How long the lists of runs and adapters take in a home of many: what the server answers, and what a browser shows.

    python -m bench.listing [--runs 50] [--adapters 1000] [--steps 1000] [--repeat 5]

Makes a home with so many finished runs (each with its events) and imported adapters, starts `python app.py` on it, and
prints one JSON object. `first` is the first answer after the start, `median` that of the repeats, in seconds; the
target is under 1 s each. `page_*` are the callbacks that draw the two pages, asked over HTTP as a page asks them;
`browser_*` is from choosing the tab to its rows in sight, where there is a Chromium (or STUDIO_CHROMIUM names one).
`load` is the machine's at the end: on a machine that others use too, the figures grow with it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.measuring import machine
from bench.pages import ARGUMENTS, CHROMIUM, serving
from engine.train.job import DataSpec, JobSpec
from studio import states
from studio.context import Studio

COLOUR = "#0072B2"
ROWS = {"runs": "data-line=", "adapters": "ad-card"}
"""What an answer that lists something has in it."""


def fill(home: Path, runs: int, adapters: int, steps: int) -> None:
    """Runs that ended, with a loss for each step, and adapters as their table has them; to list them opens no file."""
    spec = JobSpec(model="tiny-llama", data=DataSpec(path="rows.jsonl"), adapter={"method": "lora", "r": 8})
    with contextlib.closing(Studio.open(home)) as studio:
        for number in range(runs):
            run, began = studio.jobs.submit(spec), time.time() - 3600.0 * (runs - number)
            studio.store.update_run(
                run, state=states.DONE, step=steps, total_steps=steps, started=began, ended=began + steps, loss=1.0
            )
            events = [
                (run, "step", step, began + step, json.dumps(step_event(step, number))) for step in range(1, steps + 1)
            ]
            with studio.store.exclusive() as db:
                db.conn.executemany(
                    "INSERT INTO events (run_id, type, step, time, data) VALUES (?, ?, ?, ?, ?)", events
                )
        insert = (
            "INSERT INTO adapters (id, name, origin, base, task, method, rank, targets, parameters, bytes, colour,"
            " created) VALUES (?, ?, 'imported', 'tiny-llama', 'causal_lm', 'lora', 8, 'q_proj, v_proj', 30000, 120000,"
            " ?, ?)"
        )
        with studio.store.exclusive() as db:
            db.conn.executemany(
                insert, [(f"ad-{number:08x}", f"adapter {number}", COLOUR, float(number)) for number in range(adapters)]
            )


def step_event(step: int, number: int) -> dict[str, float]:
    """What a run says at each step."""
    loss = 1.0 + 2 * math.exp(-step / 200) + 0.001 * number
    return {
        "loss": loss,
        "lr": 2e-4,
        "grad_norm": 1.0,
        "tokens": 512,
        "tokens_per_s": 900.0,
        "epoch": 0.1,
        "eta_s": 9.0,
    }


def timed(ask: Callable[[], Any], repeat: int) -> dict[str, float]:
    """Seconds of the first call and the median of as many more as asked."""
    taken = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        ask()
        taken.append(time.perf_counter() - began)
    return {"first": round(taken[0], 3), "median": round(statistics.median(taken[1:]), 3)}


def callback(config: dict[str, Any], tab: str) -> dict[str, Any]:
    """The dependency by which choosing a tab draws it: the one with the most outputs."""
    ids = {part["id"] for part in config["components"] if part["props"].get("elem_id") == f"tab-{tab}"}
    found = [it for it in config["dependencies"] if any(target in ids for target, _ in map(tuple, it["targets"]))]
    return max(found, key=lambda it: len(it["outputs"]))


def ask_page(address: str, config: dict[str, Any], tab: str) -> Callable[[], Any]:
    """A call that draws a tab as a page that has just been opened asks for it."""
    chosen = callback(config, tab)
    values = {part["id"]: part["props"].get("value") for part in config["components"]}
    kinds = {part["id"]: part["type"] for part in config["components"]}
    inputs = [None if kinds[it] == "state" else values[it] for it in chosen["inputs"]]
    session = f"bench-{tab}"

    def ask() -> None:
        asked = {"data": inputs, "fn_index": chosen["id"], "session_hash": session}
        body = json.dumps(asked).encode()
        head = {"Content-Type": "application/json"}
        url = f"{address}/gradio_api/queue/join"
        urllib.request.urlopen(urllib.request.Request(url, body, head), timeout=60).read()
        with urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash={session}", timeout=60) as stream:
            for line in stream:
                told = json.loads(line[6:]) if line.startswith(b"data: ") else {}
                if told.get("msg") == "process_completed":
                    if not told["success"] or ROWS[tab] not in line.decode():
                        raise SystemExit(f"The tab {tab} answered {told}.")
                    return

    return ask


def seen(address: str, repeat: int) -> dict[str, Any]:
    """Seconds from choosing a tab to its rows in a browser; empty where there is none."""
    if CHROMIUM is None:
        return {}
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        page.goto(address)
        page.locator("#start-toy").wait_for()
        places = {"runs": "#runs-table tbody tr", "adapters": "#adapters-cards .ad-card"}

        def choose(tab: str) -> None:
            page.click("#tab-start-button")
            page.locator("#start-toy").wait_for()
            page.click(f"#tab-{tab}-button")
            page.locator(places[tab]).first.wait_for()

        found = {f"browser_{tab}": timed(lambda tab=tab: choose(tab), repeat) for tab in places}
        browser.close()
    return found


def main() -> None:
    """Fill a home, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="listing-") as folder:
        home = Path(folder)
        fill(home, asked.runs, asked.adapters, asked.steps)
        with serving(home) as address:
            config = json.loads(urllib.request.urlopen(f"{address}/config", timeout=60).read())
            found: dict[str, Any] = {
                f"page_{tab}": timed(ask_page(address, config, tab), asked.repeat) for tab in ("runs", "adapters")
            }
            found |= seen(address, asked.repeat)
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    print(json.dumps({**vars(asked), "seconds": found, "load": load, "machine": machine()}, indent=2))


if __name__ == "__main__":
    main()
