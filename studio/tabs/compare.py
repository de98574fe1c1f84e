"""Compare: one prompt, the base and adapters side by side, the same seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from engine.data import open_picture
from engine.errors import EngineError
from engine.models.catalogue import BUILTIN, DEFAULT
from studio import prompt_form, sampling_form
from studio.comparing import MOST_ADAPTERS, answer, columns_html, earlier_html, finished_runs, fitting, halted, task_of
from studio.markup import error, notice
from studio.page import COMPARE, HIDDEN, Page
from studio.sampling_form import Sampling

ID = COMPARE
TITLE = "Compare"
ABLE = {"causal_lm", "seq2seq", "captioning", "text_to_image"}
"""The tasks whose bases answer by themselves."""


@dataclass
class Parts:
    """The widgets of this tab."""

    base: gr.Dropdown
    adapters: gr.CheckboxGroup
    prompt: gr.Textbox
    picture: gr.Image
    generate: gr.Button
    stop: gr.Button
    how: Sampling
    answers: gr.HTML
    earlier: gr.HTML
    empty: gr.HTML
    done: gr.State


def build(page: Page) -> None:
    """Lay out the prompt bar and the columns."""
    gr.HTML('<h2 class="page-title">What did it change?</h2>')
    empty = gr.HTML(visible=False)
    with gr.Row():
        base = gr.Dropdown([], value=None, allow_custom_value=True, label="Base model", elem_id="compare-base", scale=1)
        adapters = gr.CheckboxGroup(
            [],
            label="Adapters",
            info=f"Trained on this base; at most {MOST_ADAPTERS}.",
            elem_id="compare-adapters",
            scale=2,
        )
    prompt, picture, generate, stop = prompt_form.build(
        "compare", "Ask something that your rows are about.", "generate", "Generate"
    )
    how = sampling_form.build("The same for every column.")
    answers = gr.HTML(elem_id="compare-answers")
    with gr.Accordion("Earlier comparisons", open=False):
        earlier = gr.HTML()
    page.parts[ID] = Parts(
        base,
        adapters,
        prompt,
        picture,
        generate,
        stop,
        how,
        answers,
        earlier,
        empty,
        gr.State(""),
    )


def wire(page: Page) -> None:
    """Connect the prompt bar."""
    parts: Parts = page.parts[ID]
    studio = page.studio

    def choices(base: str) -> list[tuple[str, str]]:
        return [(row["name"], row["id"]) for row in finished_runs(studio) if row["model"] == base]

    def enter(
        base: str | None, chosen: list[str] | None, prompt: str, wanted: Mapping[str, Any] | None, done: str
    ) -> dict[Any, Any]:
        """What another page asked for, once; else what stands here, with the adapters there are now."""
        if wanted and wanted["nonce"] != done:
            shown = offer(wanted["base"], wanted["runs"], fitting(studio, wanted["runs"][0]))
            return {**shown, parts.answers: "", parts.done: wanted["nonce"]}
        # Nothing was asked of a base that nobody trained: it is the one that stood here before the first run.
        return offer(base if prompt or (base and choices(base)) else None, chosen, prompt)

    def offer(base: str | None, chosen: list[str] | None, prompt: str) -> dict[Any, Any]:
        """The bases and adapters there are now; the newest adapter is chosen when nothing is."""
        runs = finished_runs(studio)
        # The others cannot answer before they are trained, or are known by their runs.
        able = [model.name for model in BUILTIN.values() if ABLE & {*model.tasks}]
        known = [*dict.fromkeys([*(row["model"] for row in runs), *able])]
        base = base or (runs[0]["model"] if runs else DEFAULT)
        offered = choices(base)
        kept = [run_id for run_id in chosen or [] if run_id in {key: label for label, key in offered}]
        if not kept and offered:
            kept = [offered[0][1]]
        tip = notice("info", "No adapter of this base yet.", "", "Train one; until then only the base answers.")
        return {
            parts.base: gr.Dropdown(known, value=base),
            parts.adapters: gr.CheckboxGroup(offered, value=kept, visible=bool(offered)),
            **asking(base, kept[0] if kept else None, prompt),
            parts.empty: gr.HTML(tip, visible=not offered),
        }

    def asking(base: str, run_id: str | None, prompt: str) -> dict[Any, Any]:
        """What the base is asked by: words, or a picture."""
        task = task_of(studio, base)
        seen = task == "captioning"
        found: dict[Any, Any] = {
            parts.prompt: gr.Textbox(
                "" if seen else prompt or (fitting(studio, run_id) if run_id else ""), visible=not seen
            ),
            parts.picture: gr.Image(visible=seen),
            parts.how.words: gr.Row(visible=task != "text_to_image"),
            parts.how.drawing: gr.Row(visible=task == "text_to_image"),
        }
        if seen and run_id:
            found[parts.picture] = gr.Image(example(run_id), visible=True)
        return found

    def example(run_id: str) -> Any:
        """The first picture of what the run learned from."""
        try:
            rows = studio.store.dataset(studio.store.run(run_id)["dataset"])["profile"].get("examples", [])
            return open_picture(rows[0]["image"]) if rows and "image" in rows[0] else None
        except EngineError:
            return None

    def rebase(base: str) -> dict[Any, Any]:
        return {**offer(base, [], ""), parts.answers: ""}

    def generate(
        base: str,
        chosen: list[str] | None,
        prompt: str,
        picture: str | None,
        seed: float,
        temperature: float,
        tokens: float,
        steps: float,
        guidance: float,
    ) -> Iterator[dict[Any, Any]]:
        """Answer the prompt with every column at once."""
        try:
            how = sampling_form.values(seed, temperature, tokens, steps, guidance)
            for state in answer(studio, base, chosen or [], prompt, how, picture):
                yield {
                    parts.answers: columns_html(state),
                    parts.stop: gr.Button(interactive=not state.finished),
                    parts.generate: gr.Button(interactive=state.finished),
                }
        except EngineError as fault:
            yield {
                parts.answers: error(fault, "There is no answer"),
                parts.stop: gr.Button(interactive=False),
                parts.generate: gr.Button(interactive=True),
            }
        yield {parts.earlier: earlier_html(studio.store.comparisons())}

    bar = [parts.base, parts.adapters, parts.prompt]
    shown = [*bar, parts.picture, parts.how.words, parts.how.drawing, parts.empty, parts.answers, parts.done]
    page.tab[ID].select(enter, [*bar, page.comparison, parts.done], shown, **HIDDEN)
    page.blocks.load(offer, bar, shown, **HIDDEN)
    page.tab[ID].select(lambda: earlier_html(studio.store.comparisons()), None, parts.earlier, **HIDDEN)
    parts.base.input(rebase, parts.base, shown, **HIDDEN)
    inputs = [*bar, parts.picture, *parts.how.inputs]
    outputs = [parts.answers, parts.stop, parts.generate, parts.earlier]
    asked = gr.on([parts.generate.click, parts.prompt.submit], generate, inputs, outputs, trigger_mode="once", **HIDDEN)
    parts.stop.click(
        lambda shown: (gr.Button(interactive=False), gr.Button(interactive=True), halted(shown)),
        parts.answers,
        [parts.stop, parts.generate, parts.answers],
        cancels=asked,
        **HIDDEN,
    )
