"""What the open page of a run is told: nothing without news, and then no more than has changed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hostile
import pytest
from courses import healthy, run_of

from studio import curves, doctor, live, live_news, states
from studio.context import Studio
from studio.i18n import KOREAN, speaking
from studio.live import Live
from studio.live_news import Follower

STEP = {"type": "step", "loss": 0.8, "lr": 1e-4, "grad_norm": 1.0, "eta_s": 60.0}


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    found = Studio.open(tmp_path / "home")
    yield found
    found.close()


@pytest.fixture
def page(studio: Studio) -> Any:
    return SimpleNamespace(studio=studio)


@pytest.fixture
def run(studio: Studio) -> str:
    return run_of(studio, "walk", healthy(steps=40, total=400), states.RUNNING)


class Part:
    """Stands in for a widget: what is drawn where is all that counts."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes


def widgets() -> Live:
    parts: dict[str, Any] = {name: Part() for name in Live.__dataclass_fields__}
    return Live(**parts)


def marked(head: str) -> dict[str, str]:
    """The mark in a head, as the page's script reads it."""
    (mark,) = re.findall(r'<span class="live-mark" [^>]*>', head)
    return dict(re.findall(r'data-(\w+)="([^"]*)"', mark)) | ({"live": ""} if " data-live>" in mark else {})


def drawn(page: Any, run: str, had: Any = None) -> dict[str, Any]:
    """What Gradio would draw, by the part's name."""
    row, studio = page.studio.store.run(run), page.studio
    found = curves.of_run(studio.store, run)
    told = doctor.findings(found, row)
    head = live.mark(row, found, live.looks(row, found, live.steady(studio, row, found, told)))
    return {"head": head + live.head_html(studio, row, found), "curves": live.curves_html(found, row, False, 0.6)}


def follower(page: Any, run: str, **more: str) -> Follower:
    """A page that shows what Gradio has just drawn."""
    mark = marked(drawn(page, run)["head"])
    return Follower(page.studio, {"run": run, **{key: mark[key] for key in ("looks", "seen", "language")}, **more})


def test_without_news_the_answer_is_empty(page: Any, run: str) -> None:
    assert follower(page, run).news() == {}
    fresh = follower(page, run, seen="")
    assert "head" in fresh.news() and fresh.news() == {}


def test_a_step_changes_numbers_and_lines_alone(page: Any, run: str) -> None:
    bare, pointed = follower(page, run), follower(page, run, hover="true")
    page.studio.store.add_event(run, {**STEP, "step": 41})
    news, whole = bare.news(), drawn(page, run)
    assert "<b>41</b>" in news["head"] and "live-mark" not in news["head"]
    assert whole["head"].endswith(news["head"])
    # The data of the hover text is left out, and nothing else; asked for, it comes.
    without = re.sub(r' data-hover="[^"]*"', "", whole["curves"])
    assert news["curves"] == without != whole["curves"] and len(json.dumps(news)) < len(whole["curves"])
    assert pointed.news()["curves"] == whole["curves"]
    assert "doctor" in news["doctor"] and bare.news() == {}


def shown(news: dict[str, Any], before: list[str]) -> list[str]:
    """The charts that a page has after an answer, as its script changes those of before."""
    if "curves" in news:
        return [f"<figure{one}" for one in news["curves"].removesuffix("</div>").split("<figure")[1:]]
    found = list(before)
    for at, part in enumerate(news["charts"]):
        if isinstance(part, str):
            found[at] = part
        elif part is not None:
            label = f'aria-label="{part["said"]}"'
            lines = re.split(r"(<polyline [^>]*/>)", re.sub(r'aria-label="[^"]*"', label, before[at], count=1))
            for line, places in part["lines"].items():
                place = 2 * int(line) + 1
                lines[place] = re.sub(r'points="[^"]*"', f'points="{places}"', lines[place])
            found[at] = "".join(lines)
    return found


def test_a_page_that_has_the_charts_of_before_is_told_what_moved(
    page: Any, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_news, "ROUND", 0.0)
    followed, store = follower(page, run, seen=""), page.studio.store
    news = followed.news()
    charts, whole, sizes = shown(news, []), [], []
    assert len(charts) == 5 and "doctor" in news
    for step in range(41, 200):
        store.add_event(run, {**STEP, "step": step, "loss": 0.8 + (step * 37 % 100) / 300, "memory": 10**9})
        news = followed.news()
        charts = shown(news, charts)
        assert charts == [one.html() for one in drawings(page, run)]
        whole.append("curves" in news or any(isinstance(part, str) for part in news["charts"]))
        sizes.append(len(json.dumps(news)))
    # Frames grow at first, and pieces come.
    assert sum(whole) < 12 and sorted(sizes)[80] < 4_000


