"""Train: base, preset, the fields that matter, the cost; then the live part of the run that was started."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from engine.errors import ConfigError, EngineError
from engine.models.catalogue import BUILTIN, DEFAULT
from engine.train.job import JobSpec
from studio import forms, live, presets
from studio.datasets import train_rows, usable
from studio.markup import error, esc, size
from studio.page import DATA, HIDDEN, TRAIN, Page, go

ID = TRAIN
TITLE = "Train"
TASK, METHOD = "causal_lm", "lora"
START_PRESET = "quick-look"
GROUPS = {
    "adapter": "Adapter",
    "optimisation": "Optimisation",
    "memory": "Memory and speed",
    "checks": "Checks and samples",
}
QUANTIZATIONS = (
    ("as it is (none)", "none"),
    ("4 bits (nf4)", "nf4"),
    ("4 bits, older kind (fp4)", "fp4"),
    ("8 bits (int8)", "int8"),
)


@dataclass
class Parts:
    """The widgets of the form, and the live part."""

    form: gr.Column
    base: gr.Dropdown
    preset: gr.Radio
    method: gr.Dropdown
    about: gr.HTML
    meaning: gr.HTML
    dataset: gr.Dropdown
    eval_split: gr.Number
    name: gr.Textbox
    quantization: gr.Dropdown
    widgets: dict[tuple[str, str], Component]
    columns: list[tuple[str, gr.Row]]
    before: gr.State
    count: gr.HTML
    same: gr.Code
    fault: gr.HTML
    start: gr.Button
    to_data: gr.Button
    live: live.Live


def bases() -> list[tuple[str, str]]:
    """The built-in bases as (what is shown, name)."""
    return [(model.title, model.name) for model in BUILTIN.values() if TASK in model.tasks]


def datasets(page: Page) -> list[tuple[str, str]]:
    """The data sets that can be trained on, newest first."""
    return [(f"{row['name']} ({row['rows']:,} rows)", row["id"]) for row in page.studio.store.datasets() if usable(row)]


def fields() -> list[tuple[str, presets.Field]]:
    """Every field of the form in order, each with its method: each method's own, then the training's, whose method is
    empty."""
    own = [(method.name, field) for method in methods() for field in method.fields]
    return own + [("", field) for field in presets.tasks()[TASK].fields]


def methods() -> list[presets.Method]:
    """The methods in the registry's order."""
    from engine.adapters import ADAPTERS

    return [presets.methods()[name] for name in ADAPTERS]


