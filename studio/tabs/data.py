"""Data: bring in files, see what they were recognised as, what a base would see of them, and what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from engine import data
from engine.errors import EngineError
from studio import about_panel, bin_form, data_words, dataset_files, problem_panel, rows_panel, sides_panel, token_panel
from studio import dataset_shelf as shelf
from studio.datasets import Checked
from studio.i18n import N_, t
from studio.markup import error, esc, notice
from studio.page import DATA, HIDDEN, TRAIN, Page, go, message
from studio.problem_words import decided
from studio.samples import SAMPLES

ID = DATA
ROLES = max(len(info.roles) for info in data.FORMATS.values())
NONE = ""
RECENT = 6
ROWS, TOKENS, PROBLEMS, SIDES, ABOUT = "rows", "tokens", "problems", "sides", "about"
SHOWN_SAMPLES = {
    "captain": N_("Questions and answers"),
    "old-english": N_("Text into other text"),
    "captions": N_("Pictures and captions"),
    "topics": N_("Texts and classes"),
    "preferences": N_("Better and worse answers"),
}
"""Sample -> what its rows are; a page without data sets offers them."""
_PICK = """element.addEventListener('click', (event) => {
  const named = event.target.closest('[data-set]');
  if (named) trigger('click', {set: named.dataset.set});
});"""


@dataclass
class Parts:
    """The widgets of this tab."""

    file: gr.File
    folder: gr.UploadButton
    earlier: gr.Dropdown
    fault: gr.HTML
    offered: gr.Column
    samples: dict[str, gr.Button]
    recent: gr.HTML
    verdict: gr.HTML
    mapping: gr.Group
    format: gr.Dropdown
    roles: list[gr.Dropdown]
    use: gr.Button
    told: gr.HTML
    views: gr.Tabs
    tabs: dict[str, gr.Tab]
    shown: gr.State
    view: gr.State


@dataclass
class Whole:
    """The tab with its views and its bin."""

    tab: Parts
    rows: rows_panel.Parts
    tokens: token_panel.Parts
    problems: problem_panel.Parts
    sides: sides_panel.Parts
    about: about_panel.Parts
    bin: bin_form.Bin


def build(page: Page) -> None:
    """Lay out the drop zone, what follows from a data set, its views, and the bin."""
    lead = t(
        "One row is one example: a question and its answer, a conversation, a text, or a picture with its caption. Drop"
        " a table (csv, tsv, json, jsonl, parquet, txt), several of them, a folder of pictures with a txt beside each,"
        " or a zip; up to 100 MB a file."
    )
    gr.HTML(f'<h2 class="page-title">{esc(t("What should it learn from?"))}</h2><p class="st-lead">{esc(lead)}</p>')
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            file = gr.File(label=t("Files, or a folder"), file_count="multiple", height=150, elem_id="data-file")
        with gr.Column(scale=2, min_width=260):
            earlier = gr.Dropdown([], value=None, label=t("Or an earlier data set"), elem_id="data-earlier")
            folder = gr.UploadButton(t("Choose a folder"), file_count="directory", elem_id="data-folder")
    gr.HTML('<div id="data-limit" class="notice error" role="alert" data-code="data-too-large" hidden></div>')
    fault = gr.HTML(visible=False, elem_id="data-several")
    with gr.Column(visible=False, elem_id="data-offered") as offered:
        gr.HTML(f'<h3 class="dp-head">{esc(t("Or begin with a sample"))}</h3>')
        with gr.Row():
            samples = {
                name: gr.Button(
                    t(title), variant="secondary" if number else "primary", elem_id=f"data-sample-{name}", min_width=150
                )
                for number, (name, title) in enumerate(SHOWN_SAMPLES.items())
            }
    recent = gr.HTML(js_on_load=_PICK, elem_id="data-recent")
    verdict = gr.HTML(visible=False, elem_id="data-verdict")
    with gr.Group(visible=False) as mapping, gr.Row():
        format = gr.Dropdown(
            [(data_words.title_of(name), name) for name in data.FORMATS], label=t("Read it as"), elem_id="data-format"
        )
        roles = [gr.Dropdown([], visible=False, elem_id=f"data-role-{index}") for index in range(ROLES)]
    use = gr.Button(t("Use this data set"), variant="primary", visible=False, elem_id="data-use")
    told = gr.HTML(visible=False, elem_id="data-said")
    tabs: dict[str, gr.Tab] = {}
    panels: dict[str, Any] = {}
    with gr.Tabs(visible=False, elem_id="data-views") as views:
        for name, title, panel in (
            (ROWS, t("Rows"), rows_panel),
            (TOKENS, t("What it learns"), token_panel),
            (PROBLEMS, t("Problems"), problem_panel),
            (SIDES, t("Held back"), sides_panel),
            (ABOUT, t("About"), about_panel),
        ):
            with gr.Tab(title, id=f"data-{name}", elem_id=f"data-view-{name}", render_children=True) as tabs[name]:
                panels[name] = panel.build()
    tab = Parts(
        file, folder, earlier, fault, offered, samples, recent, verdict, mapping, format, roles, use, told, views, tabs,
        gr.State(""), gr.State(ROWS),
    )  # fmt: skip
    page.parts[ID] = Whole(tab, **panels, bin=about_panel.build_bin())


def show(page: Page, found: Checked, told: str = "", problem: str = "", done: str = "") -> dict[Any, Any]:
    """Everything that follows from a data set, but for what is read only when its view is opened."""
    whole: Whole = page.parts[ID]
    parts = whole.tab
    info = data.FORMATS[found.format] if found.format else None
    updates: dict[Any, Any] = {
        parts.shown: found.id,
        parts.verdict: gr.HTML(data_words.recognised(found), visible=True),
        parts.fault: gr.HTML(told, visible=bool(told)),
        parts.told: gr.HTML(visible=False),
        parts.mapping: gr.Group(visible=True),
        parts.format: found.format,
        parts.offered: gr.Column(visible=False),
        parts.recent: "",
    }
    for index, box in enumerate(parts.roles):
        role = info.roles[index] if info and index < len(info.roles) else None
        needed = info is not None and role in info.required
        updates[box] = gr.Dropdown(
            [*found.available] if needed else [(t("(none)"), NONE), *((name, name) for name in found.available)],
            value=found.columns.get(role, None if needed else NONE) if role else None,
            label=t("Column of the {role}", role=role) if role else "",
            visible=role is not None,
        )
    prepared = found.prepared
    ready = prepared is not None
    updates[parts.use] = gr.Button(
        t("Use these {count} rows", count=f"{prepared.kept if prepared else 0:,}"), visible=ready
    )
    updates[parts.views] = gr.Tabs(visible=ready)
    count = sum(prepared.counts.values()) if prepared else 0
    label = t("Problems ({count})", count=f"{count:,}") if count else t("Problems")
    updates[parts.tabs[PROBLEMS]] = gr.Tab(label)
    return {
        **updates,
        **rows_panel.fresh(whole.rows, found),
        **token_panel.fresh(whole.tokens, found),
        **problem_panel.shown(whole.problems, found, problem, 0, done),
        whole.sides.sides: "",
        **about_panel.shown(page, whole.about, found.id),
        whole.about.told: gr.HTML(visible=False),
    }


def failed(page: Page, fault: EngineError) -> dict[Any, Any]:
    """A file that cannot be used: say why, and show nothing of an earlier one."""
    parts: Parts = page.parts[ID].tab
    return {
        parts.shown: "",
        parts.verdict: gr.HTML(error(fault, t("This file cannot be used")), visible=True),
        parts.fault: gr.HTML(visible=False),
        parts.told: gr.HTML(visible=False),
        parts.mapping: gr.Group(visible=False),
        parts.use: gr.Button(visible=False),
        parts.views: gr.Tabs(visible=False),
    }


def choices(page: Page) -> list[tuple[str, str]]:
    """Earlier data sets, newest first."""
    rows = page.studio.store.datasets()
    return [(t("{name} ({count} rows)", name=row["name"], count=f"{row['rows']:,}"), row["id"]) for row in rows]


def arrived(page: Page, dataset_id: str) -> dict[Any, Any]:
    """The data sets there are; samples where there are none. What is shown of one stays as it is."""
    whole: Whole = page.parts[ID]
    rows = page.studio.store.datasets()
    return {
        whole.tab.earlier: gr.Dropdown(choices(page)),
        whole.tab.offered: gr.Column(visible=not rows and not dataset_id),
        whole.tab.recent: "" if dataset_id else data_words.earlier(rows[:RECENT]),
        **about_panel.bin_shown(page, whole.bin),
    }


def wire(page: Page) -> None:
    """Connect the drop zone, the mapping, the views, what is decided, and the one button."""
    whole: Whole = page.parts[ID]
    parts, dataset, box = whole.tab, whole.tab.shown, whole.bin
    own = [parts.fault, parts.offered, parts.recent, parts.verdict, parts.mapping, parts.format, *parts.roles]
    own += [parts.use, parts.told, parts.views, *parts.tabs.values(), parts.shown, parts.earlier]
    panels = [*whole.rows.widgets, *whole.tokens.widgets, *whole.problems.widgets, whole.sides.sides]
    outputs = [*own, *panels, *whole.about.widgets, *box, parts.file]
    look = {
        TOKENS: token_panel.wire(page, whole.tokens, dataset),
        SIDES: sides_panel.wire(page, whole.sides, dataset),
        ABOUT: about_panel.wire(page, whole.about, dataset),
    }
    rows_panel.wire(page, whole.rows, dataset)
    problem_panel.wire(page, whole.problems, dataset)

    def upload(paths: list[str] | None) -> Any:
        """Take in what was chosen or dropped."""
        if not paths:
            return gr.skip()
        try:
            brought = dataset_files.bring_in(page.datasets, [Path(path) for path in paths])
            shown = show(page, brought.sets[0], data_words.brought(brought))
        except EngineError as fault:
            shown = failed(page, fault)
        return {**shown, parts.file: None, parts.earlier: gr.Dropdown(choices(page), value=None)}

    def reopen(dataset_id: str | None) -> Any:
        """Show an earlier data set."""
        if not dataset_id:
            return gr.skip()
        try:
            return show(page, page.datasets.open(dataset_id))
        except EngineError as fault:
            return failed(page, fault)

    def pick(event: gr.EventData) -> Any:
        """Show the data set whose card was clicked."""
        return reopen(event._data.get("set"))

    def sample(name: str) -> Any:
        def handler() -> dict[Any, Any]:
            """Bring in a sample's rows."""
            try:
                return {
                    **show(page, page.datasets.bring_in(SAMPLES[name].rows())),
                    parts.earlier: gr.Dropdown(choices(page)),
                }
            except EngineError as fault:
                return failed(page, fault)

        return handler

    def remap(dataset_id: str, format: str | None, *columns: str | None) -> Any:
        """Read the data set as the person says."""
        if not dataset_id or not format:
            return gr.skip()
        roles = data.FORMATS[format].roles if format in data.FORMATS else ()
        asked = {role: column for role, column in zip(roles, columns, strict=False) if column}
        try:
            return show(page, page.datasets.check(dataset_id, format, asked))
        except EngineError as fault:
            return failed(page, fault)

    def decide(dataset_id: str, chosen: str, event: gr.EventData) -> Any:
        """Do something about a cause, take it back, or list its rows."""
        asked = event._data
        if not dataset_id:
            return gr.skip()
        before = page.datasets.open(dataset_id)
        if asked.get("see"):
            see = "" if asked["see"] == chosen else asked["see"]
            return problem_panel.shown(whole.problems, before, see)
        cause, action = str(asked.get("fix", "")), str(asked.get("action", ""))
        try:
            found = page.datasets.fix(dataset_id, cause, action)
        except EngineError as fault:
            return problem_panel.shown(
                whole.problems, before, chosen, 0, error(fault, t("That would leave nothing to learn from"))
            )
        return {
            **show(page, found, problem=chosen, done=decided(before, found, cause, action)),
            parts.earlier: gr.Dropdown(choices(page)),
        }

    brings: dict[str, Any] = {"outputs": outputs, "show_progress": "minimal", "api_visibility": "private"}
    read = [parts.file.upload(upload, parts.file, **brings), parts.folder.upload(upload, parts.folder, **brings)]
    read.append(parts.earlier.input(reopen, parts.earlier, outputs, **HIDDEN))
    read.append(parts.recent.click(pick, None, outputs, **HIDDEN))
    read += [button.click(sample(name), None, outputs, **HIDDEN) for name, button in parts.samples.items()]
    # Another format: its roles start from the columns' names.
    read.append(parts.format.input(remap, [dataset, parts.format], outputs, **HIDDEN))
    read += [role.input(remap, [dataset, parts.format, *parts.roles], outputs, **HIDDEN) for role in parts.roles]
    read.append(whole.problems.causes.click(decide, [dataset, whole.problems.chosen], outputs, **HIDDEN))
    wire_views(whole, look, read)
    wire_shelf(page, outputs)
    parts.use.click(
        lambda dataset_id: (message(dataset=dataset_id), "", go(TRAIN)),
        dataset,
        [page.dataset, page.run, page.tabs],
        **HIDDEN,
    )


