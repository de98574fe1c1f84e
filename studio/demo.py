"""Demo mode: one public server for many strangers. What a visitor may ask for, and when their work is swept away.

On by `STUDIO_DEMO=1`; on a Hugging Face Space also without it, unless `STUDIO_AUTH` names who may come in. Every limit
is a field of `Limits`; every check is a function here that does nothing outside of demo mode. Who asks is `visitors`'.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError, EngineError
from engine.models.catalogue import BUILTIN, DEFAULT, canonical
from engine.train.job import JobSpec
from studio import states, visitors
from studio.i18n import t
from studio.markup import esc
from studio.visitors import Visitors

if TYPE_CHECKING:
    from studio.context import Studio
    from studio.sweeping import Sweeper

_TOYS = tuple(model.name for model in BUILTIN.values() if model.toy)
_LISTED = (DEFAULT, "minilm")
_LARGEST = {
    "r": "rank",
    "init_r": "rank",
    "target_r": "rank",
    "num_virtual_tokens": "tokens",
    "encoder_hidden_size": "hidden",
}
"""Fields of adapters that say how large they become, and the limit of each."""


class DemoError(EngineError):
    """Something that the demo does not do for visitors."""

    code = "demo"


@dataclass(frozen=True)
class Limits:
    """What one visitor of the demo may ask for.

    Attributes:
        models: bases that are offered; no other is fetched or opened.
        minutes: after so long a run is stopped, and keeps what it has learned.
        steps: most optimizer steps of a run.
        batch: most rows in one forward pass.
        length: most tokens of a row.
        rank: largest rank of an adapter.
        tokens: most virtual tokens of an adapter, and most words of an answer.
        hidden: widest encoder of virtual tokens.
        rows: most rows of a data set.
        upload: largest file, bytes.
        waiting: runs that are queued or training at once.
        runs: runs that are kept.
        datasets: data sets that are kept.
        drawing: most steps of a picture.
        patience: seconds that a question waits for another visitor's answer before it takes the machine.
        keep: seconds after a visitor's last visit until their work is swept away.

    Raises:
        ConfigError: a limit that leaves nothing to do.
    """

    models: tuple[str, ...] = (*_TOYS, *_LISTED)
    minutes: float = 5.0
    steps: int = 1000
    batch: int = 16
    length: int = 512
    rank: int = 64
    tokens: int = 120
    hidden: int = 1024
    rows: int = 2000
    upload: int = 5 * 2**20
    waiting: int = 2
    runs: int = 12
    datasets: int = 8
    drawing: int = 30
    patience: float = 60.0
    keep: float = 7200.0

    def __post_init__(self) -> None:
        small = [name for name, value in vars(self).items() if name != "models" and not value > 0]
        if small or not self.models:
            raise ConfigError(f"Limits of the demo have to be above 0: {', '.join(small) or 'models'}.")

    @classmethod
    def of_environment(cls) -> Limits:
        """The limits as the environment changes them.

        `$STUDIO_DEMO_MODELS` (names with commas) stands in place of the models that are no toys, `$STUDIO_DEMO_LIMITS`
        (`minutes=10,rows=500`) in place of other fields.

        Raises:
            ConfigError: an unknown limit, or one that is no number.
        """
        named = os.environ.get("STUDIO_DEMO_MODELS")
        more = _LISTED if named is None else tuple(canonical(name.strip()) for name in named.split(",") if name.strip())
        changed: dict[str, Any] = {}
        for pair in filter(None, os.environ.get("STUDIO_DEMO_LIMITS", "").split(",")):
            name, _, value = pair.strip().partition("=")
            usual = vars(cls).get(name)
            try:
                changed[name] = type(usual)(value) if isinstance(usual, int | float) else float("nan")
            except ValueError:
                changed[name] = float("nan")
            if math.isnan(changed[name]):
                known = ", ".join(key for key, it in vars(cls).items() if isinstance(it, int | float))
                raise ConfigError(f"STUDIO_DEMO_LIMITS has {pair!r}; needed: name=number, of {known}.")
        return cls(models=(*_TOYS, *more), **changed)


def active() -> Limits | None:
    """The limits in demo mode, None outside of it."""
    asked = os.environ.get("STUDIO_DEMO", "")
    on_space = bool(os.environ.get("SPACE_ID")) and not asked and not os.environ.get("STUDIO_AUTH")
    return Limits.of_environment() if asked == "1" or on_space else None


# What a visitor asks for


def _refuse(message: str, hint: str = "") -> DemoError:
    return DemoError(
        message, f"{hint} {t('Duplicate the Space, or run the studio yourself: there it has no such limit.')}".strip()
    )


def check_model(name: str) -> None:
    """Refuse a base that is not listed.

    Raises:
        DemoError: it is not.
    """
    limits = active()
    if limits is not None and canonical(name) not in limits.models:
        raise _refuse(
            t("The demo does not open {name}.", name=repr(name[:80])),
            t("It offers {names}.", names=", ".join(limits.models)),
        )


def offers(name: str) -> bool:
    """Whether a list of bases should show this one."""
    limits = active()
    return limits is None or name in limits.models


def check_upload(path: Path, kept: int) -> None:
    """Refuse a file that is too large, or one more data set than a visitor may keep.

    Raises:
        DemoError: with the limit.
    """
    limits = active()
    if limits is None or visitors.present() is None:
        return
    if path.stat().st_size > limits.upload:
        raise _refuse(t("The demo takes files of up to {size} MB.", size=limits.upload // 2**20))
    if kept >= limits.datasets:
        raise _refuse(t("The demo keeps {count} data sets for a visitor.", count=limits.datasets))


def check_rows(count: int) -> None:
    """Refuse a data set of too many rows.

    Raises:
        DemoError: with the limit.
    """
    limits = active()
    if limits is not None and visitors.present() is not None and count > limits.rows:
        raise _refuse(
            t("The file has {count} rows; the demo takes {most}.", count=f"{count:,}", most=f"{limits.rows:,}"),
            t("Cut it shorter."),
        )


def check_job(spec: JobSpec, rows: int, runs: list[Mapping[str, Any]]) -> None:
    """Refuse a run that would take too much of a shared machine.

    Args:
        spec: the run.
        rows: rows of its data set.
        runs: all of the visitor's, those in the bin too.

    Raises:
        DemoError: with every limit that it exceeds.
    """
    limits = active()
    if limits is None or visitors.present() is None:
        return
    if sum(row["state"] in states.LIVE for row in runs) >= limits.waiting:
        raise _refuse(t("{count} of your runs are waiting or training already.", count=limits.waiting), t("Wait."))
    if len(runs) >= limits.runs:
        raise _refuse(
            t("The demo keeps {count} runs for a visitor.", count=limits.runs), t("Delete some, and empty the bin.")
        )
    training = spec.training
    passes = math.ceil(rows / (training.batch_size * training.gradient_accumulation)) * training.epochs
    asked = {
        "training.max_steps": (training.max_steps or passes, limits.steps),
        "training.batch_size": (training.batch_size * training.gradient_accumulation, limits.batch),
        "training.max_length": (training.max_length, limits.length),
        "training.threads": (training.threads or 1, os.cpu_count() or 1),
    }
    for name, limit in _LARGEST.items():
        value = spec.adapter.get(name)
        if isinstance(value, int | float):
            asked[f"adapter.{name}"] = (value, getattr(limits, limit))
    pattern = spec.adapter.get("rank_pattern")
    for value in pattern.values() if isinstance(pattern, Mapping) else ():
        if isinstance(value, int | float) and not value <= limits.rank:
            asked["adapter.rank_pattern"] = (value, limits.rank)
    over = [f"{name} {value:g} > {most:g}" for name, (value, most) in asked.items() if not value <= most]
    if over:
        raise _refuse(t("The run is too large for the demo: {list}.", list="; ".join(over)))


def check_question(sampling: Mapping[str, Any]) -> None:
    """Refuse an answer of too many words, or a picture of too many steps.

    Raises:
        DemoError: with the limit.
    """
    limits = active()
    if limits is None or visitors.present() is None:
        return
    for name, most in (("max_new_tokens", limits.tokens), ("steps", limits.drawing)):
        value = sampling.get(name)
        if value is not None and not value <= most:
            raise _refuse(t("{name} is {value}; the demo takes {most}.", name=name, value=value, most=most))


def check_feature(name: str) -> None:
    """Refuse what the demo has turned off.

    That is `import` (files of strangers), `merged` and `gguf` (whole models on the disk), `push` (uploads in the
    owner's name), `shared` (the order of the queue, presets of one's own).

    Raises:
        DemoError: it is off.
    """
    if active() is not None and name == "import":
        raise _refuse(t("Importing adapters is off in the demo."))
    if active() is not None and name in ("merged", "gguf"):
        raise _refuse(t("Exporting a whole model is off in the demo."), t("Export the adapter."))
    if active() is not None and name == "push":
        raise _refuse(t("Pushing is off in the demo."))
    if active() is not None and name == "shared":
        raise _refuse(t("This is shared by everybody in the demo, and cannot be changed there."))


def overdue(row: Mapping[str, Any]) -> str:
    """Why a run has to end now, "" while it may go on."""
    limits = active()
    late = limits is not None and row["started"] and time.time() - row["started"] > 60 * limits.minutes
    minutes = f"{limits.minutes:g}" if limits else ""
    return t("The demo ends runs after {minutes} minutes and keeps what they have.", minutes=minutes) if late else ""


def patience() -> float:
    """Seconds that a question for one base waits for an answer of another one."""
    limits = active()
    return limits.patience if limits else 0.0


# The page and the server


@dataclass
class Entrance:
    """What a server in demo mode has beside a studio: who its visitors are, what they may do, and who sweeps."""

    limits: Limits
    visitors: Visitors
    sweeper: Sweeper

    def close(self) -> None:
        """End the sweeper; keep nobody apart any more."""
        self.sweeper.close()
        visitors.keep_apart(False)

    @classmethod
    def open(cls, studio: Studio) -> Entrance | None:
        """Keep visitors apart from now on and remove what an earlier server left; None outside of demo mode."""
        limits = active()
        if limits is None:
            return None
        # On ZeroGPU the page's process has to know of a function that wants a GPU before it serves.
        from studio import worker as worker
        from studio.sweeping import Sweeper

        known = Visitors()
        sweeper = Sweeper(studio, known, limits.keep)
        visitors.keep_apart()
        sweeper.start()
        return cls(limits, known, sweeper)

    def door(self) -> Any:
        """The middleware that knows visitors."""
        from starlette.middleware import Middleware

        return Middleware(visitors.Door, visitors=self.visitors)


def banner() -> None:
    """Say on the page what is limited and why, with the button that takes the limits away; nothing elsewhere."""
    import gradio as gr

    limits = active()
    if limits is None:
        return
    said = t(
        "Everybody shares this machine, so a run has at most {steps} steps and {minutes} minutes, a data set {rows}"
        " rows and {size} MB, and only the listed bases can be used. Only you see what you make; it is removed {hours}"
        " hours after your last visit. Importing adapters and exporting whole models are off.",
        steps=limits.steps,
        minutes=f"{limits.minutes:g}",
        rows=f"{limits.rows:,}",
        size=limits.upload // 2**20,
        hours=f"{limits.keep / 3600:g}",
    )
    head = t("This is a demo.")
    with gr.Row(elem_id="demo-banner", equal_height=True):
        gr.HTML(f'<p role="note"><b>{esc(head)}</b> {esc(said)}</p>')
        if os.environ.get("SPACE_ID"):
            gr.DuplicateButton(t("Duplicate this Space"), elem_id="demo-duplicate", min_width=180)


def cache_rule() -> tuple[int, int]:
    """How often (seconds) Gradio looks for old uploads, and how old they are then; what is used was copied."""
    limits = active()
    return (600, min(3600, int(limits.keep))) if limits else (3600, 86400)