def chosen(method: str | None) -> presets.Method:
    """The method by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if method not in presets.methods():
        raise ConfigError(f"There is no method {method!r}.", f"Choose one of {', '.join(presets.methods())}.")
    return presets.methods()[str(method)]


def about(method: presets.Method) -> str:
    """What a method does and when to take it, with its paper."""
    link = f'<a href="{esc(method.paper)}" target="_blank" rel="noopener">paper</a>'
    return f'<p class="st-hint">{esc(method.meaning)} <b>When:</b> {esc(method.when)} {link}</p>'


def build(page: Page) -> None:
    """Lay out the form and the live part."""
    task = presets.tasks()[TASK]
    widgets: dict[tuple[str, str], Component] = {}
    columns: list[tuple[str, gr.Row]] = []

    def add(group: str) -> None:
        """The fields of a group: the method's own, of which one method's show at a time, then the training's."""
        for method in methods():
            own = [field for field in method.fields if field.group == group]
            if own:
                with gr.Row(elem_classes="fields", visible=method.name == METHOD) as row:
                    for field in own:
                        widgets[method.name, field.name] = forms.widget(field, method.name)
                columns.append((method.name, row))
        for field in task.fields:
            if field.group == group:
                widgets["", field.name] = forms.widget(field)

    with gr.Column() as form:
        gr.HTML('<h2 class="page-title">What should learn, and how?</h2>')
        with gr.Row():
            dataset = gr.Dropdown(
                datasets(page), label="Data set", info="What it learns from.", elem_id="train-dataset"
            )
            base = gr.Dropdown(
                bases(),
                value=DEFAULT,
                allow_custom_value=True,
                label="Base model",
                info="Choose one, or type a hub id (owner/name) or a local folder.",
                elem_id="train-base",
            )
        preset = gr.Radio(
            [(item.title, item.name) for item in task.presets.values()],
            value=START_PRESET,
            label="Preset",
            elem_id="train-preset",
        )
        meaning = gr.HTML(elem_classes="st-hint")
        method = gr.Dropdown(
            [(item.title, item.name) for item in methods()],
            value=METHOD,
            label="Method",
            info="How the base learns.",
            elem_id="train-method",
        )
        explained = gr.HTML(about(presets.methods()[METHOD]), elem_id="train-about")
        with gr.Row(elem_id="main-fields"):
            add("main")
        count = gr.HTML('<div class="st-count">&nbsp;</div>', elem_id="train-count")
        with gr.Accordion("Advanced", open=False):
            for group, title in GROUPS.items():
                gr.HTML(f"<h3>{title}</h3>")
                with gr.Row(elem_classes="fields"):
                    add(group)
                    if group == "memory":
                        quantization = gr.Dropdown(
                            list(QUANTIZATIONS),
                            value="none",
                            label="Memory of the base (quantization)",
                            info="Fewer bits: a larger base fits, and answers a little worse.",
                            elem_id="field-quantization",
                        )
                    if group == "checks":
                        eval_split = gr.Number(
                            0.1,
                            step=0.01,
                            label="Rows held back (eval_split)",
                            info="Share of the rows that is only for checking, 0 to 0.5.",
                        )
        with gr.Accordion("The same as a command", open=False):
            gr.HTML(
                '<p class="st-hint">Save as job.yaml, then '
                "<code>python -m engine train job.yaml --out my-run</code></p>"
            )
            same = gr.Code(language="yaml", show_label=False, interactive=False)
        name = gr.Textbox(label="Name of the run", placeholder="From the data set and the preset", max_length=80)
        fault = gr.HTML(visible=False)
        start = gr.Button("Train", variant="primary", visible=False, elem_id="train-start")
        to_data = gr.Button("Choose a data set first", variant="primary", elem_id="train-to-data")
    page.parts[ID] = Parts(
        form,
        base,
        preset,
        method,
        explained,
        meaning,
        dataset,
        eval_split,
        name,
        quantization,
        widgets,
        columns,
        gr.State(None),
        count,
        same,
        fault,
        start,
        to_data,
        live.build(),
    )


