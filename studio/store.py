"""What the studio remembers: one SQLite file in WAL mode, written by the page's process and by workers at once.

A connection belongs to one thread of one process; `Store` opens one where it is first used.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.train.events import Event, stamp
from engine.train.job import JobSpec
from studio import states, visitors
from studio.migrations import migrations
from studio.sqlite import Database

Row = dict[str, Any]

RUN_ID = re.compile(r"run-[0-9a-f]{8}")
DATASET_ID = re.compile(r"[0-9a-f]{16}")
COMMANDS = ("stop", "pause", "checkpoint", "sample")

_JSON = ("columns", "profile", "fixes")
"""Columns of a data set that hold plain data."""

_WAITING = f"FROM runs WHERE state = '{states.QUEUED}'"
_FIRST_PLACE = f"(SELECT COALESCE(MIN(place), 1) - 1 {_WAITING})"
_LAST_PLACE = f"(SELECT COALESCE(MAX(place), 0) + 1 {_WAITING})"

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#B65C93", "#B07C00", "#2E8FC9", "#7A5195", "#8C6D46")
"""After Okabe and Ito; shades too pale to be seen on white are darkened. Grey is left out: it means the base."""


class UnknownError(EngineError):
    """An id from outside that names nothing here."""

    code = "unknown-id"


class StateError(EngineError):
    """A command that the run's present state does not allow."""

    code = "state"


