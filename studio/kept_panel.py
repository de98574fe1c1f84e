"""Compare: earlier comparisons, opened again, put into the bin and taken out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from engine.errors import EngineError
from studio import bin_form
from studio.compare_words import earlier_html, name_of
from studio.comparisons import SHOWN, Comparisons
from studio.context import Studio
from studio.i18n import t
from studio.markup import error, esc
from studio.page import HIDDEN
from studio.store import Row

_PICK = """element.addEventListener('click', (event) => {
  const opened = event.target.closest('[data-comparison]'), removed = event.target.closest('[data-remove]');
  if (opened) trigger('click', {open: Number(opened.dataset.comparison)});
  else if (removed) trigger('click', {remove: Number(removed.dataset.remove)});
});"""


@dataclass
class Parts:
    """The widgets of the panel; `limit` is how many are listed, `binned` the one that was deleted last."""

    part: gr.Accordion
    fault: gr.HTML
    undo_row: gr.Row
    undo_told: gr.HTML
    undo: gr.Button
    listed: gr.HTML
    more: gr.Button
    bin: bin_form.Bin
    limit: gr.State
    binned: gr.State

    @property
    def widgets(self) -> list[Any]:
        """All of them in one list."""
        return [*(it for it in vars(self).values() if it is not self.bin), *self.bin]


def build() -> Parts:
    """Lay them out."""
    with gr.Accordion(t("Earlier comparisons"), open=False, elem_id="compare-kept") as part:
        fault = gr.HTML(visible=False, elem_id="compare-kept-fault")
        with gr.Row(visible=False) as undo_row:
            undo_told = gr.HTML()
            undo = gr.Button(t("Take it out again"), size="sm", elem_id="compare-undo")
        listed = gr.HTML(js_on_load=_PICK, elem_id="compare-earlier")
        more = gr.Button(t("Show more"), visible=False, elem_id="compare-more")
    box = bin_form.build(
        "compare-bin", t("This removes the comparisons in the bin with their pictures, for good. Votes stay.")
    )
    return Parts(part, fault, undo_row, undo_told, undo, listed, more, box, gr.State(SHOWN), gr.State(None))


def listing(comparisons: Comparisons, parts: Parts, limit: float = SHOWN) -> dict[Any, Any]:
    """What is kept now, and what lies in the bin."""
    rows, total = comparisons.rows(min(int(limit or SHOWN), 2000)), comparisons.count()
    gone = comparisons.rows(200, deleted=True)
    return {
        parts.part: gr.Accordion(
            t("Earlier comparisons ({count})", count=total) if total else t("Earlier comparisons")
        ),
        parts.listed: earlier_html(rows, total),
        parts.more: gr.Button(visible=len(rows) < total),
        parts.limit: limit,
        parts.bin.part: gr.Accordion(t("Bin ({count})", count=len(gone)), visible=bool(gone)),
        parts.bin.choice: gr.Dropdown(
            [(name_of(row), row["id"]) for row in gone], value=gone[0]["id"] if gone else None
        ),
        parts.bin.asked: gr.Row(visible=False),
    }


def wire(
    studio: Studio,
    parts: Parts,
    opened: Callable[[Row], dict[Any, Any]],
    outputs: Sequence[Any],
) -> None:
    """Connect the panel.

    Args:
        studio: whose comparisons they are.
        parts: its widgets.
        opened: what the page shows of a comparison that is opened.
        outputs: the widgets that `opened` changes.
    """
    comparisons = Comparisons(studio.store, studio.home)

    def pick(limit: float, event: gr.EventData) -> dict[Any, Any]:
        """Open one, or put it into the bin."""
        asked = event._data or {}
        try:
            if asked.get("open") is not None:
                return {**opened(comparisons.get(asked["open"])), parts.fault: gr.HTML(visible=False)}
            row = comparisons.get(asked.get("remove"))
            comparisons.bin(row["id"])
        except EngineError as fault:
            return {parts.fault: gr.HTML(error(fault), visible=True)}
        told = t("{name} is in the bin.", name=name_of(row))
        return {
            **listing(comparisons, parts, limit),
            parts.fault: gr.HTML(visible=False),
            parts.undo_row: gr.Row(visible=True),
            parts.undo_told: f'<p class="st-hint">{esc(told)}</p>',
            parts.binned: row["id"],
        }

    def restore(key: Any, limit: float) -> dict[Any, Any]:
        # Another page may have emptied the bin since; the list that follows says so.
        with contextlib.suppress(EngineError):
            comparisons.restore(key)
        return {**listing(comparisons, parts, limit), parts.undo_row: gr.Row(visible=False)}

    def empty(limit: float) -> dict[Any, Any]:
        comparisons.empty_bin()
        return {**listing(comparisons, parts, limit), parts.undo_row: gr.Row(visible=False)}

    every, box = [*parts.widgets, *outputs], parts.bin
    parts.listed.click(pick, parts.limit, every, **HIDDEN)
    parts.more.click(lambda limit: listing(comparisons, parts, limit + SHOWN), parts.limit, every, **HIDDEN)
    parts.undo.click(restore, [parts.binned, parts.limit], every, **HIDDEN)
    box.restore.click(restore, [box.choice, parts.limit], every, **HIDDEN)
    box.empty.click(lambda: gr.Row(visible=True), None, box.asked, **HIDDEN)
    box.no.click(lambda: gr.Row(visible=False), None, box.asked, **HIDDEN)
    box.yes.click(empty, parts.limit, every, **HIDDEN)
