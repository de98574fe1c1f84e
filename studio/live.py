"""The live part of Train: one run's state, curves, samples and its own configuration, redrawn only on news."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from engine.errors import EngineError
from studio import charts, ranks, states, words
from studio.forms import as_yaml
from studio.markup import error, notice
from studio.page import COMPARE, HIDDEN, Page, go, message
from studio.store import Row

Updates = dict[Any, Any]


@dataclass
class Live:
    """The widgets of the live part."""

    view: gr.Column
    head: gr.HTML
    fault: gr.HTML
    compare: gr.Button
    resume: gr.Button
    pause: gr.Button
    checkpoint: gr.Button
    sample: gr.Button
    stop: gr.Button
    again: gr.Button
    new: gr.Button
    log_scale: gr.Checkbox
    smoothing: gr.Slider
    curves: gr.HTML
    ranks: gr.HTML
    film: gr.HTML
    config: gr.Code
    log: gr.Code
    log_part: gr.Accordion
    timer: gr.Timer
    seen: gr.State


def build() -> Live:
    """Lay out the live part; hidden until there is a run to show."""
    with gr.Column(visible=False) as view:
        head = gr.HTML(elem_id="live-head")
        fault = gr.HTML(visible=False)
        with gr.Row(elem_id="live-actions"):
            compare = gr.Button("Compare with the base", variant="primary", visible=False, elem_id="live-compare")
            resume = gr.Button("Resume", variant="primary", visible=False, elem_id="live-resume")
            pause = gr.Button("Pause", visible=False, elem_id="live-pause")
            checkpoint = gr.Button("Checkpoint now", visible=False)
            sample = gr.Button("Sample now", visible=False)
            stop = gr.Button("Stop and keep", visible=False, elem_id="live-stop")
            again = gr.Button("Change settings", visible=False)
            new = gr.Button("New run", elem_id="live-new")
        curves = gr.HTML(elem_id="live-curves")
        with gr.Row():
            smoothing = gr.Slider(0, 0.99, value=0.6, step=0.01, label="Smoothing", elem_id="smoothing")
            log_scale = gr.Checkbox(False, label="Logarithmic loss", container=True)
        ranks = gr.HTML(elem_id="live-ranks")
        film = gr.HTML(elem_id="live-film")
        with gr.Accordion("This run's own configuration", open=False):
            config = gr.Code(language="yaml", show_label=False, interactive=False)
        with gr.Accordion("Log", open=False) as log_part:
            log = gr.Code(language=None, show_label=False, interactive=False, max_lines=24)
    return Live(
        view,
        head,
        fault,
        compare,
        resume,
        pause,
        checkpoint,
        sample,
        stop,
        again,
        new,
        log_scale,
        smoothing,
        curves,
        ranks,
        film,
        config,
        log,
        log_part,
        gr.Timer(1.0, active=False),
        gr.State(None),
    )


def curves_html(page: Page, row: Row, log: bool, smoothing: float) -> str:
    """The three charts of a run."""
    store = page.studio.store
    steps, evals = store.by_step(row["id"], "step"), store.by_step(row["id"], "eval")
    colour, total = row["colour"], row["total_steps"]
    waiting = "The curve begins with the first step." if row["state"] in states.LIVE else "This run has no steps."
    loss = charts.loss_chart(steps, evals, colour, total, log=log, smoothing=smoothing, waiting=waiting)
    rate = charts.side_chart("Learning rate", steps, "lr", colour, total, waiting)
    norm = charts.side_chart("Gradient norm", steps, "grad_norm", colour, total, waiting)
    named = dict.fromkeys(name for event in evals for name in event.get("metrics") or {})
    metrics = "".join(
        charts.side_chart(words.metric(name), [_metric(event, name) for event in evals], name, colour, total)
        for name in named
    )
    return f'<div class="charts">{loss}{metrics}{rate}{norm}</div>'


def _metric(event: Mapping[str, Any], name: str) -> dict[str, float | None]:
    return {"step": event.get("step"), name: (event.get("metrics") or {}).get(name)}


def newest(page: Page, row: Row) -> dict[str, Any]:
    """What the newest step and status say."""
    store = page.studio.store
    status = store.newest(row["id"], "status") or {}
    return {**status, **(store.newest(row["id"], "step") or {})}


def mark(page: Page, row: Row) -> list[Any]:
    """What a page has seen when it has drawn this row."""
    return [row["id"], page.studio.store.last_event_id(row["id"]), row["state"]]


def draw(page: Page, live: Live, run_id: str, log: bool, smoothing: float, whole: bool) -> Updates:
    """Everything that follows from a run's present state; with its configuration when `whole`."""
    jobs, row = page.studio.jobs, page.studio.store.run(run_id)
    state = row["state"]
    running, finished = state == states.RUNNING, state in states.FINISHED
    adapter = finished and jobs.has_adapter(run_id)
    resumable = state in states.RESUMABLE and row["deleted_at"] is None
    again = "Resume from the last checkpoint" if jobs.has_checkpoint(run_id) else "Start again"
    box = ""
    if row["error"] and finished:
        box = error(row["error"], "The run failed" if state == states.FAILED else "The run was lost")
    warnings = page.studio.store.since(run_id, 0, ["warning"])
    box += "".join(notice("warn", "Note", str(event.get("message", ""))) for event in warnings[-3:])
    found: Updates = {
        live.head: words.run_head(row, newest(page, row), adapter),
        live.fault: gr.HTML(box, visible=bool(box)),
        live.compare: gr.Button(visible=adapter, variant="primary" if state == states.DONE else "secondary"),
        live.resume: gr.Button(again, visible=resumable, variant="primary"),
        live.pause: gr.Button(visible=running),
        live.checkpoint: gr.Button(visible=running),
        live.sample: gr.Button(visible=running and bool(page.studio.store.newest(run_id, "sample"))),
        live.stop: gr.Button(
            "Take out of the queue" if state == states.QUEUED else "Stop and keep",
            visible=state in (states.QUEUED, states.STARTING, states.RUNNING, states.PAUSING),
        ),
        live.again: gr.Button(visible=finished),
        live.curves: curves_html(page, row, log, smoothing),
        live.ranks: ranks.picture(page.studio.store.since(run_id, 0, ["rank"]), row["colour"], row["total_steps"]),
        live.film: words.film(page.studio.store.since(run_id, 0, ["sample"])),
        live.timer: gr.Timer(active=state in states.LIVE),
        live.seen: mark(page, row),
    }
    if whole:
        found |= {live.config: as_yaml(row["spec"]), live.log: jobs.log_tail(run_id)}
    return found


