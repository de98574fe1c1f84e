"""What is remembered of data sets beside their rows: versions, history, the runs that used them, the bin, storage."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.paths import inside
from studio import states
from studio.store import Row, StateError, Store

NAME = 120
"""Characters that a data set's name may have."""


def current(store: Store, file: str) -> Row | None:
    """The version that stands for a file now, also one in the bin."""
    sql = "SELECT id FROM datasets WHERE file = ? AND replaced = 0 ORDER BY created DESC LIMIT 1"
    found = store.db.execute(sql, [file]).fetchone()
    return store.dataset(found[0]) if found else None


def stand_in(store: Store, file: str, dataset_id: str) -> None:
    """Let one version stand for a file, and no other."""
    with store.exclusive() as db:
        db.conn.execute("UPDATE datasets SET replaced = (id <> ?) WHERE file = ?", [dataset_id, file])


def tell(store: Store, row: Row, kind: str, **told: Any) -> None:
    """One line of a file's history: `brought`, `again`, `read`, `fixed`, `unfixed`, `renamed`, `binned`, `restored`."""
    with store.exclusive() as db:
        db.conn.execute(
            "INSERT INTO dataset_events (file, dataset, time, kind, data) VALUES (?, ?, ?, ?, ?)",
            [row["file"], row["id"], time.time(), kind, json.dumps(told, ensure_ascii=False)],
        )


def history(store: Store, file: str) -> list[Row]:
    """What happened to a file, the latest first; each with its `kind`, `time`, `dataset` and what was told."""
    rows = store.db.query("SELECT * FROM dataset_events WHERE file = ? ORDER BY id DESC", [file])
    return [{**json.loads(row.pop("data")), **row} for row in rows]


def runs(store: Store, file: str) -> list[Row]:
    """The runs that learned from any version of a file, newest first; those in the bin are among them."""
    sql = (
        "SELECT id, name, state, colour, created, dataset, deleted_at FROM runs"
        " WHERE dataset IN (SELECT id FROM datasets WHERE file = ?) ORDER BY created DESC"
    )
    return list(store.db.query(sql, [file]))


def size(folder: Path, file: str) -> int:
    """Bytes that a file takes in the home folder."""
    return sum(path.stat().st_size for path in inside(folder, file).glob("*") if path.is_file())


def rename(store: Store, dataset_id: str, name: str) -> Row:
    """Give a data set another name; its file keeps its own.

    Raises:
        UnknownError: there is no such data set.
        ConfigError: the name is empty or too long.
    """
    row, name = store.dataset(dataset_id), (name or "").strip()
    if not name or len(name) > NAME or any(ord(mark) < 32 for mark in name):
        raise ConfigError(f"The name {name[:60]!r} cannot be used.", f"Give 1 to {NAME} characters on one line.")
    if name != row["name"]:
        with store.exclusive() as db:
            db.conn.execute("UPDATE datasets SET name = ? WHERE file = ?", [name, row["file"]])
        tell(store, row, "renamed", before=row["name"], name=name)
    return store.dataset(dataset_id)


def into_bin(store: Store, dataset_id: str) -> Row:
    """Put a data set, with all its versions, into the bin; the file stays until the bin is emptied.

    Raises:
        UnknownError: there is no such data set.
        StateError: a run that is queued, training or paused needs it, or it is in the bin already.
    """
    row = store.dataset(dataset_id)
    if row["deleted_at"] is not None:
        raise StateError("The data set is in the bin already.", "Take it out, or empty the bin.")
    waiting = [run["name"] for run in runs(store, row["file"]) if run["state"] in (*states.LIVE, states.PAUSED)]
    if waiting:
        names = ", ".join(waiting[:3]) + (", ..." if len(waiting) > 3 else "")
        raise StateError(
            f"{len(waiting)} of the runs that need {row['name']!r} have not ended: {names}.",
            "Stop them, or let them end, and then delete it.",
        )
    with store.exclusive() as db:
        db.conn.execute("UPDATE datasets SET deleted_at = ? WHERE file = ?", [time.time(), row["file"]])
    tell(store, row, "binned")
    return row


def take_out(store: Store, file: str) -> None:
    """Take a file's data set out of the bin, if it lies there."""
    row = current(store, file)
    if row is None or row["deleted_at"] is None:
        return
    with store.exclusive() as db:
        db.conn.execute("UPDATE datasets SET deleted_at = NULL WHERE file = ?", [file])
    tell(store, row, "restored")


def in_bin(store: Store) -> list[Row]:
    """The data sets in the bin, the latest first."""
    sql = "SELECT id FROM datasets WHERE deleted_at IS NOT NULL AND replaced = 0 AND mine(owner)"
    sql += " ORDER BY deleted_at DESC"
    return [store.dataset(row["id"]) for row in list(store.db.query(sql))]


def empty(store: Store, folder: Path) -> tuple[Sequence[Row], Sequence[Row]]:
    """Remove the data sets in the bin with their files, for good; one that a run still names is kept.

    Args:
        store: the database.
        folder: of the data sets.

    Returns:
        Those that are gone, and those that were kept.
    """
    gone: list[Row] = []
    kept: list[Row] = []
    for row in in_bin(store):
        if runs(store, row["file"]):
            kept.append(row)
            continue
        with store.exclusive() as db:
            db.conn.execute("DELETE FROM datasets WHERE file = ?", [row["file"]])
            db.conn.execute("DELETE FROM dataset_events WHERE file = ?", [row["file"]])
        shutil.rmtree(inside(folder, row["file"]), ignore_errors=True)
        gone.append(row)
    return gone, kept
