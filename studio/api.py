"""The public endpoints: upload, train, watch, steer, compare, score, for `gradio_client` and scripts.

Each answers plain data. A refusal is `{"error": {"code", "message", "hint"}}`, never a traceback.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from engine.errors import ConfigError, EngineError
from engine.train.job import TASKS, JobSpec
from studio import (
    adapter_api,
    compare_api,
    data_api,
    presets,
    run_api,
    score_words,
    scores,
    shelf_api,
    states,
)
from studio.answers import Answers
from studio.comparing import answer
from studio.context import Studio
from studio.datasets import Datasets
from studio.faults import is_memory, memory_event, unexpected_event
from studio.pictures import inlined
from studio.store import StateError

logger = logging.getLogger("studio.api")

Answer = dict[str, Any]

COMMANDS = ("stop", "pause", "resume", "checkpoint", "sample")


_LAST_EVENT = 2**63 - 1
"""The largest id that SQLite can hold."""


def refusal(fault: Exception) -> Answer:
    """An error as the endpoints answer it; one that nobody foresaw goes to the log with its traceback."""
    if isinstance(fault, EngineError):
        event: Answer = dict(fault.to_event())
    else:
        logger.error("An endpoint met an unexpected error.", exc_info=fault)
        event = memory_event(fault) if is_memory(fault) else unexpected_event(fault)
    return {"error": {key: event[key] for key in ("code", "message", "hint")}}


def _guarded(function: Callable[..., Answer]) -> Callable[..., Answer]:
    @functools.wraps(function)
    def guarded(*arguments: Any) -> Answer:
        try:
            if _too_large(arguments):
                raise ConfigError("A number is too large.", "Numbers of up to 63 bits are taken.")
            return function(*arguments)
        except Exception as fault:
            return refusal(fault)

    return guarded


def _too_large(value: Any) -> bool:
    """Whether a whole number that no column of the database can hold stands in it."""
    if isinstance(value, dict):
        return any(map(_too_large, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_too_large, value))
    return isinstance(value, int) and abs(value) >= 2**63


class Endpoints:
    """The functions behind the endpoints, callable without a server."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.datasets = Datasets(studio.store, studio.home)

    def upload_data(self, path: str | None, name: str = "") -> Answer:
        """Add a csv, tsv, json, jsonl, parquet or txt file: its id, format, columns, and what is wrong with it."""
        if name is not None and not isinstance(name, str):
            raise ConfigError(f"name is {_short(name)}; needed: text, or nothing.")
        if not path:
            raise ConfigError("No file was sent.", "Send a csv, tsv, json, jsonl, parquet or txt file.")
        return shelf_api.described(self.datasets.bring_in(Path(path), name or None))

    def submit_run(self, job: Answer) -> Answer:
        """Queue a run. `job` has a job's keys; `dataset` (an id) stands for `data`, `preset` fills what is left out."""
        if not isinstance(job, dict):
            raise ConfigError("A job must be a mapping of keys to values.")
        _check_kinds(job)
        job = {**job}
        dataset_id = job.pop("dataset", None)
        row = self.studio.store.dataset(dataset_id)
        if not row["format"] or not row["rows"]:
            raise StateError(
                f"The data set {row['name']!r} has no rows to train on.", "Say which column is which first."
            )
        if "data" in job and set(job["data"] or {}) - {"eval_split"}:
            raise ConfigError("Only data.eval_split can be given here; the rows come from `dataset`.")
        split = (job.get("data") or {}).get("eval_split", 0.1)
        name, given = job.pop("preset", None), job.get("training") or {}
        task = presets.tasks().get(job.get("task", "causal_lm"), None)
        if name is not None:
            if task is None or name not in task.presets:
                known = ", ".join(task.presets) if task else ""
                raise ConfigError(f"There is no preset {name!r}.", f"Known: {known}.")
            preset = task.presets[name]
            job["training"] = {**preset.training, **given}
            job["options"] = {**preset.options, **(job.get("options") or {})}
        if name is not None and not job.get("full"):
            own = job.get("adapter") or {}
            method = presets.methods().get(own.get("method", preset.adapter["method"]))
            # Another method has other fields, and usually another learning rate, than the preset's.
            same = method is None or method.name == preset.adapter["method"]
            # Nor need it bear a base in few bits.
            if same:
                job.setdefault("quantization", preset.quantization)
            usual = {} if same or method is None else method.training
            job["adapter"] = {**(preset.adapter if same else {}), **own}
            job["training"] = {**job["training"], **usual, **given}
        said = {key: row[key] for key in ("path", "format", "columns", "fixes")}
        job["data"] = {**said, "eval_split": split}
        return {"run": self.studio.jobs.submit(JobSpec.from_dict(job), dataset_id)}

    def run_status(self, run: str, since: int = 0) -> Answer:
        """A run's state and progress, and its events after the id `since` (at most 500; ask again from the last)."""
        row = self.studio.store.run(run)
        after = _event_id(since)
        kept = ("id", "name", "state", "model", "method", "step", "total_steps", "loss", "eval_loss", "error", "colour")
        events = [_told(event) for event in self.studio.store.since(run, after)[:500]]
        return {
            **{key: row[key] for key in kept},
            "live": row["state"] in states.LIVE,
            "has_adapter": self.studio.jobs.has_adapter(run),
            "has_checkpoint": self.studio.jobs.has_checkpoint(run),
            "events": events,
        }

    def control_run(self, run: str, command: str) -> Answer:
        """Steer a run: stop, pause, resume, checkpoint or sample. Answers its state."""
        self.studio.store.run(run)
        if command not in COMMANDS:
            raise StateError(f"There is no command {str(command)[:40]!r}.", f"Known: {', '.join(COMMANDS)}.")
        getattr(self.studio.jobs, command)(run)
        return {"run": run, "state": self.studio.store.run(run)["state"]}

    def list_runs(self) -> Answer:
        """Every run that is not in the bin, newest first."""
        kept = ("id", "name", "state", "model", "method", "step", "total_steps", "loss", "eval_loss")
        return {"runs": [{key: row[key] for key in kept} for row in self.studio.store.runs()]}

    def compare(
        self, base: str, runs: list[str], prompt: str, seed: int = 0, temperature: float = 0.3, max_new_tokens: int = 80
    ) -> Iterator[Answer]:
        """Answer one prompt with the base and up to seven others; streams, the last message is complete.

        `runs` are ids of runs, ids of adapters, or keys of `list_columns`; all answer from one batch.
        """
        try:
            for label, value in (("base", base), ("prompt", prompt)):
                if not isinstance(value, str):
                    raise ConfigError(f"{label} is {_short(value)}; needed: text.")
            how = sampling(seed, temperature, max_new_tokens)
            for state in answer(self.studio, base, _names(runs), prompt, how):
                yield _plain(state)
        except Exception as fault:
            yield refusal(fault)

    def score_run(self, run: str, rows: int = 8, answers: int = 64) -> Answer:
        """Score a finished run's base and adapter on the rows that it held back; goes on in a process of its own.

        `rows` are kept with both answers; `answers` rows are answered in words for metrics of texts. One run is scored
        at a time. Ask `run_scores` for what came of it.
        """
        score = self.studio.scoring.start(run, rows, answers)
        return {"run": run, "score": score, "held_back": self.studio.scoring.held_back(run)}

    def run_scores(self, run: str) -> Answer:
        """A run's newest scores: base and adapter by metric, rows with both answers; and its newest evaluation's state.

        `state` is null before the first one; `better` is `base`, `adapter` or "". Pictures come as `data:` addresses.
        """
        row, scoring = self.studio.store.run(run), self.studio.scoring
        live = scoring.present()
        live = live if live and live["run_id"] == run else None
        newest, done = scoring.newest(run), scoring.scored(run)
        message, fraction = live["progress"] if live else ("", None)
        result = done["result"] if done else {"scores": [], "rows": [], "notes": []}
        better = {
            name: scores.better(name, *(pair.get(who, {}).get("value") for who in ("base", "adapter")))
            for name, pair in scores.sides(result).items()
        }
        pictured = score_words.PICTURED.get(row["task"], set())
        return {
            "run": run,
            "state": newest["state"] if newest else None,
            "live": live is not None,
            "message": message,
            "fraction": fraction,
            "error": newest["error"] if newest else None,
            "fresh": bool(done and done["fresh"]),
            "scores": result["scores"],
            "better": better,
            "rows": [{key: inlined(it[key]) if key in pictured else it[key] for key in it} for it in result["rows"]],
            "notes": result["notes"],
        }

    def leaderboard(self, dataset: str = "", task: str = "", metric: str = "") -> Answer:
        """The scored runs of a data set and task, the best first, with what each cost; without both: which there are.

        `metric` is one of those in `metrics`, by default the first. Rows with a null `run` are bases.
        """
        boards = self.studio.scoring.boards()
        if not dataset and not task:
            return {"boards": [{"dataset": one, "task": other} for one, other in boards]}
        self.studio.store.dataset(dataset)
        if not isinstance(task, str) or task not in TASKS:
            raise ConfigError(f"There is no task {_short(task)}.", f"Known: {', '.join(TASKS)}.")
        entries = self.studio.scoring.entries(dataset, task)
        metrics = scores.offered(entries)
        if metric and metric not in metrics:
            raise ConfigError(
                f"No run here has the metric {_short(metric)}.", f"Known: {', '.join(metrics) or 'none'}."
            )
        name = metric or next(iter(metrics), "")
        best = {cost: {entry.run for entry in scores.front(entries, name, cost)} for cost in scores.COSTS}
        rows = [
            {
                "run": entry.run or None,
                "name": entry.name,
                "base": entry.base,
                "method": entry.method,
                "value": entry.value(name),
                "rows": entry.values.get(name, (None, 0))[1],
                "trained": entry.trained,
                "bytes": entry.bytes,
                "peak_bytes": entry.peak,
                "seconds": entry.seconds,
                "note": entry.note,
                "best_for": [cost for cost, runs in best.items() if entry.run in runs],
            }
            for entry in scores.ranked(entries, name)
        ]
        sense = scores.metric(name).hint if name else ""
        return {"dataset": dataset, "task": task, "metric": name, "sense": sense, "metrics": metrics, "rows": rows}


