"""Reading a job off the Train form, and saying beside a field what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
from gradio.components import Component

from engine.errors import ConfigError
from engine.train.job import JobSpec
from studio import presets, recipes
from studio.i18n import t
from studio.page import Page
from studio.train_parts import HEAD_INFO, Parts


def read_form(
    page: Page,
    dataset_id: str | None,
    task: str | None,
    base: str | None,
    preset: str | None,
    eval_split: float | None,
    name: str | None,
    quantization: str | None,
    method: str | None,
    *values: Any,
    rows_needed: bool = True,
) -> JobSpec:
    """The job that the form describes; `values` are the fields' widgets in order.

    Without `rows_needed` a form without a data set is a job over no rows, to be counted and not to be started.

    Raises:
        EngineError: with every fault of the form.
    """
    if dataset_id:
        dataset = page.studio.store.dataset(dataset_id)
    elif rows_needed:
        raise ConfigError(t("No data set is chosen."), t("Add one on the Data page."))
    else:
        dataset = {"name": "", "path": recipes.NO_DATA.path, "format": None, "columns": {}}
    return recipes.job(
        dataset,
        task=task,
        base=base,
        preset=preset,
        eval_split=eval_split,
        name=name,
        quantization=quantization,
        method=method,
        values=values,
    )


def marked(
    parts: Parts, faults: Mapping[str, str], before: Sequence[str], task: str | None, method: str | None
) -> dict[Any, Any]:
    """What is wrong beside each field that is to blame, and the usual words back where it was mended.

    Args:
        parts: the form.
        faults: as `recipes.faulty` gives them.
        before: the places that were marked till now, as this function left them in `Parts.marked`.
        task, method: which of the fields of one name is meant.
    """
    places = _places(task, method)
    now = {places[name]: reason for name, reason in faults.items() if name in places}
    found: dict[Any, Any] = {parts.marked: list(now)}
    for place in before:
        if place not in now:
            widget, usual = _at(parts, place)
            found[widget] = gr.update(info=t(usual), elem_classes=[])
    for place, reason in now.items():
        found[_at(parts, place)[0]] = gr.update(info=reason, elem_classes=["refused"])
    if any(_hidden(place) for place in now):
        found[parts.advanced] = gr.Accordion(open=True)
    return found


def _places(task: str | None, method: str | None) -> dict[str, str]:
    """Name of a setting that is in view -> its place: whose it is and its name."""
    shown = [o for o in recipes.fields() if task in presets.tasks() and o.shows(recipes.task_of(task), method or "")]
    return {o.field.name: "/".join(o.key) for o in shown} | {name: name for name in HEAD_INFO}


def _at(parts: Parts, place: str) -> tuple[Component, str]:
    """The widget at a place, and what usually stands beside it."""
    if place in HEAD_INFO:
        return getattr(parts, place), HEAD_INFO[place]
    owner, task, name = place.split("/")
    owned = next(o for o in recipes.fields() if o.key == (owner, task, name))
    return parts.widgets[owned.key], owned.field.help


def _hidden(place: str) -> bool:
    """Whether a place lies under Advanced."""
    if place in HEAD_INFO:
        return place in ("quantization", "eval_split")
    return next(o.field.group for o in recipes.fields() if "/".join(o.key) == place) != "main"
