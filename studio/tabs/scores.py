"""Scores: how good base and adapter are on rows that nobody learned from, and which run is worth its size."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import gradio as gr

from engine.errors import EngineError
from studio import presets, score_words, scores, states
from studio.i18n import t
from studio.markup import error, esc, notice
from studio.page import HIDDEN, PICK, SCORES, START, TICK, Page, go
from studio.scoring import ANSWERED, SHOWN
from studio.store import Row

ID = SCORES
_SEE = "() => document.getElementById('scores-result')?.scrollIntoView({behavior: 'smooth', block: 'start'})"


@dataclass
class Parts:
    """The widgets of this tab."""

    empty: gr.HTML
    to_start: gr.Button
    bar: gr.Column
    run: gr.Dropdown
    about: gr.HTML
    score: gr.Button
    stop: gr.Button
    shown: gr.Slider
    answered: gr.Slider
    progress: gr.HTML
    fault: gr.HTML
    log_part: gr.Accordion
    log: gr.Code
    result: gr.HTML
    board: gr.Column
    group: gr.Dropdown
    metric: gr.Dropdown
    cost: gr.Radio
    table: gr.HTML
    plot: gr.HTML
    timer: gr.Timer
    seen: gr.State


def build(page: Page) -> None:
    """Lay out the bar, the result of one run, and the leaderboard."""
    lead = t("Base and adapter answer rows that the run held back: neither has learned from them.")
    gr.HTML(f'<h2 class="page-title">{esc(t("How good did it get?"))}</h2><p class="st-lead">{esc(lead)}</p>')
    empty = gr.HTML(visible=False, elem_id="scores-empty")
    to_start = gr.Button(t("Start with a sample"), variant="primary", visible=False)
    with gr.Column(visible=False) as bar:
        run = gr.Dropdown([], value=None, label=t("Run"), elem_id="scores-run")
        about = gr.HTML(elem_id="scores-about")
        with gr.Row():
            score = gr.Button(t("Score base and adapter"), variant="primary", elem_id="scores-start", scale=3)
            stop = gr.Button(t("Stop"), visible=False, elem_id="scores-stop", scale=1)
        with gr.Accordion(t("Advanced"), open=False), gr.Row():
            shown = gr.Slider(
                0,
                64,
                value=SHOWN,
                step=1,
                label=t("Rows shown (rows)"),
                info=t("So many are kept with both answers."),
            )
            answered = gr.Slider(
                1,
                512,
                value=ANSWERED,
                step=1,
                label=t("Rows answered in words (answers)"),
                info=t("For metrics of texts; each takes a generation by both. Loss takes every row."),
            )
    progress = gr.HTML(visible=False, elem_id="scores-progress")
    fault = gr.HTML(visible=False, elem_id="scores-fault")
    with gr.Accordion(t("End of the log"), open=False, visible=False) as log_part:
        log = gr.Code(language=None, show_label=False, interactive=False, max_lines=24)
    result = gr.HTML(visible=False, elem_id="scores-result")
    with gr.Column(visible=False, elem_id="scores-board") as board:
        gr.HTML(f'<h2 class="page-title">{esc(t("Leaderboard"))}</h2>')
        with gr.Row():
            group = gr.Dropdown([], value=None, label=t("Data set and task"), elem_id="scores-group", scale=2)
            metric = gr.Dropdown([], value=None, label=t("Quality"), elem_id="scores-metric", scale=1)
        table = gr.HTML(js_on_load=PICK, elem_id="scores-table")
        cost = gr.Radio(
            [(t(title), name) for name, (title, _) in scores.COSTS.items()],
            value="bytes",
            label=t("Against"),
            elem_id="scores-cost",
        )
        plot = gr.HTML(js_on_load=PICK, elem_id="scores-plot")
    rows = scores.measured()
    if rows:
        own = esc(t("The project's own leaderboard"))
        gr.HTML(f'<h2 class="page-title">{own}</h2>{score_words.measured_table(rows)}')
    page.parts[ID] = Parts(
        empty,
        to_start,
        bar,
        run,
        about,
        score,
        stop,
        shown,
        answered,
        progress,
        fault,
        log_part,
        log,
        result,
        board,
        group,
        metric,
        cost,
        table,
        plot,
        gr.Timer(1.0, active=False),
        gr.State(None),
    )


def _key(dataset: str, task: str) -> str:
    """A group of the leaderboard as one value of a dropdown."""
    return f"{dataset} {task}"


def _failure(newest: Row | None) -> dict[str, Any]:
    """The box of a run whose newest evaluation gave nothing."""
    if newest is None or newest["state"] in (states.DONE, states.STARTING, states.RUNNING):
        return {"value": "", "visible": False}
    if newest["error"]:
        return {"value": error(newest["error"], t("The evaluation failed")), "visible": True}
    return {"value": notice("info", t("The evaluation was stopped."), t("Nothing of it counts.")), "visible": True}


def wire(page: Page) -> None:
    """Connect the bar, the timer and the leaderboard."""
    parts: Parts = page.parts[ID]
    store, scoring = page.studio.store, page.studio.scoring
    outputs = list(vars(parts).values())

    def groups() -> list[tuple[str, str]]:
        known, found = {row["id"]: row["name"] for row in store.datasets()}, []
        for dataset, task in scoring.boards():
            form = presets.tasks().get(task)
            rows = known.get(dataset) or t("other rows")
            found.append((f"{rows}: {t(form.title) if form else task}", _key(dataset, task)))
        return found

    def action(row: Row, live: Row | None) -> dict[Any, Any]:
        """The one button that is next, for the run that is chosen."""
        held = scoring.held_back(row["id"])
        what = t("full model" if row["method"] == "full" else "adapter")
        if held is None:
            words = t("Score base and {what} on the rows held back", what=what)
        elif scoring.scored(row["id"]) is None:
            words = t("Score base and {what} on the {count:,} rows held back", what=what, count=held)
        else:
            words = t("Score base and {what} on the {count:,} rows held back again", what=what, count=held)
        tip = ""
        if held == 0:
            again = t("Train again with a share of the rows held back.")
            tip = notice("info", t("This run held no rows back."), "", again)
        return {
            parts.about: gr.HTML(tip, visible=bool(tip)),
            parts.score: gr.Button(words, interactive=live is None and held != 0),
        }

    def chosen(run_id: str | None, rows: list[Row], live: Row | None) -> Row:
        """The run that is chosen; what is under way for whoever arrives without a choice, or what was scored last."""
        scored = [row["id"] for row in rows if scoring.scored(row["id"])]
        first = live["run_id"] if live else (scored or [rows[0]["id"]])[0]
        return next((row for row in rows if row["id"] == run_id), None) or store.run(first)

    def bar(run_id: str | None) -> dict[Any, Any]:
        """The runs there are now, what can be done with the chosen one, and what was found out about it."""
        rows, live = scoring.runs(), scoring.present()
        if not rows:
            tip = notice(
                "info",
                t("Nothing to score yet."),
                t("Train a run first; some of its rows are held back for this page."),
            )
            shut = {widget: gr.HTML(visible=False) for widget in (parts.progress, parts.fault, parts.result)}
            return {
                parts.empty: gr.HTML(tip, visible=True),
                parts.to_start: gr.Button(visible=True),
                parts.bar: gr.Column(visible=False),
                parts.log_part: gr.Accordion(visible=False),
                parts.timer: gr.Timer(active=False),
                parts.seen: None,
                **shut,
            }
        row = chosen(run_id, rows, live)
        return {
            parts.empty: gr.HTML(visible=False),
            parts.to_start: gr.Button(visible=False),
            parts.bar: gr.Column(visible=True),
            parts.run: gr.Dropdown([(it["name"], it["id"]) for it in rows], value=row["id"]),
            **detail(row, live),
        }

    def detail(row: Row, live: Row | None) -> dict[Any, Any]:
        done, newest = scoring.scored(row["id"]), scoring.newest(row["id"])
        failed = _failure(newest)
        return {
            **action(row, live),
            **under_way(live),
            parts.fault: gr.HTML(**failed),
            parts.log_part: gr.Accordion(visible=bool(newest and newest["error"])),
            parts.log: scoring.log_tail(newest) if newest and newest["error"] else "",
            parts.result: gr.HTML(score_words.result(row, done) if done else "", visible=done is not None),
        }

    def under_way(live: Row | None) -> dict[Any, Any]:
        """What is being scored now; the timer runs only as long."""
        shown = ""
        if live is not None:
            shown = score_words.progress(store.run(live["run_id"]), live["progress"], time.time() - live["created"])
        return {
            parts.progress: gr.HTML(shown, visible=live is not None),
            parts.stop: gr.Button(visible=live is not None),
            parts.timer: gr.Timer(active=live is not None),
            parts.seen: live["id"] if live else None,
        }

    def board(group: str | None, metric: str | None, cost: str | None, chosen: str | None) -> dict[Any, Any]:
        """The leaderboard of one data set and task."""
        known = groups()
        keys = [key for _, key in known]
        if not keys:
            return {parts.board: gr.Column(visible=False)}
        group = group if group in keys else keys[0]
        cost = cost if cost in scores.COSTS else "bytes"
        entries = scoring.entries(*str(group).split(" ", 1))
        names = scores.offered(entries)
        name = metric if metric in names else names[0]
        return {
            parts.board: gr.Column(visible=True),
            parts.group: gr.Dropdown(known, value=group),
            parts.metric: gr.Dropdown([(t(scores.metric(it).title), it) for it in names], value=name),
            parts.table: score_words.leaderboard(entries, name, cost, chosen or ""),
            parts.plot: score_words.pareto(entries, name, cost),
        }

    def enter(run_id: str | None, group: str | None, metric: str | None, cost: str | None) -> dict[Any, Any]:
        """Everything as it is now."""
        rows = scoring.runs()
        shown = chosen(run_id, rows, scoring.present())["id"] if rows else None
        return {**bar(shown), **board(group, metric, cost, shown)}

    def choose(run_id: str | None, metric: str | None, cost: str | None) -> dict[Any, Any]:
        """Another run, and the leaderboard that it stands in."""
        found = bar(run_id)
        row = store.run(run_id) if run_id else None
        group = _key(row["dataset"] or "", row["task"]) if row else None
        return {**found, **board(group, metric, cost, run_id)}

    def pick(metric: str | None, cost: str | None, event: gr.EventData) -> dict[Any, Any]:
        """A run's name or point was pressed."""
        run_id = str((event._data or {}).get("run", ""))
        try:
            store.run(run_id)
        except EngineError as fault:
            return {parts.fault: gr.HTML(error(fault), visible=True)}
        return choose(run_id, metric, cost)

    def start(run_id: str | None, shown: float, answered: float) -> dict[Any, Any]:
        try:
            scoring.start(run_id or "", shown, answered)
        except EngineError as fault:
            return {parts.fault: gr.HTML(error(fault, t("This run cannot be scored now")), visible=True)}
        return bar(run_id)

    def stop(run_id: str | None) -> dict[Any, Any]:
        scoring.stop()
        return bar(run_id)

    def tick(seen: int | None, run_id: str | None, group: str | None, metric: str | None, cost: str | None) -> Any:
        """The progress while an evaluation goes on; everything when it has ended."""
        live = scoring.present()
        if live is not None and live["id"] == seen:
            return {
                parts.progress: gr.HTML(
                    score_words.progress(store.run(live["run_id"]), live["progress"], time.time() - live["created"])
                )
            }
        return enter(run_id, group, metric, cost)

    choice = [parts.group, parts.metric, parts.cost]
    page.tab[ID].select(enter, [parts.run, *choice], outputs, **HIDDEN)
    parts.timer.tick(tick, [parts.seen, parts.run, *choice], outputs, **TICK)
    parts.run.input(choose, [parts.run, parts.metric, parts.cost], outputs, **HIDDEN)
    parts.score.click(start, [parts.run, parts.shown, parts.answered], outputs, trigger_mode="once", **HIDDEN)
    parts.stop.click(stop, parts.run, outputs, **HIDDEN)
    parts.to_start.click(lambda: go(START), None, page.tabs, **HIDDEN)
    gr.on(
        [parts.group.input, parts.metric.input, parts.cost.input],
        board,
        [*choice, parts.run],
        outputs,
        trigger_mode="always_last",
        **HIDDEN,
    )
    for widget in (parts.table, parts.plot):
        widget.click(pick, [parts.metric, parts.cost], outputs, **HIDDEN).then(None, None, None, js=_SEE, **HIDDEN)
