"""The public endpoints of runs beyond training them: queue, history, tags, curves, settings, bin. See `studio.api`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from engine.errors import ConfigError
from studio import overlay, run_diff, states
from studio.charts import decimate
from studio.context import Studio
from studio.history import History, Wanted
from studio.store import Row

Answer = dict[str, Any]
Guard = Callable[[Callable[..., Answer]], Callable[..., Answer]]

ENDPOINTS = (
    "find_runs",
    "run_queue",
    "move_in_queue",
    "cancel_run",
    "tag_run",
    "untag_run",
    "rename_run",
    "delete_run",
    "restore_run",
    "empty_run_bin",
    "run_settings",
    "diff_runs",
    "run_curves",
    "run_storage",
)
"""The methods that are served as they are."""

_FIELDS = ("id", "name", "state", "task", "model", "method", "step", "total_steps", "loss", "eval_loss", "colour")


class RunEndpoints:
    """The functions behind the endpoints, callable without a server."""

    def __init__(self, studio: Studio) -> None:
        self.store, self.jobs = studio.store, studio.jobs
        self.history = History(studio.store)

    def find_runs(self, search: str = "", state: str = "", sort: str = "created-down", limit: int = 25) -> Answer:
        """Runs outside the bin by words, state and order, at most `limit`; `total` says how many fit.

        Every word of `search` has to be in the name, base, method, data set's name or a tag. `state` is live, done,
        kept (paused or stopped) or failed (or lost). `sort` is created, name, state, base, method, data, loss, time,
        steps or size with -up or -down. `bytes` is null until the run's folder was measured.
        """
        # JSON has no whole numbers of its own.
        whole: Any = int(limit) if isinstance(limit, float) and limit % 1 == 0 else limit
        wanted = Wanted("" if search is None else search, "" if state is None else state, sort, whole)
        rows = self.history.rows(wanted)
        self.jobs.storage.refresh(rows)
        return {"total": self.history.count(wanted), "runs": [_run(row) for row in rows]}

    def run_queue(self) -> Answer:
        """The run that trains (null when none does), and the ids of those that wait, in order."""
        active = self.store.in_states(states.ACTIVE)
        return {"running": active[0]["id"] if active else None, "waiting": self.jobs.waiting()}

    def move_in_queue(self, run: str, to: str) -> Answer:
        """Move a waiting run: `up`, `down`, `next`, `last`, or before the waiting run whose id `to` is."""
        return {"run": run, "waiting": self.jobs.reorder(run, to)}

    def cancel_run(self, run: str) -> Answer:
        """Take a waiting run out of the queue; one that trains is refused (`control_run` stops it)."""
        self.jobs.cancel(run)
        return {"run": run, "waiting": self.jobs.waiting()}

    def tag_run(self, run: str, tags: list[str]) -> Answer:
        """Give a run more tags; answers all that it has. Upper and lower case count as one."""
        return {"run": run, "tags": self.history.add_tags(run, tags)}

    def untag_run(self, run: str, tags: list[str]) -> Answer:
        """Take tags off a run; answers those that stay."""
        return {"run": run, "tags": self.history.remove_tags(run, tags)}

    def rename_run(self, run: str, name: str) -> Answer:
        """Give a run another name; its adapter follows unless it has a name of its own."""
        self.history.rename(run, name)
        return {"run": run, "name": self.store.run(run)["name"]}

    def delete_run(self, run: str) -> Answer:
        """Put a run that has ended into the bin; `restore_run` takes it out again until the bin is emptied."""
        self.store.bin(run)
        return {"run": run, "deleted": True}

    def restore_run(self, run: str) -> Answer:
        """Take a run out of the bin."""
        self.store.restore(run)
        return {"run": run, "deleted": False}

    def empty_run_bin(self) -> Answer:
        """Remove the runs in the bin with their folders, for good; answers how many, and the bytes that were freed."""
        before = {run: self.jobs.storage.measure([run]) for _, run in self.history.binned()}
        removed = self.jobs.empty_bin()
        stayed = {run for _, run in self.history.binned()}
        return {"removed": removed, "bytes": sum(count for run, count in before.items() if run not in stayed)}

    def run_settings(self, run: str) -> Answer:
        """A run's settings as `submit_run` takes them, changed as you like; `dataset` is null where it is gone."""
        row = self.store.run(run)
        spec = {key: value for key, value in row["spec"].items() if key != "data"}
        known = {it["id"] for it in self.store.datasets()}
        split = {"eval_split": row["spec"]["data"].get("eval_split", 0.1)}
        return {
            "run": run,
            "job": {**spec, "data": split, "dataset": row["dataset"] if row["dataset"] in known else None},
        }

    def diff_runs(self, runs: list[str], everything: bool = False) -> Answer:
        """What differs between the settings of two or more runs: exact name, words, the values in the order of `runs`.

        With `everything`, equal settings too. `default` marks values that a run leaves to their default (they are
        null).
        """
        rows = self._rows(runs, 2)
        found = [line for line in run_diff.of_runs(self.store, rows) if everything is True or line.differs]
        return {
            "runs": [row["id"] for row in rows],
            "settings": [
                {
                    "name": line.key,
                    "words": line.words,
                    "values": [None if value is run_diff.MISSING else value for value in line.values],
                    "default": [value is run_diff.MISSING for value in line.values],
                    "differs": line.differs,
                }
                for line in found
            ],
        }

    def run_curves(self, runs: list[str], by: str = "step", points: int = 300) -> Answer:
        """The loss of runs while training and on the rows held back, as [x, loss]; x is step, time (s) or tokens.

        Of long curves at most `points` (10 to 5000) are answered: of each stretch the lowest and the highest.
        """
        if not isinstance(by, str) or by not in overlay.AXES:
            raise ConfigError(f"by is {str(by)[:40]!r}; needed: one of {', '.join(overlay.AXES)}.")
        if isinstance(points, bool) or not isinstance(points, int | float) or not 10 <= points <= 5000:
            raise ConfigError(f"points is {str(points)[:40]!r}; needed: 10 to 5000.")
        found = overlay.lines(self.store, self._rows(runs, 1), by)
        return {
            "by": by,
            "runs": [
                {
                    "run": line.run,
                    "colour": line.colour,
                    "loss": [list(point) for point in decimate(line.loss, int(points))],
                    "evaluation": [list(point) for point in decimate(line.evaluation, int(points))],
                }
                for line in found
            ],
        }

    def run_storage(self) -> Answer:
        """Bytes that the runs and those in the bin take; `measuring` while some are not known yet: ask again."""
        self.jobs.storage.refresh([])
        room = self.jobs.storage.room()
        measuring = bool(room.unknown) or self.jobs.storage.busy
        return {"bytes": room.listed, "bin_bytes": room.binned, "measuring": measuring}

    def _rows(self, runs: Any, least: int) -> list[Row]:
        """The rows of these runs, each once.

        Raises:
            ConfigError: it is no list of so many ids.
            UnknownError: one of them names no run.
        """
        good = isinstance(runs, list) and all(isinstance(run, str) for run in runs)
        wanted = list(dict.fromkeys(runs)) if good else []
        if not least <= len(wanted) <= overlay.MOST:
            raise ConfigError(f"`runs` is {str(runs)[:60]!r}; needed: a list of {least} to {overlay.MOST} run ids.")
        return [self.store.run(run) for run in wanted]


def _run(row: Row) -> Answer:
    more = {"tags": row["tags"], "data": row["data_name"], "bytes": row["bytes"], "created": row["created"]}
    return {**{key: row[key] for key in _FIELDS}, **more}


def build(studio: Studio, guarded: Guard) -> None:
    """Register the endpoints on the page that is being built."""
    ends = RunEndpoints(studio)
    for name in ENDPOINTS:
        # Gradio reads the parameters' names, types and defaults of the method behind.
        gr.events.api(guarded(getattr(ends, name)), api_name=name, concurrency_limit=8)
