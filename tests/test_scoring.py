"""Evaluations as processes: what is refused, how one ends, and that the next server finds what became of it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.errors import ConfigError, EngineError
from engine.train.job import DataSpec, JobSpec
from studio import process, states
from studio.context import Studio
from studio.scoring import Scoring
from studio.store import StateError, UnknownError


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    with contextlib.closing(Studio.open(tmp_path)) as studio:
        yield studio
        studio.scoring.stop()


def finished(studio: Studio, held: int = 4, full: bool = False) -> str:
    """A run that ended with something to score, as far as this server can see; what is in it no test here reads."""
    run = studio.jobs.submit(JobSpec(model="tiny-llama", data=DataSpec(path="rows.jsonl"), full=full))
    studio.store.add_event(run, {"type": "start", "eval_rows": held, "trainable": 9})
    studio.store.update_run(run, state=states.DONE, started=1.0, ended=2.0)
    folder, mark = ("model", "config.json") if full else ("adapter", "adapter_config.json")
    made = studio.jobs.folder(run) / folder
    made.mkdir()
    (made / mark).write_text("{}", encoding="utf-8")
    return run


def wait(true: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def state(studio: Studio, run: str) -> str:
    studio.scoring.present()
    row = studio.scoring.newest(run)
    assert row is not None
    return str(row["state"])


def write_output(studio: Studio, run: str, *whos: str) -> None:
    row = studio.scoring.newest(run)
    assert row is not None
    told = [{"type": "score", "who": who, "metric": "loss", "value": 1.0, "rows": 4} for who in whos]
    lines = "".join(json.dumps(event) + "\n" for event in told)
    (studio.scoring.folder(row) / "output.jsonl").write_text(lines, encoding="utf-8")


@pytest.mark.parametrize("bad", ["", "../x", "run-00000000", None, 7])
def test_an_id_that_names_no_run_is_refused(studio: Studio, bad: Any) -> None:
    with pytest.raises(UnknownError):
        studio.scoring.start(bad)


def test_what_cannot_be_scored_is_refused_and_leaves_nothing(studio: Studio) -> None:
    run = finished(studio)
    for rows, answers in ((-1, 4), (65, 4), (True, 4), ("3", 4), (3, 0), (3, 513), (float("nan"), 4), (None, 4)):
        with pytest.raises(ConfigError, match="needed: a whole number"):
            studio.scoring.start(run, rows, answers)
    queued = studio.jobs.submit(JobSpec(model="tiny-llama", data=DataSpec(path="rows.jsonl")))
    binned, empty, unheld = finished(studio), finished(studio), finished(studio, held=0)
    studio.store.bin(binned)
    (studio.jobs.folder(empty) / "adapter" / "adapter_config.json").unlink()
    for refused, word in ((queued, "queued"), (binned, "bin"), (empty, "no adapter"), (unheld, "held no rows back")):
        with pytest.raises(StateError, match=word):
            studio.scoring.start(refused)
        assert studio.scoring.newest(refused) is None
    assert {row["id"] for row in studio.scoring.runs()} == {run, unheld}


def test_one_is_scored_at_a_time_and_stop_ends_exactly_that_process(studio: Studio) -> None:
    run, other = finished(studio), finished(studio)
    studio.scoring.start(run, 2, 3)
    live = studio.scoring.present()
    assert live is not None and live["run_id"] == run and live["asked"] == {"rows": 2, "answers": 3}
    argv = psutil.Process(live["pid"]).cmdline()
    assert argv[1:4] == ["-m", "engine", "eval"] and str(studio.jobs.folder(run) / "adapter") in argv
    with pytest.raises(StateError, match="one is scored at a time"):
        studio.scoring.start(other)
    studio.scoring.stop()
    wait(lambda: not psutil.pid_exists(live["pid"]))
    assert state(studio, run) == states.STOPPED and studio.scoring.scored(run) is None
    # The run that comes after it is free to be scored.
    studio.scoring.start(other)
    assert state(studio, other) in (states.STARTING, states.RUNNING, states.FAILED)


def test_an_evaluation_that_is_killed_says_so(studio: Studio) -> None:
    run = finished(studio)
    studio.scoring.start(run)
    live = studio.scoring.present()
    assert live is not None
    os.kill(live["pid"], signal.SIGKILL)
    wait(lambda: state(studio, run) == states.FAILED)
    row = studio.scoring.newest(run)
    assert row is not None and row["error"]["code"] == "lost" and "signal 9" in row["error"]["message"]


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="ends one thread by its number")
def test_an_evaluation_that_is_still_ending_is_under_way(studio: Studio) -> None:
    """A process whose main thread is dead before its others has neither a life nor a status yet."""
    run = finished(studio)
    code = "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(600,)).start(); "
    child = subprocess.Popen([sys.executable, "-c", code + "ctypes.CDLL(None).syscall(60, 0)"], start_new_session=True)
    wait(lambda: not process.alive(child.pid, process.started_at(child.pid)))
    values = [run, states.RUNNING, "{}", time.time(), child.pid, process.started_at(child.pid)]
    told = "INSERT INTO scores (run_id, state, asked, created, pid, pid_started) VALUES (?, ?, ?, ?, ?, ?)"
    with studio.store.exclusive() as db:
        studio.scoring._children[int(db.conn.execute(told, values).lastrowid or 0)] = child
    live = studio.scoring.present()
    assert live is not None and live["run_id"] == run and child.poll() is None
    os.kill(child.pid, signal.SIGKILL)
    child.wait(30)
    assert studio.scoring.present() is None and state(studio, run) == states.FAILED


def test_an_error_of_the_evaluation_comes_with_its_hint(studio: Studio) -> None:
    run = finished(studio)
    studio.scoring.start(run)
    wait(lambda: state(studio, run) == states.FAILED)
    row = studio.scoring.newest(run)
    assert row is not None and "rows.jsonl" in row["error"]["message"] and row["error"]["hint"]
    assert "Traceback" not in str(row["error"])


def left_behind(studio: Studio) -> str:
    """A run whose evaluation belongs to a server that has ended, and whose process has ended since."""
    run = finished(studio)
    studio.scoring.start(run)
    live = studio.scoring.present()
    assert live is not None
    os.kill(live["pid"], signal.SIGKILL)
    wait(lambda: state(studio, run) == states.FAILED)
    # Whoever waits for the process has had his say too.
    wait(lambda: not studio.scoring._children)
    studio.store.db.execute("UPDATE scores SET state = ?, error = NULL", [states.RUNNING])
    return run


@pytest.mark.parametrize(
    ("whos", "expected"), [(("base", "adapter"), states.DONE), (("base",), states.LOST), ((), states.LOST)]
)
def test_the_next_server_finds_what_became_of_an_evaluation(
    studio: Studio, whos: tuple[str, ...], expected: str
) -> None:
    run = left_behind(studio)
    write_output(studio, run, *whos)
    later = Scoring(studio.store, studio.jobs)
    assert later.present() is None
    row = later.newest(run)
    assert row is not None and row["state"] == expected and (row["error"] is None) == (expected == states.DONE)


def test_scores_of_a_run_that_trained_on_are_not_fresh_and_bases_are_shared(studio: Studio) -> None:
    run = left_behind(studio)
    write_output(studio, run, "base", "adapter")
    whole = finished(studio, full=True)
    studio.scoring.present()
    done = studio.scoring.scored(run)
    assert done is not None and done["fresh"] and studio.scoring.scored(whole) is None
    (studio.jobs.folder(run) / "adapter" / "adapter_model.safetensors").write_bytes(b"1" * 77)
    entries = studio.scoring.entries("", "causal_lm")
    assert [(entry.run, entry.bytes, entry.trained) for entry in entries] == [(run, 77, 9), ("", None, None)]
    mark = studio.jobs.folder(run) / "adapter" / "adapter_config.json"
    os.utime(mark, ns=(1, 1))
    done = studio.scoring.scored(run)
    assert done is not None and not done["fresh"]


def test_the_bin_is_not_emptied_under_an_evaluation(studio: Studio) -> None:
    run = finished(studio)
    studio.scoring.start(run)
    studio.store.bin(run)
    assert studio.jobs.empty_bin() == 0
    studio.scoring.stop()
    wait(lambda: studio.jobs.empty_bin() == 1)
    assert studio.scoring.newest(run) is None
    with pytest.raises(EngineError):
        studio.store.run(run)
