"""The run doctor: what a run's curve says of it, in words, with the numbers it rests on and what to change. Torch-free.

    from engine.diagnosis import Course, diagnose
    for finding in diagnose(spec, Course.of(events)):
        print(finding.words(), finding.changes)

The rules are cautious: each wants several steps or evaluations that agree, and a change that is larger than the noise
of the steps, for a false alarm costs a person more than a late one. docs/live.md says what each of them looks at.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from engine import remedies
from engine.errors import CheckpointError
from engine.findings import BAD, GOOD, NOTE, WARN, Finding
from engine.memory.prediction import size
from engine.train.events import EVENTS
from engine.train.job import JobSpec

_NOISY = ("text_to_image",)
"""Tasks whose loss depends on the noise that was drawn more than on what was learned."""
_LEARNED = 0.02
"""A loss below this leaves nothing to learn."""


@dataclass(frozen=True)
class Course:
    """What a run did, as far as it came.

    Attributes:
        steps, losses: of every step in order, finite.
        norms: the gradient's norm of each step; empty where unknown.
        evals: (step, loss) of each evaluation in order.
        start: the newest `start` event.
        error: the `error` event that ended the run, if one did.
        done: the `done` event, if it is done.
        held: bytes of memory that it held after its last step.
        running: whether more may come.
    """

    steps: Sequence[int]
    losses: Sequence[float]
    norms: Sequence[float] = ()
    evals: Sequence[tuple[int, float]] = ()
    start: Mapping[str, Any] = field(default_factory=dict)
    error: Mapping[str, Any] | None = None
    done: Mapping[str, Any] | None = None
    held: int | None = None
    running: bool = False

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]], running: bool = False) -> Course:
        """A run's events in order. Of a step that ran twice the newest counts; an error it went on from does not."""
        steps: dict[int, Mapping[str, Any]] = {}
        evals: dict[int, float] = {}
        last: dict[str, Mapping[str, Any]] = {}
        for event in events:
            kind = event["type"]
            if kind == "step" and _finite(event.get("loss")):
                steps[int(event["step"])] = event
            elif kind == "eval" and _finite(event.get("loss")):
                evals[int(event["step"])] = float(event["loss"])
            elif kind in ("start", "error", "done"):
                last[kind] = event
                if kind == "start":
                    last.pop("error", None)
        order = sorted(steps)
        norms = [steps[step].get("grad_norm") for step in order]
        return cls(
            steps=order,
            losses=[float(steps[step]["loss"]) for step in order],
            norms=[float(norm) for norm in norms if norm is not None] if None not in norms else (),
            evals=sorted(evals.items()),
            start=last.get("start", {}),
            error=last.get("error"),
            done=last.get("done"),
            held=steps[order[-1]].get("memory") if order else None,
            running=running,
        )


@dataclass(frozen=True)
class Level:
    """The mean of some losses, and how far it may be off (one standard error)."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Level:
        return cls(statistics.fmean(values), _spread(values) / math.sqrt(len(values)))

    def above(self, other: Level, share: float, errors: float) -> bool:
        """Whether this lies above another by a share of that, and by more than so many standard errors."""
        gap = self.mean - other.mean
        return gap > share * abs(other.mean) and gap > errors * math.hypot(self.error, other.error)


def diagnose(spec: JobSpec, course: Course) -> list[Finding]:
    """What a run's course says, the gravest first; empty while it is too early to say, or where nothing stands out."""
    found = list(_ended(spec, course))
    if not found:
        found = [it for it in (_rate_too_high(spec, course),) if it]
    if not found:
        # Of these two, the first says more.
        by_heart = _overfitting(spec, course) or _repeated(spec, course)
        found = [it for it in (by_heart, _not_learning(spec, course), _spikes(spec, course)) if it]
    found += [it for it in (_few_rows(spec, course), _kept(course)) if it]
    if all(it.severity in (NOTE, GOOD) for it in found):
        healthy = _healthy(course)
        found += [healthy] if healthy else []
    order = (BAD, WARN, NOTE, GOOD)
    return sorted(found, key=lambda it: order.index(it.severity))


def read(folder: Path) -> tuple[JobSpec, Course]:
    """The job and the course of a run that `python -m engine train` wrote into this folder.

    Raises:
        CheckpointError: the folder holds no such run.
    """
    try:
        text = (folder / EVENTS).read_text(encoding="utf-8")
        events = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"The events of {folder} cannot be read: {error}.",
            "Name the --out folder of `python -m engine train`; a run of the studio is told on its own page.",
        ) from error
    return JobSpec.from_file(folder / "spec.yaml"), Course.of(events)


