"""One prompt, answered by the base and by adapters side by side: what to ask, and how the answers look."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, EngineError, PromptError
from engine.models.catalogue import BUILTIN
from studio.context import Studio
from studio.datasets import first_prompt
from studio.markup import BASE_COLOUR, dot, esc, seconds
from studio.pictures import thumbnail
from studio.store import Row, StateError

MOST_ADAPTERS = 6
_EVERY = 0.1


@dataclass
class Column:
    """One answer.

    Attributes:
        run: the run whose adapter answers; None for the base.
        title: its head.
        colour: its colour.
        text: so far.
        done: whether it is complete.
        reason: `stop` or `length`, when done.
        picture: the file of the answer, where it is a picture.
    """

    run: str | None
    title: str
    colour: str
    text: str = ""
    done: bool = False
    reason: str = ""
    picture: str = ""


@dataclass
class Answers:
    """The state of one comparison while it streams."""

    columns: list[Column]
    status: str = ""
    fraction: float | None = None
    finished: bool = False
    took: float = 0.0
    began: float = field(default_factory=time.monotonic)


def finished_runs(studio: Studio) -> list[Row]:
    """The runs that have an adapter, newest first; not those whose adapter is in the bin."""
    gone = {row["run_id"] for row in studio.library.rows(deleted=True)}
    return [row for row in studio.store.runs() if row["id"] not in gone and studio.jobs.has_adapter(row["id"])]


def task_of(studio: Studio, base: str | None) -> str:
    """What a base is for: the task of its newest run, else the first that it is built in for."""
    rows = (row for row in finished_runs(studio) if row["model"] == base)
    newest = next((str(row["spec"].get("task", "causal_lm")) for row in rows), None)
    builtin = BUILTIN.get(base or "")
    return newest or (builtin.tasks[0] if builtin else "causal_lm")


def fitting(studio: Studio, run_id: str) -> str:
    """A prompt that fits what the run learned from; "" where nothing says one."""
    row = studio.store.run(run_id)
    samples = row["spec"]["training"].get("sample_prompts") or []
    if samples:
        return str(samples[0])
    try:
        return first_prompt(studio.store.dataset(row["dataset"]))
    except EngineError:
        return ""


def check(studio: Studio, base: str, runs: Sequence[str], prompt: str, picture: str | None = None) -> list[Row]:
    """The rows of the runs asked for.

    Raises:
        ConfigError, PromptError, StateError, UnknownError: what cannot be asked.
    """
    if not base or not str(base).strip():
        raise ConfigError("No base is chosen.", "Choose a base model.")
    if task_of(studio, base) == "captioning":
        if not picture:
            raise PromptError("There is no picture.", "Choose the picture that should be described.")
    elif not prompt or not prompt.strip():
        raise PromptError("The prompt is empty.", "Write what the base and the adapters should answer.")
    if len(runs) > MOST_ADAPTERS:
        raise ConfigError(
            f"{len(runs)} adapters are chosen; at most {MOST_ADAPTERS} fit side by side.", "Choose fewer."
        )
    rows = [studio.store.run(run_id) for run_id in dict.fromkeys(runs)]
    for row in rows:
        if row["model"] != base:
            raise StateError(f"The adapter of {row['name']!r} belongs to the base {row['model']}, not {base}.")
        if row["deleted_at"] is not None or not studio.jobs.has_adapter(row["id"]):
            raise StateError(f"The run {row['name']!r} has no adapter to compare.", "Choose a finished run.")
    return rows


def answer(
    studio: Studio,
    base: str,
    runs: Sequence[str],
    prompt: str,
    sampling: Mapping[str, Any],
    picture: str | None = None,
) -> Iterator[Answers]:
    """Ask the base and the adapters; yields the growing answers, at most ten times a second, and keeps the last.

    `picture` is the file of a picture that was brought in, for a base that describes pictures.

    Raises:
        EngineError: see `check`; or the inference process reported something.
    """
    rows, task = check(studio, base, runs, prompt, picture), task_of(studio, base)
    columns = [Column(None, "base", BASE_COLOUR), *(Column(row["id"], row["name"], row["colour"]) for row in rows)]
    state = Answers(columns, status="Waking the base")
    yield state
    folders = {_version(studio, row["id"]): studio.jobs.folder(row["id"]) / "adapter" for row in rows}
    who = [None, *folders]
    messages = [{"role": "user", "content": prompt, **({"image": picture} if picture else {})}]
    last = 0.0
    with closing(studio.inference.generate(base, folders, messages, who, sampling, task)) as stream:
        for news in stream:
            if news["type"] == "progress":
                state.status, state.fraction = news["message"], news.get("fraction")
            else:
                column = columns[news["index"]]
                column.text += news["text"]
                column.picture = news.get("picture", "")
                column.done, column.reason = news["done"], news.get("reason") or ""
                state.status, state.fraction = "", None
            if time.monotonic() - last >= _EVERY:
                last = time.monotonic()
                yield state
    state.finished, state.took, state.status = True, time.monotonic() - state.began, ""
    for column in columns:
        column.done = True
    names = ("run", "title", "colour", "text", "reason", "picture")
    kept = [{name: getattr(column, name) for name in names} for column in columns]
    studio.store.add_comparison(base, f"picture {Path(picture).name}" if picture else prompt, dict(sampling), kept)
    yield state


def _version(studio: Studio, run_id: str) -> str:
    """A name for the adapter as it is on disk now: a run that was resumed must not answer with its older self."""
    changed = (studio.jobs.folder(run_id) / "adapter" / "adapter_config.json").stat().st_mtime_ns
    return f"{run_id}-{changed}"


def columns_html(state: Answers) -> str:
    """The answers side by side; under each other on a narrow screen."""
    parts = [_column(column, state) for column in state.columns]
    share = f" ({state.fraction * 100:.0f} %)" if state.fraction is not None else ""
    tail = (
        f"Answered in {seconds(state.took) if state.took >= 1 else 'under a second'}."
        if state.finished
        else f"{state.status}{share} ..."
        if state.status
        else ""
    )
    return f'<div class="st-columns">{"".join(parts)}</div><p class="st-hint" aria-live="polite">{esc(tail)}&nbsp;</p>'


def _column(column: Column, state: Answers) -> str:
    text = thumbnail(column.picture, column.title, 240) if column.picture else esc(column.text)
    if not text and not column.done:
        text = '<span class="skeleton" style="width:92%"></span><span class="skeleton" style="width:64%"></span>'
    elif not column.done and not state.finished:
        text += '<span class="caret"></span>'
    foot = "<small>Cut at the most tokens allowed.</small>" if column.reason == "length" else ""
    run = column.run or "base"
    return (
        f'<section class="st-column" style="--c:{esc(column.colour)}" data-who="{esc(run)}">'
        f"<h3>{dot(column.colour)}{esc(column.title)}</h3><div class='answer'>{text}</div>{foot}</section>"
    )


def halted(shown: str | None) -> str:
    """The columns as they stood when they were stopped: nothing blinks any more."""
    return re.sub(r'<span class="(caret|skeleton)"[^>]*></span>', "", shown or "")


def earlier_html(rows: Sequence[Row]) -> str:
    """Comparisons that were kept, closed."""
    parts = []
    for row in rows:
        columns = [Column(**{"reason": "", "picture": "", **item, "done": True}) for item in row["results"]]
        body = (
            '<div class="st-columns">'
            + "".join(_column(c, Answers(columns, finished=True)) for c in columns)
            + "</div>"
        )
        parts.append(
            f"<details><summary>{esc(row['prompt'][:120])} <small>({esc(row['base'])})</small></summary>"
            f"{body}</details>"
        )
    return f'<div class="st-stack">{"".join(parts)}</div>' if parts else ""
