"""Every run that there was: found by words, tags and state, in any order, so many at a time; tags, names, small curves.

No file is opened to list runs: what a list shows stands in the table `runs`, its small curve (`spark`) too.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError
from studio import states
from studio.i18n import N_, t
from studio.library import checked_name
from studio.points import Points
from studio.store import Row, Store

PAGE = 25
SPARK_POINTS = 60
MOST_TAGS = 12
MOST_ROWS = 2000
_LONGEST_TAG = 32

GROUPS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "": (N_("any state"), states.ALL),
    "live": (N_("waiting or training"), states.LIVE),
    "done": (N_("done"), (states.DONE,)),
    "kept": (N_("paused or stopped"), (states.PAUSED, states.STOPPED)),
    "failed": (N_("failed or lost"), (states.FAILED, states.LOST)),
}
"""What the list can be narrowed to: key -> (words, states)."""


@dataclass(frozen=True)
class Column:
    """A column that the list can be ordered by.

    Attributes:
        sql: what is ordered by.
        up: what the order from the smallest is called.
        down: what the other one is called.
        first: which of both comes first when the column is chosen.
    """

    sql: str
    up: str
    down: str
    first: str = "up"


COLUMNS: Mapping[str, Column] = {
    "created": Column("r.created", N_("oldest first"), N_("newest first"), "down"),
    "name": Column("r.name COLLATE NOCASE", N_("name, A to Z"), N_("name, Z to A")),
    "state": Column("r.state", N_("state, A to Z"), N_("state, Z to A")),
    "base": Column("r.model COLLATE NOCASE", N_("base, A to Z"), N_("base, Z to A")),
    "method": Column("r.method", N_("method, A to Z"), N_("method, Z to A")),
    "data": Column("d.name COLLATE NOCASE", N_("data set, A to Z"), N_("data set, Z to A")),
    "loss": Column("COALESCE(r.eval_loss, r.loss)", N_("lowest loss first"), N_("highest loss first")),
    "time": Column("COALESCE(r.ended, :now) - r.started", N_("shortest first"), N_("longest first"), "down"),
    "steps": Column("r.step", N_("fewest steps first"), N_("most steps first"), "down"),
    "size": Column("r.bytes", N_("smallest first"), N_("largest first"), "down"),
}


@dataclass(frozen=True)
class Wanted:
    """What of the history is asked for.

    Attributes:
        search: every word of it has to be in the name, base, method, data set's name or a tag.
        state: a key of `GROUPS`.
        sort: a column of `COLUMNS` with `-up` or `-down`.
        limit: at most so many.

    Raises:
        ConfigError: with every value that cannot be.
    """

    search: str = ""
    state: str = ""
    sort: str = "created-down"
    limit: int = PAGE

    def __post_init__(self) -> None:
        found = []
        if not isinstance(self.search, str):
            found.append(f"search is {str(self.search)[:40]!r}; needed: words")
        if not isinstance(self.state, str) or self.state not in GROUPS:
            known = ", ".join(filter(None, GROUPS))
            found.append(f"state is {str(self.state)[:40]!r}; needed: one of {known}, or nothing")
        if self.sort not in sort_keys():
            found.append(f"sort is {str(self.sort)[:40]!r}; needed: one of {', '.join(COLUMNS)} with -up or -down")
        if isinstance(self.limit, bool) or not isinstance(self.limit, int) or not 1 <= self.limit <= MOST_ROWS:
            found.append(f"limit is {str(self.limit)[:40]!r}; needed: 1 to {MOST_ROWS}")
        if found:
            raise ConfigError("The runs cannot be listed so:\n" + "\n".join(f"- {fault}" for fault in found))

    def turned(self, column: str) -> str:
        """The sort that a click on a column's head asks for: the column's first way, then the other."""
        first = COLUMNS[column].first
        other = "down" if first == "up" else "up"
        return f"{column}-{other if self.sort == f'{column}-{first}' else first}"


def sort_keys() -> list[str]:
    """Every value of `Wanted.sort`, the usual way of a column first."""
    return [
        f"{name}-{way}"
        for name, column in COLUMNS.items()
        for way in (("up", "down") if column.first == "up" else ("down", "up"))
    ]


def sorts() -> list[tuple[str, str]]:
    """Every order as (words, key)."""
    return [(told(key), key) for key in sort_keys()]


def told(key: str) -> str:
    """What an order is called."""
    column, _, way = key.rpartition("-")
    words = COLUMNS[column].up if way == "up" else COLUMNS[column].down
    return t(words)


class History:
    """The runs of one home folder, as lists show them."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def rows(self, wanted: Wanted) -> list[Row]:
        """Runs outside the bin, each with `data_name`, `tags` and `curve` (the small one's points)."""
        where, values = self._where(wanted)
        column, _, way = wanted.sort.rpartition("-")
        order = f"{COLUMNS[column].sql} {'ASC' if way == 'up' else 'DESC'} NULLS LAST"
        found = list(
            self.store.db.query(
                "SELECT r.*, d.name AS data_name FROM runs r LEFT JOIN datasets d ON d.id = r.dataset"
                f" WHERE {where} ORDER BY {order}, r.created DESC, r.rowid DESC LIMIT :limit",
                {**values, "now": time.time(), "limit": wanted.limit},
            )
        )
        tags, curves = self.tags_of([row["id"] for row in found]), self._curves(found)
        return [{**row, "tags": tags.get(row["id"], []), "curve": curves[row["id"]]} for row in found]

    def count(self, wanted: Wanted) -> int:
        """How many `rows` would give without a limit."""
        where, values = self._where(wanted)
        sql = f"SELECT COUNT(*) FROM runs r LEFT JOIN datasets d ON d.id = r.dataset WHERE {where}"
        return int(self.store.db.execute(sql, values).fetchone()[0])

    def binned(self) -> list[tuple[str, str]]:
        """The runs in the bin as (name, id), the latest first."""
        sql = "SELECT name, id FROM runs WHERE deleted_at IS NOT NULL AND mine(owner)"
        sql += " ORDER BY deleted_at DESC, rowid DESC"
        return [(str(name), str(run_id)) for name, run_id in self.store.db.execute(sql).fetchall()]

    def moment(self) -> list[Any]:
        """A value that changes when anything that a list shows has changed; cheap, for a timer."""
        db = self.store.db
        marks = ", ".join("?" * len(states.LIVE))
        live = db.execute(
            f"SELECT id, state, step, place FROM runs WHERE deleted_at IS NULL AND mine(owner)"
            f" AND state IN ({marks}) ORDER BY id",
            list(states.LIVE),
        ).fetchall()
        rest = "COUNT(*), COUNT(deleted_at), MAX(created), MAX(ended), MAX(deleted_at), MAX(measured)"
        return [*map(list, live), list(db.execute(f"SELECT {rest} FROM runs WHERE mine(owner)").fetchone())]

    def _where(self, wanted: Wanted) -> tuple[str, dict[str, Any]]:
        parts, values = ["r.deleted_at IS NULL AND mine(r.owner)"], {}
        if wanted.state:
            names = ", ".join(f"'{state}'" for state in GROUPS[wanted.state][1])
            parts.append(f"r.state IN ({names})")
        within = "r.name || ' ' || r.model || ' ' || r.method || ' ' || COALESCE(d.name, '')"
        for number, word in enumerate(wanted.search[:200].split()):
            values[f"word{number}"] = "%" + re.sub(r"([\\%_])", r"\\\1", word) + "%"
            like = f"LIKE :word{number} ESCAPE '\\'"
            tagged = f"EXISTS (SELECT 1 FROM run_tags g WHERE g.run_id = r.id AND g.tag {like})"
            parts.append(f"(({within}) {like} OR {tagged})")
        return " AND ".join(parts), values

    # Small curves

    def _curves(self, rows: Sequence[Row]) -> dict[str, Points]:
        """Run -> its loss in at most `SPARK_POINTS` means; made anew only for runs that have moved on since."""
        found, made = {}, []
        for row in rows:
            key = f"{row['step']} {row['ended']}"
            if row["spark_at"] == key:
                points = json.loads(row["spark"] or "[]")
            else:
                points = self._means(row["id"])
                made.append((json.dumps(points), key, row["id"]))
            found[row["id"]] = [(float(x), float(y)) for x, y in points]
        if made:
            with self.store.exclusive() as db:
                db.conn.executemany("UPDATE runs SET spark = ?, spark_at = ? WHERE id = ?", made)
        return found

    def _means(self, run_id: str) -> list[list[float]]:
        last = self.store.db.execute(
            "SELECT MAX(step) FROM events WHERE run_id = ? AND type = 'step'", [run_id]
        ).fetchone()[0]
        width = max(1, -(-int(last or 0) // SPARK_POINTS))
        rows = self.store.db.execute(
            "SELECT MAX(step), AVG(json_extract(data, '$.loss')) AS mean FROM events WHERE run_id = ? AND type = 'step'"
            " GROUP BY (step - 1) / ? HAVING mean IS NOT NULL ORDER BY 1",
            [run_id, width],
        ).fetchall()
        return [[step, float(f"{mean:.6g}")] for step, mean in rows]

    # Names and tags

    def rename(self, run_id: str, name: Any) -> None:
        """Give a run another name; its adapter follows unless it has been given a name of its own.

        Raises:
            UnknownError: there is no such run.
            ConfigError: the name cannot be one.
        """
        row, name = self.store.run(run_id), checked_name(name)
        with self.store.exclusive() as db:
            db.conn.execute("UPDATE runs SET name = ? WHERE id = ?", [name, run_id])
            db.conn.execute("UPDATE adapters SET name = ? WHERE run_id = ? AND name = ?", [name, run_id, row["name"]])

    def tags_of(self, run_ids: Iterable[str]) -> dict[str, list[str]]:
        """Run -> its tags, by the alphabet; runs without any are left out."""
        ids = list(run_ids)
        marks = ", ".join("?" * len(ids))
        sql = f"SELECT run_id, tag FROM run_tags WHERE run_id IN ({marks}) ORDER BY tag"
        found: dict[str, list[str]] = {}
        for run_id, tag in self.store.db.execute(sql, ids).fetchall():
            found.setdefault(run_id, []).append(tag)
        return found

    def known_tags(self) -> list[str]:
        """Every tag of a run outside the bin, the most used first."""
        sql = (
            "SELECT g.tag, COUNT(*) FROM run_tags g JOIN runs r ON r.id = g.run_id WHERE mine(r.owner)"
            " AND r.deleted_at IS NULL"
            " GROUP BY g.tag ORDER BY 2 DESC, 1"
        )
        return [tag for tag, _ in self.store.db.execute(sql).fetchall()]

    def add_tags(self, run_id: str, tags: Any) -> list[str]:
        """Give a run more tags (upper and lower case count as one); answers all that it has.

        Raises:
            UnknownError: there is no such run.
            ConfigError: a tag cannot be one, or there would be too many.
        """
        self.store.run(run_id)
        wanted = [checked_tag(tag) for tag in _listed(tags)]
        with self.store.exclusive() as db:
            db.conn.executemany("INSERT OR IGNORE INTO run_tags VALUES (?, ?)", [(run_id, tag) for tag in wanted])
            count = db.conn.execute("SELECT COUNT(*) FROM run_tags WHERE run_id = ?", [run_id]).fetchone()[0]
            if count > MOST_TAGS:
                raise ConfigError(f"The run would have {count} tags; at most {MOST_TAGS}.", "Take some off first.")
        return self.tags_of([run_id]).get(run_id, [])

    def remove_tags(self, run_id: str, tags: Any) -> list[str]:
        """Take tags off a run; answers those that stay.

        Raises:
            UnknownError: there is no such run.
            ConfigError: `tags` is no list of words.
        """
        self.store.run(run_id)
        gone = [(run_id, str(tag)) for tag in _listed(tags)]
        with self.store.exclusive() as db:
            db.conn.executemany("DELETE FROM run_tags WHERE run_id = ? AND tag = ?", gone)
        return self.tags_of([run_id]).get(run_id, [])


def checked_tag(tag: Any) -> str:
    """A tag that a person gave, without space around it.

    Raises:
        ConfigError: it is no text, empty, too long, or has commas or control characters.
    """
    text = " ".join(tag.split()) if isinstance(tag, str) else ""
    if not text or len(text) > _LONGEST_TAG or "," in text or any(ord(letter) < 32 for letter in text):
        raise ConfigError(
            f"The tag is {str(tag)[:40]!r}; needed: 1 to {_LONGEST_TAG} letters without a comma.", "Give it a word."
        )
    return text


def _listed(tags: Any) -> list[Any]:
    if isinstance(tags, str):
        return [part for part in tags.split(",") if part.strip()]
    if not isinstance(tags, list | tuple):
        raise ConfigError(f"The tags are {str(tags)[:40]!r}; needed: a list of words.")
    return list(tags)
