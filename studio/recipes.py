"""What the Train form offers: tasks, bases, methods and their fields; a filled form as a job. Nothing here draws."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError, EngineError, TargetError
from engine.models.catalogue import BUILTIN
from engine.train.job import TASKS, DataSpec, JobSpec
from studio import demo, forms, presets
from studio.datasets import usable
from studio.i18n import N_, t
from studio.store import Row

METHOD = "lora"
FULL = presets.Method(
    name="full",
    title=N_("Full fine-tuning"),
    meaning=N_("Every weight of the base learns; what is kept is a whole model."),
    when=N_("To see what an adapter gives up, or when the base is small and everything about it should change."),
    paper="",
    fields=(),
    training={"learning_rate": 0.00005},
)
"""The one entry among the methods that is no adapter."""
NO_DATA = DataSpec(path="-")
"""Stands in a job whose rows are chosen later."""
COUNTED = ("train_text_encoder",)
"""Options of tasks that change how many parameters learn."""


@dataclass(frozen=True)
class Owned:
    """A field of the form and whose it is: a method's, a task's option, or (neither) the training's."""

    field: presets.Field
    method: str = ""
    task: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What the form's widgets are kept under."""
        return self.method, self.task, self.field.name

    def shows(self, task: presets.Task, method: str) -> bool:
        """Whether the form shows it for this task and method."""
        if self.method:
            return self.method == method
        if self.task:
            return self.task == task.name
        return any(field.name == self.field.name for field in task.fields)


def tasks() -> list[presets.Task]:
    """The tasks that have a form, in the order of a job's."""
    return [presets.tasks()[name] for name in TASKS if name in presets.tasks()]


def task_of(name: str | None) -> presets.Task:
    """The task by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in presets.tasks():
        raise ConfigError(f"There is no task {name!r}.", f"Choose one of {', '.join(presets.tasks())}.")
    return presets.tasks()[str(name)]


def tasks_for(format: str | None) -> list[presets.Task]:
    """The tasks that learn from rows of this format; all of them where the format is open."""
    return [task for task in tasks() if format is None or format in task.formats]


def bases(task: presets.Task) -> list[tuple[str, str]]:
    """The built-in bases of a task as (what is shown, name); in demo mode those that it offers."""
    return [
        (model.title, model.name) for model in BUILTIN.values() if task.name in model.tasks and demo.offers(model.name)
    ]


def methods() -> list[presets.Method]:
    """The methods in the registry's order, full fine-tuning last."""
    from engine.adapters import ADAPTERS

    return [*(presets.methods()[name] for name in ADAPTERS), FULL]


def method_of(name: str | None) -> presets.Method:
    """The method by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    found = {method.name: method for method in methods()}
    if name not in found:
        raise ConfigError(f"There is no method {name!r}.", f"Choose one of {', '.join(found)}.")
    return found[str(name)]


def datasets(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """The data sets that some task can learn from, newest first, as (what is shown, id)."""
    return [
        (t("{name} ({count} rows)", name=row["name"], count=f"{row['rows']:,}"), row["id"])
        for row in rows
        if usable(row) and tasks_for(row["format"])
    ]


def fields() -> list[Owned]:
    """Every field of the form in order: each method's own, each task's options, then the training's, each once."""
    own = [Owned(field, method=method.name) for method in methods() for field in method.fields]
    options = [Owned(field, task=task.name) for task in tasks() for field in task.options]
    training = {field.name: Owned(field) for task in tasks() for field in task.fields}
    return [*own, *options, *training.values()]


def default_name(dataset: str, base: str, preset: presets.Preset | None, method: str = "") -> str:
    """A run's name where the person gave none."""
    stem = dataset.rsplit(".", 1)[0]
    short = base.rstrip("/").rsplit("/", 1)[-1]
    return " · ".join(part for part in (stem, short, method, preset.title.lower() if preset else "") if part)[:80]


