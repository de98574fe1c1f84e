"""Start: the guided path from a wish to a run, finished samples, the last run, what this machine is good for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path as File
from typing import Any

import gradio as gr

from engine import data
from engine.errors import EngineError
from studio import charts, data_words, guide, guide_words, machine, states, words
from studio.datasets import Checked, train_rows
from studio.guide import GOALS, SAMPLE, Path
from studio.i18n import t
from studio.markup import ago, badge, dot, error, esc, notice, size
from studio.page import DATA, HIDDEN, PICK, START, TRAIN, Page, go, message
from studio.samples import SAMPLES
from studio.store import Row

ID = START
PAGES = (DATA, TRAIN)
Updates = dict[Any, Any]


@dataclass
class Parts:
    """The widgets of this tab.

    Attributes:
        path: where somebody is on the way, as in the address.
        board: the goals, or a step with its options.
        way: all that stands below a step's options.
        bring: the drop zone of the data step.
        rows: what the chosen rows look like.
        cost: what will learn, on the last step.
    """

    path: gr.Textbox
    board: gr.HTML
    way: gr.Column
    bring: gr.Column
    file: gr.File
    rows: gr.HTML
    cost: gr.HTML
    fault: gr.HTML
    back: gr.Button
    every: gr.Button
    on: gr.Button
    last: gr.HTML
    machine: gr.HTML


def build(page: Page) -> None:
    """Lay out the first step; the others are drawn into the same places."""
    path = gr.Textbox(visible="hidden", elem_id="guide-path")
    board = gr.HTML(guide_words.goals(), js_on_load=guide_words.LIVE, elem_id="start-board")
    fault = gr.HTML("", js_on_load=guide_words.LIVE, elem_id="guide-fault")
    with gr.Column(visible=False, elem_id="guide-way") as way:
        with gr.Column(elem_id="guide-bring") as bring:
            file = gr.File(
                label=t("Or rows of your own: a table, a text, or a zip of pictures"),
                file_types=[*data.KINDS],
                height=160,
                # As long as it is not seen, the first page does without the script that draws it.
                visible=False,
                elem_id="guide-file",
            )
            gr.HTML('<div id="guide-limit" class="notice error" role="alert" data-code="data-too-large" hidden></div>')
        rows = gr.HTML("", elem_id="guide-rows")
        cost = gr.HTML("", elem_id="guide-cost")
        with gr.Row(elem_id="guide-bar"):
            back = gr.Button(t("Back"), elem_id="guide-back")
            every = gr.Button(t("Every setting"), elem_id="guide-every")
            on = gr.Button(t("Go on"), variant="primary", elem_id="guide-on")
    last = gr.HTML(visible=False, js_on_load=PICK, elem_id="start-last")
    here = gr.HTML(machine.words(page.studio.machine), elem_id="start-machine")
    page.parts[ID] = Parts(path, board, way, bring, file, rows, cost, fault, back, every, on, last, here)


def show(page: Page, path: Path) -> Updates:
    """Everything that follows from where somebody is."""
    parts: Parts = page.parts[ID]
    # Values rather than visibility where both say the same: for each change of visibility Gradio walks the whole page.
    found: Updates = {parts.path: str(path), parts.fault: "", parts.rows: "", parts.cost: ""}
    found[parts.way] = gr.Column(visible=bool(path.goal))
    if path.goal:
        found[parts.bring] = gr.Column(visible=path.step == "data")
        found[parts.file] = gr.File(visible=path.step == "data")
    if not path.goal:
        return {**found, parts.board: guide_words.goals()}
    try:
        return {**found, **_step(page, path)}
    except EngineError as fault:
        return {
            **found,
            parts.board: guide_words.head(path),
            parts.fault: error(fault),
            parts.on: gr.Button(interactive=False),
        }


def _step(page: Page, path: Path) -> Updates:
    """A step's options and its primary button."""
    parts: Parts = page.parts[ID]
    found: Updates = {}
    if path.step == "data":
        checked = _rows(page, path)
        count = checked.prepared.kept if checked.prepared else 0
        body = guide_words.options(guide.data_options(path, page.studio.store.datasets()), path.data)
        preview = data_words.preview(checked.prepared) if checked.prepared else ""
        found[parts.rows] = preview
        label = t("Use these {n} rows", n=f"{count:,}")
    elif path.step == "model":
        offered = guide.model_options(path)
        body = guide_words.options(offered, path.model)
        label = t("Take {name}", name=guide.chosen(offered, path.model).title)
    elif path.step == "preset":
        body = guide_words.options(guide.preset_options(path), path.preset)
        label = t("Take this recipe")
    else:
        body, count = _check(page, path)
        label = t("Train on these {n} rows", n=f"{count:,}")
    return {
        **found,
        parts.board: guide_words.head(path) + body,
        parts.on: gr.Button(label, interactive=True),
    }