def _short(value: Any) -> str:
    return repr(value)[:40]


def _check_kinds(job: Answer) -> None:
    """Refuse a job whose values are of the wrong kind, all at once; None stands for a part that is left out."""
    found = [
        f"{key} is {_short(job[key])}; needed: text"
        for key in ("task", "name", "quantization")
        if key in job and not isinstance(job[key], str)
    ]
    if job.get("preset") is not None and not isinstance(job["preset"], str):
        found.append(f"preset is {_short(job['preset'])}; needed: the name of a preset, or nothing")
    if "full" in job and not isinstance(job["full"], bool):
        found.append(f"full is {_short(job['full'])}; needed: true or false")
    for key in ("adapter", "training", "data"):
        if job.get(key) is not None and not isinstance(job[key], dict):
            found.append(f"{key} is {_short(job[key])}; needed: a mapping")
    adapter = job.get("adapter")
    if isinstance(adapter, dict) and "method" in adapter and not isinstance(adapter["method"], str):
        found.append(f"adapter.method is {_short(adapter['method'])}; needed: the name of a method")
    if found:
        raise ConfigError("The job cannot run:\n" + "\n".join(f"- {fault}" for fault in found))


def _told(event: Mapping[str, Any]) -> dict[str, Any]:
    """An event without paths of this machine: they are nobody's business, and a client would fetch a `path`."""
    hidden = {"path", "adapter", "model", "checkpoint", "file", "image"}
    if event.get("image") and event["image"] == event.get("prompt"):
        # What a picture is described from is the picture's path.
        hidden.add("prompt")
    return {key: value for key, value in event.items() if key not in hidden}