class Store:
    """The database of one home folder.

    Args:
        home: the folder that holds `studio.db`; created when missing.
    """

    def __init__(self, home: Path) -> None:
        self.path = home / "studio.db"
        home.mkdir(parents=True, exist_ok=True)
        self._local = threading.local()
        if migrations.pending(self.db):
            with self.exclusive() as db:
                migrations.apply(db)

    @property
    def db(self) -> Database:
        """This thread's connection; a forked child gets its own."""
        if getattr(self._local, "pid", None) != os.getpid():
            self._local.db = Database(_connect(self.path))
            self._local.pid = os.getpid()
        db: Database = self._local.db
        return db

    def close(self) -> None:
        """Close this thread's connection."""
        if getattr(self._local, "pid", None) == os.getpid():
            self._local.db.close()
            self._local.pid = None

    @contextmanager
    def exclusive(self) -> Iterator[Database]:
        """A transaction that holds the write lock from its first statement, so a read in it stays true."""
        db = self.db
        db.conn.execute("BEGIN IMMEDIATE")
        try:
            yield db
        except BaseException:
            db.conn.rollback()
            raise
        db.conn.commit()

    def permit(self, run_id: str) -> None:
        """Refuse a visitor what belongs to another visitor's run, as if there were no such run.

        Raises:
            UnknownError: it is another's.
        """
        if visitors.present() is not None:
            self.run(run_id)

    def _rows(self, sql: str, values: Iterable[Any] = ()) -> list[Row]:
        return list(self.db.query(sql, tuple(values)))

    # Runs

    def add_run(self, spec: JobSpec, dataset: str | None = None, run_id: str | None = None, processes: int = 1) -> str:
        """A new queued run for `spec`, with a colour that the latest runs do not have; returns its id."""
        run_id, method = run_id or new_run_id(), "full" if spec.full else spec.adapter["method"]
        now = time.time()
        with self.exclusive() as db:
            used = [row["colour"] for row in db.query("SELECT colour FROM runs ORDER BY created DESC, rowid DESC")]
            colour = free_colour(used)
            db.execute(
                "INSERT INTO runs (id, name, state, task, model, method, dataset, colour, spec, created, queued,"
                f" processes, owner, place) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, {_LAST_PLACE})",
                [
                    run_id,
                    spec.name or f"{method} {run_id[4:]}",
                    states.QUEUED,
                    spec.task,
                    spec.model,
                    method,
                    dataset,
                    colour,
                    json.dumps(spec.to_dict(), ensure_ascii=False),
                    now,
                    now,
                    processes,
                    visitors.owner(),
                ],
            )
        return run_id

    def run(self, run_id: str) -> Row:
        """The row of one run, `spec` and `error` as plain data.

        Raises:
            UnknownError: the id is malformed or names no run.
        """
        found = self._rows("SELECT * FROM runs WHERE id = ? AND mine(owner)", [run_id]) if is_run_id(run_id) else []
        if not found:
            raise UnknownError(f"There is no run {str(run_id)[:40]!r}.", "Choose one on the Runs page.")
        return _plain_run(found[0])

    def runs(self, deleted: bool = False) -> list[Row]:
        """Every run, newest first; those in the bin when `deleted`."""
        where = "NOT NULL" if deleted else "NULL"
        sql = f"SELECT * FROM runs WHERE deleted_at IS {where} AND mine(owner) ORDER BY created DESC, rowid DESC"
        return [_plain_run(row) for row in self._rows(sql)]

    def in_states(self, wanted: Iterable[str]) -> list[Row]:
        """Runs in any of the states, in the order of the queue; the bin is left out."""
        wanted = tuple(wanted)
        marks = ", ".join("?" * len(wanted))
        sql = f"SELECT * FROM runs WHERE deleted_at IS NULL AND mine(owner) AND state IN ({marks})"
        sql += " ORDER BY place, queued, rowid"
        return [_plain_run(row) for row in self._rows(sql, wanted)]

    def update_run(self, run_id: str, **values: Any) -> None:
        """Set columns of one run; `error` may be a mapping."""
        if isinstance(values.get("error"), Mapping):
            values["error"] = json.dumps(values["error"], ensure_ascii=False)
        assignments = ", ".join(f"{name} = ?" for name in values)
        self.db.execute(f"UPDATE runs SET {assignments} WHERE id = ? AND mine(owner)", [*values.values(), run_id])

    def move(self, run_id: str, allowed: Iterable[str], to: str, **values: Any) -> bool:
        """Change the state only if it is one of `allowed` now and the run is not in the bin; True when it did.

        Two racing callers: one wins.
        """
        if not is_run_id(run_id):
            return False
        allowed = tuple(allowed)
        assignments = ", ".join(f"{name} = ?" for name in ("state", *values))
        marks = ", ".join("?" * len(allowed))
        with self.exclusive() as db:
            cursor = db.conn.execute(
                f"UPDATE runs SET {assignments} WHERE id = ? AND deleted_at IS NULL AND mine(owner)"
                f" AND state IN ({marks})",
                [to, *values.values(), run_id, *allowed],
            )
        return bool(cursor.rowcount == 1)

    def queue_again(self, run_id: str, resume: bool) -> bool:
        """Queue a resumable run again, as the last, and drop what it was asked before, both or neither; True if it did.

        Args:
            run_id: the run; one in the bin is refused.
            resume: whether the worker goes on from a checkpoint.
        """
        now = time.time()
        marks = ", ".join("?" * len(states.RESUMABLE))
        with self.exclusive() as db:
            cursor = db.conn.execute(
                f"UPDATE runs SET state = ?, resume = ?, queued = ?, place = {_LAST_PLACE}, ended = NULL, error = NULL,"
                " pid = NULL, pid_started = NULL WHERE id = ? AND deleted_at IS NULL AND mine(owner)"
                f" AND state IN ({marks})",
                [states.QUEUED, int(resume), now, run_id, *states.RESUMABLE],
            )
            if cursor.rowcount == 1:
                db.conn.execute("UPDATE controls SET taken = ? WHERE run_id = ? AND taken IS NULL", [now, run_id])
        return bool(cursor.rowcount == 1)

    def requeue_unclaimed(self, run_id: str) -> bool:
        """Put a starting run that no process has claimed back into the queue, as the first; True when it was one."""
        with self.exclusive() as db:
            cursor = db.conn.execute(
                f"UPDATE runs SET state = ?, place = {_FIRST_PLACE} WHERE id = ? AND pid IS NULL AND state IN (?, ?)",
                [states.QUEUED, run_id, states.STARTING, states.PAUSING],
            )
        return bool(cursor.rowcount == 1)

    def bin(self, run_id: str) -> None:
        """Put a finished run into the bin.

        Raises:
            UnknownError: there is no such run.
            StateError: it is queued or training, or in the bin already.
        """
        marks = ", ".join("?" * len(states.FINISHED))
        with self.exclusive() as db:
            cursor = db.conn.execute(
                "UPDATE runs SET deleted_at = ? WHERE id = ? AND deleted_at IS NULL AND mine(owner)"
                f" AND state IN ({marks})",
                [time.time(), run_id if is_run_id(run_id) else None, *states.FINISHED],
            )
        if cursor.rowcount == 1:
            return
        if self.run(run_id)["deleted_at"] is not None:
            raise StateError("The run is in the bin already.", "Take it out, or empty the bin.")
        raise StateError("A run that is queued or training cannot go to the bin.", "Stop it first.")

    def restore(self, run_id: str) -> None:
        """Take a run out of the bin."""
        self.run(run_id)
        self.update_run(run_id, deleted_at=None)

    def forget(self, run_id: str) -> None:
        """Remove a run in the bin with its events, for good."""
        self.run(run_id)
        with self.exclusive() as db:
            cursor = db.conn.execute("DELETE FROM runs WHERE id = ? AND deleted_at IS NOT NULL", [run_id])
            if cursor.rowcount != 1:
                raise StateError("Only a run in the bin can be removed for good.", "Delete it first.")
            for table in ("events", "controls", "scores", "run_tags"):
                db.conn.execute(f"DELETE FROM {table} WHERE run_id = ?", [run_id])

    # Events

    def add_event(self, run_id: str, event: Event) -> int:
        """One event of a run; the run's own step and losses follow it. Returns the event's id."""
        event = stamp(event)
        kind, step, moment = event["type"], event.get("step"), event["time"]
        data = {key: value for key, value in event.items() if key not in ("type", "step", "time")}
        changes: Row = {}
        if kind == "start":
            changes = {"total_steps": event.get("total_steps")}
        elif kind == "step":
            changes = {"step": step, "loss": event.get("loss")}
        elif kind == "eval":
            changes = {"eval_loss": event.get("loss")}
        elif kind == "done" and event.get("eval_loss") is not None:
            # Of what is kept, which with early stopping is not the last one.
            changes = {"eval_loss": event["eval_loss"]}
        with self.exclusive() as db:
            cursor = db.conn.execute(
                "INSERT INTO events (run_id, type, step, time, data) VALUES (?, ?, ?, ?, ?)",
                [run_id, kind, step, moment, json.dumps(data, ensure_ascii=False, default=str)],
            )
            if changes:
                assignments = ", ".join(f"{name} = ?" for name in changes)
                db.conn.execute(f"UPDATE runs SET {assignments} WHERE id = ?", [*changes.values(), run_id])
        return int(cursor.lastrowid or 0)

    def last_event_id(self, run_id: str) -> int:
        """The id of the run's newest event; 0 when there is none."""
        self.permit(run_id)
        row = self.db.execute("SELECT MAX(id) FROM events WHERE run_id = ?", [run_id]).fetchone()
        return int(row[0] or 0)

    def since(self, run_id: str, last_id: int = 0, types: Iterable[str] = ()) -> list[Event]:
        """Events after `last_id`, oldest first, each with its `id`."""
        self.permit(run_id)
        types = tuple(types)
        more = f" AND type IN ({', '.join('?' * len(types))})" if types else ""
        sql = f"SELECT * FROM events WHERE run_id = ? AND id > ?{more} ORDER BY id"
        return [_plain_event(row) for row in self._rows(sql, [run_id, last_id, *types])]

    def events_after(self, run_id: str, last_id: int) -> list[tuple[int, str, int | None, float, str]]:
        """Events after `last_id` as (id, type, step, time, the rest as JSON), oldest first; for whoever reads many."""
        self.permit(run_id)
        sql = "SELECT id, type, step, time, data FROM events WHERE run_id = ? AND id > ? ORDER BY id"
        rows: list[tuple[int, str, int | None, float, str]] = self.db.conn.execute(sql, [run_id, last_id]).fetchall()
        return rows

    def newest(self, run_id: str, kind: str) -> Event | None:
        """The run's newest event of one type."""
        self.permit(run_id)
        rows = self._rows("SELECT * FROM events WHERE run_id = ? AND type = ? ORDER BY id DESC LIMIT 1", [run_id, kind])
        return _plain_event(rows[0]) if rows else None

    def by_step(self, run_id: str, kind: str) -> list[Event]:
        """One event a step in order of steps: after a resume, the newest row of a repeated step counts."""
        self.permit(run_id)
        sql = (
            "SELECT * FROM events WHERE id IN (SELECT MAX(id) FROM events WHERE run_id = ? AND type = ?"
            " GROUP BY step) ORDER BY step"
        )
        return [_plain_event(row) for row in self._rows(sql, [run_id, kind])]

    # Controls

    def ask(self, run_id: str, command: str) -> None:
        """Leave a command for the worker, which looks once a step."""
        self.permit(run_id)
        if command not in COMMANDS:
            raise StateError(f"There is no command {str(command)[:40]!r}.", f"Known: {', '.join(COMMANDS)}.")
        self.db.execute(
            "INSERT INTO controls (run_id, command, created) VALUES (?, ?, ?)", [run_id, command, time.time()]
        )

    def take(self, run_id: str) -> str | None:
        """The oldest command not taken yet, marked as taken; None when there is none."""
        sql = "SELECT id, command FROM controls WHERE run_id = ? AND taken IS NULL ORDER BY id LIMIT 1"
        if self.db.execute(sql, [run_id]).fetchone() is None:
            return None
        with self.exclusive() as db:
            row = db.conn.execute(sql, [run_id]).fetchone()
            if row is None:
                return None
            db.conn.execute("UPDATE controls SET taken = ? WHERE id = ?", [time.time(), row[0]])
        return str(row[1])

    def last_asked(self, run_id: str, command: str) -> float | None:
        """When the newest `command` was left (seconds since the epoch)."""
        sql = "SELECT MAX(created) FROM controls WHERE run_id = ? AND command = ?"
        row = self.db.execute(sql, [run_id, command]).fetchone()
        return None if row[0] is None else float(row[0])

    def drop_commands(self, run_id: str) -> None:
        """Mark every open command as taken: a run that starts again must not obey yesterday's stop."""
        self.db.execute("UPDATE controls SET taken = ? WHERE run_id = ? AND taken IS NULL", [time.time(), run_id])

    # Data sets

    def save_dataset(self, row: Row) -> None:
        """Insert a data set, or change what `row` names of it."""
        plain = {
            name: json.dumps(value, ensure_ascii=False) if name in _JSON else value
            for name, value in {"file": row["id"], **row, "owner": visitors.owner()}.items()
        }
        names, changes = ", ".join(plain), ", ".join(f"{name} = excluded.{name}" for name in plain if name != "id")
        self.db.execute(
            f"INSERT INTO datasets ({names}) VALUES ({', '.join('?' * len(plain))})"
            f" ON CONFLICT (id) DO UPDATE SET {changes}",
            list(plain.values()),
        )

    def dataset(self, dataset_id: str) -> Row:
        """One data set.

        Raises:
            UnknownError: the id is malformed or names no data set.
        """
        known = isinstance(dataset_id, str) and DATASET_ID.fullmatch(dataset_id)
        found = self._rows("SELECT * FROM datasets WHERE id = ? AND mine(owner)", [dataset_id]) if known else []
        if not found:
            raise UnknownError(f"There is no data set {str(dataset_id)[:40]!r}.", "Add one on the Data page.")
        return _plain_dataset(found[0])

    def datasets(self) -> list[Row]:
        """Every data set, newest first; not those in the bin, nor versions that another stands for."""
        sql = "SELECT * FROM datasets WHERE deleted_at IS NULL AND replaced = 0 AND mine(owner)"
        sql += " ORDER BY created DESC, rowid DESC"
        return [_plain_dataset(row) for row in self._rows(sql)]


def free_colour(used: Sequence[str]) -> str:
    """A colour of the palette that the latest ones do not have; `used` is in order, the newest first."""
    return max(PALETTE, key=lambda shade: used.index(shade) if shade in used else len(used) + 1)


def new_run_id() -> str:
    """An id that no run has had."""
    return f"run-{secrets.token_hex(4)}"


def is_run_id(value: Any) -> bool:
    """Whether the value has the shape of a run's id."""
    return isinstance(value, str) and RUN_ID.fullmatch(value) is not None


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=30.0)
    for attempt in range(100):
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError:
            # SQLite's busy timeout does not cover this switch, which two processes may make at once.
            if attempt == 99:
                raise
            time.sleep(0.05)
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.create_function("mine", 1, visitors.mine)
    return connection


def _plain_run(row: Row) -> Row:
    return {**row, "spec": json.loads(row["spec"]), "error": json.loads(row["error"]) if row["error"] else None}


def _plain_event(row: Row) -> Event:
    return {**json.loads(row["data"]), "id": row["id"], "type": row["type"], "step": row["step"], "time": row["time"]}


def _plain_dataset(row: Row) -> Row:
    return {**row, **{name: json.loads(row[name] or "{}") for name in _JSON}}
