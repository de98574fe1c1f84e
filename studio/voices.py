"""Who can answer in a column: the base, an adapter of the library, or a kept mix of adapters."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.combinations import LIVE, Blend
from engine.errors import ConfigError, EngineError
from engine.models.catalogue import BUILTIN
from studio import library, mixing
from studio.context import Studio
from studio.i18n import t
from studio.markup import BASE_COLOUR
from studio.store import Row, StateError, is_run_id

BASE = "base"
MOST = 7
"""So many beside the base: with it, the rows of one batch (`engine.generation.MOST_COLUMNS`)."""

_MIX = re.compile(r"mix-(\d{1,15})")


@dataclass(frozen=True)
class Voice:
    """Somebody who answers.

    Attributes:
        key: how it was asked for: `base`, the id of an adapter or a run, or `mix-` and a mix's number.
        title: its name.
        colour: its colour.
        version: a name for it as it is now; an adapter that is trained on becomes another.
        rows: its adapters.
        blend: how they become one, by the adapters' versions; None for the base and for a single adapter.
    """

    key: str
    title: str
    colour: str
    version: str = BASE
    rows: tuple[Row, ...] = ()
    blend: Blend | None = None

    @property
    def run(self) -> str | None:
        """The key as a column has it: None for the base."""
        return None if self.key == BASE else self.key

    @property
    def combined(self) -> bool:
        """Whether its adapters are made into one before they answer; otherwise each stays whole."""
        return self.blend is not None and self.blend.how != LIVE

    def row(self, weight: float = 1.0) -> str | dict[str, float] | None:
        """Its row of a batch (`engine.rows.Row`), at a weight."""
        if not self.rows:
            return None
        if self.blend is None or self.combined:
            return self.version if weight == 1.0 else {self.version: weight}
        return {name: share * weight for name, share in self.blend.weights.items()}

    def folders(self, studio: Studio) -> dict[str, Path]:
        """Version -> folder of its adapters."""
        return {studio.library.version(row): studio.library.folder(row) for row in self.rows}

    def blends(self) -> dict[str, dict[str, Any]]:
        """Version -> fields of the combination that has to be made for it."""
        if self.blend is None or not self.combined:
            return {}
        blend = self.blend
        fields = {"how": blend.how, "rank": blend.rank, "density": blend.density, "seed": blend.seed}
        return {self.version: {"weights": dict(blend.weights), **fields}}


def base_voice() -> Voice:
    """The base without adapters, always grey."""
    return Voice(BASE, t("base"), BASE_COLOUR)


def voices(studio: Studio, base: str, keys: Sequence[str]) -> list[Voice]:
    """The base, then who was asked for, each once.

    Raises:
        ConfigError: no base, too many, of several tasks, or a mix whose adapters are gone.
        UnknownError, StateError, CheckpointError: one is not there, or belongs to another base.
    """
    if not isinstance(base, str) or not base.strip():
        raise ConfigError(t("No base is chosen."), t("Choose a base model."))
    asked = [key for key in dict.fromkeys(keys) if key != BASE]
    if len(asked) > MOST:
        raise ConfigError(
            t("{count} are chosen; at most {most} fit beside the base.", count=len(asked), most=MOST),
            t("Choose fewer."),
        )
    found = [base_voice(), *(_voice(studio, base, key) for key in asked)]
    if len({mixing.asked_as(row["task"]) for voice in found for row in voice.rows}) > 1:
        raise ConfigError(
            t("Adapters of several tasks are chosen; one answers in words and another in labels or pictures."),
            t("Choose adapters of one task."),
        )
    return found


def _voice(studio: Studio, base: str, key: str) -> Voice:
    mix = _MIX.fullmatch(key) if isinstance(key, str) else None
    if mix:
        return _mixed(studio, base, key, int(mix[1]))
    row = _of_run(studio, base, key) if is_run_id(key) else studio.library.usable(key)
    _check_base(base, row["name"], row["base"])
    return Voice(key, row["name"], row["colour"], studio.library.version(row), (row,))


def _check_base(base: str, name: str, own: str) -> None:
    if own != base:
        raise StateError(t("{name} belongs to the base {own}, not {base}.", name=name, own=own, base=base))


def _of_run(studio: Studio, base: str, run_id: str) -> Row:
    run = studio.store.run(run_id)
    _check_base(base, run["name"], run["model"])
    row = studio.library.of_run(run_id) if run["deleted_at"] is None and studio.jobs.has_adapter(run_id) else None
    if row is None:
        raise StateError(t("The run {name} has no adapter to compare.", name=run["name"]), t("Choose a finished run."))
    return studio.library.usable(row["id"])


def _mixed(studio: Studio, base: str, key: str, number: int) -> Voice:
    row = studio.library.mix(number)
    _check_base(base, row["name"], row["base"])
    if row["missing"]:
        raise StateError(
            t("{count} of the adapters of {name} are no longer here.", count=row["missing"], name=row["name"]),
            t("Take them out of the bin, or keep the mix anew."),
        )
    settings = row["settings"]
    mixture = mixing.check(studio, row["parts"], settings["how"], settings["rank"], settings["density"])
    weights = {
        studio.library.version(part): weight for part, (_, weight) in zip(mixture.rows, mixture.parts, strict=True)
    }
    blend = Blend(weights, mixture.blend.how, mixture.blend.rank, mixture.blend.density)
    told = json.dumps([weights, mixture.settings], sort_keys=True)
    version = f"{key}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    colour = mixing.MIX_COLOURS[(number - 1) % len(mixing.MIX_COLOURS)]
    return Voice(key, row["name"], colour, version, mixture.rows, blend)


def choices(studio: Studio, base: str) -> list[tuple[str, str]]:
    """What can stand beside this base: (label, key), adapters newest first, then mixes."""
    origins = {
        library.RUN: "",
        library.IMPORTED: t("imported"),
        library.MIXED: t("a mix saved as an adapter"),
        library.RESIZED: t("at another rank"),
    }
    found = []
    for row in studio.library.rows(base=base):
        origin = origins.get(row["origin"], "")
        found.append((f"{row['name']} ({origin})" if origin else str(row["name"]), str(row["id"])))
    for row in studio.library.mixes():
        if row["base"] == base:
            found.append((f"{row['name']} ({t('mix')})", f"mix-{row['id']}"))
    return found


def keys_of(studio: Studio, asked: Sequence[str]) -> list[str]:
    """Keys as `choices` has them: of a run its adapter's; what is not there is left out."""
    found = []
    for key in asked:
        try:
            row = studio.library.of_run(key) if is_run_id(key) else None
        except EngineError:
            continue
        found.append(str(row["id"]) if row else key)
    return [key for key in found if not is_run_id(key)]


def task_of(studio: Studio, base: str | None, chosen: Sequence[Voice] = ()) -> str:
    """What is asked: the task of who was chosen, of the base's newest adapter, or what the base is built in for."""
    for voice in chosen:
        if voice.rows:
            return mixing.asked_as(voice.rows[0]["task"])
    newest = studio.library.rows(base=base, limit=1) if base else []
    if newest and newest[0]["task"]:
        return mixing.asked_as(newest[0]["task"])
    builtin = BUILTIN.get(base or "")
    return mixing.asked_as(builtin.tasks[0]) if builtin else "causal_lm"
