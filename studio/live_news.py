"""What the open page of a run asks again and again: whether there is anything new, and then its numbers and lines.

Gradio's own way costs the machine that trains more than the drawing does: for each answer the page compiles the whole
HTML as a template, compares all that it holds, and looks up every widget. So a script of ours
(`assets/scripts/live.js`) asks past Gradio's callbacks, and changes what differs where it stands. What it asks goes to
the head's component (`component_server`, behind the same login as all else), and an unchanged run is answered with
nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import EngineError
from studio import curves, doctor, live
from studio.i18n import LANGUAGES, language, speaking
from studio.page import Page

Answer = dict[str, Any]
SMOOTHING = 0.6
"""Where the page tells no other."""


def asked(page: Page) -> Callable[[Any], Answer]:
    """The function that answers the script, with whatever it is sent."""

    def live_news(question: Any) -> Answer:
        """The news of a run since `seen`, an empty answer where there are none; `gone` where there is no such run.

        `question` has `run` and `looks` as `studio.live.mark` has written them, `seen` of the answer before, `log` and
        `smoothing` as the person has set them, the `language` of the mark, and whether `hover` data is wanted. `stale`
        in the answer says that more has changed than `head`, `doctor` and `curves`.
        """
        told = question if isinstance(question, dict) else {}
        spoken = told.get("language")
        try:
            # This request lacks what the page's address may say of the language.
            with speaking(spoken if isinstance(spoken, str) and spoken in LANGUAGES else language()):
                return _news(page, told)
        except EngineError:
            return {"gone": True}

    return live_news


def _news(page: Page, told: Mapping[str, Any]) -> Answer:
    store = page.studio.store
    row = store.run(told.get("run", ""))
    if told.get("seen") == live.seen(row, store.last_event_id(row["id"])):
        return {}
    found = curves.of_run(store, row["id"])
    findings = doctor.findings(found, row)
    log, hover = told.get("log") is True, told.get("hover") is True
    return {
        "seen": live.seen(row, found.last_id),
        "head": live.head_html(page, row, found),
        "doctor": doctor.box(findings, row),
        "curves": live.curves_html(found, row, log, _smoothing(told.get("smoothing")), hover),
        "stale": told.get("looks") != live.looks(row, found, live.steady(page, row, found, findings)),
    }


def _smoothing(value: Any) -> float:
    """The share of the past that was asked for, where the slider can say it."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 0.99
    return float(value) if good else SMOOTHING
