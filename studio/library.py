"""The library of adapters: those of runs, imported ones, and those made of others; and mixes of them, by name.

What a list shows stands in the table `adapters`, written once for each adapter; no file is opened to list them.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, ConfigError, EngineError
from engine.models.catalogue import canonical
from engine.paths import inside
from studio import adapter_files, process, scores, states, visitors
from studio.jobs import Jobs
from studio.store import Row, StateError, Store, UnknownError, free_colour

ADAPTER_ID = re.compile(r"ad-[0-9a-f]{8}")
RUN, IMPORTED, MIXED, RESIZED = "run", "imported", "mixed", "resized"
PAGE = 24
_LONGEST_NAME = 120
# An adapter whose run is in the bin, or gone, is not there; one of no run has no row in `runs`.
_LISTED = "mine(a.owner) AND a.present = 1 AND (a.run_id IS NULL OR (r.id IS NOT NULL AND r.deleted_at IS NULL))"
_FROM = "FROM adapters a LEFT JOIN runs r ON r.id = a.run_id LEFT JOIN datasets d ON d.id = r.dataset"
_FIELDS = "a.*, r.dataset AS dataset, d.name AS data_name"


class Library:
    """The adapters of one home folder.

    Args:
        store: where they are kept.
        jobs: where the runs lie.
    """

    def __init__(self, store: Store, jobs: Jobs) -> None:
        self.store = store
        self.jobs = jobs
        self.home = jobs.home

    # What there is

    def sync(self) -> None:
        """Take in the adapters of runs that have ended since the last look."""
        marks = ", ".join("?" * len(states.FINISHED))
        rows = self.store.db.query(
            f"SELECT r.* FROM runs r LEFT JOIN adapters a ON a.run_id = r.id WHERE r.state IN ({marks})"
            " AND r.deleted_at IS NULL AND (a.id IS NULL OR a.run_ended IS NOT r.ended)",
            list(states.FINISHED),
        )
        for row in list(rows):
            with visitors.acting(row["owner"]):
                self._take_in(row)

    def _take_in(self, run: Row) -> None:
        folder, found = self.jobs.folder(run["id"]) / "adapter", None
        try:
            found = adapter_files.facts(folder) if self.jobs.has_adapter(run["id"]) else None
        except EngineError:
            # Damaged: it is nothing that could be used.
            found = None
        values: Row = {"present": 0, "base": run["model"], "task": run["task"], "method": run["method"]}
        if found is not None:
            values |= _columns(found)
            values |= {"present": 1, "details": json.dumps({"whole": found.whole})}
        values |= {"run_ended": run["ended"]}
        with self.store.exclusive() as db:
            known = next(iter(db.query("SELECT id FROM adapters WHERE run_id = ?", [run["id"]])), None)
            if known is None:
                values |= {"id": new_adapter_id(), "name": run["name"], "origin": RUN, "run_id": run["id"]}
                values |= {"colour": run["colour"], "created": run["ended"] or time.time(), "owner": run["owner"]}
                names = ", ".join(values)
                db.conn.execute(
                    f"INSERT INTO adapters ({names}) VALUES ({', '.join('?' * len(values))})", list(values.values())
                )
            else:
                assignments = ", ".join(f"{name} = ?" for name in values)
                db.conn.execute(f"UPDATE adapters SET {assignments} WHERE id = ?", [*values.values(), known["id"]])

    def rows(self, search: str = "", base: str = "", deleted: bool = False, limit: int | None = None) -> list[Row]:
        """Adapters, newest first, each with `score` and `dataset`; those in the bin when `deleted`.

        Args:
            search: every word of it has to be in the name, base, method, targets, or the data set's name.
            base: of this base only.
            limit: at most so many.
        """
        self.sync()
        where, values = self._where(search, base, deleted)
        sql = f"SELECT {_FIELDS} {_FROM} WHERE {where} ORDER BY a.created DESC, a.rowid DESC"
        rows = list(self.store.db.query(sql + (f" LIMIT {int(limit)}" if limit is not None else ""), values))
        told = self._scores([row["run_id"] for row in rows if row["run_id"]])
        return [_plain(row, told) for row in rows]

    def count(self, search: str = "", base: str = "", deleted: bool = False) -> int:
        """How many `rows` would give without a limit."""
        where, values = self._where(search, base, deleted)
        return int(self.store.db.execute(f"SELECT COUNT(*) {_FROM} WHERE {where}", values).fetchone()[0])

    def bases(self) -> list[str]:
        """The bases that listed adapters belong to, the newest adapter's first."""
        sql = f"SELECT a.base, MAX(a.created) {_FROM} WHERE {_LISTED} AND a.deleted_at IS NULL GROUP BY a.base"
        return [row[0] for row in sorted(self.store.db.execute(sql).fetchall(), key=lambda row: -row[1])]

    def _where(self, search: str, base: str, deleted: bool) -> tuple[str, list[Any]]:
        parts = [_LISTED, f"a.deleted_at IS {'NOT NULL' if deleted else 'NULL'}"]
        values: list[Any] = []
        for word in str(search or "")[:200].split():
            within = "a.name || ' ' || a.base || ' ' || a.method || ' ' || a.targets || ' ' || COALESCE(d.name, '')"
            parts.append(f"({within}) LIKE ? ESCAPE '\\'")
            values.append("%" + re.sub(r"([\\%_])", r"\\\1", word) + "%")
        if base:
            parts.append("a.base = ?")
            values.append(base)
        return " AND ".join(parts), values

    def _scores(self, runs: Sequence[str]) -> dict[str, Row]:
        """Run -> the score that tells most: metric, the adapter's value, the base's."""
        if not runs:
            return {}
        sql = (
            "SELECT run_id, json_extract(result, '$.scores') AS scores FROM scores WHERE id IN"
            " (SELECT MAX(id) FROM scores WHERE state = ? GROUP BY run_id)"
        )
        wanted, found = set(runs), {}
        for row in self.store.db.query(sql, [states.DONE]):
            if row["run_id"] not in wanted:
                continue
            for name, pair in scores.sides({"scores": json.loads(row["scores"] or "[]")}).items():
                value = pair.get("adapter", {}).get("value")
                if value is not None:
                    base = pair.get("base", {}).get("value")
                    found[row["run_id"]] = {"metric": name, "value": value, "base": base}
                    break
        return found

    def get(self, adapter_id: str) -> Row:
        """One adapter, in the bin or not.

        Raises:
            UnknownError: the id is malformed or names no adapter.
        """
        known = isinstance(adapter_id, str) and ADAPTER_ID.fullmatch(adapter_id)
        sql = f"SELECT {_FIELDS} {_FROM} WHERE a.id = ? AND {_LISTED}"
        found = list(self.store.db.query(sql, [adapter_id])) if known else []
        if not found:
            raise UnknownError(f"There is no adapter {str(adapter_id)[:40]!r}.", "Choose one on the Adapters page.")
        return _plain(found[0], self._scores([found[0]["run_id"]] if found[0]["run_id"] else []))

    def of_run(self, run_id: str) -> Row | None:
        """The adapter that a run left, if it is listed."""
        self.sync()
        found = list(self.store.db.query("SELECT id FROM adapters WHERE run_id = ? AND present = 1", [run_id]))
        return self.get(found[0]["id"]) if found else None

    def usable(self, adapter_id: str) -> Row:
        """One adapter that is not in the bin and whose files are there.

        Raises:
            UnknownError, StateError, CheckpointError: it is not.
        """
        row = self.get(adapter_id)
        if row["deleted_at"] is not None:
            raise StateError(f"The adapter {row['name']!r} is in the bin.", "Take it out first.")
        if not (self.folder(row) / adapter_files.CONFIG).is_file():
            raise CheckpointError(f"The files of {row['name']!r} are gone from the home folder.", "Delete it.")
        return row

    def folder(self, row: Mapping[str, Any]) -> Path:
        """Where an adapter's files lie."""
        if row["run_id"]:
            return self.jobs.folder(row["run_id"]) / "adapter"
        return inside(self.home / "adapters", row["id"])

    def version(self, row: Mapping[str, Any]) -> str:
        """A name for the adapter as it is on disk now: one that was trained on must not answer with its older self."""
        return f"{row['id']}-{(self.folder(row) / adapter_files.CONFIG).stat().st_mtime_ns}"

    # What changes

    def add(self, draft: Path, name: str, origin: str, base: str, task: str, details: Row | None = None) -> str:
        """Move a folder in PEFT's format into the library; returns its id.

        Raises:
            CheckpointError: it is no adapter.
            ConfigError: the name cannot be one.
        """
        name = checked_name(name)
        found = adapter_files.facts(draft)
        adapter_id = new_adapter_id()
        place = inside(self.home / "adapters", adapter_id)
        place.parent.mkdir(parents=True, exist_ok=True)
        draft.rename(place)
        used = [row["colour"] for row in self.store.db.query("SELECT colour FROM adapters ORDER BY created DESC")]
        values = {
            **_columns(found),
            "id": adapter_id,
            "name": name,
            "origin": origin,
            "base": canonical(base),
            "task": task,
            "colour": free_colour(used),
            "details": json.dumps({"whole": found.whole, **(details or {})}, ensure_ascii=False),
            "created": time.time(),
            "owner": visitors.owner(),
        }
        with self.store.exclusive() as db:
            db.conn.execute(
                f"INSERT INTO adapters ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})",
                list(values.values()),
            )
        return adapter_id

    def rename(self, adapter_id: str, name: str) -> None:
        """Give an adapter another name.

        Raises:
            UnknownError, ConfigError: there is no such adapter, or the name is empty or too long.
        """
        self.get(adapter_id)
        name = checked_name(name)
        self.store.db.execute("UPDATE adapters SET name = ? WHERE id = ?", [name, adapter_id])

    def bin(self, adapter_id: str) -> None:
        """Put an adapter into the bin; its files stay until the bin is emptied.

        Raises:
            UnknownError: there is no such adapter.
            StateError: it is in the bin already, or its run is training.
        """
        row = self.get(adapter_id)
        if row["run_id"] and self.store.run(row["run_id"])["state"] in states.LIVE:
            raise StateError(f"The run of {row['name']!r} is queued or training.", "Stop it first.")
        with self.store.exclusive() as db:
            cursor = db.conn.execute(
                "UPDATE adapters SET deleted_at = ? WHERE id = ? AND deleted_at IS NULL", [time.time(), adapter_id]
            )
        if cursor.rowcount != 1:
            raise StateError("The adapter is in the bin already.", "Take it out, or empty the bin.")

    def restore(self, adapter_id: str) -> None:
        """Take an adapter out of the bin.

        Raises:
            UnknownError: there is no such adapter.
        """
        self.get(adapter_id)
        self.store.db.execute("UPDATE adapters SET deleted_at = NULL WHERE id = ?", [adapter_id])

    def empty_bin(self) -> int:
        """Remove the adapters in the bin with their files, for good; returns how many.

        One stays whose run is training, and all while work on adapters is under way. A run whose adapter is removed
        keeps its curve and its settings.
        """
        if any(process.alive(row["pid"], row["pid_started"]) for row in self._working()):
            return 0
        removed = 0
        for row in self.rows(deleted=True):
            if row["run_id"] and self.store.run(row["run_id"])["state"] in states.LIVE:
                continue
            with self.store.exclusive() as db:
                cursor = db.conn.execute("DELETE FROM adapters WHERE id = ? AND deleted_at IS NOT NULL", [row["id"]])
            if cursor.rowcount == 1:
                shutil.rmtree(self.folder(row), ignore_errors=True)
                removed += 1
        return removed

    def _working(self) -> list[Row]:
        live = [states.STARTING, states.RUNNING]
        return list(self.store.db.query("SELECT * FROM works WHERE state IN (?, ?)", live))

    # Mixes

    def save_mix(self, name: str, base: str, parts: Sequence[tuple[str, float]], settings: Mapping[str, Any]) -> int:
        """Keep adapters, weights and type under a name; a mix of that name is replaced. Returns its id.

        Raises:
            ConfigError: the name cannot be one.
        """
        values = [checked_name(name), base, json.dumps(list(parts)), json.dumps(dict(settings)), time.time()]
        values.append(visitors.owner())
        with self.store.exclusive() as db:
            db.conn.execute(
                "INSERT INTO mixes (name, base, parts, settings, created, owner) VALUES (?, ?, ?, ?, ?, ?)"
                " ON CONFLICT(owner, name) DO UPDATE SET base = excluded.base, parts = excluded.parts,"
                " settings = excluded.settings, created = excluded.created",
                values,
            )
            found = db.conn.execute(
                "SELECT id FROM mixes WHERE name = ? AND owner = ?", [values[0], values[-1]]
            ).fetchone()
        return int(found[0])

    def mixes(self) -> list[Row]:
        """Every mix, by name."""
        sql = "SELECT * FROM mixes WHERE mine(owner) ORDER BY name COLLATE NOCASE"
        return [_plain_mix(row) for row in self.store.db.query(sql)]

    def mix(self, mix_id: int) -> Row:
        """One mix, its `parts` without adapters that are gone; `missing` counts those.

        Raises:
            UnknownError: there is no such mix.
        """
        whole = isinstance(mix_id, int | float) and not isinstance(mix_id, bool) and abs(mix_id) < 2**53
        found = (
            list(self.store.db.query("SELECT * FROM mixes WHERE id = ? AND mine(owner)", [int(mix_id)]))
            if whole
            else []
        )
        if not found:
            raise UnknownError(f"There is no mix {str(mix_id)[:40]!r}.", "Choose one of the list.")
        row, there = _plain_mix(found[0]), []
        for adapter_id, weight in row["parts"]:
            try:
                there.append((self.usable(adapter_id)["id"], weight))
            except EngineError:
                continue
        return {**row, "parts": there, "missing": len(row["parts"]) - len(there)}

    def forget_mix(self, mix_id: int) -> None:
        """Remove a mix; its adapters stay.

        Raises:
            UnknownError: there is no such mix.
        """
        self.store.db.execute("DELETE FROM mixes WHERE id = ?", [self.mix(mix_id)["id"]])


def checked_name(name: Any) -> str:
    """A name that a person gave, without space around it.

    Raises:
        ConfigError: it is no text, empty, too long, or has line breaks or control characters.
    """
    text = name.strip() if isinstance(name, str) else ""
    if not text or len(text) > _LONGEST_NAME or any(ord(letter) < 32 for letter in text):
        raise ConfigError(
            f"The name is {str(name)[:40]!r}; needed: 1 to {_LONGEST_NAME} letters in one line.", "Give it a name."
        )
    return text


def new_adapter_id() -> str:
    """An id that no adapter has had."""
    return f"ad-{secrets.token_hex(4)}"


def _columns(found: adapter_files.Facts) -> Row:
    names = ("method", "rank", "targets", "parameters", "bytes")
    return {name: getattr(found, name) for name in names}


def _plain(row: Row, told: Mapping[str, Row]) -> Row:
    return {**row, "details": json.loads(row["details"] or "{}"), "score": told.get(row["run_id"] or "")}


def _plain_mix(row: Row) -> Row:
    parts = [(str(adapter), float(weight)) for adapter, weight in json.loads(row["parts"])]
    return {**row, "parts": parts, "settings": json.loads(row["settings"])}
