"""The queue with real processes: order, steering, ends of every kind, and nothing left behind."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from engine.errors import UnsafeFileError
from engine.paths import REPOSITORY
from engine.train.job import DataSpec, JobSpec
from studio import process, states, words
from studio.jobs import Jobs
from studio.store import StateError, Store

SERVER = """
import sys, time
from pathlib import Path
from studio.jobs import Jobs
from studio.store import Store
home = Path(sys.argv[1])
jobs = Jobs(Store(home), home, module="tests.queue_worker")
jobs.start_queue(every=0.05)
time.sleep(300)
"""


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    store = Store(tmp_path)
    jobs = Jobs(store, tmp_path, grace=0.5, kill_after=0.5, module="tests.queue_worker")
    yield jobs
    jobs.close()
    for row in store.runs():
        process.end(row["pid"], row["pid_started"], grace=0.0)


def spec(name: str = "plain") -> JobSpec:
    return JobSpec(model="tiny-llama", data=DataSpec(path="rows.jsonl"), name=name)


def wait(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def state(jobs: Jobs, run_id: str) -> str:
    return str(jobs.store.run(run_id)["state"])


def steps(jobs: Jobs, run_id: str) -> int:
    return int(jobs.store.run(run_id)["step"] or 0)


def session(run: dict[str, object]) -> list[psutil.Process]:
    return process.members(run["pid"], run["pid_started"])  # type: ignore[arg-type]


def test_one_run_at_a_time_in_the_order_of_submission(jobs: Jobs) -> None:
    first, second = jobs.submit(spec("short")), jobs.submit(spec("short"))
    assert (jobs.folder(first) / "spec.yaml").is_file()
    jobs.start_queue(every=0.05)
    wait(lambda: state(jobs, first) in states.ACTIVE)
    assert state(jobs, second) == states.QUEUED
    wait(lambda: state(jobs, second) == states.DONE)
    one, two = jobs.store.run(first), jobs.store.run(second)
    assert one["state"] == states.DONE and one["ended"] <= two["started"]
    wait(lambda: session(one) == [] and session(two) == [])


def test_stop_keeps_what_is_there_and_leaves_no_process(jobs: Jobs) -> None:
    run_id = jobs.submit(spec())
    jobs.start_queue(every=0.05)
    wait(lambda: steps(jobs, run_id) > 3)
    row = jobs.store.run(run_id)
    assert process.alive(row["pid"], row["pid_started"])
    jobs.stop(run_id)
    wait(lambda: state(jobs, run_id) == states.STOPPED)
    wait(lambda: not process.alive(row["pid"], row["pid_started"]))
    assert jobs.has_checkpoint(run_id)


def test_a_worker_that_will_not_stop_is_killed_with_its_children(jobs: Jobs) -> None:
    run_id = jobs.submit(spec("stubborn"))
    jobs.start_queue(every=0.05)
    wait(lambda: steps(jobs, run_id) > 1)
    row = jobs.store.run(run_id)
    assert len(session(row)) == 2
    jobs.stop(run_id)
    wait(lambda: state(jobs, run_id) not in states.LIVE and session(row) == [])
    assert state(jobs, run_id) == states.LOST, "nothing was saved, so nothing may be said to be kept"
    error = jobs.store.run(run_id)["error"]
    assert "adapter" in error["message"] and "signal 9" in error["message"] and "Resume" in error["hint"]
    jobs.resume(run_id)


@pytest.mark.parametrize(("adapter", "wanted"), [(True, states.STOPPED), (False, states.LOST)])
def test_a_stopping_run_whose_process_is_gone_is_stopped_only_with_an_adapter(
    jobs: Jobs, adapter: bool, wanted: str
) -> None:
    run_id = jobs.submit(spec())
    jobs.store.update_run(run_id, state=states.STOPPING, started=time.time(), pid=2**22 + 1, pid_started=1.0)
    jobs.store.add_event(run_id, {"type": "start", "total_steps": 9})
    if adapter:
        folder = jobs.folder(run_id) / "adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    jobs.tick()
    assert state(jobs, run_id) == wanted


def test_a_stopped_run_says_that_an_adapter_is_kept_only_when_there_is_one(jobs: Jobs) -> None:
    run_id = jobs.submit(spec())
    jobs.stop(run_id)
    row = jobs.store.run(run_id)
    assert row["state"] == states.STOPPED and not jobs.has_adapter(run_id)
    assert "adapter kept" not in words.run_head(row)
    assert "adapter kept" in words.run_head(row, adapter=True)


def test_stop_before_the_first_step_ends_at_once(jobs: Jobs) -> None:
    run_id = jobs.submit(spec("slow-start"))
    jobs.grace = 60.0
    jobs.start_queue(every=0.05)
    wait(lambda: jobs.store.run(run_id)["pid"] is not None and state(jobs, run_id) == states.STARTING)
    time.sleep(0.5)
    jobs.stop(run_id)
    wait(lambda: state(jobs, run_id) == states.STOPPED, seconds=10)
    wait(lambda: session(jobs.store.run(run_id)) == [])


def test_stopping_a_queued_run_takes_it_out_of_the_queue(jobs: Jobs) -> None:
    run_id = jobs.submit(spec())
    jobs.stop(run_id)
    jobs.tick()
    assert state(jobs, run_id) == states.STOPPED
    with pytest.raises(StateError):
        jobs.stop(run_id)
    with pytest.raises(StateError):
        jobs.pause(run_id)


def test_pause_ends_the_process_and_resume_goes_on(jobs: Jobs) -> None:
    run_id = jobs.submit(spec())
    jobs.start_queue(every=0.05)
    wait(lambda: steps(jobs, run_id) > 3)
    jobs.pause(run_id)
    wait(lambda: state(jobs, run_id) == states.PAUSED)
    paused_at = steps(jobs, run_id)
    row = jobs.store.run(run_id)
    wait(lambda: not process.alive(row["pid"], row["pid_started"]))
    jobs.resume(run_id)
    wait(lambda: steps(jobs, run_id) > paused_at + 2)
    again = jobs.store.run(run_id)
    assert again["resume"] == 1 and again["pid"] != row["pid"]
    every_step = [event["step"] for event in jobs.store.by_step(run_id, "step")]
    assert every_step == list(range(1, len(every_step) + 1))


def test_a_refused_resume_leaves_a_pending_stop_where_it_is(jobs: Jobs) -> None:
    run_id = jobs.submit(spec())
    jobs.store.update_run(run_id, state=states.RUNNING)
    jobs.stop(run_id)
    with pytest.raises(StateError):
        jobs.resume(run_id)
    assert jobs.store.take(run_id) == "stop"
    jobs.store.ask(run_id, "pause")
    jobs.store.update_run(run_id, state=states.PAUSED)
    jobs.resume(run_id)
    assert jobs.store.take(run_id) is None, "a run that starts again must not obey yesterday's pause"


def test_a_run_in_the_bin_is_not_resumed(jobs: Jobs) -> None:
    run_id = jobs.submit(spec())
    jobs.stop(run_id)
    jobs.store.bin(run_id)
    with pytest.raises(StateError, match="in the bin"):
        jobs.resume(run_id)
    assert state(jobs, run_id) == states.STOPPED


def test_a_run_that_cannot_be_stored_leaves_no_folder(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(jobs.store, "add_run", refuse)
    with pytest.raises(sqlite3.OperationalError):
        jobs.submit(spec())
    assert list((jobs.home / "runs").iterdir()) == []


def test_a_killed_worker_is_lost_then_resumed(jobs: Jobs) -> None:
    run_id = jobs.submit(spec())
    jobs.start_queue(every=0.05)
    wait(lambda: steps(jobs, run_id) > 12)
    os.kill(jobs.store.run(run_id)["pid"], signal.SIGKILL)
    wait(lambda: state(jobs, run_id) == states.LOST)
    error = jobs.store.run(run_id)["error"]
    assert error["code"] == "lost" and "signal 9" in error["message"] and "Resume" in error["hint"]
    lost_at = steps(jobs, run_id)
    jobs.resume(run_id)
    wait(lambda: steps(jobs, run_id) > lost_at + 2)
    assert jobs.store.run(run_id)["error"] is None


def test_a_worker_that_breaks_at_once_is_failed_and_the_queue_goes_on(jobs: Jobs) -> None:
    broken, good = jobs.submit(spec("breaks")), jobs.submit(spec("short"))
    jobs.start_queue(every=0.05)
    wait(lambda: state(jobs, good) == states.DONE)
    row = jobs.store.run(broken)
    assert row["state"] == states.FAILED and "status 3" in row["error"]["message"]


def test_the_run_outlives_a_killed_server_and_the_next_one_finds_it(jobs: Jobs, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "STUDIO_HOME": str(tmp_path)}
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(tmp_path)], env=environment)
    try:
        run_id = jobs.submit(spec())
        wait(lambda: steps(jobs, run_id) > 3)
        pid = jobs.store.run(run_id)["pid"]
        jobs.tick()
        assert not jobs.lock.acquire(), "two servers must not both run the queue"
    finally:
        server.kill()
        server.wait()
    at_kill = steps(jobs, run_id)
    wait(lambda: steps(jobs, run_id) > at_kill + 3)
    jobs.start_queue(every=0.05)
    time.sleep(0.5)
    row = jobs.store.run(run_id)
    assert row["state"] == states.RUNNING and row["pid"] == pid
    jobs.stop(run_id)
    wait(lambda: state(jobs, run_id) == states.STOPPED and session(row) == [])


def test_a_run_that_was_starting_when_the_server_died_goes_back_to_the_queue(jobs: Jobs) -> None:
    run_id = jobs.submit(spec("short"))
    assert jobs.store.move(run_id, [states.QUEUED], states.STARTING)
    jobs.start_queue(every=0.05)
    wait(lambda: state(jobs, run_id) == states.DONE)


def test_a_pid_that_now_belongs_to_a_stranger_is_left_alone(jobs: Jobs) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        run_id = jobs.submit(spec())
        started = process.started_at(stranger.pid)
        assert started is not None
        jobs.store.update_run(run_id, state=states.RUNNING, pid=stranger.pid, pid_started=started - 100)
        jobs.tick()
        assert state(jobs, run_id) == states.LOST
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_the_bin_is_emptied_with_the_folder_and_never_outside(jobs: Jobs) -> None:
    run_id = jobs.submit(spec())
    jobs.stop(run_id)
    jobs.store.bin(run_id)
    folder = jobs.folder(run_id)
    assert folder.is_dir()
    assert jobs.empty_bin() == 1
    assert not folder.exists()
    with pytest.raises(UnsafeFileError):
        jobs.folder("../runs")


def test_emptying_the_bin_skips_a_run_whose_process_still_lives(jobs: Jobs) -> None:
    lingering = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        run_id = jobs.submit(spec())
        jobs.stop(run_id)
        jobs.store.update_run(run_id, pid=lingering.pid, pid_started=process.started_at(lingering.pid))
        jobs.store.bin(run_id)
        assert jobs.empty_bin() == 0
        assert jobs.folder(run_id).is_dir() and len(jobs.store.runs(deleted=True)) == 1
    finally:
        lingering.kill()
        lingering.wait()
    assert jobs.empty_bin() == 1 and not jobs.folder(run_id).exists()