def _ended(spec: JobSpec, course: Course) -> Iterator[Finding]:
    """What the run's own last word says."""
    error = course.error or {}
    code, message = str(error.get("code", "")), str(error.get("message", ""))
    if code == "memory":
        yield Finding(
            "memory",
            BAD,
            {"rows": f"{spec.training.batch_size:,}"},
            remedies.memory(spec, error.get("remedy")),
        )
    elif code == "lost" and _nearly_full(course):
        values = {"held": size(course.held or 0), "limit": size(int(course.start["memory_limit"]))}
        yield Finding(
            "memory-likely",
            BAD,
            values,
            remedies.memory(spec),
        )
    elif code == "diverged" or (code == "training" and "diverged" in message):
        values = {"step": f"{(course.steps[-1] if course.steps else 0) + 1:,}", "rate": _said(_rate(spec))}
        yield Finding(
            "diverged",
            BAD,
            values,
            remedies.diverged(spec),
        )


def _nearly_full(course: Course) -> bool:
    limit = course.start.get("memory_limit")
    return bool(limit and course.held and course.held > 0.8 * limit)


def _rate_too_high(spec: JobSpec, course: Course) -> Finding | None:
    """The last quarter of the steps lies clearly above the first ones, the evaluations above the one before them."""
    if len(course.losses) < 20:
        return None
    # Steps that are too big show from the third or fourth on, so the start is what came before.
    start, last = Level.of(course.losses[:2]), _last(course)
    now, checked = Level.of(last), len(course.evals) >= 3
    if checked and (min(loss for _, loss in course.evals[-2:]) < 1.1 * course.evals[0][1] or now.mean < start.mean):
        return None
    # Two steps say little of their own noise; the last ones say more.
    noise = Level(start.mean, max(start.error, _spread(last) / math.sqrt(2)))
    if not checked and not now.above(noise, 0.25, 3):
        return None
    if sum(loss > start.mean for loss in last) < 0.9 * len(last):
        return None
    values = {"start": _said(start.mean), "now": _said(now.mean), "steps": f"{len(last):,}", "rate": _said(_rate(spec))}
    return Finding(
        "rate-high",
        BAD,
        values,
        remedies.rate_too_high(spec),
    )


