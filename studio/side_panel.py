"""Compare, side by side: answers to one prompt, differences marked, two pictures under one handle, the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from engine.errors import EngineError
from studio import prompt_form, sampling_form, sharing
from studio.adapter_api import served
from studio.answers import Answers
from studio.compare_words import asked_html, base_name, columns_html, halted, legend_html, wipe_html
from studio.comparing import answer, answers_from
from studio.comparisons import Comparisons
from studio.context import Studio
from studio.i18n import t
from studio.markup import ago, error
from studio.page import HIDDEN


@dataclass
class Parts:
    """The widgets of the panel; `shown` is the id of the comparison that stands there."""

    ask: gr.Button
    stop: gr.Button
    marks: gr.Radio
    legend: gr.HTML
    answers: gr.HTML
    share: gr.DownloadButton
    wiping: gr.Column
    left: gr.Dropdown
    right: gr.Dropdown
    wipe: gr.HTML
    shown: gr.State

    @property
    def widgets(self) -> list[Any]:
        """All of them in one list."""
        return list(vars(self).values())


def build() -> Parts:
    """Lay them out."""
    ask, stop = prompt_form.buttons("compare", "generate", t("Generate"))
    marks = gr.Radio(
        [(t("No marks"), "off"), (t("What is new"), "new"), (t("New and left out"), "both")],
        value="new",
        label=t("Differences from the base"),
        # It is read by the style sheet alone, so that marks come and go at once.
        interactive=True,
        elem_id="compare-marks",
    )
    legend = gr.HTML(legend_html())
    answers = gr.HTML(elem_id="compare-answers")
    share = gr.DownloadButton(t("Download as one HTML file"), visible=False, elem_id="compare-share")
    with gr.Column(visible=False, elem_id="compare-wiping") as wiping:
        gr.HTML(f"<h3>{t('Two pictures under one handle')}</h3>")
        with gr.Row():
            left = gr.Dropdown([], label=t("Left of the handle"), elem_id="wipe-left")
            right = gr.Dropdown([], label=t("Right of the handle"), elem_id="wipe-right")
        wipe = gr.HTML(elem_id="compare-wipe")
    return Parts(ask, stop, marks, legend, answers, share, wiping, left, right, wipe, gr.State(None))


def asking(parts: Parts, task: str) -> dict[Any, Any]:
    """What the panel offers for a task: marks where answers are words."""
    words = task != "text_to_image"
    return {parts.marks: gr.Radio(visible=words), parts.legend: gr.HTML(visible=words)}


def cleared(parts: Parts) -> dict[Any, Any]:
    """No comparison stands there."""
    return {
        parts.answers: "",
        parts.shown: None,
        parts.share: gr.DownloadButton(visible=False),
        parts.wiping: gr.Column(visible=False),
    }


def finished(studio: Studio, parts: Parts, row: Mapping[str, Any], state: Answers) -> dict[Any, Any]:
    """What can be done with answers that are kept: the file, and the handle over two pictures."""
    drawn = [(column.title, number) for number, column in enumerate(state.columns) if column.picture]
    found = {
        parts.shown: row["id"],
        parts.share: gr.DownloadButton(
            value=served(parts.share, sharing.written(Comparisons(studio.store, studio.home).shared(row["id"]), row)),
            visible=True,
        ),
        parts.wiping: gr.Column(visible=len(drawn) > 1),
    }
    if len(drawn) > 1:
        left, right = drawn[0][1], drawn[1][1]
        found |= {
            parts.left: gr.Dropdown(drawn, value=left),
            parts.right: gr.Dropdown(drawn, value=right),
            parts.wipe: _wiped(state, left, right),
        }
    return found


def opened(studio: Studio, parts: Parts, row: Mapping[str, Any]) -> dict[Any, Any]:
    """A comparison that was kept."""
    state = answers_from(row)
    head = asked_html(row["prompt"], row["picture"], f"{base_name(row['base'])}, {ago(row['created'])}")
    pictured = any(column.picture for column in state.columns)
    return {
        **asking(parts, "text_to_image" if pictured else "causal_lm"),
        parts.answers: head + columns_html(state, marked=True),
        **finished(studio, parts, row, state),
    }


def _wiped(state: Answers, left: Any, right: Any) -> str:
    columns = [state.columns[number] for number in (left, right) if isinstance(number, int)]
    if len(columns) < 2:
        return ""
    first, second = ((column.picture, column.title, column.colour) for column in columns)
    return wipe_html(first, second)


def wire(studio: Studio, parts: Parts, inputs: Sequence[Any], after: Mapping[str, Any]) -> None:
    """Connect the panel.

    Args:
        studio: who answers.
        parts: its widgets.
        inputs: base, columns, prompt, picture, and the sampling form's.
        after: the event that follows when something was kept.
    """
    comparisons = Comparisons(studio.store, studio.home)

    def generate(
        base: str, chosen: list[str] | None, prompt: str, picture: str | None, *how: Any
    ) -> Iterator[dict[Any, Any]]:
        """Answer the prompt with every column at once."""
        try:
            yield {**cleared(parts), parts.ask: gr.Button(interactive=False)}
            for state in answer(studio, base, chosen or [], prompt, sampling_form.values(*how), picture):
                shown = columns_html(state, marked=True)
                found = {parts.answers: shown, parts.stop: gr.Button(interactive=True)}
                if not state.finished:
                    yield found
            row = comparisons.get(state.kept)
            if row["picture"]:
                found[parts.answers] = asked_html("", row["picture"]) + shown
            yield {**found, **finished(studio, parts, row, state), **_rested(parts)}
        except EngineError as fault:
            yield {**cleared(parts), parts.answers: error(fault, t("There is no answer")), **_rested(parts)}

    def wiped(shown: Any, left: Any, right: Any) -> str:
        try:
            return _wiped(answers_from(comparisons.get(shown)), left, right)
        except EngineError as fault:
            return error(fault)

    def stopped(shown: str) -> dict[Any, Any]:
        return {**_rested(parts), parts.answers: halted(shown)}

    asked = parts.ask.click(
        generate,
        list(inputs),
        parts.widgets,
        trigger_mode="once",
        concurrency_limit=8,
        **HIDDEN,
    )
    asked.then(**after)
    parts.stop.click(stopped, parts.answers, [parts.stop, parts.ask, parts.answers], cancels=asked, **HIDDEN)
    gr.on([parts.left.input, parts.right.input], wiped, [parts.shown, parts.left, parts.right], parts.wipe, **HIDDEN)


def _rested(parts: Parts) -> dict[Any, Any]:
    return {parts.stop: gr.Button(interactive=False), parts.ask: gr.Button(interactive=True)}
