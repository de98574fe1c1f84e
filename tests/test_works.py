"""What long work on adapters leaves on the disk: exports that are replaced, and work that came to nothing."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.train.job import DataSpec, JobSpec
from studio import adapter_worker, process, states
from studio.context import Studio
from studio.store import Row


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    with contextlib.closing(Studio.open(tmp_path)) as studio:
        yield studio


def work(studio: Studio, state: str, asked: Row, pid: int | None = None) -> str:
    """A work as its process would have left it, with files."""
    key = studio.works.reserve()
    folder = studio.works.folder(key)
    (folder / "out" / "model").mkdir(parents=True)
    (folder / "out" / "model" / "config.json").write_text("{}")
    (folder / "work.log").write_text("said")
    values = [key, json.dumps(asked), state, time.time(), pid, process.started_at(pid) if pid else None]
    with studio.store.exclusive() as db:
        db.conn.execute(
            "INSERT INTO works (id, kind, title, asked, state, created, pid, pid_started)"
            " VALUES (?, 'export', 'x', ?, ?, ?, ?, ?)",
            values,
        )
    return key


def kept(studio: Studio, key: str) -> bool:
    return (studio.works.folder(key) / "out" / "model").is_dir()


def test_an_export_replaces_the_same_one_when_it_is_done(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"adapter": "adapter-1", "form": "gguf", "precision": "f16"}
    same, other, coarse = (
        work(studio, states.DONE, {**asked, **changes})
        for changes in ({}, {"adapter": "adapter-2"}, {"precision": "q8_0"})
    )
    used, plain = (work(studio, states.DONE, {"adapter": "adapter-1", "form": "merged"}) for _ in range(2))
    model = str(studio.works.folder(used) / "out" / "model")
    studio.store.add_run(JobSpec(model=model, data=DataSpec(path="rows.jsonl")))

    def again(state: str, asked: Row) -> None:
        def export(_: adapter_worker.Work) -> Row:
            assert (kept(studio, same) and kept(studio, plain)) or state != states.FAILED
            if state == states.FAILED:
                raise RuntimeError("no room")
            return {}

        monkeypatch.setitem(adapter_worker.KINDS, "export", export)
        key = work(studio, states.STARTING, asked)
        assert studio.works.claim(key, os.getpid(), 0.0)
        done = adapter_worker.run(adapter_worker.Work(studio, studio.works.get(key), studio.works.folder(key)))
        assert done == (state == states.FAILED) and studio.works.get(key)["state"] == state

    again(states.FAILED, asked)
    assert kept(studio, same)
    again(states.DONE, asked)
    assert [kept(studio, key) for key in (same, other, coarse, used, plain)] == [False, True, True, True, True]
    again(states.DONE, {"adapter": "adapter-1", "form": "merged"})
    # A run names one of them as its base.
    assert kept(studio, used) and not kept(studio, plain)


def test_work_that_came_to_nothing_leaves_its_log_alone(studio: Studio) -> None:
    stopped, failed = (work(studio, state, {}) for state in (states.STOPPED, states.FAILED))
    # Its process still writes.
    ending = work(studio, states.STOPPED, {}, os.getpid())
    done, live = work(studio, states.DONE, {}), work(studio, states.RUNNING, {})
    drafts = studio.works.reserve()
    studio.works.clear()
    for key in (stopped, failed):
        assert [path.name for path in studio.works.folder(key).iterdir()] == ["work.log"]
    assert kept(studio, ending) and kept(studio, done) and kept(studio, live)
    assert studio.works.folder(drafts).is_dir()


def test_stopped_work_of_an_earlier_server_leaves_nothing(studio: Studio) -> None:
    import subprocess
    import sys

    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    key = work(studio, states.RUNNING, {}, sleeper.pid)
    studio.works.stop()
    assert sleeper.wait(20) != 0
    deadline = time.monotonic() + 20
    while kept(studio, key):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert studio.works.get(key)["state"] == states.STOPPED and studio.works.log_tail(key) == "said"
