"""What a run tells the world, and how it is steered.

A run `emit`s plain dictionaries to a sink and asks a control what to do between steps. The types of event:

| type | fields |
|---|---|
| `status` | `phase` (`loading`, `tokenising`, `reference`, `training`, `saving`), `message`, optional `fraction` 0..1 |
| `start` | `total_steps`, `first_step`, `trainable`, `parameters`, `train_rows`, `eval_rows`, `device`, ... |
| `step` | `step`, `loss`, `lr`, `grad_norm`, `tokens`, `tokens_per_s`, `epoch`, `eta_s`, `memory`, `extra_loss` |
| `eval` | `step`, `loss`, `tokens`, for tasks that have them `metrics` (name -> value) |
| `sample` | `step`, `prompt`, `text` |
| `rank` | `step`, `ranks` (module -> rank, of every adapted module) |
| `checkpoint` | `step`, `path` |
| `warning` | `message`: something was changed or left out, and the run goes on |
| `done` | `step`, `loss`, `eval_loss`, `first_eval_loss`, `seconds`, `peak_bytes`, `adapter` or `model` |
| `paused`, `stopped` | `step`, `adapter`, `model` or `checkpoint` |
| `error` | `code`, `message`, `hint`; out of memory: `remedy` (key of the job -> value) |

Every event carries `time` (seconds since the epoch). Memory is in bytes: what the process holds after a step
(`memory`), at the most (`peak_bytes`), and what there is (`memory_limit` of `start`). `extra_loss` is AdaLoRA's. Full
fine-tuning has `model` instead of `adapter`. With `early_stopping_patience`, `done` says whose evaluation was the best
and is kept (`best_step`), and whether the run ended before its last step (`early`).
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TextIO

Event = dict[str, Any]

EVENTS = "events.jsonl"
"""The file of a run's folder that holds its events, one JSON object a line."""


class Sink(Protocol):
    """Takes the events of one run."""

    def emit(self, event: Event) -> None: ...


class Control(Protocol):
    """Asked once a step: `stop`, `pause`, `checkpoint`, `sample`, or None for go on."""

    def poll(self) -> str | None: ...


def stamp(event: Event) -> Event:
    """The event with its time, and with NaN and infinities as None, which JSON and SQLite can hold."""
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in event.items()
    }
    return {"time": time.time(), **plain}


class JsonLines:
    """One JSON object a line, flushed at once, so that a reader of the pipe sees a step when it happens."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def emit(self, event: Event) -> None:
        self.stream.write(json.dumps(stamp(event), ensure_ascii=False) + "\n")
        self.stream.flush()


class EventFile:
    """Every event into `folder/events.jsonl`, behind those of an earlier part of the run; made with the first one."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / EVENTS
        self.used = False

    def emit(self, event: Event) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            JsonLines(stream).emit(event)
        self.used = True


class Tee:
    """Every event to each of several sinks."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self.sinks = tuple(sinks)

    def emit(self, event: Event) -> None:
        for sink in self.sinks:
            sink.emit(event)


class Recorder:
    """Keeps the events in a list; for scripts and tests."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(stamp(event))

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["type"] == kind]


class SignalControl:
    """TERM and INT ask for an orderly stop: the step ends, the adapter and a checkpoint are saved."""

    def __init__(self) -> None:
        self.asked: str | None = None
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = "stop"

    def poll(self) -> str | None:
        return self.asked
