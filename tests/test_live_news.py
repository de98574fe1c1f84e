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
    row, parts = page.studio.store.run(run), page.studio
    found = curves.of_run(parts.store, run)
    told = doctor.findings(found, row)
    head = live.mark(row, found, live.looks(row, found, live.steady(page, row, found, told)))
    return {"head": head + live.head_html(page, row, found), "curves": live.curves_html(found, row, False, 0.6)}


def question(page: Any, run: str, **more: Any) -> dict[str, Any]:
    mark = marked(drawn(page, run)["head"])
    return {"run": run, "looks": mark["looks"], "seen": mark["seen"], "log": False, "smoothing": 0.6, **more}


def test_without_news_the_answer_is_empty(page: Any, run: str) -> None:
    ask = live_news.asked(page)
    told = question(page, run)
    assert ask(told) == {}
    news = ask({**told, "seen": ""})
    assert news["seen"] == told["seen"] and ask({**told, "seen": news["seen"]}) == {}


def test_a_step_changes_numbers_and_lines_alone(page: Any, run: str) -> None:
    ask, told = live_news.asked(page), question(page, run)
    page.studio.store.add_event(run, {**STEP, "step": 41})
    news = ask(told)
    assert not news["stale"] and "<b>41</b>" in news["head"] and "live-mark" not in news["head"]
    whole = drawn(page, run)
    assert whole["head"].endswith(news["head"])
    # The data of the hover text is left out, and nothing else; asked for, it comes.
    bare = re.sub(r' data-hover="[^"]*"', "", whole["curves"])
    assert news["curves"] == bare != whole["curves"] and len(json.dumps(news)) < len(whole["curves"])
    assert ask({**told, "hover": True})["curves"] == whole["curves"]
    assert "doctor" in news["doctor"] and ask({**told, "seen": news["seen"]}) == {}


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
    ask, told, store = live_news.asked(page), question(page, run, seen=""), page.studio.store
    news = ask(told)
    charts, whole, sizes = shown(news, []), [], []
    assert len(charts) == 5 and "doctor" in news
    for step in range(41, 200):
        store.add_event(run, {**STEP, "step": step, "loss": 0.8 + (step * 37 % 100) / 300, "memory": 10**9})
        news = ask({**told, "seen": news["seen"], "have": news["have"]})
        charts = shown(news, charts)
        assert "".join(charts) == live.framed(drawings(page, run)).removeprefix('<div class="charts">')[:-6]
        whole.append("curves" in news or any(isinstance(part, str) for part in news["charts"]))
        sizes.append(len(json.dumps(news)))
    # Frames grow at first, and pieces come.
    assert sum(whole) < 12 and sorted(sizes)[80] < 4_000


def drawings(page: Any, run: str, hover: bool = False) -> Any:
    store = page.studio.store
    return live.drawings(curves.of_run(store, run), store.run(run), False, 0.6, hover=hover)


