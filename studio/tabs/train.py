"""Train: data set, task, base, preset, the fields that matter, the cost; then the live part of the run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from engine.errors import EngineError
from studio import doctor, forms, live, presets, recipes, train_cost, train_form, train_text
from studio.i18n import t
from studio.markup import error, esc
from studio.page import DATA, HIDDEN, TRAIN, Page, go
from studio.train_form import filled, preset_shown, shown
from studio.train_marks import read_form
from studio.train_parts import CHANGED, Parts

ID = TRAIN


def build(page: Page) -> None:
    """Lay out the form and the live part."""
    page.parts[ID] = train_form.build(page)


def wire(page: Page) -> None:
    """Connect the form."""
    parts: Parts = page.parts[ID]
    live.wire(page, parts.live, parts.form)
    train_cost.wire(page, parts)
    train_text.wire(page, parts)
    form = [*parts.head, *parts.values]
    methods = recipes.methods()
    usual = [o for o in recipes.fields() if not o.method and any(o.field.name in m.training for m in methods)]

    def known() -> list[tuple[str, str]]:
        return recipes.datasets(page.studio.store.datasets())

    def takes(task: presets.Task, dataset_id: str | None) -> bool:
        """Whether a task can learn from the data set; any can where none is chosen."""
        return dataset_id is None or page.studio.store.dataset(dataset_id)["format"] in task.formats

    def fit(dataset_id: str | None, task: str | None) -> dict[Any, Any]:
        """The first task that can learn from the data set, where the one that is chosen cannot."""
        if dataset_id not in {key for _, key in known()} or takes(recipes.task_of(task), dataset_id):
            return {}
        able = recipes.tasks_for(page.studio.store.dataset(str(dataset_id))["format"])[0]
        return {parts.task: able.name, **begin(able)}

    def begin(task: presets.Task) -> dict[Any, Any]:
        """A task's bases and presets, and its first preset in the form."""
        first = next(iter(task.presets.values()))
        return {
            parts.base: gr.Dropdown(recipes.bases(task), value=task.base),
            parts.meaning: esc(t(first.meaning)),
            **preset_shown(parts, task, first.name),
            **filled(parts, recipes.of_preset(task, first)),
        }

    def enter(dataset_id: str | None, task: str | None, recipe: Mapping[str, Any] | None = None) -> dict[Any, Any]:
        """The data sets there are now; the newest is chosen when none is. A choice that stands is not touched:
        the form may be being filled at this moment, from `recipe`, which says the task too."""
        choices = known()
        if dataset_id in {key for _, key in choices}:
            return {parts.dataset: gr.Dropdown(choices)}
        coming = (recipe or {}).get("dataset")
        if coming in {key for _, key in choices}:
            return {parts.dataset: gr.Dropdown(choices, value=coming)}
        newest = [key for _, key in choices]
        if task != train_form.TASK:
            # Somebody chose this task: rows for another one would take it away again.
            newest = [key for key in newest if takes(recipes.task_of(task), key)]
        chosen = next(iter(newest), None)
        return {parts.dataset: gr.Dropdown(choices, value=chosen), **fit(chosen, task)}

    def use(said: Mapping[str, Any] | None, task: str | None) -> dict[Any, Any]:
        """The data set that was chosen on Data."""
        dataset_id = (said or {}).get("dataset")
        if not dataset_id:
            return {}
        return {
            parts.dataset: gr.Dropdown(known(), value=dataset_id),
            **fit(dataset_id, task),
        }

    def choose(task: str | None, name: str | None) -> dict[Any, Any]:
        """Fill the form from a preset."""
        form = recipes.task_of(task)
        preset = form.presets.get(name or "")
        if preset is None:
            return {parts.meaning: ""}
        filling = filled(parts, recipes.of_preset(form, preset))
        return {parts.meaning: esc(t(preset.meaning)), parts.preset: preset.name, **filling}

    def turn(name: str | None, dataset_id: str | None) -> dict[Any, Any]:
        """Another task, and the newest data set that it can learn from where the chosen one is for another.

        Task and data set are written whatever they are: an answer that left the server before this choice may have
        reached the page after it.
        """
        task = recipes.task_of(name)
        fitting = [key for _, key in known() if takes(task, key)]
        chosen = dataset_id if dataset_id in fitting else next(iter(fitting), None)
        return {parts.task: task.name, parts.dataset: chosen, **begin(task)}

    def switch(
        name: str, task: str, before: Mapping[str, Any] | None, quantization: str | None, *now: Any
    ) -> dict[Any, Any]:
        """Another method: its fields, and the training settings that it usually needs. With a method that needs none,
        what stood there before comes back."""
        method, before = recipes.method_of(name), dict(before or {})
        found = shown(parts, recipes.task_of(task), method)
        for owned, value in zip(usual, now, strict=True):
            field = owned.field
            if field.name in method.training:
                before.setdefault(field.name, value)
                found[parts.widgets[owned.key]] = forms.show(field, method.training[field.name])
            elif field.name in before:
                found[parts.widgets[owned.key]] = before.pop(field.name)
        if method is recipes.FULL and quantization != "none":
            # Codes of a few bits cannot take small steps. What stands there already is not written again: somebody may
            # have chosen something else before this answer comes.
            found[parts.quantization] = "none"
        return {**found, parts.before: before}

    def origin(recipe: Mapping[str, Any]) -> dict[str, Any] | None:
        """The run whose settings are in the recipe, as they are or changed by a remedy; None for any other recipe."""
        try:
            row = page.studio.store.run(str(recipe.get("run", "")))
        except EngineError:
            return None if recipe.get("meaning") else {"title": recipe["spec"].get("name", ""), "spec": recipe["spec"]}
        return {"title": row["name"], "spec": row["spec"]}

    def fill(recipe: Mapping[str, Any] | None) -> dict[Any, Any]:
        """Fill the form from a whole job."""
        if not recipe:
            return {}
        spec, choices = recipe["spec"], known()
        dataset_id = recipe.get("dataset") if recipe.get("dataset") in {key for _, key in choices} else None
        asked = recipes.of_spec(spec)
        task = recipes.task_of(asked["task"])
        return {
            parts.task: task.name,
            parts.base: gr.Dropdown(recipes.bases(task), value=spec["model"]),
            **preset_shown(parts, task, None),
            parts.meaning: doctor.recipe_note(recipe),
            parts.origin: origin(recipe),
            parts.name: spec.get("name", ""),
            parts.dataset: gr.Dropdown(choices, value=dataset_id),
            parts.fault: gr.HTML(visible=False),
            **filled(parts, asked),
        }

    def start(processes: float | None, *inputs: Any) -> dict[Any, Any]:
        """Queue the run and show it."""
        try:
            spec = read_form(page, *inputs)
            run_id = page.studio.jobs.submit(spec, inputs[0], int(processes or 1))
        except EngineError as fault:
            return {parts.fault: gr.HTML(error(fault, t("This run cannot start yet")), visible=True)}
        return {page.run: run_id, parts.fault: gr.HTML(visible=False)}

    everything = [
        *form,
        *parts.presets.values(),
        *(row for *_, row in parts.rows),
        parts.before,
        parts.about,
        parts.meaning,
        parts.origin,
        parts.fault,
    ]
    chosen = [parts.dataset, parts.task]
    own_settings = [parts.widgets[owned.key] for owned in usual]

    def fills(event: Any, fn: Callable[..., dict[Any, Any]], *inputs: Any) -> None:
        """One after another, in the order in which they were asked for: the later one's word stands."""
        event(fn, [*inputs], everything, concurrency_id="train-form", concurrency_limit=1, **HIDDEN).then(**CHANGED)

    fills(page.tab[ID].select, enter, *chosen, page.recipe)
    fills(page.dataset.change, use, page.dataset, parts.task)
    fills(page.recipe.change, fill, page.recipe)
    for task, radio in parts.presets.items():
        fills(radio.input, functools.partial(choose, task), radio)
    fills(parts.task.input, turn, *chosen[::-1])
    fills(parts.dataset.input, fit, *chosen)
    fills(parts.method.input, switch, parts.method, parts.task, parts.before, parts.quantization, *own_settings)
    parts.start.click(start, [parts.processes, *form], [page.run, parts.fault], trigger_mode="once", **HIDDEN)
    parts.to_data.click(lambda: go(DATA), None, page.tabs, **HIDDEN)