def wire(page: Page, live: Live, form: gr.Column) -> None:
    """Connect the live part; `form` is what stands in its place when no run is shown."""
    store, jobs = page.studio.store, page.studio.jobs
    every = [value for name, value in vars(live).items() if name not in ("log_part", "new", "log_scale", "smoothing")]
    options = [live.log_scale, live.smoothing]

    def show(run_id: str, log: bool, smoothing: float) -> Updates:
        """Draw the run in the address, or the form where there is none."""
        if not run_id:
            return {
                live.view: gr.Column(visible=False),
                form: gr.Column(visible=True),
                live.timer: gr.Timer(active=False),
            }
        try:
            drawn = draw(page, live, run_id, log, smoothing, whole=True)
        except EngineError as fault:
            return {
                live.view: gr.Column(visible=True),
                form: gr.Column(visible=False),
                live.head: error(fault),
                live.timer: gr.Timer(active=False),
            }
        return {live.view: gr.Column(visible=True), form: gr.Column(visible=False), **drawn}

    def tick(run_id: str, seen: list[Any] | None, log: bool, smoothing: float) -> Any:
        """Redraw when there is something new."""
        try:
            row = store.run(run_id)
        except EngineError:
            return {live.timer: gr.Timer(active=False)}
        if seen is not None and list(seen) == mark(page, row):
            return gr.skip()
        return draw(page, live, run_id, log, smoothing, whole=row["state"] in states.FINISHED)

    shown = [*every, form]
    page.run.change(show, [page.run, *options], shown, **HIDDEN)
    page.run.change(None, page.run, None, js="(run) => window.studioAddress('run', run)", **HIDDEN)
    live.timer.tick(tick, [page.run, live.seen, *options], shown, concurrency_limit=8, **HIDDEN)
    gr.on(
        [live.log_scale.input, live.smoothing.input],
        lambda run_id, log, weight: curves_html(page, store.run(run_id), log, weight),
        [page.run, *options],
        live.curves,
        trigger_mode="always_last",
        **HIDDEN,
    )

    def command(name: str) -> Any:
        def handler(run_id: str, log: bool, smoothing: float) -> Updates:
            try:
                getattr(jobs, name)(run_id)
            except EngineError as fault:
                return {live.fault: gr.HTML(error(fault), visible=True)}
            return draw(page, live, run_id, log, smoothing, whole=False)

        handler.__doc__ = f"The run's {name} button."
        return handler

    for name in ("pause", "resume", "stop", "checkpoint", "sample"):
        button: gr.Button = getattr(live, name)
        button.click(command(name), [page.run, *options], every, **HIDDEN)

    live.new.click(lambda: "", None, page.run, **HIDDEN)
    live.log_part.expand(lambda run_id: jobs.log_tail(run_id) if run_id else "", page.run, live.log, **HIDDEN)

    def compare(run_id: str) -> tuple[Any, Any]:
        row = store.run(run_id)
        return message(base=row["model"], runs=[run_id]), go(COMPARE)

    live.compare.click(compare, page.run, [page.comparison, page.tabs], **HIDDEN)

    def again(run_id: str) -> tuple[Any, str]:
        row = store.run(run_id)
        return message(spec=row["spec"], dataset=row["dataset"], run=run_id), ""

    live.again.click(again, page.run, [page.recipe, page.run], **HIDDEN)
