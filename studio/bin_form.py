"""The bin of a page: what lies in it, taking it out again, and emptying it after a question."""

from __future__ import annotations

from typing import NamedTuple

import gradio as gr

from studio.i18n import t


class Bin(NamedTuple):
    """The widgets; `part` is shown while something lies in the bin, `asked` while emptying waits for an answer, which
    `told` says the cost of."""

    part: gr.Accordion
    choice: gr.Dropdown
    restore: gr.Button
    empty: gr.Button
    asked: gr.Row
    yes: gr.Button
    no: gr.Button
    told: gr.HTML


def build(ids: str, loss: str = "") -> Bin:
    """Lay them out, hidden.

    Args:
        ids: what their ids begin with.
        loss: what goes for good; left out where the page says it when it asks.
    """
    with gr.Accordion(t("Bin"), open=False, visible=False, elem_id=ids) as part:
        choice = gr.Dropdown([], label=t("In the bin"), elem_id=f"{ids}-choice")
        with gr.Row():
            restore = gr.Button(t("Take it out"), elem_id=f"{ids}-restore")
            empty = gr.Button(t("Empty the bin"), elem_id=f"{ids}-empty")
        with gr.Row(visible=False) as asked:
            told = gr.HTML(f'<p class="st-hint">{loss}</p>' if loss else "", elem_id=f"{ids}-told")
            yes = gr.Button(t("Yes, remove for good"), variant="stop", elem_id=f"{ids}-yes")
            no = gr.Button(t("Keep them"))
    return Bin(part, choice, restore, empty, asked, yes, no, told)
