"""The Train form: laying its widgets out, and filling them from a recipe. What they do is in `studio.tabs.train`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr
from gradio.components import Component

from studio import costs, forms, job_text, live, presets, recipes
from studio.i18n import N_, t
from studio.markup import esc
from studio.own_presets import OwnPresets
from studio.page import Page
from studio.train_parts import HEAD_INFO, JobText, Keep, Parts

TASK, METHOD = "causal_lm", recipes.METHOD
START_PRESET = "quick-look"
GROUPS = {
    "adapter": N_("Adapter"),
    "optimisation": N_("Optimisation"),
    "memory": N_("Memory and speed"),
    "checks": N_("Checks and samples"),
}
QUANTIZATIONS = (
    (N_("as it is (none)"), "none"),
    (N_("4 bits (nf4)"), "nf4"),
    (N_("4 bits, older kind (fp4)"), "fp4"),
    (N_("8 bits (int8)"), "int8"),
)


def about(method: presets.Method) -> str:
    """What a method does and when to take it, with its paper."""
    link = f'<a href="{esc(method.paper)}" target="_blank" rel="noopener">{esc(t("paper"))}</a>' if method.paper else ""
    return f'<p class="st-hint">{esc(t(method.meaning))} <b>{esc(t("When:"))}</b> {esc(t(method.when))} {link}</p>'


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

    # Before the form, which never shows beside it: the page looks each part up from its top on.
    running = live.build()
    with gr.Column(elem_id="train-form") as form:
        gr.HTML(f'<h2 class="page-title">{esc(t("What should learn, and how?"))}</h2>')
        with gr.Row():
            dataset = gr.Dropdown(
                recipes.datasets(page.studio.store.datasets()),
                label=t("Data set"),
                info=t("What it learns from."),
                elem_id="train-dataset",
            )
            task_field = gr.Dropdown(
                [(t(item.title), item.name) for item in recipes.tasks()],
                value=TASK,
                label=t("Task"),
                info=t(HEAD_INFO["task"]),
                elem_id="train-task",
            )
            base = gr.Dropdown(
                recipes.bases(task),
                value=task.base,
                allow_custom_value=True,
                label=t("Base model"),
                info=t(HEAD_INFO["base"]),
                elem_id="train-base",
            )
        radios = {
            item.name: gr.Radio(
                [(t(preset.title), preset.name) for preset in item.presets.values()],
                value=START_PRESET if item is task else None,
                label=t("Preset"),
                elem_id=f"train-preset-{item.name}",
                visible=item is task,
            )
            for item in recipes.tasks()
        }
        meaning = gr.HTML(esc(t(preset.meaning)), elem_classes="st-hint")
        method = gr.Dropdown(
            [(item.title if item is not recipes.FULL else t(item.title), item.name) for item in recipes.methods()],
            value=METHOD,
            label=t("Method"),
            info=t(HEAD_INFO["method"]),
            elem_id="train-method",
        )
        explained = gr.HTML(about(recipes.method_of(METHOD)), elem_id="train-about")
        add_options("main")
        with gr.Row(elem_id="main-fields"):
            add("main")
        cost = gr.HTML(costs.card({}, t("measured after the first steps")), elem_id="train-count")
        remedy = gr.Button("", visible=False, variant="primary", elem_id="train-remedy")
        with gr.Accordion(t("What each method costs here"), open=False, elem_id="train-methods") as compared:
            table = gr.HTML(costs.methods([], METHOD, busy=True))
        with gr.Accordion(t("Advanced"), open=False) as advanced:
            for group, title in GROUPS.items():
                gr.HTML(f"<h3>{esc(t(title))}</h3>")
                add_options(group)
                with gr.Row(elem_classes="fields"):
                    add(group)
                    if group == "memory":
                        quantization = gr.Dropdown(
                            [(t(text), value) for text, value in QUANTIZATIONS],
                            value=recipe["quantization"],
                            label=t("Memory of the base (quantization)"),
                            info=t(HEAD_INFO["quantization"]),
                            elem_id="field-quantization",
                        )
                        processes = gr.Number(
                            1,
                            precision=0,
                            minimum=1,
                            step=1,
                            label=t("GPUs (processes)"),
                            info=t("So many share every step; the curve is that of one, and comes sooner."),
                            visible=False,
                            elem_id="field-processes",
                        )
                    if group == "checks":
                        eval_split = gr.Number(
                            recipe["eval_split"],
                            step=0.01,
                            label=t("Rows held back (eval_split)"),
                            info=t(HEAD_INFO["eval_split"]),
                            elem_id="field-eval_split",
                        )
        own, keep = _keep(page)
        text = _text()
        name = gr.Textbox(label=t("Name of the run"), placeholder=t("From the data set and the preset"), max_length=80)
        diff = gr.HTML(visible=False, elem_id="train-diff")
        fault = gr.HTML(visible=False, elem_id="train-fault")
        start = gr.Button(t("Train"), variant="primary", visible=False, elem_id="train-start")
        to_data = gr.Button(t("Choose a data set first"), variant="primary", elem_id="train-to-data")
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
        own=own,
        cost=cost,
        remedy=remedy,
        changes=gr.State(None),
        costs=compared,
        methods=table,
        opened=gr.State(False),
        advanced=advanced,
        processes=processes,
        text=text,
        keep=keep,
        origin=gr.State(None),
        diff=diff,
        changed=gr.Button(visible="hidden", elem_id="train-changed"),
        priced=gr.Button(visible="hidden", elem_id="train-priced"),
        marked=gr.State([]),
        refused=gr.State([]),
        fault=fault,
        start=start,
        to_data=to_data,
        live=running,
    )


def _keep(page: Page) -> tuple[gr.Dropdown, Keep]:
    """The presets of the person's own: the list, and keeping the form as another one."""
    choices = own_choices(page)
    with gr.Accordion(t("Presets of your own"), open=False, elem_id="train-own"):
        own = gr.Dropdown(
            choices,
            value=None,
            label=t("Your presets"),
            info=t("Settings that you have kept. Using one fills the form; your rows stay chosen."),
            elem_id="train-own-choice",
            visible=bool(choices),
        )
        with gr.Row(elem_id="train-own-actions"):
            use = gr.Button(t("Use it"), visible=bool(choices), elem_id="train-own-use")
            delete = gr.Button(t("Delete it"), visible=bool(choices), elem_id="train-own-delete")
            undo = gr.Button(t("Undo"), visible=False, elem_id="train-own-undo")
        with gr.Row(equal_height=True):
            name = gr.Textbox(
                label=t("Keep this form as"),
                placeholder=t("A name, for example: my support answers"),
                max_length=80,
                elem_id="train-own-name",
                scale=3,
            )
            save = gr.Button(t("Keep"), elem_id="train-own-save", scale=1)
        said = gr.HTML(visible=False, elem_id="train-own-said")
    return own, Keep(name, save, use, delete, undo, said, gr.State(None))


