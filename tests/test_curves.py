"""Long runs on the live page: what is read, what is drawn, and that no extreme is lost."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.train.job import DataSpec, JobSpec
from studio import charts, curves, live
from studio.charts import Drawing
from studio.points import PIECE, Frame, thinned
from studio.store import Store

LONG = 100_000
COLOUR = "#0072B2"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def add_run(store: Store) -> str:
    return store.add_run(JobSpec(model="tiny-llama", data=DataSpec(path="rows.jsonl")))


def add_steps(store: Store, run: str, losses: Iterable[float], first: int = 1) -> None:
    """Many steps at once, as a worker would have left them."""
    rows = [
        (run, "step", step, float(step), json.dumps({"loss": loss, "lr": 1e-4, "grad_norm": 1.0, "memory": 10**9}))
        for step, loss in enumerate(losses, first)
    ]
    with store.exclusive() as db:
        db.conn.executemany("INSERT INTO events (run_id, type, step, time, data) VALUES (?, ?, ?, ?, ?)", rows)


def hovered(html: str, label: str) -> list[list[Any]]:
    """The points of one curve, as the page's hover text knows them."""
    for text in re.findall(r'data-hover="([^"]*)"', html):
        plain = text.replace("&quot;", '"').replace("&#123;", "{").replace("&#125;", "}")
        for curve in json.loads(plain)["curves"]:
            if curve["label"] == label:
                return list(curve["points"])
    raise AssertionError(f"no curve {label}")


def test_a_hundred_thousand_steps_are_drawn_by_a_few_hundred_points_with_their_extremes(store: Store) -> None:
    run = add_run(store)
    losses = [2 + math.sin(step / 50) for step in range(LONG)]
    losses[77_777], losses[33_333] = 50.0, 0.001
    add_steps(store, run, losses)
    store.add_event(run, {"type": "start", "total_steps": LONG})
    for step in range(0, LONG, 50):
        store.add_event(run, {"type": "eval", "step": step, "loss": 9.0 if step == 5000 else 3.0})
    row = {**store.run(run), "state": "running"}
    html = live.curves_html(curves.of_run(store, run), row, log=False, smoothing=0.6)

    loss, *sides = (lines_of(figure) for figure in html.split("<figure")[1:])
    assert charts.RAW_POINTS / 2 - 4 <= len(loss["thin"]) <= charts.RAW_POINTS
    assert charts.POINTS / 2 - 4 <= len(loss["thick"]) <= charts.POINTS
    assert len(sides) == 4 and all(len(side.get("thick", ())) <= charts.SIDE_POINTS for side in sides)
    assert len(html) < 500_000
    raw = loss["thin"]
    # The highest step is drawn above the plot, where the wildest hundredth goes; the lowest lies at its place.
    places = {float(point.split(",")[0]): float(point.split(",")[1]) for point in raw}
    assert min(places.values()) == places[77.78] == -2.0
    assert max(places, key=lambda x: places[x]) == 33.33
    assert raw[0].startswith("0.0,") and raw[-1].startswith("100.0,")
    dots = hovered(html, "evaluation")
    assert len(dots) <= charts.POINTS and [5000.0, "9"] in [point[2:] for point in dots]
    assert [point[2] for point in (dots[0], dots[-1])] == [0.0, LONG - 50.0]
    rates = hovered(html, "learning rate")
    assert (rates[0][2], rates[-1][2], len(rates) <= charts.POINTS) == (1.0, float(LONG), True)


def lines_of(figure: str) -> dict[str, list[str]]:
    """The places of each line of a chart, by its style, its pieces put together."""
    found: dict[str, list[str]] = {}
    for kind, places in re.findall(r'<polyline class="(\w+)"[^>]*points="([^"]*)"', figure):
        had = found.setdefault(kind, [])
        had += places.split()[bool(had) :]
    return found


@pytest.mark.parametrize("count", [3, 300, 301, 302, 999, 12_345])
def test_thinning_keeps_the_ends_the_extremes_and_the_limit(count: int) -> None:
    ys = np.random.default_rng(count).normal(size=count)
    kept = thinned(np.arange(count, dtype=float), ys, 300)
    assert len(kept) <= 300 and (len(kept) == count or count > 300)
    assert {0.0, count - 1.0, float(ys.argmin()), float(ys.argmax())} <= {x for x, _ in kept}
    assert all(ys[int(x)] == y for x, y in kept) and [x for x, _ in kept] == sorted({x for x, _ in kept})


def test_a_line_goes_through_the_places_of_its_points() -> None:
    frame = Frame(left=0.0, right=7.0, low=-1.0, high=2.0)
    points = [(step / 13, math.sin(step) * 4) for step in range(91)]
    for piece in (PIECE, 7, 1, len(points)):
        pieces = [
            [tuple(map(float, place.split(","))) for place in path.split()] for path in frame.paths(points, piece)
        ]
        # Each begins where the one before ends.
        assert [one[-1] for one in pieces[:-1]] == [one[0] for one in pieces[1:]]
        places = [place for at, one in enumerate(pieces) for place in one[at > 0 :]]
        assert places == [frame.at(*point) for point in points] and max(map(len, pieces)) <= piece + 1
    # What is outside the frame lies at its edge.
    assert {-2.0, 102.0} <= {y for _, y in places} and frame.paths([]) == [""]
    assert frame.paths(points[:1]) == [",".join(map(str, frame.at(*points[0])))]


