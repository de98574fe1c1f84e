"""What a run will cost, as the form shows it before the start: pure functions from what was found out to HTML."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from studio import presets, recipes
from studio.i18n import N_, t
from studio.markup import esc, seconds, size, table
from studio.store import Store

PARTS = (
    (N_("base"), ("weights",)),
    (N_("adapter"), ("adapter",)),
    (N_("gradients and optimizer"), ("gradients", "optimizer")),
    (N_("batch"), ("activations", "logits")),
    (N_("process and libraries"), ("slack", "overhead")),
)
"""Parts of the memory bar and the parts of a prediction (`engine.memory.Prediction`) that each sums up."""
VERDICTS = {"fits": N_("fits"), "tight": N_("tight"), "exceeds": N_("won't fit")}
_KINDS = {"fits": "good", "tight": "warn", "exceeds": "bad"}
NOTHING_FITS = N_("No smaller batch, checkpointing or 4-bit base makes it fit: take a smaller base or shorter rows.")
_STEPS = 200
"""So many steps of an earlier run are looked at."""


@dataclass(frozen=True)
class Pace:
    """How long a step takes, from an earlier run on this machine.

    Attributes:
        seconds: of a step, the median.
        run: that run's name. scaled: it had another number of rows in a step, and the time is in proportion.
    """

    seconds: float
    run: str
    scaled: bool


def pace(store: Store, spec: Mapping[str, Any], machine: str, processes: int = 1) -> Pace | None:
    """The pace of the newest run on this machine with the same base, method, length and memory settings; or None.

    One with as many rows in a step goes before others.
    """
    method = "full" if spec["full"] else spec["adapter"]["method"]
    sql = (
        "SELECT id, name, spec FROM runs WHERE machine = ? AND processes = ? AND task = ? AND model = ? AND method = ?"
        " AND step >= 4 AND mine(owner) AND deleted_at IS NULL ORDER BY created DESC LIMIT 20"
    )
    found: Pace | None = None
    for row in store.db.query(sql, [machine, processes, spec["task"], spec["model"], method]):
        earlier = store.run(row["id"])["spec"]
        if _like(earlier) != _like(spec):
            continue
        passed = _step_seconds(store, row["id"])
        if passed is None:
            continue
        rows, own = _rows_in_step(earlier), _rows_in_step(spec)
        if rows == own:
            return Pace(passed, row["name"], scaled=False)
        found = found or Pace(passed * own / rows, row["name"], scaled=True)
    return found


def _like(spec: Mapping[str, Any]) -> tuple[Any, ...]:
    training = spec["training"]
    names = ("max_length", "precision", "gradient_checkpointing", "threads", "optimizer")
    return spec.get("quantization", "none"), *(training.get(name) for name in names)


def _rows_in_step(spec: Mapping[str, Any]) -> int:
    return int(spec["training"]["batch_size"]) * int(spec["training"]["gradient_accumulation"])


def _step_seconds(store: Store, run_id: str) -> float | None:
    """The median time from one step to the next; checks and checkpoints between two steps do not move it."""
    sql = "SELECT step, time FROM events WHERE run_id = ? AND type = 'step' ORDER BY id DESC LIMIT ?"
    rows = list(store.db.query(sql, [run_id, _STEPS]))
    passed = [b["time"] - a["time"] for b, a in itertools.pairwise(rows) if b["step"] - a["step"] == 1]
    return statistics.median(passed) if len(passed) >= 3 else None


def steps(spec: Mapping[str, Any], rows: int) -> int:
    """About how many steps a run over so many training rows has."""
    training = spec["training"]
    if training["max_steps"]:
        return int(training["max_steps"])
    return max(1, round(float(training["epochs"]) * math.ceil(rows / _rows_in_step(spec))))


def card(found: Mapping[str, Mapping[str, Any]], times: str, busy: bool = False, fault: str = "") -> str:
    """The cost card.

    Args:
        found: name of a stage of `engine.memory.preview.stages` -> the stage, as far as they are known.
        times: what is said of the time, as HTML.
        busy: more is being worked out.
        fault: instead of the costs: why there is none, as HTML.
    """
    body = fault or "".join(
        [
            _counted(found.get("count")),
            _memory(found, busy),
            f'<div class="tc-line"><span class="tc-name">{esc(t("Time"))}</span><span>{times}</span></div>',
        ]
    )
    state = ' aria-busy="true"' if busy else ""
    return f'<section class="tc-card" aria-label="{esc(t("What it will cost"))}"{state}>{body}</section>'


def _counted(stage: Mapping[str, Any] | None) -> str:
    """How many parameters learn, in a sentence."""
    if stage is None:
        text = esc(t("Counting what learns ..."))
    elif stage["full"]:
        text = t(
            "All {count} parameters of the base learn; the result will be a model of about {size}.",
            count=f"<b>{stage['base']:,}</b>",
            size=size(4 * stage["base"]),
        )
    else:
        text = t(
            "{count} of {all} parameters learn ({share} %); the adapter will be a file of {size}.",
            count=f"<b>{stage['trainable']:,}</b>",
            all=f"{stage['parameters']:,}",
            share=f"{stage['share'] * 100:.2g}",
            size=size(stage["adapter_bytes"]),
        )
    return f'<div class="st-count">{text}</div>'


def _memory(found: Mapping[str, Mapping[str, Any]], busy: bool) -> str:
    name = f'<span class="tc-name">{esc(t("Memory"))}</span>'
    peak, machine = found.get("peak"), found.get("machine")
    if peak is None or machine is None:
        waiting = t("Working out the memory ...") if busy else t("Not worked out.")
        return f'<div class="tc-line">{name}<span>{esc(waiting)}</span></div>{_bar([], 1, 1)}'
    if "prediction" not in peak:
        said = t("Not predicted for this task yet. Begin with a batch of 1 and raise it while there is room.")
        return f'<div class="tc-line">{name}<span>{esc(said)}</span></div>'
    prediction, budget, verdict = peak["prediction"], machine["budget"], peak["verdict"]
    said = esc(t(VERDICTS[verdict]))
    badge = f'<span class="st-badge {_KINDS[verdict]}" data-verdict="{verdict}">{said}</span>'
    words = esc(
        t("about {peak} at the peak; {budget} of {memory} are free now.", peak=size(prediction["peak"]),
          budget=size(budget), memory=size(machine["memory"]))
    )  # fmt: skip
    parts = [(t(label), sum(prediction[key] for key in keys)) for label, keys in PARTS]
    return (
        f'<div class="tc-line">{name}<span>{badge} {words} {_largest(found, busy)}</span></div>'
        f"{_bar(parts, budget, prediction['peak'])}"
    )


def _largest(found: Mapping[str, Mapping[str, Any]], busy: bool) -> str:
    """The largest batch, and the change that makes the job fit."""
    said, remedy, largest = [], found.get("remedy"), found.get("largest")
    if remedy is not None and remedy["changes"]:
        said.append(
            t("It fits with {changes} (about {peak}).", changes=changed(remedy["changes"]), peak=size(remedy["peak"]))
        )
    elif remedy is not None:
        said.append(t(NOTHING_FITS))
    if largest is not None:
        said.append(
            t("The largest batch that fits: {batch}.", batch=f"{largest['batch']:,}")
            if largest["batch"]
            else t("Not even a batch of 1 fits.")
        )
    elif busy:
        said.append(t("Looking for the largest batch ..."))
    return esc(" ".join(said))


def changed(changes: Mapping[str, Any]) -> str:
    """A remedy's changes as a person would write them."""
    plain = {key.removeprefix("training."): value for key, value in changes.items()}
    return ", ".join(
        f"{key} {str(value).lower() if isinstance(value, bool) else value}" for key, value in plain.items()
    )


