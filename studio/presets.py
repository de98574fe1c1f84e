"""The recipes and form fields of `presets/`, read with the safe loader and checked once."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engine.errors import ConfigError
from engine.paths import REPOSITORY
from engine.train.job import QUANTIZATIONS

FOLDER = REPOSITORY / "presets"
KINDS = ("int", "int?", "float", "float?", "bool", "choice", "names", "lines", "text", "words")


@dataclass(frozen=True)
class Field:
    """One setting of a form.

    Attributes:
        name: the setting's exact name in the job.
        label: its plain name.
        help: one line about what it does.
        type: `int`, `float`, the same with `?` (may be empty), `bool`, `choice`, `names` (comma-separated),
            `lines`, or `text` (one line of words; nothing when empty).
        group: `main`, or the part of Advanced where it stands.
    """

    name: str
    label: str
    help: str
    type: str
    group: str
    default: Any = None
    min: float | None = None
    max: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.type not in KINDS:
            raise ConfigError(f"The form field {self.name} has the type {self.type!r}; known: {', '.join(KINDS)}.")


@dataclass(frozen=True)
class Preset:
    """A whole recipe: adapter and training fields that differ from the form's defaults, the base's memory and the
    task's own options."""

    name: str
    title: str
    meaning: str
    adapter: Mapping[str, Any]
    training: Mapping[str, Any]
    eval_split: float = 0.1
    quantization: str = "none"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.quantization not in QUANTIZATIONS:
            raise ConfigError(
                f"The preset {self.name} has the quantization {self.quantization!r}; known: {', '.join(QUANTIZATIONS)}."
            )


@dataclass(frozen=True)
class Method:
    """An adapter method as the form shows it.

    `presets` change its own fields; `training` holds the training settings that it usually needs, where they differ
    from LoRA's.
    """

    name: str
    title: str
    meaning: str
    when: str
    paper: str
    fields: tuple[Field, ...]
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A task as the form shows it, with its recipes in order.

    `formats` are those of the data it learns from, `base` the one that is chosen at first, `options` the fields of the
    task's own options.
    """

    name: str
    title: str
    fields: tuple[Field, ...]
    presets: Mapping[str, Preset]
    meaning: str
    formats: tuple[str, ...]
    base: str
    options: tuple[Field, ...] = ()


# libyaml's reader is as safe and ten times as quick, which a start of the server feels.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@functools.cache
def _read(path: Path) -> dict[str, Any]:
    raw: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
    return raw


def _fields(raw: list[dict[str, Any]]) -> tuple[Field, ...]:
    return tuple(Field(**{**item, "choices": tuple(item.get("choices", ()))}) for item in raw)


@functools.cache
def methods() -> dict[str, Method]:
    """Method name -> its form."""
    found = {}
    for path in sorted((FOLDER / "methods").glob("*.yaml")):
        raw = _read(path)
        found[raw["method"]] = Method(
            name=raw["method"],
            title=raw["title"],
            meaning=raw["meaning"],
            when=raw["when"],
            paper=raw["paper"],
            fields=_fields(raw["fields"]),
            presets=raw.get("presets", {}),
            training=raw.get("training", {}),
        )
    return found


@functools.cache
def tasks() -> dict[str, Task]:
    """Task name -> its form and recipes."""
    found = {}
    for path in sorted((FOLDER / "tasks").glob("*.yaml")):
        raw = _read(path)
        recipes = {name: Preset(name=name, **item) for name, item in raw["presets"].items()}
        fields = raw["fields"]
        if isinstance(fields, str):
            # The fields of another task, by its name.
            without = set(raw.get("without", ()))
            others = _read(FOLDER / "tasks" / f"{fields}.yaml")["fields"]
            fields = [item for item in others if item["name"] not in without]
        found[raw["task"]] = Task(
            name=raw["task"],
            title=raw["title"],
            meaning=raw["meaning"],
            fields=_fields(fields),
            presets=recipes,
            formats=tuple(raw["formats"]),
            base=raw["base"],
            options=_fields(raw.get("options", [])),
        )
    return found
