"""What visitors of the demo left is removed: everybody's at the start, later that of each who has stayed away."""

from __future__ import annotations

import logging
import shutil
import threading
import time

from engine.paths import inside
from studio import process, visitors
from studio.context import Studio
from studio.visitors import Visitors

logger = logging.getLogger("studio.sweeping")


class Sweeper:
    """Removes what visitors left: everybody's at the start, later that of each who has been away too long.

    Args:
        studio: the home folder.
        known: whom the server knows.
        keep: seconds after a visitor's last visit until their work goes.
    """

    def __init__(self, studio: Studio, known: Visitors, keep: float) -> None:
        self.studio = studio
        self.known = known
        self.keep = keep
        self._closing = threading.Event()

    def start(self, every: float = 60.0) -> None:
        """Sweep what an earlier server left, whose cookies nobody has any more, then look every so many seconds."""
        self.sweep(everything=True)
        threading.Thread(target=self._loop, args=(every,), name="sweeper", daemon=True).start()

    def close(self) -> None:
        """End the thread."""
        self._closing.set()

    def _loop(self, every: float) -> None:
        while not self._closing.wait(every):
            try:
                self.sweep()
            except Exception:
                logger.exception("Sweeping met an error; it goes on.")

    def sweep(self, everything: bool = False) -> int:
        """Remove the work of visitors who are gone, processes and files included; returns how many they were."""
        before = time.time() - self.keep
        with visitors.everyone():
            gone = [who for who, newest in self._owners() if everything or self._left(who, newest, before)]
            for visitor in gone:
                self._remove(visitor)
            for picture in (self.studio.home / "pictures").glob("*"):
                if everything or picture.stat().st_mtime < before:
                    picture.unlink(missing_ok=True)
        self.known.forget(before)
        return len(gone)

    def _left(self, visitor: str, newest: float, before: float) -> bool:
        return max(self.known.last_seen(visitor), newest) < before

    def _owners(self) -> list[tuple[str, float]]:
        """Whoever owns something, and when the newest of it was made."""
        parts = " UNION ALL ".join(f"SELECT owner, created FROM {name}" for name in self._tables())
        sql = f"SELECT owner, MAX(created) FROM ({parts}) WHERE owner <> '' GROUP BY owner"
        return [(str(who), float(made)) for who, made in self.studio.store.db.execute(sql).fetchall()]

    def _tables(self) -> list[str]:
        db = self.studio.store.db
        return [name for name in db.table_names() if {"owner", "created"} <= {it.name for it in db[name].columns}]

    def _remove(self, visitor: str) -> None:
        studio, db = self.studio, self.studio.store.db
        runs, works = (list(db.query(f"SELECT * FROM {it} WHERE owner = ?", [visitor])) for it in ("runs", "works"))
        scored = [it for row in runs for it in db.query("SELECT * FROM scores WHERE run_id = ?", [row["id"]])]
        # No worker may start on a run that is going away, nor write into a folder that is gone.
        db.execute("UPDATE runs SET deleted_at = ? WHERE owner = ?", [time.time(), visitor])
        for row in (*runs, *works, *scored):
            process.end(row["pid"], row["pid_started"], grace=5.0)
        folders = [studio.jobs.folder(row["id"]) for row in runs] + [studio.works.folder(row["id"]) for row in works]
        adapters = list(db.query("SELECT * FROM adapters WHERE owner = ?", [visitor]))
        folders += [studio.library.folder(row) for row in adapters]
        datasets = db.query("SELECT id FROM datasets WHERE owner = ?", [visitor])
        folders += [inside(studio.home / "datasets", row["id"]) for row in datasets]
        shared = db.query("SELECT id FROM comparisons WHERE owner = ?", [visitor])
        folders += [inside(studio.home / "shared", str(row["id"])) for row in shared]
        with studio.store.exclusive() as locked:
            own = "(SELECT file FROM datasets WHERE owner = ?)"
            locked.conn.execute(f"DELETE FROM dataset_events WHERE file IN {own}", [visitor])
            for row in runs:
                for name in ("events", "controls", "scores", "run_tags"):
                    locked.conn.execute(f"DELETE FROM {name} WHERE run_id = ?", [row["id"]])
            for name in self._tables():
                locked.conn.execute(f"DELETE FROM {name} WHERE owner = ?", [visitor])
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
