"""The store: migrations, two writers at once, what a row looks like after the way through SQLite."""

from __future__ import annotations

import multiprocessing
import sqlite3
import time
from pathlib import Path

import pytest
from sqlite_utils import Database

from engine.train.job import DataSpec, JobSpec
from studio import states
from studio.comparisons import ANSWERS, Comparisons
from studio.migrations import migrations
from studio.store import PALETTE, StateError, Store, UnknownError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def spec(name: str = "") -> JobSpec:
    return JobSpec(model="tiny-llama", data=DataSpec(path="rows.jsonl"), name=name)


def _write(home: str, run_id: str, count: int) -> None:
    store = Store(Path(home))
    for step in range(count):
        store.add_event(run_id, {"type": "step", "step": step, "loss": 1.0})


def _open(home: str) -> None:
    Store(Path(home)).runs()


def test_a_new_home_gets_every_table_in_wal_mode(store: Store) -> None:
    assert store.db.journal_mode == "wal"
    assert {"runs", "events", "controls", "datasets", "comparisons", "scores", "adapters", "mixes", "works"} <= set(
        store.db.table_names()
    )
    assert not migrations.pending(store.db)


def test_migrations_go_on_from_an_older_database(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "studio.db")
    old = Database(connection)
    migrations.apply(old, stop_before="0002_datasets_and_comparisons")
    old.execute("INSERT INTO runs (id, name, state, spec, created) VALUES ('run-00000001', 'old', 'done', '{}', 1.0)")
    connection.close()
    store = Store(tmp_path)
    assert store.run("run-00000001")["name"] == "old"
    assert store.datasets() == []
    assert not migrations.pending(store.db)


def test_the_table_of_scores_comes_to_a_home_that_has_runs_and_events(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "studio.db")
    old = Database(connection)
    migrations.apply(old, stop_before="0003_scores")
    old.execute("INSERT INTO runs (id, name, state, spec, created) VALUES ('run-00000001', 'old', 'done', '{}', 1.0)")
    old.execute("INSERT INTO events (run_id, type, time, data) VALUES ('run-00000001', 'done', 1.0, '{}')")
    assert "scores" not in old.table_names()
    connection.close()
    store = Store(tmp_path)
    store.db.execute("INSERT INTO scores (run_id, state, asked, created) VALUES ('run-00000001', 'done', '{}', 2.0)")
    assert store.newest("run-00000001", "done") is not None
    store.bin("run-00000001")
    store.forget("run-00000001")
    assert store.db["scores"].count == 0


def test_four_processes_open_a_new_home_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=_open, args=(str(tmp_path),)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0, 0, 0]


def test_a_reader_beside_a_writing_process_sees_every_event_once_and_in_order(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run_id = store.add_run(spec())
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=_write, args=(str(tmp_path), run_id, 500))
    child.start()
    seen: list[int] = []
    last, deadline = 0, time.monotonic() + 30
    while len(seen) < 500 and time.monotonic() < deadline:
        for event in store.since(run_id, last):
            seen.append(event["step"])
            last = event["id"]
        store.ask(run_id, "checkpoint")
    child.join(10)
    assert seen == list(range(500))
    assert store.run(run_id)["step"] == 499


def test_a_repeated_step_counts_once_and_the_newest_row_wins(store: Store) -> None:
    run_id = store.add_run(spec())
    for step, loss in ((1, 9.0), (2, 8.0), (3, 7.0), (2, 2.0), (3, 1.0)):
        store.add_event(run_id, {"type": "step", "step": step, "loss": loss})
    assert [(event["step"], event["loss"]) for event in store.by_step(run_id, "step")] == [(1, 9.0), (2, 2.0), (3, 1.0)]


def test_a_full_run_has_a_row_without_an_adapter(store: Store) -> None:
    row = store.run(store.add_run(JobSpec(model="tiny-llama", data=DataSpec(path="rows.jsonl"), full=True)))
    assert row["method"] == "full" and row["name"].startswith("full ")
    assert JobSpec.from_dict(row["spec"]).full


