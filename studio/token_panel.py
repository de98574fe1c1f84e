"""What a base would see of a data set's rows, before anything starts: tokens, what is learned, lengths."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from engine.errors import ConfigError, EngineError
from engine.models.catalogue import BUILTIN
from engine.models.fetch import is_ready
from studio import data_rows, presets, recipes, token_words
from studio.context import Studio
from studio.datasets import Checked
from studio.i18n import t
from studio.markup import error, notice
from studio.page import HIDDEN, Page
from studio.problem_words import unit

ROWS = 5
SAMPLED = 5_000
"""Rows whose lengths are counted at first."""
_PART = 1_000
_CHARACTERS = 4_000_000
_SKELETON = (
    '<div class="st-column" style="--c:var(--line)"><span class="skeleton"></span><span class="skeleton"></span></div>'
)
_counted: OrderedDict[str, list[list[int]]] = OrderedDict()


@dataclass
class Parts:
    """The widgets; `at` is the first row that is shown, from 0."""

    task: gr.Dropdown
    base: gr.Dropdown
    length: gr.Number
    loss_on: gr.Radio
    look: gr.Button
    tokens: gr.HTML
    turning: gr.Row
    before: gr.Button
    after: gr.Button
    lengths: gr.HTML
    all: gr.Button
    cut: gr.Button
    at: gr.State

    @property
    def widgets(self) -> list[Any]:
        return list(vars(self).values())


def build() -> Parts:
    """Lay them out."""
    with gr.Row(elem_classes="fields"):
        task = gr.Dropdown([], label=t("Task"), elem_id="token-task", min_width=180)
        base = gr.Dropdown([], label=t("Base"), allow_custom_value=True, elem_id="token-base", min_width=180)
        length = gr.Number(
            512, label=t("Longest row, in tokens (max_length)"), precision=0, minimum=8, elem_id="token-length",
            min_width=180,
        )  # fmt: skip
        loss_on = gr.Radio(
            [(t("answers"), "answers"), (t("all"), "all")],
            value="answers",
            label=t("Learn from (loss_on)"),
            elem_id="token-loss",
            min_width=180,
        )
    look = gr.Button(t("Fetch the base and show the tokens"), visible=False, elem_id="token-look")
    lengths = gr.HTML(elem_id="token-lengths")
    with gr.Row():
        cut = gr.Button(t("Show the next row that is cut"), size="sm", visible=False, elem_id="token-cut")
        count_all = gr.Button(t("Count all rows"), size="sm", visible=False, elem_id="token-all")
    tokens = gr.HTML(elem_id="token-rows")
    with gr.Row(visible=False, elem_classes="dp-turn") as turning:
        before = gr.Button(t("Rows before"), size="sm", elem_id="token-before", min_width=90)
        after = gr.Button(t("Next rows"), size="sm", elem_id="token-after", min_width=90)
    return Parts(
        task, base, length, loss_on, look, tokens, turning, before, after, lengths, count_all, cut, gr.State(0)
    )


def ready(base: str) -> bool:
    """Whether nothing has to be fetched to read with this base's tokenizer."""
    return is_ready(base) if base in BUILTIN else Path(base).expanduser().is_dir()


def first_base(task: presets.Task) -> str:
    """The task's own base where it is on this machine, else another that is."""
    names = sorted((name for _, name in recipes.bases(task)), key=lambda name: name != task.base)
    return next((name for name in names if ready(name)), task.base)


def usual_length(task: presets.Task) -> int:
    """The length of the task's first preset."""
    return int(next(iter(task.presets.values())).training.get("max_length", 512))


def fresh(parts: Parts, found: Checked) -> dict[Any, Any]:
    """The tasks and bases for another data set; nothing is read yet."""
    tasks = recipes.tasks_for(found.format) if found.format else []
    blank: dict[Any, Any] = {parts.tokens: "", parts.lengths: "", parts.at: 0}
    if found.prepared is None or not tasks:
        return blank
    offered = gr.Dropdown([(one.title, one.name) for one in tasks], value=tasks[0].name)
    return {**blank, **of_task(parts, tasks[0]), parts.task: offered}


def of_task(parts: Parts, task: presets.Task) -> dict[Any, Any]:
    """A task's bases, length and what of a row it learns."""
    fields = {field.name for field in task.fields}
    return {
        parts.base: gr.Dropdown(recipes.bases(task), value=first_base(task)),
        parts.length: gr.Number(usual_length(task), visible="max_length" in fields),
        parts.loss_on: gr.Radio(value="answers", visible="loss_on" in fields),
    }


@dataclass(frozen=True)
class Asked:
    """With what the rows are read."""

    task: str
    base: str
    length: int
    loss_on: str

    @classmethod
    def of(cls, task: str | None, base: str | None, length: float | None, loss_on: str | None) -> Asked:
        """The form's values.

        Raises:
            ConfigError: a field is empty or out of its bounds.
        """
        form = recipes.task_of(task)
        if not (base or "").strip():
            raise ConfigError("No base is chosen.", "Choose one, or write a folder or a hub name.")
        if length is None or not 8 <= length <= 1_000_000:
            raise ConfigError(f"The longest row has {length} tokens; needed: 8 or more.")
        kind = loss_on if loss_on == "all" and form.name == "causal_lm" else "answers"
        return cls(form.name, str(base).strip(), int(length), kind)


def read(studio: Studio, asked: Asked, examples: Sequence[Mapping[str, Any]], want: str = "rows") -> list[Any]:
    """What the inference process says of rows."""
    return studio.inference.tokens(
        asked.base, asked.task, examples, want=want, max_length=asked.length, loss_on=asked.loss_on
    )


