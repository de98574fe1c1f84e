"""The rows of a data set on the Data page: pages of a table or of pictures, and a search in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio import data_rows, data_words
from studio.datasets import Checked
from studio.i18n import t
from studio.markup import esc, notice
from studio.page import HIDDEN, Page

TABLE, GRID = "table", "grid"


@dataclass
class Parts:
    """The widgets."""

    search: gr.Textbox
    view: gr.Radio
    count: gr.HTML
    rows: gr.HTML
    turning: gr.Row
    before: gr.Button
    number: gr.Number
    after: gr.Button
    balance: gr.HTML

    @property
    def widgets(self) -> list[Any]:
        return list(vars(self).values())


def build() -> Parts:
    """Lay them out."""
    with gr.Row(elem_classes="ad-row"):
        search = gr.Textbox(label=t("Search in the rows"), placeholder=t("words"), elem_id="data-search", scale=3)
        view = gr.Radio(
            [(t("Grid"), GRID), (t("Table"), TABLE)],
            value=GRID,
            label=t("View"),
            visible=False,
            elem_id="data-view",
            scale=1,
        )
    count = gr.HTML(elem_id="data-count")
    rows = gr.HTML(elem_id="data-rows")
    with gr.Row(visible=False, elem_classes="dp-turn") as turning:
        before = gr.Button(t("Page before"), size="sm", elem_id="data-before", min_width=90)
        number = gr.Number(1, label=t("Page"), precision=0, minimum=1, elem_id="data-page", min_width=90)
        after = gr.Button(t("Next page"), size="sm", elem_id="data-after", min_width=90)
    balance = gr.HTML(elem_id="data-balance")
    return Parts(search, view, count, rows, turning, before, number, after, balance)


def shown(
    parts: Parts, found: Checked, query: str = "", number: float | None = 1, view: str | None = GRID
) -> dict[Any, Any]:
    """A page of rows and where it stands among all."""
    if found.prepared is None:
        return {parts.rows: "", parts.count: "", parts.turning: gr.Row(visible=False)}
    pictured = found.format in ("images", "pictures")
    grid = pictured and view != TABLE
    page = data_rows.page(found, query, number, data_rows.GRID if grid else data_rows.PAGE)
    if grid:
        drawn = data_words.grid(page.examples)
    elif page.examples:
        drawn = data_words.rows(found.prepared, page.examples)
    else:
        drawn = ""
    if not page.examples:
        drawn = notice("info", t("No row has these words."), "", t("Try fewer words, or others."))
    last = page.first + len(page.examples) - 1
    told = t("Rows {first} to {last} of {count}", first=f"{page.first:,}", last=f"{last:,}", count=f"{page.count:,}")
    if (query or "").strip():
        told += " " + t("that have these words, of {total}", total=f"{found.prepared.kept:,}")
    return {
        parts.rows: drawn,
        parts.count: f'<p class="st-hint" data-first="{page.first}">{esc(told)}</p>',
        parts.view: gr.Radio(visible=pictured),
        parts.number: gr.Number(page.number, maximum=page.pages, label=t("Page, of {pages}", pages=f"{page.pages:,}")),
        parts.turning: gr.Row(visible=page.pages > 1),
        parts.before: gr.Button(interactive=page.number > 1),
        parts.after: gr.Button(interactive=page.number < page.pages),
    }


def fresh(parts: Parts, found: Checked) -> dict[Any, Any]:
    """The first page of another data set, or of another reading of it; and its classes."""
    labels = found.prepared.examples if found.prepared and found.format == "labels" else ()
    counts: dict[str, int] = {}
    for example in labels:
        for label in example["labels"]:
            counts[label] = counts.get(label, 0) + 1
    first = dict(sorted(counts.items(), key=lambda item: -item[1])[:100])
    return {**shown(parts, found), parts.search: "", parts.view: GRID, parts.balance: data_words.balance(first)}


def wire(page: Page, parts: Parts, dataset: gr.State) -> None:
    """Connect search, view and pages."""
    written = [parts.rows, parts.count, parts.number, parts.turning, parts.before, parts.after, parts.view]

    def turn(by: int) -> Any:
        def handler(dataset_id: str, query: str, number: float | None, view: str | None) -> Any:
            """Another page; a new search or view begins at the first."""
            if not dataset_id:
                return gr.skip()
            asked = (number or 1) + by if by < 2 else 1
            return shown(parts, page.datasets.open(dataset_id), query, asked, view)

        return handler

    asked = [dataset, parts.search, parts.number, parts.view]
    gr.on([parts.search.change, parts.view.input], turn(2), asked, written, trigger_mode="always_last", **HIDDEN)
    gr.on([parts.number.submit, parts.number.blur], turn(0), asked, written, **HIDDEN)
    parts.before.click(turn(-1), asked, written, **HIDDEN)
    parts.after.click(turn(1), asked, written, **HIDDEN)
