"""The live page of a run: what a redraw takes, how old what it shows is, and what looking costs the training.

    python -m bench.live [--steps 100 10000 100000] [--page] [--cost] [--json FILE]

Always: the server's part of a redraw (new events read, the doctor, all charts) after one more step, and the first look
at a run, by number of steps; beside it what reading every step anew takes. Milliseconds of the processor, which other
programs do not lengthen much. With `--page`: from a worker's write to the step on the page, in a Chromium. With
`--cost`: what a page that is open takes from each step of a real run of the toy, once with its browser elsewhere, so
that only what the server does for the page falls on the training (the stream of news is listened to as the page's
script does), and once with the browser on this machine too, drawing by software. That is less than a machine's speed
changes from one second to the next, so it is looked for where it must be: in the moments around each of the news,
against those before and behind them (`lost`). What a browser does at other times shows in the milliseconds of the
processor that it takes in a second, and, more coarsely, in the steps with the page open over those with it closed, in
turn; there the browser is stopped by a signal and goes on later. No driver is connected to it meanwhile: what one asks
of a browser is work too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.live_cost import cost
from bench.measuring import machine, write
from bench.pages import opened, serving
from engine.train.job import DataSpec, JobSpec
from studio import curves, doctor, live, states, words
from studio.store import Store

SEEN = """() => {
  window.seen = {};
  const look = () => {
    const text = document.querySelector('#live-head .st-facts b')?.innerText.replaceAll(',', '');
    if (text && !(text in window.seen)) window.seen[text] = performance.timeOrigin + performance.now();
  };
  new MutationObserver(look).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""


def fill(store: Store, run: str, first: int, last: int) -> None:
    """Steps as a worker would have left them, and an evaluation at each twentieth."""
    drawn, rows = random.Random(first), []
    for step in range(first, last + 1):
        moving = {"loss": 1 + 3 / step + drawn.random() / 5, "lr": 1e-4, "grad_norm": drawn.random(), "memory": 10**9}
        rows.append((run, "step", step, float(step), json.dumps({**moving, "tokens_per_s": 900.0, "eta_s": 60.0})))
        if step % 20 == 0:
            rows.append((run, "eval", step, float(step), json.dumps({"loss": 1 + 3 / step})))
    with store.exclusive() as db:
        db.conn.executemany("INSERT INTO events (run_id, type, step, time, data) VALUES (?, ?, ?, ?, ?)", rows)
        db.conn.execute("UPDATE runs SET step = ?, total_steps = ? WHERE id = ?", [last, 2 * last, run])


def milliseconds(work: Callable[[], Any], times: int) -> float:
    """The median of so many calls."""
    taken = []
    for _ in range(times):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return round(1000 * statistics.median(taken), 1)


def redraw(store: Store, run: str) -> int:
    """All that the server does for one redraw; returns its bytes."""
    row = store.run(run)
    found = curves.of_run(store, run)
    parts = (
        words.run_head(row, live.newest(found)),
        doctor.box(doctor.findings(found, row), row),
        live.curves_html(found, row, False, 0.6, hover=False),
    )
    return sum(len(part) for part in parts)


def redraws(steps: int) -> dict[str, Any]:
    """One row: a run of so many steps."""
    with tempfile.TemporaryDirectory(prefix="bench-live-") as folder:
        store = Store(Path(folder))
        run = store.add_run(JobSpec(model="tiny-llama", data=DataSpec(path="rows.csv")))
        store.add_event(run, {"type": "start", "total_steps": 2 * steps, "train_rows": 10 * steps})
        store.update_run(run, state=states.RUNNING)
        fill(store, run, 1, steps)
        first = milliseconds(lambda: redraw(store, run), 1)
        size, number = 0, steps

        def again() -> None:
            nonlocal size, number
            number += 1
            store.add_event(run, {"type": "step", "step": number, "loss": 1.0, "lr": 1e-4, "grad_norm": 1.0})
            size = redraw(store, run)

        again_ms = milliseconds(again, 15)
        anew = milliseconds(lambda: (store.by_step(run, "step"), store.by_step(run, "eval")), 3)
        store.close()
    return {"steps": steps, "first_ms": first, "redraw_ms": again_ms, "bytes": size, "reading_all_ms": anew}


def lag(count: int = 60) -> dict[str, Any]:
    """Seconds from the write of a step to its number on the page."""
    with tempfile.TemporaryDirectory(prefix="bench-live-") as folder:
        home = Path(folder)
        store = Store(home)
        run = store.add_run(JobSpec(model="tiny-llama", data=DataSpec(path="rows.csv")))
        store.add_event(run, {"type": "start", "total_steps": 2000, "train_rows": 1000})
        fill(store, run, 1, 1000)
        # A process that lives, so that the queue does not take the run for lost: this one.
        from studio import process

        mine = {"pid": os.getpid(), "pid_started": process.started_at(os.getpid())}
        store.update_run(run, state=states.RUNNING, started=time.time(), **mine)
        written, waits = {}, random.Random(0)
        with serving(home) as address, opened() as page:
            page.goto(f"{address}/?run={run}")
            page.locator(f"#live-head .run-head[data-run={run}]").wait_for()
            page.evaluate(SEEN)
            for step in range(1001, 1001 + count):
                page.wait_for_timeout(1000 * waits.uniform(1.5, 3.0))
                store.add_event(run, {"type": "step", "step": step, "loss": 1.0, "lr": 1e-4, "grad_norm": 1.0})
                written[step] = time.time()
            page.wait_for_timeout(5000)
            seen = {int(step): moment / 1000 for step, moment in page.evaluate("window.seen").items()}
            store.update_run(run, state=states.STOPPED, ended=time.time())
        store.close()
    # A step that was overtaken by the next before a redraw was never shown by itself.
    taken = sorted(seen[step] - moment for step, moment in written.items() if step in seen)
    return {
        "writes": count,
        "shown": len(taken),
        "median_s": round(statistics.median(taken), 2),
        "p95_s": round(taken[max(0, round(0.95 * len(taken)) - 1)], 2),
        "most_s": round(taken[-1], 2),
        "load_by_core": round(os.getloadavg()[0] / (os.cpu_count() or 1), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="*", default=[100, 10_000, 100_000])
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"redraws": []}
    for steps in arguments.steps:
        row = redraws(steps)
        found["redraws"].append(row)
        print(
            f"{row['steps']:>8,} steps: first look {row['first_ms']:8,.1f} ms, redraw {row['redraw_ms']:6.1f} ms, "
            f"{row['bytes'] / 1000:5.0f} kB (reading all {row['reading_all_ms']:,.1f} ms)",
            flush=True,
        )
    if arguments.page:
        found["lag"] = lag()
        print(f"from a write to the page: {found['lag']}", flush=True)
    if arguments.cost:
        found["cost"] = cost()
        print(f"what an open page takes from the training: {found['cost']}", flush=True)
    if arguments.json:
        write(arguments.json, found | {"machine": machine()})


if __name__ == "__main__":
    main()