def test_values_that_json_cannot_hold_arrive_as_none(store: Store) -> None:
    run_id = store.add_run(spec())
    store.add_event(run_id, {"type": "step", "step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    (event,) = store.since(run_id)
    assert event["loss"] is None and event["grad_norm"] is None


def test_a_command_is_taken_once_and_in_order(store: Store) -> None:
    run_id = store.add_run(spec())
    store.ask(run_id, "checkpoint")
    store.ask(run_id, "stop")
    assert [store.take(run_id) for _ in range(3)] == ["checkpoint", "stop", None]
    store.ask(run_id, "pause")
    store.drop_commands(run_id)
    assert store.take(run_id) is None
    with pytest.raises(StateError):
        store.ask(run_id, "explode")


def test_move_lets_one_of_two_callers_win(store: Store) -> None:
    run_id = store.add_run(spec())
    assert store.move(run_id, [states.QUEUED], states.STARTING)
    assert not store.move(run_id, [states.QUEUED], states.STARTING)
    assert store.run(run_id)["state"] == states.STARTING


@pytest.mark.parametrize("bad", ["", "../etc", "run-xyz", "run-00000000", "run-0000000'; --", None, 7])
def test_an_id_that_names_nothing_is_a_named_error(store: Store, bad: object) -> None:
    with pytest.raises(UnknownError):
        store.run(bad)  # type: ignore[arg-type]
    with pytest.raises(UnknownError):
        store.dataset(bad)  # type: ignore[arg-type]


def test_the_bin_hides_restores_and_forgets(store: Store) -> None:
    run_id = store.add_run(spec("keep me"))
    with pytest.raises(StateError):
        store.bin(run_id)
    store.update_run(run_id, state=states.DONE)
    store.add_event(run_id, {"type": "done", "step": 1})
    with pytest.raises(StateError):
        store.forget(run_id)
    store.bin(run_id)
    assert store.runs() == [] and len(store.runs(deleted=True)) == 1
    store.restore(run_id)
    assert [row["name"] for row in store.runs()] == ["keep me"]
    store.bin(run_id)
    store.forget(run_id)
    assert store.runs(deleted=True) == [] and store.since(run_id) == []


def test_a_run_that_starts_between_look_and_bin_stays_out_of_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = store.add_run(spec())
    stale = {**store.run(run_id), "state": states.STOPPED}
    with monkeypatch.context() as patch:
        # What a look before the change would have seen; the run has been queued again since.
        patch.setattr(store, "run", lambda run_id: stale)
        with pytest.raises(StateError):
            store.bin(run_id)
    assert store.run(run_id)["deleted_at"] is None


def test_a_run_in_the_bin_keeps_its_state_and_its_time_of_deletion(store: Store) -> None:
    run_id = store.add_run(spec())
    store.update_run(run_id, state=states.PAUSED)
    store.bin(run_id)
    deleted_at = store.run(run_id)["deleted_at"]
    with pytest.raises(StateError, match="already"):
        store.bin(run_id)
    assert not store.move(run_id, [states.PAUSED], states.QUEUED)
    assert not store.queue_again(run_id, resume=True)
    row = store.run(run_id)
    assert (row["state"], row["deleted_at"]) == (states.PAUSED, deleted_at)
    store.restore(run_id)
    assert store.queue_again(run_id, resume=True) and store.run(run_id)["state"] == states.QUEUED


def test_neighbouring_runs_have_different_colours(store: Store) -> None:
    colours = [store.run(store.add_run(spec()))["colour"] for _ in range(len(PALETTE) + 1)]
    assert set(colours[:-1]) == set(PALETTE)
    assert colours[-1] == colours[0]


def test_data_sets_and_comparisons_come_back_as_they_went_in(store: Store) -> None:
    row = {
        "id": "0123456789abcdef",
        "name": "답변.csv",
        "format": "prompt_completion",
        "columns": {"prompt": "질문"},
        "rows": 3,
        "path": "/x",
        "profile": {"kept": 3},
        "created": 1.0,
    }
    store.save_dataset(row)
    store.save_dataset({**row, "rows": 4})
    own = {"file": row["id"], "file_name": "", "fixes": {}, "replaced": 0, "deleted_at": None, "owner": ""}
    assert store.dataset("0123456789abcdef") == {**row, **own, "rows": 4}
    assert len(store.datasets()) == 1
    comparisons = Comparisons(store, store.path.parent)
    comparisons.add(ANSWERS, "tiny-llama", "hello", {"seed": 1}, [{"who": None, "text": "hi"}])
    (kept,) = comparisons.rows()
    assert kept["results"] == [{"who": None, "text": "hi"}] and kept["settings"] == {"seed": 1}
