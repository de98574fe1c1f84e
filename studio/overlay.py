"""The curves of several runs in one drawing: each in its run's own colour, by steps, time or tokens."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from studio import charts
from studio.charts import Curve
from studio.i18n import N_, t
from studio.points import Points
from studio.store import Row, Store

MOST = 12
"""More curves than these cannot be told apart."""

AXES: Mapping[str, str] = {"step": N_("step"), "time": N_("time of training"), "tokens": N_("tokens learned from")}
"""What x may be, and its words."""

_UNITS = ((5400.0, 3600.0, N_("hours of training")), (120.0, 60.0, N_("minutes of training")))
_SECONDS = N_("seconds of training")
_LONGEST_NAME = 32


@dataclass(frozen=True)
class Line:
    """The curves of one run; x is a step, seconds of training, or tokens.

    Attributes:
        run: its id.
        label: its name, told apart from its like.
        colour: the run's own.
        loss: while training, one point a step.
        evaluation: on the rows held back.
    """

    run: str
    label: str
    colour: str
    loss: Points
    evaluation: Points


def lines(store: Store, rows: Sequence[Row], by: str = "step") -> list[Line]:
    """The curves of these runs; a step that ran twice counts once, its newest row. `by` is a key of `AXES`."""
    names = [row["name"] for row in rows]
    found = []
    for row in rows:
        label = row["name"] if len(row["name"]) <= _LONGEST_NAME else row["name"][: _LONGEST_NAME - 1] + "…"
        if names.count(row["name"]) > 1:
            label += f" ({row['id'][4:]})"
        steps = _steps(store, row["id"])
        places = _places(store, row["id"], steps, by)
        loss = charts.clean([(places[step], value) for step, (_, value, _) in steps.items()])
        evals = [(event.get("step"), event.get("loss")) for event in store.by_step(row["id"], "eval")]
        evaluation = charts.clean([(_at(places, step, by), value) for step, value in evals if step is not None])
        found.append(Line(row["id"], label, row["colour"], loss, evaluation))
    return found


def _steps(store: Store, run_id: str) -> dict[int, tuple[float, float | None, int]]:
    """Step -> (time, loss, tokens) in order of steps. Only what is drawn is read out of the events' data."""
    rows = store.db.execute(
        "SELECT step, time, json_extract(data, '$.loss'), json_extract(data, '$.tokens') FROM events"
        " WHERE run_id = ? AND type = 'step' ORDER BY id",
        [run_id],
    ).fetchall()
    newest = {int(step): (float(time), loss, int(tokens or 0)) for step, time, loss, tokens in rows if step is not None}
    return dict(sorted(newest.items()))


def _places(
    store: Store, run_id: str, steps: Mapping[int, tuple[float, float | None, int]], by: str
) -> dict[int, float]:
    """Step -> x."""
    if by == "step":
        return {step: float(step) for step in steps}
    found, total = {}, 0.0
    if by == "tokens":
        for step, (_, _, tokens) in steps.items():
            total += tokens
            found[step] = total
        return found
    # What lay between a pause and going on was no training: each stretch is counted from its own start.
    sql = "SELECT time FROM events WHERE run_id = ? AND type = 'start' ORDER BY id"
    starts = [float(moment) for (moment,) in store.db.execute(sql, [run_id]).fetchall()]
    before: float | None = None
    for step, (moment, _, _) in steps.items():
        began = starts[at - 1] if (at := bisect.bisect_right(starts, moment)) else moment
        total += max(0.0, moment - (began if before is None else max(began, before)))
        before, found[step] = moment, total
    return found


def _at(places: Mapping[int, float], step: int, by: str) -> float | None:
    """x of an evaluation: that of the step that it followed; the one before the first step lies at 0."""
    if by == "step":
        return float(step)
    return 0.0 if step == 0 else places.get(step)


def drawn(found: Sequence[Line], by: str = "step", *, smoothing: float = 0.6, log: bool = False) -> str:
    """Two charts: the loss while training (smoothed), and on rows held back; runs of one colour differ in strokes."""
    scale, label = _unit(found) if by == "time" else (1.0, AXES[by])
    training, held = [], []
    used: dict[str, int] = {}
    for line in found:
        style = ("thick", "thick dashed", "thick dotted")[min(used.get(line.colour, 0), 2)]
        used[line.colour] = used.get(line.colour, 0) + 1
        loss = [(x / scale, y) for x, y in charts.smooth(line.loss, smoothing)]
        training.append(Curve(line.label, loss, line.colour, style))
        points = [(x / scale, y) for x, y in line.evaluation]
        held.append(Curve(line.label, points, line.colour, style if len(points) > 1 else "dots"))
    first = charts.drawing(
        t("Loss while training (lower is better)"),
        training,
        x_label=t(label),
        log=log,
        height=280,
        waiting=t("None of these runs has steps."),
    )
    second = charts.drawing(
        t("Loss on rows held back (lower is better)"),
        held,
        x_label=t(label),
        log=log,
        height=220,
        waiting=t("None of these runs was evaluated."),
    )
    return f'<div class="overlay">{first.html()}{second.html()}</div>'


def _unit(found: Sequence[Line]) -> tuple[float, str]:
    """Seconds in the unit that suits the longest run, and its words."""
    longest = max((x for line in found for x, _ in line.loss), default=0.0)
    for least, scale, words in _UNITS:
        if longest >= least:
            return scale, words
    return 1.0, _SECONDS
