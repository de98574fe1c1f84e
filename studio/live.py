"""The live part of Train: one run's state, curves, samples and its own configuration.

What changes with every step is told to a script of our own and drawn by it (`studio.live_news`). Gradio's way to change
widgets, which goes through all that the page shows, is left for what seldom changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from engine.errors import EngineError
from engine.findings import BAD, Finding
from studio import charts, curves, doctor, ranks, states, words
from studio.charts import Drawing
from studio.context import Studio
from studio.curves import Curves
from studio.forms import as_yaml
from studio.i18n import language, reported, t
from studio.markup import error, esc, notice, number, size
from studio.page import COMPARE, HIDDEN, TICK, Page, go, message
from studio.points import finite, thinned
from studio.store import Row

Updates = dict[Any, Any]
FOLLOW = "window.studioLive(element, (drawn) => trigger('stale', drawn));"
"""The script behind the head (assets/scripts/live.js); `stale` is its word that more than numbers and lines changed."""


@dataclass
class Live:
    """The widgets of the live part."""

    view: gr.Column
    head: gr.HTML
    fault: gr.HTML
    doctor: gr.HTML
    compare: gr.Button
    remedy: gr.Button
    resume: gr.Button
    pause: gr.Button
    checkpoint: gr.Button
    sample: gr.Button
    stop: gr.Button
    again: gr.Button
    show_log: gr.Button
    new: gr.Button
    log_scale: gr.Checkbox
    smoothing: gr.Slider
    options: gr.Row
    curves: gr.HTML
    ranks: gr.HTML
    film: gr.HTML
    config: gr.Code
    log: gr.Code
    log_part: gr.Accordion


_KEPT = ("new", "log_scale", "smoothing")
"""Widgets that no redraw touches: they are the person's."""


def build() -> Live:
    """Lay out the live part; hidden until there is a run to show."""
    with gr.Column(visible=False) as view:
        head = gr.HTML(elem_id="live-head", js_on_load=FOLLOW)
        fault = gr.HTML(visible=False, elem_id="live-fault")
        doctor_box = gr.HTML(elem_id="live-doctor")
        with gr.Row(elem_id="live-actions"):
            compare = gr.Button(t("Compare with the base"), variant="primary", visible=False, elem_id="live-compare")
            remedy = gr.Button(t("Try the remedy"), visible=False, elem_id="live-remedy")
            resume = gr.Button(t("Resume"), variant="primary", visible=False, elem_id="live-resume")
            pause = gr.Button(t("Pause"), visible=False, elem_id="live-pause")
            checkpoint = gr.Button(t("Checkpoint now"), visible=False, elem_id="live-checkpoint")
            sample = gr.Button(t("Sample now"), visible=False, elem_id="live-sample")
            stop = gr.Button(t("Stop and keep"), visible=False, elem_id="live-stop")
            again = gr.Button(t("Change settings"), visible=False, elem_id="live-again")
            show_log = gr.Button(t("Show the log"), visible=False, elem_id="live-show-log")
            new = gr.Button(t("New run"), elem_id="live-new")
        drawn = gr.HTML(elem_id="live-curves")
        with gr.Row() as options:
            smoothing = gr.Slider(0, 0.99, value=0.6, step=0.01, label=t("Smoothing"), elem_id="smoothing")
            log_scale = gr.Checkbox(False, label=t("Logarithmic loss"), container=True, elem_id="log-scale")
        ranks_part = gr.HTML(elem_id="live-ranks")
        film = gr.HTML(elem_id="live-film")
        with gr.Accordion(t("This run's own configuration"), open=False):
            config = gr.Code(language="yaml", show_label=False, interactive=False)
        with gr.Accordion(t("Log"), open=False, elem_id="live-log") as log_part:
            log = gr.Code(language=None, show_label=False, interactive=False, max_lines=24)
    return Live(
        view=view,
        head=head,
        fault=fault,
        doctor=doctor_box,
        compare=compare,
        remedy=remedy,
        resume=resume,
        pause=pause,
        checkpoint=checkpoint,
        sample=sample,
        stop=stop,
        again=again,
        show_log=show_log,
        new=new,
        log_scale=log_scale,
        smoothing=smoothing,
        options=options,
        curves=drawn,
        ranks=ranks_part,
        film=film,
        config=config,
        log=log,
        log_part=log_part,
    )


