"""The live page of a run: what a redraw takes, how old what it shows is, and what looking costs the training.

    python -m bench.live [--steps 100 10000 100000] [--page] [--cost] [--json FILE]

Always: the server's part of a redraw (new events read, the doctor, all charts) after one more step, and the first look
at a run, by number of steps; beside it what reading every step anew takes. Milliseconds of the processor, which other
programs do not lengthen much. With `--page`: from a worker's write to the step on the page, in a Chromium. With
`--cost`: what a page that is open takes from each step of a real run of the toy, once with its browser elsewhere, so
that only what the server does for the page falls on the training (its questions are asked as the page's script asks
them), and once with the browser on this machine too, drawing by software. That is less than a machine's speed changes
from one second to the next, so it is looked for where it must be: in the moments after each question, against those
before and behind them (`lost`). What a browser does at other times shows in the milliseconds of the processor that it
takes in a second, and, more coarsely, in the steps with the page open over those with it closed, in turn; there the
browser is stopped by a signal and goes on later.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil

from bench.measuring import ROOT, machine, write
from engine.train.job import DataSpec, JobSpec, TrainingSpec
from studio import curves, doctor, live, states, words
from studio.context import Studio
from studio.datasets import Datasets
from studio.store import Store

CHROMIUM = os.environ.get("STUDIO_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
EVERY = 1.35
"""Seconds between two questions of the page's script (studio/assets/scripts/live.js)."""
LOOKS = ("closed", "elsewhere", "here")
"""Where a run's page is open."""
SEEN = """() => {
  window.seen = {};
  const look = () => {
    const text = document.querySelector('#live-head .st-facts b')?.innerText.replaceAll(',', '');
    if (text && !(text in window.seen)) window.seen[text] = performance.timeOrigin + performance.now();
  };
  new MutationObserver(look).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""


ASKED = """(() => {
  window.asked = [];
  const fetched = window.fetch;
  window.fetch = (...given) => {
    if (String(given[0]?.url ?? given[0]).includes("component_server")) window.asked.push(Date.now());
    return fetched(...given);
  };
})()"""
"""Notes when the page asks."""


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


def answers(address: str) -> bool:
    """Whether somebody serves there."""
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def serving(home: Path) -> Iterator[str]:
    """`python app.py` over this home; its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    address = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "STUDIO_HOME": str(home), "GRADIO_ANALYTICS_ENABLED": "False"}
    command = [sys.executable, "app.py", "--port", str(port), "--no-browser"]
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not answers(address):
            if child.poll() is not None:
                raise SystemExit(f"app.py ended with status {child.returncode} before it served")
            time.sleep(1)
        yield address
    finally:
        child.terminate()
        child.wait(timeout=30)


