"""The Train form's widgets: laying them out, and filling them from a recipe. What they do is in `studio.tabs.train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from studio import forms, live, presets, recipes
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
        rows: whose fields a row holds (a method's name, a task's name) and the row.
        before: what training settings were before the method changed them.
    """

    form: gr.Column
    dataset: gr.Dropdown
    task: gr.Dropdown
    base: gr.Dropdown
    preset: gr.Radio
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
    fields = recipes.fields()
    widgets: dict[tuple[str, str, str], Component] = {}
    rows: list[tuple[str, str, gr.Row]] = []

    def add(group: str) -> None:
        """The fields of a group: those of methods and tasks, of which one's show at a time, then the training's."""
        for method, of_task in dict.fromkeys((owned.method, owned.task) for owned in fields):
            own = [owned for owned in fields if (owned.method, owned.task) == (method, of_task)]
            own = [owned for owned in own if owned.field.group == group]
            if own and (method or of_task):
                with gr.Row(elem_classes="fields", visible=own[0].shows(task, METHOD)) as row:
                    for owned in own:
                        widgets[owned.key] = forms.widget(owned.field, method or of_task)
                rows.append((method, of_task, row))
            elif own:
                for owned in own:
                    widgets[owned.key] = forms.widget(owned.field)

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
        preset = gr.Radio(preset_choices(task), value=START_PRESET, label="Preset", elem_id="train-preset")
        meaning = gr.HTML(elem_classes="st-hint")
        method = gr.Dropdown(
            [(item.title, item.name) for item in recipes.methods()],
            value=METHOD,
            label="Method",
            info="How the base learns.",
            elem_id="train-method",
        )
        explained = gr.HTML(about(recipes.method_of(METHOD)), elem_id="train-about")
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
    return Parts(
        form=form,
        dataset=dataset,
        task=task_field,
        base=base,
        preset=preset,
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


def preset_choices(task: presets.Task) -> list[tuple[str, str]]:
    """A task's presets as (what is shown, name)."""
    return [(item.title, item.name) for item in task.presets.values()]


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
