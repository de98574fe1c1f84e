"""Child processes that fetch or convert, watched from the parent so that they can be shown, stopped and timed out.

A child prints one JSON object a line; other lines are kept as its last words, for the error message.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.paths import REPOSITORY

Progress = Callable[[str, float | None, str], None]
"""Called with the phase, the fraction done (0 to 1, None when unknown) and a sentence."""

_POLL_SECONDS = 0.2


class ChildFailed(Exception):
    """A child ended with an error, or made no progress for too long.

    Attributes:
        report: the JSON error that it printed, or an empty mapping.
    """

    def __init__(self, reason: str, report: Mapping[str, Any] | None = None) -> None:
        super().__init__(reason)
        self.report = dict(report or {})


def silent(phase: str, fraction: float | None, message: str) -> None:
    """The `Progress` of a caller who asked for none."""


def run(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    measure: Callable[[], int] = lambda: 0,
    on_message: Callable[[dict[str, Any]], None] = lambda message: None,
    on_size: Callable[[int], None] = lambda size: None,
    first_sign: float | None = None,
    stall: float | None = None,
    keep: Sequence[int] = (),
) -> None:
    """Run a child to its end. Whatever happens here, an exception of a callback included, the child ends too.

    Args:
        argv: the command, never through a shell.
        environment: added to this process's environment.
        measure: how far the child has come, for example the bytes that it has written.
        on_message: takes each JSON object that the child prints.
        on_size: takes each new highest `measure()`.
        first_sign: seconds until the first message or growth; later than that is a failure.
        stall: seconds between signs of progress.
        keep: file descriptors that the child inherits (a lock that must outlive a killed parent).

    Raises:
        ChildFailed: the child reported an error, returned another code than 0, or stalled.
    """
    inherited = {} if sys.platform == "win32" else {"pass_fds": tuple(keep)}
    child = subprocess.Popen(
        list(argv),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **(environment or {})},
        **inherited,  # type: ignore[call-overload]
    )
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(child.stdout, lines), daemon=True)
    reader.start()
    last_words: deque[str] = deque(maxlen=8)
    report: dict[str, Any] = {}
    size, sign, limit, open_output = measure(), time.monotonic(), first_sign, True
    peak = size
    try:
        while open_output or child.poll() is None:
            for line in _drain(lines):
                if line is None:
                    open_output = False
                    continue
                message = _parsed(line)
                if message is None:
                    last_words.append(line.strip())
                    continue
                sign, limit = time.monotonic(), stall
                if message.get("type") == "error":
                    report = message
                else:
                    on_message(message)
            grown = measure()
            if grown != size:
                # A tool that moves its file at the end shrinks what is measured; the bar must not go back.
                if grown > peak:
                    on_size(grown)
                size, sign, limit, peak = grown, time.monotonic(), stall, max(peak, grown)
            if limit is not None and time.monotonic() - sign > limit:
                raise ChildFailed(f"no answer for {limit:.0f} seconds")
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
        reader.join()
        child.stdout.close()
    if report or child.returncode != 0:
        reason = report.get("message") or _reason(last_words) or f"it ended with code {child.returncode}"
        raise ChildFailed(reason, report)


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module of this repository with this Python."""
    return [sys.executable, "-m", name, *arguments]


def module_environment() -> dict[str, str]:
    """What `module` needs so that `engine` is found from any current folder."""
    inherited = os.environ.get("PYTHONPATH")
    return {
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{inherited}" if inherited else str(REPOSITORY),
        "PYTHONUNBUFFERED": "1",
    }


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder; files that vanish meanwhile count nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _read(stream: Any, lines: queue.Queue[str | None]) -> None:
    for raw in stream:
        lines.put(raw.decode("utf-8", "replace"))
    lines.put(None)


def _drain(lines: queue.Queue[str | None]) -> Iterator[str | None]:
    """All lines that are there; waits a moment for the first, so that the caller's loop does not spin."""
    with contextlib.suppress(queue.Empty):
        yield lines.get(timeout=_POLL_SECONDS)
        while True:
            yield lines.get_nowait()


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def _reason(last_words: Sequence[str]) -> str:
    """The most telling of a tool's last lines: the last one that says error, else the last one."""
    spoken = [line for line in last_words if line]
    errors = [line for line in spoken if "error" in line.lower()]
    return (errors or spoken or [""])[-1][:300]
