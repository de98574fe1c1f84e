"""Comparisons that were kept: answers and grids, those in the bin, and what was voted for blindly."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from studio import visitors
from studio.sqlite import Database
from studio.store import Row, Store, UnknownError

ANSWERS, GRID = "answers", "grid"
SHOWN = 20
UNVOTED = 86_400.0
"""Seconds after which nobody is expected to vote on a blind pair any more."""


class Comparisons:
    """The kept comparisons of one home folder.

    A row has `id`, `kind` (`answers` or `grid`), `base`, `prompt`, `picture` (the file that was asked about),
    `settings` (how it was sampled; of a grid its axes too), `results` (its columns, or its cells), `created` and
    `deleted_at`.

    Args:
        store: where they are kept.
        home: the folder whose `pictures` belong to them.
    """

    def __init__(self, store: Store, home: Path) -> None:
        self.store = store
        self.home = home

    def add(
        self,
        kind: str,
        base: str,
        prompt: str,
        settings: Mapping[str, Any],
        results: Sequence[Row],
        picture: str = "",
    ) -> int:
        """Keep one; returns its id."""
        values = [base, prompt, json.dumps(dict(settings)), _text(results), time.time(), kind, picture]
        values.append(visitors.owner())
        with self.store.exclusive() as db:
            cursor = db.conn.execute(
                "INSERT INTO comparisons (base, prompt, settings, results, created, kind, picture, owner)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                values,
            )
        return int(cursor.lastrowid or 0)

    def update(self, comparison: int, results: Sequence[Row]) -> None:
        """Keep more of one that is still being drawn."""
        self.store.db.execute(
            "UPDATE comparisons SET results = ? WHERE id = ? AND mine(owner)", [_text(results), comparison]
        )

    def get(self, comparison: Any) -> Row:
        """One of them, in the bin or not.

        Raises:
            UnknownError: there is none of this number.
        """
        whole = isinstance(comparison, int | float) and not isinstance(comparison, bool) and abs(comparison) < 2**53
        sql = "SELECT * FROM comparisons WHERE id = ? AND mine(owner)"
        rows = list(self.store.db.query(sql, [int(comparison)])) if whole else []
        if not rows:
            raise UnknownError(f"There is no comparison {str(comparison)[:40]!r}.", "Choose one of the list.")
        return _plain(rows[0])

    def rows(self, limit: int = SHOWN, deleted: bool = False) -> list[Row]:
        """The newest first; those in the bin when `deleted`."""
        where = "NOT NULL" if deleted else "NULL"
        sql = f"SELECT * FROM comparisons WHERE mine(owner) AND deleted_at IS {where} ORDER BY id DESC LIMIT ?"
        return [_plain(row) for row in self.store.db.query(sql, [limit])]

    def count(self, deleted: bool = False) -> int:
        """How many there are."""
        where = "NOT NULL" if deleted else "NULL"
        sql = f"SELECT COUNT(*) FROM comparisons WHERE mine(owner) AND deleted_at IS {where}"
        return int(self.store.db.execute(sql).fetchone()[0])

    def bin(self, comparison: Any) -> None:
        """Put one into the bin.

        Raises:
            UnknownError: there is none of this number.
        """
        row = self.get(comparison)
        sql = "UPDATE comparisons SET deleted_at = ? WHERE id = ? AND deleted_at IS NULL"
        self.store.db.execute(sql, [time.time(), row["id"]])

    def restore(self, comparison: Any) -> None:
        """Take one out of the bin.

        Raises:
            UnknownError: there is none of this number.
        """
        self.store.db.execute("UPDATE comparisons SET deleted_at = NULL WHERE id = ?", [self.get(comparison)["id"]])

    def empty_bin(self) -> int:
        """Remove those in the bin with their files, for good; returns how many. Pictures that others show stay."""
        with self.store.exclusive() as db:
            gone = list(db.query("SELECT * FROM comparisons WHERE deleted_at IS NOT NULL AND mine(owner)"))
            db.conn.execute("DELETE FROM comparisons WHERE deleted_at IS NOT NULL AND mine(owner)")
            kept = _showing(db)
        self._remove(gone, kept)
        for row in gone:
            shutil.rmtree(self.shared(row["id"]), ignore_errors=True)
        return len(gone)

    def forget_pairs(self, age: float = UNVOTED) -> int:
        """Remove everybody's blind pairs that have waited for a vote for so many seconds; returns how many."""
        with self.store.exclusive() as db:
            old, before = "choice IS NULL AND created < ?", [time.time() - age]
            gone = list(db.query(f"SELECT picture, sides AS results FROM votes WHERE {old}", before))
            db.conn.execute(f"DELETE FROM votes WHERE {old}", before)
            kept = _showing(db)
        self._remove(gone, kept)
        return len(gone)

    def forget_pictures(self, age: float = UNVOTED) -> int:
        """Remove pictures of so many seconds ago that nobody's comparison or blind pair shows; returns how many.

        Every picture that is drawn is written; where it is not kept, nothing else takes it away.
        """
        kept, before, gone = _showing(self.store.db), time.time() - age, 0
        # By name: the home folder may have been moved since.
        used = {Path(path).name for row in kept for path in _pictures(row)}
        for place in (self.home / "pictures").glob("*"):
            if place.name not in used and place.is_file() and place.stat().st_mtime < before:
                place.unlink(missing_ok=True)
                gone += 1
        return gone

    def _remove(self, gone: Sequence[Row], kept: Sequence[Row]) -> None:
        """Remove the pictures of what is gone, but those that others show."""
        used = {path for row in kept for path in _pictures(row)}
        folder = (self.home / "pictures").resolve()
        for path in {path for row in gone for path in _pictures(row)} - used:
            if Path(path).resolve().parent == folder:
                Path(path).unlink(missing_ok=True)

    def shared(self, comparison: int) -> Path:
        """The folder of the file that is given away of one."""
        return self.home / "shared" / str(int(comparison))


def _showing(db: Database) -> list[Row]:
    """Whatever shows pictures."""
    sql = "SELECT picture, results FROM comparisons UNION ALL SELECT picture, sides FROM votes"
    return list(db.query(sql))


def _pictures(row: Mapping[str, Any]) -> list[str]:
    return [path for path in (row["picture"], *(it.get("picture", "") for it in json.loads(row["results"]))) if path]


def _text(results: Sequence[Row]) -> str:
    return json.dumps(list(results), ensure_ascii=False)


def _plain(row: Row) -> Row:
    return {**row, "settings": json.loads(row["settings"]), "results": json.loads(row["results"])}
