"""Runs that were chosen, together: their curves in one drawing, and what differs between their settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from engine.errors import EngineError
from studio import overlay, run_diff
from studio.i18n import t
from studio.markup import began, esc
from studio.page import HIDDEN
from studio.store import Row, Store

Updates = dict[Any, Any]

_SEE = "() => setTimeout(() => document.getElementById('runs-together')?.scrollIntoView({behavior: 'smooth'}), 100)"


@dataclass
class Parts:
    """The widgets; `picked` holds the ids of the runs."""

    column: gr.Column
    by: gr.Radio
    smoothing: gr.Slider
    log: gr.Checkbox
    curves: gr.HTML
    whole: gr.Checkbox
    diff: gr.HTML
    picked: gr.State
    bar: gr.Row
    told: gr.HTML
    see: gr.Button
    delete: gr.Button
    clear: gr.Button

    @property
    def widgets(self) -> list[Any]:
        """All of them in one list."""
        return list(vars(self).values())

    @property
    def options(self) -> list[Any]:
        """What says how they are drawn."""
        return [self.by, self.smoothing, self.log, self.whole]


def build() -> dict[str, Any]:
    """Lay out the part, hidden until runs are chosen; answers its widgets for `Parts`."""
    with gr.Column(visible=False, elem_id="runs-together") as column:
        gr.HTML(f'<h3 class="page-title">{esc(t("Chosen runs together"))}</h3>')
        with gr.Row():
            axes = [(began(t(words)), key) for key, words in overlay.AXES.items()]
            by = gr.Radio(axes, value="step", label=t("Along"), elem_id="together-by", scale=2)
            smoothing = gr.Slider(0, 0.99, value=0.6, step=0.01, label=t("Smoothing"), elem_id="together-smoothing")
            log = gr.Checkbox(False, label=t("Logarithmic loss"), container=True, elem_id="together-log")
        curves = gr.HTML(elem_id="together-curves")
        gr.HTML(f'<h3 class="page-title">{esc(t("Settings that differ"))}</h3>')
        whole = gr.Checkbox(False, label=t("Show all settings"), elem_id="together-whole")
        diff = gr.HTML(elem_id="together-diff")
    return {
        "column": column,
        "by": by,
        "smoothing": smoothing,
        "log": log,
        "curves": curves,
        "whole": whole,
        "diff": diff,
        "picked": gr.State([]),
    }


def build_bar() -> dict[str, Any]:
    """Lay out what stands at the foot of the window while runs are chosen; answers its widgets for `Parts`."""
    with gr.Row(visible=False, elem_id="runs-bar") as bar:
        told = gr.HTML(elem_id="runs-picked")
        see = gr.Button(t("See them together"), variant="primary", elem_id="runs-see", min_width=150)
        delete = gr.Button(t("Delete them"), elem_id="runs-delete-picked", min_width=110)
        clear = gr.Button(t("Choose none"), elem_id="runs-clear", min_width=110)
    return {"bar": bar, "told": told, "see": see, "delete": delete, "clear": clear}


def rows_of(store: Store, picked: Sequence[str]) -> list[Row]:
    """The chosen runs that are still there and not in the bin."""
    found = []
    for run_id in picked:
        try:
            row = store.run(run_id)
        except EngineError:
            continue
        if row["deleted_at"] is None:
            found.append(row)
    return found


def curves(store: Store, rows: Sequence[Row], by: str, smoothing: float, log: bool) -> str:
    """The curves of these runs in one drawing."""
    by = by if by in overlay.AXES else "step"
    return overlay.drawn(overlay.lines(store, rows, by), by, smoothing=smoothing, log=log)


def difference(store: Store, rows: Sequence[Row], whole: bool) -> str:
    """What differs between the settings of these runs."""
    if len(rows) < 2:
        return f'<p class="st-hint">{esc(t("Choose a second run to see what differs between their settings."))}</p>'
    return run_diff.table(run_diff.of_runs(store, rows), rows, whole)


def shown(
    parts: Parts, store: Store, picked: Sequence[str], by: str, smoothing: float, log: bool, whole: bool
) -> Updates:
    """Everything that follows from which runs are chosen."""
    rows = rows_of(store, picked)
    count = t("1 run chosen") if len(rows) == 1 else t("{count} runs chosen", count=len(rows))
    dots = "".join(f'<i style="background:{esc(row["colour"])}"></i>' for row in rows)
    found: Updates = {
        parts.picked: [row["id"] for row in rows],
        parts.bar: gr.Row(visible=bool(rows)),
        parts.column: gr.Column(visible=bool(rows)),
        parts.told: f'<p role="status" class="picked-dots">{dots}<span>{esc(count)}</span></p>',
        parts.see: gr.Button(t("See its curves") if len(rows) == 1 else t("See them together")),
        parts.delete: gr.Button(t("Delete it") if len(rows) == 1 else t("Delete them")),
    }
    if rows:
        found[parts.curves] = curves(store, rows, by, smoothing, log)
        found[parts.diff] = difference(store, rows, whole)
    return found


def wire(parts: Parts, store: Store) -> None:
    """Connect what only this part needs."""

    def redraw(picked: list[str], by: str, smoothing: float, log: bool) -> str:
        return curves(store, rows_of(store, picked or []), by, smoothing, log)

    def differ(picked: list[str], whole: bool) -> str:
        return difference(store, rows_of(store, picked or []), whole)

    drawn = [parts.picked, parts.by, parts.smoothing, parts.log]
    gr.on(
        [parts.by.input, parts.smoothing.input, parts.log.input],
        redraw,
        drawn,
        parts.curves,
        trigger_mode="always_last",
        **HIDDEN,
    )
    parts.whole.input(differ, [parts.picked, parts.whole], parts.diff, trigger_mode="always_last", **HIDDEN)
    parts.see.click(None, None, None, js=_SEE, **HIDDEN)
