"""Adapters of one base answering as one: what can be asked, and the answers of base and mix while they stream."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from engine.combinations import LIVE, PRUNING, Blend
from engine.errors import ConfigError, PromptError
from studio.answers import Answers, Column
from studio.context import Studio
from studio.i18n import N_, t
from studio.library import checked_name
from studio.markup import BASE_COLOUR
from studio.store import Row

MOST, LOW, HIGH = 4, -1.0, 2.0
PROMPTS = ("prompt_tuning", "p_tuning", "prefix_tuning")
"""Methods of virtual tokens, which are read whole or not at all, and change no weight."""

MIX_COLOURS = ("#6A3D9A", "#00707A", "#A50F4E", "#5C5C00")
"""The mixes' own; no adapter has one of them. A kept mix has one by its id."""

MIX_COLOUR = MIX_COLOURS[0]
"""Of the mix that is being made."""

MEANINGS: Mapping[str, str] = {
    LIVE: N_("Every adapter stays whole and is added with its weight: what the sliders say, at once and exactly."),
    "cat": N_("The adapters side by side in one file: exactly the live mix, its rank the sum of theirs. LoRA only."),
    "svd": N_("The nearest to the live mix that fits into one rank: small, for any methods, with a small error."),
    "linear": N_(
        "PEFT's sum of the factors: small and quick, but the adapters also act on each other. Equal ranks, LoRA."
    ),
    "ties": N_(
        "Keeps each adapter's largest entries and settles their conflicts by majority of signs. Equal ranks, LoRA."
    ),
    "dare_linear": N_("Drops entries at random and makes up for it, then adds: less disturbance. Equal ranks, LoRA."),
    "dare_ties": N_("Drops entries at random, then settles conflicts by majority of signs. Equal ranks, LoRA."),
    "magnitude_prune": N_("Keeps only the largest entries of each adapter, then adds. Equal ranks, LoRA."),
    "ties_svd": N_("TIES on the whole change of each weight instead of its factors: more exact, slower, any methods."),
    "dare_linear_svd": N_("DARE on the whole change of each weight: more exact, slower, any methods."),
    "dare_ties_svd": N_("DARE with signs by majority on the whole change of each weight: slower, any methods."),
    "magnitude_prune_svd": N_("The largest entries of the whole change of each weight: slower, any methods."),
}
TITLES: Mapping[str, str] = {
    LIVE: N_("live weights"),
    "cat": N_("cat (exact)"),
    "svd": N_("svd (nearest of a rank)"),
    "linear": N_("linear (PEFT's)"),
    "ties": N_("TIES"),
    "dare_linear": N_("DARE"),
    "dare_ties": N_("DARE + TIES"),
    "magnitude_prune": N_("largest entries"),
    "ties_svd": N_("TIES on whole changes"),
    "dare_linear_svd": N_("DARE on whole changes"),
    "dare_ties_svd": N_("DARE + TIES on whole changes"),
    "magnitude_prune_svd": N_("largest entries of whole changes"),
}
TYPES = tuple(MEANINGS)
"""Every type, those that most people want first."""


def pruning(how: str) -> bool:
    """Whether a type keeps a share of the entries."""
    return how.removesuffix("_svd") in PRUNING


@dataclass(frozen=True)
class Mixture:
    """A mix that can be asked.

    Attributes:
        rows: its adapters.
        blend: adapter's id -> weight, and how they become one.
    """

    rows: tuple[Row, ...]
    blend: Blend

    @property
    def base(self) -> str:
        return str(self.rows[0]["base"])

    @property
    def task(self) -> str:
        return asked_as(self.rows[0]["task"])

    @property
    def parts(self) -> list[tuple[str, float]]:
        return list(self.blend.weights.items())

    @property
    def settings(self) -> dict[str, Any]:
        return {"how": self.blend.how, "rank": self.blend.rank, "density": self.blend.density}


def asked_as(task: str) -> str:
    """The task by which a base answers: after preference tuning a chat model is still one."""
    return "causal_lm" if task in ("preference", "") else task


def refusal(row: Mapping[str, Any]) -> str:
    """Why an adapter cannot be mixed; "" where it can."""
    if row["method"] in PROMPTS:
        return t("It is virtual tokens, which are read whole or not at all.")
    if row["task"] == "classification":
        return t("It gives labels by a head of its own; heads of two adapters do not add up.")
    return ""


def keeping_refusal(row: Mapping[str, Any]) -> str:
    """Why an adapter cannot be part of a combination that is saved; "" where it can."""
    whole = row["details"].get("whole")
    why = t("It also trains {names} in full, which no combination can hold.", names=whole) if whole else ""
    return refusal(row) or why