def _bar(parts: Sequence[tuple[str, int]], budget: int, peak: int) -> str:
    """A bar of the parts, as wide as the larger of the peak and what is free; a line shows where that ends."""
    total = sum(count for _, count in parts)
    # Loading can take more than a step: the rest of the bar up to the peak.
    more = peak - total if parts and peak > total else 0
    parts = [*parts, (t("while loading or saving"), more)] if more else parts
    whole = max(budget, peak, 1)
    pieces = "".join(
        f'<i class="tc-p{number}" style="width:{100 * count / whole:.2f}%" title="{esc(label)}: {size(count)}"></i>'
        for number, (label, count) in enumerate(parts)
    )
    keys = "".join(
        f'<li><i class="tc-p{number}"></i>{esc(label)} {size(count)}</li>'
        for number, (label, count) in enumerate(parts)
    )
    mark = f'<em style="left:{100 * budget / whole:.2f}%"></em>' if parts else ""
    return (
        f'<div class="tc-bar" aria-hidden="true"><span>{pieces}</span>{mark}</div>'
        f'<ul class="tc-keys">{keys or "<li>&nbsp;</li>"}</ul>'
    )


def times(found: Pace | None, count: int) -> str:
    """What is said of the time, as HTML."""
    if found is None:
        return esc(t("{count} steps; how long they take is measured after the first steps.", count=f"{count:,}"))
    words = t(
        "about {step} a step, {total} for {count} steps, and loading and checks beside them",
        step=_fine(found.seconds), total=seconds(found.seconds * count), count=f"{count:,}",
    )  # fmt: skip
    source = (
        t("in proportion to {run}, which had other batches", run=found.run)
        if found.scaled
        else t("as {run} took here", run=found.run)
    )
    return f'{esc(words)} <span class="st-hint">({esc(source)})</span>'