def _rows(page: Page, path: Path) -> Checked:
    """The chosen rows; the sample's are brought in."""
    if path.data == SAMPLE:
        return page.datasets.bring_in(guide.sample_of(path).rows())
    return page.datasets.open(path.data)


def _dataset(page: Page, path: Path) -> Row:
    return page.studio.store.dataset(_rows(page, path).id if path.data == SAMPLE else path.data)


def _check(page: Page, path: Path) -> tuple[str, int]:
    """What will happen, and how many rows are trained on."""
    dataset = _dataset(page, path)
    spec = guide.job(path, dataset)
    count = train_rows(dataset, spec.data.eval_split)
    model = guide.chosen(guide.model_options(path), path.model)
    preset = guide.chosen(guide.preset_options(path), path.preset)
    held = dataset["rows"] - count
    return guide_words.summary(path, spec, count, held, model, preset, dataset["name"]), count


def misfit(path: Path, found: Checked) -> str:
    """Why brought-in rows are not for this goal, and what they are for; "" where they fit."""
    if found.prepared is None:
        open_data = t("Say which column is which on the Data page.")
        button = f'<button type="button" class="st-press" data-page="{DATA}">{esc(open_data)}</button>'
        return data_words.recognised(found) + button
    row = {"format": found.format, "rows": found.prepared.kept}
    if path.about.takes(row):
        return ""
    able = [goal for goal in GOALS.values() if goal.takes(row)]
    buttons = "".join(
        f'<button type="button" class="st-press" data-goal="{esc(goal.name)}" data-rows="{esc(found.id)}">'
        f"{esc(t(goal.title))}</button>"
        for goal in able
    )
    about = t(data.FORMATS[str(found.format)].about)
    title = t("These rows teach something else")
    return notice("warn", title, f"{found.name}: {about}", t("Teach that instead:")) + f"<p>{buttons}</p>"


def last_run(page: Page) -> Updates:
    """Where somebody left off, and what is known of the machine by now."""
    parts: Parts = page.parts[ID]
    here: machine.Machine = page.studio.machine
    here.ask()
    found: Updates = {parts.machine: machine.words(here)} if here.cards else {}
    rows = page.studio.store.runs()
    if not rows:
        return {**found, parts.last: gr.HTML(visible=False)}
    row = rows[0]
    steps = page.studio.store.by_step(row["id"], "step")
    points = charts.smooth(charts.clean([(step["step"], step.get("loss")) for step in steps]))
    about = words.run_head(row) if row["state"] in states.LIVE else _brief(row)
    card = (
        f'<h3 class="gd-next">{esc(t("Continue where you left off"))}</h3><div class="st-card last-run">'
        f'{charts.sparkline(points, row["colour"])}<div class="about">{about}</div>'
        f'<button type="button" id="start-open" class="st-press" data-run="{esc(row["id"])}">'
        f"{esc(t('Open this run'))}</button></div>"
    )
    return {**found, parts.last: gr.HTML(card, visible=True)}


def _brief(row: Row) -> str:
    name = esc(row["name"])
    title = f'<strong class="st-name" title="{name}">{dot(row["colour"])}{name}</strong>'
    return f"{title} {badge(row['state'])}<p>{ago(row['created'])}</p>"