def curves_html(found: Curves, row: Row, log: bool, smoothing: float, hover: bool = True) -> str:
    """The charts of a run; none where it ended before its first step."""
    return framed(drawings(found, row, log, smoothing, hover))


def framed(charts_of_run: Sequence[Drawing]) -> str:
    """The charts beside one another."""
    return f'<div class="charts">{"".join(one.html() for one in charts_of_run)}</div>' if charts_of_run else ""


def drawings(found: Curves, row: Row, log: bool, smoothing: float, hover: bool = True) -> list[Drawing]:
    """The charts of a run, one by one. Without `hover` they lack the hover text's data, which is most of them."""
    if not drawable(found, row):
        return []
    return [loss(found, row, log, smoothing, hover), *sides(found, row, hover)]


def drawable(found: Curves, row: Row) -> bool:
    """Whether there is anything to draw, or will be."""
    return bool(len(found.column("step")) or found.evals or row["state"] in states.LIVE)


def _waiting(row: Row) -> str:
    live = row["state"] in states.LIVE
    return t("The curve begins with the first step.") if live else t("This run has no steps.")


def loss(found: Curves, row: Row, log: bool, smoothing: float, hover: bool) -> Drawing:
    """The chart that a run is watched by."""
    xs, ys, waiting = found.column("step"), found.column("loss"), _waiting(row)
    return charts.loss_curves(
        xs, ys, found.evals, row["colour"], width(row), log=log, smoothing=smoothing, waiting=waiting, hover=hover
    )


def sides(found: Curves, row: Row, hover: bool) -> list[Drawing]:
    """The charts beside it: what the evaluations measured, learning rate, gradient norm, speed, memory."""
    colour, total, steps, evals = row["colour"], width(row), found.column("step"), found.evals

    def side(title: str, name: str, told: Callable[[float], str] = number) -> Drawing:
        points = thinned(*finite(steps, found.column(name)), charts.SIDE_POINTS)
        return charts.side_chart(title, points, colour, total, _waiting(row), told, hover)

    named = dict.fromkeys(name for event in evals for name in event.get("metrics") or {})
    metrics = [
        charts.side_chart(
            words.metric(name),
            charts.clean([(event.get("step"), (event.get("metrics") or {}).get(name)) for event in evals]),
            colour,
            total,
            hover=hover,
        )
        for name in named
    ]
    return [
        *metrics,
        side(t("Learning rate"), "lr"),
        side(t("Gradient norm"), "grad_norm"),
        side(t("Tokens a second"), "tokens_per_s"),
        side(t("Memory"), "memory", lambda held: size(held).replace(".0 ", " ")),
    ]


def width(row: Row) -> float | None:
    """The last step that the charts have room for: the run's last, but for the first eighth of a long run that goes on.

    There a curve would be a line upwards; so the room is twice as wide as the curve or more, and grows by fours.
    """
    total, step, room = row["total_steps"], row["step"] or 0, 20
    if not total or row["state"] not in states.LIVE or 8 * step >= total:
        return float(total) if total else None
    while room < 2 * step:
        room *= 4
    return float(min(room, total))


def newest(found: Curves) -> dict[str, Any]:
    """What the newest step, status and end say."""
    done = found.newest("done") or {}
    ended: dict[str, Any] = {key: done[key] for key in ("early", "best_step") if key in done}
    return {**(found.newest("status") or {}), **(found.newest("step") or {}), **ended}


def rare(found: Curves) -> list[int]:
    """What of a run is large and seldom new: its samples and ranks, as counts."""
    return [len(found.of("sample")), len(found.mean_ranks)]


def faults(row: Row, found: Curves) -> str:
    """Why the run ended, if it ended badly, and what it had to change or leave out."""
    box = ""
    if row["error"] and row["state"] in states.FINISHED:
        failed = row["state"] == states.FAILED
        box = error(row["error"], t("The run failed") if failed else t("The run was lost"))
    warnings = found.of("warning")[-3:]
    return box + "".join(notice("warn", t("Note"), reported(str(event.get("message", "")))) for event in warnings)


