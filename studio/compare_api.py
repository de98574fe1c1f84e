"""The public endpoints of comparisons: columns, grids, blind votes, what was kept. See `studio.api`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from engine.errors import ConfigError
from studio import blind, sharing, voices
from studio.adapter_api import served
from studio.comparisons import GRID, Comparisons
from studio.context import Studio
from studio.grids import Drawing, draw, numbers, planned, prompts_of
from studio.mixing import HIGH, LOW
from studio.pictures import inlined
from studio.store import Row

Answer = dict[str, Any]
Guard = Callable[[Callable[..., Answer]], Callable[..., Answer]]

STREAMED = ("draw_grid", "blind_pair")
"""Generators, which refuse within their stream."""

ENDPOINTS = (
    "list_columns",
    *STREAMED,
    "vote",
    "win_rates",
    "list_comparisons",
    "delete_comparison",
    "restore_comparison",
)
"""The methods that are served as they are; `share_comparison` sends a file."""


class CompareEndpoints:
    """The functions behind the endpoints, callable without a server."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.comparisons = Comparisons(studio.store, studio.home)

    def list_columns(self, base: str) -> Answer:
        """What can stand beside a base in `compare`, `draw_grid` and `blind_pair`: keys and names, adapters first."""
        return {
            "columns": [{"key": key, "name": name} for name, key in voices.choices(self.studio, _text(base, "base"))]
        }

    def draw_grid(
        self,
        base: str,
        columns: list[str],
        prompts: list[str],
        weights: list[float] | None = None,
        seeds: list[int] | None = None,
        steps: int = 20,
        guidance: float = 7.5,
    ) -> Iterator[Answer]:
        """Draw a grid of pictures: columns by weights by seeds by prompts, and the base for each seed and prompt.

        `columns` are keys of `list_columns` or ids of runs. Streams one message a picture, the new one in `cell` as a
        `data:` address with its column (null: the base), weight, seed and prompt; the last has `finished` and the id
        under which the grid is kept.
        """
        from studio.api import refusal

        try:
            for name, values in (("weights", weights), ("seeds", seeds), ("prompts", prompts)):
                if values is not None and not isinstance(values, list):
                    raise ConfigError(f"{name} is {repr(values)[:40]}; needed: a list.")
            shares = numbers(_listed([1.0] if weights is None else weights), "weights", LOW, HIGH)
            noise = numbers(_listed([0] if seeds is None else seeds), "seeds", 0, 2**31 - 1, whole=True)
            noises = [int(value) for value in noise]
            lines = prompts_of("\n".join(" ".join(str(prompt).split()) for prompt in prompts or []))
            how = _drawing(steps, guidance)
            plan, who = planned(self.studio, _text(base, "base"), _keys(columns), lines, shares, noises, how)
            told = 0
            for drawing in draw(self.studio, plan, who):
                new = drawing.drawn > told
                told = drawing.drawn
                yield _grid(drawing, new)
        except Exception as fault:
            yield refusal(fault)

    def blind_pair(
        self,
        base: str,
        columns: list[str],
        prompt: str,
        seed: int = 0,
        temperature: float = 0.3,
        max_new_tokens: int = 80,
    ) -> Iterator[Answer]:
        """Two of the base and the columns answer without names, drawn by chance; streams `left` and `right`.

        The last message has `pair`, the id that `vote` takes.
        """
        from studio.api import refusal, sampling

        try:
            how = sampling(seed, temperature, max_new_tokens)
            for found in blind.duel(self.studio, _text(base, "base"), _keys(columns), _text(prompt, "prompt"), how):
                left, right = found.state.columns
                yield {
                    "left": {"text": left.text, "picture": inlined(left.picture)},
                    "right": {"text": right.text, "picture": inlined(right.picture)},
                    "pair": found.duel or None,
                    "finished": found.state.finished,
                }
        except Exception as fault:
            yield refusal(fault)

    def vote(self, pair: str, choice: str) -> Answer:
        """Say which of a pair is better, once: `left`, `right` or `tie`. Answers who they were."""
        row = blind.vote(self.studio, pair, choice)
        sides = [{"column": side["run"], "title": side["title"]} for side in row["sides"]]
        return {"pair": pair, "choice": choice, "left": sides[0], "right": sides[1]}

    def win_rates(self, base: str) -> Answer:
        """Who has won how often on a base, the best first.

        `rate` counts a tie as half a win; `interval` is its 95 % interval by Wilson.
        """
        found = blind.rates(self.studio, _text(base, "base"))
        return {
            "rates": [
                {
                    "title": rate.title,
                    "version": rate.version,
                    "votes": rate.votes,
                    "wins": rate.wins,
                    "ties": rate.ties,
                    "losses": rate.losses,
                    "rate": rate.rate,
                    "interval": list(rate.interval),
                }
                for rate in found
            ]
        }

    def list_comparisons(self, limit: int = 20, deleted: bool = False) -> Answer:
        """Kept comparisons and grids, newest first, with their answers; those in the bin when `deleted`."""
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 1 <= limit <= 1000:
            raise ConfigError(f"limit is {repr(limit)[:40]}; needed: 1 to 1000.")
        return {"comparisons": [_kept(row) for row in self.comparisons.rows(int(limit), deleted is True)]}

    def delete_comparison(self, comparison: int) -> Answer:
        """Put a comparison into the bin; `restore_comparison` takes it out again until the bin is emptied."""
        self.comparisons.bin(comparison)
        return {"comparison": comparison, "deleted": True}

    def restore_comparison(self, comparison: int) -> Answer:
        """Take a comparison out of the bin."""
        self.comparisons.restore(comparison)
        return {"comparison": comparison, "deleted": False}


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{what} is {repr(value)[:40]}; needed: text.")
    return value


