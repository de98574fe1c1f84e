"""The registry of tasks: one line a task, imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.tasks.base import Task

TASKS = {
    "causal_lm": "engine.tasks.causal_lm",
}


def get_task(name: str) -> Task:
    """The task's record.

    Raises:
        ConfigError: there is no such task.
    """
    if name not in TASKS:
        raise ConfigError(f"There is no task {name!r}.", f"Known tasks: {', '.join(TASKS)}.")
    task: Task = importlib.import_module(TASKS[name]).TASK
    return task