def steady(studio: Studio, row: Row, found: Curves, told: Sequence[Finding]) -> dict[str, dict[str, Any]]:
    """What seldom changes while a run goes on, by its name in `Live`; `told` is what the doctor finds."""
    fault = faults(row, found)
    return {
        "fault": {"value": fault, "visible": bool(fault)},
        **buttons(studio, row, found, doctor.curable(told)),
        "options": {"visible": bool(len(found.column("step"))) or row["state"] in states.LIVE},
    }


def looks(row: Row, found: Curves, parts: dict[str, dict[str, Any]]) -> str:
    """Differs as soon as a page has to be drawn anew for more than numbers, lines and the doctor's words."""
    return hashlib.sha256(repr([row["state"], rare(found), parts]).encode()).hexdigest()[:16]


def seen(row: Row, last_id: int) -> str:
    """Differs as soon as there is anything new of a run."""
    return f"{last_id}-{row['state']}"


def mark(row: Row, found: Curves, looked: str) -> str:
    """What the page shows, and in which language, as its script reads it off and tells the server.

    A digest of another language's words would differ for ever, so the script asks in that of the drawing.
    """
    live = " data-live" if row["state"] in states.LIVE else ""
    samples, rank_events = rare(found)
    return (
        f'<span class="live-mark" hidden data-run="{esc(row["id"])}" data-seen="{seen(row, found.last_id)}"'
        f' data-language="{language()}"'
        f' data-looks="{looked}" data-samples="{samples}" data-ranks="{rank_events}"{live}></span>'
    )


def head_html(studio: Studio, row: Row, found: Curves) -> str:
    """Title, state, progress and newest numbers of a run."""
    return words.run_head(row, newest(found), row["state"] in states.FINISHED and studio.jobs.has_adapter(row["id"]))


def draw(
    page: Page,
    live: Live,
    run_id: str,
    log: bool,
    smoothing: float,
    whole: bool,
    drawn: Any = None,
) -> Updates:
    """Everything that follows from a run's present state; with its configuration when `whole`.

    Args:
        page: the page.
        live: its widgets.
        run_id: the run.
        log, smoothing: as the person has set them.
        whole: whether configuration and log are to be filled too.
        drawn: the data of the `mark` that a page of this run has, so that samples and ranks, which are large, are not
            sent again.
    """
    row = page.studio.store.run(run_id)
    found = curves.of_run(page.studio.store, run_id)
    told = doctor.findings(found, row)
    parts = steady(page.studio, row, found, told)
    # The events that were read, not those of this moment: what came between is asked for next.
    head = mark(row, found, looks(row, found, parts)) + head_html(page.studio, row, found)
    updates: Updates = {
        live.head: head,
        live.doctor: doctor.box(told, row),
        live.curves: curves_html(found, row, log, smoothing),
        **{part: type(part)(**changes) for name, changes in parts.items() for part in [getattr(live, name)]},
    }
    had = drawn if isinstance(drawn, dict) and drawn.get("run") == run_id else {}
    if [had.get("samples"), had.get("ranks")] != [*map(str, rare(found))]:
        updates[live.film] = words.film(found.of("sample"))
        updates[live.ranks] = ranks.picture(found.ranks, found.mean_ranks, row["colour"], row["total_steps"])
    if whole:
        updates |= {live.config: as_yaml(row["spec"]), live.log: page.studio.jobs.log_tail(run_id)}
    return updates


