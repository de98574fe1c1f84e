"""The tables, as ordered, named migrations. A migration that has shipped is never edited; a new one follows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from studio.sqlite import Database, Migrations, Table

migrations = Migrations("studio")


Step = Callable[[Database], None]


def _step(name: str) -> Callable[[Step], Step]:
    return cast(Callable[[Step], Step], migrations(name=name))


def _table(db: Database, name: str) -> Table:
    return cast(Table, db[name])


@_step("0001_runs_and_events")
def runs_and_events(db: Database) -> None:
    _table(db, "runs").create(
        {
            "id": str,
            "name": str,
            "state": str,
            "task": str,
            "model": str,
            "method": str,
            "dataset": str,
            "colour": str,
            "spec": str,
            "resume": int,
            "step": int,
            "total_steps": int,
            "loss": float,
            "eval_loss": float,
            "created": float,
            "queued": float,
            "started": float,
            "ended": float,
            "pid": int,
            "pid_started": float,
            "error": str,
            "deleted_at": float,
        },
        pk="id",
        not_null={"name", "state", "spec", "created"},
        defaults={"resume": 0, "step": 0},
    )
    _table(db, "runs").create_index(["state"])
    db.execute(
        "CREATE TABLE events (id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL, type TEXT NOT NULL,"
        " step INTEGER, time REAL NOT NULL, data TEXT NOT NULL)"
    )
    _table(db, "events").create_index(["run_id", "id"])
    db.execute(
        "CREATE TABLE controls (id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL, command TEXT NOT NULL,"
        " created REAL NOT NULL, taken REAL)"
    )
    _table(db, "controls").create_index(["run_id", "taken"])


@_step("0002_datasets_and_comparisons")
def datasets_and_comparisons(db: Database) -> None:
    _table(db, "datasets").create(
        {
            "id": str,
            "name": str,
            "format": str,
            "columns": str,
            "rows": int,
            "path": str,
            "profile": str,
            "created": float,
        },
        pk="id",
        not_null={"name", "path", "created"},
    )
    db.execute(
        "CREATE TABLE comparisons (id INTEGER PRIMARY KEY AUTOINCREMENT, base TEXT NOT NULL, prompt TEXT NOT NULL,"
        " settings TEXT NOT NULL, results TEXT NOT NULL, created REAL NOT NULL)"
    )


@_step("0003_scores")
def scores(db: Database) -> None:
    db.execute(
        "CREATE TABLE scores (id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL, state TEXT NOT NULL,"
        " asked TEXT NOT NULL, version INTEGER, created REAL NOT NULL, ended REAL, pid INTEGER, pid_started REAL,"
        " result TEXT, error TEXT)"
    )
    _table(db, "scores").create_index(["run_id", "id"])
    _table(db, "scores").create_index(["state"])


@_step("0004_adapters")
def adapters(db: Database) -> None:
    # `present` is 0 for a run that ended without an adapter, so that nobody looks for one again.
    db.execute(
        "CREATE TABLE adapters (id TEXT PRIMARY KEY, name TEXT NOT NULL, origin TEXT NOT NULL, run_id TEXT,"
        " run_ended REAL, present INTEGER NOT NULL DEFAULT 1, base TEXT NOT NULL DEFAULT '', task TEXT NOT NULL"
        " DEFAULT '', method TEXT NOT NULL DEFAULT '', rank INTEGER, targets TEXT NOT NULL DEFAULT '', parameters"
        " INTEGER, bytes INTEGER, colour TEXT NOT NULL, details TEXT NOT NULL DEFAULT '{}', created REAL NOT NULL,"
        " deleted_at REAL)"
    )
    _table(db, "adapters").create_index(["run_id"], unique=True)
    _table(db, "adapters").create_index(["created"])
    db.execute(
        "CREATE TABLE mixes (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, base TEXT NOT NULL,"
        " parts TEXT NOT NULL, settings TEXT NOT NULL, created REAL NOT NULL)"
    )
    db.execute(
        "CREATE TABLE works (id TEXT PRIMARY KEY, kind TEXT NOT NULL, title TEXT NOT NULL, asked TEXT NOT NULL, state"
        " TEXT NOT NULL, message TEXT NOT NULL DEFAULT 'Starting', fraction REAL, created REAL NOT NULL, ended REAL,"
        " pid INTEGER, pid_started REAL, result TEXT, error TEXT)"
    )
    _table(db, "works").create_index(["state"])


@_step("0005_live")
def live(db: Database) -> None:
    # The newest event of a kind, and the few warnings or samples among a hundred thousand steps, without reading those.
    _table(db, "events").create_index(["run_id", "type", "id"])


@_step("0006_runs")
def runs_page(db: Database) -> None:
    # `place` orders the queue. `bytes` and `spark` are what the page of runs shows, kept until the run has moved on:
    # `measured` says when, `spark_at` for which step and end.
    for column in ("place INTEGER", "bytes INTEGER", "measured REAL", "spark TEXT", "spark_at TEXT"):
        db.execute(f"ALTER TABLE runs ADD COLUMN {column}")
    db.execute(
        "CREATE TABLE run_tags (run_id TEXT NOT NULL, tag TEXT NOT NULL COLLATE NOCASE, PRIMARY KEY (run_id, tag))"
    )
    waiting = db.execute("SELECT id FROM runs WHERE state = 'queued' ORDER BY queued, rowid").fetchall()
    for place, (run_id,) in enumerate(waiting, 1):
        db.execute("UPDATE runs SET place = ? WHERE id = ?", [place, run_id])


@_step("0007_data")
def data_sets(db: Database) -> None:
    # A data set is a file with what was decided about its rows. `file` is the fingerprint of the file, `replaced` is 1
    # for a version that another stands for, `events` tell the history of all versions of one file.
    for column in (
        "file TEXT NOT NULL DEFAULT ''",
        "file_name TEXT NOT NULL DEFAULT ''",
        "fixes TEXT NOT NULL DEFAULT '{}'",
        "replaced INTEGER NOT NULL DEFAULT 0",
        "deleted_at REAL",
    ):
        db.execute(f"ALTER TABLE datasets ADD COLUMN {column}")
    db.execute("UPDATE datasets SET file = id, file_name = name")
    _table(db, "datasets").create_index(["file"])
    db.execute(
        "CREATE TABLE dataset_events (id INTEGER PRIMARY KEY AUTOINCREMENT, file TEXT NOT NULL, dataset TEXT NOT NULL,"
        " time REAL NOT NULL, kind TEXT NOT NULL, data TEXT NOT NULL)"
    )
    _table(db, "dataset_events").create_index(["file"])


@_step("0008_train")
def train(db: Database) -> None:
    # `machine` says where a run trained: how long a step takes there says nothing of another.
    db.execute("ALTER TABLE runs ADD COLUMN machine TEXT")
    db.execute("ALTER TABLE runs ADD COLUMN processes INTEGER NOT NULL DEFAULT 1")
    db.execute(
        "CREATE TABLE presets (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, task TEXT NOT NULL,"
        " recipe TEXT NOT NULL, created REAL NOT NULL, deleted_at REAL)"
    )


@_step("0009_compare")
def compare(db: Database) -> None:
    # `kind` is `answers` or `grid`; `picture` is the file that was asked about.
    db.execute("ALTER TABLE comparisons ADD COLUMN kind TEXT NOT NULL DEFAULT 'answers'")
    db.execute("ALTER TABLE comparisons ADD COLUMN picture TEXT NOT NULL DEFAULT ''")
    db.execute("ALTER TABLE comparisons ADD COLUMN deleted_at REAL")
    # A row stands from when both have answered; `choice` (left, right, tie) is NULL until somebody has voted. Sides are
    # told apart by version: an adapter that is trained on is another one.
    db.execute(
        "CREATE TABLE votes (id TEXT PRIMARY KEY, base TEXT NOT NULL, prompt TEXT NOT NULL, picture TEXT NOT NULL"
        " DEFAULT '', settings TEXT NOT NULL, left_version TEXT NOT NULL, right_version TEXT NOT NULL, sides TEXT NOT"
        " NULL, choice TEXT, created REAL NOT NULL, voted REAL)"
    )
    _table(db, "votes").create_index(["base", "choice"])


@_step("0010_demo")
def demo(db: Database) -> None:
    # "" is everyone's: only demo mode keeps visitors apart. A mix's name is unique among its owner's.
    for name in ("runs", "datasets", "adapters", "comparisons", "votes", "presets", "mixes", "works"):
        db.execute(f"ALTER TABLE {name} ADD COLUMN owner TEXT NOT NULL DEFAULT ''")
    # Rebuilt whole, for SQLite cannot take a column's UNIQUE away; columns that other steps added stay.
    mixes = _table(db, "mixes")
    schema = mixes.schema.replace("NOT NULL UNIQUE", "NOT NULL")
    db.execute("ALTER TABLE mixes RENAME TO mixes_before")
    db.execute(schema)
    db.execute("INSERT INTO mixes SELECT * FROM mixes_before")
    db.execute("DROP TABLE mixes_before")
    mixes.create_index(["owner", "name"], unique=True)
