"""What an open page of a run takes from the training on the same machine: see `bench.live`."""

from __future__ import annotations

import http.client
import math
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.measuring import ROOT
from bench.pages import ARGUMENTS, CHROMIUM, answers, serving
from bench.startup import free_port
from engine.train.job import DataSpec, JobSpec, TrainingSpec
from studio import curves, doctor, live, live_stream, states
from studio.context import Studio
from studio.datasets import Datasets

LOOKS = ("closed", "elsewhere", "here")
"""Where a run's page is open."""
TOLD = """(() => {
  window.told = [];
  const Source = window.EventSource;
  window.EventSource = class extends Source {
    constructor(...given) {
      super(...given);
      this.addEventListener("message", () => window.told.push(Date.now()));
    }
  };
})()"""
"""Notes when the page is told news."""


class Elsewhere:
    """A page of a run whose browser is on another machine: listens to what the page's script listens to.

    With as little work as can be, since that work falls on the training too.
    """

    def __init__(self, address: str, studio: Studio, run: str) -> None:
        self.address, self.studio, self.run = address, studio, run
        self.ended = threading.Event()

    def __enter__(self) -> Elsewhere:
        self.drawn = 0
        self.moments: list[float] = []
        self._listen()
        self.thread = threading.Thread(target=self._hear)
        self.thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.ended.set()
        self.socket.shutdown(socket.SHUT_RDWR)
        self.thread.join(30)
        if not self.drawn:
            raise SystemExit("the server had nothing new for the page: this measures nothing")

    def _listen(self) -> None:
        asked = {"run": self.run, "looks": self._looks(), "language": "en", "smoothing": 0.6}
        connection = http.client.HTTPConnection(self.address.partition("//")[2], timeout=60)
        connection.request("GET", f"{live_stream.PATH}?{urllib.parse.urlencode(asked)}")
        self.socket, self.answer = connection.sock, connection.getresponse()

    def _hear(self) -> None:
        while not self.ended.is_set():
            line = self.answer.readline()
            if line.startswith(b"data:"):
                self.moments.append(time.time())
                self.drawn += b'"head":' in line
            if (not line or b'"stale": true' in line) and not self.ended.is_set():
                self.socket.close()
                self._listen()

    def _looks(self) -> str:
        """What the page shows besides numbers and lines; Gradio would draw it now."""
        row = self.studio.store.run(self.run)
        found = curves.of_run(self.studio.store, self.run)
        return live.looks(row, found, live.steady(self.studio, row, found, doctor.findings(found, row)))


def spent(pid: int) -> float:
    """Seconds of the processor that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Apart:
    """A page in a Chromium that nothing drives after it has been opened.

    Attributes:
        parts: its processes.
    """

    def __init__(self, address: str, home: Path) -> None:
        self.port = free_port()
        command = [str(CHROMIUM), *ARGUMENTS, "--headless=new", "--window-size=1280,900"]
        command += [f"--remote-debugging-port={self.port}", f"--user-data-dir={home}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.parts: list[psutil.Process] = []
        try:
            while not answers(f"http://127.0.0.1:{self.port}/json/version"):
                time.sleep(0.2)
            with self._page() as page:
                page.add_init_script(TOLD)
                page.goto(address)
                page.locator("#live-curves polyline.thin").first.wait_for()
            # What loading leaves behind, a browser tidies up within half a minute.
            time.sleep(45)
            main = psutil.Process(self.process.pid)
            self.parts = [main, *main.children(recursive=True)]
        except BaseException:
            self.end()
            raise

    @contextmanager
    def _page(self) -> Iterator[Any]:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            page = playwright.chromium.connect_over_cdp(f"http://127.0.0.1:{self.port}").contexts[0].pages[0]
            page.set_default_timeout(120_000)
            yield page

    def told(self) -> list[float]:
        """The moments in which the page was told news."""
        with self._page() as page:
            return [moment / 1000 for moment in page.evaluate("window.told")]

    def spent(self) -> float:
        """Seconds of the processor that it has taken."""
        return sum(spent(part.pid) for part in self.parts)

    def end(self) -> None:
        """Close it."""
        for part in self.parts:
            with suppress(psutil.Error):
                part.resume()
        self.process.terminate()
        self.process.wait(timeout=30)


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
        with serving(home) as address:
            server = next(int(n.name) for n in Path("/proc").iterdir() if n.name.isdigit() and _serves(n, address))
            while not studio.store.newest(run, "step"):
                time.sleep(1)
            apart = Apart(f"{address}/?run={run}", home / "browser")
            try:
                for number in range(rounds):
                    for look in (*LOOKS, *reversed(LOOKS)):
                        for part in apart.parts:
                            (part.resume if look == "here" else part.suspend)()
                        with Elsewhere(address, studio, run) if look == "elsewhere" else nullcontext() as elsewhere:
                            time.sleep(settling)
                            started, before = time.time(), [spent(server), apart.spent()]
                            time.sleep(seconds if look != "closed" else seconds / 2)
                            span = Span(look, started, time.time())
                            span.server = spent(server) - before[0]
                            span.browser = apart.spent() - before[1]
                        span.news = elsewhere.moments if elsewhere else []
                        spans.append(span)
                    print(f"  {number + 1} of {rounds} rounds", flush=True)
                for part in apart.parts:
                    part.resume()
                here = apart.told()
            finally:
                apart.end()
            for span in spans:
                if span.look == "here":
                    span.news = here
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
            "news": len(losses),
            "lost": _mean([loss / live_stream.EVERY for loss in losses]),
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
        news: moments in which the page was told news; those outside of the stretch do not count.
    """

    look: str
    start: float
    end: float
    server: float = 0.0
    browser: float = 0.0
    news: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def step(self, moments: list[float]) -> float:
        """Seconds a step."""
        inside = [moment for moment in moments if self.start <= moment <= self.end]
        return (inside[-1] - inside[0]) / (len(inside) - 1)


def lost(moments: list[float], span: Span, before: float = 0.1, width: float = 0.6) -> list[float]:
    """Seconds that the training lost to each of the news, by the steps it came on with around it.

    The work for it falls into the `width` seconds from `before` it on, whose share of a step that has begun counts.
    They are held against as many on each side, which are free of the news next to it, so that a speed that rises
    or falls cancels out.
    """
    step, numbers, found = span.step(moments), list(range(len(moments))), []
    for moment in span.news:
        edges = [moment - before + width * at for at in (-1, 0, 1, 2)]
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