def wire(page: Page) -> None:
    """Connect the path, the samples and the last run."""
    parts: Parts = page.parts[ID]
    step = [parts.path, parts.board, parts.way, parts.bring, parts.file, parts.rows, parts.cost, parts.fault, parts.on]
    away = [page.recipe, page.run, page.tabs]

    def at(text: str | None) -> Path:
        return guide.read(text, page.studio.store.datasets())

    def arrive(request: gr.Request) -> Updates:
        """The step that the address names; a person who has begun without one is not disturbed."""
        path = at(dict(request.query_params).get("guide", ""))
        return {**(show(page, path) if path.goal else {}), **last_run(page)}

    def sample(name: str) -> Updates:
        """Load the sample's rows, fill Train, and go there."""
        chosen = SAMPLES[name]
        try:
            found = page.datasets.bring_in(chosen.rows())
            spec = chosen.spec().to_dict()
        except EngineError as problem:
            return {parts.fault: error(problem, t("The sample cannot be loaded"))}
        return {
            page.recipe: message(spec=spec, dataset=found.id, meaning=t(chosen.meaning)),
            page.run: "",
            page.tabs: go(TRAIN),
            parts.fault: "",
        }

    def press(event: gr.EventData, text: str | None) -> Updates:
        """A card, a step's name or a sample was pressed."""
        said = {key: str(value) for key, value in (event._data or {}).items()}
        path = at(text)
        if said.get("goal") in GOALS:
            return show(page, guide.begin(said["goal"], page.studio.store.datasets(), said.get("rows") or SAMPLE))
        if said.get("sample") in SAMPLES:
            return sample(said["sample"])
        if said.get("page") in PAGES:
            return {page.tabs: go(said["page"]), page.run: ""}
        if said.get("step") in guide.STEPS:
            return show(page, Path() if said["step"] == "goal" or not path.goal else replace(path, step=said["step"]))
        if path.step in ("data", "model", "preset") and said.get("choice"):
            changed = replace(path, **{path.step: said["choice"]})
            return show(page, guide.settled(changed, page.studio.store.datasets()))
        return {}

    def bring(file: str | None, text: str | None) -> Updates:
        """Rows of one's own, for the goal that was chosen."""
        path = at(text)
        if not file or not path.goal:
            return {}
        try:
            found = page.datasets.bring_in(File(file))
        except EngineError as fault:
            return {parts.fault: error(fault, t("This file cannot be used"))}
        why = misfit(path, found)
        if why:
            return {parts.fault: why}
        return show(page, guide.settled(replace(path, data=found.id), page.studio.store.datasets()))

    def count(text: str | None) -> Iterator[Any]:
        """How many parameters would learn, once everything else is decided."""
        path = at(text)
        if path.step != "check":
            yield gr.skip()
            return
        yield f'<p class="st-hint">{esc(t("Counting what learns ..."))}</p>'
        try:
            spec = guide.job(path, _dataset(page, path))
            found = page.studio.inference.count(path.model, spec.adapter, spec.task, spec.options)
            said = t(
                "{n} of {all} parameters learn; the adapter will be a file of {size}.",
                n=f"{found['trainable']:,}",
                all=f"{found['parameters']:,}",
                size=size(found["adapter_bytes"]),
            )
            yield f'<p class="st-hint">{esc(said)}</p>'
        except EngineError as fault:
            yield error(fault, t("These settings do not fit this base"))

    def on(text: str | None) -> Updates:
        """The next step; after the last, the run."""
        path = at(text)
        if path.step != "check":
            return show(page, path.on() if path.goal else path)
        try:
            dataset = _dataset(page, path)
            run_id = page.studio.jobs.submit(guide.job(path, dataset), dataset["id"])
        except EngineError as fault:
            return {parts.fault: error(fault, t("This run cannot start yet"))}
        return {**show(page, Path()), page.run: run_id, page.tabs: go(TRAIN)}

    def every(text: str | None) -> Updates:
        """The answers so far, on the form with every setting."""
        path = at(text)
        try:
            dataset = _dataset(page, path)
            spec = guide.job(path, dataset).to_dict()
        except EngineError as fault:
            return {parts.fault: error(fault)}
        meaning = t("From the guided path; change what you like.")
        return {
            page.recipe: message(spec=spec, dataset=dataset["id"], meaning=meaning),
            page.run: "",
            page.tabs: go(TRAIN),
        }

    def reopen(event: gr.EventData) -> tuple[str, Any]:
        return str((event._data or {}).get("run", "")), go(TRAIN)

    once = {"trigger_mode": "once", **HIDDEN}
    page.blocks.load(arrive, None, [*step, parts.last, parts.machine], **HIDDEN)
    page.tab[ID].select(lambda: last_run(page), None, [parts.last, parts.machine], **HIDDEN)
    gr.on([parts.board.click, parts.fault.click], press, parts.path, [*step, *away], **once)
    parts.file.upload(bring, [parts.file, parts.path], step, show_progress="minimal", api_visibility="private")
    parts.back.click(lambda text: show(page, at(text).back()), parts.path, step, **once)
    parts.on.click(on, parts.path, [*step, *away], **once)
    parts.every.click(every, parts.path, [*away, parts.fault], **once)
    parts.path.change(count, parts.path, parts.cost, trigger_mode="always_last", concurrency_limit=4, **HIDDEN)
    parts.path.change(None, parts.path, None, js="(path) => window.studioAddress('guide', path)", **HIDDEN)
    parts.last.click(reopen, None, [page.run, page.tabs], **HIDDEN)
