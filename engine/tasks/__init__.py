"""The registry of tasks: one line a task, imported when first used."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.tasks.base import Task

TASKS = {
    "causal_lm": "engine.tasks.causal_lm",
    "preference": "engine.tasks.preference",
    "classification": "engine.tasks.classification",
    "seq2seq": "engine.tasks.seq2seq",
    "text_to_image": "engine.tasks.text_to_image",
    "captioning": "engine.tasks.captioning",
}


def tasks_for(format: str) -> list[str]:
    """The tasks that take a data format. Imports them all: for messages, not for every day."""
    return [name for name in TASKS if format in get_task(name).formats]


def get_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task, with a job's options.

    Raises:
        ConfigError: there is no such task, or it has no such option, or the option's value cannot be used.
    """
    if name not in TASKS:
        raise ConfigError(f"There is no task {name!r}.", f"Known tasks: {', '.join(TASKS)}.")
    task: Task = importlib.import_module(TASKS[name]).TASK
    if not options:
        return task
    # An option may have another name in a job than in the record, where its name is taken.
    fields = dataclasses.fields(task)  # type: ignore[arg-type]
    known = {field.metadata.get("option", field.name): field.name for field in fields}
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ConfigError(
            f"The task {name} has no option {', '.join(map(repr, unknown))}.",
            f"Its options: {', '.join(known) or 'none'}.",
        )
    values = {known[key]: value for key, value in options.items()}
    configured: Task = dataclasses.replace(task, **values)  # type: ignore[type-var]
    return configured
