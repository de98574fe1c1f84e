"""What the Train form is made of: its widgets by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from studio import live, recipes
from studio.i18n import N_
from studio.page import HIDDEN

HEAD_INFO = {
    "task": N_("What it learns to do."),
    "base": N_("Choose one, or type a hub id (owner/name) or a local folder."),
    "method": N_("How the base learns."),
    "quantization": N_("Fewer bits: a larger base fits, and answers a little worse."),
    "eval_split": N_("Share of the rows that is only for checking, 0 to 0.5."),
}
"""What stands beside the settings of the head, by the names that `recipes.faulty` gives them."""

CHANGED: dict[str, Any] = {"fn": None, "js": "() => window.studioFormChanged()", **HIDDEN}
"""What follows when a callback has filled the form: fields out of sight may have changed too."""


@dataclass
class Parts:
    """The widgets of the form, and the live part.

    Attributes:
        widgets: key of a field (see `recipes.Owned`) -> its widget.
        presets: task -> the choice among its presets, one of which is in view. Each has choices of its own that never
            change: a widget refuses a value that was sent before its choices changed.
        preset: the name of the one that is chosen.
        rows: whose fields a row holds (a method's name, a task's name) and the row.
        own: the presets of the person's own.
        before: what training settings were before the method changed them.
        cost: the cost card. remedy: applies `changes`, with which the job fits.
        costs: the part with the table of methods; `opened` says whether it is in view.
        processes: how many share each step; in view where there is more than one GPU.
        origin: the run that the form was filled from, `{"title", "spec"}`, or None.
        changed, priced: what the page presses when the form has changed (assets/scripts/train.js): for what is known
            at once, and for what it costs. Two, because Gradio begins an event's next callback when the last has ended.
        marked, refused: places whose fields say at the moment what is wrong with them: at once, and by the engine.
    """

    form: gr.Column
    dataset: gr.Dropdown
    task: gr.Dropdown
    base: gr.Dropdown
    presets: dict[str, gr.Radio]
    preset: gr.State
    method: gr.Dropdown
    about: gr.HTML
    meaning: gr.HTML
    eval_split: gr.Number
    name: gr.Textbox
    quantization: gr.Dropdown
    widgets: dict[tuple[str, str, str], Component]
    rows: list[tuple[str, str, gr.Row]]
    before: gr.State
    own: gr.Dropdown
    cost: gr.HTML
    remedy: gr.Button
    changes: gr.State
    costs: gr.Accordion
    methods: gr.HTML
    opened: gr.State
    advanced: gr.Accordion
    processes: gr.Number
    text: JobText
    keep: Keep
    origin: gr.State
    diff: gr.HTML
    changed: gr.Button
    priced: gr.Button
    marked: gr.State
    refused: gr.State
    fault: gr.HTML
    start: gr.Button
    to_data: gr.Button
    live: live.Live

    @property
    def markable(self) -> list[Component]:
        """What `marked` may write to, beside `Parts.marked` and `Parts.advanced`."""
        return [*(getattr(self, name) for name in HEAD_INFO), *self.values]

    @property
    def head(self) -> list[Component]:
        """What `read_form` takes first."""
        return [
            self.dataset,
            self.task,
            self.base,
            self.preset,
            self.eval_split,
            self.name,
            self.quantization,
            self.method,
        ]

    @property
    def values(self) -> list[Component]:
        """The fields' widgets in order."""
        return [self.widgets[owned.key] for owned in recipes.fields()]


@dataclass
class JobText:
    """The job as text: out of the form and into it.

    Attributes:
        part: the accordion. same: the YAML. command: the command line. save: downloads the YAML.
        upload: a job's file. paste: or its text. take: fills the form from the text. fault: why it cannot.
    """

    part: gr.Accordion
    same: gr.Code
    command: gr.Code
    save: gr.Button
    upload: gr.UploadButton
    paste: gr.Textbox
    take: gr.Button
    fault: gr.HTML


@dataclass
class Keep:
    """Keeping the form as a preset: name, the list's buttons, what was said of it, and the id that `undo` restores."""

    name: gr.Textbox
    save: gr.Button
    use: gr.Button
    delete: gr.Button
    undo: gr.Button
    said: gr.HTML
    deleted: gr.State