def _event_id(since: Any) -> int:
    if since is None:
        return 0
    if isinstance(since, bool) or not isinstance(since, int | float) or not 0 <= since <= _LAST_EVENT:
        raise ConfigError(f"since is {_short(since)}; needed: the id of an event.", "0 gives every event.")
    return int(since)


def _names(runs: Any) -> list[str]:
    if not isinstance(runs, list) or not all(isinstance(run, str) for run in runs):
        raise ConfigError("`runs` must be a list of ids.", "An empty list asks the base alone.")
    return runs


def sampling(seed: Any, temperature: Any, max_new_tokens: Any) -> Answer:
    """How an endpoint was asked to choose the next token.

    Raises:
        ConfigError: a number out of its bounds.
    """
    bounds = {
        "seed": (seed, 0, 2**31 - 1),
        "temperature": (temperature, 0, 2),
        "max_new_tokens": (max_new_tokens, 1, 4096),
    }
    for name, (value, low, high) in bounds.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ConfigError(f"{name} is {str(value)[:40]}; needed: {low} to {high}.")
    return {"seed": int(seed), "temperature": float(temperature), "max_new_tokens": int(max_new_tokens)}


def _plain(state: Answers) -> Answer:
    columns = [
        {
            "run": c.run,
            "title": c.title,
            "text": c.text,
            "done": c.done,
            "reason": c.reason,
            "picture": inlined(c.picture),
        }
        for c in state.columns
    ]
    return {"columns": columns, "finished": state.finished, "status": state.status, "comparison": state.kept}


