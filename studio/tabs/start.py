"""Start: samples that lead through the whole road, one for each family of models, and the last run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import gradio as gr
import psutil

from engine.errors import EngineError
from studio import charts, states, words
from studio.markup import ago, error, esc, size
from studio.page import DATA, HIDDEN, START, TRAIN, Page, go, message
from studio.samples import SAMPLES

ID = START
TITLE = "Start"


@dataclass
class Parts:
    """The widgets of this tab."""

    samples: dict[str, gr.Button]
    own: gr.Button
    fault: gr.HTML
    last: gr.HTML
    open: gr.Button


def machine() -> str:
    """What this machine is good for, in a sentence."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = size(psutil.virtual_memory().total)
    return f"This machine: {cores} CPU cores, {memory} of memory. Small bases train well here; large ones are slow."


def build(page: Page) -> None:
    """Lay out the cards."""
    gr.HTML(
        '<h2 class="page-title">What do you want to teach?</h2>'
        '<p class="st-lead">Choose a sample and follow the blue button: train, compare, done.'
        " Nothing leaves this machine.</p>"
    )
    buttons = {}
    with gr.Row(equal_height=True):
        for index, sample in enumerate(SAMPLES.values()):
            with gr.Column(elem_classes="st-card", min_width=280):
                toy = ' <span class="st-badge">toy</span>' if sample.toy else ""
                gr.HTML(f"<h3>{esc(sample.title)}{toy}</h3><p>{esc(sample.meaning)}</p>")
                buttons[sample.name] = gr.Button(
                    sample.button, variant="secondary" if index else "primary", elem_id=f"start-{sample.name}"
                )
        with gr.Column(elem_classes="st-card", min_width=280):
            gr.HTML(
                "<h3>Use your own rows</h3><p>A table of questions and answers, conversations, plain text"
                " (csv, json, jsonl, parquet, txt), or a zip of pictures with captions.</p>"
            )
            own = gr.Button("Choose a file", elem_id="start-own")
    fault = gr.HTML(visible=False)
    last = gr.HTML(visible=False, elem_id="start-last")
    opened = gr.Button("Open this run", visible=False, elem_id="start-open")
    gr.HTML(f'<p class="st-hint">{esc(machine())}</p>')
    page.parts[ID] = Parts(buttons, own, fault, last, opened)


def wire(page: Page) -> None:
    """Connect the cards."""
    parts: Parts = page.parts[ID]

    def sample(name: str) -> Any:
        def handler() -> dict[Any, Any]:
            """Load the sample's rows, fill Train, and go there."""
            chosen = SAMPLES[name]
            try:
                found = page.datasets.bring_in(chosen.rows())
                spec = chosen.spec().to_dict()
            except EngineError as problem:
                return {parts.fault: gr.HTML(error(problem, "The sample cannot be loaded"), visible=True)}
            return {
                page.recipe: message(spec=spec, dataset=found.id, meaning=chosen.meaning),
                page.run: "",
                page.tabs: go(TRAIN),
                parts.fault: gr.HTML(visible=False),
            }

        return handler

    for name, button in parts.samples.items():
        button.click(sample(name), None, [page.recipe, page.run, page.tabs, parts.fault], trigger_mode="once", **HIDDEN)
    parts.own.click(lambda: go(DATA), None, page.tabs, **HIDDEN)

    def recall() -> dict[Any, Any]:
        """Where you left off."""
        rows = page.studio.store.runs()
        if not rows:
            return {parts.last: gr.HTML(visible=False), parts.open: gr.Button(visible=False)}
        row = rows[0]
        steps = page.studio.store.by_step(row["id"], "step")
        points = charts.smooth(charts.clean([(step["step"], step.get("loss")) for step in steps]))
        card = (
            '<h3 class="page-title">Where you left off</h3><div class="st-card last-run">'
            f'{charts.sparkline(points, row["colour"])}<div class="about">'
            f"{words.run_head(row) if row['state'] in states.LIVE else _brief(row)}</div></div>"
        )
        return {parts.last: gr.HTML(card, visible=True), parts.open: gr.Button(visible=True)}

    outputs = [parts.last, parts.open]
    page.blocks.load(recall, None, outputs, **HIDDEN)
    page.tab[ID].select(recall, None, outputs, **HIDDEN)

    def reopen() -> tuple[str, Any]:
        rows = page.studio.store.runs()
        return (rows[0]["id"] if rows else ""), go(TRAIN)

    parts.open.click(reopen, None, [page.run, page.tabs], **HIDDEN)


def _brief(row: dict[str, Any]) -> str:
    from studio.markup import badge, dot

    return f"<strong>{dot(row['colour'])}{esc(row['name'])}</strong> {badge(row['state'])}<p>{ago(row['created'])}</p>"
