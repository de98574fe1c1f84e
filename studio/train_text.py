"""The Train form's job as text, the presets of the person's own, and what differs from the run it was filled from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from engine.errors import ConfigError, EngineError
from studio import adapting, costs, forms, job_text, recipes
from studio.datasets import train_rows
from studio.i18n import t
from studio.markup import error, notice
from studio.own_presets import OwnPresets
from studio.page import HIDDEN, TRAIN, Page, message
from studio.train_form import own_choices
from studio.train_marks import marked, read_form
from studio.train_parts import Parts

Updates = dict[Any, Any]


def wire(page: Page, parts: Parts) -> None:
    """Connect what is said of the form at once, its text, and its own presets."""
    form = [*parts.head, *parts.values]
    _wire_file(page, parts)
    _wire_own(page, parts, form)
    _wire_words(page, parts, form)


def _wire_words(page: Page, parts: Parts, form: list[Any]) -> None:
    """The one button that is next, the YAML, the command, the differences and the faults, at every change."""

    def offered(dataset_id: str | None, eval_split: float | None, able: bool) -> Updates:
        """The one button that is next. It is written here alone: two answers at once would undo each other's part."""
        ready = dataset_id in {key for _, key in recipes.datasets(page.studio.store.datasets())}
        count = train_rows(page.studio.store.dataset(dataset_id), eval_split or 0.0) if ready and dataset_id else 0
        text = t("Train on these {count} rows", count=f"{count:,}")
        return {
            parts.start: gr.Button(text, visible=ready, interactive=able),
            parts.to_data: gr.Button(visible=not ready),
        }

    def describe(before: list[str], origin: Mapping[str, Any] | None, processes: float | None, *inputs: Any) -> Updates:
        task, method = inputs[1], inputs[7]
        try:
            spec = read_form(page, *inputs, rows_needed=False)
        except EngineError as fault:
            lines = "\n".join(f"# {line}" for line in str(fault).splitlines())
            return {
                parts.text.same: lines,
                parts.fault: gr.HTML(error(fault, t("These settings cannot work")), visible=True),
                **offered(inputs[0], inputs[4], able=False),
                **marked(parts, recipes.faulty(fault, task, method), before, task, method),
            }
        plain = spec.to_dict()
        found: Updates = {
            parts.text.same: forms.as_yaml(plain),
            parts.text.command: job_text.command(int(processes or 1)),
            parts.fault: gr.HTML(visible=False),
            **offered(inputs[0], inputs[4], able=True),
            parts.diff: gr.HTML(visible=False),
            **marked(parts, {}, before, task, method),
        }
        if origin:
            rows = job_text.differences(origin["spec"], plain)
            found[parts.diff] = gr.HTML(costs.differences(rows, origin["title"]), visible=True)
        return found

    parts.changed.click(
        describe,
        [parts.marked, parts.origin, parts.processes, *form],
        [
            parts.text.same,
            parts.text.command,
            parts.diff,
            parts.fault,
            parts.start,
            parts.to_data,
            parts.marked,
            parts.advanced,
            *parts.markable,
        ],
        trigger_mode="always_last",
        **HIDDEN,
    )