def read_form(
    page: Page,
    base: str,
    preset: str | None,
    dataset_id: str | None,
    eval_split: float,
    name: str,
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
    row = page.studio.store.dataset(dataset_id)
    task, known = presets.tasks()[TASK], own_values(chosen(method).name, values)
    cut = len(chosen(method).fields)
    adapter, training = forms.read_parts([field for field, _ in known], [value for _, value in known], cut)
    title = (name or "").strip()[:80] or default_name(
        row["name"], base, task.presets.get(preset or ""), "" if method == METHOD else chosen(method).title
    )
    return forms.job(
        name=title,
        task=TASK,
        model=base or "",
        dataset=row,
        eval_split=0.0 if eval_split is None else float(eval_split),
        method=chosen(method).name,
        adapter=adapter,
        training=training,
        quantization=quantization or "none",
    )


def own_values(method: str, values: Iterable[Any]) -> list[tuple[presets.Field, Any]]:
    """The fields that count for a method, its own and then the training's, each with its widget's value."""
    pairs = zip(fields(), values, strict=True)
    return [(field, value) for (owner, field), value in pairs if owner in (method, "")]


def default_name(dataset: str, base: str, preset: presets.Preset | None, method: str = "") -> str:
    """A run's name where the person gave none."""
    stem = dataset.rsplit(".", 1)[0]
    short = base.rstrip("/").rsplit("/", 1)[-1]
    return " · ".join(part for part in (stem, short, method, preset.title.lower() if preset else "") if part)[:80]


def filled(
    parts: Parts,
    method: str,
    adapter: Mapping[str, Any],
    training: Mapping[str, Any],
    eval_split: float,
    quantization: str,
) -> dict[Any, Any]:
    """The form's widgets with a job's values; other methods' fields stay as they are."""
    found: dict[Any, Any] = {
        parts.method: method,
        parts.eval_split: eval_split,
        parts.quantization: quantization,
        parts.before: None,
    }
    found |= shown(parts, method)
    for owner, field in fields():
        if owner in (method, ""):
            known = adapter if owner else training
            found[parts.widgets[owner, field.name]] = forms.show(
                field, known.get(field.name, forms.read_default(field))
            )
    return found


def shown(parts: Parts, method: str) -> dict[Any, Any]:
    """The fields of this method in view, the others' out of it."""
    found: dict[Any, Any] = {row: gr.Row(visible=owner == method) for owner, row in parts.columns}
    found[parts.about] = about(chosen(method))
    return found


def counted(page: Page, base: str, adapter: Mapping[str, Any]) -> str:
    """How many parameters learn, in a sentence."""
    found = page.studio.inference.count(base, adapter)
    return (
        f'<div class="st-count"><b>{found["trainable"]:,}</b> of {found["parameters"]:,} parameters learn '
        f"({found['share'] * 100:.2g} %); the adapter will be a file of {size(found['adapter_bytes'])}.</div>"
    )


def wire(page: Page) -> None:
    """Connect the form."""
    parts: Parts = page.parts[ID]
    live.wire(page, parts.live, parts.form)
    values = [parts.widgets[owner, field.name] for owner, field in fields()]
    head = [parts.base, parts.preset, parts.dataset, parts.eval_split, parts.name, parts.quantization]
    form = [*head, parts.method, *values]
    counts: dict[str, str] = {}
    usual = [field for field in presets.tasks()[TASK].fields if any(field.name in m.training for m in methods())]

    def offer(dataset_id: str | None, eval_split: float | None) -> dict[Any, Any]:
        """The one button that is next."""
        rows = {key: label for label, key in datasets(page)}
        ready = dataset_id in rows
        count = train_rows(page.studio.store.dataset(dataset_id), eval_split or 0.0) if ready and dataset_id else 0
        return {
            parts.start: gr.Button(f"Train on these {count:,} rows", visible=ready),
            parts.to_data: gr.Button(visible=not ready),
        }

    def enter(dataset_id: str | None, eval_split: float | None) -> dict[Any, Any]:
        """The data sets there are now; the newest is chosen when none is. A choice that stands is not touched:
        the form may be being filled at this moment."""
        choices = datasets(page)
        if dataset_id in {key for _, key in choices}:
            return {parts.dataset: gr.Dropdown(choices)}
        chosen = choices[0][1] if choices else None
        return {parts.dataset: gr.Dropdown(choices, value=chosen), **offer(chosen, eval_split)}

    def use(dataset_id: str, eval_split: float | None) -> dict[Any, Any]:
        """The data set that was chosen on Data."""
        if not dataset_id:
            return {}
        return {parts.dataset: gr.Dropdown(datasets(page), value=dataset_id), **offer(dataset_id, eval_split)}

    def choose(name: str) -> dict[Any, Any]:
        """Fill the form from a preset."""
        task = presets.tasks()[TASK]
        preset = task.presets.get(name)
        if preset is None:
            return {parts.meaning: ""}
        method = chosen(preset.adapter.get("method", METHOD))
        adapter, training = forms.preset_values(task, method, preset)
        found = filled(parts, method.name, adapter, training, preset.eval_split, preset.quantization)
        return {parts.meaning: esc(preset.meaning), **found}

    def switch(name: str, before: Mapping[str, Any] | None, *now: Any) -> dict[Any, Any]:
        """Another method: its fields, and the training settings that it usually needs. With a method that needs none,
        what stood there before comes back."""
        method, before = chosen(name), dict(before or {})
        found = shown(parts, method.name)
        for field, value in zip(usual, now, strict=True):
            if field.name in method.training:
                before.setdefault(field.name, value)
                found[parts.widgets["", field.name]] = forms.show(field, method.training[field.name])
            elif field.name in before:
                found[parts.widgets["", field.name]] = before.pop(field.name)
        return {**found, parts.before: before}

    def fill(recipe: Mapping[str, Any] | None) -> dict[Any, Any]:
        """Fill the form from a whole job."""
        if not recipe:
            return {}
        spec, choices = recipe["spec"], datasets(page)
        known = {key for _, key in choices}
        dataset_id = recipe.get("dataset") if recipe.get("dataset") in known else None
        split = spec["data"]["eval_split"]
        method = chosen(spec["adapter"].get("method", METHOD)).name
        return {
            parts.base: spec["model"],
            parts.preset: None,
            parts.meaning: esc(recipe.get("meaning", "Settings of an earlier run; change what you like.")),
            parts.name: spec.get("name", ""),
            parts.dataset: gr.Dropdown(choices, value=dataset_id),
            parts.fault: gr.HTML(visible=False),
            **filled(parts, method, spec["adapter"], spec["training"], split, spec.get("quantization", "none")),
            **offer(dataset_id, split),
        }

    def describe(*inputs: Any) -> str:
        try:
            return forms.as_yaml(read_form(page, *inputs))
        except EngineError as fault:
            return "\n".join(f"# {line}" for line in str(fault).splitlines())

    def count(base: str, name: str, *inputs: Any) -> Iterator[str]:
        try:
            method = chosen(name)
            pairs = zip(adapter_fields, inputs, strict=True)
            own = [value for (owner, _), value in pairs if owner == method.name]
            adapter = {"method": method.name, **forms.read_all(method.fields, own)}
            adapter = {key: value for key, value in adapter.items() if value is not None}
            key = json.dumps([base, adapter])
            if key not in counts:
                yield '<div class="st-count">Counting what learns ...</div>'
                counts[key] = counted(page, (base or "").strip(), adapter)
            yield counts[key]
        except EngineError as fault:
            yield error(fault, "These settings do not fit this base")

    def start(*inputs: Any) -> dict[Any, Any]:
        """Queue the run and show it."""
        try:
            spec = read_form(page, *inputs)
            run_id = page.studio.jobs.submit(spec, inputs[2])
        except EngineError as fault:
            return {parts.fault: gr.HTML(error(fault, "This run cannot start yet"), visible=True)}
        return {page.run: run_id, parts.fault: gr.HTML(visible=False)}

    rows = [row for _, row in parts.columns]
    everything = [*form, *rows, parts.before, parts.about, parts.meaning, parts.fault, parts.start, parts.to_data]
    adapter_fields = [(owner, field) for owner, field in fields() if owner]
    adapter_widgets = [parts.widgets[owner, field.name] for owner, field in adapter_fields]
    split = [parts.dataset, parts.eval_split]
    offered = [parts.dataset, parts.start, parts.to_data]
    page.blocks.load(enter, split, offered, **HIDDEN)
    page.blocks.load(choose, parts.preset, everything, **HIDDEN)
    page.tab[ID].select(enter, split, offered, **HIDDEN)
    page.dataset.change(use, [page.dataset, parts.eval_split], offered, **HIDDEN)
    page.recipe.change(fill, page.recipe, everything, **HIDDEN)
    parts.preset.input(choose, parts.preset, everything, **HIDDEN)
    own_settings = [parts.widgets["", field.name] for field in usual]
    parts.method.input(switch, [parts.method, parts.before, *own_settings], everything, **HIDDEN)
    # Not left to `change` alone: a widget that was filled before it was first shown does not tell.
    gr.on([parts.dataset.change, parts.eval_split.change], offer, split, offered[1:], **HIDDEN)
    changed = [widget.change for widget in form]  # type: ignore[attr-defined]
    gr.on(changed, describe, form, parts.same, trigger_mode="always_last", **HIDDEN)
    gr.on(
        [page.tab[ID].select, parts.base.change, parts.method.change, *(widget.change for widget in adapter_widgets)],  # type: ignore[attr-defined]
        count,
        [parts.base, parts.method, *adapter_widgets],
        parts.count,
        trigger_mode="always_last",
        concurrency_limit=4,
        **HIDDEN,
    )
    parts.start.click(start, form, [page.run, parts.fault], trigger_mode="once", **HIDDEN)
    parts.to_data.click(lambda: go(DATA), None, page.tabs, **HIDDEN)