def own_choices(page: Page) -> list[tuple[str, int]]:
    """The presets of the person's own as (what is shown, id)."""
    titles = {task.name: t(task.title) for task in recipes.tasks()}
    rows = OwnPresets(page.studio.store).rows()
    return [(f"{row['name']} ({titles.get(row['task'], row['task'])})", row["id"]) for row in rows]


def _text() -> JobText:
    """The job as YAML and as a command; and a job's file into the form."""
    with gr.Accordion(t("As a file and a command"), open=False, elem_id="train-text") as part:
        gr.HTML(f'<p class="st-hint">{esc(t("The same job without the studio: save it as job.yaml, then run"))}</p>')
        command = gr.Code(
            job_text.command(), language="shell", show_label=False, interactive=False, elem_id="train-command"
        )
        same = gr.Code(
            language="yaml", show_label=False, interactive=False, max_lines=24, elem_id="train-same",
            buttons=["copy"],
        )  # fmt: skip
        with gr.Row():
            save = gr.Button(t("Download job.yaml"), elem_id="train-save")
            upload = gr.UploadButton(
                t("Open a job.yaml"), file_types=[".yaml", ".yml", ".json"], elem_id="train-upload"
            )
        paste = gr.Textbox(
            label=t("Or paste a job"),
            info=t("It fills the form and starts nothing. Its data path is not opened: you choose the rows above."),
            lines=3,
            max_lines=12,
            max_length=job_text.LONGEST + 1,
            elem_id="train-paste",
        )
        take = gr.Button(t("Fill the form from it"), elem_id="train-take")
        fault = gr.HTML(visible=False, elem_id="train-text-fault")
    return JobText(part, same, command, save, upload, paste, take, fault)


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