def test_small_charts_are_drawn_now_and_then_and_at_last_with_every_step(
    page: Any, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = page.studio.store
    store.add_event(run, {**STEP, "step": 41})
    followed = follower(page, run, seen="")
    charts, former = shown(followed.news(), []), drawings(page, run)
    for _ in range(2):
        store.add_event(run, {**STEP, "step": 42, "grad_norm": 0.5})
        charts = shown(followed.news(), charts)
        now = drawings(page, run)
        assert now[2] != former[2] and charts == [now[0].html(), *(one.html() for one in former[1:])]
    # The run rests: what the page lacks is not told before its time, and then it is.
    assert followed.news() == {} == followed.news()
    monkeypatch.setattr(live_news, "ROUND", 0.0)
    assert shown(followed.news(), charts) == [one.html() for one in drawings(page, run)]
    assert followed.news() == {}


def test_small_charts_that_changed_otherwise_are_drawn_at_once(page: Any, run: str) -> None:
    followed = follower(page, run, seen="")
    followed.news()
    page.studio.store.add_event(run, {"type": "eval", "step": 41, "loss": 0.9, "metrics": {"accuracy": 0.5}})
    followed.looks = follower(page, run).looks
    assert "accuracy" in followed.news()["curves"].lower()


def drawings(page: Any, run: str) -> Any:
    store = page.studio.store
    return live.drawings(curves.of_run(store, run), store.run(run), False, 0.6, hover=False)


def test_the_doctor_comes_by_seldom_but_at_once_where_more_than_steps_came(
    page: Any, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, visits, findings = page.studio.store, [], doctor.findings
    followed = follower(page, run, seen="")
    monkeypatch.setattr(doctor, "findings", lambda *given: visits.append(1) or findings(*given))
    for step in range(41, 51):
        store.add_event(run, {**STEP, "step": step})
        assert "head" in followed.news()
    assert len(visits) == 1
    store.add_event(run, {"type": "eval", "step": 50, "loss": 0.8})
    assert "head" in followed.news() and len(visits) == 2
    # A page that was drawn for something else is not called stale by what was found a while ago.
    store.add_event(run, {**STEP, "step": 51})
    followed.looks = "other"
    assert followed.news() == {"stale": True} and len(visits) == 3


def test_scale_and_smoothing_are_those_of_the_page(page: Any, run: str) -> None:
    row, found = page.studio.store.run(run), curves.of_run(page.studio.store, run)
    for log, smoothing in ((True, 0.0), (False, 0.99)):
        wanted = live.curves_html(found, row, log, smoothing, hover=False)
        asked = {"seen": "", "log": str(log).lower(), "smoothing": str(smoothing)}
        assert follower(page, run, **asked).news()["curves"] == wanted
    usual = follower(page, run, seen="").news()["curves"]
    for odd in ("", "true", "-1", "1", "1e400", "nan", "[0.1]"):
        assert follower(page, run, seen="", smoothing=odd).news()["curves"] == usual, odd


def test_it_speaks_as_the_page_does(page: Any, run: str) -> None:
    english = follower(page, run, seen="").news()["curves"]
    with speaking(KOREAN):
        told = follower(page, run, seen="")
    assert marked(drawn(page, run)["head"])["language"] == "en"
    # Whatever language the request itself is in.
    korean = told.news()
    assert "400단계" in korean["head"] and "학습률" in korean["curves"] and "학습률" not in english
    with speaking(KOREAN):
        assert follower(page, run, seen="", language="xx").news()["curves"] == korean["curves"]


@pytest.mark.parametrize("change", ["state", "sample", "warning", "rank"])
def test_what_changes_more_than_numbers_is_told_and_then_drawn(page: Any, run: str, change: str) -> None:
    followed, store = follower(page, run), page.studio.store
    if change == "state":
        store.update_run(run, state=states.PAUSED)
    elif change == "sample":
        store.add_event(run, {"type": "sample", "step": 40, "prompt": "hello", "text": "ahoy"})
    elif change == "warning":
        store.add_event(run, {"type": "warning", "step": 40, "message": "That was left out."})
    else:
        store.add_event(run, {"type": "rank", "step": 40, "ranks": {"layer": 4}})
    assert followed.news() == {"stale": True} == followed.news()
    assert "head" in follower(page, run, seen="").news()
    # A run that rests has no mark for the script to follow.
    assert ("live" in marked(drawn(page, run)["head"])) == (change != "state")


def test_samples_and_ranks_are_drawn_only_for_a_page_that_lacks_them(page: Any, run: str) -> None:
    page.studio.store.add_event(run, {"type": "sample", "step": 40, "prompt": "hello", "text": "ahoy"})
    had, parts = marked(drawn(page, run)["head"]), widgets()
    large = {parts.film, parts.ranks}

    def redrawn(known: Any) -> set[Any]:
        return large & set(live.draw(page, parts, run, False, 0.6, False, known))

    assert redrawn(None) == redrawn("odd") == redrawn({**had, "samples": "0"}) == redrawn({**had, "run": "x"}) == large
    assert redrawn(had) == set()


def test_no_question_is_odd_enough_to_break_it(page: Any, run: str, tmp_path: Path) -> None:
    assert Follower(page.studio, {}).news() == {"gone": True}
    names = ("seen", "looks", "log", "smoothing", "hover", "language")
    for value in hostile.texts(tmp_path / "secret", "http://127.0.0.1:9", 1):
        assert Follower(page.studio, {"run": value}).news() == {"gone": True}
        assert Follower(page.studio, {"run": run, **dict.fromkeys(names, value)}).news() == {"stale": True}
    assert not (tmp_path / "touched").exists()