def job(
    dataset: Row,
    *,
    task: str | None,
    base: str | None,
    preset: str | None,
    eval_split: float | None,
    name: str | None,
    quantization: str | None,
    method: str | None,
    values: Sequence[Any],
) -> JobSpec:
    """The job that the form describes; `values` are the widgets' of `fields()`.

    Raises:
        EngineError: with every fault of the form.
    """
    form, chosen = task_of(task), method_of(method)
    shown = [pair for pair in zip(fields(), values, strict=True) if pair[0].shows(form, chosen.name)]
    adapter, options, training = forms.read_parts(
        [(owned.field, value) for owned, value in shown if owned.method],
        [(owned.field, value) for owned, value in shown if owned.task],
        [(owned.field, value) for owned, value in shown if not owned.method and not owned.task],
    )
    title = (name or "").strip()[:80] or default_name(
        dataset["name"], base or "", form.presets.get(preset or ""), "" if chosen.name == METHOD else chosen.title
    )
    return forms.job(
        name=title,
        task=form.name,
        model=base or "",
        dataset=dataset,
        eval_split=0.0 if eval_split is None else float(eval_split),
        method=None if chosen is FULL else chosen.name,
        adapter=adapter,
        training=training,
        options=options,
        quantization=quantization or "none",
    )


def of_preset(task: presets.Task, preset: presets.Preset) -> dict[str, Any]:
    """A preset as the keys of a job that the form knows."""
    method = method_of(preset.adapter.get("method", METHOD))
    adapter, training = forms.preset_values(task, method, preset)
    return {
        "task": task.name,
        "adapter": {"method": method.name, **adapter},
        "training": training,
        "options": dict(preset.options),
        "quantization": preset.quantization,
        "eval_split": preset.eval_split,
    }


def of_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """An earlier run's job (as a dictionary) as the keys that the form knows."""
    return {
        "task": spec.get("task", "causal_lm"),
        # Targets that a job leaves out are the task's own, not those that the form begins with.
        "adapter": {"method": FULL.name} if spec.get("full") else {"target_modules": None, **spec["adapter"]},
        "training": dict(spec["training"]),
        "options": dict(spec.get("options") or {}),
        "quantization": spec.get("quantization", "none"),
        "eval_split": spec["data"]["eval_split"],
    }


def shown_values(recipe: Mapping[str, Any]) -> dict[tuple[str, str, str], Any]:
    """Key of each field that the recipe's task and method show -> what its widget holds."""
    task, method = task_of(recipe["task"]), method_of(recipe["adapter"].get("method", METHOD))
    found = {}
    for owned in fields():
        if owned.shows(task, method.name):
            part = "adapter" if owned.method else "options" if owned.task else "training"
            value = recipe[part].get(owned.field.name, forms.read_default(owned.field))
            found[owned.key] = forms.show(owned.field, value)
    return found


def adapters(values: Sequence[Any]) -> list[dict[str, Any]]:
    """Each method's `adapter` section as its fields stand in the form, in order; what cannot be read is left out.

    `values` are the widgets' of `fields()`.
    """
    found = []
    pairs = list(zip(fields(), values, strict=True))
    for method in methods():
        if method is FULL:
            continue
        own = [(owned.field, value) for owned, value in pairs if owned.method == method.name]
        try:
            read = forms.read_all([field for field, _ in own], [value for _, value in own])
        except ConfigError:
            read = {field.name: forms.read_default(field) for field, _ in own}
        found.append({"method": method.name, **{key: value for key, value in read.items() if value is not None}})
    return found


_NAMED = re.compile(r"(?:- )?(?:(?:training|adapter|data|options)\.)?([a-z_0-9]+)(?:=\S+)? (?!=)")
_ELSEWHERE = {"full": "method", "model": "base", "target_modules": "target_modules"}


def faulty(fault: EngineError, task: str | None, method: str | None) -> dict[str, str]:
    """Name of a setting that the form shows -> what an error says of it.

    Every line of an error of the engine's or of the form's begins with the setting's exact name, which is all that is
    relied on here. `quantization`, `eval_split`, `method`, `base` and `task` are the head's.
    """
    shown = {
        owned.field.name for owned in fields() if task in presets.tasks() and owned.shows(task_of(task), method or "")
    } | {"quantization", "eval_split", "method", "base", "task"}
    found: dict[str, str] = {}
    for line in fault.message.splitlines():
        match = _NAMED.match(line)
        name = _ELSEWHERE.get(match[1], match[1]) if match else ""
        if name in shown:
            found.setdefault(name, line.removeprefix("- "))
    if not found and fault.code == TargetError.code and "target_modules" in shown:
        found = {"target_modules": fault.message}
    return found
