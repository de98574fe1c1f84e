"""What the open page of a run asks again and again: whether there is anything new, and then what has changed.

Gradio's own way costs the machine that trains more than the drawing does: for each answer the page compiles the whole
HTML as a template, compares all that it holds, and looks up every widget. So a script of ours
(`assets/scripts/live.js`) asks past Gradio's callbacks, and changes what differs where it stands. What it asks goes to
the head's component (`component_server`, behind the same login as all else), and an unchanged run is answered with
nothing at all. What was told last is remembered here for a while, so that a page which has it is told no more than the
ends of its lines.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import EngineError
from engine.findings import Finding
from studio import curves, doctor, live
from studio.charts import Drawing
from studio.curves import Curves
from studio.i18n import LANGUAGES, language, speaking
from studio.page import Page
from studio.store import Row

Answer = dict[str, Any]
SMOOTHING = 0.6
"""Where the page tells no other."""
KEPT = 32
"""Pages whose last answer is remembered, some 30 kB each; others are told all."""
ROUND = 4.0
"""Seconds between two visits of the doctor, and between two drawings of the small charts: both change slowly, and are
most of the work of an answer and of its drawing in the browser."""
BEHIND = "+"
"""At the end of a `seen` whose small charts lack the newest steps."""


@dataclass(frozen=True)
class Sides:
    """The small charts of an answer.

    Attributes:
        charts: one by one.
        of: what they were drawn for, besides steps.
        last_id: the newest event in them.
        when: the moment of the drawing.
    """

    charts: tuple[Drawing, ...]
    of: object
    last_id: int
    when: float

    def stand(self) -> bool:
        """Whether it is too early to draw them again."""
        return time.monotonic() - self.when < ROUND


@dataclass(frozen=True)
class Told:
    """What one page was told last."""

    run: str
    doctor: str
    loss: Drawing | None
    sides: Sides

    @property
    def charts(self) -> tuple[Drawing, ...]:
        """All of them, none of a run that has nothing to draw."""
        return (self.loss, *self.sides.charts) if self.loss else ()


class Memory:
    """What pages were told, each by a word that only the page and this know."""

    def __init__(self) -> None:
        self._told: OrderedDict[str, Told] = OrderedDict()
        self._visits: OrderedDict[str, tuple[float, object, list[Finding]]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, word: object, run: str) -> Told | None:
        """What the page with this word was told of this run. It is asked for once: the answer brings another word."""
        with self._lock:
            found = self._told.pop(word, None) if isinstance(word, str) else None
        return found if found is not None and found.run == run else None

    def rests(self, word: object, run: str) -> bool:
        """Whether what stands on the page with this word may be a little behind for a while yet."""
        with self._lock:
            found = self._told.get(word) if isinstance(word, str) else None
        return found is not None and found.run == run and found.sides.stand()

    def keep(self, told: Told) -> str:
        """Remember this; returns its word."""
        word = secrets.token_hex(8)
        with self._lock:
            self._told[word] = told
            while len(self._told) > KEPT:
                self._told.popitem(last=False)
        return word

    def findings(self, row: Row, found: Curves, fresh: bool) -> list[Finding]:
        """What the doctor says of a run, or said a while ago: where only steps came since, and `fresh` is not asked."""
        known = (row["state"], len(found.evals), *(len(found.of(kind)) for kind in ("start", "error", "done")))
        now = time.monotonic()
        with self._lock:
            then, of, said = self._visits.get(row["id"], (0.0, None, []))
        if of != known or fresh or now - then > ROUND:
            said = doctor.findings(found, row)
            with self._lock:
                self._visits[row["id"]] = (now, known, said)
                self._visits.move_to_end(row["id"])
                while len(self._visits) > KEPT:
                    self._visits.popitem(last=False)
        return said


def asked(page: Page) -> Callable[[Any], Answer]:
    """The function that answers the script, with whatever it is sent."""
    memory = Memory()

    def live_news(question: Any) -> Answer:
        """The news of a run since `seen`, an empty answer where there are none; `gone` where there is no such run.

        `question` has `run` and `looks` as `studio.live.mark` has written them, `seen` and `have` of the answer before,
        `log` and `smoothing` as the person has set them, the `language` of the mark, and whether `hover` data is
        wanted. In the answer `curves` is all charts; to a page that has those of before, `charts` is what makes the new
        ones of each (`Drawing.since`), and `doctor` is left out where it says what it did. `stale` says that more has
        changed than these and `head`: then Gradio draws them too, all at once, so they are not told.
        """
        told = question if isinstance(question, dict) else {}
        spoken = told.get("language")
        try:
            # This request lacks what the page's address may say of the language.
            with speaking(spoken if isinstance(spoken, str) and spoken in LANGUAGES else language()):
                return _news(page, memory, told)
        except EngineError:
            return {"gone": True}

    return live_news


def _news(page: Page, memory: Memory, told: Mapping[str, Any]) -> Answer:
    store = page.studio.store
    row = store.run(told.get("run", ""))
    newest = live.seen(row, store.last_event_id(row["id"]))
    if told.get("seen") == newest:
        return {}
    if told.get("seen") == newest + BEHIND and memory.rests(told.get("have"), row["id"]):
        return {}
    found = curves.of_run(store, row["id"])
    answer: Answer = {"seen": live.seen(row, found.last_id)}
    # What was found a while ago may not be what the page was drawn for.
    for fresh in (False, True):
        findings = memory.findings(row, found, fresh)
        if told.get("looks") == live.looks(row, found, live.steady(page, row, found, findings)):
            break
    else:
        return answer | {"stale": True}
    log, hover = told.get("log") is True, told.get("hover") is True
    had = memory.take(told.get("have"), row["id"])
    there = live.drawable(found, row)
    now = Told(
        run=row["id"],
        doctor=doctor.box(findings, row),
        loss=live.loss(found, row, log, _smoothing(told.get("smoothing")), hover) if there else None,
        sides=_sides(found, row, hover, had.sides if had else None),
    )
    answer |= {"stale": False, "head": live.head_html(page, row, found)}
    if now.sides.last_id != found.last_id:
        answer["seen"] += BEHIND
    if had is None or had.doctor != now.doctor:
        answer["doctor"] = now.doctor
    if had is None or len(had.charts) != len(now.charts):
        answer["curves"] = live.framed(now.charts)
    else:
        answer["charts"] = [new.since(old) for new, old in zip(now.charts, had.charts, strict=True)]
    return answer | {"have": memory.keep(now)}


def _sides(found: Curves, row: Row, hover: bool, had: Sides | None) -> Sides:
    """The small charts as they are, or as they were a moment ago where only steps came since."""
    of = (row["state"], len(found.evals), live.width(row), hover)
    if had is not None and had.of == of and had.stand():
        return had
    return Sides(tuple(live.sides(found, row, hover)), of, found.last_id, time.monotonic())


def _smoothing(value: Any) -> float:
    """The share of the past that was asked for, where the slider can say it."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 0.99
    return float(value) if good else SMOOTHING
