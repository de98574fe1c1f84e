"""Runs: the queue, everything that was trained, one run in detail, several laid together, the bin."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from engine.errors import ConfigError, EngineError
from studio import overlay, run_list, run_panel, run_together, run_words, states
from studio.history import COLUMNS, MOST_ROWS, PAGE, History
from studio.i18n import t
from studio.markup import error, notice
from studio.page import COMPARE, HIDDEN, RUNS, START, TICK, TRAIN, Page, go, message
from studio.run_list import View, Whole
from studio.store import Row

ID = RUNS

Updates = dict[Any, Any]

_SEE = (
    "(run) => { if (run) setTimeout(() => document.getElementById('run-detail')"
    "?.scrollIntoView({behavior: 'smooth'}), 150) }"
)


def build(page: Page) -> None:
    """Lay out the page."""
    page.parts[ID] = run_list.build()


class Actions:
    """What the page does. Each action answers the widgets that change and no others: what a person types or chooses
    meanwhile stays."""

    def __init__(self, page: Page) -> None:
        whole: Whole = page.parts[ID]
        self.page, self.parts, self.detail, self.together = page, whole.tab, whole.detail, whole.together
        self.store, self.jobs = page.studio.store, page.studio.jobs
        self.history = History(self.store)

    # What is shown

    def listing(self, view: View) -> Updates:
        """The queue, the list and the bin as they are now."""
        parts, wanted, storage = self.parts, view.wanted, self.jobs.storage
        moment = self._moment(view)
        rows, total = self.history.rows(wanted), self.history.count(wanted)
        storage.refresh(rows)
        live, busy = self.store.in_states(states.LIVE), storage.busy
        none = not total and not wanted.search and not wanted.state
        gone = [list(it) for it in self.history.binned()]
        return {
            parts.queue: run_words.queue(live, self._told(live)),
            parts.table: self._table(rows, view) if not none else _empty(),
            parts.summary: "" if none else run_words.summary(len(rows), total, storage.room(), busy),
            parts.shelf: gr.Row(visible=not none),
            parts.to_start: gr.Button(visible=none),
            parts.more: gr.Button(visible=len(rows) < min(total, MOST_ROWS)),
            parts.timer: gr.Timer(active=bool(live) or busy),
            **self._bin(gone, (view.seen or {}).get("bin")),
            parts.seen: {"moment": [*moment, busy], "bin": gone},
        }

    def _table(self, rows: Sequence[Row], view: View) -> str:
        return run_words.listing(rows, view.wanted, view.picked or [], view.chosen)

    def _told(self, live: Sequence[Row]) -> dict[str, Row]:
        """What the newest events of the run that trains say."""
        found = {}
        for row in live:
            if row["state"] in states.ACTIVE:
                status, step = (self.store.newest(row["id"], kind) or {} for kind in ("status", "step"))
                found[row["id"]] = {**status, **step}
        return found

    def _bin(self, gone: list[list[str]], before: list[list[str]] | None) -> Updates:
        """What lies in the bin, where it has changed: a choice in it stays otherwise."""
        if gone == before:
            return {}
        box = self.parts.bin
        return {
            box.part: gr.Accordion(f"{t('Bin')} ({len(gone)})", visible=bool(gone)),
            box.choice: gr.Dropdown([(name, key) for name, key in gone], value=gone[0][1] if gone else None),
        }

    def _moment(self, view: View) -> list[Any]:
        wanted = view.wanted
        return [*self.history.moment(), wanted.search, wanted.state, wanted.sort, wanted.limit]

    def tick(self, *shown: Any) -> Any:
        """Redraw what moves by itself, when something has."""
        view = View(*shown)
        if (view.seen or {}).get("moment") == [*self._moment(view), self.jobs.storage.busy]:
            return gr.skip()
        found = self.listing(view)
        live = {row["id"] for row in self.store.in_states(states.LIVE)}
        if view.chosen:
            with contextlib.suppress(EngineError):
                found |= run_panel.moved(self.detail, self.store, self.jobs, self.store.run(view.chosen))
        if live & set(view.picked or []):
            rows = run_together.rows_of(self.store, view.picked)
            found[self.together.curves] = run_together.curves(self.store, rows, view.by, view.smoothing, view.log)
        return found

    def show(self, run_id: str, view: View) -> Updates:
        """One run in detail."""
        return {
            **run_panel.shown(self.detail, self.store, self.jobs, run_id),
            **self.listing(_with(view, chosen=run_id)),
            self.together.see: gr.Button(variant="secondary"),
        }

    def close(self, view: View) -> Updates:
        """No run in detail."""
        return {
            **run_panel.hidden(self.detail),
            **self.listing(_with(view, chosen="")),
            self.together.see: gr.Button(variant="primary"),
        }

    def search(self, view: View) -> Updates:
        """Other words, another state or order: from the top."""
        return {**self.listing(_with(view, limit=PAGE)), self.parts.limit: PAGE}

    def more(self, view: View) -> Updates:
        """So many again."""
        limit = view.wanted.limit + PAGE
        return {**self.listing(_with(view, limit=limit)), self.parts.limit: limit}

    def clear(self, view: View) -> Updates:
        """No run chosen."""
        after = _with(view, picked=[])
        return {**self.listing(after), **self._together(after)}

    # What is pressed in the queue and the list

    def said(self, view: View, event: gr.EventData) -> Updates:
        """A name, a box, a head, a tag, or a button of the queue."""
        asked = {key: value for key, value in (event._data or {}).items() if isinstance(value, str | bool)}
        if "pick" in asked:
            return self._pick(str(asked["pick"]), asked.get("on") is True, view)
        if asked.get("sort") in COLUMNS:
            turned = view.wanted.turned(str(asked["sort"]))
            return {**self.listing(_with(view, sort=turned)), self.parts.sort: turned}
        if "tag" in asked:
            search = str(asked["tag"])
            return {**self.listing(_with(view, search=search, limit=PAGE)), self.parts.search: search}
        if "untag" in asked:
            return self._untag(str(asked["untag"]), view)
        if "to" in asked:
            self.jobs.reorder(str(asked.get("queued")), str(asked["to"]))
            return self.listing(view)
        if "cancel" in asked:
            return self._cancel(str(asked["cancel"]), view)
        if "open" in asked:
            return {self.page.run: self.store.run(str(asked["open"]))["id"], self.page.tabs: go(TRAIN)}
        return self.show(str(asked.get("run", "")), view)

    def _pick(self, run_id: str, on: bool, view: View) -> Updates:
        """A run's box was ticked or cleared."""
        picked = [it for it in view.picked or [] if it != run_id]
        if on and len(picked) >= overlay.MOST:
            # The box has to be cleared again.
            raise ConfigError(
                f"{overlay.MOST} runs are chosen already; more curves cannot be told apart.", "Clear one of the boxes."
            )
        after = _with(view, picked=[*picked, run_id] if on else picked)
        # Drawn anew with the box as it is now, or an answer that was on its way would turn it back.
        return {**self._together(after), self.parts.table: self._table(self.history.rows(view.wanted), after)}

    def _together(self, view: View) -> Updates:
        options = (view.by, view.smoothing, view.log, view.whole)
        return run_together.shown(self.together, self.store, view.picked, *options)

    def _cancel(self, run_id: str, view: View) -> Updates:
        self.jobs.cancel(run_id)
        return {**self.listing(view), **self._undoable("queue", [run_id])}

    def _undoable(self, what: str, run_ids: Sequence[str]) -> Updates:
        names = [self.store.run(run_id)["name"] for run_id in run_ids]
        return {
            self.parts.undo_row: gr.Row(visible=bool(run_ids)),
            self.parts.undo_told: run_words.undo_told(names, what),
            self.parts.undone: [what, *run_ids],
        }

    # What is pressed elsewhere

    def delete(self, run_ids: Sequence[str], view: View) -> Updates:
        """Put runs into the bin; those that wait or train stay, and it says so."""
        gone, refused = [], None
        for run_id in run_ids:
            try:
                self.store.bin(run_id)
                gone.append(run_id)
            except EngineError as fault:
                refused = fault
        after = _with(view, picked=[it for it in view.picked or [] if it not in gone])
        found = self.close(after) if after.chosen in gone else self.listing(after)
        if refused is not None:
            found[self.parts.fault] = gr.HTML(error(refused), visible=True)
        return {**found, **self._together(after), **(self._undoable("bin", gone) if gone else {})}

    def undo(self, undone: Sequence[str] | None, view: View) -> Updates:
        """Take back what was done last."""
        what, *run_ids = undone or [""]
        for run_id in run_ids:
            # Another page may have emptied the bin, or begun the run, since; the list that follows says so.
            with contextlib.suppress(EngineError):
                self.store.restore(run_id) if what == "bin" else self.jobs.resume(run_id)
        return {**self.listing(view), self.parts.undo_row: gr.Row(visible=False), self.parts.undone: None}

    def ask_to_empty(self, view: View) -> Updates:
        """What emptying the bin would cost and give."""
        gone = [run_id for _, run_id in self.history.binned()]
        freed = self.jobs.storage.measure(gone)
        box = self.parts.bin
        return {box.told: run_words.binned(len(gone), freed), box.asked: gr.Row(visible=bool(gone))}

    def empty(self, view: View) -> Updates:
        """Remove what is in the bin, for good."""
        self.jobs.empty_bin()
        hidden = {self.parts.bin.asked: gr.Row(visible=False), self.parts.undo_row: gr.Row(visible=False)}
        return {**self.listing(view), **hidden}

    def rename(self, name: str, view: View) -> Updates:
        """Give the run in detail another name."""
        self.history.rename(view.chosen, name)
        row = self.store.run(view.chosen)
        found = {**run_panel.moved(self.detail, self.store, self.jobs, row), **self.listing(view)}
        return {**found, self.detail.name: row["name"], **self._together(view)}

    def tag(self, tag: str, view: View) -> Updates:
        """Another tag for the run in detail."""
        tags = self.history.add_tags(view.chosen, tag)
        return {**self.listing(view), self.detail.tags: run_words.tags(tags), self.detail.tag: ""}

    def _untag(self, tag: str, view: View) -> Updates:
        tags = self.history.remove_tags(view.chosen, [tag])
        return {**self.listing(view), self.detail.tags: run_words.tags(tags)}

    def reuse(self, view: View) -> Updates:
        """Fill Train with the settings of the run in detail."""
        row = self.store.run(view.chosen)
        meaning = t("Settings of {name}; change what you like.", name=row["name"])
        recipe = message(spec=row["spec"], dataset=row["dataset"], meaning=meaning, run=row["id"])
        return {self.page.recipe: recipe, self.page.run: "", self.page.tabs: go(TRAIN)}

    def resume(self, view: View) -> Updates:
        """Queue the run in detail again, and watch it."""
        self.jobs.resume(view.chosen)
        return {self.page.run: view.chosen, self.page.tabs: go(TRAIN)}

    def compare(self, view: View) -> Updates:
        """The run in detail against its base."""
        base = self.store.run(view.chosen)["model"]
        return {self.page.comparison: message(base=base, runs=[view.chosen]), self.page.tabs: go(COMPARE)}


