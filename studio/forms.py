"""Form fields <-> widgets <-> job. Pure functions: nothing here touches the store or a process."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gradio as gr
import yaml
from gradio.components import Component

from engine.errors import ConfigError
from engine.train.job import JobSpec
from studio.i18n import t
from studio.presets import Field, Method, Preset, Task

Values = dict[str, Any]


def widget(field: Field, owner: str = "", value: Any = None, visible: bool = True) -> Component:
    """The widget of one field: plain name, exact name, one line of meaning.

    Args:
        field: the field.
        owner: keeps two methods' fields apart.
        value: what it holds at first, as `show` gives it.
        visible: whether it is in view at first.
    """
    common: dict[str, Any] = {
        "value": value,
        "label": f"{t(field.label)} ({field.name})",
        "info": t(field.help),
        "elem_id": "-".join(filter(None, ("field", owner, field.name))),
        "visible": visible,
    }
    if field.type == "choice":
        return gr.Dropdown(choices=list(field.choices), **common)
    if field.type == "bool":
        return gr.Checkbox(**common)
    if field.type == "lines":
        return gr.Textbox(lines=2, max_lines=6, **common)
    # A Number would round 0.0001, turn "nothing" into 0, and answer a value out of bounds with a bare exception.
    return gr.Textbox(max_lines=1, **common)


def show(field: Field, value: Any) -> Any:
    """A job's value as its widget holds it."""
    if field.type in ("int", "int?", "float", "float?"):
        return "" if value is None else f"{value:.12g}"
    if field.type == "names":
        return value if isinstance(value, str) else ", ".join(value or [])
    if field.type == "lines":
        return "\n".join(value or [])
    if field.type == "choice":
        return str(value).lower() if isinstance(value, bool) else value
    return value


def read(field: Field, value: Any) -> Any:
    """A widget's value as the job's value.

    Raises:
        ConfigError: not a number, out of bounds, or not one of the choices; the message is one line for a list.
    """
    if field.type == "bool":
        return bool(value)
    if field.type == "lines":
        return [line.strip() for line in str(value or "").splitlines() if line.strip()]
    if field.type == "names":
        return _names(str(value or ""))
    if field.type == "text":
        return str(value or "").strip() or None
    if field.type == "words":
        # A space at the end may be meant.
        return str(value or "") or None
    if field.type == "choice":
        if value not in field.choices:
            raise ConfigError(f"{field.name} is {value!r}; needed: one of {', '.join(field.choices)}")
        return {"true": True, "false": False}.get(value, value)
    if value in (None, ""):
        if field.type in ("int?", "float?"):
            return None
        raise ConfigError(f"{field.name} is empty; needed: a number")
    return _number(field, value)


def _names(text: str) -> Any:
    text = text.strip()
    if text == "all-linear" or not text:
        return text or None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    # One name with regex marks is a regular expression over whole module names.
    if len(parts) == 1 and set(parts[0]) & set("*()[]|\\^$+?"):
        return parts[0]
    return parts


def _number(field: Field, value: Any) -> int | float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{field.name} is {str(value)[:40]!r}; needed: a number") from None
    low = -math.inf if field.min is None else field.min
    high = math.inf if field.max is None else field.max
    if not math.isfinite(number) or not low <= number <= high:
        raise ConfigError(f"{field.name} is {number:g}; needed: {low:g} to {high:g}")
    if field.type.startswith("int"):
        if number != int(number):
            raise ConfigError(f"{field.name} is {number:g}; needed: a whole number")
        return int(number)
    return number


def read_all(fields: Sequence[Field], values: Iterable[Any]) -> Values:
    """Every widget's value at once.

    Raises:
        ConfigError: with every fault, one a line.
    """
    found: Values = {}
    faults = []
    for field, value in zip(fields, values, strict=True):
        try:
            found[field.name] = read(field, value)
        except ConfigError as error:
            faults.append(error.message)
    if faults:
        raise ConfigError("These settings cannot work:\n" + "\n".join(f"- {fault}" for fault in faults))
    return found


def read_parts(*given: Sequence[tuple[Field, Any]]) -> list[Values]:
    """The values of each part of the form, given as fields with their widgets' values; parts may share names.

    Raises:
        ConfigError: with every fault of all.
    """
    parts: list[Values] = []
    faults = []
    for part in given:
        try:
            parts.append(read_all([field for field, _ in part], [value for _, value in part]))
        except ConfigError as error:
            faults += error.message.splitlines()[1:]
    if faults:
        raise ConfigError("\n".join(["These settings cannot work:", *faults]))
    return parts


def preset_values(task: Task, method: Method, preset: Preset) -> tuple[Values, Values]:
    """Every adapter and every training field as a preset sets it, the rest at the form's defaults.

    What the method needs goes before the preset: a rate for LoRA leaves virtual tokens where they are.
    """
    adapter = {field.name: preset.adapter.get(field.name, read_default(field)) for field in method.fields}
    needed = {**preset.training, **method.training}
    training = {field.name: needed.get(field.name, read_default(field)) for field in task.fields}
    return adapter, training


def read_default(field: Field) -> Any:
    """A field's default as the job's value."""
    return read(field, show(field, field.default) if field.default is not None else None)


def job(
    *,
    name: str,
    task: str,
    model: str,
    dataset: Mapping[str, Any],
    eval_split: float,
    method: str | None,
    adapter: Mapping[str, Any],
    training: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    quantization: str = "none",
) -> JobSpec:
    """The job that a filled form describes; without a method, full fine-tuning.

    Raises:
        ConfigError: with every fault of the job.
    """
    own = {key: value for key, value in adapter.items() if value is not None}
    return JobSpec.from_dict(
        {
            "name": name,
            "task": task,
            "model": model.strip(),
            "quantization": quantization,
            "data": {
                "path": dataset["path"],
                "format": dataset["format"],
                "columns": dict(dataset["columns"]),
                "eval_split": eval_split,
                "fixes": dict(dataset.get("fixes") or {}),
            },
            **({"full": True} if method is None else {"adapter": {"method": method, **own}}),
            "training": dict(training),
            "options": {key: value for key, value in (options or {}).items() if value is not None},
        }
    )


def as_yaml(spec: JobSpec | Mapping[str, Any]) -> str:
    """A job as the YAML that `python -m engine train` takes."""
    plain = spec.to_dict() if isinstance(spec, JobSpec) else dict(spec)
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    return text
