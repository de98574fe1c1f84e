"""One adapter in detail: its facts, its name, export, another rank, the way into the bin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from engine.errors import EngineError
from studio import adapter_words, adapting, export_panel, mixing
from studio.i18n import t
from studio.markup import error, esc
from studio.page import HIDDEN, Page
from studio.store import Row


@dataclass
class Parts:
    """The widgets of the detail."""

    column: gr.Column
    head: gr.HTML
    fault: gr.HTML
    name: gr.Textbox
    rename: gr.Button
    mix: gr.Button
    compare: gr.Button
    delete: gr.Button
    close: gr.Button
    confirm: gr.Row
    confirmed: gr.Button
    kept: gr.Button
    export: export_panel.Parts
    ranks: gr.Accordion
    no_ranks: gr.HTML
    rank_form: gr.Column
    rank: gr.Slider
    cost: gr.HTML
    resized: gr.Textbox
    resize: gr.Button
    chosen: gr.State
    errors: gr.State

    @property
    def widgets(self) -> list[Any]:
        """All of them in one list."""
        plain = [it for it in vars(self).values() if it is not self.export]
        return [*plain, *self.export.widgets]


def build() -> Parts:
    """Lay out the detail, hidden until an adapter is chosen."""
    with gr.Column(visible=False, elem_id="adapter-detail") as column:
        head = gr.HTML(elem_id="adapter-head")
        fault = gr.HTML(visible=False, elem_id="adapter-fault")
        with gr.Row():
            mix = gr.Button(t("Mix it"), elem_id="adapter-mix")
            compare = gr.Button(t("Compare with its base"), elem_id="adapter-compare")
            delete = gr.Button(t("Delete"), elem_id="adapter-delete")
            close = gr.Button(t("Close"), elem_id="adapter-close")
        with gr.Row(visible=False) as confirm:
            asked = t("Into the bin? It can be taken out again until the bin is emptied.")
            gr.HTML(f'<p class="st-hint">{esc(asked)}</p>')
            confirmed = gr.Button(t("Yes, into the bin"), variant="stop", elem_id="adapter-delete-yes")
            kept = gr.Button(t("Keep it"))
        with gr.Row(elem_classes="ad-row"):
            name = gr.Textbox(label=t("Name"), elem_id="adapter-name", scale=3, min_width=240)
            rename = gr.Button(t("Rename"), elem_id="adapter-rename", scale=1)
        export = export_panel.build()
        with gr.Accordion(t("Another rank"), open=False, elem_id="adapter-ranks") as ranks:
            no_ranks = gr.HTML(visible=False)
            with gr.Column() as rank_form:
                rank = gr.Slider(
                    1,
                    64,
                    value=8,
                    step=1,
                    label=t("Rank (r)"),
                    info=t(
                        "Lower: a smaller file, at the cost shown. Higher: the same answers, with room to learn more."
                    ),
                    elem_id="adapter-rank",
                )
                cost = gr.HTML(elem_id="adapter-cost")
                with gr.Row(elem_classes="ad-row"):
                    resized = gr.Textbox(
                        label=t("Name"), placeholder=t("The old name and the rank"), scale=3, min_width=240
                    )
                    resize = gr.Button(t("Save as a new adapter"), elem_id="adapter-resize", scale=1)
    return Parts(
        column,
        head,
        fault,
        name,
        rename,
        mix,
        compare,
        delete,
        close,
        confirm,
        confirmed,
        kept,
        export,
        ranks,
        no_ranks,
        rank_form,
        rank,
        cost,
        resized,
        resize,
        gr.State(""),
        gr.State(None),
    )


def shown(parts: Parts, row: Row) -> dict[Any, Any]:
    """The detail of one adapter."""
    why, rank = adapter_words.resize_refusal(row), row["rank"] or 8
    hint = f'<p class="st-hint">{esc(why)}</p>'
    return {
        **export_panel.shown(parts.export, row),
        parts.chosen: row["id"],
        parts.column: gr.Column(visible=True),
        parts.head: adapter_words.detail(row),
        parts.fault: gr.HTML(visible=False),
        parts.name: row["name"],
        parts.mix: gr.Button(interactive=not mixing.refusal(row)),
        parts.confirm: gr.Row(visible=False),
        parts.ranks: gr.Accordion(open=False),
        parts.no_ranks: gr.HTML(hint, visible=bool(why)),
        parts.rank_form: gr.Column(visible=not why),
        parts.rank: gr.Slider(maximum=max(16, min(4 * rank, adapting.LARGEST_RANK)), value=max(1, rank // 2)),
        parts.cost: "",
        parts.resized: "",
        parts.errors: None,
    }


def hidden(parts: Parts) -> dict[Any, Any]:
    """No adapter is chosen."""
    return {parts.column: gr.Column(visible=False), parts.chosen: ""}


def wire(page: Page, parts: Parts, started: Callable[[str], dict[Any, Any]], more: list[Any]) -> None:
    """Connect what starts work: exports and ranks.

    Args:
        page: the page.
        parts: its widgets.
        started: what the page shows of a work that has begun.
        more: the widgets that `started` changes.
    """
    studio = page.studio

    def cost(adapter: str, rank: float, errors: list[float] | None) -> dict[Any, Any]:
        """What the rank on the slider would cost."""
        try:
            row = studio.library.usable(adapter)
            errors = errors or adapting.rank_errors(studio, adapter)
        except EngineError as fault:
            return {parts.cost: error(fault, t("The cost is not known"))}
        label = t("Save rank {rank} as a new adapter", rank=int(rank))
        same = int(rank) == row["rank"]
        return {
            parts.errors: errors,
            parts.cost: adapter_words.rank_chart(errors, int(rank), row["colour"]),
            parts.resize: gr.Button(label, interactive=not same),
        }

    def resize(adapter: str, rank: float, name: str) -> dict[Any, Any]:
        try:
            return {**started(adapting.resize(studio, adapter, rank, name)), parts.fault: gr.HTML(visible=False)}
        except EngineError as fault:
            return {parts.fault: gr.HTML(error(fault, t("The rank was not changed")), visible=True)}

    outputs = [parts.fault, *more]
    export_panel.wire(page, parts.export, parts.chosen, parts.fault, started, more)
    parts.ranks.expand(
        cost, [parts.chosen, parts.rank, parts.errors], [parts.errors, parts.cost, parts.resize], **HIDDEN
    )
    parts.rank.release(
        cost,
        [parts.chosen, parts.rank, parts.errors],
        [parts.errors, parts.cost, parts.resize],
        trigger_mode="always_last",
        **HIDDEN,
    )
    parts.resize.click(resize, [parts.chosen, parts.rank, parts.resized], outputs, trigger_mode="once", **HIDDEN)
