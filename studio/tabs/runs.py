"""Runs: everything that was trained; one of them in detail; the bin."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import gradio as gr

from engine.errors import EngineError
from studio import bin_form, charts, states, words
from studio.forms import as_yaml
from studio.markup import error, notice
from studio.page import COMPARE, HIDDEN, PICK, RUNS, START, TRAIN, Page, go, message

ID = RUNS
TITLE = "Runs"


@dataclass
class Parts:
    """The widgets of this tab."""

    table: gr.HTML
    to_start: gr.Button
    detail: gr.Column
    head: gr.HTML
    fault: gr.HTML
    open: gr.Button
    compare: gr.Button
    resume: gr.Button
    delete: gr.Button
    confirm: gr.Row
    confirmed: gr.Button
    kept: gr.Button
    curve: gr.HTML
    config: gr.Code
    log: gr.Code
    bin: gr.Accordion
    bin_choice: gr.Dropdown
    restore: gr.Button
    empty: gr.Button
    empty_row: gr.Row
    empty_yes: gr.Button
    empty_no: gr.Button
    chosen: gr.State
    timer: gr.Timer
    seen: gr.State


def build(page: Page) -> None:
    """Lay out the table, one run's detail, and the bin."""
    gr.HTML('<h2 class="page-title">Everything you trained</h2>')
    table = gr.HTML(js_on_load=PICK, elem_id="runs-table")
    to_start = gr.Button("Start with a sample", variant="primary", visible=False)
    with gr.Column(visible=False) as detail:
        head = gr.HTML(elem_id="runs-head")
        fault = gr.HTML(visible=False)
        with gr.Row():
            opened = gr.Button("Open", variant="primary", elem_id="runs-open")
            compare = gr.Button("Compare", elem_id="runs-compare")
            resume = gr.Button("Resume")
            delete = gr.Button("Delete", elem_id="runs-delete")
        with gr.Row(visible=False) as confirm:
            gr.HTML('<p class="st-hint">Into the bin? It can be taken out again until the bin is emptied.</p>')
            confirmed = gr.Button("Yes, into the bin", variant="stop", elem_id="runs-delete-yes")
            kept = gr.Button("Keep it")
        curve = gr.HTML()
        with gr.Accordion("Configuration as it ran", open=False):
            config = gr.Code(language="yaml", show_label=False, interactive=False)
        with gr.Accordion("End of the log", open=False):
            log = gr.Code(language=None, show_label=False, interactive=False, max_lines=24)
    bin_parts = bin_form.build("runs-bin", "This removes the runs in the bin with their adapters, for good.")
    page.parts[ID] = Parts(
        table,
        to_start,
        detail,
        head,
        fault,
        opened,
        compare,
        resume,
        delete,
        confirm,
        confirmed,
        kept,
        curve,
        config,
        log,
        *bin_parts,
        gr.State(""),
        gr.Timer(2.0, active=False),
        gr.State(None),
    )


