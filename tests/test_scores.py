"""Scores without a process: lines of an evaluation, which side is better, the leaderboard, its front, how it looks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.leaderboard import CONTENDERS
from studio import charts, score_words, scores
from studio.i18n import KOREAN, speaking

RUN: dict[str, Any] = {
    "id": "run-00000001",
    "name": "<b>mine</b>",
    "colour": "#0072B2",
    "model": "tiny-t5",
    "method": "lora",
    "task": "seq2seq",
    "started": 10.0,
    "ended": 40.0,
    "spec": {"data": {"eval_split": 0.1}, "training": {"seed": 0}, "options": {"prefix": "x"}},
}


def lines(*events: dict[str, Any]) -> str:
    return "".join(json.dumps(event) + "\n" for event in events)


def score(who: str, metric: str, value: float, rows: int = 4, **more: Any) -> dict[str, Any]:
    return {"type": "score", "who": who, "metric": metric, "value": value, "rows": rows, **more}


def entry(name: str, accuracy: float | None, size: int | None, loss: float = 1.0, **more: Any) -> scores.Entry:
    values = {"accuracy": (accuracy, 9), "loss": (loss, 9)}
    fields = {"trained": size, "bytes": size, **more}
    return scores.Entry(f"run-{name}", name, "#000000", "tiny-llama", "lora", values, **fields)


def test_progress_runs_once_from_nothing_to_the_whole_over_both_sides() -> None:
    told = [
        {"type": "status", "phase": "loading", "fraction": 0.5, "message": "Loading"},
        {"type": "status", "phase": "scoring", "fraction": 0.5, "message": "The base answers row 3 of 4"},
        score("base", "loss", 2.0),
        {"type": "status", "phase": "scoring", "fraction": 0.5, "message": "The adapter answers row 3 of 4"},
    ]
    shares = [scores.read(lines(*told[: count + 1])).progress[1] for count in range(len(told))]
    assert shares == [None, 0.25, 0.25, 0.75]
    assert scores.read("").progress == ("Starting", None)


def test_a_line_that_is_still_being_written_and_lines_of_others_are_left_out() -> None:
    text = lines(score("base", "loss", 2.0), score("adapter", "loss", 1.0)) + "[1]\nnoise\n7\n" + '{"type": "row", "ro'
    found = scores.read(text)
    assert found.complete and [item["value"] for item in found.scores] == [2.0, 1.0] and found.rows == []
    assert not scores.read(lines(score("base", "loss", 2.0))).complete


def test_what_is_no_number_is_kept_as_none_and_shown_in_words() -> None:
    text = '{"type": "score", "who": "base", "metric": "loss", "value": NaN, "rows": 3}\n'
    found = scores.read(text + lines(score("adapter", "loss", 1.0)))
    assert found.scores[0]["value"] is None
    assert "no number" in score_words.metrics_table(found.to_dict(), "adapter")
    json.dumps(found.to_dict(), allow_nan=False)


def test_an_error_keeps_code_message_and_hint_alone() -> None:
    event = {"type": "error", "code": "data", "message": "no rows", "hint": "hold some back", "trace": "x"}
    assert scores.read(lines(event)).error == {"code": "data", "message": "no rows", "hint": "hold some back"}


@pytest.mark.parametrize(
    ("metric", "base", "adapter", "winner"),
    [
        ("accuracy", 0.5, 0.6, "adapter"),
        ("loss", 0.5, 0.6, "base"),
        ("perplexity", 9.0, 3.0, "adapter"),
        ("chrf", 40.0, 40.0, ""),
        ("reward_rejected", 0.0, 1.0, ""),
        ("never_heard_of", 0.0, 1.0, ""),
        ("accuracy", None, 1.0, ""),
    ],
)
def test_the_better_side_depends_on_the_metric(
    metric: str, base: float | None, adapter: float | None, winner: str
) -> None:
    assert scores.better(metric, base, adapter) == winner


def test_every_metric_that_a_task_reports_has_its_own_entry() -> None:
    """Otherwise the page could not say which way is better."""
    from engine.metrics import TEXT_METRICS
    from engine.tasks import TASKS, get_task

    reported = {"loss", "accuracy", "macro_f1", "margin", "reward_chosen", "reward_rejected", *TEXT_METRICS}
    for name in TASKS:
        reported |= set(getattr(get_task(name, {}), "text_metrics", ()))
    assert reported <= set(scores.METRICS)


def test_the_front_leaves_out_what_another_beats_in_quality_and_size() -> None:
    small, good, poor = entry("small", 0.7, 100), entry("good", 0.9, 10_000), entry("poor", 0.8, 20_000)
    same = entry("same", 0.9, 10_000)
    base = scores.Entry("", "base", "#8A8F98", "tiny-llama", "", {"accuracy": (0.99, 9)})
    names = [item.name for item in scores.front([poor, good, small, base, same], "accuracy", "bytes")]
    assert names[0] == "small" and set(names[1:]) == {"good", "same"}
    assert scores.front([entry("x", None, 5), entry("y", 0.5, None), base], "accuracy", "trained") == []
    cheap, dear = entry("cheap", 0.1, 1, loss=3.0), entry("dear", 0.1, 2, loss=4.0)
    assert scores.front([dear, cheap], "loss", "bytes") == [cheap]


def test_ranking_puts_the_best_first_whichever_way_and_what_has_no_value_last() -> None:
    a, b, c = entry("a", 0.1, 1, loss=1.0), entry("b", 0.2, 1, loss=2.0), entry("c", None, 1, loss=3.0)
    assert [item.name for item in scores.ranked([c, a, b], "accuracy")] == ["b", "a", "c"]
    assert [item.name for item in scores.ranked([c, b, a], "loss")] == ["a", "b", "c"]
    assert scores.offered([a])[0] == "accuracy"


def test_a_run_and_its_base_become_rows_with_what_they_cost() -> None:
    note = "its head is not trained"
    text = lines(score("base", "loss", 2.0, note=note), score("adapter", "loss", 1.0))
    found = scores.read(text).to_dict()
    row = scores.entry(RUN, found, {"trainable": 64}, {"seconds": 7.5, "peak_bytes": 9}, 300)
    assert (row.trained, row.bytes, row.peak, row.seconds, row.value("loss")) == (64, 300, 9, 7.5, 1.0)
    assert scores.entry(RUN, found, {}, {}, None).seconds == 30.0
    base = scores.base_entry(RUN, found)
    assert (base.run, base.value("loss"), base.note, base.trained) == ("", 2.0, note, None)
    other = {**RUN, "spec": {**RUN["spec"], "training": {"seed": 1}}}
    assert scores.base_entry(other, found).rests_on != base.rests_on
    assert scores.cautions([row]) == []
    (told,) = scores.cautions([row, scores.entry(other, found, {}, {}, None)])
    assert "same rows" in told


def test_what_looks_equal_is_not_called_better() -> None:
    found = scores.read(lines(score("base", "chrf", 47.71), score("adapter", "chrf", 47.74))).to_dict()
    assert "good" not in score_words.metrics_table(found, "adapter")


def test_the_tables_mark_the_better_side_and_let_no_markup_through() -> None:
    text = lines(score("base", "chrf", 20.0), score("adapter", "chrf", 60.0))
    rows = {"type": "row", "row": 3, "prompt": "<i>a</i>", "wanted": "b  c", "base": "x", "adapter": "b c"}
    found = scores.read(text + lines(rows)).to_dict()
    shown = score_words.result(RUN, {"result": found, "fresh": False, "ended": 1.0})
    cell = shown[shown.index(">60<") :]
    assert cell.index("better") < cell.index("</td>") and ">20</span></td>" in shown
    assert "<i>a" not in shown and "<b>mine" not in shown and "trained on since" in shown
    assert shown.count("as wanted") == 1
    board = score_words.leaderboard(
        [scores.entry(RUN, found, {"trainable": 5}, {}, 9), scores.base_entry(RUN, found)], "chrf", "bytes", RUN["id"]
    )
    assert 'data-run="run-00000001" aria-current="true"' in board and board.index("run-00000001") < board.index(
        "base-name"
    )
    assert "peak memory" not in board and "<b>mine" not in board


def test_a_text_that_looks_like_a_path_is_a_text_and_opens_nothing(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "secret.png"
    Image.new("RGB", (4, 4), "red").save(path)
    item = {"row": 1, "prompt": str(path), "wanted": "red", "base": str(path), "adapter": "red"}
    shown = {
        task: score_words.rows_table({"task": task}, {"rows": [item]}, "adapter")
        for task in ("causal_lm", "captioning")
    }
    assert "<img" not in shown["causal_lm"]
    assert shown["captioning"].count("<img") == 1 and shown["captioning"].count("as wanted") == 1


def test_the_plot_has_a_logarithmic_x_and_a_level_for_the_base() -> None:
    spots = [
        charts.Spot("a", 100.0, 0.5, "#111111", "run-a", "100 bytes", True),
        charts.Spot("b", 10_000.0, 0.7, "#222222", "run-b", "10 kB", True),
        charts.Spot("c", 1_000.0, 0.4, "#333333", "run-c", "1 kB"),
    ]
    drawn = charts.scatter("Accuracy", spots, x_label="size", x_told=score_words.short, levels=[("base", 0.3)])
    places = {name: float(drawn.split(f'data-run="run-{name}"')[1].split("left:")[1].split("%")[0]) for name in "abc"}
    assert places["a"] < places["c"] < places["b"]
    assert abs(places["c"] - (places["a"] + places["b"]) / 2) < 0.1
    assert drawn.count('class="mark front"') == 2 and 'class="level-name"' in drawn
    front = drawn.split('class="front" points="')[1].split('"')[0].split()
    assert len(front) == 2
    assert "waits" in charts.scatter("x", [], x_label="size", x_told=str, waiting="waits")
    one = charts.scatter("x", spots[:1], x_label="size", x_told=str)
    assert 'data-run="run-a"' in one


def test_axes_say_few_round_values() -> None:
    assert charts.log_ticks(2.0, 3.0) == [100, 200, 500, 1000]
    assert len(charts.log_ticks(0.0, 9.0)) <= 6
    assert [score_words.short(value) for value in (950, 12_000, 2_400_000)] == ["950", "12 k", "2.4 M"]


def test_the_measured_leaderboard_is_shown_only_with_runs(tmp_path: Path) -> None:
    path = tmp_path / "leaderboard.json"
    assert scores.measured(path) == []
    path.write_text('{"runs": []}')
    assert scores.measured(path) == []
    run = {"contender": "lora", "trainable": 5, "bytes": 7, "peak_bytes": 3, "macro_f1": 0.5, "cpu_seconds": 2.0}
    runs = [{**run, "accuracy": 0.6}, {**run, "accuracy": 0.8}, {**run, "contender": "full", "accuracy": 0.9}]
    path.write_text(json.dumps({"runs": runs}))
    found = scores.measured(path)
    assert [row["contender"] for row in found] == ["full", "lora"] and found[1]["accuracy"] == pytest.approx(0.7)
    assert "python -m bench.leaderboard" in score_words.measured_table(found)
    path.write_text('{"runs": [{"contender": "lora"}]}')
    assert scores.measured(path) == []


def test_the_measured_contenders_have_titles_in_both_languages() -> None:
    rows = scores.measured()
    assert rows and {row["contender"] for row in rows} <= CONTENDERS.keys()
    assert not {row["title"] for row in rows} & CONTENDERS.keys()
    for name, title in scores.CONTENDERS.items():
        assert title == CONTENDERS[name].title
    with speaking(KOREAN):
        shown = score_words.measured_table(rows)
    assert "전체 미세 조정" in shown and "LoRA, 쿼리와 값" in shown and "Full fine-tuning" not in shown
    assert "0.770" in shown
