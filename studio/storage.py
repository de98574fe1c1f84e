"""How much room the runs' folders take, measured by a thread of its own, so that no page waits for a disk.

What was found stands in the table `runs` (`bytes`, `measured`); a list shows what is known and asks for the rest.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from studio import states, visitors
from studio.store import Row, Store

logger = logging.getLogger("studio.storage")

LIVE_EVERY = 15.0
"""Seconds after which the folder of a run that trains is measured again."""
EVERY = 900.0
"""The same for any other: evaluations and exports may have added to it."""


class Room(NamedTuple):
    """Bytes in all: of the runs that are listed, of those in the bin, and how many runs were never measured."""

    listed: int
    binned: int
    unknown: int


class Storage:
    """The sizes of one home folder's runs.

    Args:
        store: where they are kept.
        folder: id -> the folder of that run.
    """

    def __init__(self, store: Store, folder: Callable[[str], Path]) -> None:
        self.store = store
        self.folder = folder
        self._lock = threading.Lock()
        self._asked: dict[str, None] = {}
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether something is being measured."""
        return self._thread is not None

    def refresh(self, rows: Iterable[Row]) -> None:
        """Have those of the rows measured again whose size is unknown or old, and every run that never was."""
        now = time.time()
        old = [row["id"] for row in rows if _is_old(row, now)]
        never = self.store.db.execute("SELECT id FROM runs WHERE measured IS NULL").fetchall()
        self._ask([*old, *(run_id for (run_id,) in never)])

    def measure(self, run_ids: Sequence[str]) -> int:
        """Measure these runs now, and answer their bytes in all."""
        return sum(self._measure(run_id) for run_id in run_ids)

    def room(self) -> Room:
        """What is known of the whole."""
        row = self.store.db.execute(
            "SELECT COALESCE(SUM(CASE WHEN deleted_at IS NULL THEN bytes END), 0),"
            " COALESCE(SUM(CASE WHEN deleted_at IS NOT NULL THEN bytes END), 0), SUM(measured IS NULL) FROM runs"
            " WHERE mine(owner)"
        ).fetchone()
        return Room(int(row[0]), int(row[1]), int(row[2] or 0))

    def _ask(self, run_ids: Sequence[str]) -> None:
        with self._lock:
            self._asked |= dict.fromkeys(run_ids)
            if self._asked and self._thread is None:
                self._thread = threading.Thread(target=self._work, name="storage", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        try:
            while True:
                with self._lock:
                    if not self._asked:
                        self._thread = None
                        return
                    run_id = next(iter(self._asked))
                    del self._asked[run_id]
                with visitors.everyone():
                    self._measure(run_id)
        except Exception:
            logger.exception("The sizes of runs could not be measured.")
            with self._lock:
                self._asked.clear()
                self._thread = None
        finally:
            self.store.close()

    def _measure(self, run_id: str) -> int:
        count = folder_bytes(self.folder(run_id))
        self.store.update_run(run_id, bytes=count, measured=time.time())
        return count


def folder_bytes(folder: Path | str) -> int:
    """Bytes of the files in a folder and below it; links are not followed, and what vanishes meanwhile is left out."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    total += folder_bytes(entry.path)
                else:
                    total += entry.stat(follow_symlinks=False).st_size
    return total


def _is_old(row: Row, now: float) -> bool:
    if row["measured"] is None:
        return True
    if row["state"] in states.ACTIVE:
        return bool(now - row["measured"] > LIVE_EVERY)
    return bool(row["measured"] < (row["ended"] or 0.0) or now - row["measured"] > EVERY)
