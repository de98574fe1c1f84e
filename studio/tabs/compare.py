"""Compare: one prompt, the base and others; side by side, as a grid of pictures, or without names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from engine.data import open_picture
from engine.errors import EngineError
from engine.models.catalogue import BUILTIN, DEFAULT
from studio import blind_panel, demo, grid_panel, kept_panel, prompt_form, sampling_form, side_panel
from studio.comparing import fitting
from studio.comparisons import GRID, Comparisons
from studio.i18n import t
from studio.markup import notice
from studio.page import COMPARE, HIDDEN, Page
from studio.sampling_form import Sampling
from studio.store import Row
from studio.voices import MOST, choices, keys_of, task_of, voices

ID = COMPARE
ABLE = {"causal_lm", "seq2seq", "captioning", "text_to_image"}
"""The tasks whose bases answer by themselves."""

SIDE, GRIDS, BLIND = "side", "grid", "blind"
_SUGGEST = "(suggested, prompt) => prompt || suggested"
"""A suggestion goes into the prompt only if nothing was written while it was on its way."""


@dataclass
class Parts:
    """The widgets of the tab that its panels share.

    `suggested` carries a prompt to an empty box, `own` is the base that was chosen here and not by a person, `done` the
    newest wish of another page that was answered.
    """

    empty: gr.HTML
    base: gr.Dropdown
    columns: gr.Dropdown
    prompt: gr.Textbox
    picture: gr.Image
    how: Sampling
    views: gr.Tabs
    grid_tab: gr.Tab
    suggested: gr.Textbox
    own: gr.State
    done: gr.State
    side: side_panel.Parts
    grid: grid_panel.Parts
    blind: blind_panel.Parts
    kept: kept_panel.Parts

    @property
    def shared(self) -> list[Any]:
        """The form's widgets, without those of the panels."""
        plain = [self.empty, self.base, self.columns, self.prompt, self.picture, self.how.words, self.how.drawing]
        return [*plain, self.views, self.grid_tab, self.suggested, self.own, self.done]


def build(page: Page) -> None:
    """Lay out the form, the three views, and what was kept."""
    gr.HTML(f'<h2 class="page-title">{t("What did it change?")}</h2>')
    empty = gr.HTML(visible=False)
    with gr.Column(elem_id="compare-page"):
        with gr.Row():
            base = gr.Dropdown(
                [], value=None, allow_custom_value=True, label=t("Base model"), elem_id="compare-base", scale=1
            )
            columns = gr.Dropdown(
                [],
                value=[],
                multiselect=True,
                max_choices=MOST,
                # Another base brings other keys while the old ones may still be on their way; each is checked here.
                allow_custom_value=True,
                label=t("Beside the base"),
                info=t("Adapters and kept mixes of this base; at most {most}.", most=MOST),
                elem_id="compare-adapters",
                scale=2,
            )
        prompt, picture = prompt_form.question("compare", t("Ask something that your rows are about."))
        how = sampling_form.build(t("The same for every column."))
        with gr.Tabs(selected=SIDE, elem_id="compare-views") as views:
            with gr.Tab(t("Side by side"), id=SIDE, elem_id="view-side", render_children=True):
                side = side_panel.build()
            with gr.Tab(t("Grid"), id=GRIDS, elem_id="view-grid", visible=False, render_children=True) as grid_tab:
                grid = grid_panel.build()
            with gr.Tab(t("Blind test"), id=BLIND, elem_id="view-blind", render_children=True):
                blind = blind_panel.build()
        kept = kept_panel.build()
    suggested = gr.Textbox(visible="hidden", elem_id="compare-suggested")
    page.parts[ID] = Parts(
        empty,
        base,
        columns,
        prompt,
        picture,
        how,
        views,
        grid_tab,
        suggested,
        gr.State(""),
        gr.State(""),
        side,
        grid,
        blind,
        kept,
    )