def _fine(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 0.995 else f"{value:.1f} s" if value < 10 else seconds(value)


def methods(rows: Sequence[Mapping[str, Any]], chosen: str, busy: bool = False) -> str:
    """What each method costs on this base, in the order of the registry; what cannot stand there is greyed, with why.

    Args:
        rows: of `engine.memory.preview.methods`, those that are known.
        chosen: the form's method.
        busy: more are coming.
    """
    known = {row["method"]: row for row in rows}
    base = next((row["base"] for row in rows if "base" in row), None)
    lines = [_method(method, known.get(method.name), base, chosen) for method in recipes.methods()]
    head = (t("Method"), t("In a line"), t("Parameters"), t("File"))
    state = ' aria-busy="true"' if busy else ""
    return f'<div class="tc-methods"{state}>{table(head, lines)}</div>'


def _method(method: presets.Method, row: Mapping[str, Any] | None, base: int | None, chosen: str) -> list[str]:
    if method is recipes.FULL:
        row = {"trainable": base, "share": 1.0, "adapter_bytes": 4 * base} if base else None
    refused = row is not None and "refused" in row
    mark = f' <span class="st-badge live">{esc(t("chosen"))}</span>' if method.name == chosen else ""
    title = f'<span class="{"tc-off" if refused else ""}"><b>{esc(method.title)}</b>{mark}</span>'
    meaning = esc(t(method.meaning))
    if row is None:
        return [title, meaning, "", ""]
    if refused:
        reason = f'<span class="tc-why">{esc(t("Not here:"))} {esc(row["refused"].splitlines()[0])}</span>'
        return [title, f'<span class="tc-off">{meaning}</span> {reason}', "–", "–"]
    count = f'<span class="num">{row["trainable"]:,} ({100 * row["share"]:.2g} %)</span>'
    return [title, meaning, count, f'<span class="num">{size(row["adapter_bytes"])}</span>']


def differences(rows: Sequence[tuple[str, str, str]], origin: str) -> str:
    """Which settings differ from the run that the form was filled from."""
    if not rows:
        said = t("As in {run}: no setting is changed.", run=origin)
        return f'<p class="st-hint" id="train-same-as-run">{esc(said)}</p>'
    cells = [
        [f"<code>{esc(key)}</code>", f'<span class="tc-old">{esc(old)}</span>', f"<b>{esc(new)}</b>"]
        for key, old, new in rows
    ]
    caption = t("Changed since {run}", run=origin)
    return f'<div class="tc-diff">{table((t("Setting"), t("was"), t("will be")), cells, caption)}</div>'
