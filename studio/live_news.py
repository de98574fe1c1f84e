"""What the open page of a run is told again and again: nothing without news, and then what has changed.

Gradio's own way costs the machine that trains more than the drawing does: for each answer the page compiles the whole
HTML as a template, compares all that it holds, and looks up every widget. So a script of ours
(`assets/scripts/live.js`) listens to a stream (`studio.live_stream`), and changes what differs where it stands. What a
page was told last is kept with its stream, so that it is told no more than the ends of its lines.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import EngineError
from engine.findings import Finding
from studio import curves, doctor, live
from studio.charts import Drawing
from studio.context import Studio
from studio.curves import Curves
from studio.i18n import LANGUAGES, language, speaking
from studio.store import Row

Answer = dict[str, Any]
SMOOTHING = 0.6
"""Where the page tells no other."""
ROUND = 4.0
"""Seconds between two visits of the doctor, and between two drawings of the small charts: both change slowly, and are
most of the work of an answer and of its drawing in the browser."""


@dataclass(frozen=True)
class Dated:
    """What was found out a while ago.

    Attributes:
        what: the findings, or the charts.
        of: what they were made for, besides steps.
        last_id: the newest event in them.
        when: the moment.
    """

    what: Any
    of: object
    last_id: int
    when: float

    @property
    def young(self) -> bool:
        """Whether it is too early to find it out again."""
        return time.monotonic() - self.when < ROUND

    def stands(self, of: object) -> bool:
        """Whether it is still what would be found out for this, but for a few steps."""
        return self.of == of and self.young


class Follower:
    """One open page of a run.

    Args:
        studio: store and jobs.
        asked: `run`, `looks` and `language` as `studio.live.mark` has written them, `seen` of what the page shows
            already; `log` and `smoothing` as the person has set them, and whether `hover` data is wanted. Whatever else
            stands there counts as not said.
    """

    def __init__(self, studio: Studio, asked: Mapping[str, str]) -> None:
        self.studio = studio
        self.run, self.looks, self.seen = (asked.get(name, "") for name in ("run", "looks", "seen"))
        self.log, self.hover = (asked.get(name) == "true" for name in ("log", "hover"))
        self.smoothing = _smoothing(asked.get("smoothing", ""))
        spoken = asked.get("language")
        self.language = spoken if spoken in LANGUAGES else language()
        self._findings: Dated | None = None
        self._sides: Dated | None = None
        self._doctor = ""
        self._charts: tuple[Drawing, ...] | None = None

    def news(self) -> Answer:
        """What is new since the last time, an empty answer where nothing is; `gone` where there is no such run.

        `curves` is all charts; where the page has those of before, `charts` is what makes the new ones of each
        (`Drawing.since`), and `doctor` is left out where it says what it did. `stale` says that more has changed than
        these and `head`: then Gradio draws them too, all at once, so they are not told.
        """
        try:
            with speaking(self.language):
                return self._news()
        except EngineError:
            return {"gone": True}

    def _news(self) -> Answer:
        row = self.studio.store.run(self.run)
        newest, sides = self.studio.store.last_event_id(row["id"]), self._sides
        late = sides is not None and sides.last_id < newest and not sides.young
        if self.seen == live.seen(row, newest) and not late:
            return {}
        found = curves.of_run(self.studio.store, row["id"])
        # What was found a while ago may not be what the page was drawn for.
        for fresh in (False, True):
            findings = self._visit(row, found, fresh)
            if self.looks == live.looks(row, found, live.steady(self.studio, row, found, findings)):
                break
        else:
            return {"stale": True}
        self.seen = live.seen(row, found.last_id)
        charts, said = self._drawn(row, found), doctor.box(findings, row)
        answer: Answer = {"head": live.head_html(self.studio, row, found)}
        if said != self._doctor:
            answer["doctor"] = said
        if self._charts is None or len(self._charts) != len(charts):
            answer["curves"] = live.framed(charts)
        else:
            answer["charts"] = [new.since(old) for new, old in zip(charts, self._charts, strict=True)]
        self._doctor, self._charts = said, charts
        return answer

    def _visit(self, row: Row, found: Curves, fresh: bool) -> list[Finding]:
        """What the doctor says, or said a while ago: where only steps came since, and `fresh` is not asked."""
        of = (row["state"], len(found.evals), *(len(found.of(kind)) for kind in ("start", "error", "done")))
        if fresh or self._findings is None or not self._findings.stands(of):
            self._findings = Dated(doctor.findings(found, row), of, found.last_id, time.monotonic())
        return list(self._findings.what)

    def _drawn(self, row: Row, found: Curves) -> tuple[Drawing, ...]:
        """The charts; the small ones as they were a moment ago where only steps came since."""
        if not live.drawable(found, row):
            return ()
        of = (row["state"], len(found.evals), live.width(row))
        if self._sides is None or not self._sides.stands(of):
            self._sides = Dated(live.sides(found, row, self.hover), of, found.last_id, time.monotonic())
        return (live.loss(found, row, self.log, self.smoothing, self.hover), *self._sides.what)


def _smoothing(value: str) -> float:
    """The share of the past that was asked for, where the slider can say it."""
    try:
        share = float(value)
    except ValueError:
        return SMOOTHING
    return share if math.isfinite(share) and 0 <= share <= 0.99 else SMOOTHING
