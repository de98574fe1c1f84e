"""The Train form's widgets: laying them out, and filling them from a recipe. What they do is in `studio.tabs.train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from studio import forms, live, presets, recipes
from studio.i18n import t
from studio.markup import esc
from studio.page import Page

TASK, METHOD = "causal_lm", recipes.METHOD
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
    """The widgets of the form, and the live part.

    Attributes:
        widgets: key of a field (see `recipes.Owned`) -> its widget.
        presets: task -> the choice among its presets, one of which is in view. Each has choices of its own that never
            change: a widget refuses a value that was sent before its choices changed.
        preset: the name of the one that is chosen.
        rows: whose fields a row holds (a method's name, a task's name) and the row.
        before: what training settings were before the method changed them.
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
    count: gr.HTML
    same: gr.Code
    fault: gr.HTML
    start: gr.Button
    to_data: gr.Button
    live: live.Live

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


def about(method: presets.Method) -> str:
    """What a method does and when to take it, with its paper."""
    link = f'<a href="{esc(method.paper)}" target="_blank" rel="noopener">paper</a>' if method.paper else ""
    return f'<p class="st-hint">{esc(method.meaning)} <b>When:</b> {esc(method.when)} {link}</p>'


def build(page: Page) -> Parts:
    """Lay out the form and the live part."""
    task = recipes.task_of(TASK)
    preset = task.presets[START_PRESET]
    recipe = recipes.of_preset(task, preset)
    # Laid out filled: to fill it once the page is there would undo what a quick person has chosen by then.
    values = recipes.shown_values(recipe)
    fields = recipes.fields()
    widgets: dict[tuple[str, str, str], Component] = {}
    rows: list[tuple[str, str, gr.Row]] = []

    def place(owned: recipes.Owned) -> None:
        """One field; a method's or a task's own is hidden by its row."""
        first = values.get(owned.key, forms.show(owned.field, owned.field.default))
        visible = bool(owned.method or owned.task) or owned.key in values
        widgets[owned.key] = forms.widget(owned.field, owned.method or owned.task, first, visible)

    def own_row(method: str, of_task: str, group: str) -> None:
        """A method's or a task's fields of a group, in a row that shows with it."""
        own = [o for o in fields if (o.method, o.task, o.field.group) == (method, of_task, group)]
        if own:
            with gr.Row(elem_classes="fields", visible=own[0].shows(task, METHOD)) as row:
                for owned in own:
                    place(owned)
            rows.append((method, of_task, row))

    def add_options(group: str) -> None:
        """Every task's own fields of a group."""
        for item in recipes.tasks():
            own_row("", item.name, group)

    def add(group: str) -> None:
        """Every method's fields of a group, then the training's."""
        for item in recipes.methods():
            own_row(item.name, "", group)
        for owned in fields:
            if not owned.method and not owned.task and owned.field.group == group:
                place(owned)

    with gr.Column() as form:
        gr.HTML('<h2 class="page-title">What should learn, and how?</h2>')
        with gr.Row():
            dataset = gr.Dropdown(
                recipes.datasets(page.studio.store.datasets()),
                label="Data set",
                info="What it learns from.",
                elem_id="train-dataset",
            )
            task_field = gr.Dropdown(
                [(item.title, item.name) for item in recipes.tasks()],
                value=TASK,
                label="Task",
                info="What it learns to do.",
                elem_id="train-task",
            )
            base = gr.Dropdown(
                recipes.bases(task),
                value=task.base,
                allow_custom_value=True,
                label="Base model",
                info="Choose one, or type a hub id (owner/name) or a local folder.",
                elem_id="train-base",
            )
        radios = {
            item.name: gr.Radio(
                [(preset.title, preset.name) for preset in item.presets.values()],
                value=START_PRESET if item is task else None,
                label="Preset",
                elem_id=f"train-preset-{item.name}",
                visible=item is task,
            )
            for item in recipes.tasks()
        }
        meaning = gr.HTML(esc(t(preset.meaning)), elem_classes="st-hint")
        method = gr.Dropdown(
            [(item.title, item.name) for item in recipes.methods()],
            value=METHOD,
            label="Method",
            info="How the base learns.",
            elem_id="train-method",
        )
        explained = gr.HTML(about(recipes.method_of(METHOD)), elem_id="train-about")
        add_options("main")
        with gr.Row(elem_id="main-fields"):
            add("main")
        count = gr.HTML('<div class="st-count">&nbsp;</div>', elem_id="train-count")
        with gr.Accordion("Advanced", open=False):
            for group, title in GROUPS.items():
                gr.HTML(f"<h3>{title}</h3>")
                add_options(group)
                with gr.Row(elem_classes="fields"):
                    add(group)
                    if group == "memory":
                        quantization = gr.Dropdown(
                            list(QUANTIZATIONS),
                            value=recipe["quantization"],
                            label="Memory of the base (quantization)",
                            info="Fewer bits: a larger base fits, and answers a little worse.",
                            elem_id="field-quantization",
                        )
                    if group == "checks":
                        eval_split = gr.Number(
                            recipe["eval_split"],
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
    return Parts(
        form=form,
        dataset=dataset,
        task=task_field,
        base=base,
        presets=radios,
        preset=gr.State(START_PRESET),
        method=method,
        about=explained,
        meaning=meaning,
        eval_split=eval_split,
        name=name,
        quantization=quantization,
        widgets=widgets,
        rows=rows,
        before=gr.State(None),
        count=count,
        same=same,
        fault=fault,
        start=start,
        to_data=to_data,
        live=live.build(),
    )


def filled(parts: Parts, recipe: Mapping[str, Any]) -> dict[Any, Any]:
    """The form's widgets with a recipe's values (see `recipes.of_preset`); fields of others stay as they are."""
    task, method = recipes.task_of(recipe["task"]), recipes.method_of(recipe["adapter"].get("method", METHOD))
    found: dict[Any, Any] = {
        parts.method: method.name,
        parts.eval_split: recipe["eval_split"],
        parts.quantization: recipe["quantization"],
        parts.before: None,
        **shown(parts, task, method),
    }
    for key, value in recipes.shown_values(recipe).items():
        widget = parts.widgets[key]
        found[widget] = gr.update(value=value, visible=True) if not any(key[:2]) else value
    return found


def shown(parts: Parts, task: presets.Task, method: presets.Method) -> dict[Any, Any]:
    """The fields of this task and method in view, the others' out of it."""
    found: dict[Any, Any] = {
        row: gr.Row(visible=owner == method.name or of_task == task.name) for owner, of_task, row in parts.rows
    }
    for owned in recipes.fields():
        if not owned.method and not owned.task and not owned.shows(task, method.name):
            found[parts.widgets[owned.key]] = gr.update(visible=False)
    found[parts.about] = about(method)
    return found


def preset_shown(parts: Parts, task: presets.Task, name: str | None) -> dict[Any, Any]:
    """The choice among a task's presets in view, with this one chosen."""
    radios = {
        radio: gr.Radio(visible=True, value=name) if of_task == task.name else gr.Radio(visible=False)
        for of_task, radio in parts.presets.items()
    }
    return {**radios, parts.preset: name}
