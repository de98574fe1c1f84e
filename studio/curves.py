"""A run's events as columns, read once and then only what is new, so that a long run redraws as fast as a short one."""

from __future__ import annotations

import copy
import json
import threading
from collections import OrderedDict
from weakref import WeakKeyDictionary

import numpy as np

from engine.train.events import Event
from studio.points import Column
from studio.store import Store

COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens_per_s", "memory")
KEPT = 8
"""Runs of one store whose columns are held; a hundred thousand steps take 5 MB."""

_KINDS = ("start", "status", "done", "error", "warning", "sample")


class Curves:
    """One run's events, as far as they were read. `update` and `snapshot` read on; the rest only looks.

    Attributes:
        last_id: the newest event that was read; 0 before the first.
        ranks: the newest event with AdaLoRA's ranks.
        mean_ranks: (step, mean rank) of all of them.
    """

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.last_id = 0
        self.ranks: Event | None = None
        self.mean_ranks: list[tuple[float, float]] = []
        self._lock = threading.Lock()
        self._held = np.full((len(COLUMNS), 256), np.nan)
        self._count = 0
        self._evals: dict[int, Event] = {}
        self._kinds: dict[str, list[Event]] = {kind: [] for kind in _KINDS}
        self._newest: Event = {}

    def update(self, store: Store) -> Curves:
        """Read the events that came since; returns itself."""
        with self._lock:
            self._read(store)
        return self

    def snapshot(self, store: Store) -> Curves:
        """Read the events that came since; returns what is known now, which nobody's reading lengthens any more."""
        with self._lock:
            self._read(store)
            now = copy.copy(self)
            # The array of steps is shared: it only grows past the count, or another takes its place.
            now._evals, now.mean_ranks = dict(self._evals), list(self.mean_ranks)
            now._kinds = {kind: list(events) for kind, events in self._kinds.items()}
        return now

    def _read(self, store: Store) -> None:
        rows = store.events_after(self.run_id, self.last_id)
        if rows:
            # One call for all: a parser that is entered once reads ten thousand rows in the time of a thousand.
            data = json.loads(f"[{','.join(row[4] for row in rows)}]")
            for (number, kind, step, moment, _), fields in zip(rows, data, strict=True):
                self._take({**fields, "id": number, "type": kind, "step": step, "time": moment})
            self.last_id = rows[-1][0]

    def column(self, name: str) -> Column:
        """One value for each step, in order of steps; NaN where a step has none."""
        return self._held[COLUMNS.index(name), : self._count]

    @property
    def evals(self) -> list[Event]:
        """The evaluations in order of steps: of a step that ran twice the newest."""
        return [self._evals[step] for step in sorted(self._evals)]

    def of(self, kind: str) -> list[Event]:
        """The events of a kind that is rare (`start`, `status`, `done`, `error`, `warning`, `sample`), oldest first."""
        return list(self._kinds[kind])

    def newest(self, kind: str) -> Event | None:
        """The newest event of such a kind, or of `step`."""
        if kind == "step":
            return self._newest or None
        return self._kinds[kind][-1] if self._kinds[kind] else None

    def _take(self, event: Event) -> None:
        kind = event["type"]
        if kind == "step":
            self._newest = event
            self._put(event)
        elif kind == "eval":
            self._evals[int(event["step"] or 0)] = event
        elif kind == "rank" and event.get("ranks"):
            self.ranks = event
            self.mean_ranks.append((float(event["step"]), sum(event["ranks"].values()) / len(event["ranks"])))
        elif kind in self._kinds:
            self._kinds[kind].append(event)

    def _put(self, event: Event) -> None:
        """A step into its place: at the end, or over the same step from before a resume."""
        step, steps = float(event["step"]), self._held[0, : self._count]
        place = self._count
        if place and step <= steps[-1]:
            place = int(np.searchsorted(steps, step))
            if steps[place] != step:
                self._held = np.insert(self._held, place, np.nan, axis=1)
                self._count += 1
        else:
            if place == self._held.shape[1]:
                # Not in place: who draws at this moment looks at the former one.
                self._held = np.concatenate([self._held, np.full_like(self._held, np.nan)], axis=1)
            self._count += 1
        self._held[:, place] = [np.nan if event.get(name) is None else float(event[name]) for name in COLUMNS]


_known: WeakKeyDictionary[Store, OrderedDict[str, Curves]] = WeakKeyDictionary()
_choosing = threading.Lock()


def of_run(store: Store, run_id: str) -> Curves:
    """The run's events up to now; two pages that draw one run at the same time each have their own."""
    with _choosing:
        held = _known.setdefault(store, OrderedDict())
        found = held.pop(run_id, None) or Curves(run_id)
        held[run_id] = found
        while len(held) > KEPT:
            held.popitem(last=False)
    return found.snapshot(store)
