"""The public endpoints that say what a data set's columns are, and end an evaluation. See `studio.api`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from engine import data
from engine.errors import ConfigError
from studio.context import Studio
from studio.datasets import Checked, Datasets

Answer = dict[str, Any]
Guard = Callable[[Callable[..., Answer]], Callable[..., Answer]]

ENDPOINTS = ("map_dataset", "stop_scoring")
"""The methods that are served as they are."""


class ShelfEndpoints:
    """The functions behind the endpoints, callable without a server."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.datasets = Datasets(studio.store, studio.home)

    def map_dataset(self, dataset: str, format: str, columns: dict[str, str]) -> Answer:
        """Say what a data set is read as and which column plays which role; answers as `upload_data` does.

        `format` is for example `prompt_completion`, `columns` a mapping of role to column; what is left out is guessed.
        """
        if not isinstance(format, str) or format not in data.FORMATS:
            raise ConfigError(f"There is no format {repr(format)[:40]}.", f"Known: {', '.join(data.FORMATS)}.")
        named = columns if columns is not None else {}
        if not isinstance(named, dict) or not all(isinstance(it, str) for pair in named.items() for it in pair):
            raise ConfigError("`columns` must be a mapping of role to column.", 'For example {"prompt": "question"}.')
        return described(self.datasets.check(dataset, format, named))

    def stop_scoring(self) -> Answer:
        """End the evaluation that is under way; nothing of it counts."""
        self.studio.scoring.stop()
        return {"stopped": True}


def described(found: Checked) -> Answer:
    """A checked data set as the endpoints answer it.

    Raises:
        DataError: nothing of it could be used.
    """
    if found.fault is not None:
        raise found.fault
    answered: Answer = {
        "dataset": found.id,
        "name": found.name,
        "format": found.format,
        "columns": dict(found.columns),
        "available": list(found.available),
        "reason": found.reason,
        "guessed": found.guessed,
    }
    if found.prepared is not None:
        answered |= {"profile": data.profile(found.prepared)}
        answered["problems"] = [problem.to_dict() for problem in found.prepared.problems[:100]]
    return answered


def build(studio: Studio, guarded: Guard) -> None:
    """Register the endpoints on the page that is being built."""
    ends = ShelfEndpoints(studio)
    for name in ENDPOINTS:
        gr.events.api(guarded(getattr(ends, name)), api_name=name, concurrency_limit=8)
