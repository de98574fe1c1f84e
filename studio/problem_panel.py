"""The problems of a data set on the Data page: by cause, with what can be done, and row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio import problem_words
from studio.datasets import Checked
from studio.i18n import t
from studio.page import HIDDEN, Page

SIZE = 25
ACT = """element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-fix], [data-see]');
  if (!button) return;
  const words = button.parentElement.querySelector('input.dp-fill');
  const asked = button.dataset.action === 'fill';
  if (asked && !words.value.trim()) { words.focus(); return; }
  trigger('click', {
    fix: button.dataset.fix || '', see: button.dataset.see || '',
    action: asked ? 'fill:' + words.value.trim() : button.dataset.action || '',
  });
});
element.addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || !event.target.matches('input.dp-fill')) return;
  event.target.parentElement.querySelector('[data-action=fill]').click();
});"""
"""A click on a remedy says which; Enter in the box of words presses the button beside it."""


@dataclass
class Parts:
    """The widgets; `chosen` is the cause whose rows are listed, `at` the page of them, from 0."""

    done: gr.HTML
    causes: gr.HTML
    rows: gr.HTML
    turning: gr.Row
    before: gr.Button
    after: gr.Button
    chosen: gr.State
    at: gr.State

    @property
    def widgets(self) -> list[Any]:
        return list(vars(self).values())


def build() -> Parts:
    """Lay them out."""
    done = gr.HTML(elem_id="data-done")
    causes = gr.HTML(js_on_load=ACT, elem_id="data-problems")
    rows = gr.HTML(elem_id="data-problem-rows")
    with gr.Row(visible=False, elem_classes="dp-turn") as turning:
        before = gr.Button(t("Page before"), size="sm", min_width=90)
        after = gr.Button(t("Next page"), size="sm", min_width=90)
    return Parts(done, causes, rows, turning, before, after, gr.State(""), gr.State(0))


def shown(parts: Parts, found: Checked, chosen: str = "", at: int = 0, done: str = "") -> dict[Any, Any]:
    """The causes, and a page of the rows of one of them or of all."""
    if found.prepared is None:
        return {parts.causes: "", parts.rows: "", parts.done: done, parts.turning: gr.Row(visible=False)}
    if chosen not in found.prepared.counts:
        chosen = ""
    drawn, count = problem_words.problem_rows(found.prepared, chosen, at, SIZE)
    return {
        parts.done: done,
        parts.causes: problem_words.causes(found, chosen),
        parts.rows: drawn if count else "",
        parts.turning: gr.Row(visible=count > SIZE),
        parts.before: gr.Button(interactive=at > 0),
        parts.after: gr.Button(interactive=(at + 1) * SIZE < count),
        parts.chosen: chosen,
        parts.at: at,
    }


def wire(page: Page, parts: Parts, dataset: gr.State) -> None:
    """Connect the pages; what a remedy does belongs to the whole page (`studio.tabs.data`)."""

    def turn(by: int) -> Any:
        def handler(dataset_id: str, chosen: str, at: int) -> Any:
            """Another page of rows."""
            if not dataset_id:
                return gr.skip()
            return shown(parts, page.datasets.open(dataset_id), chosen, max(0, at + by))

        return handler

    for button, by in ((parts.before, -1), (parts.after, 1)):
        button.click(turn(by), [dataset, parts.chosen, parts.at], parts.widgets, **HIDDEN)