def test_one_more_step_moves_the_end_of_a_line_alone(store: Store) -> None:
    run = add_run(store)
    noise = np.random.default_rng(0).random(1000)
    store.add_event(run, {"type": "start", "total_steps": LONG})
    add_steps(store, run, [2 + float(drawn) for drawn in noise[:990]])
    store.update_run(run, state="running", total_steps=LONG, step=989)
    row, moved, whole = store.run(run), 0, 0
    former = live.drawings(curves.of_run(store, run), row, log=False, smoothing=0.6, hover=False)
    for step in range(990, 1000):
        store.add_event(
            run, {"type": "step", "step": step, "loss": 2 + float(noise[step]), "lr": step, "grad_norm": 1.0}
        )
        now = live.drawings(curves.of_run(store, run), row, log=False, smoothing=0.6, hover=False)
        for new, old in zip(now, former, strict=True):
            told = new.since(old)
            whole += isinstance(told, str)
            if isinstance(told, dict):
                lines = list(old.lines)
                for place, places in told["lines"].items():
                    lines[int(place)] = (lines[int(place)][0], places)
                assert Drawing(told["said"], old.before, tuple(lines), old.after) == new
                moved = max(moved, len(told["lines"]))
        former = now
    # Of the loss the raw line and the smoothed one; the rate, which rises, leaves its frame now and then.
    assert moved == 2 and whole < 5
    assert [one.since(one) for one in former] == [None] * len(former) and former[0].since(None) == former[0].html()


def test_without_hover_text_a_chart_is_the_same_but_for_its_data() -> None:
    steps, losses = np.arange(1.0, 50.0), np.linspace(3.0, 1.0, 49)
    whole, bare = (
        charts.loss_curves(steps, losses, [{"step": 7, "loss": 2.0}], COLOUR, 50, hover=hover).html()
        for hover in (True, False)
    )
    assert re.sub(r' data-hover="[^"]*"', "", whole) == bare != whole


def test_only_what_is_new_is_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked = add_run(store), []
    add_steps(store, run, [3.0, 2.0])
    plain = store.events_after

    def watched(run_id: str, last_id: int) -> Any:
        found = plain(run_id, last_id)
        asked.append(len(found))
        return found

    monkeypatch.setattr(store, "events_after", watched)
    assert curves.of_run(store, run).column("loss").tolist() == [3.0, 2.0]
    store.add_event(run, {"type": "step", "step": 3, "loss": 1.0, "lr": 1e-4})
    found = curves.of_run(store, run)
    assert found.column("loss").tolist() == [3.0, 2.0, 1.0] and asked == [2, 1]
    assert np.isnan(found.column("memory")[-1])
    curves.of_run(store, run)
    assert asked == [2, 1, 0]


def test_after_a_resume_the_newest_row_of_a_step_counts(store: Store) -> None:
    run = add_run(store)
    curves.of_run(store, run)
    add_steps(store, run, [float(step) for step in range(1, 701)])
    curves.of_run(store, run)
    add_steps(store, run, [0.5] * 300, first=501)
    add_steps(store, run, [0.25], first=0)
    for step, loss in ((20, 3.0), (40, 2.0), (20, 1.5)):
        store.add_event(run, {"type": "eval", "step": step, "loss": loss})
    found, events = curves.of_run(store, run), store.by_step(run, "step")
    assert found.column("step").tolist() == [event["step"] for event in events] == list(range(801))
    assert found.column("loss").tolist() == [event["loss"] for event in events]
    assert [(event["step"], event["loss"]) for event in found.evals] == [(20, 1.5), (40, 2.0)]


def test_the_beginning_of_a_long_run_has_room_of_its_own() -> None:
    def room(step: int, state: str = "running") -> float | None:
        return live.width({"total_steps": 3000, "step": step, "state": state})

    assert [room(step) for step in (0, 10, 11, 40, 41, 374, 375)] == [20, 20, 80, 80, 320, 1280, 3000]
    assert room(5, "stopped") == 3000 and live.width({"total_steps": None, "step": 0, "state": "queued"}) is None


def test_few_runs_are_held(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, plain, asked = [add_run(store) for _ in range(curves.KEPT + 2)], store.events_after, []
    add_steps(store, runs[0], [3.0])

    def watched(run_id: str, last_id: int) -> Any:
        asked.append(last_id)
        return plain(run_id, last_id)

    monkeypatch.setattr(store, "events_after", watched)
    curves.of_run(store, runs[0])
    curves.of_run(store, runs[0])
    assert asked[0] == 0 < asked[1]
    for run in runs[1:]:
        curves.of_run(store, run)
    curves.of_run(store, runs[0])
    assert asked[-1] == 0


def test_what_one_page_draws_does_not_grow_while_another_reads_on(store: Store) -> None:
    run = add_run(store)
    add_steps(store, run, [3.0, 2.0])
    found = curves.of_run(store, run)
    steps = found.column("step")
    add_steps(store, run, [1.0] * 300, first=3)
    for kind, fields in (("eval", {"loss": 1.0}), ("sample", {"text": "a"}), ("rank", {"ranks": {"q": 4}})):
        store.add_event(run, {"type": kind, "step": 3, **fields})
    newer = curves.of_run(store, run)
    assert len(steps) == len(found.column("lr")) == 2 and found.newest("step") == store.by_step(run, "step")[1]
    assert (found.evals, found.of("sample"), found.mean_ranks, found.ranks) == ([], [], [], None)
    assert len(newer.column("lr")) == 302 and newer.mean_ranks == [(3.0, 4.0)] and len(newer.evals) == 1
    # As a page would that began before the other read on.
    row = {**store.run(run), "state": "running"}
    assert "charts" in live.curves_html(found, row, log=False, smoothing=0.6)
