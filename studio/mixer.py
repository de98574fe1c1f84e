"""The mixer of the Adapters page: a slider for each adapter, the answer beneath, what is kept of it."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import gradio as gr

from engine.combinations import LIVE
from engine.errors import EngineError
from studio import mixing, prompt_form, sampling_form
from studio.adapter_words import meaning
from studio.answers import Column
from studio.compare_words import columns_html, halted
from studio.comparing import fitting
from studio.context import Studio
from studio.i18n import t
from studio.markup import error, notice
from studio.page import HIDDEN
from studio.sampling_form import Sampling
from studio.store import PALETTE, Row

FIRST, NEXT = 1.0, 0.5
"""The weight of the first adapter that comes into a mix, and of each after it."""


@dataclass
class Parts:
    """The widgets of the mixer."""

    chosen: gr.Dropdown
    shelf: gr.Column
    mixes: gr.Dropdown
    forget: gr.Button
    sliders: list[gr.Slider]
    how: gr.Dropdown
    meaning: gr.HTML
    rank: gr.Slider
    density: gr.Slider
    body: gr.Column
    prompt: gr.Textbox
    picture: gr.Image
    answer: gr.Button
    stop: gr.Button
    sampling: Sampling
    fault: gr.HTML
    answers: gr.HTML
    name: gr.Textbox
    save: gr.Button
    keep: gr.Button
    kept: gr.HTML
    before: gr.State
    known: gr.State
    opened: gr.State

    @property
    def settings(self) -> list[Any]:
        """What says which mix it is: adapters, weights, type."""
        return [self.chosen, *self.sliders, self.how, self.rank, self.density]


def build() -> Parts:
    """Lay out the mixer."""
    with gr.Row():
        chosen = gr.Dropdown(
            [],
            value=[],
            multiselect=True,
            max_choices=mixing.MOST,
            label=t("Adapters in the mix"),
            info=t("One to {most} of the same base.", most=mixing.MOST),
            elem_id="mix-chosen",
            scale=3,
        )
        with gr.Column(scale=2, min_width=240, visible=False) as shelf:
            mixes = gr.Dropdown([], value=None, label=t("Open a mix"), info=t("Kept by name."), elem_id="mix-open")
            forget = gr.Button(t("Remove this mix"), size="sm", visible=False, elem_id="mix-forget")
    with gr.Column(visible=False) as body:
        with gr.Column(elem_id="mix-sliders"):
            sliders = [
                gr.Slider(
                    mixing.LOW, mixing.HIGH, value=FIRST, step=0.05, visible=False, elem_id=f"mix-weight-{number}"
                )
                for number in range(mixing.MOST)
            ]
        prompt, picture, answer, stop = prompt_form.build(
            "mix", t("Ask something, then move a slider."), "answer", t("Answer")
        )
        fault = gr.HTML(visible=False, elem_id="mix-fault")
        answers = gr.HTML(elem_id="mix-answers")
        with gr.Accordion(t("How they become one"), open=False), gr.Row():
            with gr.Column(min_width=240):
                how = gr.Dropdown(
                    [(t(mixing.TITLES[name]), name) for name in mixing.TYPES],
                    value=LIVE,
                    label=t("Combination type"),
                    elem_id="mix-how",
                )
                told = gr.HTML(meaning(LIVE), elem_id="mix-meaning")
            with gr.Column(min_width=240):
                rank = gr.Slider(
                    0,
                    256,
                    value=0,
                    step=1,
                    label=t("Rank (svd_rank)"),
                    info=t("The most that the new rank may be; 0 takes the largest of the adapters'."),
                    elem_id="mix-rank",
                    visible=False,
                )
                density = gr.Slider(
                    0.05,
                    1,
                    value=0.5,
                    step=0.05,
                    label=t("Share kept (density)"),
                    info=t("Of each adapter's entries."),
                    elem_id="mix-density",
                    visible=False,
                )
        sampling = sampling_form.build(t("The same for base and mix."))
        with gr.Row(elem_classes="ad-row"):
            name = gr.Textbox(
                label=t("Name"), placeholder=t("A name for what you hear"), elem_id="mix-name", scale=2, min_width=240
            )
            save = gr.Button(t("Save as a new adapter"), elem_id="mix-save", scale=1)
            keep = gr.Button(t("Keep as a mix"), elem_id="mix-keep", scale=1)
        kept = gr.HTML(visible=False, elem_id="mix-kept")
    return Parts(
        chosen,
        shelf,
        mixes,
        forget,
        sliders,
        how,
        told,
        rank,
        density,
        body,
        prompt,
        picture,
        answer,
        stop,
        sampling,
        fault,
        answers,
        name,
        save,
        keep,
        kept,
        gr.State([]),
        gr.State(None),
        gr.State(None),
    )


class Newest:
    """Which question of each page is the newest: an older one ends when it sees that it is not."""

    def __init__(self, most: int = 1000) -> None:
        self._tokens: OrderedDict[str, str] = OrderedDict()
        self._most = most
        self._lock = threading.Lock()

    def claim(self, page: str) -> str:
        """Make a question of this page the newest."""
        token = secrets.token_hex(8)
        with self._lock:
            self._tokens[page] = token
            self._tokens.move_to_end(page)
            while len(self._tokens) > self._most:
                self._tokens.popitem(last=False)
        return token

    def holds(self, page: str, token: str) -> bool:
        """Whether it still is."""
        return self._tokens.get(page) == token


def slider(row: Row | None, weight: float) -> Any:
    """One adapter's slider in its colour; hidden without an adapter."""
    if row is None:
        return gr.Slider(visible=False)
    shade = PALETTE.index(row["colour"]) if row["colour"] in PALETTE else 0
    return gr.Slider(label=row["name"], value=weight, visible=True, elem_classes=["mix-slider", f"mix-c{shade}"])


