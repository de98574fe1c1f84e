"""The part of an adapter's detail from which it leaves: a button for each form, and the push to the hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from engine.errors import EngineError
from studio import export_words, exporting, hub
from studio.export_words import FORMS, PRECISIONS
from studio.i18n import t
from studio.markup import error, esc
from studio.page import HIDDEN, Page
from studio.store import Row


@dataclass
class Parts:
    """The widgets of the part; `asked` holds what the confirmation speaks of, so that this is what is uploaded."""

    forms: gr.HTML
    export: dict[str, gr.Button]
    precision: gr.Dropdown
    no_push: gr.HTML
    what: gr.Radio
    repository: gr.Textbox
    private: gr.Checkbox
    push: gr.Button
    fault: gr.HTML
    confirm: gr.Column
    told: gr.HTML
    yes: gr.Button
    no: gr.Button
    asked: gr.State

    @property
    def widgets(self) -> list[Any]:
        """All of them in one list."""
        plain = [it for it in vars(self).values() if it is not self.export]
        return [*plain, *self.export.values()]


def build() -> Parts:
    """Lay out the forms and the push, in an accordion."""
    with gr.Accordion(t("Export"), open=False, elem_id="adapter-export"):
        forms = gr.HTML()
        precision = gr.Dropdown(
            [(t(title), name) for name, title in PRECISIONS.items()],
            value=next(iter(PRECISIONS)),
            label=t("Precision of a GGUF model"),
            elem_id="export-precision",
        )
        with gr.Row():
            export = {
                form: gr.Button(t(title), elem_id=f"export-{form}", min_width=260) for form, (title, _) in FORMS.items()
            }
        gr.HTML(f'<h3 class="ex-head">{esc(t("Push to the Hugging Face hub"))}</h3>')
        no_push = gr.HTML(visible=False, elem_id="push-refused")
        what = gr.Radio(
            [(t("The adapter"), "peft"), (t("The merged model"), "merged")],
            value="peft",
            label=t("What to upload"),
            elem_id="push-what",
        )
        with gr.Row(elem_classes="ad-row"):
            repository = gr.Textbox(
                label=t("Repository"),
                placeholder=t("owner/name"),
                info=t("A new one; what is on the hub already is never touched."),
                elem_id="push-repository",
                scale=3,
                min_width=240,
            )
            private = gr.Checkbox(True, label=t("Private"), elem_id="push-private", scale=1, min_width=120)
            push = gr.Button(t("Push to the hub"), elem_id="push-ask", scale=1)
        fault = gr.HTML(visible=False, elem_id="push-fault")
        with gr.Column(visible=False, elem_id="push-confirm") as confirm:
            told = gr.HTML()
            with gr.Row():
                yes = gr.Button(t("Yes, upload"), variant="primary", elem_id="push-yes")
                no = gr.Button(t("Not now"), elem_id="push-no")
    return Parts(
        forms,
        export,
        precision,
        no_push,
        what,
        repository,
        private,
        push,
        fault,
        confirm,
        told,
        yes,
        no,
        gr.State(None),
    )


def shown(parts: Parts, row: Row) -> dict[Any, Any]:
    """What can be had of one adapter; what was typed for another one is gone."""
    why = hub.refusal()
    refused = f'<p class="st-hint">{esc(t("Not here: {why}", why=why))}</p>'
    free = not why
    merges = not export_words.export_refusal(row, "merged")
    choices = [(t("The adapter"), "peft"), *([(t("The merged model"), "merged")] if merges else [])]
    found: dict[Any, Any] = {
        parts.forms: export_words.exports(row),
        parts.precision: gr.Dropdown(interactive=not export_words.export_refusal(row, "gguf")),
        parts.no_push: gr.HTML(refused, visible=not free),
        parts.what: gr.Radio(choices, value="peft", interactive=free),
        parts.repository: gr.Textbox(value="", interactive=free),
        parts.private: gr.Checkbox(value=True, interactive=free),
        parts.push: gr.Button(interactive=free),
        parts.fault: gr.HTML(visible=False),
        parts.confirm: gr.Column(visible=False),
        parts.asked: None,
    }
    for form, button in parts.export.items():
        found[button] = gr.Button(interactive=not export_words.export_refusal(row, form))
    return found


def wire(
    page: Page,
    parts: Parts,
    chosen: gr.State,
    fault: gr.HTML,
    started: Callable[[str], dict[Any, Any]],
    more: list[Any],
) -> None:
    """Connect the buttons.

    Args:
        page: the page.
        parts: the widgets.
        chosen: the adapter's id.
        fault: where an export that cannot begin says why.
        started: what the page shows of a work that has begun.
        more: the widgets that `started` changes.
    """
    studio = page.studio

    def export(form: str) -> Callable[[str, str], dict[Any, Any]]:
        def begin(adapter: str, precision: str) -> dict[Any, Any]:
            """Export the chosen adapter."""
            try:
                work = exporting.export(studio, adapter, form, precision)
                return {**started(work), fault: gr.HTML(visible=False)}
            except EngineError as problem:
                return {fault: gr.HTML(error(problem, t("This cannot be exported now")), visible=True)}

        return begin

    def ask(adapter: str, repository: str, what: str, private: bool) -> dict[Any, Any]:
        """Say what would be uploaded and where, before anything is."""
        try:
            asked = exporting.check_push(studio, adapter, repository, what, private)
            files = exporting.pushed_files(studio, adapter)
        except EngineError as problem:
            told = error(problem, t("This cannot be pushed"))
            return {
                parts.fault: gr.HTML(told, visible=True),
                parts.confirm: gr.Column(visible=False),
                parts.asked: None,
            }
        row, place = studio.library.get(adapter), hub.place(asked["repository"])
        return {
            parts.fault: gr.HTML(visible=False),
            parts.confirm: gr.Column(visible=True),
            parts.told: export_words.asked_to_push(row, place, private, what, files),
            parts.asked: asked,
        }

    def push(asked: dict[str, Any] | None) -> dict[Any, Any]:
        """Upload what was asked about."""
        closed = {parts.confirm: gr.Column(visible=False), parts.asked: None}
        try:
            work = exporting.push(studio, **(asked or {"adapter": "", "repository": ""}))
            return {**closed, **started(work), parts.fault: gr.HTML(visible=False)}
        except EngineError as problem:
            return {**closed, parts.fault: gr.HTML(error(problem, t("This cannot be pushed")), visible=True)}

    for form, button in parts.export.items():
        button.click(export(form), [chosen, parts.precision], [fault, *more], trigger_mode="once", **HIDDEN)
    asked_of = [chosen, parts.repository, parts.what, parts.private]
    answer = [parts.fault, parts.confirm, parts.told, parts.asked]
    parts.push.click(ask, asked_of, answer, **HIDDEN)
    parts.repository.submit(ask, asked_of, answer, **HIDDEN)
    parts.yes.click(push, parts.asked, [*answer, *more], trigger_mode="once", **HIDDEN)
    parts.no.click(lambda: (gr.Column(visible=False), None), None, [parts.confirm, parts.asked], **HIDDEN)
    # What is asked about is what stands in the fields: a change takes the question back.
    gr.on(
        [parts.repository.input, parts.what.input, parts.private.input],
        lambda: (gr.Column(visible=False), None),
        None,
        [parts.confirm, parts.asked],
        **HIDDEN,
    )
