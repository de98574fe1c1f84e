"""`python -m studio.worker RUN_ID`: trains one run in a process of its own.

Events go to the store, commands come from it; the page's process may end and begin again meanwhile.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from engine.errors import EngineError
from engine.paths import studio_home
from engine.train.events import Event
from engine.train.job import JobSpec
from studio import process, states, zero
from studio.faults import is_memory, memory_event, unexpected_event
from studio.store import Row, Store

logger = logging.getLogger("studio.worker")

_AFTER = {"done": states.DONE, "paused": states.PAUSED, "stopped": states.STOPPED}


class StoreSink:
    """Every event becomes a row; `training` turns true at the first step, when there is something to keep."""

    def __init__(self, store: Store, run_id: str) -> None:
        self.store = store
        self.run_id = run_id
        self.training = False

    def emit(self, event: Event) -> None:
        """Keep the event, and move the run from starting to running when training begins."""
        self.store.add_event(self.run_id, event)
        if event["type"] == "start":
            self.training = True
            self.store.move(self.run_id, [states.STARTING], states.RUNNING)


class StoreControl:
    """Commands from the store. TERM asks for an orderly stop once there is something to keep, else it ends at once."""

    def __init__(self, store: Store, sink: StoreSink) -> None:
        self.store = store
        self.sink = sink
        self.terminated = False
        # ZeroGPU runs this in a thread of a process that it ends itself.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if not self.sink.training:
            raise SystemExit(128 + number)
        self.terminated = True

    def poll(self) -> str | None:
        """The next command, or None."""
        return "stop" if self.terminated else self.store.take(self.sink.run_id)


def claim(store: Store, run_id: str) -> bool:
    """Make this process the run's own; False when the run has been taken back or is another's."""
    pid = os.getpid()
    started = process.started_at(pid)
    with store.exclusive() as db:
        cursor = db.conn.execute(
            "UPDATE runs SET pid = ?, pid_started = ?, machine = ?"
            " WHERE id = ? AND state IN (?, ?) AND (pid IS NULL OR pid = ?)",
            [pid, started, process.machine(), run_id, states.STARTING, states.STOPPING, pid],
        )
    return bool(cursor.rowcount == 1)


@zero.on_gpu
def train(run_id: str, home: str) -> int:
    """Train the claimed run and set its final state; returns the exit status. Plain arguments, for `zero.on_gpu`."""
    store, folder = Store(Path(home)), Path(home) / "runs" / run_id
    row = store.run(run_id)
    sink = StoreSink(store, run_id)
    control = StoreControl(store, sink)
    try:
        sink.emit({"type": "status", "phase": "loading", "message": "Starting"})
        from engine.train import worker

        spec = JobSpec.from_file(folder / "spec.yaml")
        others = _others(row, folder, _Failing(store, sink)) if row["processes"] > 1 else None
        try:
            final = worker.run(spec, folder, sink, control, resume=bool(row["resume"]))
        except RuntimeError as error:
            # A message between processes fails before it is known which of them has gone.
            gone = others.failure(patience=5.0) if others else None
            if gone is None:
                raise
            raise gone from error
        finally:
            if others:
                others.finish()
        store.update_run(run_id, state=_AFTER[final], ended=time.time(), error=None)
        return 0
    except EngineError as error:
        logger.exception("The run failed.")
        _fail(store, sink, error.to_event())
    except Exception as error:
        logger.exception("The run failed.")
        named = memory_event(error) if is_memory(error) else unexpected_event(error)
        _fail(store, sink, named)
    return 1


class _Failing:
    """Takes the error with which the run's other processes end this one, and keeps it as the run's."""

    def __init__(self, store: Store, sink: StoreSink) -> None:
        self.store = store
        self.sink = sink

    def emit(self, event: Event) -> None:
        """Keep the error; this process ends at once after it."""
        _fail(self.store, self.sink, event)


def _others(row: Row, folder: Path, sink: _Failing) -> Any:
    """Start the run's other processes: the engine's own command on the run's folder, in which only this one writes."""
    from engine.train import parallel

    job = folder / "spec.yaml"
    command = [sys.executable, "-m", "engine", "train", str(job), "--out", str(folder), "--json"]
    command += ["--threads", os.environ["OMP_NUM_THREADS"]] if "OMP_NUM_THREADS" in os.environ else []
    command += ["--resume"] if row["resume"] else []
    return parallel.start(row["processes"], "ddp", command, sink)


def _fail(store: Store, sink: StoreSink, event: Event) -> None:
    sink.emit(event)
    error = {key: event[key] for key in ("code", "message", "hint")}
    store.update_run(sink.run_id, state=states.FAILED, ended=time.time(), error=error)


def main(argv: list[str] | None = None) -> int:
    """Entry point; the one argument is the run's id."""
    arguments = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    home = studio_home()
    store = Store(home)
    if len(arguments) != 1:
        print("usage: python -m studio.worker RUN_ID", file=sys.stderr)
        return 2
    run_id = arguments[0]
    store.run(run_id)
    if not claim(store, run_id):
        logger.warning("Run %s is not waiting for a worker; nothing to do.", run_id)
        return 3
    return train(run_id, str(home))


if __name__ == "__main__":
    raise SystemExit(main())
