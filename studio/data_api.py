"""The public endpoints of data sets: rows, problems and fixes, tokens, sides, names, the bin. See `studio.api`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from engine import data
from engine.errors import ConfigError
from studio import data_rows, dataset_shelf, recipes, token_panel
from studio.context import Studio
from studio.datasets import Checked, Datasets
from studio.pictures import inlined
from studio.store import Row, StateError

Answer = dict[str, Any]
Guard = Callable[[Callable[..., Answer]], Callable[..., Answer]]
MOST_ROWS = 200

ENDPOINTS = (
    "list_datasets",
    "dataset_rows",
    "dataset_problems",
    "fix_dataset",
    "token_preview",
    "token_lengths",
    "dataset_sides",
    "dataset_history",
    "rename_dataset",
    "delete_dataset",
    "restore_dataset",
    "empty_dataset_bin",
)
"""The methods that are served as they are; a file is sent to `upload_data`."""


class DataEndpoints:
    """The functions behind the endpoints, callable without a server."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.datasets = Datasets(studio.store, studio.home)

    def list_datasets(self, deleted: bool = False) -> Answer:
        """Data sets, newest first; those in the bin when `deleted`."""
        store = self.studio.store
        rows = dataset_shelf.in_bin(store) if deleted is True else store.datasets()
        return {"datasets": [_dataset(row) for row in rows]}

    def dataset_rows(self, dataset: str, page: int = 1, search: str = "", rows: int = 20) -> Answer:
        """A page of the rows that are kept, `rows` each (at most 200); all words of `search` have to stand in a row.

        Pictures come as `data:` addresses.
        """
        found, size = self._ready(dataset), _whole(rows, "rows", 1, MOST_ROWS)
        shown = data_rows.page(found, _text(search, "search"), _whole(page, "page", 1, 10**9), size)
        examples = [{**one, "image": inlined(one["image"])} if "image" in one else dict(one) for one in shown.examples]
        return {"rows": examples, "page": shown.number, "pages": shown.pages, "found": shown.count}

    def dataset_problems(self, dataset: str) -> Answer:
        """What was skipped, mended or noted: counts by cause, what can be done about each, the first rows; the fixes.

        `kept` and `skipped` add up to `total`.
        """
        prepared = self._ready(dataset).prepared
        assert prepared is not None
        return {
            "kept": prepared.kept,
            "skipped": prepared.skipped,
            "total": prepared.total,
            "causes": {
                code: {"count": count, "remedies": list(data.REMEDIES.get(code, ()))}
                for code, count in prepared.counts.items()
            },
            "problems": [problem.to_dict() for problem in prepared.problems[:MOST_ROWS]],
            "fixes": dict(self.studio.store.dataset(dataset)["fixes"]),
        }

    def fix_dataset(self, dataset: str, cause: str, action: str = "") -> Answer:
        """Decide about a cause: one of its remedies (`fill:WORDS` for words), or "" to take a decision back.

        Answers the new version, whose id is to be used from now on; the file is not changed.
        """
        found = self.datasets.fix(dataset, _text(cause, "cause"), _text(action, "action"))
        assert found.prepared is not None
        return {
            "dataset": found.id,
            "fixes": dict(found.fixes),
            "kept": found.prepared.kept,
            "skipped": found.prepared.skipped,
        }

    def token_preview(
        self,
        dataset: str,
        base: str = "",
        task: str = "",
        max_length: int = 0,
        loss_on: str = "answers",
        first: int = 0,
        rows: int = 5,
    ) -> Answer:
        """`rows` rows from place `first` on (from 0) as tokens of a base: each with its text, learned, read or cut.

        Left out, the base, the task and the length are what the Data page would begin with. Marks add up: 1 learned,
        2 special, 4 cut off, 8 part of the character that the token before shows.
        """
        found, asked = self._asked(dataset, base, task, max_length, loss_on)
        assert found.prepared is not None
        at, count = _whole(first, "first", 0, 10**9), _whole(rows, "rows", 1, 50)
        read = token_panel.read(self.studio, asked, found.prepared.examples[at : at + count])
        return {"base": asked.base, "task": asked.task, "max_length": asked.length, "rows": read}

    def token_lengths(
        self,
        dataset: str,
        base: str = "",
        task: str = "",
        max_length: int = 0,
        loss_on: str = "answers",
        most: int = token_panel.SAMPLED,
    ) -> Answer:
        """Lengths of at most `most` rows in tokens, evenly chosen; how many are cut, and have nothing left to learn."""
        found, asked = self._asked(dataset, base, task, max_length, loss_on)
        *_, counted = token_panel.lengths(self.studio, found, asked, _whole(most, "most", 1, 10**7))
        learns = asked.task not in ("classification", "text_to_image")
        return {
            "base": asked.base,
            "task": asked.task,
            "limit": max((row[3] for row in counted), default=0),
            "rows": len(counted),
            "lengths": [row[0] for row in counted],
            "cut": sum(row[1] > 0 for row in counted),
            "nothing_learned": sum(row[2] == 0 for row in counted) if learns else 0,
        }

    def dataset_sides(self, dataset: str, eval_split: float = 0.1, seed: int = 0) -> Answer:
        """How many rows would be trained on and held back, the first lines held back, and what stands on both sides."""
        if isinstance(eval_split, bool) or not isinstance(eval_split, int | float):
            raise ConfigError(f"eval_split is {str(eval_split)[:40]!r}; needed: 0 to 0.5.")
        prepared = self._ready(dataset).prepared
        assert prepared is not None
        train, held = data.split(prepared.examples, float(eval_split), _whole(seed, "seed", 0, 2**32 - 1))
        leak = data.leaks(train, held)
        return {
            "train": len(train),
            "held": len(held),
            "lines": [one["line"] for one in held[:MOST_ROWS]],
            "both": {"rows": leak.rows, "questions": leak.questions, "answers": leak.answers},
        }

    def dataset_history(self, dataset: str) -> Answer:
        """What happened to a data set, the latest first; the runs that learned from it; the bytes it takes."""
        row = self.studio.store.dataset(dataset)
        runs = dataset_shelf.runs(self.studio.store, row["file"])
        return {
            "dataset": _dataset(row),
            "history": dataset_shelf.history(self.studio.store, row["file"]),
            "runs": [{key: run[key] for key in ("id", "name", "state", "created", "dataset")} for run in runs],
            "bytes": dataset_shelf.size(self.datasets.folder, row["file"]),
        }

    def rename_dataset(self, dataset: str, name: str) -> Answer:
        """Give a data set another name."""
        return {"dataset": _dataset(dataset_shelf.rename(self.studio.store, dataset, _text(name, "name")))}

    def delete_dataset(self, dataset: str) -> Answer:
        """Put a data set with all its versions into the bin; refused while a run that needs it has not ended."""
        dataset_shelf.into_bin(self.studio.store, dataset)
        return {"dataset": dataset, "deleted": True}

    def restore_dataset(self, dataset: str) -> Answer:
        """Take a data set out of the bin."""
        dataset_shelf.take_out(self.studio.store, self.studio.store.dataset(dataset)["file"])
        return {"dataset": dataset, "deleted": False}

    def empty_dataset_bin(self) -> Answer:
        """Remove the data sets in the bin with their files, for good; those that a run still names are kept."""
        gone, kept = dataset_shelf.empty(self.studio.store, self.datasets.folder)
        return {"removed": len(gone), "kept": [row["name"] for row in kept]}

    def _ready(self, dataset: str) -> Checked:
        found = self.datasets.open(dataset)
        if found.fault is not None:
            raise found.fault
        if found.prepared is None:
            raise StateError("It is not said yet what the columns are.", "Say which column is which on the Data page.")
        return found

    def _asked(
        self, dataset: str, base: str, task: str, max_length: int, loss_on: str
    ) -> tuple[Checked, token_panel.Asked]:
        found = self._ready(dataset)
        tasks = recipes.tasks_for(found.format)
        if not tasks:
            raise StateError(f"No task learns from rows of the format {found.format}.")
        form = recipes.task_of(_text(task, "task")) if task else tasks[0]
        if form not in tasks:
            raise ConfigError(
                f"The task {form.name} does not learn from the format {found.format}.",
                f"Tasks that do: {', '.join(one.name for one in tasks)}.",
            )
        length = _whole(max_length, "max_length", 0, 10**6) or token_panel.usual_length(form)
        chosen = _text(base, "base") or token_panel.first_base(form)
        return found, token_panel.Asked.of(form.name, chosen, length, _text(loss_on, "loss_on"))


def _dataset(row: Row) -> Answer:
    kept = ("id", "name", "format", "columns", "rows", "fixes", "file", "file_name", "created")
    return {**{key: row[key] for key in kept}, "deleted": row["deleted_at"] is not None}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{name} is {str(value)[:40]!r}; needed: text.")
    return value


def _whole(value: Any, name: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or not low <= value <= high:
        raise ConfigError(f"{name} is {str(value)[:40]!r}; needed: a whole number from {low} to {high:,}.")
    return int(value)


def build(studio: Studio, guarded: Guard) -> None:
    """Register the endpoints on the page that is being built."""
    ends = DataEndpoints(studio)
    for name in ENDPOINTS:
        gr.events.api(guarded(getattr(ends, name)), api_name=name, concurrency_limit=8)