def lengths(studio: Studio, found: Checked, asked: Asked, most: int) -> Iterator[list[list[int]]]:
    """Lengths of at most `most` rows, evenly chosen: as they become more, and then all. Kept for a while."""
    assert found.prepared is not None
    key = _key(found, asked, most)
    if key in _counted:
        yield _counted[key]
        return
    examples = found.prepared.examples
    done: list[list[int]] = []
    part: list[Mapping[str, Any]] = []
    size = 0
    places = data_rows.spread(len(examples), most)
    for number, place in enumerate(places, 1):
        part.append(examples[place])
        size += len(repr(part[-1]))
        if len(part) == _PART or size > _CHARACTERS or number == len(places):
            done = [*done, *read(studio, asked, part, "lengths")]
            part, size = [], 0
            yield done
    _counted[key] = done
    while len(_counted) > 16:
        _counted.popitem(last=False)


def next_cut(found: Checked, asked: Asked, at: int) -> int:
    """The place of the first row after `at` that is cut, as far as lengths are known; round to the first one again."""
    assert found.prepared is not None
    known = [_counted.get(_key(found, asked, most)) for most in (found.prepared.kept, SAMPLED)]
    counted = next((one for one in known if one is not None), [])
    places = data_rows.spread(found.prepared.kept, len(counted)) if counted else []
    cut = [place for place, row in zip(places, counted, strict=True) if row[1]]
    return next((place for place in cut if place > at), cut[0] if cut else at)


def _key(found: Checked, asked: Asked, most: int) -> str:
    return repr((found.id, found.format, sorted(found.columns.items()), asked, most))


def wire(page: Page, parts: Parts, dataset: gr.State) -> Any:
    """Connect the form; returns what looks at the rows, for whoever opens this view."""
    studio = page.studio
    written = [parts.tokens, parts.turning, parts.before, parts.after]
    written += [parts.lengths, parts.all, parts.cut, parts.look, parts.at]

    def looking(fetch: bool = False, by: int = 0, whole: bool = False, cut: bool = False) -> Any:
        def handler(
            dataset_id: str, task: str | None, base: str | None, length: float | None, loss_on: str | None, at: int
        ) -> Iterator[dict[Any, Any]]:
            """Read some rows and count lengths; drawn as they come."""
            if not dataset_id:
                return
            found = page.datasets.open(dataset_id)
            if found.prepared is None or not recipes.tasks_for(found.format):
                yield {parts.tokens: "", parts.lengths: "", parts.look: gr.Button(visible=False)}
                return
            try:
                asked = Asked.of(task, base, length, loss_on)
                if cut:
                    at = next_cut(found, asked, at)
                yield from draw(found, asked, at, fetch, by, whole, cut)
            except EngineError as fault:
                yield {parts.tokens: error(fault, t("These rows cannot be read")), parts.lengths: ""}

        return handler

    def draw(
        found: Checked, asked: Asked, at: int, fetch: bool, by: int, whole: bool, cut: bool
    ) -> Iterator[dict[Any, Any]]:
        assert found.prepared is not None
        examples, total = found.prepared.examples, found.prepared.kept
        if not (fetch or ready(asked.base)):
            told = t("{base} is not on this machine yet.", base=asked.base)
            why = t("Its tokenizer comes with it. Fetch it, or choose a base that is here.")
            yield {parts.tokens: notice("info", told, why), parts.lengths: "", parts.look: gr.Button(visible=True)}
            return
        at = min(max(0, at + by * ROWS), max(0, total - 1))
        if not by and not whole and not cut:
            yield {parts.tokens: _SKELETON, parts.look: gr.Button(visible=False)}
        if not whole:
            rows = read(studio, asked, examples[at : at + ROWS])
            yield {
                parts.tokens: token_words.rows(rows, asked.task, unit(found.prepared.unit)),
                parts.turning: gr.Row(visible=total > ROWS),
                parts.before: gr.Button(interactive=at > 0),
                parts.after: gr.Button(interactive=at + ROWS < total),
                parts.at: at,
            }
        if by or cut:
            return
        for counted in lengths(studio, found, asked, total if whole else SAMPLED):
            yield {
                parts.lengths: token_words.histogram(counted, asked.task, total),
                parts.all: gr.Button(visible=len(counted) < total and not whole),
                parts.cut: gr.Button(visible=any(row[1] for row in counted)),
            }

    asked = [dataset, parts.task, parts.base, parts.length, parts.loss_on, parts.at]

    def turn(task: str | None) -> dict[Any, Any]:
        """Another task: its bases and its usual length."""
        return of_task(parts, recipes.task_of(task))

    look = {"fn": looking(), "inputs": asked, "outputs": written, **HIDDEN, "concurrency_limit": 4}
    parts.task.input(turn, parts.task, [parts.base, parts.length, parts.loss_on], **HIDDEN).then(**look)
    gr.on(
        [parts.base.input, parts.length.submit, parts.length.blur, parts.loss_on.input],
        trigger_mode="always_last",
        **look,
    )
    parts.look.click(looking(fetch=True), asked, written, **HIDDEN)
    parts.before.click(looking(by=-1), asked, written, **HIDDEN)
    parts.after.click(looking(by=1), asked, written, **HIDDEN)
    parts.cut.click(looking(cut=True), asked, written, **HIDDEN)
    parts.all.click(looking(whole=True), asked, written, **HIDDEN)
    return look
