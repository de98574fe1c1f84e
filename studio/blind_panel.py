"""Compare, blindly: two answers without names, the vote, and who has won how often."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from engine.errors import EngineError
from studio import prompt_form, sampling_form
from studio.answers import Answers
from studio.blind import LEFT, RIGHT, TIE, duel, pairs, rates, revealed, vote
from studio.compare_words import asked_html, columns_html, rates_html, verdict_html
from studio.context import Studio
from studio.datasets import first_prompt
from studio.i18n import t
from studio.markup import error
from studio.page import HIDDEN

MOST_PROMPTS = 40


@dataclass
class Parts:
    """The widgets of the panel; `duel` is the pair that waits for a vote."""

    prompts: gr.Dropdown
    ask: gr.Button
    stop: gr.Button
    answers: gr.HTML
    voting: gr.Row
    left: gr.Button
    tie: gr.Button
    right: gr.Button
    verdict: gr.HTML
    rates: gr.HTML
    duel: gr.State

    @property
    def widgets(self) -> list[Any]:
        """All of them in one list."""
        return list(vars(self).values())


def build() -> Parts:
    """Lay them out."""
    told = t(
        "Two of the base and those chosen above answer, drawn by chance and without names; sides are drawn too, and"
        " each pair has a seed of its own. Say which is better, then see who it was. Every vote is kept."
    )
    gr.HTML(f'<p class="st-lead">{told}</p>')
    prompts = gr.Dropdown(
        [], value=None, label=t("Prompts to choose from"), info=t("Or write your own above."), elem_id="blind-prompts"
    )
    ask, stop = prompt_form.buttons("blind", "ask", t("Ask a pair"))
    answers = gr.HTML(elem_id="blind-answers")
    with gr.Row(visible=False, elem_id="blind-voting") as voting:
        left = gr.Button(t("A is better"), elem_id="blind-left")
        tie = gr.Button(t("A tie"), elem_id="blind-tie")
        right = gr.Button(t("B is better"), elem_id="blind-right")
    verdict = gr.HTML(elem_id="blind-verdict")
    gr.HTML(f"<h3>{t('Who has won how often')}</h3>")
    table = gr.HTML(elem_id="blind-rates")
    return Parts(prompts, ask, stop, answers, voting, left, tie, right, verdict, table, gr.State(""))


def suggestions(studio: Studio, base: str | None) -> list[str]:
    """Prompts that were asked of a base, or that its adapters learned from."""
    found: dict[str, None] = {}
    sql = (
        "SELECT prompt FROM comparisons WHERE base = ? AND mine(owner) AND kind = 'answers' AND prompt <> ''"
        " AND deleted_at IS NULL ORDER BY id DESC LIMIT 10"
    )
    for row in studio.store.db.query(sql, [base or ""]):
        found[row["prompt"]] = None
    for row in studio.library.rows(base=base or "", limit=6):
        if row["run_id"]:
            found |= dict.fromkeys(studio.store.run(row["run_id"])["spec"]["training"].get("sample_prompts") or [])
        try:
            examples = studio.store.dataset(row["dataset"])["profile"].get("examples", []) if row["dataset"] else []
        except EngineError:
            continue
        found |= dict.fromkeys(first_prompt({"profile": {"examples": [example]}}) for example in examples)
    return [prompt for prompt in found if prompt.strip()][:MOST_PROMPTS]


def offered(studio: Studio, parts: Parts, base: str | None) -> dict[Any, Any]:
    """The prompts and the win rates of a base."""
    listed = [(prompt if len(prompt) <= 100 else prompt[:99] + "…", prompt) for prompt in suggestions(studio, base)]
    return {
        parts.prompts: gr.Dropdown(listed, visible=bool(listed)),
        parts.rates: rates_html(rates(studio, base or ""), pairs(studio, base or "")),
    }


def cleared(parts: Parts) -> dict[Any, Any]:
    """No pair is asked."""
    return {
        parts.answers: "",
        parts.verdict: "",
        parts.duel: "",
        parts.voting: gr.Row(visible=False),
        parts.ask: gr.Button(t("Ask a pair"), variant="primary", interactive=True),
    }


def wire(studio: Studio, parts: Parts, prompt: gr.Textbox, inputs: Sequence[Any]) -> None:
    """Connect the panel.

    Args:
        studio: who answers.
        parts: its widgets.
        prompt: where a prompt of the list goes.
        inputs: base, columns, prompt, picture, and the sampling form's.
    """

    def asked(
        base: str, chosen: list[str] | None, prompt: str, picture: str | None, *how: Any
    ) -> Iterator[dict[Any, Any]]:
        """Two answers, named A and B."""
        rest = {parts.stop: gr.Button(interactive=False)}
        try:
            yield {**cleared(parts), parts.ask: gr.Button(interactive=False), parts.stop: gr.Button(interactive=True)}
            sampling = {**sampling_form.values(*how), "seed": secrets.randbelow(2**31)}
            for found in duel(studio, base, chosen or [], prompt, sampling, picture):
                yield {parts.answers: _pair_html(found.state, found.prompt, found.picture)}
            yield {
                **rest,
                parts.duel: found.duel,
                parts.voting: gr.Row(visible=True),
                parts.ask: gr.Button(t("Skip to another pair"), variant="secondary", interactive=True),
            }
        except EngineError as fault:
            yield {**cleared(parts), **rest, parts.answers: error(fault, t("There is no pair"))}

    def voted(choice: str) -> Callable[[str], dict[Any, Any]]:
        def cast(duel_id: str) -> dict[Any, Any]:
            """Keep the vote, then say who it was."""
            try:
                row = vote(studio, duel_id, choice)
            except EngineError as fault:
                return {**cleared(parts), parts.verdict: error(fault, t("The vote was not counted"))}
            columns = revealed(row)
            state = Answers(columns, finished=True)
            return {
                parts.answers: asked_html(row["prompt"], row["picture"]) + columns_html(state, heads=_named(row)),
                parts.verdict: verdict_html(choice, columns),
                parts.rates: rates_html(rates(studio, row["base"]), pairs(studio, row["base"])),
                parts.duel: "",
                parts.voting: gr.Row(visible=False),
                parts.ask: gr.Button(t("Next pair"), variant="primary", interactive=True),
            }

        return cast

    asking = parts.ask.click(asked, list(inputs), parts.widgets, trigger_mode="once", concurrency_limit=8, **HIDDEN)
    parts.stop.click(
        lambda: {**cleared(parts), parts.stop: gr.Button(interactive=False)},
        None,
        parts.widgets,
        cancels=asking,
        **HIDDEN,
    )
    for button, choice in ((parts.left, LEFT), (parts.tie, TIE), (parts.right, RIGHT)):
        button.click(voted(choice), parts.duel, parts.widgets, trigger_mode="once", **HIDDEN)
    parts.prompts.input(None, parts.prompts, prompt, js="(chosen) => chosen || ''", **HIDDEN)


def _pair_html(state: Answers, prompt: str, picture: str) -> str:
    return asked_html(prompt, picture) + columns_html(state, heads=("A", "B"))


def _named(row: Mapping[str, Any]) -> list[str]:
    return [f"{letter}: {side['title']}" for letter, side in zip("AB", row["sides"], strict=True)]