def test_small_charts_are_drawn_now_and_then_and_at_last_with_every_step(
    page: Any, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, store = live_news.asked(page), page.studio.store
    store.add_event(run, {**STEP, "step": 41})
    told = question(page, run, seen="", have="")
    news = ask(told)
    charts, former = shown(news, []), drawings(page, run)
    for _ in range(2):
        store.add_event(run, {**STEP, "step": 42, "grad_norm": 0.5})
        told |= {"seen": news["seen"], "have": news["have"]}
        news = ask(told)
        charts = shown(news, charts)
        now = drawings(page, run)
        assert now[2] != former[2] and charts == [now[0].html(), *(one.html() for one in former[1:])]
    # The run rests: what the page lacks is not told before its time, and then it is.
    told |= {"seen": news["seen"], "have": news["have"]}
    assert ask(told) == {} == ask(told)
    monkeypatch.setattr(live_news, "ROUND", 0.0)
    news = ask(told)
    assert shown(news, charts) == [one.html() for one in drawings(page, run)]
    assert ask({**told, "seen": news["seen"], "have": news["have"]}) == {}


def test_small_charts_that_changed_otherwise_are_drawn_at_once(page: Any, run: str) -> None:
    ask, store = live_news.asked(page), page.studio.store
    told = question(page, run, seen="", have="")
    news = ask(told)
    store.add_event(run, {**STEP, "step": 41})
    pointed = ask({**told, "seen": news["seen"], "have": news["have"], "hover": True})
    assert shown(pointed, shown(news, [])) == [one.html() for one in drawings(page, run, hover=True)]
    store.add_event(run, {"type": "eval", "step": 41, "loss": 0.9, "metrics": {"accuracy": 0.5}})
    told = question(page, run, seen=pointed["seen"], have=pointed["have"])
    assert "accuracy" in ask(told)["curves"].lower()


def test_what_a_page_says_it_has_is_its_own_and_is_known_once(page: Any, run: str, studio: Studio) -> None:
    ask, told = live_news.asked(page), question(page, run, seen="")
    other = run_of(studio, "other", healthy(steps=40, total=400), states.RUNNING)
    have = ask(told)["have"]
    # Another run's page, and a page that asks again since the answer was lost, are told everything.
    assert "curves" in ask({**question(page, other, seen=""), "have": have})
    have = ask(told)["have"]
    news = ask({**told, "have": have})
    assert news["charts"] == [None] * 5 and "doctor" not in news and "curves" not in news
    again = ask({**told, "have": have})
    assert "charts" not in again and "doctor" in again
    # Many pages at once: the one that has not asked for longest is told everything.
    first = ask(told)["have"]
    for _ in range(live_news.KEPT):
        last = ask(told)["have"]
    assert "curves" in ask({**told, "have": first}) and "charts" in ask({**told, "have": last})


def test_the_doctor_comes_by_seldom_but_at_once_where_more_than_steps_came(
    page: Any, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, visits, findings = page.studio.store, [], doctor.findings
    ask, told = live_news.asked(page), question(page, run, seen="")
    monkeypatch.setattr(doctor, "findings", lambda *given: visits.append(1) or findings(*given))
    for step in range(41, 51):
        store.add_event(run, {**STEP, "step": step})
        assert ask(told)["stale"] is False
    assert len(visits) == 1
    store.add_event(run, {"type": "eval", "step": 50, "loss": 0.8})
    assert ask(told)["stale"] is False and len(visits) == 2
    # A page that was drawn for something else is not called stale by what was found a while ago.
    monkeypatch.setattr(live_news, "ROUND", -1.0)
    ask(told)
    assert len(visits) == 3 and ask({**told, "looks": "other"}) == {"seen": question(page, run)["seen"], "stale": True}


def test_scale_and_smoothing_are_those_of_the_page(page: Any, run: str) -> None:
    ask, told = live_news.asked(page), question(page, run, seen="")
    row, found = page.studio.store.run(run), curves.of_run(page.studio.store, run)
    for log, smoothing in ((True, 0.0), (False, 0.99)):
        wanted = live.curves_html(found, row, log, smoothing, hover=False)
        assert ask({**told, "log": log, "smoothing": smoothing})["curves"] == wanted
    usual = ask(told)["curves"]
    for odd in (None, "0.9", True, -1, 1, 10**400, float("nan"), [0.1]):
        assert ask({**told, "smoothing": odd})["curves"] == usual, odd


def test_what_is_drawn_in_another_language_is_not_stale(page: Any, run: str) -> None:
    with speaking(KOREAN):
        mark = marked(drawn(page, run)["head"])
    told = {"run": run, **{key: mark[key] for key in ("looks", "language")}}
    assert mark["language"] == "ko" and not live_news.asked(page)(told)["stale"]
    assert marked(drawn(page, run)["head"])["language"] == "en"


def test_it_speaks_as_the_page_does(page: Any, run: str) -> None:
    ask, told = live_news.asked(page), question(page, run, seen="")
    with speaking(KOREAN):
        looks = marked(drawn(page, run)["head"])["looks"]
    korean = ask({**told, "language": "ko", "looks": looks})
    assert "400단계" in korean["head"] and "학습률" in korean["curves"] and "학습률" not in ask(told)["curves"]
    with speaking(KOREAN):
        assert (
            ask({**told, "language": ["ko"], "looks": looks})["curves"]
            == korean["curves"]
            != ask({**told, "language": "en"})["curves"]
        )


@pytest.mark.parametrize("change", ["state", "sample", "warning", "rank"])
def test_what_changes_more_than_numbers_is_told_and_then_drawn(page: Any, run: str, change: str) -> None:
    ask, told, store = live_news.asked(page), question(page, run), page.studio.store
    if change == "state":
        store.update_run(run, state=states.PAUSED)
    elif change == "sample":
        store.add_event(run, {"type": "sample", "step": 40, "prompt": "hello", "text": "ahoy"})
    elif change == "warning":
        store.add_event(run, {"type": "warning", "step": 40, "message": "That was left out."})
    else:
        store.add_event(run, {"type": "rank", "step": 40, "ranks": {"layer": 4}})
    assert ask(told).keys() == {"seen", "stale"}
    again = question(page, run, seen="")
    assert ask(again)["stale"] is False
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
    ask = live_news.asked(page)
    odd = [*hostile.texts(tmp_path / "secret", "http://127.0.0.1:9", 1), *hostile.values(tmp_path / "secret", "x")]
    for value in odd:
        assert ask(value) == ask({"run": value}) == {"gone": True}
        news = ask(
            {
                "run": run,
                "seen": value,
                "have": value,
                "looks": value,
                "log": value,
                "smoothing": value,
                "hover": value,
                "language": value,
            }
        )
        assert news["stale"] is True and "/etc/passwd" not in json.dumps(news)
    assert not (tmp_path / "touched").exists()
