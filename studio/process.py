"""Processes by pid *and* start time, so that a pid that the system gave to a stranger is never signalled."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import time
from pathlib import Path

import psutil

from engine import threads
from engine.paths import REPOSITORY

_SLACK = 1.0
"""Seconds by which two readings of one process's start time may differ."""


def environment(home: Path, count: int | None = None) -> dict[str, str]:
    """What a child that works for a home folder starts with; `count` is its number of CPU threads."""
    return {
        **os.environ,
        **threads.worker_environment(count),
        "STUDIO_HOME": str(home),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")])),
    }


def machine() -> str:
    """This machine in a few words that stay the same until it changes: what a measured time holds for."""
    memory = round(psutil.virtual_memory().total / 2**30)
    return f"{platform.system()} {platform.machine()}, {threads.available_cores()} cores, {memory} GiB"


def started_at(pid: int) -> float | None:
    """When the process began (seconds since the epoch); None when there is no such process."""
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def alive(pid: int | None, started: float | None) -> bool:
    """Whether this very process still runs. A zombie does not."""
    if not pid or started is None:
        return False
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < _SLACK
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def members(pid: int | None, started: float | None) -> list[psutil.Process]:
    """The live processes of the session that `pid` leads or led; empty if `pid` now belongs to someone else."""
    if not pid or started is None:
        return []
    now = started_at(pid)
    if now is not None and abs(now - started) >= _SLACK:
        return []
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.pid == pid or (hasattr(os, "getsid") and os.getsid(process.pid) == pid):
                found.append(process)
    return found


def send(pid: int | None, started: float | None, number: signal.Signals) -> bool:
    """Send a signal to every process of the recorded session; True when there was one."""
    found = members(pid, started)
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)
    return bool(found)


def end(pid: int | None, started: float | None, grace: float = 10.0) -> None:
    """TERM, then after `grace` seconds KILL, to the whole recorded session."""
    if not send(pid, started, signal.SIGTERM):
        return
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline:
        if not members(pid, started):
            return
        time.sleep(0.1)
    send(pid, started, signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)


def tail(log: Path, limit: int = 20_000) -> str:
    """The end of what a process wrote, at most `limit` bytes of it; nothing where there is no such file."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - limit))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