def wire_views(whole: Whole, look: dict[str, dict[str, Any]], read: list[Any]) -> None:
    """A view is read when it is opened, and when another data set comes while it is open."""
    parts = whole.tab
    for name, tab in parts.tabs.items():
        opened = tab.select(lambda name=name: name, None, parts.view, **HIDDEN)
        if name in look:
            opened.then(**look[name])
    for name, how in look.items():
        inputs = how["inputs"] if isinstance(how["inputs"], list) else [how["inputs"]]
        again = {**how, "fn": _if_open(name, how["fn"]), "inputs": [parts.view, *inputs]}
        for event in read:
            event.then(**again)


def _if_open(name: str, look: Any) -> Any:
    import inspect

    if inspect.isgeneratorfunction(look):

        def stream(view: str, *asked: Any) -> Any:
            if view == name:
                yield from look(*asked)
            else:
                yield gr.skip()

        return stream

    def once(view: str, *asked: Any) -> Any:
        return look(*asked) if view == name else gr.skip()

    return once


def wire_shelf(page: Page, outputs: list[Any]) -> None:
    """Names, the bin, and what is there when the page is opened."""
    whole: Whole = page.parts[ID]
    parts, about, box, dataset = whole.tab, whole.about, whole.bin, whole.tab.shown

    def rename(dataset_id: str, name: str) -> Any:
        """Another name for the data set that is shown."""
        if not dataset_id:
            return gr.skip()
        try:
            shelf.rename(page.studio.store, dataset_id, name)
        except EngineError as fault:
            return about_panel.refused(about, fault, t("It keeps its name"))
        found = page.datasets.open(dataset_id)
        return {
            parts.verdict: data_words.recognised(found),
            parts.earlier: gr.Dropdown(choices(page)),
            about.told: gr.HTML(notice("good", t("It is called {name} now.", name=found.name)), visible=True),
            **about_panel.shown(page, about, dataset_id),
        }

    def delete(dataset_id: str) -> Any:
        """Into the bin; the page is as it is without a data set."""
        if not dataset_id:
            return gr.skip()
        try:
            row = shelf.into_bin(page.studio.store, dataset_id)
        except EngineError as fault:
            return about_panel.refused(about, fault, t("It cannot be deleted now"))
        told = notice("info", t("{name} is in the bin.", name=row["name"]), "", t("Take it out again below."))
        return {
            parts.shown: "",
            **{widget: hidden(visible=False) for widget, hidden in (
                (parts.verdict, gr.HTML), (parts.mapping, gr.Group), (parts.use, gr.Button), (parts.views, gr.Tabs),
                (about.asked, gr.Row), (parts.fault, gr.HTML),
            )},
            **arrived(page, ""),
            parts.told: gr.HTML(told, visible=True),
        }  # fmt: skip

    def restore(file: str | None) -> Any:
        """Out of the bin, and shown."""
        if not file:
            return gr.skip()
        shelf.take_out(page.studio.store, file)
        row = shelf.current(page.studio.store, file)
        try:
            shown = show(page, page.datasets.open(row["id"])) if row else {}
        except EngineError as fault:
            shown = failed(page, fault)
        return {**arrived(page, row["id"] if row else ""), **shown}

    def empty(dataset_id: str) -> dict[Any, Any]:
        """Remove what lies in the bin for good."""
        told = about_panel.emptied(page)
        return {**arrived(page, dataset_id), parts.told: gr.HTML(told, visible=True)}

    about.rename.click(rename, [dataset, about.name], outputs, **HIDDEN)
    about.name.submit(rename, [dataset, about.name], outputs, **HIDDEN)
    about.yes.click(delete, dataset, outputs, **HIDDEN)
    box.restore.click(restore, box.choice, outputs, **HIDDEN)
    box.empty.click(lambda: gr.Row(visible=True), None, box.asked, **HIDDEN)
    box.no.click(lambda: gr.Row(visible=False), None, box.asked, **HIDDEN)
    box.yes.click(empty, dataset, outputs, **HIDDEN)
    seen = [parts.earlier, parts.offered, parts.recent, *box]
    page.tab[ID].select(lambda dataset_id: arrived(page, dataset_id), dataset, seen, **HIDDEN)