def check(
    studio: Studio,
    parts: Sequence[tuple[str, float]],
    how: str = LIVE,
    rank: Any = None,
    density: Any = 0.5,
) -> Mixture:
    """What is asked for, if it can be.

    Args:
        studio: where the adapters are.
        parts: (adapter's id, weight), 1 to 4 of them.
        how, rank, density: as in `engine.combinations.Blend`; rank 0 stands for None.

    Raises:
        ConfigError: no adapter, too many, of several bases, weights out of bounds, or a method that cannot be mixed.
        UnknownError, StateError, CheckpointError: an adapter is not there.
    """
    ids = [adapter for adapter, _ in parts]
    if not ids:
        raise ConfigError("No adapter is chosen.", "Choose one to four adapters of one base.")
    if len(ids) > MOST:
        raise ConfigError(f"{len(ids)} adapters are chosen; at most {MOST} are mixed.", "Choose fewer.")
    if len(set(ids)) < len(ids):
        raise ConfigError("An adapter is chosen twice.", "Choose each once, with one weight.")
    rows = tuple(studio.library.usable(adapter) for adapter in ids)
    first = rows[0]
    for row in rows:
        if (row["base"], asked_as(row["task"])) != (first["base"], asked_as(first["task"])):
            raise ConfigError(
                f"{row['name']!r} belongs to {row['base']} and {first['name']!r} to {first['base']}.",
                "Choose adapters of one base and task.",
            )
        if refusal(row):
            raise ConfigError(f"{row['name']!r} cannot be mixed. {refusal(row)}", "Choose another adapter.")
    for row, (_, weight) in zip(rows, parts, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not LOW <= weight <= HIGH:
            raise ConfigError(f"The weight of {row['name']!r} is {str(weight)[:20]}; needed: {LOW:g} to {HIGH:g}.")
    if isinstance(rank, float) and rank.is_integer():
        rank = int(rank)
    blend = Blend(dict(parts), how, rank or None, density)
    if blend.how != LIVE:
        for row in rows:
            if keeping_refusal(row):
                raise ConfigError(f"{row['name']!r} cannot be combined. {keeping_refusal(row)}", "Mix it live.")
    return Mixture(rows, blend)


def headline(mixture: Mixture) -> str:
    """A mix in a line: 0.70 captain + 0.30 parrot."""
    words = [f"{weight:+.2f} {row['name']}" for row, (_, weight) in zip(mixture.rows, mixture.parts, strict=True)]
    return " ".join(words).removeprefix("+").replace(" +", " + ").replace(" -", " - ")


def answer(
    studio: Studio,
    mixture: Mixture,
    prompt: str,
    sampling: Mapping[str, Any],
    picture: str | None = None,
    base_answer: Column | None = None,
) -> Iterator[Answers]:
    """Ask the mix, then the base unless its answer is known; yields the growing answers.

    Raises:
        PromptError: there is nothing to answer.
        InferenceError: the inference process reported something.
    """
    if mixture.task == "captioning":
        if not picture:
            raise PromptError("There is no picture.", "Choose the picture that should be described.")
    elif not isinstance(prompt, str) or not prompt.strip():
        raise PromptError("The prompt is empty.", "Write what the mix should answer.")
    first = base_answer or Column(None, t("base"), BASE_COLOUR)
    mixed = Column("mix", headline(mixture), MIX_COLOUR)
    state = Answers([first, mixed], status="Waking the base")
    if not studio.inference.holds(mixture.base):
        # Else the first words come sooner than an empty column would be drawn.
        yield state
    folders = {studio.library.version(row): studio.library.folder(row) for row in mixture.rows}
    messages = [{"role": "user", "content": prompt or "", **({"image": picture} if picture else {})}]
    inference, task, weights = studio.inference, mixture.task, list(mixture.blend.weights.values())
    blend = {**mixture.settings, "seed": mixture.blend.seed}
    asked = inference.mix(mixture.base, folders, weights, blend, messages, sampling, task)
    yield from _grow(state, mixed, asked)
    if base_answer is None:
        # The same adapters stay on the base, so that the next move of a slider finds them there.
        yield from _grow(state, first, inference.generate(mixture.base, folders, messages, [None], sampling, task))
    state.finished, state.took, state.status = True, time.monotonic() - state.began, ""
    yield state


def _grow(state: Answers, column: Column, news: Any) -> Iterator[Answers]:
    last = time.monotonic()
    with closing(news) as stream:
        for message in stream:
            silent = not column.text
            if message["type"] == "progress":
                state.status, state.fraction = message["message"], message.get("fraction")
            else:
                column.text += message["text"]
                column.picture = message.get("picture", "")
                column.done, column.reason = message["done"], message.get("reason") or ""
                state.status, state.fraction = "", None
            # The first words at once; all else ten times a second.
            if time.monotonic() - last >= 0.1 or (silent and column.text):
                last = time.monotonic()
                yield state
    column.done = True


def kept(studio: Studio, mixture: Mixture, name: str) -> str:
    """Start saving a mix as an adapter of its own; returns the id of the work.

    Raises:
        ConfigError: a name that cannot be one, or an adapter that no file of a combination can hold.
        StateError: other work is under way.
    """
    for row in mixture.rows:
        if keeping_refusal(row):
            raise ConfigError(f"{row['name']!r} cannot be saved in a mix. {keeping_refusal(row)}", "Leave it out.")
    name = checked_name(name)
    asked = {"name": name, "parts": mixture.parts, **mixture.settings}
    return studio.works.start("save_mix", f"Saving {name}", asked)