def _overfitting(spec: JobSpec, course: Course) -> Finding | None:
    """Evaluation has been above its best for three checks and more, and training went on falling."""
    if len(course.evals) < 4:
        return None
    best_step, best = min(course.evals, key=lambda it: it[1])
    after = [(step, loss) for step, loss in course.evals if step > best_step]
    if len(after) < 3 or any(loss < 1.01 * best for _, loss in after):
        return None
    if statistics.fmean(loss for _, loss in after[-2:]) < 1.04 * best:
        return None
    until = [loss for step, loss in zip(course.steps, course.losses, strict=True) if step <= best_step]
    width = max(4, min(len(until), len(course.losses) - len(until)) // 2)
    before = Level.of(until[-width:]) if len(until) >= 4 else _first(course)
    now = Level.of(course.losses[-width:])
    if not before.above(now, 0.03, 2) or now.mean > statistics.fmean(course.losses[:3]):
        return None
    values = {
        "checks": f"{len(after)}",
        "best": _said(best),
        "step": f"{best_step:,}",
        "now": _said(after[-1][1]),
        "before": _said(before.mean),
        "after": _said(now.mean),
    }
    return Finding(
        "overfitting",
        WARN,
        values,
        remedies.overfitting(spec),
    )


def _not_learning(spec: JobSpec, course: Course) -> Finding | None:
    """After the warm-up and a good many steps, neither loss has moved."""
    count, total = len(course.losses), int(course.start.get("total_steps") or 0)
    warm = math.ceil(spec.training.warmup_ratio * total)
    if spec.task in _NOISY or count < max(24, warm + 16) or (course.running and count < 0.25 * total):
        return None
    first, last = _first(course), Level.of(_last(course))
    if first.mean < _LEARNED or first.above(last, 0.02, 2):
        return None
    if len(course.evals) >= 3:
        start, best = course.evals[0][1], min(loss for _, loss in course.evals[1:])
        # The loss of preferences begins at ln 2, and moves by thousandths while the margins grow already.
        least = 0.001 if spec.task == "preference" else 0.01
        if best < (1 - least) * start or abs(course.evals[-1][1] - start) > 0.03 * start:
            return None
        values = {"start": _said(start), "now": _said(course.evals[-1][1])}
    else:
        # Without evaluations a small fall may hide in the noise of the steps.
        if spec.task == "preference" or count < 40 or math.hypot(first.error, last.error) > 0.05 * first.mean:
            return None
        values = {"start": _said(first.mean), "now": _said(last.mean)}
    usual, rate = remedies.usual_rate(spec), spec.training.learning_rate
    values |= {"steps": f"{count:,}", "rate": _said(rate), "usual": _said(usual)}
    if rate < usual / 4:
        return Finding(
            "rate-low",
            WARN,
            values,
            remedies.rate_too_low(spec),
        )
    return Finding(
        "flat",
        WARN,
        values,
        remedies.not_learning(spec),
    )


def _spikes(spec: JobSpec, course: Course) -> Finding | None:
    """Single steps far above what is around them, with a gradient to match, three times and more."""
    width, recent = 16, 300
    start = max(width, len(course.losses) - recent)
    if not course.norms or len(course.losses) <= start:
        return None
    # Of all steps at once: a run that is looked at is read anew each second.
    losses, norms = (np.asarray(values[start - width :], dtype=float) for values in (course.losses, course.norms))
    around = sliding_window_view(losses[:-1], width)
    middle = np.median(around, axis=1)
    spread = np.median(np.abs(around - middle[:, None]), axis=1)
    usual = np.median(sliding_window_view(norms[:-1], width), axis=1)
    above = (losses[width:] > np.maximum(2 * middle, middle + 12 * spread)) & (norms[width:] > 4 * usual)
    high: list[int] = (start + np.flatnonzero(above)).tolist()
    if len(high) < 3:
        return None
    worst = max(high, key=lambda place: course.losses[place])
    values = {
        "count": f"{len(high)}",
        "steps": f"{len(course.losses) - start:,}",
        "loss": _said(course.losses[worst]),
        "step": f"{course.steps[worst]:,}",
    }
    return Finding(
        "spikes",
        WARN,
        values,
        remedies.spikes(spec),
    )


def _repeated(spec: JobSpec, course: Course) -> Finding | None:
    """Every row was seen many times, and nothing shows that this still helps."""
    rows = int(course.start.get("train_rows") or 0)
    if not rows or not course.steps or spec.task in _NOISY:
        return None
    times = course.steps[-1] * remedies.rows_per_step(spec) / rows
    if times < 15:
        return None
    values = {"rows": f"{rows:,}", "times": f"{times:.0f}"}
    if len(course.evals) >= 3:
        best_step, best = min(course.evals, key=lambda it: it[1])
        if best_step > 0.67 * course.steps[-1] or course.evals[-1][1] < 1.01 * best:
            return None
        values["step"] = f"{best_step:,}"
    elif course.evals:
        return None
    else:
        return Finding("repeated", WARN, values, remedies.repeated(spec, rows), "repeated-unchecked")
    return Finding("repeated", WARN, values, remedies.repeated(spec, rows))


def _few_rows(spec: JobSpec, course: Course) -> Finding | None:
    rows = int(course.start.get("train_rows") or 0)
    if not 0 < rows < 20 or spec.task in _NOISY:
        return None
    return Finding(
        "few-rows",
        NOTE,
        {"rows": f"{rows}"},
    )


def _kept(course: Course) -> Finding | None:
    """What early stopping did."""
    if course.done is None or course.done.get("best_step") is None:
        return None
    loss, last = course.done.get("eval_loss"), course.done.get("step") or 0
    values = {"step": f"{course.done['best_step']:,}", "loss": _said(loss or math.nan), "last": f"{last:,}"}
    return Finding("early" if course.done.get("early") else "best", GOOD, values)


def _healthy(course: Course) -> Finding | None:
    """The evaluation has fallen and is near its best; without evaluations, the training loss has fallen clearly."""
    if len(course.evals) >= 3:
        start, now = course.evals[0][1], course.evals[-1][1]
        best = min(loss for _, loss in course.evals)
        if now > 0.97 * start or now > max(1.04 * best, best + 0.01 * start):
            return None
        text = "healthy"
    else:
        if len(course.losses) < 24:
            return None
        first, last = _first(course), Level.of(_last(course))
        if not first.above(last, 0.05, 3):
            return None
        start, now = first.mean, last.mean
        text = "healthy-unchecked"
    values = {"start": _said(start), "now": _said(now), "steps": f"{len(course.losses):,}"}
    return Finding("healthy", GOOD, values, text=text)


def _first(course: Course) -> Level:
    """The level of the first steps."""
    return Level.of(course.losses[: max(4, min(10, len(course.losses) // 6))])


def _last(course: Course) -> Sequence[float]:
    """The losses of the last quarter, of some hundred steps at the most."""
    return course.losses[-min(500, max(8, len(course.losses) // 4)) :]


def _spread(values: Sequence[float]) -> float:
    """The standard deviation. `statistics.stdev` is exact, and takes a second for a long run."""
    if len(values) < 2:
        return abs(values[0])
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _rate(spec: JobSpec) -> float:
    return spec.training.learning_rate


def _said(value: float) -> str:
    """Three digits, as people write them."""
    return f"{value:.3g}"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