def buttons(studio: Studio, row: Row, found: Curves, cure: Finding | None) -> dict[str, dict[str, Any]]:
    """How the buttons look: what can be done now, the one that is next as the primary one."""
    state, run_id = row["state"], row["id"]
    running, finished = state == states.RUNNING, state in states.FINISHED
    adapter = finished and studio.jobs.has_adapter(run_id)
    resumable = state in states.RESUMABLE and row["deleted_at"] is None
    goes_on = studio.jobs.has_checkpoint(run_id)
    # Going on as it was would end the same way.
    needed = state in (states.FAILED, states.LOST) and cure is not None and cure.severity == BAD
    return {
        "compare": {"visible": adapter, "variant": "primary" if state == states.DONE else "secondary"},
        "remedy": {"visible": cure is not None, "variant": "primary" if needed else "secondary"},
        "resume": {
            "value": t("Resume from the last checkpoint") if goes_on else t("Start again"),
            "visible": resumable,
            "variant": "secondary" if needed else "primary",
        },
        "pause": {"visible": running},
        "checkpoint": {"visible": running},
        "sample": {"visible": running and bool(found.of("sample"))},
        "stop": {
            "value": t("Take out of the queue") if state == states.QUEUED else t("Stop and keep"),
            "visible": state in (states.QUEUED, states.STARTING, states.RUNNING, states.PAUSING),
        },
        "again": {"visible": finished},
        "show_log": {"visible": state in (states.FAILED, states.LOST)},
    }


def wire(page: Page, live: Live, form: gr.Column) -> None:
    """Connect the live part; `form` is what stands in its place when no run is shown."""
    store, jobs = page.studio.store, page.studio.jobs
    every = [value for name, value in vars(live).items() if name not in _KEPT]
    options = [live.log_scale, live.smoothing]

    def show(run_id: str, log: bool, smoothing: float) -> Updates:
        """Draw the run in the address, or the form where there is none."""
        if not run_id:
            return {live.view: gr.Column(visible=False), form: gr.Column(visible=True), live.head: ""}
        try:
            drawn = draw(page, live, run_id, log, smoothing, whole=True)
        except EngineError as fault:
            drawn = {live.head: error(fault)}
        closed = {live.log_part: gr.Accordion(open=False)}
        return {live.view: gr.Column(visible=True), form: gr.Column(visible=False), **closed, **drawn}

    def catch_up(run_id: str, log: bool, smoothing: float, event: gr.EventData) -> Any:
        """Draw what the page's script found to have changed."""
        try:
            row = store.run(run_id)
        except EngineError:
            # It went away meanwhile.
            return gr.skip()
        return draw(page, live, run_id, log, smoothing, row["state"] in states.FINISHED, event._data)

    shown = [*every, form]
    page.run.change(show, [page.run, *options], shown, **HIDDEN)
    page.run.change(None, page.run, None, js="(run) => window.studioAddress('run', run)", **HIDDEN)
    live.head.stale(catch_up, [page.run, *options], every, **TICK)
    gr.on(
        [live.log_scale.input, live.smoothing.input],
        lambda run_id, log, weight: curves_html(curves.of_run(store, run_id), store.run(run_id), log, weight),
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

    def tail(run_id: str) -> str:
        return jobs.log_tail(run_id) if run_id else ""

    live.log_part.expand(tail, page.run, live.log, **HIDDEN)
    live.show_log.click(
        lambda run_id: (gr.Accordion(open=True), tail(run_id)), page.run, [live.log_part, live.log], **HIDDEN
    ).then(None, None, None, js="() => window.studioShow('live-log')", **HIDDEN)

    def compare(run_id: str) -> tuple[Any, Any]:
        row = store.run(run_id)
        return message(base=row["model"], runs=[run_id]), go(COMPARE)

    live.compare.click(compare, page.run, [page.comparison, page.tabs], **HIDDEN)

    def again(run_id: str) -> tuple[Any, str]:
        row = store.run(run_id)
        return message(spec=row["spec"], dataset=row["dataset"], run=run_id), ""

    live.again.click(again, page.run, [page.recipe, page.run], **HIDDEN)

    def remedy(run_id: str) -> tuple[Any, Any]:
        """The form with the remedy; where it is not needed any more, nothing."""
        row = store.run(run_id)
        cure = doctor.curable(doctor.findings(curves.of_run(store, run_id), row))
        return (gr.skip(), gr.skip()) if cure is None else (message(**doctor.recipe(row, cure)), "")

    live.remedy.click(remedy, page.run, [page.recipe, page.run], **HIDDEN)