class Form:
    """What the form offers, made anew whenever somebody comes to it or chooses."""

    def __init__(self, page: Page) -> None:
        self.studio = page.studio
        self.parts: Parts = page.parts[ID]

    def bases(self) -> list[str]:
        """Every base that can be asked, those with adapters first."""
        # The others cannot answer before they are trained, or are known by their adapters.
        able = [model.name for model in BUILTIN.values() if ABLE & {*model.tasks} and demo.offers(model.name)]
        return list(dict.fromkeys([*self.studio.library.bases(), *able]))

    def enter(
        self, base: str | None, chosen: list[str] | None, own: str, wanted: Mapping[str, Any] | None, done: str
    ) -> dict[Any, Any]:
        """What another page asked for, once; else what stands here, with the adapters that there are now."""
        parts = self.parts
        if wanted and wanted["nonce"] != done:
            keys = keys_of(self.studio, wanted["runs"])
            return {**self.begin(wanted["base"], keys, anew=True), parts.done: wanted["nonce"], parts.own: ""}
        known = self.bases()
        if not base or (base == own and base in known and not choices(self.studio, base)):
            # Nobody chose it: it stood here before there were adapters of another.
            first = self.studio.library.bases()
            base = first[0] if first else DEFAULT
            if base != own:
                return {**self.begin(base, None), parts.own: base}
        offered = choices(self.studio, base)
        there = [key for key in chosen or [] if key in {key for _, key in offered}]
        same = there == (chosen or [])
        return {
            parts.base: gr.Dropdown(known),
            parts.columns: gr.Dropdown(offered) if same else gr.Dropdown(offered, value=there, multiselect=True),
            **self.tip(offered),
            **blind_panel.offered(self.studio, parts.blind, base),
        }

    def begin(self, base: str, keys: Sequence[str] | None, anew: bool = False) -> dict[Any, Any]:
        """Another base: its newest adapter, or those asked for, and a prompt that fits.

        `anew`: the prompt takes the place of what was written; otherwise it is offered to an empty box.
        """
        parts, offered = self.parts, choices(self.studio, base)
        if keys is None:
            keys = [offered[0][1]] if offered else []
        prompt = self.fitting(keys)
        found = {
            parts.base: gr.Dropdown(self.bases(), value=base),
            parts.columns: gr.Dropdown(offered, value=list(keys), multiselect=True),
            parts.suggested: prompt,
            **self.asking(base, keys, prompt if anew else None),
            parts.views: gr.Tabs(selected=SIDE),
            **self.tip(offered),
            **side_panel.cleared(parts.side),
            **blind_panel.cleared(parts.blind),
            **blind_panel.offered(self.studio, parts.blind, base),
        }
        shown = self.example(keys) if self.task(base, keys) == "captioning" else None
        return found if shown is None else {**found, parts.picture: gr.Image(shown, visible=True)}

    def rebase(self, base: str | None) -> dict[Any, Any]:
        """A person chose another base."""
        found = {**self.begin(base or "", None, anew=True), self.parts.own: ""}
        # What was typed into the list stays as it was typed.
        return {**found, self.parts.base: gr.Dropdown(self.bases())}

    def asking(self, base: str, keys: Sequence[str] | None, prompt: str | None = None) -> dict[Any, Any]:
        """What the base is asked by, words or a picture, and which views it has; with `prompt`, these words."""
        parts, task = self.parts, self.task(base, keys or [])
        seen, drawn = task == "captioning", task == "text_to_image"
        return {
            parts.prompt: gr.Textbox(visible=not seen) if prompt is None else gr.Textbox(prompt, visible=not seen),
            parts.picture: gr.Image(visible=seen),
            parts.how.words: gr.Row(visible=not drawn),
            parts.how.drawing: gr.Row(visible=drawn),
            parts.grid_tab: gr.Tab(visible=drawn),
            **side_panel.asking(parts.side, task),
        }

    def chosen(self, base: str, keys: Sequence[str] | None) -> dict[Any, Any]:
        """Other columns are chosen; what was typed and is nobody's name is taken out again."""
        known = {key for _, key in choices(self.studio, base)}
        there = [key for key in keys or [] if key in known]
        same = {} if there == (keys or []) else {self.parts.columns: gr.Dropdown(value=there, multiselect=True)}
        return {**self.asking(base, there), **same}

    def task(self, base: str, keys: Sequence[str]) -> str:
        """What is asked of these columns."""
        try:
            return task_of(self.studio, base, voices(self.studio, base, keys))
        except EngineError:
            return task_of(self.studio, base)

    def tip(self, offered: Sequence[Any]) -> dict[Any, Any]:
        """What to do where there is no adapter."""
        text = notice(
            "info", t("No adapter of this base yet."), "", t("Train or import one; until then only the base answers.")
        )
        return {self.parts.empty: gr.HTML(text, visible=not offered)}

    def run_of(self, keys: Sequence[str]) -> str | None:
        """The run that the first of the adapters came from."""
        for key in keys:
            try:
                run = self.studio.library.get(key)["run_id"]
            except EngineError:
                continue
            if run:
                return str(run)
        return None

    def fitting(self, keys: Sequence[str]) -> str:
        """A prompt that the first adapter of a run learned something about."""
        run = self.run_of(keys)
        return fitting(self.studio, run) if run else ""

    def example(self, keys: Sequence[str]) -> Any:
        """The first picture of what the first adapter of a run learned from."""
        run = self.run_of(keys)
        try:
            rows = self.studio.store.dataset(self.studio.store.run(run or "")["dataset"])["profile"].get("examples", [])
            return open_picture(rows[0]["image"]) if rows and "image" in rows[0] else None
        except EngineError:
            return None


