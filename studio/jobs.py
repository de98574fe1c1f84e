"""Runs as detached processes: a queue that trains one at a time, steering, and finding what became of them.

The truth is in the store. A worker outlives the server that started it; the next server finds it by pid and start time.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from engine import threads
from engine.errors import ConfigError
from engine.paths import inside
from engine.train.job import JobSpec
from studio import bases, demo, process, states, visitors
from studio.lock import OwnerLock
from studio.storage import Storage
from studio.store import Row, StateError, Store, UnknownError, is_run_id, new_run_id

logger = logging.getLogger("studio.jobs")

MOST_PROCESSES = 64
"""Of one run on one machine."""


class Jobs:
    """The queue of one home folder.

    Args:
        store: where runs are kept.
        home: the home folder; runs lie in `home/runs/<id>/`.
        grace: seconds that a run may take to end its step after "stop" before it is sent TERM.
        kill_after: seconds between TERM and KILL.
        module: what a worker runs, `python -m MODULE RUN_ID`.
    """

    def __init__(
        self,
        store: Store,
        home: Path,
        grace: float = 60.0,
        kill_after: float = 10.0,
        module: str = "studio.worker",
    ) -> None:
        self.store = store
        self.home = home
        self.grace = grace
        self.kill_after = kill_after
        self.module = module
        self.lock = OwnerLock(home / "queue.lock")
        self.storage = Storage(store, self.folder)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._terminated: dict[str, float] = {}
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    # What the pages ask for

    def folder(self, run_id: str) -> Path:
        """`home/runs/<id>`, for an id of the right shape; of a visitor's own runs only."""
        self.store.permit(run_id)
        return self._place(run_id)

    def _place(self, run_id: str) -> Path:
        return inside(self.home / "runs", run_id)

    def submit(self, spec: JobSpec, dataset: str | None = None, processes: int = 1) -> str:
        """Write the run's folder with `spec.yaml` and queue it; returns the id.

        Args:
            spec: the job.
            dataset: the data set that it learns from.
            processes: how many share each step, one for each GPU; it is kept with the run.

        Raises:
            ConfigError, UnsafeFileError: the job would open files that nobody brought in, or `processes` is no number.
            DemoError: the demo does not do it.
        """
        if not 1 <= processes <= MOST_PROCESSES:
            raise ConfigError(f"processes is {processes}; needed: 1 to {MOST_PROCESSES}, one for each GPU.")
        bases.checked(self.home, spec.model)
        bases.check_adapter(self.home, spec.adapter)
        if demo.active():
            rows = self.store.dataset(dataset)["rows"] if dataset else 0
            demo.check_job(spec, rows, [*self.store.runs(), *self.store.runs(deleted=True)])
        if spec.task == "captioning" and spec.training.sample_prompts:
            raise ConfigError(
                "A run of the studio describes pictures that it holds back; it takes no sample_prompts, which are "
                "paths to pictures.",
                "Leave sample_prompts out.",
            )
        run_id = new_run_id()
        folder = self._place(run_id)
        folder.mkdir(parents=True)
        try:
            spec.save(folder / "spec.yaml")
            self.store.add_run(spec, dataset, run_id, processes)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._wake.set()
        return run_id

    def stop(self, run_id: str) -> None:
        """Stop after the present step and keep the adapter; a queued run just leaves the queue.

        Raises:
            StateError: there is nothing to stop.
        """
        if self.store.move(run_id, [states.QUEUED], states.STOPPED, ended=time.time()):
            return
        early = self.store.move(run_id, [states.STARTING], states.STOPPING)
        if not early and not self.store.move(run_id, [states.RUNNING, states.PAUSING], states.STOPPING):
            self._refuse(run_id, "stop", "Only a queued or training run can be stopped.")
        self.store.drop_commands(run_id)
        self.store.ask(run_id, "stop")
        if early:
            row = self.store.run(run_id)
            process.send(row["pid"], row["pid_started"], signal.SIGTERM)
        self._wake.set()

    def cancel(self, run_id: str) -> None:
        """Take a waiting run out of the queue; one that has begun meanwhile is left alone.

        Raises:
            StateError: it does not wait.
        """
        if not self.store.move(run_id, [states.QUEUED], states.STOPPED, ended=time.time()):
            self._refuse(run_id, "cancel", "Only a run that waits in the queue can be cancelled; stop one that trains.")

    def waiting(self) -> list[str]:
        """The ids of the runs that wait, in the order in which they will train."""
        return [row["id"] for row in self.store.in_states([states.QUEUED])]

    def reorder(self, run_id: str, to: str) -> list[str]:
        """Move a waiting run within the queue as it is at this moment; answers the new order.

        Args:
            run_id: the run to move.
            to: `up` or `down` (by one place), `next` (the first), `last`, or the id of the waiting run before which it
                goes.

        Raises:
            StateError: the run, or the one before which it should go, does not wait any more.
            ConfigError: `to` is none of these.
        """
        demo.check_feature("shared")
        sql = "SELECT id FROM runs WHERE state = ? AND deleted_at IS NULL ORDER BY place, queued, rowid"
        # One transaction for looking and writing: two pages, or two servers, move one after the other.
        with self.store.exclusive() as db:
            order = [found[0] for found in db.conn.execute(sql, [states.QUEUED])]
            if run_id in order:
                order = _moved(order, run_id, to)
                db.conn.executemany("UPDATE runs SET place = ? WHERE id = ?", list(enumerate(order, 1)))
                return order
        self._refuse(run_id, "moving it", "Only a run that waits in the queue has a place in it.")

    def pause(self, run_id: str) -> None:
        """Save a checkpoint after the present step and end the process; `resume` goes on exactly there."""
        if not self.store.move(run_id, [states.STARTING, states.RUNNING], states.PAUSING):
            self._refuse(run_id, "pause", "Only a training run can be paused.")
        self.store.ask(run_id, "pause")

    def checkpoint(self, run_id: str) -> None:
        """Save a checkpoint after the present step."""
        self._ask_running(run_id, "checkpoint")

    def sample(self, run_id: str) -> None:
        """Answer the run's sample prompts after the present step."""
        self._ask_running(run_id, "sample")

    def resume(self, run_id: str) -> None:
        """Queue a run again: from its newest checkpoint, or from the start when it has none."""
        again = self.has_checkpoint(run_id)
        if not self.store.queue_again(run_id, again):
            self._refuse(run_id, "resume", "Only a paused, stopped, failed or lost run can go on.")
        if not again:
            # The engine refuses to write over a run; without a checkpoint there is nothing to go on from.
            for name in ("adapter", "model", "checkpoints"):
                shutil.rmtree(self.folder(run_id) / name, ignore_errors=True)
        self._wake.set()

    def empty_bin(self) -> int:
        """Remove every run in the bin with its folder, for good; returns how many.

        A run whose process or evaluation still lives stays in the bin, and so does one that is taken out meanwhile.
        """
        removed = 0
        for row in self.store.runs(deleted=True):
            scored = self.store.db.query("SELECT pid, pid_started FROM scores WHERE run_id = ?", [row["id"]])
            if any(process.alive(it["pid"], it["pid_started"]) for it in [row, *scored]):
                continue
            with contextlib.suppress(StateError, UnknownError):
                self.store.forget(row["id"])
                shutil.rmtree(self.folder(row["id"]), ignore_errors=True)
                removed += 1
        return removed

    def has_checkpoint(self, run_id: str) -> bool:
        """Whether there is something to go on from."""
        return any(self.folder(run_id).glob("checkpoints/step-*"))

    def has_adapter(self, run_id: str) -> bool:
        """Whether there is an adapter to compare with."""
        return (self.folder(run_id) / "adapter" / "adapter_config.json").is_file()

    def result(self, run_id: str) -> Path | None:
        """The folder of the run's adapter, or of its model after full fine-tuning; None before either is saved."""
        model = self.folder(run_id) / "model"
        if self.has_adapter(run_id):
            return self.folder(run_id) / "adapter"
        return model if (model / "config.json").is_file() else None

    def log_tail(self, run_id: str) -> str:
        """The end of the run's log."""
        return process.tail(self.folder(run_id) / "worker.log")

    # The queue

    def start_queue(self, every: float = 1.0) -> None:
        """Run the queue in a thread of this process, as soon as no other process runs this home's queue."""
        self._thread = threading.Thread(target=self._loop, args=(every,), name="queue", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the queue's thread. Runs go on."""
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
        self.lock.release()

    def tick(self) -> None:
        """One look: settle what has ended, press what will not stop, start the next."""
        for row in self.store.in_states(states.ACTIVE):
            if process.alive(row["pid"], row["pid_started"]):
                self._limit(row)
                self._press(row)
            else:
                child = self._children.get(row["id"])
                self._settle(row, _status(child) if child is not None else None)
        self._reap()
        # The last run's process may still be giving its memory back; the next one waits for that.
        if not self._children and not self.store.in_states(states.ACTIVE):
            waiting = self.store.in_states([states.QUEUED])
            if waiting:
                self._start(waiting[0])

    def _loop(self, every: float) -> None:
        with visitors.everyone():
            while not self._closing.is_set():
                try:
                    if self.lock.acquire():
                        self.tick()
                except Exception:
                    logger.exception("The queue met an error; it goes on.")
                self._wake.wait(every)
                self._wake.clear()

    def _start(self, row: Row) -> None:
        run_id = row["id"]
        moved = self.store.move(
            run_id, [states.QUEUED], states.STARTING, started=time.time(), pid=None, pid_started=None
        )
        if not moved:
            return
        environment = process.environment(self.home, _threads(row))
        try:
            with (self.folder(run_id) / "worker.log").open("ab") as log:
                child = subprocess.Popen(
                    [sys.executable, "-m", self.module, run_id],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**environment, "PYTHONUNBUFFERED": "1"},
                    start_new_session=True,
                )
        except OSError as error:
            self._end(run_id, states.FAILED, "start", f"The run's process could not start: {error}.", "Try again.")
            return
        self._children[run_id] = child
        self.store.update_run(run_id, pid=child.pid, pid_started=process.started_at(child.pid))

    def _limit(self, row: Row) -> None:
        """A run that has had its time in the demo is stopped and keeps what it has."""
        why = demo.overdue(row)
        if why and row["state"] in (states.STARTING, states.RUNNING):
            self.store.add_event(row["id"], {"type": "warning", "message": why})
            self.stop(row["id"])

    def _press(self, row: Row) -> None:
        """A run that was asked to stop and still lives after its grace gets TERM, then KILL."""
        if row["state"] != states.STOPPING:
            return
        asked = self.store.last_asked(row["id"], "stop") or 0.0
        terminated = self._terminated.get(row["id"])
        if terminated is None:
            if time.time() - asked > self.grace:
                self._terminated[row["id"]] = time.time()
                process.send(row["pid"], row["pid_started"], signal.SIGTERM)
        elif time.time() - terminated > self.kill_after:
            process.send(row["pid"], row["pid_started"], signal.SIGKILL)

    def _settle(self, row: Row, status: int | None) -> None:
        """The process of an active run is gone: say what became of the run, and leave nothing of it behind."""
        run_id = row["id"]
        process.end(row["pid"], row["pid_started"], grace=2.0)
        self._terminated.pop(run_id, None)
        state = self.store.run(run_id)["state"]
        if state not in states.ACTIVE:
            return
        saved = self.result(run_id) is not None
        if state == states.STOPPING and (saved or not self._trained(row)):
            self.store.move(run_id, [state], states.STOPPED, ended=time.time())
        elif row["pid"] is None:
            self.store.requeue_unclaimed(run_id)
        elif status is not None and status > 0:
            self._end(
                run_id,
                states.FAILED,
                "ended",
                f"The run's process ended with status {status} before it could say why.",
                "The end of its log usually names the cause.",
            )
        else:
            killed = f" (signal {-status})" if status is not None and status < 0 else ""
            message = f"The run's process is gone{killed}: it was killed, the machine restarted, or memory ran out."
            advice = "if it happens again, use a smaller batch or max length."
            if state == states.STOPPING:
                message = f"The run was stopping, but its process was ended{killed} before it had saved an adapter."
                advice = "then stop it again, or let it end."
            goes_on = "goes on from the last checkpoint" if self.has_checkpoint(run_id) else "starts it again"
            self._end(run_id, states.LOST, "lost", message, f"Resume {goes_on}; {advice}")

    def _trained(self, row: Row) -> bool:
        """Whether the process of this row came as far as training, so that there was something to keep."""
        start = self.store.newest(row["id"], "start")
        return start is not None and float(start["time"]) >= (row["started"] or 0.0)

    def _end(self, run_id: str, state: str, code: str, message: str, hint: str) -> None:
        error = {"code": code, "message": message, "hint": hint}
        self.store.add_event(run_id, {"type": "error", **error})
        self.store.update_run(run_id, state=state, ended=time.time(), error=error)

    def _reap(self) -> None:
        """Collect ended children, or they would stay as zombies, and end those that linger after their last word."""
        for run_id, child in list(self._children.items()):
            if child.poll() is not None:
                del self._children[run_id]
                continue
            row = self.store.run(run_id)
            if row["state"] in states.FINISHED and time.time() - (row["ended"] or 0.0) > 3 * self.kill_after:
                process.end(row["pid"], row["pid_started"], grace=0.0)

    def _ask_running(self, run_id: str, command: str) -> None:
        if self.store.run(run_id)["state"] != states.RUNNING:
            self._refuse(run_id, command, "The run has to be training for that.")
        self.store.ask(run_id, command)

    def _refuse(self, run_id: str, command: str, hint: str) -> NoReturn:
        row = self.store.run(run_id)
        if row["deleted_at"] is not None:
            raise StateError(f"The run {run_id} is in the bin: {command} is not possible now.", "Take it out first.")
        raise StateError(f"The run {run_id} is {row['state']}: {command} is not possible now.", hint)


def _moved(order: list[str], run_id: str, to: Any) -> list[str]:
    """The ids with one of them moved; see `Jobs.reorder`."""
    at, rest = order.index(run_id), [it for it in order if it != run_id]
    places = {"up": max(0, at - 1), "down": at + 1, "next": 0, "last": len(rest)}
    if isinstance(to, str) and to in places:
        place = places[to]
    elif to in rest:
        place = rest.index(to)
    elif to == run_id:
        place = at
    elif is_run_id(to):
        raise StateError(
            "The queue has changed: the run before which it should go does not wait any more.", "Try again."
        )
    else:
        raise ConfigError(f"`to` is {str(to)[:40]!r}.", "Say up, down, next, last, or the id of a run that waits.")
    return [*rest[:place], run_id, *rest[place:]]


def _threads(row: Row) -> int | None:
    """CPU threads of each of a run's processes; None leaves the choice to the machine."""
    asked: int | None = row["spec"]["training"].get("threads")
    if asked or row["processes"] == 1:
        return asked
    return max(1, threads.available_cores() // int(row["processes"]))


def _status(child: subprocess.Popen[bytes]) -> int | None:
    """How a child that is gone ended. Its main thread may be dead a moment before the others: wait for that."""
    try:
        return child.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return None
