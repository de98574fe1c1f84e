"""Long work on adapters (importing, mixing, exporting, resizing): a process each, one at a time, and what came of it.

The truth is in the table `works`: the process writes its progress and its result there, so both outlive a closed page.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.paths import inside
from studio import process, states, visitors
from studio.faults import is_memory, memory_event
from studio.store import Row, StateError, Store, UnknownError

logger = logging.getLogger("studio.works")

LOG = "work.log"
WORK_ID = re.compile(r"work-[0-9a-f]{8}")
LIVE = (states.STARTING, states.RUNNING)
_UNCLAIMED = 60.0
"""Seconds after which work without a process belongs to a server that ended before it started one."""


class Works:
    """The work on the adapters of one home folder.

    Args:
        store: where it is kept.
        home: the home folder; each work has a folder `works/<id>` for its drafts, its log and what it makes.
    """

    def __init__(self, store: Store, home: Path) -> None:
        self.store = store
        self.home = home
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def folder(self, work_id: str) -> Path:
        """`home/works/<id>`, for an id of the right shape."""
        return inside(self.home / "works", work_id)

    def reserve(self) -> str:
        """An id whose folder exists, to lay drafts into before the work starts."""
        work_id = f"work-{secrets.token_hex(4)}"
        self.folder(work_id).mkdir(parents=True)
        return work_id

    def drop(self, work_id: str) -> None:
        """Remove the folder of a work that never started."""
        shutil.rmtree(self.folder(work_id), ignore_errors=True)

    def start(self, kind: str, title: str, asked: Mapping[str, Any], work_id: str | None = None) -> str:
        """Start `python -m studio.adapter_worker` on it; returns the work's id.

        Args:
            kind: one of `studio.adapter_worker.KINDS`.
            title: what it is, for people.
            asked: plain data, checked already.
            work_id: from `reserve`.

        Raises:
            StateError: other work is under way.
        """
        self.present()
        self.clear()
        work_id = work_id or self.reserve()
        with self.store.exclusive() as db:
            busy = next(iter(db.query("SELECT * FROM works WHERE state IN (?, ?)", LIVE)), None)
            if busy is not None and not visitors.mine(busy["owner"]):
                raise StateError("Another visitor's work is under way; one thing is done at a time.", "Wait a moment.")
            if busy is not None:
                raise StateError(f"{busy['title']!r} is under way; one thing is done at a time.", "Wait, or stop it.")
            values = [work_id, kind, title, json.dumps(dict(asked), ensure_ascii=False), states.STARTING, time.time()]
            db.conn.execute(
                "INSERT INTO works (id, kind, title, asked, state, created, owner) VALUES (?, ?, ?, ?, ?, ?, ?)",
                [*values, visitors.owner()],
            )
        try:
            with (self.folder(work_id) / LOG).open("wb") as log:
                child = subprocess.Popen(
                    [sys.executable, "-m", "studio.adapter_worker", work_id],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**process.environment(self.home), "PYTHONUNBUFFERED": "1"},
                    start_new_session=True,
                )
        except OSError as fault:
            self.close_work(
                work_id, states.FAILED, _error("start", f"The work could not start: {fault}.", "Try again.")
            )
            return work_id
        self._children[work_id] = child
        threading.Thread(target=self._watch, args=(work_id, child), name="adapter-work", daemon=True).start()
        return work_id

    def stop(self) -> None:
        """End the work that is under way, if there is any; nothing of it is kept."""
        live = self.present()
        if live is None or not self.close_work(live["id"], states.STOPPED):
            return
        process.send(live["pid"], live["pid_started"], signal.SIGTERM)
        if live["id"] not in self._children:
            # An earlier server started it: nobody waits for its process.
            threading.Thread(target=self._see_off, args=(live,), name="adapter-work-end", daemon=True).start()

    def clear(self) -> None:
        """Remove what ended works have left beside their logs, but for what done ones have made."""
        sql = "SELECT * FROM works WHERE state NOT IN (?, ?, ?)"
        for row in self.store.db.query(sql, [*LIVE, states.DONE]):
            folder = self.folder(row["id"])
            if row["id"] in self._children or process.alive(row["pid"], row["pid_started"]) or not folder.is_dir():
                continue
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != LOG:
                    path.unlink(missing_ok=True)

    def get(self, work_id: str) -> Row:
        """One work as plain data.

        Raises:
            UnknownError: the id is malformed or names none.
        """
        known = isinstance(work_id, str) and WORK_ID.fullmatch(work_id)
        found = self._rows("id = ? AND mine(owner)", [work_id]) if known else []
        if not found:
            raise UnknownError(f"There is no work {str(work_id)[:40]!r}.", "Start it on the Adapters page.")
        return found[0]

    def present(self) -> Row | None:
        """The work under way, of this visitor; one whose process is gone is settled first, whosever it is."""
        with visitors.everyone():
            live = self._under_way()
        return live if live is not None and visitors.mine(live["owner"]) else None

    def _under_way(self) -> Row | None:
        for row in self._rows("state IN (?, ?)", LIVE):
            child = self._children.get(row["id"])
            if child is not None and child.poll() is None:
                return row
            if process.alive(row["pid"], row["pid_started"]):
                return row
            if row["pid"] is None and child is None and time.time() - row["created"] < _UNCLAIMED:
                return row
            self._settle(row["id"], child.returncode if child is not None else None)
        return None

    def newest(self) -> Row | None:
        """The newest work, whatever became of it; what is gone is settled."""
        self.present()
        return next(iter(self._rows("mine(owner)", [])), None)

    def log_tail(self, work_id: str) -> str:
        """The end of what the work's process wrote."""
        return process.tail(self.folder(work_id) / LOG)

    def claim(self, work_id: str, pid: int, started: float | None) -> bool:
        """Make a process the work's own; False when the work was stopped or settled meanwhile."""
        with self.store.exclusive() as db:
            cursor = db.conn.execute(
                "UPDATE works SET state = ?, pid = ?, pid_started = ? WHERE id = ? AND state = ?",
                [states.RUNNING, pid, started, work_id, states.STARTING],
            )
        return bool(cursor.rowcount == 1)

    def tell(self, work_id: str, message: str, fraction: float | None = None) -> None:
        """What is being done now."""
        self.store.db.execute("UPDATE works SET message = ?, fraction = ? WHERE id = ?", [message, fraction, work_id])

    def close_work(self, work_id: str, state: str, error: Row | None = None, result: Row | None = None) -> bool:
        """Give work that is under way its end; True for the one caller that did."""
        kept = [None if value is None else json.dumps(value, ensure_ascii=False) for value in (error, result)]
        with self.store.exclusive() as db:
            cursor = db.conn.execute(
                "UPDATE works SET state = ?, ended = ?, error = ?, result = ? WHERE id = ? AND state IN (?, ?)",
                [state, time.time(), *kept, work_id, *LIVE],
            )
        return bool(cursor.rowcount == 1)

    def _watch(self, work_id: str, child: subprocess.Popen[bytes]) -> None:
        """Wait for the process, so that it leaves no zombie."""
        status = child.wait()
        try:
            with visitors.everyone(), contextlib.suppress(UnknownError):
                self._settle(work_id, status)
        except Exception:
            logger.exception("What came of work on an adapter could not be kept.")
        finally:
            self._children.pop(work_id, None)
            self._clear_quietly()
            self.store.close()

    def _see_off(self, row: Row) -> None:
        """Wait for a process that is told to end, and take away what it leaves."""
        process.end(row["pid"], row["pid_started"])
        self._clear_quietly()
        self.store.close()

    def _clear_quietly(self) -> None:
        try:
            self.clear()
        except Exception:
            # Tried again before the next work, and when a server starts.
            logger.exception("What ended work on an adapter left could not be removed.")

    def _settle(self, work_id: str, status: int | None) -> None:
        """The process is gone: if it did not say what came of it, say that."""
        row = self.get(work_id)
        if row["state"] not in LIVE:
            return
        process.end(row["pid"], row["pid_started"], grace=2.0)
        last = next(iter(self.log_tail(work_id).strip().splitlines()[::-1]), "")
        if is_memory(RuntimeError(last)):
            error = memory_event(RuntimeError(last))
        elif status is None or status < 0:
            killed = f" (signal {-status})" if status else ""
            message = f"Its process is gone{killed}: it was killed, the machine restarted, or memory ran out."
            error = _error("lost", message, "Try again; nothing was changed.")
        else:
            message = f"Its process ended with status {status} before it could say why."
            error = _error("ended", message, "The end of its log usually names the cause.")
        self.close_work(work_id, states.FAILED, {key: error[key] for key in ("code", "message", "hint")})

    def _rows(self, where: str, values: Any) -> list[Row]:
        """Works, newest first, as plain data."""
        rows = self.store.db.query(f"SELECT * FROM works WHERE {where} ORDER BY created DESC, rowid DESC", list(values))
        plain = ("asked", "result", "error")
        return [{**row, **{name: json.loads(row[name]) if row[name] else None for name in plain}} for row in rows]


def _error(code: str, message: str, hint: str) -> Row:
    return {"code": code, "message": message, "hint": hint}