def choices(studio: Studio, first: Row | None) -> list[tuple[str, str]]:
    """The adapters that can come into the mix: all that can be mixed, or those of the first one's base."""
    rows = [row for row in studio.library.rows(base=first["base"] if first else "") if not mixing.refusal(row)]
    if first is None:
        return [(f"{row['name']}  ({row['base']})", row["id"]) for row in rows]
    task = mixing.asked_as(first["task"])
    return [(row["name"], row["id"]) for row in rows if mixing.asked_as(row["task"]) == task]


def asked(studio: Studio, values: Sequence[Any]) -> mixing.Mixture:
    """The mix that the values of `Parts.settings` say.

    Raises:
        EngineError: it cannot be.
    """
    chosen, weights, (how, rank, density) = values[0] or [], values[1 : 1 + mixing.MOST], values[1 + mixing.MOST :]
    parts = [(adapter, float(weight)) for adapter, weight in zip(chosen, weights, strict=False)]
    return mixing.check(studio, parts, how, rank if str(how).endswith("svd") else None, density)


def arranged(
    studio: Studio,
    parts: Parts,
    chosen: Sequence[str],
    weights: Mapping[str, float],
    prompt: str,
    shown: Sequence[str] | None = None,
) -> dict[Any, Any]:
    """The mixer for these adapters: sliders in their colours with their weights, and what the base is asked by.

    `shown` are the adapters that the page has in the list already.
    """
    rows = [row for row in map(lambda key: _there(studio, key), chosen[: mixing.MOST]) if row is not None]
    first = rows[0] if rows else None
    rows = [row for row in rows if first and (row["base"], row["task"]) == (first["base"], first["task"])]
    ids, offered_now = [row["id"] for row in rows], choices(studio, first)
    found: dict[Any, Any] = {
        # Written only where it has to differ: another adapter may have been chosen while this was made.
        parts.chosen: gr.Dropdown(offered_now) if ids == shown else gr.Dropdown(offered_now, value=ids),
        parts.body: gr.Column(visible=bool(rows)),
        parts.before: ids,
    }
    for number, widget in enumerate(parts.sliders):
        row = rows[number] if number < len(rows) else None
        usual = FIRST if number == 0 else NEXT
        found[widget] = slider(row, weights.get(row["id"], usual) if row else usual)
    if first is None:
        return {**found, parts.answers: "", parts.known: None}
    task = mixing.asked_as(first["task"])
    suggested = fitting(studio, first["run_id"]) if first["run_id"] and task != "captioning" else ""
    return {
        **found,
        parts.prompt: gr.Textbox(prompt or suggested, visible=task != "captioning"),
        parts.picture: gr.Image(visible=task == "captioning"),
        parts.sampling.words: gr.Row(visible=task != "text_to_image"),
        parts.sampling.drawing: gr.Row(visible=task == "text_to_image"),
        parts.answer: gr.Button(t("Draw" if task == "text_to_image" else "Answer")),
    }