def _keys(columns: Any) -> list[str]:
    if not isinstance(columns, list) or not all(isinstance(key, str) for key in columns):
        raise ConfigError("`columns` must be a list of keys.", "`list_columns` names them; an empty list is the base.")
    return columns


def _listed(values: list[Any]) -> str:
    return ", ".join(str(value) for value in values)


def _drawing(steps: Any, guidance: Any) -> Answer:
    for name, value, low, high in (("steps", steps, 1, 100), ("guidance", guidance, 0, 20)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ConfigError(f"{name} is {repr(value)[:40]}; needed: {low} to {high}.")
    return {"steps": int(steps), "guidance": float(guidance)}


def _grid(drawing: Drawing, new: bool) -> Answer:
    found: Answer = {"cell": None, "drawn": drawing.drawn, "of": len(drawing.cells), "status": drawing.status}
    if new:
        cell = drawing.cells[drawing.drawn - 1]
        found["cell"] = {
            "column": cell.run,
            "title": cell.title,
            "weight": cell.weight,
            "seed": cell.seed,
            "prompt": cell.prompt,
            "picture": inlined(cell.picture),
        }
    return {**found, "finished": drawing.finished, "comparison": drawing.kept}


def _kept(row: Row) -> Answer:
    """A row without paths of this machine."""
    hidden = ("picture", "version")
    results = [{key: value for key, value in it.items() if key not in hidden} for it in row["results"]]
    kept = ("id", "kind", "base", "prompt", "created")
    settings = row["settings"]
    if row["kind"] == GRID:
        settings = {**settings, "columns": [column["run"] for column in settings["columns"]]}
    return {**{key: row[key] for key in kept}, "settings": settings, "results": results}


def build(studio: Studio, guarded: Guard) -> None:
    """Register the endpoints on the page that is being built."""
    ends = CompareEndpoints(studio)
    with gr.Row(visible=False):
        number, sent, told = gr.Number(precision=0), gr.File(), gr.JSON()

        def share_comparison(comparison: int) -> tuple[Any, Any]:
            """A comparison as one HTML file, without scripts and with its pictures inside; or a refusal."""

            def write() -> Answer:
                row = ends.comparisons.get(comparison)
                return {"path": str(sharing.written(ends.comparisons.shared(row["id"]), row))}

            answered = guarded(write)()
            return (served(sent, Path(answered["path"])), None) if "path" in answered else (None, answered)

        gr.Button().click(share_comparison, number, [sent, told], api_name="share_comparison")

    for name in ENDPOINTS:
        # Gradio reads the parameters' names, types and defaults of the method behind.
        function = getattr(ends, name) if name in STREAMED else guarded(getattr(ends, name))
        gr.events.api(function, api_name=name, concurrency_limit=8)