def _wire_file(page: Page, parts: Parts) -> None:
    """A job's file into the form, and the form into a file."""
    text = parts.text

    def take(given: str, dataset: str | None) -> Updates:
        """Fill the form from a job's text."""
        try:
            if not (given or "").strip():
                raise ConfigError(t("There is no text."), t("Paste a job's YAML, or open its file."))
            spec = job_text.read(given, lambda base: adapting.known_base(page.studio, base))
        except EngineError as fault:
            return {text.fault: gr.HTML(error(fault, t("This job was not taken over")), visible=True)}
        meaning = t("Settings of a job's file; choose the rows, and change what you like.")
        told = notice("good", t("The form is filled from the job."), t("Its rows are yours to choose, at the top."))
        return {
            page.recipe: message(spec=spec, dataset=fitting(spec, dataset), meaning=meaning),
            text.fault: gr.HTML(told, visible=True),
            text.paste: "",
        }

    def fitting(spec: Mapping[str, Any], dataset: str | None) -> str | None:
        """The data set that is chosen, where the job's task can learn from it."""
        formats = recipes.task_of(spec["task"]).formats
        return dataset if dataset and page.studio.store.dataset(dataset)["format"] in formats else None

    def upload(path: str | None, dataset: str | None) -> Updates:
        """Fill the form from a job's file."""
        try:
            raw = Path(path or "").read_bytes()[: 4 * job_text.LONGEST]
            return take(raw.decode("utf-8"), dataset)
        except (OSError, UnicodeDecodeError):
            fault = ConfigError(t("The file is no text."), t("Choose a job.yaml."))
            return {text.fault: gr.HTML(error(fault, t("This job was not taken over")), visible=True)}

    outputs = [page.recipe, text.fault, text.paste]
    text.take.click(take, [text.paste, parts.dataset], outputs, trigger_mode="once", **HIDDEN)
    text.upload.upload(upload, [text.upload, parts.dataset], outputs, **HIDDEN)
    text.save.click(None, text.same, None, js="(text) => window.studioSave('job.yaml', text)", **HIDDEN)


def _wire_own(page: Page, parts: Parts, form: list[Any]) -> None:
    """The presets of the person's own: keep, use, delete, undo."""
    keep, own = parts.keep, OwnPresets(page.studio.store)

    def listing(chosen: int | None = None) -> Updates:
        """The list as it is now."""
        choices = own_choices(page)
        some = bool(choices)
        return {
            parts.own: gr.Dropdown(choices, value=chosen, visible=some),
            keep.use: gr.Button(visible=some),
            keep.delete: gr.Button(visible=some),
        }

    def said(fault: EngineError | None, good: str = "") -> Updates:
        box = error(fault, t("That did not work")) if fault else notice("good", good)
        return {keep.said: gr.HTML(box, visible=True)}

    def save(name: str, *inputs: Any) -> Updates:
        """Keep the form under a name."""
        try:
            made = own.save(name, read_form(page, *inputs, rows_needed=False).to_dict())
        except EngineError as fault:
            return said(fault)
        kept = t("Kept as {name}.", name=name.strip())
        return {**listing(made), **said(None, kept), keep.name: "", keep.undo: gr.Button(visible=False)}

    def use(preset: int | None, dataset: str | None) -> Updates:
        """Fill the form from one of them; the rows stay."""
        try:
            spec = own.spec(preset)
        except EngineError as fault:
            return {**listing(), **said(fault)}
        formats = recipes.task_of(spec["task"]).formats
        there = dataset if dataset and page.studio.store.dataset(dataset)["format"] in formats else None
        meaning = t("Your preset {name}.", name=spec["name"])
        return {page.recipe: message(spec={**spec, "name": ""}, dataset=there, meaning=meaning)}

    def delete(preset: int | None) -> Updates:
        """Take one out of the list."""
        try:
            name = own.delete(preset)
        except EngineError as fault:
            return {**listing(), **said(fault)}
        gone = said(None, t("{name} is deleted.", name=name))
        return {**listing(), **gone, keep.deleted: preset, keep.undo: gr.Button(visible=True)}

    def undo(preset: int | None) -> Updates:
        """Bring back the one that was deleted last."""
        own.restore(preset)
        return {**listing(preset), **said(None, t("It is back.")), keep.undo: gr.Button(visible=False)}

    outputs = [parts.own, keep.use, keep.delete, keep.undo, keep.said, keep.name, keep.deleted, page.recipe]
    keep.save.click(save, [keep.name, *form], outputs, trigger_mode="once", **HIDDEN)
    keep.name.submit(save, [keep.name, *form], outputs, trigger_mode="once", **HIDDEN)
    keep.use.click(use, [parts.own, parts.dataset], outputs, **HIDDEN)
    keep.delete.click(delete, parts.own, outputs, trigger_mode="once", **HIDDEN)
    keep.undo.click(undo, keep.deleted, outputs, trigger_mode="once", **HIDDEN)
    # Another window may have kept one meanwhile; what is chosen stays.
    page.tab[TRAIN].select(listing, parts.own, [parts.own, keep.use, keep.delete], **HIDDEN)