def _there(studio: Studio, adapter: str) -> Row | None:
    try:
        return studio.library.usable(adapter)
    except EngineError:
        return None


def offered(studio: Studio, parts: Parts, mix: Any = None) -> dict[Any, Any]:
    """The mixes that are kept."""
    rows = studio.library.mixes()
    value = mix if mix in [row["id"] for row in rows] else None
    return {
        parts.shelf: gr.Column(visible=bool(rows)),
        parts.mixes: gr.Dropdown([(row["name"], row["id"]) for row in rows], value=value),
        parts.forget: gr.Button(visible=value is not None),
    }


def typed(how: str) -> tuple[Any, Any, Any]:
    """What a type means, and the fields that it has."""
    return meaning(how), gr.Slider(visible=str(how).endswith("svd")), gr.Slider(visible=mixing.pruning(str(how)))


def hear(studio: Studio, newest: Newest, parts: Parts) -> Callable[..., Iterator[dict[Any, Any]]]:
    """The function that asks base and mix, and ends by itself when a newer question comes from its page."""

    def heard(known: Any, prompt: str, picture: str | None, *values: Any, page: str) -> Iterator[dict[Any, Any]]:
        token = newest.claim(page)
        count = len(parts.settings)
        try:
            how = sampling_form.values(*values[count:])
            mixture = asked(studio, values[:count])
            same = [mixture.base, mixture.task, prompt, picture, how, [row["id"] for row in mixture.rows][:1]]
            base = Column(**known["column"]) if known and known["of"] == same else None
            for state in mixing.answer(studio, mixture, prompt, how, picture, base):
                if not newest.holds(page, token):
                    return
                yield {
                    parts.answers: columns_html(state),
                    parts.fault: gr.HTML(visible=False),
                    parts.stop: gr.Button(interactive=not state.finished),
                }
            yield {parts.known: {"of": same, "column": asdict(state.columns[0])}}
        except EngineError as fault:
            if newest.holds(page, token):
                yield {
                    parts.fault: gr.HTML(error(fault, t("There is no answer")), visible=True),
                    parts.stop: gr.Button(interactive=False),
                }

    return heard


