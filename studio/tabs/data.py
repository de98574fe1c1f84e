"""Data: bring in a file, see what it was recognised as, say which column is which, see what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from engine import data
from engine.errors import EngineError
from studio import words
from studio.datasets import Checked
from studio.markup import error
from studio.page import DATA, HIDDEN, TRAIN, Page, go

ID = DATA
TITLE = "Data"
ROLES = max(len(info.roles) for info in data.FORMATS.values())
NONE = ""
TITLES = {
    "messages": "Conversations (messages)",
    "sharegpt": "Conversations (sharegpt)",
    "oasst": "Reply trees (oasst)",
    "alpaca": "Instructions (alpaca)",
    "prompt_completion": "Questions and answers",
    "parallel": "Texts and what they become",
    "labels": "Texts and classes",
    "preferences": "Better and worse answers",
    "text": "Plain text",
    "images": "Pictures and their captions",
    "pictures": "Pictures without words",
}


@dataclass
class Parts:
    """The widgets of this tab."""

    file: gr.File
    earlier: gr.Dropdown
    verdict: gr.HTML
    mapping: gr.Group
    format: gr.Dropdown
    roles: list[gr.Dropdown]
    use: gr.Button
    preview: gr.HTML
    problems: gr.HTML
    lengths: gr.HTML
    shown: gr.State


def build(page: Page) -> None:
    """Lay out the drop zone and what follows from a file."""
    gr.HTML(
        '<h2 class="page-title">What should it learn from?</h2>'
        '<p class="st-lead">One row is one example: a question and its answer, a conversation, a text, or a picture'
        " with its caption. A csv, tsv, json, jsonl, parquet or txt file, or a zip of pictures, of up to 100 MB.</p>"
    )
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            file = gr.File(
                label="Data file",
                file_types=[*data.KINDS],
                height=160,
                elem_id="data-file",
            )
        with gr.Column(scale=2, min_width=260):
            earlier = gr.Dropdown([], value=None, label="Or an earlier data set", elem_id="data-earlier")
    gr.HTML('<div id="data-limit" class="notice error" role="alert" data-code="data-too-large" hidden></div>')
    verdict = gr.HTML(visible=False, elem_id="data-verdict")
    with gr.Group(visible=False) as mapping, gr.Row():
        format = gr.Dropdown(
            [(TITLES.get(name, name), name) for name in data.FORMATS], label="Read it as", elem_id="data-format"
        )
        roles = [gr.Dropdown([], visible=False, elem_id=f"data-role-{index}") for index in range(ROLES)]
    use = gr.Button("Use this data set", variant="primary", visible=False, elem_id="data-use")
    preview = gr.HTML(visible=False)
    problems = gr.HTML(visible=False, elem_id="data-problems")
    lengths = gr.HTML(visible=False)
    page.parts[ID] = Parts(
        file, earlier, verdict, mapping, format, roles, use, preview, problems, lengths, gr.State("")
    )


def show(parts: Parts, found: Checked) -> dict[Any, Any]:
    """Everything that follows from a checked data set."""
    info = data.FORMATS[found.format] if found.format else None
    updates: dict[Any, Any] = {
        parts.shown: found.id,
        parts.verdict: gr.HTML(words.recognised(found), visible=True),
        parts.mapping: gr.Group(visible=True),
        parts.format: found.format,
    }
    for index, box in enumerate(parts.roles):
        role = info.roles[index] if info and index < len(info.roles) else None
        needed = info is not None and role in info.required
        updates[box] = gr.Dropdown(
            [*found.available] if needed else [("(none)", NONE), *((name, name) for name in found.available)],
            value=found.columns.get(role, None if needed else NONE) if role else None,
            label=f"Column of the {role}" if role else "",
            visible=role is not None,
        )
    ready = found.prepared is not None
    kept = found.prepared.kept if found.prepared else 0
    updates[parts.use] = gr.Button(f"Use these {kept:,} rows", visible=ready)
    pieces = (parts.preview, words.preview), (parts.problems, words.problems), (parts.lengths, words.lengths)
    for widget, render in pieces:
        updates[widget] = gr.HTML(render(found.prepared) if found.prepared else "", visible=ready)
    return updates


def failed(parts: Parts, fault: EngineError) -> dict[Any, Any]:
    """A file that cannot be used: say why, and show nothing of an earlier one."""
    hidden = {widget: gr.HTML(visible=False) for widget in (parts.preview, parts.problems, parts.lengths)}
    return {
        parts.shown: "",
        parts.verdict: gr.HTML(error(fault, "This file cannot be used"), visible=True),
        parts.mapping: gr.Group(visible=False),
        parts.use: gr.Button(visible=False),
        **hidden,
    }


def choices(page: Page) -> list[tuple[str, str]]:
    """Earlier data sets, newest first."""
    return [(f"{row['name']} ({row['rows']:,} rows)", row["id"]) for row in page.studio.store.datasets()]


def wire(page: Page) -> None:
    """Connect the drop zone, the mapping and the one button."""
    parts: Parts = page.parts[ID]
    shown = [value for name, value in vars(parts).items() if name not in ("roles", "file", "earlier")] + parts.roles

    def upload(path: str | None) -> dict[Any, Any]:
        """Take in an uploaded file."""
        if not path:
            return {}
        try:
            return {
                **show(parts, page.datasets.bring_in(Path(path))),
                parts.earlier: gr.Dropdown(choices(page), value=None),
            }
        except EngineError as fault:
            return failed(parts, fault)

    def reopen(dataset_id: str | None) -> dict[Any, Any]:
        """Show an earlier data set."""
        if not dataset_id:
            return {}
        try:
            return {**show(parts, page.datasets.open(dataset_id)), parts.file: None}
        except EngineError as fault:
            return failed(parts, fault)

    def remap(dataset_id: str, format: str | None, *columns: str | None) -> dict[Any, Any]:
        """Read the data set as the person says."""
        if not dataset_id or not format:
            return {}
        roles = data.FORMATS[format].roles if format in data.FORMATS else ()
        asked = {role: column for role, column in zip(roles, columns, strict=False) if column}
        try:
            return show(parts, page.datasets.check(dataset_id, format, asked))
        except EngineError as fault:
            return failed(parts, fault)

    def reformat(dataset_id: str, format: str | None) -> dict[Any, Any]:
        """Another format: its roles start from the columns' names."""
        return remap(dataset_id, format)

    parts.file.upload(upload, parts.file, [*shown, parts.earlier], show_progress="minimal", api_visibility="private")
    parts.earlier.input(reopen, parts.earlier, [*shown, parts.file], **HIDDEN)
    parts.format.input(reformat, [parts.shown, parts.format], shown, **HIDDEN)
    for box in parts.roles:
        box.input(remap, [parts.shown, parts.format, *parts.roles], shown, **HIDDEN)
    parts.use.click(
        lambda dataset_id: (dataset_id, "", go(TRAIN)), parts.shown, [page.dataset, page.run, page.tabs], **HIDDEN
    )
    refresh = {"fn": lambda: gr.Dropdown(choices(page)), "inputs": None, "outputs": parts.earlier, **HIDDEN}
    page.tab[ID].select(**refresh)
    page.blocks.load(**refresh)