def build(studio: Studio) -> None:
    """Register the endpoints on the page that is being built."""
    ends = Endpoints(studio)
    with gr.Row(visible=False):
        file, name, found = gr.File(), gr.Textbox(), gr.JSON()
        # A File input accepts only what was uploaded to this server, never a path of its disk.
        gr.Button().click(_guarded(ends.upload_data), [file, name], found, api_name="upload_data")

    def submit_run(job: dict) -> dict:  # type: ignore[type-arg]
        return _guarded(ends.submit_run)(job)

    def run_status(run: str, since: int = 0) -> dict:  # type: ignore[type-arg]
        return _guarded(ends.run_status)(run, since)

    def control_run(run: str, command: str) -> dict:  # type: ignore[type-arg]
        return _guarded(ends.control_run)(run, command)

    def list_runs() -> dict:  # type: ignore[type-arg]
        return _guarded(ends.list_runs)()

    def compare(
        base: str, runs: list[str], prompt: str, seed: int = 0, temperature: float = 0.3, max_new_tokens: int = 80
    ) -> Iterator[dict]:  # type: ignore[type-arg]
        yield from ends.compare(base, runs, prompt, seed, temperature, max_new_tokens)

    def score_run(run: str, rows: int = 8, answers: int = 64) -> dict:  # type: ignore[type-arg]
        return _guarded(ends.score_run)(run, rows, answers)

    def run_scores(run: str) -> dict:  # type: ignore[type-arg]
        return _guarded(ends.run_scores)(run)

    def leaderboard(dataset: str = "", task: str = "", metric: str = "") -> dict:  # type: ignore[type-arg]
        return _guarded(ends.leaderboard)(dataset, task, metric)

    functions = (submit_run, run_status, control_run, list_runs, compare, score_run, run_scores, leaderboard)
    for function in functions:
        function.__doc__ = getattr(ends, function.__name__).__doc__
        gr.events.api(function, api_name=function.__name__, concurrency_limit=8)
    adapter_api.build(studio, _guarded)
    data_api.build(studio, _guarded)
    shelf_api.build(studio, _guarded)
    compare_api.build(studio, _guarded)
    run_api.build(studio, _guarded)
