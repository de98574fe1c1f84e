"""Train: data set, task, base, preset, the fields that matter, the cost; then the live part of the run."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import gradio as gr

from engine.errors import ConfigError, EngineError
from engine.train.job import JobSpec
from studio import doctor, forms, live, presets, recipes, train_form
from studio.datasets import train_rows
from studio.markup import error, esc, size
from studio.page import DATA, HIDDEN, TRAIN, Page, go
from studio.train_form import METHOD, Parts, filled, preset_shown, shown

ID = TRAIN
TITLE = "Train"


def build(page: Page) -> None:
    """Lay out the form and the live part."""
    page.parts[ID] = train_form.build(page)


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
) -> JobSpec:
    """The job that the form describes; `values` are the fields' widgets in order.

    Raises:
        EngineError: with every fault of the form.
    """
    if not dataset_id:
        raise ConfigError("No data set is chosen.", "Add one on the Data page.")
    return recipes.job(
        page.studio.store.dataset(dataset_id),
        task=task,
        base=base,
        preset=preset,
        eval_split=eval_split,
        name=name,
        quantization=quantization,
        method=method,
        values=values,
    )


def counted(
    page: Page, task: str, base: str, adapter: Mapping[str, Any], options: Mapping[str, Any] | None = None
) -> str:
    """How many parameters learn, in a sentence; `options` are the task's."""
    full = adapter["method"] == recipes.FULL.name
    found = page.studio.inference.count(base, {"method": METHOD} if full else adapter, task, None if full else options)
    if full:
        return (
            f'<div class="st-count">All <b>{found["base"]:,}</b> parameters of the base learn; the result will be a '
            f"model of about {size(4 * found['base'])}.</div>"
        )
    return (
        f'<div class="st-count"><b>{found["trainable"]:,}</b> of {found["parameters"]:,} parameters learn '
        f"({found['share'] * 100:.2g} %); the adapter will be a file of {size(found['adapter_bytes'])}.</div>"
    )


