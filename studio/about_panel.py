"""One data set on the Data page: its fingerprint, history and runs; another name; the bin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from engine.errors import EngineError
from studio import bin_form, data_words
from studio import dataset_shelf as shelf
from studio.i18n import t
from studio.markup import error, esc, notice
from studio.page import HIDDEN, Page


@dataclass
class Parts:
    """The widgets of the view; the bin stands below all views."""

    name: gr.Textbox
    rename: gr.Button
    told: gr.HTML
    facts: gr.HTML
    delete: gr.Button
    asked: gr.Row
    question: gr.HTML
    yes: gr.Button
    no: gr.Button

    @property
    def widgets(self) -> list[Any]:
        return list(vars(self).values())


def build() -> Parts:
    """Lay them out."""
    with gr.Row(elem_classes="ad-row"):
        name = gr.Textbox(label=t("Name"), max_lines=1, max_length=shelf.NAME, elem_id="data-name", scale=3)
        rename = gr.Button(t("Rename"), elem_id="data-rename", scale=1)
    told = gr.HTML(visible=False, elem_id="data-told")
    facts = gr.HTML(elem_id="data-about")
    delete = gr.Button(t("Delete this data set"), elem_id="data-delete")
    with gr.Row(visible=False) as asked:
        question = gr.HTML(elem_id="data-delete-question")
        yes = gr.Button(t("Yes, into the bin"), variant="stop", elem_id="data-delete-yes")
        no = gr.Button(t("Keep it"))
    return Parts(name, rename, told, facts, delete, asked, question, yes, no)


def build_bin() -> bin_form.Bin:
    """The bin of data sets."""
    return bin_form.build(
        "data-bin", esc(t("This removes the files in the bin for good; runs keep what they learned."))
    )


def shown(page: Page, parts: Parts, dataset_id: str, name: bool = True) -> dict[Any, Any]:
    """The facts; the name only where another data set came, so that nobody's typing is written over."""
    row = page.studio.store.dataset(dataset_id)
    store, folder = page.studio.store, page.datasets.folder
    facts = data_words.about(
        row, shelf.history(store, row["file"]), shelf.runs(store, row["file"]), shelf.size(folder, row["file"])
    )
    return {parts.facts: facts, parts.asked: gr.Row(visible=False), **({parts.name: row["name"]} if name else {})}


def bin_shown(page: Page, box: bin_form.Bin) -> dict[Any, Any]:
    """What lies in the bin."""
    rows = shelf.in_bin(page.studio.store)
    return {
        box.part: gr.Accordion(visible=bool(rows), label=t("Bin ({count})", count=len(rows))),
        box.choice: gr.Dropdown([(row["name"], row["file"]) for row in rows], value=rows[0]["file"] if rows else None),
        box.asked: gr.Row(visible=False),
    }


def question(page: Page, dataset_id: str) -> str:
    """What deleting a data set means, in a sentence; runs that learned from it are named."""
    row = page.studio.store.dataset(dataset_id)
    used = [run["name"] for run in shelf.runs(page.studio.store, row["file"])]
    if not used:
        return f'<p class="st-hint">{esc(t("No run learned from it. It goes to the bin with its file."))}</p>'
    names = ", ".join(used[:3]) + (", ..." if len(used) > 3 else "")
    told = t("{count} runs learned from it: {names}. They keep their adapters, and their scores need these rows: "
             "while they are there the bin keeps the file.", count=len(used), names=names)  # fmt: skip
    return f'<p class="st-hint">{esc(told)}</p>'


def emptied(page: Page) -> str:
    """Empty the bin, and say what was kept."""
    gone, kept = shelf.empty(page.studio.store, page.datasets.folder)
    if not kept:
        return notice("good", t("{count} data sets were removed for good.", count=len(gone)))
    names = ", ".join(row["name"] for row in kept[:4])
    return notice(
        "warn",
        t("{gone} were removed, {kept} were kept: runs learned from them.", gone=len(gone), kept=len(kept)),
        names,
        t("Delete these runs for good on the Runs page first."),
    )


def wire(page: Page, parts: Parts, dataset: gr.State) -> dict[str, Any]:
    """Connect the name; returns what looks at the facts, for whoever opens this view."""

    def look(dataset_id: str) -> Any:
        """The facts as they are now."""
        return shown(page, parts, dataset_id, name=False) if dataset_id else gr.skip()

    def ask(dataset_id: str) -> Any:
        """Say what deleting means before it is done."""
        if not dataset_id:
            return gr.skip()
        return {parts.asked: gr.Row(visible=True), parts.question: question(page, dataset_id)}

    parts.delete.click(ask, dataset, [parts.asked, parts.question], **HIDDEN)
    parts.no.click(lambda: gr.Row(visible=False), None, parts.asked, **HIDDEN)
    return {"fn": look, "inputs": dataset, "outputs": parts.widgets, **HIDDEN}


def refused(parts: Parts, fault: EngineError, title: str) -> dict[Any, Any]:
    """Why it was not done."""
    return {parts.told: gr.HTML(error(fault, title), visible=True), parts.asked: gr.Row(visible=False)}
