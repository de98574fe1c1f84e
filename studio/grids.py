"""Pictures in a grid: adapter by weight by seed by prompt, and the base without any adapter beside them."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from studio.comparing import described
from studio.comparisons import GRID, Comparisons
from studio.context import Studio
from studio.i18n import t
from studio.mixing import HIGH, LOW
from studio.voices import Voice, task_of, voices

MOST_CELLS, MOST_PROMPTS, MOST_VALUES = 96, 8, 12
_LAST_SEED = 2**31 - 1


@dataclass
class Cell:
    """One picture of the grid.

    Attributes:
        run: what drew it: an id of a run, an adapter or a mix; None for the base.
        title, colour: its name and colour.
        weight: how much of it acted; None for the base.
        seed: of the noise.
        prompt: the words.
        picture: its file; "" while it is not drawn.
        seconds: how long it took.
    """

    run: str | None
    title: str
    colour: str
    weight: float | None
    seed: int
    prompt: str
    picture: str = ""
    seconds: float = 0.0


@dataclass
class Drawing:
    """A grid while it is drawn, or as it was kept.

    Attributes:
        base: the base model.
        settings: steps and guidance, and the axes: `prompts`, `seeds`, `weights`, `columns` (who, the base first).
        cells: in the order in which they are drawn.
        status: what is being waited for.
        finished: whether all are drawn.
        kept: the id under which it is kept.
    """

    base: str
    settings: dict[str, Any]
    cells: list[Cell]
    status: str = ""
    finished: bool = False
    kept: int | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def drawn(self) -> int:
        """How many cells have their picture."""
        return sum(1 for cell in self.cells if cell.picture)

    def find(self, run: str | None, weight: float | None, seed: int, prompt: str) -> int:
        """The place of a cell in `cells`; -1 where there is none. The base has one for all weights."""
        weight = None if run is None else weight
        wanted = (run, weight, seed, prompt)
        places = (i for i, it in enumerate(self.cells) if (it.run, it.weight, it.seed, it.prompt) == wanted)
        return next(places, -1)


def numbers(text: Any, what: str, low: float, high: float, whole: bool = False) -> list[float]:
    """Numbers as a person writes them: `0.5, 1` or, of whole ones, `1-4`; each once, in order.

    Raises:
        ConfigError: none, too many, or one that is no number or out of bounds.
    """
    found: list[float] = []
    for word in re.split(r"[,;\s]+", str(text).strip()):
        if not word:
            continue
        span = re.fullmatch(r"(\d{1,10})-(\d{1,10})", word) if whole else None
        try:
            values = list(range(int(span[1]), int(span[2]) + 1)[: MOST_VALUES + 1]) if span else [float(word)]
        except ValueError:
            values = []
        if not values or any(not low <= value <= high or (whole and value != int(value)) for value in values):
            raise ConfigError(
                t("{what}: {word} cannot be one.", what=what, word=word[:20]),
                t("Needed: numbers from {low} to {high}, with commas between them.", low=f"{low:g}", high=f"{high:g}"),
            )
        found += [int(value) if whole else value for value in values]
    found = list(dict.fromkeys(found))
    if not 1 <= len(found) <= MOST_VALUES:
        raise ConfigError(
            t("{what}: {count} are given; needed: 1 to {most}.", what=what, count=len(found), most=MOST_VALUES)
        )
    return found


def weights_of(text: Any) -> list[float]:
    """The weights of a grid from text; see `numbers`."""
    return numbers(text, t("Weights"), LOW, HIGH)


def seeds_of(text: Any) -> list[int]:
    """The seeds of a grid from text; see `numbers`."""
    return [int(value) for value in numbers(text, t("Seeds"), 0, _LAST_SEED, whole=True)]


def prompts_of(text: Any) -> list[str]:
    """The prompts of a grid: one a line, each once.

    Raises:
        ConfigError: none, or too many.
    """
    lines = [line.strip() for line in str(text or "").splitlines()]
    found = list(dict.fromkeys(line for line in lines if line))
    if not 1 <= len(found) <= MOST_PROMPTS:
        raise ConfigError(
            t("{count} prompts are given; needed: 1 to {most}, one a line.", count=len(found), most=MOST_PROMPTS),
            t("Write what the pictures should show."),
        )
    return found


def planned(
    studio: Studio,
    base: str,
    keys: Sequence[str],
    prompts: Sequence[str],
    weights: Sequence[float],
    seeds: Sequence[int],
    sampling: Mapping[str, Any],
) -> tuple[Drawing, list[Voice]]:
    """The grid before its first picture, what is dearest to change varying least: adapter, weight, prompt, seed.

    Raises:
        ConfigError: the base draws no pictures, or there are too many cells.
        EngineError: see `studio.voices.voices`.
    """
    who = voices(studio, base, keys)
    if task_of(studio, base, who) != "text_to_image":
        raise ConfigError(t("{base} draws no pictures.", base=base), t("Choose a base that does."))
    cells = [
        Cell(voice.run, voice.title, voice.colour, weight, seed, prompt)
        for voice in who
        for weight in (weights if voice.rows else [None])
        for prompt in prompts
        for seed in seeds
    ]
    if len(cells) > MOST_CELLS:
        raise ConfigError(
            t("The grid would have {count} pictures; at most {most} are drawn.", count=len(cells), most=MOST_CELLS),
            t("Take fewer adapters, weights, seeds or prompts."),
        )
    columns = [{"run": v.run, "title": v.title, "colour": v.colour, **described(v)} for v in who]
    axes = {"prompts": list(prompts), "seeds": list(seeds), "weights": list(weights), "columns": columns}
    kept = {"steps": sampling["steps"], "guidance": sampling["guidance"]}
    return Drawing(base, {**kept, **axes}, cells), who


def draw(studio: Studio, drawing: Drawing, who: Sequence[Voice]) -> Iterator[Drawing]:
    """Draw the cells one after the other, yielding after each; what is drawn is kept at once, whatever happens next.

    Each cell is a question of its own to the inference process, so that other pages' questions come between; the
    adapters stay on the base from cell to cell, and are loaded when the first cell asks for them.

    Raises:
        InferenceError: the inference process reported something.
    """
    comparisons, by_key = Comparisons(studio.store, studio.home), {voice.run: voice for voice in who}
    folders: dict[str, Path] = {}
    blends: dict[str, dict[str, Any]] = {}
    drawing.status = t("Waking the base")
    yield drawing
    how = {"steps": drawing.settings["steps"], "guidance": drawing.settings["guidance"]}
    for cell in drawing.cells:
        voice, began = by_key[cell.run], time.monotonic()
        folders |= voice.folders(studio)
        blends |= voice.blends()
        messages = [{"role": "user", "content": cell.prompt}]
        row = voice.row(1.0 if cell.weight is None else cell.weight)
        asked = studio.inference.generate(
            drawing.base, folders, messages, [row], {**how, "seed": cell.seed}, "text_to_image", blends
        )
        with closing(asked) as news:
            for message in news:
                if message["type"] == "progress" and not drawing.drawn:
                    drawing.status = message["message"]
                    yield drawing
                elif message["type"] == "piece":
                    cell.picture = message.get("picture", "")
        cell.seconds = time.monotonic() - began
        drawing.status = ""
        results = [asdict(it) for it in drawing.cells if it.picture]
        if drawing.kept is None:
            title = " / ".join(drawing.settings["prompts"])
            drawing.kept = comparisons.add(GRID, drawing.base, title, drawing.settings, results)
        else:
            comparisons.update(drawing.kept, results)
        drawing.finished = drawing.drawn == len(drawing.cells)
        yield drawing


def drawing_from(row: Mapping[str, Any]) -> Drawing:
    """A grid that was kept; cells that were never drawn are left empty in it."""
    return Drawing(row["base"], row["settings"], [Cell(**it) for it in row["results"]], finished=True, kept=row["id"])
