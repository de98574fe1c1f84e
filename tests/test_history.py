"""The history of runs: search, order, tags, names, small curves, and the room that the runs take."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError, EngineError
from engine.train.job import DataSpec, JobSpec
from studio import run_words, states
from studio.context import Studio
from studio.history import COLUMNS, MOST_TAGS, SPARK_POINTS, History, Wanted, sort_keys
from studio.run_api import RunEndpoints
from studio.storage import folder_bytes
from studio.store import UnknownError


@pytest.fixture
def studio(tmp_path: Path) -> Any:
    studio = Studio.open(tmp_path)
    yield studio
    studio.close()


@pytest.fixture
def history(studio: Studio) -> History:
    return History(studio.store)


def add(studio: Studio, name: str, **values: Any) -> str:
    """A finished run; `values` are columns."""
    spec = JobSpec(
        model=values.pop("model", "tiny-llama"),
        data=DataSpec(path="rows.jsonl"),
        adapter={"method": values.pop("method", "lora")},
        name=name,
    )
    run = studio.jobs.submit(spec, values.pop("dataset", None))
    studio.store.update_run(run, **{"state": states.DONE, "started": 1.0, "ended": 2.0, **values})
    return run


@pytest.mark.parametrize(
    "odd", [[], [[]], {}, {"a": 1}, None, 5, 1.5, True, b"run-00000000", "../run-00000000"], ids=repr
)
def test_what_is_no_id_is_refused_by_every_call_on_a_run(studio: Studio, odd: Any) -> None:
    ends = RunEndpoints(studio)
    calls = (
        lambda: ends.cancel_run(odd),
        lambda: ends.move_in_queue(odd, "up"),
        lambda: ends.tag_run(odd, ["x"]),
        lambda: ends.untag_run(odd, ["x"]),
        lambda: ends.rename_run(odd, "name"),
        lambda: ends.delete_run(odd),
        lambda: ends.restore_run(odd),
        lambda: ends.run_settings(odd),
    )
    for call in calls:
        with pytest.raises(EngineError):
            call()


def names(history: History, *wanted: Any, **more: Any) -> list[str]:
    return [row["name"] for row in history.rows(Wanted(*wanted, **more))]


def test_every_word_is_looked_for_in_name_base_method_data_and_tags(studio: Studio, history: History) -> None:
    row = {"name": "answers.csv", "columns": {}, "profile": {}, "path": "x", "created": 1.0}
    studio.store.save_dataset({**row, "id": "0" * 16})
    add(studio, "parrot", dataset="0" * 16)
    pirate = add(studio, "Captain 100%", model="smollm2-135m-instruct", method="dora")
    history.add_tags(pirate, ["for the paper"])
    assert names(history, "PARROT") == names(history, "answers") == names(history, "lora tiny") == ["parrot"]
    assert names(history, "smollm2 DORA") == names(history, "paper captain") == ["Captain 100%"]
    assert names(history, "100%") == ["Captain 100%"] and names(history, "100_") == []
    assert names(history, "parrot paper") == [], "every word has to be there"
    assert history.count(Wanted("a")) == 2 and history.count(Wanted("%")) == 1
    assert names(history, "'; DROP TABLE runs; --") == []
    assert len(names(history)) == 2


def test_states_in_groups_and_the_bin(studio: Studio, history: History) -> None:
    every = {state: add(studio, state, state=state) for state in states.ALL}
    studio.store.bin(every[states.FAILED])
    assert set(names(history, state="live")) == set(states.LIVE)
    assert names(history, state="failed") == [states.LOST]
    assert set(names(history, state="kept")) == {states.PAUSED, states.STOPPED}
    assert history.count(Wanted()) == len(states.ALL) - 1
    assert history.binned() == [(states.FAILED, every[states.FAILED])]


def test_each_column_orders_both_ways_and_nothing_comes_last(studio: Studio, history: History) -> None:
    add(studio, "b", eval_loss=1.0, loss=9.0, step=5, ended=9.0, bytes=10, created=1.0)
    add(studio, "A", loss=2.0, step=7, ended=3.0, bytes=20, created=2.0)
    add(studio, "c", step=0, started=None, ended=None, created=3.0, method="vera", model="tiny-t5")
    assert names(history) == ["c", "A", "b"] and names(history, sort="created-up") == ["b", "A", "c"]
    assert names(history, sort="name-up") == ["A", "b", "c"]
    assert names(history, sort="loss-up") == ["b", "A", "c"] and names(history, sort="loss-down") == ["A", "b", "c"]
    assert names(history, sort="time-down") == ["b", "A", "c"] and names(history, sort="time-up") == ["A", "b", "c"]
    assert names(history, sort="size-up") == ["b", "A", "c"] and names(history, sort="steps-down") == ["A", "b", "c"]
    assert names(history, sort="method-down")[0] == names(history, sort="base-down")[0] == "c"
    assert len(names(history, limit=2)) == 2
    assert len(sort_keys()) == 2 * len(COLUMNS)
    assert Wanted().turned("loss") == "loss-up" and Wanted(sort="loss-up").turned("loss") == "loss-down"
    assert Wanted().turned("created") == "created-up"


@pytest.mark.parametrize(
    "wrong", [{"sort": "name"}, {"sort": "1; --"}, {"sort": None}, {"state": "nowhere"}, {"limit": 0}, {"search": 3}]
)
def test_what_cannot_be_asked_for_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Wanted(**wrong)


def test_tags_are_kept_once_and_go_with_their_run(studio: Studio, history: History) -> None:
    one, two = add(studio, "one"), add(studio, "two")
    assert history.add_tags(one, ["Paper", "  seed   2 "]) == ["Paper", "seed 2"]
    assert history.add_tags(one, ["paper"]) == ["Paper", "seed 2"], "case does not make another tag"
    history.add_tags(two, "paper, baseline")
    assert history.known_tags()[0].lower() == "paper" and len(history.known_tags()) == 3
    assert history.remove_tags(one, ["PAPER", "never there"]) == ["seed 2"]
    for wrong in ([""], ["a,b"], ["x" * 33], [3], 3, None, ["a\nb" * 20]):
        with pytest.raises(ConfigError):
            history.add_tags(one, wrong)
    with pytest.raises(ConfigError, match="at most"):
        history.add_tags(one, [str(number) for number in range(MOST_TAGS)])
    assert History(studio.store).tags_of([one, two]) == {one: ["seed 2"], two: ["baseline", "paper"]}
    with pytest.raises(UnknownError):
        history.add_tags("run-00000000", ["x"])
    studio.store.bin(two)
    assert history.known_tags() == ["seed 2"]
    studio.jobs.empty_bin()
    assert studio.store.db.execute("SELECT COUNT(*) FROM run_tags WHERE run_id = ?", [two]).fetchone()[0] == 0


def test_a_run_s_adapter_takes_its_new_name_unless_it_has_its_own(studio: Studio, history: History) -> None:
    run = add(studio, "old")
    insert = "INSERT INTO adapters (id, name, origin, run_id, colour, created) VALUES (?, ?, 'run', ?, '#000', 1.0)"
    studio.store.db.execute(insert, ["ad-00000001", "old", run])
    history.rename(run, "  new  ")
    assert studio.store.run(run)["name"] == "new"
    assert studio.store.db.execute("SELECT name FROM adapters").fetchone()[0] == "new"
    studio.store.db.execute("UPDATE adapters SET name = 'my own'")
    history.rename(run, "newer")
    assert studio.store.db.execute("SELECT name FROM adapters").fetchone()[0] == "my own"
    for wrong in ("", " ", "x" * 200, "two\nlines", None):
        with pytest.raises(ConfigError):
            history.rename(run, wrong)
    assert studio.store.run(run)["name"] == "newer"


def test_small_curves_are_means_that_are_made_anew_when_the_run_moves_on(studio: Studio, history: History) -> None:
    run = add(studio, "curve")
    for step in range(1, 4 * SPARK_POINTS + 1):
        studio.store.add_event(run, {"type": "step", "step": step, "loss": float(step)})
    (row,) = history.rows(Wanted())
    assert len(row["curve"]) == SPARK_POINTS and row["curve"][0] == (4.0, 2.5)
    assert "<svg" in run_words.listing([row], Wanted(), [])
    studio.store.db.execute("UPDATE events SET data = ?", [json.dumps({"loss": 1.0})])
    assert history.rows(Wanted())[0]["curve"] == row["curve"], "kept, not read again"
    studio.store.add_event(run, {"type": "step", "step": 4 * SPARK_POINTS + 1, "loss": float("nan")})
    assert history.rows(Wanted())[0]["curve"] != row["curve"]


def test_a_run_without_steps_has_no_curve(studio: Studio, history: History) -> None:
    add(studio, "still")
    (row,) = history.rows(Wanted())
    assert row["curve"] == [] and "<svg" not in run_words.listing([row], Wanted(), [])


def test_names_and_tags_are_text_on_the_page(studio: Studio, history: History) -> None:
    run = add(studio, "<b>${1}</b>")
    history.add_tags(run, ["<i>\"'"])
    (row,) = history.rows(Wanted())
    drawn = run_words.listing([row], Wanted(), [run], run) + run_words.queue([{**row, "state": states.QUEUED}], {})
    assert "<b>$" not in drawn and "<i>" not in drawn and "${" not in drawn
    assert "checked" in drawn and "class=chosen" in drawn


def test_room_is_measured_in_a_thread_and_again_when_a_run_has_ended(studio: Studio, history: History) -> None:
    run, binned = add(studio, "kept"), add(studio, "gone")
    (studio.jobs.folder(run) / "adapter").mkdir()
    (studio.jobs.folder(run) / "adapter" / "weights").write_bytes(bytes(5000))
    (studio.jobs.folder(run) / "link").symlink_to("/usr")
    studio.store.bin(binned)
    storage = studio.jobs.storage
    assert storage.room().unknown == 2
    storage.refresh(history.rows(Wanted()))
    settled(studio)
    whole = folder_bytes(studio.jobs.folder(run))
    assert 5000 < whole < 7000 and history.rows(Wanted())[0]["bytes"] == whole
    assert storage.room() == (whole, folder_bytes(studio.jobs.folder(binned)), 0)
    (studio.jobs.folder(run) / "more").write_bytes(bytes(1000))
    storage.refresh(history.rows(Wanted()))
    settled(studio)
    assert storage.room().listed == whole, "measured a moment ago"
    studio.store.update_run(run, ended=time.time() + 1)
    storage.refresh(history.rows(Wanted()))
    settled(studio)
    assert storage.room().listed == whole + 1000
    assert storage.measure([binned]) == storage.room().binned > 0
    assert folder_bytes(studio.home / "not there") == 0


def settled(studio: Studio) -> None:
    thread = studio.jobs.storage._thread
    if thread is not None:
        thread.join(60)
    assert not studio.jobs.storage.busy


def test_a_moment_changes_with_whatever_a_list_shows(studio: Studio, history: History) -> None:
    seen = [history.moment()]
    run = add(studio, "one", state=states.RUNNING, ended=None)

    def changed() -> bool:
        seen.append(history.moment())
        return seen[-1] != seen[-2]

    assert changed() and not changed()
    studio.store.add_event(run, {"type": "step", "step": 1, "loss": 1.0})
    assert changed()
    studio.store.update_run(run, state=states.DONE, ended=5.0)
    assert changed()
    studio.store.bin(run)
    assert changed()
    studio.store.restore(run)
    assert changed()
    studio.jobs.storage.measure([run])
    assert changed() and not changed()
