"""Compare, as a grid: the axes, the pictures as they come, one of them enlarged beside the base's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from engine.errors import EngineError
from studio import prompt_form, sampling_form, sharing
from studio.adapter_api import served
from studio.compare_words import cell_html, grid_html, grid_progress, wipe_html
from studio.comparisons import Comparisons
from studio.context import Studio
from studio.grids import Drawing, draw, drawing_from, planned, prompts_of, seeds_of, weights_of
from studio.i18n import t
from studio.markup import error, esc
from studio.page import HIDDEN

_PICK = """element.addEventListener('click', (event) => {
  const cell = event.target.closest('[data-cell]');
  if (cell) trigger('click', {cell: Number(cell.dataset.cell)});
});"""
_SEE = "() => setTimeout(() => document.getElementById('grid-cell')?.scrollIntoView({behavior: 'smooth'}), 150)"


@dataclass
class Parts:
    """The widgets of the panel; `shown` is the id of the grid that stands there, `chosen` its enlarged cell."""

    prompts: gr.Textbox
    weights: gr.Textbox
    seeds: gr.Textbox
    ask: gr.Button
    stop: gr.Button
    progress: gr.HTML
    table: gr.HTML
    cell: gr.HTML
    share: gr.DownloadButton
    shown: gr.State
    chosen: gr.State

    @property
    def widgets(self) -> list[Any]:
        """All of them in one list."""
        return list(vars(self).values())


def build() -> Parts:
    """Lay them out."""
    prompts = gr.Textbox(
        label=t("Prompts of the grid"),
        info=t("One a line. Left empty: the prompt above."),
        lines=2,
        max_lines=8,
        elem_id="grid-prompts",
    )
    with gr.Row():
        weights = gr.Textbox(
            "0.5, 1",
            label=t("Weights"),
            info=t("How much of each adapter acts, from -1 to 2."),
            elem_id="grid-weights",
        )
        seeds = gr.Textbox("0, 1", label=t("Seeds"), info=t("Each is other noise; 0-3 are four."), elem_id="grid-seeds")
    ask, stop = prompt_form.buttons("grid", "draw", t("Draw the grid"))
    progress = gr.HTML(elem_id="grid-progress")
    table = gr.HTML(js_on_load=_PICK, elem_id="grid-table")
    cell = gr.HTML(visible=False, elem_id="grid-cell")
    share = gr.DownloadButton(t("Download as one HTML file"), visible=False, elem_id="grid-share")
    return Parts(prompts, weights, seeds, ask, stop, progress, table, cell, share, gr.State(None), gr.State(-1))


def standing(studio: Studio, parts: Parts, drawing: Drawing, row: Mapping[str, Any] | None = None) -> dict[Any, Any]:
    """The grid as it is now; with the row that was kept of it, also its file."""
    found: dict[Any, Any] = {
        parts.table: grid_html(drawing),
        parts.progress: grid_progress(drawing),
        parts.cell: gr.HTML(visible=False),
        parts.chosen: -1,
        parts.shown: drawing.kept,
    }
    if row is not None:
        path = served(parts.share, sharing.written(Comparisons(studio.store, studio.home).shared(row["id"]), row))
        found[parts.share] = gr.DownloadButton(value=path, visible=True)
    return found


def opened(studio: Studio, parts: Parts, row: Mapping[str, Any]) -> dict[Any, Any]:
    """A grid that was kept."""
    return standing(studio, parts, drawing_from(row), row)


def wire(studio: Studio, parts: Parts, inputs: Sequence[Any], after: Mapping[str, Any]) -> None:
    """Connect the panel.

    Args:
        studio: who draws.
        parts: its widgets.
        inputs: base, columns, prompt, picture, and the sampling form's.
        after: the event that follows when something was kept.
    """
    comparisons = Comparisons(studio.store, studio.home)
    axes = [parts.prompts, parts.weights, parts.seeds]

    def plan(prompts: str, weights: str, seeds: str, base: str, chosen: list[str] | None, prompt: str, how: Any) -> Any:
        lines = prompts_of(prompts if (prompts or "").strip() else (prompt or "").replace("\n", " "))
        return planned(studio, base, chosen or [], lines, weights_of(weights), seeds_of(seeds), how)

    def drawn(
        prompts: str,
        weights: str,
        seeds: str,
        base: str,
        chosen: list[str] | None,
        prompt: str,
        picture: str | None,
        *how: Any,
    ) -> Iterator[dict[Any, Any]]:
        """Draw cell by cell."""
        rest = {parts.ask: gr.Button(interactive=True), parts.stop: gr.Button(interactive=False)}
        try:
            planned_grid, who = plan(prompts, weights, seeds, base, chosen, prompt, sampling_form.values(*how))
            first = {
                parts.ask: gr.Button(interactive=False),
                parts.stop: gr.Button(interactive=True),
                parts.share: gr.DownloadButton(visible=False),
                parts.cell: gr.HTML(visible=False),
                parts.chosen: -1,
            }
            for drawing in draw(studio, planned_grid, who):
                yield {
                    **first,
                    parts.table: grid_html(drawing),
                    parts.progress: grid_progress(drawing),
                    parts.shown: drawing.kept,
                }
                first = {}
            yield {**standing(studio, parts, drawing, comparisons.get(drawing.kept)), **rest}
        except EngineError as fault:
            yield {parts.progress: error(fault, t("The grid was not drawn")), **rest}

    def stopped(shown: Any) -> dict[Any, Any]:
        """What is drawn stays."""
        rest = {parts.ask: gr.Button(interactive=True), parts.stop: gr.Button(interactive=False)}
        try:
            return {**opened(studio, parts, comparisons.get(shown)), **rest}
        except EngineError:
            return {parts.table: "", parts.progress: "", **rest}

    def enlarge(shown: Any, event: gr.EventData) -> dict[Any, Any]:
        """A picture was pressed: it, its settings, and the base's of the same words and noise under one handle."""
        try:
            drawing = drawing_from(comparisons.get(shown))
        except EngineError as fault:
            return {parts.cell: gr.HTML(error(fault), visible=True)}
        place = (event._data or {}).get("cell")
        if not isinstance(place, int) or not 0 <= place < len(drawing.cells):
            return {parts.cell: gr.HTML(visible=False)}
        cell, shown_html = drawing.cells[place], cell_html(drawing, place)
        beside = drawing.find(None, None, cell.seed, cell.prompt)
        if cell.run is not None and beside >= 0:
            base = drawing.cells[beside]
            words = t("The base and {name} under one handle", name=cell.title)
            wipe = wipe_html((base.picture, base.title, base.colour), (cell.picture, cell.title, cell.colour))
            shown_html += f"<section><h3>{esc(words)}</h3>{wipe}</section>"
        return {
            parts.cell: gr.HTML(f'<div class="cmp-detail">{shown_html}</div>', visible=True),
            parts.table: grid_html(drawing, place),
            parts.chosen: place,
        }

    asked = parts.ask.click(drawn, [*axes, *inputs], parts.widgets, trigger_mode="once", concurrency_limit=8, **HIDDEN)
    asked.then(**after)
    parts.stop.click(stopped, parts.shown, parts.widgets, cancels=asked, **HIDDEN).then(**after)
    parts.table.click(enlarge, parts.shown, parts.widgets, **HIDDEN).then(None, None, None, js=_SEE, **HIDDEN)

    def counted(
        prompts: str, weights: str, seeds: str, base: str, chosen: list[str] | None, prompt: str
    ) -> dict[Any, Any]:
        """What the button would do."""
        try:
            how = {"steps": 1, "guidance": 1.0}
            drawing, _ = plan(prompts, weights, seeds, base, chosen, prompt or "-", how)
        except EngineError:
            return {parts.ask: gr.Button(t("Draw the grid"))}
        return {parts.ask: gr.Button(t("Draw {count} pictures", count=len(drawing.cells)))}

    changes = [*axes, inputs[0], inputs[1]]
    gr.on([it.change for it in changes], counted, [*axes, *inputs[:3]], parts.ask, trigger_mode="always_last", **HIDDEN)
