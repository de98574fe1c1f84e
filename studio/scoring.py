"""Evaluations of finished runs: `python -m engine eval` as a detached process, one at a time, and what came of each.

The truth is in the table `scores`; the process writes its lines to a file in the run's folder. So it outlives a closed
page and a server that ends, and whoever looks next finds what became of it.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from studio import process, scores, states, visitors
from studio.faults import is_memory, memory_event
from studio.jobs import Jobs
from studio.store import Row, StateError, Store

logger = logging.getLogger("studio.scoring")

SHOWN, ANSWERED = 8, 64
LIVE = (states.STARTING, states.RUNNING)
_UNCLAIMED = 60.0
"""Seconds after which an evaluation without a process belongs to a server that ended before it started one."""


class Scoring:
    """The evaluations of one home folder.

    Args:
        store: where they are kept.
        jobs: where the runs lie.
    """

    def __init__(self, store: Store, jobs: Jobs) -> None:
        self.store = store
        self.jobs = jobs
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def folder(self, row: Mapping[str, Any]) -> Path:
        """Where an evaluation's output lies, beside its run."""
        return self.jobs.folder(row["run_id"]) / "scores" / str(int(row["id"]))

    def held_back(self, run_id: str) -> int | None:
        """How many rows the run held back; None where it never came as far as counting them."""
        start = self.store.newest(run_id, "start")
        return None if start is None else int(start["eval_rows"])

    # What is asked

    def start(self, run_id: str, shown: Any = SHOWN, answered: Any = ANSWERED) -> int:
        """Score a run's base and its result on the rows that it held back; returns the evaluation's id.

        Args:
            run_id: a finished run.
            shown: so many rows are kept with both answers, 0 to 64.
            answered: so many rows are answered in words for metrics of texts, 1 to 512.

        Raises:
            UnknownError: there is no such run.
            ConfigError: a number is out of its bounds.
            StateError: the run has nothing to score, or another is being scored.
        """
        row = self.store.run(run_id)
        bounds = {"rows": (shown, 0, 64), "answers": (answered, 1, 512)}
        for name, (value, low, high) in bounds.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ConfigError(f"{name} is {str(value)[:40]}; needed: a whole number from {low} to {high}.")
        result = self._checked(row)
        asked = {"rows": int(shown), "answers": int(answered)}
        score = self._begin(row, result, asked)
        folder = self.folder(score)
        argv = [sys.executable, "-m", "engine", "eval", str(self.jobs.folder(run_id) / "spec.yaml")]
        argv += ["--adapter", str(result), "--rows", str(asked["rows"]), "--answers", str(asked["answers"])]
        argv += ["--out", str(folder), "--json", "--progress"]
        environment = process.environment(self.jobs.home, row["spec"]["training"].get("threads"))
        try:
            folder.mkdir(parents=True)
            with (folder / "output.jsonl").open("wb") as lines, (folder / "eval.log").open("wb") as log:
                child = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=lines,
                    stderr=log,
                    env={**environment, "PYTHONUNBUFFERED": "1"},
                    start_new_session=True,
                )
        except OSError as fault:
            self._close(
                score, states.FAILED, _error("start", f"The evaluation could not start: {fault}.", "Try again.")
            )
            return int(score["id"])
        self._children[score["id"]] = child
        begun = [states.RUNNING, child.pid, process.started_at(child.pid), score["id"], states.STARTING]
        with self.store.exclusive() as db:
            db.conn.execute("UPDATE scores SET state = ?, pid = ?, pid_started = ? WHERE id = ? AND state = ?", begun)
        threading.Thread(target=self._watch, args=(score, child), name="scoring", daemon=True).start()
        return int(score["id"])

    def stop(self) -> None:
        """End the evaluation that is under way, if there is one; nothing of it counts."""
        live = self.present()
        if live is not None and self._close(live, states.STOPPED):
            process.send(live["pid"], live["pid_started"], signal.SIGTERM)

    # What is known

    def present(self) -> Row | None:
        """This visitor's evaluation under way, with its `progress`; one whose process is gone is settled first."""
        with visitors.everyone():
            live = self._under_way()
            owner = self.store.run(live["run_id"])["owner"] if live is not None else None
        return live if live is not None and visitors.mine(owner) else None

    def _under_way(self) -> Row | None:
        for row in self._rows("state IN (?, ?)", LIVE):
            if process.alive(row["pid"], row["pid_started"]):
                return {**row, "progress": scores.read(self._output(row)).progress}
            if row["pid"] is None and time.time() - row["created"] < _UNCLAIMED:
                return {**row, "progress": ("Starting", None)}
            child = self._children.get(row["id"])
            if child is not None and child.poll() is None:
                # Its main thread is dead, the others are not yet: it has an end when its status is known.
                return {**row, "progress": ("Finishing", None)}
            self._settle(row, child.returncode if child is not None else None)
        return None

    def newest(self, run_id: str) -> Row | None:
        """The run's newest evaluation, whatever became of it."""
        self.store.permit(run_id)
        return next(iter(self._rows("run_id = ?", [run_id])), None)

    def scored(self, run_id: str) -> Row | None:
        """The run's newest evaluation that came to an end; `fresh` is false if the run was trained on since."""
        self.store.permit(run_id)
        row = next(iter(self._rows("run_id = ? AND state = ?", [run_id, states.DONE])), None)
        return row and {**row, "fresh": row["version"] == _version(self.jobs.result(run_id))}

    def runs(self) -> list[Row]:
        """The runs that can be scored, newest first."""
        rows = self.store.runs()
        return [row for row in rows if row["state"] in states.FINISHED and self.jobs.result(row["id"]) is not None]

    def boards(self) -> list[tuple[str, str]]:
        """(data set, task) of the scored runs, the newest run's first."""
        done = {row["run_id"] for row in self._rows("state = ?", [states.DONE])}
        return list(dict.fromkeys((r["dataset"] or "", r["task"]) for r in self.store.runs() if r["id"] in done))

    def entries(self, dataset: str, task: str) -> list[scores.Entry]:
        """The scored runs of one data set and task with what each cost, newest first, and the bases they began from."""
        found: list[scores.Entry] = []
        bases: dict[Any, scores.Entry] = {}
        for row in self.store.runs():
            if ((row["dataset"] or ""), row["task"]) != (dataset, task):
                continue
            done = self.scored(row["id"])
            if done is None:
                continue
            newest = {kind: self.store.newest(row["id"], kind) or {} for kind in ("start", "done")}
            entry = scores.entry(row, done["result"], newest["start"], newest["done"], self._bytes(row["id"]))
            found.append(entry)
            bases.setdefault(entry.rests_on, scores.base_entry(row, done["result"]))
        return [*found, *bases.values()]

    def log_tail(self, row: Mapping[str, Any]) -> str:
        """The end of what an evaluation's process wrote beside its results."""
        return process.tail(self.folder(row) / "eval.log")

    # The process

    def _checked(self, row: Row) -> Path:
        """The folder to score, of a run that has one."""
        named, result = repr(row["name"]), self.jobs.result(row["id"])
        if row["deleted_at"] is not None:
            raise StateError(f"The run {named} is in the bin.", "Take it out on the Runs page first.")
        if row["state"] not in states.FINISHED:
            raise StateError(
                f"The run {named} is {row['state']}; it can be scored when it has ended.", "Wait, or stop it."
            )
        if result is None:
            raise StateError(f"The run {named} has no adapter to score.", "Choose a finished run.")
        if self.held_back(row["id"]) == 0:
            raise StateError(
                f"The run {named} held no rows back, so there is nothing to score it on.",
                "Train again with a share of the rows held back, 0.1 for example: rows it learned from prove nothing.",
            )
        return result

    def _begin(self, row: Row, result: Path, asked: Mapping[str, int]) -> Row:
        """The row of a new evaluation; refused while another is under way."""
        self.present()
        with self.store.exclusive() as db:
            busy = next(iter(db.query("SELECT * FROM scores WHERE state IN (?, ?)", LIVE)), None)
            if busy is not None:
                with visitors.everyone():
                    run = self.store.run(busy["run_id"])
                named = f"run {run['name']!r}" if visitors.mine(run["owner"]) else "run of another visitor"
                raise StateError(f"The {named} is being scored; one is scored at a time.", "Wait, or stop it.")
            values = [row["id"], states.STARTING, json.dumps(asked), _version(result), time.time()]
            cursor = db.conn.execute(
                "INSERT INTO scores (run_id, state, asked, version, created) VALUES (?, ?, ?, ?, ?)", values
            )
        return {"id": int(cursor.lastrowid or 0), "run_id": row["id"]}

    def _watch(self, score: Row, child: subprocess.Popen[bytes]) -> None:
        """Wait for the process, so that it leaves no zombie, and keep what came of it though no page looks."""
        status = child.wait()
        try:
            with visitors.everyone():
                # None where the run was swept away meanwhile.
                for row in self._rows("id = ?", [score["id"]]):
                    self._settle(row, status)
        except Exception:
            logger.exception("What came of an evaluation could not be kept.")
        finally:
            self._children.pop(score["id"], None)
            self.store.close()

    def _settle(self, row: Row, status: int | None) -> None:
        """The process is gone: keep its results, or say why there are none."""
        if row["state"] not in LIVE:
            return
        process.end(row["pid"], row["pid_started"], grace=2.0)
        found = scores.read(self._output(row))
        if found.error is not None:
            self._close(row, states.FAILED, found.error)
        elif found.complete and status in (0, None):
            self._close(row, states.DONE, result=found.to_dict())
        else:
            self._close(row, states.LOST if status is None else states.FAILED, self._reason(row, status))

    def _reason(self, row: Row, status: int | None) -> Row:
        last = next(iter(self.log_tail(row).strip().splitlines()[::-1]), "")
        if is_memory(RuntimeError(last)):
            return memory_event(RuntimeError(last))
        if status is None or status < 0:
            killed = f" (signal {-status})" if status else ""
            message = (
                f"The evaluation's process is gone{killed}: it was killed, the machine restarted, or memory ran out."
            )
            return _error("lost", message, "Score the run again.")
        message = f"The evaluation ended with status {status} before it could say why."
        return _error("ended", message, "The end of its log usually names the cause.")

    def _close(self, row: Row, state: str, error: Row | None = None, result: Row | None = None) -> bool:
        """Give an evaluation that is under way its end; True for the one caller that did."""
        kept = None if error is None else json.dumps(error, ensure_ascii=False)
        values = [state, time.time(), kept, None if result is None else json.dumps(result, ensure_ascii=False)]
        with self.store.exclusive() as db:
            cursor = db.conn.execute(
                "UPDATE scores SET state = ?, ended = ?, error = ?, result = ? WHERE id = ? AND state IN (?, ?)",
                [*values, row["id"], *LIVE],
            )
        return bool(cursor.rowcount == 1)

    def _output(self, row: Row) -> str:
        try:
            return (self.folder(row) / "output.jsonl").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def _bytes(self, run_id: str) -> int | None:
        """What is kept of a run: an adapter's tensors in one format, or a model's."""
        folder = self.jobs.result(run_id)
        if folder is None:
            return None
        files = folder.glob("adapter_model.safetensors" if folder.name == "adapter" else "*.safetensors")
        return sum(file.stat().st_size for file in files)

    def _rows(self, where: str, values: Any) -> list[Row]:
        """Evaluations, newest first, as plain data."""
        rows = self.store.db.query(f"SELECT * FROM scores WHERE {where} ORDER BY id DESC", list(values))
        plain = ("asked", "result", "error")
        return [{**row, **{name: json.loads(row[name]) if row[name] else None for name in plain}} for row in rows]


def _version(folder: Path | None) -> int | None:
    """Changes when a run's result is written anew."""
    if folder is None:
        return None
    mark = "adapter_config.json" if folder.name == "adapter" else "config.json"
    return (folder / mark).stat().st_mtime_ns


def _error(code: str, message: str, hint: str) -> Row:
    return {"code": code, "message": message, "hint": hint}
