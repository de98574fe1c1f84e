"""What the tabs share: the studio behind them, and the few values by which one tab speaks to another."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from studio.context import Studio
from studio.datasets import Datasets
from studio.i18n import N_

START, DATA, TRAIN, ADAPTERS = "start", "data", "train", "adapters"
COMPARE, RUNS, SCORES = "compare", "runs", "scores"
TAB_TITLES = {
    START: N_("Start"),
    DATA: N_("Data"),
    TRAIN: N_("Train"),
    ADAPTERS: N_("Adapters"),
    COMPARE: N_("Compare"),
    RUNS: N_("Runs"),
    SCORES: N_("Scores"),
}
TAB_IDS = tuple(TAB_TITLES)

HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""For callbacks of the page itself: quiet, and no part of the public interface."""

TICK: dict[str, Any] = {**HIDDEN, "queue": False}
"""For what a timer asks while a page is looked at. Past Gradio's queue the page has one answer to a question instead of
five words on its progress, for each of which it goes through all that it shows."""

PICK = """element.addEventListener('click', (event) => {
  const named = event.target.closest('[data-run]');
  if (named) trigger('click', {run: named.dataset.run});
});"""
"""For an HTML whose runs can be chosen: a click or the keyboard on a run's name says which; the rest says nothing."""


@dataclass
class Page:
    """One page, while it is built.

    Attributes:
        studio: store, jobs, inference.
        blocks: the Gradio page.
        tabs: the row of tabs; `go(id)` selects one.
        run: id of the run that Train shows, in a hidden box because it also stands in the address.
        recipe: a form to fill into Train (`message(spec=..., dataset=...)`).
        comparison: what Compare should show (`message(base=..., runs=[...])`; ids of runs or adapters, keys of mixes).
        dataset: the data set that was chosen on Data (`message(dataset=...)`).
        tab: id -> its Tab.
        parts: id -> whatever the tab keeps from `build` for `wire`.
    """

    studio: Studio
    blocks: gr.Blocks
    tabs: gr.Tabs
    run: gr.Textbox
    recipe: gr.State
    comparison: gr.State
    dataset: gr.State
    tab: dict[str, gr.Tab] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)

    @property
    def datasets(self) -> Datasets:
        """The data sets of this home."""
        return Datasets(self.studio.store, self.studio.home)


def go(tab_id: str) -> Any:
    """Select a tab."""
    return gr.Tabs(selected=tab_id)


def message(**content: Any) -> dict[str, Any]:
    """A value for `recipe`, `comparison` or `dataset`; never equal to the one before, so it is always noticed."""
    return {**content, "nonce": secrets.token_hex(4)}
