"""Presets of the person's own: a form's settings under a name, without its rows, kept for a home folder."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from studio import visitors
from studio.library import checked_name
from studio.store import Row, Store, UnknownError

KEPT = ("task", "model", "quantization", "full", "adapter", "training", "options")
"""Keys of a job that a preset holds; of `data` it holds `eval_split` alone."""


class OwnPresets:
    """The presets of one home folder."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def save(self, name: str, spec: Mapping[str, Any]) -> int:
        """Keep a job's settings under a name, in place of this task's preset of that name.

        Args:
            name: one line.
            spec: a job as plain data; what it learns from is not kept.

        Raises:
            ConfigError: the name cannot be one.
        """
        name = checked_name(name)
        recipe = {key: spec[key] for key in KEPT if key in spec} | {"eval_split": spec["data"]["eval_split"]}
        now = time.time()
        with self.store.exclusive() as db:
            db.conn.execute(
                "UPDATE presets SET deleted_at = ? WHERE name = ? AND task = ? AND mine(owner) AND deleted_at IS NULL",
                [now, name, spec["task"]],
            )
            cursor = db.conn.execute(
                "INSERT INTO presets (name, task, recipe, created, owner) VALUES (?, ?, ?, ?, ?)",
                [name, spec["task"], json.dumps(recipe, ensure_ascii=False), now, visitors.owner()],
            )
        return int(cursor.lastrowid or 0)

    def rows(self) -> list[Row]:
        """Every preset that is not deleted, by name."""
        sql = "SELECT id, name, task, created FROM presets WHERE mine(owner) AND deleted_at IS NULL"
        sql += " ORDER BY name COLLATE NOCASE, id"
        return list(self.store.db.query(sql))

    def spec(self, preset_id: Any) -> dict[str, Any]:
        """A preset as a job without rows; its name is the preset's.

        Raises:
            UnknownError: there is none of this id, or it was deleted.
        """
        row = self._row(preset_id)
        recipe = json.loads(row["recipe"])
        return {**recipe, "name": row["name"], "data": {"path": "", "eval_split": recipe.pop("eval_split")}}

    def delete(self, preset_id: Any) -> str:
        """Take a preset out of the list; `restore` brings it back. Returns its name.

        Raises:
            UnknownError: as `spec`.
        """
        row = self._row(preset_id)
        with self.store.exclusive() as db:
            db.conn.execute("UPDATE presets SET deleted_at = ? WHERE id = ?", [time.time(), row["id"]])
        return str(row["name"])

    def restore(self, preset_id: Any) -> None:
        """Undo `delete`; a preset that has the name by now takes its place."""
        if isinstance(preset_id, int):
            with self.store.exclusive() as db:
                db.conn.execute(
                    "UPDATE presets SET deleted_at = NULL WHERE id = ? AND mine(owner) AND NOT EXISTS (SELECT 1"
                    " FROM presets AS other WHERE other.name = presets.name AND other.task = presets.task"
                    " AND other.owner = presets.owner AND other.deleted_at IS NULL)",
                    [preset_id],
                )

    def _row(self, preset_id: Any) -> Row:
        sql = "SELECT * FROM presets WHERE id = ? AND mine(owner) AND deleted_at IS NULL"
        whole = isinstance(preset_id, int) and not isinstance(preset_id, bool) and abs(preset_id) < 2**53
        found = list(self.store.db.query(sql, [preset_id])) if whole else []
        if not found:
            raise UnknownError(f"There is no preset {str(preset_id)[:40]!r}.", "Choose one of the list.")
        row: Row = found[0]
        return row
