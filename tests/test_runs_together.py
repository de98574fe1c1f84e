"""Runs laid together: curves by steps, time and tokens; what differs between their settings; the endpoints of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.train.job import DataSpec, JobSpec, TrainingSpec
from studio import overlay, run_diff, states
from studio.api import Endpoints, _guarded
from studio.context import Studio
from studio.run_api import ENDPOINTS, RunEndpoints
from studio.shell import create_app


@pytest.fixture
def studio(tmp_path: Path) -> Any:
    studio = Studio.open(tmp_path)
    yield studio
    studio.close()


def add(studio: Studio, name: str = "run", adapter: dict[str, Any] | None = None, **training: Any) -> str:
    spec = JobSpec(
        model="tiny-llama",
        data=DataSpec(path="/a/secret place/rows.jsonl"),
        adapter={"method": "lora", "r": 4, **(adapter or {})},
        training=TrainingSpec(**training),
        name=name,
    )
    run = studio.jobs.submit(spec)
    studio.store.update_run(run, state=states.DONE, ended=1.0)
    return run


def event(studio: Studio, run: str, kind: str, at: float, step: int | None = None, **data: Any) -> None:
    studio.store.db.execute(
        "INSERT INTO events (run_id, type, step, time, data) VALUES (?, ?, ?, ?, ?)",
        [run, kind, step, at, json.dumps(data)],
    )


def paused_run(studio: Studio) -> str:
    """Steps 1 to 4, a pause of 1,000 s after a checkpoint at 2, then 3 to 5 again and further."""
    run = add(studio, "paused")
    event(studio, run, "start", 100.0)
    event(studio, run, "eval", 101.0, 0, loss=9.0)
    for step in (1, 2, 3, 4):
        event(studio, run, "step", 100.0 + 10 * step, step, loss=10.0 - step, tokens=50)
    event(studio, run, "start", 1200.0)
    for step in (3, 4, 5):
        event(studio, run, "step", 1200.0 + 10 * (step - 2), step, loss=1.0 * step, tokens=70)
    event(studio, run, "eval", 1231.0, 5, loss=4.0)
    return run


def one(studio: Studio, run: str, by: str) -> overlay.Line:
    return overlay.lines(studio.store, [studio.store.run(run)], by)[0]


def test_a_step_that_ran_twice_counts_once_and_a_pause_takes_no_time(studio: Studio) -> None:
    run = paused_run(studio)
    assert one(studio, run, "step").loss == [(1, 9), (2, 8), (3, 3), (4, 4), (5, 5)]
    assert one(studio, run, "step").evaluation == [(0, 9), (5, 4)]
    assert one(studio, run, "tokens").loss == [(50, 9), (100, 8), (170, 3), (240, 4), (310, 5)]
    assert one(studio, run, "tokens").evaluation == [(0, 9), (310, 4)]
    assert one(studio, run, "time").loss == [(10, 9), (20, 8), (30, 3), (40, 4), (50, 5)]
    assert one(studio, run, "time").evaluation == [(0, 9), (50, 4)]


def test_curves_have_their_runs_colours_and_like_colours_other_strokes(studio: Studio) -> None:
    runs = [paused_run(studio) for _ in range(2)]
    studio.store.update_run(runs[1], colour=studio.store.run(runs[0])["colour"])
    rows = [studio.store.run(run) for run in runs]
    lines = overlay.lines(studio.store, rows)
    assert lines[0].colour == lines[1].colour == rows[0]["colour"] and lines[0].label != lines[1].label
    drawn = overlay.drawn(lines)
    assert drawn.count(f"stroke:{rows[0]['colour']}") == 4
    assert drawn.count('class="thick dashed"') == 2 and drawn.count('class="thick"') == 2
    assert overlay.drawn(lines, smoothing=0.0) != drawn != overlay.drawn(lines, log=True)
    assert "seconds of training" in overlay.drawn(overlay.lines(studio.store, rows, "time"), "time")
    studio.store.db.execute("UPDATE events SET time = time * 100")
    assert "minutes of training" in overlay.drawn(overlay.lines(studio.store, rows, "time"), "time")


def test_one_evaluation_is_a_dot_and_no_curve_says_why(studio: Studio) -> None:
    run = add(studio)
    assert "None of these runs has steps" in overlay.drawn([one(studio, run, "time")], "time")
    event(studio, run, "eval", 1.0, 0, loss=2.0)
    assert 'class="mark"' in overlay.drawn([one(studio, run, "step")])


def test_only_what_differs_with_words_beside_the_exact_names(studio: Studio) -> None:
    a = add(studio, "a", {"r": 8}, learning_rate=1e-3, max_steps=20)
    b = add(studio, "b", {"r": 8, "lora_alpha": 32}, learning_rate=2e-4)
    rows = [studio.store.run(run) for run in (a, b)]
    lines = run_diff.of_runs(studio.store, rows)
    changed = {line.key: line.values for line in lines if line.differs}
    assert changed == {
        "adapter.lora_alpha": (run_diff.MISSING, 32),
        "training.learning_rate": (1e-3, 2e-4),
        "training.max_steps": (20, None),
    }
    words = {line.key: line.words for line in lines}
    assert words["training.learning_rate"] == "Learning rate" and words["adapter.lora_alpha"] == "Strength"
    table = run_diff.table(lines, rows)
    assert "<code>training.learning_rate</code>" in table and "adapter.r<" not in table and "default" in table
    whole = run_diff.table(lines, rows, whole=True)
    assert "<code>adapter.r</code>" in whole and whole.count("class=differs") == 3
    assert "secret place" not in whole and "rows.jsonl" in whole
    assert "differ in nothing" in run_diff.table(run_diff.of_runs(studio.store, [rows[0], rows[0]]), rows[:1] * 2)


def test_methods_of_other_fields_stand_side_by_side(studio: Studio) -> None:
    a, b = add(studio, "a"), add(studio, "b", {"method": "vera", "r": 256})
    rows = [studio.store.run(run) for run in (a, b)]
    found = {line.key: line for line in run_diff.of_runs(studio.store, rows)}
    assert found["adapter.method"].values == ("lora", "vera") and found["adapter.r"].words
    keys = [line.key.split(".")[0] for line in run_diff.of_runs(studio.store, rows)]
    assert keys == sorted(keys, key=list(dict.fromkeys(keys)).index), "what belongs together stands together"


def test_data_sets_go_by_their_names_and_like_names_are_told_apart(studio: Studio) -> None:
    row = {"name": "same.csv", "columns": {}, "profile": {}, "path": "x", "created": 1.0}
    runs = [add(studio, key) for key in "ab"]
    for key, run in zip(("0" * 16, "1" * 16), runs, strict=True):
        studio.store.save_dataset({**row, "id": key})
        studio.store.update_run(run, dataset=key)
    found = {line.key: line for line in run_diff.of_runs(studio.store, [studio.store.run(run) for run in runs])}
    assert found["data"].values == ("same.csv (000000)", "same.csv (111111)")


def test_every_setting_that_a_form_offers_has_words() -> None:
    from studio import presets

    for task in presets.tasks().values():
        for field in (*task.fields, *task.options):
            part = "options" if field in task.options else "training"
            assert run_diff.words(f"{part}.{field.name}", [{"task": task.name}]), field.name
    for method in presets.methods().values():
        for field in method.fields:
            assert run_diff.words(f"adapter.{field.name}", [{"adapter": {"method": method.name}}]), field.name


# The endpoints


def test_queue_history_and_bin_without_a_page(studio: Studio) -> None:
    ends = RunEndpoints(studio)
    a, b = add(studio, "first"), add(studio, "second")
    waiting = [studio.jobs.submit(JobSpec(model="tiny-llama", data=DataSpec(path="r.jsonl"))) for _ in range(2)]
    assert ends.run_queue() == {"running": None, "waiting": waiting}
    assert ends.move_in_queue(waiting[1], "next")["waiting"] == waiting[::-1]
    assert ends.cancel_run(waiting[0])["waiting"] == [waiting[1]]
    assert ends.tag_run(a, ["x"])["tags"] == ["x"] and ends.untag_run(a, ["x"])["tags"] == []
    ends.tag_run(a, ["paper"])
    found = ends.find_runs("paper")
    assert found["total"] == 1 and found["runs"][0]["id"] == a and found["runs"][0]["tags"] == ["paper"]
    assert ends.rename_run(b, "other")["name"] == "other"
    assert ends.delete_run(b)["deleted"] and ends.find_runs("other")["total"] == 0
    assert not ends.restore_run(b)["deleted"] and ends.find_runs("other")["total"] == 1
    ends.delete_run(b)
    (studio.jobs.folder(b) / "weights").write_bytes(bytes(4000))
    emptied = ends.empty_run_bin()
    assert emptied["removed"] == 1 and 4000 < emptied["bytes"] < 6000
    assert ends.run_storage()["bin_bytes"] == 0


def test_a_run_s_settings_can_be_submitted_again(studio: Studio, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("question,answer\n" + "".join(f"What is {n}?,It is {n}.\n" for n in range(9)), encoding="utf-8")
    whole = Endpoints(studio)
    data = whole.upload_data(str(rows))["dataset"]
    first = whole.submit_run({"model": "tiny-llama", "dataset": data, "adapter": {"method": "dora", "r": 2}})["run"]
    ends = RunEndpoints(studio)
    again = whole.submit_run(ends.run_settings(first)["job"])["run"]
    assert ends.diff_runs([first, again])["settings"] == []
    changed = ends.run_settings(first)["job"]
    changed["training"]["seed"] = 7
    other = whole.submit_run(changed)["run"]
    (line,) = ends.diff_runs([first, other])["settings"]
    assert line["name"] == "training.seed" and line["values"] == [0, 7] and line["default"] == [False, False]
    assert len(ends.diff_runs([first, other], True)["settings"]) > 20
    studio.store.db.execute("DELETE FROM datasets")
    assert ends.run_settings(first)["job"]["dataset"] is None


def test_curves_as_plain_data(studio: Studio) -> None:
    run = paused_run(studio)
    found = RunEndpoints(studio).run_curves([run], "tokens")
    assert found["runs"][0]["loss"][0] == [50.0, 9.0] and found["runs"][0]["evaluation"][-1] == [310.0, 4.0]
    json.dumps(found)


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("find_runs", ["", "nowhere"], "config"),
        ("find_runs", ["", "", "created"], "config"),
        ("find_runs", [{}, "", "created-down"], "config"),
        ("find_runs", ["", [], "created-down"], "config"),
        ("find_runs", ["", "", ["created-down"]], "config"),
        ("find_runs", ["", "", "created-down", 2.5], "config"),
        ("find_runs", ["", "", "created-down", True], "config"),
        ("move_in_queue", ["run-00000000", "up"], "unknown-id"),
        ("move_in_queue", [["run-00000000"], "up"], "unknown-id"),
        ("cancel_run", ["../x"], "unknown-id"),
        ("tag_run", ["run-00000000", ["x"]], "unknown-id"),
        ("untag_run", ["run-00000000", ["x"]], "unknown-id"),
        ("rename_run", ["run-00000000", "x"], "unknown-id"),
        ("delete_run", [None], "unknown-id"),
        ("restore_run", ["' OR 1=1 --"], "unknown-id"),
        ("run_settings", ["run-00000000"], "unknown-id"),
        ("diff_runs", [["run-00000000"]], "config"),
        ("diff_runs", [["run-00000000", "run-00000001"]], "unknown-id"),
        ("diff_runs", ["run-00000000"], "config"),
        ("run_curves", [["run-00000000"]], "unknown-id"),
        ("run_curves", [[]], "config"),
        ("run_curves", [["run-00000000"], "moon"], "config"),
        ("run_curves", [["run-00000000"], ["step"]], "config"),
        ("run_curves", [["run-00000000"], "step", 3], "config"),
    ],
)
def test_raw_requests_are_refused_by_name(studio: Studio, name: str, arguments: list[Any], code: str) -> None:
    assert name in ENDPOINTS
    answered = _guarded(getattr(RunEndpoints(studio), name))(*arguments)
    assert answered["error"]["code"] == code and answered["error"]["message"], answered


def test_presses_in_the_list_are_answered_one_after_another(studio: Studio) -> None:
    rule = next(it for it in create_app(studio).fns.values() if it.name == "said" and it.trigger_mode == "multiple")
    # Two at once would begin from the same chosen runs, and one of them would be lost.
    assert (rule.concurrency_id, rule.concurrency_limit) == ("runs-presses", 1)