def wire(studio: Studio, parts: Parts, started: Callable[[str], dict[Any, Any]], more: Sequence[Any]) -> None:
    """Connect the mixer.

    Args:
        studio: where the adapters are.
        parts: its widgets.
        started: what the page shows of a work that has begun.
        more: the widgets that `started` changes.
    """
    newest = Newest()
    heard = hear(studio, newest, parts)
    inputs = [parts.known, parts.prompt, parts.picture, *parts.settings, *parts.sampling.inputs]
    outputs = [parts.answers, parts.fault, parts.stop, parts.known]

    def ask(request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        """Answer with the mix as it stands."""
        yield from heard(*values, page=str(request.session_hash))

    def move(request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        """Answer anew where there is something to answer; a slider may be moved before a word is written."""
        if values[1] or values[2]:
            yield from heard(*values, page=str(request.session_hash))

    def stop(shown: str, request: gr.Request) -> tuple[Any, Any]:
        newest.claim(str(request.session_hash))
        return halted(shown), gr.Button(interactive=False)

    def choose(chosen: list[str] | None, before: list[str], prompt: str, *weights: float) -> Any:
        """Other adapters are chosen: those that stay keep their weights."""
        if (chosen or []) == before:
            return gr.skip()
        return arranged(studio, parts, chosen or [], dict(zip(before, weights, strict=False)), prompt, chosen)

    def open_mix(mix: Any, prompt: str) -> dict[Any, Any]:
        try:
            row = studio.library.mix(mix)
        except EngineError as fault:
            return {parts.kept: gr.HTML(error(fault), visible=True), **offered(studio, parts)}
        gone = notice(
            "warn",
            t("{count} of its adapters are no longer here.", count=row["missing"]),
            t("The others are in the mix."),
        )
        settings = row["settings"]
        how = settings["how"]
        return {
            **arranged(studio, parts, [adapter for adapter, _ in row["parts"]], dict(row["parts"]), prompt),
            **offered(studio, parts, row["id"]),
            parts.how: how,
            parts.rank: gr.Slider(value=settings["rank"] or 0, visible=how.endswith("svd")),
            parts.density: gr.Slider(value=settings["density"], visible=mixing.pruning(how)),
            parts.meaning: meaning(how),
            parts.name: row["name"],
            parts.kept: gr.HTML(gone if row["missing"] else "", visible=bool(row["missing"])),
        }

    def forget(mix: Any) -> dict[Any, Any]:
        try:
            studio.library.forget_mix(mix)
        except EngineError as fault:
            return {parts.kept: gr.HTML(error(fault), visible=True), **offered(studio, parts)}
        return offered(studio, parts)

    def keep(name: str, *values: Any) -> dict[Any, Any]:
        try:
            mixture = asked(studio, values)
            mix = studio.library.save_mix(name, mixture.base, mixture.parts, mixture.settings)
        except EngineError as fault:
            return {parts.kept: gr.HTML(error(fault, t("The mix was not kept")), visible=True)}
        told = notice(
            "good",
            t("Kept {name}.", name=name.strip()),
            "",
            t("Open it above whenever you like; its adapters stay as they are."),
        )
        return {**offered(studio, parts, mix), parts.kept: gr.HTML(told, visible=True)}

    def save(name: str, *values: Any) -> dict[Any, Any]:
        try:
            work = mixing.kept(studio, asked(studio, values), name)
        except EngineError as fault:
            return {parts.kept: gr.HTML(error(fault, t("The mix was not saved")), visible=True)}
        return {**started(work), parts.kept: gr.HTML(visible=False)}

    quick: dict[str, Any] = {"trigger_mode": "multiple", "concurrency_limit": 8, **HIDDEN}
    gr.on([parts.answer.click, parts.prompt.submit], ask, inputs, outputs, **quick)
    released = [widget.release for widget in [*parts.sliders, parts.rank, parts.density]]
    gr.on([*released, parts.how.input], move, inputs, outputs, **quick)
    parts.how.change(typed, parts.how, [parts.meaning, parts.rank, parts.density], **HIDDEN)
    parts.stop.click(stop, parts.answers, [parts.answers, parts.stop], **HIDDEN)
    arrangement = [*vars(parts).values()]
    arrangement = [it for it in arrangement if it is not parts.sliders and it is not parts.sampling]
    arrangement += [*parts.sliders, parts.sampling.words, parts.sampling.drawing]
    weighed = [parts.chosen, parts.before, parts.prompt, *parts.sliders]
    parts.chosen.change(choose, weighed, arrangement, **HIDDEN)
    parts.mixes.input(open_mix, [parts.mixes, parts.prompt], arrangement, **HIDDEN)
    parts.forget.click(forget, parts.mixes, arrangement, **HIDDEN)
    parts.keep.click(keep, [parts.name, *parts.settings], arrangement, **HIDDEN)
    parts.save.click(save, [parts.name, *parts.settings], [parts.kept, *more], trigger_mode="once", **HIDDEN)
