"""A job as text: read from YAML without opening what it names, repeated by a command, compared with another."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from engine.errors import ConfigError
from engine.train.job import JobSpec, TrainingSpec
from studio import forms, recipes
from studio.i18n import N_, t

LONGEST = 100_000
"""Characters of a job's text; the longest that the form writes are a few thousand."""
OUTSIDE = N_(
    "model is {value}, a path outside of this studio's folder; choose the base on the page and leave model out"
)
_DEEPEST = 12
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NOT_COMPARED = ("name", "data.path", "data.format", "data.columns")


def read(text: str, known_base: Callable[[str], str]) -> dict[str, Any]:
    """A job's YAML or JSON as plain data that the form can hold. Its data path is left out and never looked at.

    Args:
        text: what was uploaded or pasted.
        known_base: a base by the name that it has here, "" for one that a file may not name.

    Raises:
        ConfigError: it is no job; or it names what the form has no field for, values out of the fields' bounds, or a
            base that only a person may choose. Every such fault at once.
    """
    raw = _plain(text)
    if isinstance(raw, Mapping) and isinstance(raw.get("data"), Mapping):
        # The rows are chosen on the page; where they lay for somebody else is nothing to be opened here.
        raw = {**raw, "data": {"path": "-", **{k: v for k, v in raw["data"].items() if k == "eval_split"}}}
    elif isinstance(raw, Mapping) and "data" not in raw:
        raw = {**raw, "data": {"path": "-"}}
    spec = JobSpec.from_dict(raw).to_dict()
    faults = _faults(spec)
    base = known_base(spec["model"])
    if not base:
        faults.append(t(OUTSIDE, value=repr(spec["model"])[:80]))
    if faults:
        head = t("This job cannot be taken over:")
        raise ConfigError("\n".join([head, *(f"- {fault}" for fault in faults)]), t("Mend these lines in the file."))
    return {**spec, "model": base, "data": {"path": "", "eval_split": spec["data"]["eval_split"]}}


def _plain(text: str) -> Any:
    """The text as data, refused where it is too long, too deep, or repeats itself by references."""
    if len(text) > LONGEST:
        raise ConfigError(
            t(
                "The text has {count} characters; a job has at most {most}.",
                count=f"{len(text):,}",
                most=f"{LONGEST:,}",
            ),
            t("Choose a job.yaml, not the data."),
        )
    depth = 0
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(
                    t("The job uses a YAML reference (*{name}), which a job does not need.", name=event.anchor),
                    t("Write the value out."),
                )
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise ConfigError(t("The job is nested too deeply."), t("Choose a job.yaml."))
        return yaml.load(text, Loader=_LOADER)
    except (yaml.YAMLError, ValueError) as error:
        said = str(error).splitlines()
        raise ConfigError(
            t("This is no YAML: {reason}", reason=" ".join(said)[:300]), t("Choose a job.yaml, or paste its text.")
        ) from error


def _faults(spec: Mapping[str, Any]) -> list[str]:
    """What the form could not show or would not accept of a checked job, one line each."""
    recipe = recipes.of_spec(spec)
    if spec["task"] not in {task.name for task in recipes.tasks()}:
        return [t("task is {value}, for which there is no form", value=repr(spec["task"]))]
    task, method = recipes.task_of(spec["task"]), recipes.method_of(recipe["adapter"]["method"])
    usual = JobSpec(model="-", data=recipes.NO_DATA).to_dict()["training"]
    parts = {
        "adapter": ({field.name: field for field in method.fields}, dict(spec["adapter"]), {"method": method.name}),
        "training": ({field.name: field for field in task.fields}, spec["training"], usual),
        "options": ({field.name: field for field in task.options}, spec["options"], {}),
    }
    found = []
    for part, (fields, given, free) in parts.items():
        for key, value in given.items():
            if key not in fields:
                if key not in free or free[key] != value:
                    found.append(t("{name} has no field in the form", name=f"{part}.{key}"))
                continue
            try:
                forms.read(fields[key], forms.show(fields[key], value))
            except (ConfigError, TypeError, ValueError, AttributeError) as error:
                said = (
                    error.message
                    if isinstance(error, ConfigError)
                    else t("{name} has a value of a wrong kind", name=key)
                )
                found.append(f"{part}.{said}")
    return found


def command(processes: int = 1, resume: bool = False) -> str:
    """The command line that runs the job that lies beside it as `job.yaml`."""
    words = ["python", "-m", "engine", "train", "job.yaml", "--out", "my-run"]
    words += ["--processes", str(processes)] if processes > 1 else []
    words += ["--resume"] if resume else []
    return shlex.join(words)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Settings in which two jobs differ, as (exact name, old, new), in the order of a job's keys.

    What is not written out counts as its default; names and where the rows lie are left out.
    """
    before, after = _flat(old), _flat(new)
    keys = dict.fromkeys([*after, *before])
    return [(key, _short(before.get(key)), _short(after.get(key))) for key in keys if before.get(key) != after.get(key)]


def _flat(spec: Mapping[str, Any]) -> dict[str, Any]:
    training = {**_DEFAULTS, **spec["training"]}
    whole = {
        "task": spec.get("task", "causal_lm"),
        "model": spec["model"],
        "quantization": spec.get("quantization", "none"),
        "full": bool(spec.get("full")),
        "data": {"eval_split": spec["data"].get("eval_split", 0.1)},
        "adapter": {} if spec.get("full") else {**_usual(spec, "adapter"), **spec["adapter"]},
        "training": training,
        "options": {**_usual(spec, "options"), **(spec.get("options") or {})},
    }
    flat: dict[str, Any] = {}
    for key, value in whole.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": _comparable(inner) for name, inner in value.items()}
        else:
            flat[key] = value
    # Left out and empty say the same.
    return {key: value for key, value in flat.items() if value not in (None, "", []) and key not in _NOT_COMPARED}


def _usual(spec: Mapping[str, Any], part: str) -> dict[str, Any]:
    """What the fields of the job's method (`adapter`) or task (`options`) are where it leaves them out.

    Targets that are left out are the task's own, not the form's first choice.
    """
    task = recipes.task_of(spec.get("task", "causal_lm"))
    method = "" if spec.get("full") else str(spec["adapter"].get("method"))
    return {
        owned.field.name: forms.read_default(owned.field)
        for owned in recipes.fields()
        if (owned.method if part == "adapter" else owned.task)
        and owned.shows(task, method)
        and owned.field.name != "target_modules"
    }


def _comparable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.12g}"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


_DEFAULTS = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(TrainingSpec()).items()}