@contextmanager
def opened() -> Iterator[Any]:
    """A page in Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        yield page
        browser.close()


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


class Elsewhere:
    """A page of a run whose browser is on another machine: asks what the page's script asks, as often.

    It is asked for with as little work as can be, since that work falls on the training too.
    """

    def __init__(self, address: str, studio: Studio, run: str) -> None:
        self.address, self.studio, self.run = address, studio, run
        self.ended = threading.Event()
        config = json.loads(urllib.request.urlopen(f"{address}/config", timeout=60).read())
        (head,) = (item["id"] for item in config["components"] if item["props"].get("elem_id") == "live-head")
        question = {"run": run, "looks": "", "seen": "", "have": "", "language": "en", "log": False, "smoothing": 0.6}
        named = {"component_id": head, "fn_name": "live_news", "session_hash": f"bench{time.time_ns()}"}
        self.asked = {"data": question, **named}

    def __enter__(self) -> Elsewhere:
        self.drawn = 0
        self.moments: list[float] = []
        self.thread = threading.Thread(target=self._ask)
        self.thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.ended.set()
        self.thread.join(30)
        if not self.drawn:
            raise SystemExit("the server had nothing new for the page: this measures nothing")

    def _ask(self) -> None:
        connection = http.client.HTTPConnection(self.address.partition("//")[2], timeout=60)
        headers = {"content-type": "application/json", "x-gradio-user": "app"}
        while not self.ended.wait(EVERY):
            self.moments.append(time.time())
            connection.request("POST", "/gradio_api/component_server/", json.dumps(self.asked), headers)
            body = connection.getresponse().read()
            if b'"stale":true' in body:
                self.asked["data"]["looks"] = self._looks()
                continue
            for name in ("seen", "have"):
                for value in re.findall(rb'"%s":"([^"]*)"' % name.encode(), body):
                    self.asked["data"][name] = value.decode()
            self.drawn += b'"head":' in body
        connection.close()

    def _looks(self) -> str:
        """What the page shows besides numbers and lines; Gradio would draw it now."""
        row = self.studio.store.run(self.run)
        found = curves.of_run(self.studio.store, self.run)
        page: Any = SimpleNamespace(studio=self.studio)
        return live.looks(row, found, live.steady(page, row, found, doctor.findings(found, row)))


def spent(pid: int) -> float:
    """Seconds of the processor that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def browser() -> list[psutil.Process]:
    """The processes of the Chromium that this one has opened."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "chrom" in Path(child.exe()).name:
                found.append(child)
        except psutil.Error:
            continue
    return found


def cost(rounds: int = 6, seconds: float = 27.0, settling: float = 1.5) -> dict[str, Any]:
    """What a real run's steps lose with its live page open elsewhere and open on this machine."""
    with tempfile.TemporaryDirectory(prefix="bench-live-") as folder:
        home = Path(folder)
        studio = Studio.open(home)
        kept = Datasets(studio.store, home).bring_in(ROOT / "examples" / "lighthouse.jsonl")
        data = DataSpec(path=studio.store.dataset(str(kept.id))["path"])
        training = TrainingSpec(
            max_steps=100_000, batch_size=8, max_length=128, eval_every=10**6, checkpoint_every=10**6
        )
        run = studio.jobs.submit(JobSpec(model="tiny-llama", data=data, training=training), kept.id)
        spans: list[Span] = []
        with serving(home) as address, opened() as page:
            server = next(int(n.name) for n in Path("/proc").iterdir() if n.name.isdigit() and _serves(n, address))
            while not studio.store.newest(run, "step"):
                time.sleep(1)
            page.add_init_script(ASKED)
            page.goto(f"{address}/?run={run}")
            page.locator("#live-curves polyline.thin").first.wait_for()
            # What loading leaves behind, a browser tidies up within half a minute.
            page.wait_for_timeout(45_000)
            drawing = browser()
            try:
                for number in range(rounds):
                    for look in (*LOOKS, *reversed(LOOKS)):
                        for part in drawing:
                            (part.resume if look == "here" else part.suspend)()
                        with Elsewhere(address, studio, run) if look == "elsewhere" else nullcontext() as elsewhere:
                            time.sleep(settling)
                            started, before = time.time(), [spent(server), sum(spent(part.pid) for part in drawing)]
                            time.sleep(seconds if look != "closed" else seconds / 2)
                            span = Span(look, started, time.time())
                            span.server = spent(server) - before[0]
                            span.browser = sum(spent(part.pid) for part in drawing) - before[1]
                        span.questions = elsewhere.moments if elsewhere else []
                        spans.append(span)
                    print(f"  {number + 1} of {rounds} rounds", flush=True)
            finally:
                for part in drawing:
                    part.resume()
            here = [moment / 1000 for moment in page.evaluate("window.asked")]
            for span in spans:
                if span.look == "here":
                    span.questions = here
            pid = studio.store.run(run)["pid"]
            studio.jobs.stop(run)
            for _ in range(60):
                if studio.store.run(run)["state"] == states.STOPPED:
                    break
                time.sleep(1)
            else:
                os.kill(pid, signal.SIGTERM)
        moments = [event["time"] for event in studio.store.since(run, 0, ["step"])]
        studio.close()
    found: dict[str, Any] = {"rounds": rounds, "step_ms": round(1000 * float(np.median(np.diff(moments))), 1)}
    for look in LOOKS[1:]:
        of_look = [span for span in spans if span.look == look]
        losses = [loss for span in of_look for loss in lost(moments, span)]
        open_and_closed = zip(of_look, (span for span in spans if span.look == "closed"), strict=True)
        ratios = [one.step(moments) / other.step(moments) for one, other in open_and_closed]
        found[look] = {
            "questions": len(losses),
            "lost": _mean([loss / EVERY for loss in losses]),
            "open_over_closed": _mean(ratios),
        }
    for name in ("server", "browser"):
        found[f"{name}_ms_per_s"] = {
            look: round(
                1000 * statistics.mean(getattr(span, name) / span.seconds for span in spans if span.look == look), 1
            )
            for look in LOOKS
        }
    return found | {"load_by_core": round(os.getloadavg()[0] / (os.cpu_count() or 1), 1)}


@dataclass
class Span:
    """A stretch of a run with its page closed or open.

    Attributes:
        look: one of `LOOKS`.
        start, end: its moments.
        server, browser: seconds of the processor that they took in it.
        questions: moments of the page's questions; those outside of the stretch do not count.
    """

    look: str
    start: float
    end: float
    server: float = 0.0
    browser: float = 0.0
    questions: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def step(self, moments: list[float]) -> float:
        """Seconds a step."""
        inside = [moment for moment in moments if self.start <= moment <= self.end]
        return (inside[-1] - inside[0]) / (len(inside) - 1)


def lost(moments: list[float], span: Span, before: float = 0.1, width: float = 0.6) -> list[float]:
    """Seconds that the training lost to each question, by the steps it came on with around it.

    A question's work falls into the `width` seconds from `before` it on, whose share of a step that has begun counts.
    They are held against as many on each side, which are free of the questions next to it, so that a speed that rises
    or falls cancels out.
    """
    step, numbers, found = span.step(moments), list(range(len(moments))), []
    for question in span.questions:
        edges = [question - before + width * at for at in (-1, 0, 1, 2)]
        if span.start <= edges[0] and edges[-1] <= span.end:
            earlier, during, later = np.diff(np.interp(edges, moments, numbers))
            found.append(float(step * ((earlier + later) / 2 - during)))
    return found


def _mean(values: list[float]) -> dict[str, Any]:
    """The mean and its 95 % interval, without the twentieth on each side that other programs have spoilt."""
    cut = len(values) // 20
    kept = sorted(values)[cut : len(values) - cut]
    mean = statistics.mean(kept)
    # Of a trimmed mean: the spread is that of the values with their ends drawn in (Yuen 1974).
    drawn_in = [min(max(value, kept[0]), kept[-1]) for value in values]
    error = statistics.stdev(drawn_in) * math.sqrt(len(values)) / len(kept)
    return {"mean": round(mean, 4), "interval": [round(mean - 2 * error, 4), round(mean + 2 * error, 4)]}


def _serves(process: Path, address: str) -> bool:
    """Whether a process is the studio at an address."""
    try:
        said = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"app.py" in said and address.rpartition(":")[2].encode() in said


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
