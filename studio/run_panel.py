"""One run in detail: its state, name and tags, its curve, its settings, its log, and what can be done with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio import charts, run_words, states, words
from studio.forms import as_yaml
from studio.history import History
from studio.i18n import t
from studio.jobs import Jobs
from studio.markup import error
from studio.store import Row, Store

Updates = dict[Any, Any]


@dataclass
class Parts:
    """The widgets of the detail. `chosen` is the run's id, in a hidden box, so that it travels with what was typed for
    that run."""

    column: gr.Column
    head: gr.HTML
    fault: gr.HTML
    open: gr.Button
    compare: gr.Button
    reuse: gr.Button
    resume: gr.Button
    delete: gr.Button
    close: gr.Button
    name: gr.Textbox
    rename: gr.Button
    tag: gr.Textbox
    add_tag: gr.Button
    tags: gr.HTML
    curve: gr.HTML
    config: gr.Code
    log: gr.Code
    chosen: gr.Textbox

    @property
    def widgets(self) -> list[Any]:
        """All of them in one list."""
        return list(vars(self).values())


def build() -> Parts:
    """Lay out the detail, hidden until a run is chosen."""
    with gr.Column(visible=False, elem_id="run-detail") as column:
        head = gr.HTML(elem_id="runs-head")
        fault = gr.HTML(visible=False, elem_id="run-fault")
        with gr.Row():
            opened = gr.Button(t("Open"), variant="primary", elem_id="runs-open")
            compare = gr.Button(t("Compare"), elem_id="runs-compare")
            reuse = gr.Button(t("Use these settings"), elem_id="runs-reuse")
            resume = gr.Button(t("Resume"), elem_id="runs-resume")
            delete = gr.Button(t("Delete"), elem_id="runs-delete")
            close = gr.Button(t("Close"), elem_id="runs-close")
        with gr.Row(elem_classes="ad-row"):
            name = gr.Textbox(label=t("Name"), max_lines=1, elem_id="runs-name", scale=3, min_width=220)
            rename = gr.Button(t("Rename"), elem_id="runs-rename", scale=1, min_width=110)
            tag = gr.Textbox(label=t("Another tag"), max_lines=1, elem_id="runs-tag", scale=3, min_width=220)
            add_tag = gr.Button(t("Add"), elem_id="runs-tag-add", scale=1, min_width=90)
        tags = gr.HTML(js_on_load=run_words.SAY, elem_id="runs-tags")
        curve = gr.HTML(elem_id="runs-curve")
        with gr.Accordion(t("Configuration as it ran"), open=False):
            config = gr.Code(language="yaml", show_label=False, interactive=False)
        with gr.Accordion(t("End of the log"), open=False):
            log = gr.Code(language=None, show_label=False, interactive=False, max_lines=24)
    return Parts(
        column,
        head,
        fault,
        opened,
        compare,
        reuse,
        resume,
        delete,
        close,
        name,
        rename,
        tag,
        add_tag,
        tags,
        curve,
        config,
        log,
        gr.Textbox(visible="hidden", elem_id="runs-chosen"),
    )


def shown(parts: Parts, store: Store, jobs: Jobs, run_id: str) -> Updates:
    """The whole detail of one run.

    Raises:
        UnknownError: there is no such run.
    """
    row, history = store.run(run_id), History(store)
    tags = history.tags_of([run_id]).get(run_id, [])
    return {
        **moved(parts, store, jobs, row),
        parts.chosen: run_id,
        parts.column: gr.Column(visible=True),
        parts.name: row["name"],
        parts.tag: "",
        parts.tags: run_words.tags(tags),
        parts.config: as_yaml(row["spec"]),
        parts.log: jobs.log_tail(run_id),
    }


def moved(parts: Parts, store: Store, jobs: Jobs, row: Row) -> Updates:
    """What changes by itself while a run is looked at: nothing that a person types or chooses."""
    run_id, state = row["id"], row["state"]
    steps, evals = store.by_step(run_id, "step"), store.by_step(run_id, "eval")
    waiting = t("This run has no steps yet.") if state in states.LIVE else t("This run has no steps.")
    fault = error(row["error"], t("What happened")) if row["error"] else ""
    return {
        parts.head: words.run_head(row, adapter=jobs.has_adapter(run_id)),
        parts.fault: gr.HTML(fault, visible=bool(fault)),
        parts.compare: gr.Button(visible=jobs.has_adapter(run_id)),
        parts.resume: gr.Button(visible=state in states.RESUMABLE),
        parts.delete: gr.Button(visible=state not in states.LIVE),
        parts.curve: charts.loss_chart(steps, evals, row["colour"], row["total_steps"], waiting=waiting),
    }


def hidden(parts: Parts) -> Updates:
    """No run is looked at."""
    return {parts.column: gr.Column(visible=False), parts.chosen: ""}
