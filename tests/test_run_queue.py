"""The order of the queue: kept in the database, moved by one transaction at a time, taken over from older homes."""

from __future__ import annotations

import multiprocessing
import random
import sqlite3
from pathlib import Path

import pytest
from sqlite_utils import Database

from engine.errors import ConfigError
from engine.train.job import DataSpec, JobSpec
from studio import states
from studio.jobs import Jobs
from studio.migrations import migrations
from studio.store import StateError, Store, UnknownError


def spec(name: str = "plain") -> JobSpec:
    return JobSpec(model="tiny-llama", data=DataSpec(path="rows.jsonl"), name=name)


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(Store(tmp_path), tmp_path, module="tests.queue_worker")


def _shuffle(home: str, seed: int, count: int) -> None:
    jobs, drawn = Jobs(Store(Path(home)), Path(home)), random.Random(seed)
    for _ in range(count):
        order = jobs.waiting()
        jobs.reorder(drawn.choice(order), drawn.choice(["up", "down", "next", "last", drawn.choice(order)]))


def test_a_waiting_run_goes_where_it_is_sent(jobs: Jobs) -> None:
    a, b, c, d = (jobs.submit(spec()) for _ in range(4))
    assert jobs.waiting() == [a, b, c, d]
    assert jobs.reorder(c, "up") == [a, c, b, d]
    assert jobs.reorder(a, "down") == [c, a, b, d]
    assert jobs.reorder(d, "next") == [d, c, a, b]
    assert jobs.reorder(c, "last") == [d, a, b, c]
    assert jobs.reorder(c, d) == [c, d, a, b]
    assert jobs.reorder(c, b) == [d, a, c, b]
    # At the ends, and before itself, it stays.
    assert jobs.reorder(d, "up") == jobs.reorder(b, "down") == jobs.reorder(a, a) == [d, a, c, b]
    assert jobs.waiting() == [d, a, c, b]
    assert Jobs(Store(jobs.home), jobs.home).waiting() == [d, a, c, b], "another server sees the same order"


def test_a_new_run_goes_last_also_after_moves(jobs: Jobs) -> None:
    a, b = jobs.submit(spec()), jobs.submit(spec())
    jobs.reorder(b, "next")
    jobs.cancel(a)
    c = jobs.submit(spec())
    jobs.resume(a)
    assert jobs.waiting() == [b, c, a]


def test_the_queue_starts_the_first_of_the_order(jobs: Jobs) -> None:
    jobs.submit(spec("short"))
    moved = jobs.submit(spec("short"))
    jobs.reorder(moved, "next")
    try:
        jobs.tick()
        assert jobs.store.run(moved)["state"] in (*states.ACTIVE, states.DONE)
    finally:
        for child in jobs._children.values():
            child.wait(60)
        jobs.close()


def test_a_run_that_no_process_claimed_comes_back_as_the_first(jobs: Jobs) -> None:
    a, b, c = (jobs.submit(spec()) for _ in range(3))
    jobs.store.move(a, [states.QUEUED], states.STARTING)
    jobs.reorder(c, "next")
    assert jobs.store.requeue_unclaimed(a)
    assert jobs.waiting() == [a, c, b]


def test_what_cannot_be_moved_is_refused_and_moves_nothing(jobs: Jobs) -> None:
    a, b, c = (jobs.submit(spec()) for _ in range(3))
    jobs.store.move(a, [states.QUEUED], states.STARTING)
    with pytest.raises(StateError, match="starting"):
        jobs.reorder(a, "last")
    with pytest.raises(StateError, match="has changed"):
        jobs.reorder(c, a)
    for wrong in ("sideways", "", None, 3, [b], "run-1' OR 1=1 --"):
        with pytest.raises(ConfigError):
            jobs.reorder(c, wrong)  # type: ignore[arg-type]
    for wrong in ("run-00000000", "../x", None):
        with pytest.raises(UnknownError):
            jobs.reorder(wrong, "up")  # type: ignore[arg-type]
    assert jobs.waiting() == [b, c]


def test_cancel_leaves_a_run_alone_that_has_begun(jobs: Jobs) -> None:
    a, b = jobs.submit(spec()), jobs.submit(spec())
    jobs.store.move(a, [states.QUEUED], states.STARTING)
    with pytest.raises(StateError, match="cancel"):
        jobs.cancel(a)
    assert jobs.store.run(a)["state"] == states.STARTING and jobs.store.take(a) is None
    jobs.cancel(b)
    assert jobs.store.run(b)["state"] == states.STOPPED and jobs.waiting() == []


def test_three_servers_that_move_at_once_lose_and_double_no_run(jobs: Jobs) -> None:
    runs = {jobs.submit(spec()) for _ in range(6)}
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=_shuffle, args=(str(jobs.home), seed, 40)) for seed in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert set(jobs.waiting()) == runs
    places = [row["place"] for row in jobs.store.in_states([states.QUEUED])]
    assert places == [1, 2, 3, 4, 5, 6], "each move wrote the whole order"


def test_an_older_home_keeps_the_order_of_its_queue(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "studio.db")
    old = Database(connection)
    migrations.apply(old, stop_before="0006_runs")
    for run_id, queued in (("run-00000001", 30.0), ("run-00000002", 10.0), ("run-00000003", 20.0)):
        old.execute(
            "INSERT INTO runs (id, name, state, spec, created, queued) VALUES (?, 'old', 'queued', '{}', 1.0, ?)",
            [run_id, queued],
        )
    connection.close()
    jobs = Jobs(Store(tmp_path), tmp_path)
    assert jobs.waiting() == ["run-00000002", "run-00000003", "run-00000001"]
    assert jobs.reorder("run-00000001", "up")[1] == "run-00000001"
