"""Starts the studio as a user does, `python app.py`, in a home of its own."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.paths import REPOSITORY


@dataclass
class Running:
    """A serving studio."""

    address: str
    process: subprocess.Popen[bytes]
    log: Path
    seconds: float


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(home: Path, *arguments: str, **environment: str) -> Running:
    """Start a studio and wait for its first page."""
    port, log = free_port(), home / "server.log"
    began = time.monotonic()
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "app.py"), "--no-browser", "--port", str(port), *arguments],
            env={**os.environ, "STUDIO_HOME": str(home), "PYTHONPATH": str(REPOSITORY), **environment},
            stdout=stream,
            stderr=stream,
        )
    address = f"http://127.0.0.1:{port}"
    while time.monotonic() - began < 240:
        assert process.poll() is None, log.read_text()
        try:
            if urllib.request.urlopen(address, timeout=2).status == 200:
                return Running(address, process, log, time.monotonic() - began)
        except OSError:
            time.sleep(0.1)
    raise AssertionError(log.read_text())


@contextmanager
def serving(home: Path) -> Iterator[Running]:
    """A studio that ends with the block, and must not have written a traceback."""
    running = start(home)
    try:
        yield running
    finally:
        running.process.terminate()
        running.process.wait(20)
    # Gradio itself logs what it refuses and visitors who leave, and each of its requests passes through our middleware
    # and our page's `process_api`; a traceback through any other function of our files is a fault.
    ours = "|".join(re.escape(str(REPOSITORY / folder)) for folder in ("studio", "engine"))
    frame = re.compile(rf'File "(?:{ours})/[^"]+", line \d+, in (?!__call__$|answer$|process_api$)', re.MULTILINE)
    faults = [part for part in running.log.read_text().split("Traceback")[1:] if frame.search(part)]
    assert not faults, faults[0][-3000:]
