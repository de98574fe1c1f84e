"""The Runs page's own widgets: queue, search, list, bin, what can be undone. What they do is in `studio.tabs.runs`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio import bin_form, run_panel, run_together
from studio.history import GROUPS, MOST_ROWS, PAGE, Wanted, sort_keys, sorts
from studio.i18n import t
from studio.markup import began, esc
from studio.run_words import SAY


@dataclass
class Parts:
    """The widgets of the list; `undone` holds what can be taken back, `seen` what the page has drawn."""

    queue: gr.HTML
    shelf: gr.Row
    search: gr.Textbox
    state: gr.Dropdown
    sort: gr.Dropdown
    summary: gr.HTML
    fault: gr.HTML
    table: gr.HTML
    to_start: gr.Button
    more: gr.Button
    bin: bin_form.Bin
    undo_row: gr.Row
    undo_told: gr.HTML
    undo: gr.Button
    limit: gr.State
    undone: gr.State
    timer: gr.Timer
    seen: gr.State

    @property
    def widgets(self) -> list[Any]:
        """All of them in one list."""
        plain = [it for it in vars(self).values() if it is not self.bin]
        return [*plain, *self.bin]


@dataclass
class Whole:
    """The tab with its panels."""

    tab: Parts
    detail: run_panel.Parts
    together: run_together.Parts

    @property
    def widgets(self) -> list[Any]:
        """All of them in one list."""
        return [*self.tab.widgets, *self.detail.widgets, *self.together.widgets]

    @property
    def view(self) -> list[Any]:
        """The inputs of every action, in the order of `View`."""
        tab, together = self.tab, self.together
        shown = [tab.search, tab.state, tab.sort, tab.limit, self.detail.chosen, tab.seen]
        return [*shown, together.picked, *together.options]


@dataclass(frozen=True)
class View:
    """What a page shows at the moment of a request."""

    search: str
    state: str
    sort: str
    limit: int
    chosen: str
    seen: dict[str, Any] | None
    picked: list[str]
    by: str
    smoothing: float
    log: bool
    whole: bool

    @property
    def wanted(self) -> Wanted:
        """What of the history is asked for; a value that no widget of ours sends falls back to the usual one."""
        return Wanted(
            str(self.search or ""),
            self.state if self.state in GROUPS else "",
            self.sort if self.sort in sort_keys() else "created-down",
            min(max(int(self.limit or PAGE), 1), MOST_ROWS),
        )


def build() -> Whole:
    """Lay out the queue, the list, one run's detail, runs together, and the bin."""
    gr.HTML(f'<h2 class="page-title">{esc(t("Everything you trained"))}</h2>')
    queue = gr.HTML(js_on_load=SAY, elem_id="runs-queue")
    with gr.Row(visible=False, elem_id="runs-shelf") as shelf:
        search = gr.Textbox(
            label=t("Search"),
            placeholder=t("Name, base, method, data set, tag"),
            elem_id="runs-search",
            scale=3,
            min_width=240,
        )
        groups = [(began(t(words)), key) for key, (words, _) in GROUPS.items()]
        state = gr.Dropdown(groups, value="", label=t("State"), elem_id="runs-state", min_width=150)
        orders = [(began(words), key) for words, key in sorts()]
        sort = gr.Dropdown(orders, value="created-down", label=t("Order"), elem_id="runs-sort", min_width=170)
    summary = gr.HTML(elem_id="runs-summary")
    table = gr.HTML(js_on_load=SAY, elem_id="runs-table")
    to_start = gr.Button(t("Start with a sample"), variant="primary", visible=False)
    more = gr.Button(t("Show more"), visible=False, elem_id="runs-more")
    detail = run_panel.build()
    together = run_together.build()
    box = bin_form.build("runs-bin")
    # Last, and held to the foot of the window: it is about what was done somewhere above.
    with gr.Column(elem_id="runs-foot"):
        fault = gr.HTML(visible=False, elem_id="runs-fault")
        with gr.Row(visible=False, elem_id="runs-undone") as undo_row:
            undo_told = gr.HTML()
            undo = gr.Button(t("Undo"), size="sm", elem_id="runs-undo", min_width=90)
        bar = run_together.build_bar()
    tab = Parts(
        queue=queue,
        shelf=shelf,
        search=search,
        state=state,
        sort=sort,
        summary=summary,
        fault=fault,
        table=table,
        to_start=to_start,
        more=more,
        bin=box,
        undo_row=undo_row,
        undo_told=undo_told,
        undo=undo,
        limit=gr.State(PAGE),
        undone=gr.State(None),
        timer=gr.Timer(2.0, active=False),
        seen=gr.State(None),
    )
    return Whole(tab, detail, run_together.Parts(**together, **bar))