def wire(page: Page) -> None:
    """Connect the form."""
    parts: Parts = page.parts[ID]
    live.wire(page, parts.live, parts.form)
    form = [*parts.head, *parts.values]
    counts: dict[str, str] = {}
    methods = recipes.methods()
    usual = [o for o in recipes.fields() if not o.method and any(o.field.name in m.training for m in methods)]

    def known() -> list[tuple[str, str]]:
        return recipes.datasets(page.studio.store.datasets())

    def offer(dataset_id: str | None, eval_split: float | None) -> dict[Any, Any]:
        """The one button that is next."""
        ready = dataset_id in {key for _, key in known()}
        count = train_rows(page.studio.store.dataset(dataset_id), eval_split or 0.0) if ready and dataset_id else 0
        return {
            parts.start: gr.Button(f"Train on these {count:,} rows", visible=ready),
            parts.to_data: gr.Button(visible=not ready),
        }

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
            parts.meaning: esc(first.meaning),
            **preset_shown(parts, task, first.name),
            **filled(parts, recipes.of_preset(task, first)),
        }

    def enter(
        dataset_id: str | None, task: str | None, eval_split: float | None, recipe: Mapping[str, Any] | None = None
    ) -> dict[Any, Any]:
        """The data sets there are now; the newest is chosen when none is. A choice that stands is not touched:
        the form may be being filled at this moment, from `recipe`, which says the task too."""
        choices = known()
        if dataset_id in {key for _, key in choices}:
            return {parts.dataset: gr.Dropdown(choices)}
        coming = (recipe or {}).get("dataset")
        if coming in {key for _, key in choices}:
            return {parts.dataset: gr.Dropdown(choices, value=coming)}
        chosen = choices[0][1] if choices else None
        return {
            parts.dataset: gr.Dropdown(choices, value=chosen),
            **offer(chosen, eval_split),
            **fit(chosen, task),
        }

    def use(dataset_id: str, task: str | None, eval_split: float | None) -> dict[Any, Any]:
        """The data set that was chosen on Data."""
        if not dataset_id:
            return {}
        return {
            parts.dataset: gr.Dropdown(known(), value=dataset_id),
            **offer(dataset_id, eval_split),
            **fit(dataset_id, task),
        }

    def choose(task: str | None, name: str | None) -> dict[Any, Any]:
        """Fill the form from a preset."""
        form = recipes.task_of(task)
        preset = form.presets.get(name or "")
        if preset is None:
            return {parts.meaning: ""}
        filling = filled(parts, recipes.of_preset(form, preset))
        return {parts.meaning: esc(preset.meaning), parts.preset: preset.name, **filling}

    def turn(name: str | None, dataset_id: str | None, eval_split: float | None) -> dict[Any, Any]:
        """Another task, and the newest data set that it can learn from where the chosen one is for another.

        Task and data set are written whatever they are: an answer that left the server before this choice may have
        reached the page after it.
        """
        task = recipes.task_of(name)
        fitting = [key for _, key in known() if takes(task, key)]
        chosen = dataset_id if dataset_id in fitting else next(iter(fitting), None)
        return {parts.task: task.name, parts.dataset: chosen, **offer(chosen, eval_split), **begin(task)}

    def switch(name: str, task: str, before: Mapping[str, Any] | None, *now: Any) -> dict[Any, Any]:
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
        if method is recipes.FULL:
            # Codes of a few bits cannot take small steps.
            found[parts.quantization] = "none"
        return {**found, parts.before: before}

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
            parts.name: spec.get("name", ""),
            parts.dataset: gr.Dropdown(choices, value=dataset_id),
            parts.fault: gr.HTML(visible=False),
            **filled(parts, asked),
            **offer(dataset_id, asked["eval_split"]),
        }

    def describe(*inputs: Any) -> str:
        try:
            return forms.as_yaml(read_form(page, *inputs))
        except EngineError as fault:
            return "\n".join(f"# {line}" for line in str(fault).splitlines())

    def count(task: str, base: str, name: str, *inputs: Any) -> Iterator[str]:
        try:
            method = recipes.method_of(name)
            pairs = list(zip(counted_fields, inputs, strict=True))
            own = [value for owned, value in pairs if owned.method == method.name]
            options = {owned.field.name: forms.read(owned.field, value) for owned, value in pairs if owned.task == task}
            adapter = {"method": method.name, **forms.read_all(method.fields, own)}
            adapter = {key: value for key, value in adapter.items() if value is not None}
            key = json.dumps([task, base, adapter, options])
            if key not in counts:
                yield '<div class="st-count">Counting what learns ...</div>'
                counts[key] = counted(page, task, (base or "").strip(), adapter, options)
            yield counts[key]
        except EngineError as fault:
            yield error(fault, "These settings do not fit this base")

    def start(*inputs: Any) -> dict[Any, Any]:
        """Queue the run and show it."""
        try:
            spec = read_form(page, *inputs)
            run_id = page.studio.jobs.submit(spec, inputs[0])
        except EngineError as fault:
            return {parts.fault: gr.HTML(error(fault, "This run cannot start yet"), visible=True)}
        return {page.run: run_id, parts.fault: gr.HTML(visible=False)}

    everything = [
        *form,
        *parts.presets.values(),
        *(row for *_, row in parts.rows),
        parts.before,
        parts.about,
        parts.meaning,
        parts.fault,
        parts.start,
        parts.to_data,
    ]
    counted_fields = [owned for owned in recipes.fields() if owned.method or owned.field.name in recipes.COUNTED]
    counted_widgets = [parts.widgets[owned.key] for owned in counted_fields]
    split = [parts.dataset, parts.task, parts.eval_split]
    page.blocks.load(enter, split, everything, **HIDDEN)
    page.tab[ID].select(enter, [*split, page.recipe], everything, **HIDDEN)
    page.dataset.change(use, [page.dataset, parts.task, parts.eval_split], everything, **HIDDEN)
    page.recipe.change(fill, page.recipe, everything, **HIDDEN)
    for task, radio in parts.presets.items():
        radio.input(functools.partial(choose, task), radio, everything, **HIDDEN)
    parts.task.input(turn, [parts.task, parts.dataset, parts.eval_split], everything, **HIDDEN)
    parts.dataset.input(fit, [parts.dataset, parts.task], everything, **HIDDEN)
    own_settings = [parts.widgets[owned.key] for owned in usual]
    parts.method.input(switch, [parts.method, parts.task, parts.before, *own_settings], everything, **HIDDEN)
    # Not left to `change` alone: a widget that was filled before it was first shown does not tell.
    offered = [parts.start, parts.to_data]
    gr.on([parts.dataset.change, parts.eval_split.change], offer, [parts.dataset, parts.eval_split], offered, **HIDDEN)
    changed = [widget.change for widget in form if widget is not parts.preset]  # type: ignore[attr-defined]
    gr.on(changed, describe, form, parts.same, trigger_mode="always_last", **HIDDEN)
    counting = [parts.task, parts.base, parts.method]
    gr.on(
        [page.tab[ID].select, *(widget.change for widget in [*counting, *counted_widgets])],  # type: ignore[attr-defined]
        count,
        [*counting, *counted_widgets],
        parts.count,
        trigger_mode="always_last",
        concurrency_limit=4,
        **HIDDEN,
    )
    parts.start.click(start, form, [page.run, parts.fault], trigger_mode="once", **HIDDEN)
    parts.to_data.click(lambda: go(DATA), None, page.tabs, **HIDDEN)