def wire(page: Page) -> None:
    """Connect the form and the panels."""
    parts: Parts = page.parts[ID]
    studio, form = page.studio, Form(page)
    comparisons = Comparisons(studio.store, studio.home)
    side, grid, kept = parts.side, parts.grid, parts.kept
    views = [*parts.shared, *side.widgets, *parts.blind.widgets]

    def opened(row: Row) -> dict[Any, Any]:
        """A comparison that was kept, in the view that it was made in."""
        if row["kind"] == GRID:
            shown = grid_panel.opened(studio, grid, row)
            return {**shown, parts.grid_tab: gr.Tab(visible=True), parts.views: gr.Tabs(selected=GRIDS)}
        return {**side_panel.opened(studio, side, row), parts.views: gr.Tabs(selected=SIDE)}

    refreshed: dict[str, Any] = {
        "fn": lambda limit: kept_panel.listing(comparisons, kept, limit),
        "inputs": kept.limit,
        "outputs": kept.widgets,
        **HIDDEN,
    }
    arrived = [parts.base, parts.columns, parts.own, page.comparison, parts.done]
    suggested = {"fn": None, "inputs": [parts.suggested, parts.prompt], "outputs": parts.prompt, "js": _SUGGEST}
    # One after the other, so that the second of two arrivals sees what the first has filled in.
    arrival: dict[str, Any] = {"trigger_mode": "always_last", **HIDDEN}
    # What asks waits for both (assets/scripts/compare.js).
    entered = page.tab[ID].select(form.enter, arrived, views, **arrival).then(**suggested, **HIDDEN)
    entered.then(None, None, None, js="() => window.studioFormStands()", **HIDDEN)
    page.tab[ID].select(refreshed["fn"], refreshed["inputs"], refreshed["outputs"], **arrival)
    parts.base.input(form.rebase, parts.base, views, **HIDDEN)
    parts.columns.input(form.chosen, [parts.base, parts.columns], views, **HIDDEN)
    inputs = [parts.base, parts.columns, parts.prompt, parts.picture, *parts.how.inputs]
    parts.prompt.submit(None, None, None, js="() => window.studioAsk()", **HIDDEN)
    side_panel.wire(studio, side, inputs, refreshed)
    grid_panel.wire(studio, grid, inputs, refreshed)
    blind_panel.wire(studio, parts.blind, parts.prompt, inputs)
    kept_panel.wire(studio, kept, opened, [*side.widgets, *grid.widgets, parts.views, parts.grid_tab])