def _with(view: View, **changes: Any) -> View:
    return View(**{**vars(view), **changes})


def _empty() -> str:
    return notice("info", t("No runs yet."), t("A run is one training, kept here with its curve and its settings."))


def wire(page: Page) -> None:
    """Connect the queue, the list, the detail, the runs together, and the bin."""
    whole: Whole = page.parts[ID]
    parts, detail, together, act = whole.tab, whole.detail, whole.together, Actions(page)
    shown, count = whole.view, len(whole.view)
    outputs = [*whole.widgets, page.run, page.recipe, page.comparison, page.tabs]

    def on(action: Callable[..., Updates], listeners: Any, *first: Any, **how: Any) -> Any:
        """Connect an action; a refusal is said on the page, beside what is there now."""

        def handler(*values: Any) -> Updates:
            view = View(*values[-count:])
            try:
                return {parts.fault: gr.HTML(visible=False), **action(*values[:-count], view)}
            except EngineError as fault:
                return {**act.listing(view), parts.fault: gr.HTML(error(fault), visible=True)}

        handler.__doc__ = action.__doc__
        return gr.on(listeners, handler, [*first, *shown], outputs, **{**HIDDEN, **how})

    def said(event: gr.EventData, *values: Any) -> Updates:
        """What was pressed in the queue or the list."""
        view = View(*values)
        try:
            return {parts.fault: gr.HTML(visible=False), **act.said(view, event)}
        except EngineError as fault:
            return {**act.listing(view), parts.fault: gr.HTML(error(fault), visible=True)}

    on(act.listing, [page.tab[ID].select])
    parts.timer.tick(act.tick, shown, outputs, **TICK)
    # Each press counts, also while another is being answered; one after another, or two would begin from the same runs.
    gr.on(
        [parts.queue.click, parts.table.click, detail.tags.click],
        said,
        shown,
        outputs,
        trigger_mode="multiple",
        concurrency_id="runs-presses",
        concurrency_limit=1,
        **HIDDEN,
    )
    searching = [parts.search.input, parts.state.input, parts.sort.input]
    on(act.search, searching, trigger_mode="always_last")
    on(act.more, parts.more.click)
    parts.to_start.click(lambda: go(START), None, page.tabs, **HIDDEN)
    detail.chosen.change(None, detail.chosen, None, js=_SEE, **HIDDEN)
    detail.open.click(lambda run_id: (run_id, go(TRAIN)), detail.chosen, [page.run, page.tabs], **HIDDEN)
    for action, button in (
        (act.compare, detail.compare),
        (act.reuse, detail.reuse),
        (act.resume, detail.resume),
        (act.close, detail.close),
        (act.clear, together.clear),
        (act.ask_to_empty, parts.bin.empty),
        (act.empty, parts.bin.yes),
    ):
        on(action, button.click)
    on(lambda view: act.delete([view.chosen], view), detail.delete.click)
    on(lambda view: act.delete(view.picked or [], view), together.delete.click)
    on(act.rename, [detail.rename.click, detail.name.submit], detail.name)
    on(act.tag, [detail.add_tag.click, detail.tag.submit], detail.tag)
    on(act.undo, parts.undo.click, parts.undone)
    on(lambda run_id, view: act.undo(["bin", run_id or ""], view), parts.bin.restore.click, parts.bin.choice)
    parts.bin.no.click(lambda: gr.Row(visible=False), None, parts.bin.asked, **HIDDEN)
    run_together.wire(together, act.store)