def wire(page: Page) -> None:
    """Connect the table, the detail and the bin."""
    parts: Parts = page.parts[ID]
    store, jobs = page.studio.store, page.studio.jobs
    outputs = list(vars(parts).values())

    def listing(chosen: str) -> dict[Any, Any]:
        """The table and the bin as they are now."""
        rows, gone = store.runs(), store.runs(deleted=True)
        live = any(row["state"] in states.LIVE for row in rows)
        empty = notice("info", "No runs yet.", "A run is one training, kept here with its curve and its settings.")
        return {
            parts.table: words.run_table(rows) if rows else empty,
            parts.to_start: gr.Button(visible=not rows),
            parts.bin: gr.Accordion(f"Bin ({len(gone)})", visible=bool(gone)),
            parts.bin_choice: gr.Dropdown(
                [(row["name"], row["id"]) for row in gone], value=gone[0]["id"] if gone else None
            ),
            parts.empty_row: gr.Row(visible=False),
            parts.timer: gr.Timer(active=live),
            parts.seen: signature(),
        }

    def signature() -> list[list[Any]]:
        return [[row["id"], row["state"], row["step"]] for row in store.runs()]

    def tick(chosen: str, seen: Any) -> Any:
        """Redraw the table when a run has moved."""
        return gr.skip() if [list(row) for row in seen or []] == signature() else listing(chosen)

    def detail(run_id: str) -> dict[Any, Any]:
        """One run: its curve, its configuration, its log."""
        if not run_id:
            return {parts.detail: gr.Column(visible=False), parts.chosen: ""}
        try:
            row = store.run(run_id)
        except EngineError as fault:
            return {parts.fault: gr.HTML(error(fault), visible=True)}
        steps, evals = store.by_step(run_id, "step"), store.by_step(run_id, "eval")
        waiting = "This run has no steps yet." if row["state"] in states.LIVE else "This run has no steps."
        return {
            parts.chosen: run_id,
            parts.detail: gr.Column(visible=True),
            parts.head: words.run_head(row, adapter=jobs.has_adapter(run_id)),
            parts.fault: gr.HTML(
                error(row["error"], "What happened") if row["error"] else "", visible=bool(row["error"])
            ),
            parts.compare: gr.Button(visible=jobs.has_adapter(run_id)),
            parts.resume: gr.Button(visible=row["state"] in states.RESUMABLE),
            parts.delete: gr.Button(visible=row["state"] not in states.LIVE),
            parts.confirm: gr.Row(visible=False),
            parts.curve: charts.loss_chart(steps, evals, row["colour"], row["total_steps"], waiting=waiting),
            parts.config: as_yaml(row["spec"]),
            parts.log: jobs.log_tail(run_id),
        }

    def pick(event: gr.EventData) -> dict[Any, Any]:
        """A run's name was pressed."""
        return detail(str((event._data or {}).get("run", "")))

    def delete(run_id: str) -> dict[Any, Any]:
        try:
            store.bin(run_id)
        except EngineError as fault:
            return {parts.fault: gr.HTML(error(fault), visible=True), parts.confirm: gr.Row(visible=False)}
        return {**detail(""), **listing("")}

    def restore(run_id: str | None) -> dict[Any, Any]:
        if run_id:
            # Another page may have emptied the bin since; the list that follows says so.
            with contextlib.suppress(EngineError):
                store.restore(run_id)
        return listing("")

    def empty() -> dict[Any, Any]:
        jobs.empty_bin()
        return listing("")

    def resume(run_id: str) -> tuple[Any, Any, Any]:
        try:
            jobs.resume(run_id)
        except EngineError as fault:
            return gr.skip(), gr.skip(), gr.HTML(error(fault), visible=True)
        return run_id, go(TRAIN), gr.skip()

    def compare(run_id: str) -> tuple[Any, Any]:
        return message(base=store.run(run_id)["model"], runs=[run_id]), go(COMPARE)

    page.tab[ID].select(listing, parts.chosen, outputs, **HIDDEN)
    page.blocks.load(listing, parts.chosen, outputs, **HIDDEN)
    parts.timer.tick(tick, [parts.chosen, parts.seen], outputs, **HIDDEN)
    parts.table.click(pick, None, outputs, **HIDDEN)
    parts.to_start.click(lambda: go(START), None, page.tabs, **HIDDEN)
    parts.open.click(lambda run_id: (run_id, go(TRAIN)), parts.chosen, [page.run, page.tabs], **HIDDEN)
    parts.compare.click(compare, parts.chosen, [page.comparison, page.tabs], **HIDDEN)
    parts.resume.click(resume, parts.chosen, [page.run, page.tabs, parts.fault], **HIDDEN)
    parts.delete.click(lambda: gr.Row(visible=True), None, parts.confirm, **HIDDEN)
    parts.kept.click(lambda: gr.Row(visible=False), None, parts.confirm, **HIDDEN)
    parts.confirmed.click(delete, parts.chosen, outputs, **HIDDEN)
    parts.restore.click(restore, parts.bin_choice, outputs, **HIDDEN)
    parts.empty.click(lambda: gr.Row(visible=True), None, parts.empty_row, **HIDDEN)
    parts.empty_no.click(lambda: gr.Row(visible=False), None, parts.empty_row, **HIDDEN)
    parts.empty_yes.click(empty, None, outputs, **HIDDEN)
