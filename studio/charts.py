"""Rows -> charts. Pure functions that return SVG with HTML labels: sharp at any width, no library, no network.

Curves are cut to a few hundred points (`studio.points`), so that a long run costs the browser no more than a short one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from studio.i18n import t
from studio.markup import BASE_COLOUR, esc, number
from studio.points import POINTS, Column, Frame, Points, finite, smoothed, thinned
from studio.points import clean as clean
from studio.points import decimate as decimate
from studio.points import smooth as smooth

RAW_POINTS = 600
"""Of the thin curve of every step, whose extremes are what it is looked at for."""
SIDE_POINTS = 120
"""Of a small curve, half a page wide."""


@dataclass(frozen=True)
class Curve:
    """One curve of a chart.

    Attributes:
        label: what the hover text calls it.
        points: (x, y) in order of x.
        colour: CSS colour.
        style: `thin`, `thick` or `dots`.
    """

    label: str
    points: Points
    colour: str
    style: str = "thick"


def bounds(curves: Sequence[Curve]) -> tuple[float, float]:
    """The y range: all dots and thick lines, and thin lines but for their wildest hundredth."""
    values: list[float] = []
    for curve in curves:
        ys = sorted(y for _, y in curve.points)
        if curve.style == "thin" and len(ys) >= 100:
            cut = len(ys) // 100
            ys = ys[cut : len(ys) - cut]
        values += ys[:1] + ys[-1:]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if high == low:
        low, high = low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9
    margin = (high - low) * 0.06
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round values between low and high, about `count` of them."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= raw)
    first = math.ceil(low / step)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def chart(
    title: str,
    curves: Sequence[Curve],
    *,
    x_label: str = "",
    x_max: float | None = None,
    log: bool = False,
    height: int = 220,
    waiting: str = "",
    told: Callable[[float], str] = number,
    hover: bool = True,
) -> str:
    """A line chart.

    Args:
        title: the heading above it.
        curves: drawn in this order.
        x_label: unit of x, for the hover text and the right end of the axis; steps by default.
        x_max: right end of the axis; a run's last step, so that the curve grows into its place.
        log: logarithmic y.
        height: of the drawing, in pixels.
        waiting: what an empty chart says.
        told: a value of y in words.
        hover: whether the data of the hover text comes along, which takes more room than all the rest.
    """
    limits, x_label = {"thin": RAW_POINTS}, x_label or t("step")
    drawn = [
        Curve(c.label, decimate(c.points, limits.get(c.style, POINTS)), c.colour, c.style) for c in curves if c.points
    ]
    if log:
        drawn = [Curve(c.label, [(x, math.log10(y)) for x, y in c.points if y > 0], c.colour, c.style) for c in drawn]
        # A curve without a value above zero has no place here.
        drawn = [c for c in drawn if c.points]
    legend = "".join(
        f'<span class="key {c.style}"><i style="--c:{esc(c.colour)}"></i>{esc(c.label)}</span>' for c in drawn
    )
    legend = legend if len(drawn) > 1 else ""
    head = f'<figcaption><strong>{esc(title)}</strong><span class="keys">{legend}</span></figcaption>'
    if not any(c.points for c in drawn):
        empty = f'<div class="plot" style="height:{height}px"><p class="waiting">{esc(waiting)}</p></div>'
        return f'<figure class="chart">{head}{empty}</figure>'
    low, high = bounds(drawn)
    xs = [x for c in drawn for x, _ in c.points]
    left, right = min(0.0, min(xs)), max(max(xs), x_max or 0.0)
    right = right if right > left else left + 1

    frame = Frame(left, right, low, high)
    at = frame.at
    shapes = "".join(_shape(c, frame) for c in drawn)
    y_ticks = [value for value in ticks(low, high) if low <= value <= high]
    grid = "".join(f'<line x1="0" x2="100" y1="{at(0, v)[1]}" y2="{at(0, v)[1]}"/>' for v in y_ticks)
    y_marks = "".join(f'<span class="y" style="top:{at(0, v)[1]}%">{told(10**v if log else v)}</span>' for v in y_ticks)
    x_ticks = [value for value in ticks(left, right, 5) if value == int(value)]
    x_marks = "".join(f'<span class="x" style="left:{at(v, low)[0]}%">{number(v)}</span>' for v in x_ticks)
    dots = "".join(_dots(c, at) for c in drawn if c.style == "dots")
    known = f' data-hover="{esc(json.dumps(_hover(drawn, x_label, log, told, at)))}"' if hover else ""
    return (
        f'<figure class="chart" role="img" aria-label="{esc(_described(title, drawn, log, told))}">{head}'
        f'<div class="plot" style="height:{height}px"{known}>'
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
        f'<g class="grid">{grid}</g>{shapes}</svg>'
        f'{dots}{y_marks}{x_marks}<div class="tip" hidden></div></div>'
        f'<span class="x-label">{esc(x_label)}</span></figure>'
    )


def _hover(
    curves: Sequence[Curve],
    x_label: str,
    log: bool,
    told: Callable[[float], str],
    at: Callable[[float, float], tuple[float, float]],
) -> dict[str, object]:
    """What the hover text says of each point but those of thin lines."""
    return {
        "x": x_label,
        "curves": [
            {
                "label": c.label,
                "colour": c.colour,
                "points": [[*at(x, y), x, told(10**y if log else y)] for x, y in c.points],
            }
            for c in curves
            if c.style != "thin"
        ],
    }


def _shape(curve: Curve, frame: Frame) -> str:
    if curve.style == "dots":
        return ""
    return f'<polyline class="{curve.style}" style="stroke:{esc(curve.colour)}" points="{frame.path(curve.points)}"/>'


def _dots(curve: Curve, at: object) -> str:
    places = (at(*point) for point in curve.points)  # type: ignore[operator]
    return "".join(
        f'<span class="mark" style="left:{x}%;top:{y}%;border-color:{esc(curve.colour)}"></span>' for x, y in places
    )


def _described(title: str, curves: Sequence[Curve], log: bool, told: Callable[[float], str]) -> str:
    parts = []
    for curve in curves:
        first, last = (10**y if log else y for y in (curve.points[0][1], curve.points[-1][1]))
        parts.append(t("{curve} from {first} to {last}", curve=curve.label, first=told(first), last=told(last)))
    return f"{title}: " + "; ".join(parts)


def loss_chart(
    steps: Sequence[dict[str, float | None]],
    evals: Sequence[dict[str, float | None]],
    colour: str,
    total: float | None,
    *,
    log: bool = False,
    smoothing: float | None = None,
    waiting: str = "",
) -> str:
    """`loss_curves` of events."""
    raw = np.array(clean([(row.get("step"), row.get("loss")) for row in steps]), dtype=float).reshape(-1, 2)
    return loss_curves(raw[:, 0], raw[:, 1], evals, colour, total, log=log, smoothing=smoothing, waiting=waiting)


def loss_curves(
    xs: Column,
    ys: Column,
    evals: Sequence[Mapping[str, float | None]],
    colour: str,
    total: float | None,
    *,
    log: bool = False,
    smoothing: float | None = None,
    waiting: str = "",
    hover: bool = True,
) -> str:
    """Training loss raw and smoothed, evaluation as dots.

    Args:
        xs, ys: the training loss of each step; values that are not finite are left out.
        evals: events of evaluations.
        colour: the run's.
        total: the run's last step.
        log: logarithmic y.
        smoothing: as in `smoothed`.
        waiting: what an empty chart says.
        hover: as in `chart`.
    """
    xs, ys = finite(xs, ys)
    dots = clean([(row.get("step"), row.get("loss")) for row in evals])
    curves = [
        Curve(t("each step"), thinned(xs, ys, RAW_POINTS), colour, "thin"),
        Curve(t("smoothed"), thinned(xs, smoothed(ys, smoothing)), colour, "thick"),
        Curve(t("evaluation"), dots, colour, "dots"),
    ]
    return chart(t("Loss (lower is better)"), curves, x_max=total, log=log, height=260, waiting=waiting, hover=hover)


def side_chart(
    title: str,
    points: Points,
    colour: str,
    total: float | None,
    waiting: str = "",
    told: Callable[[float], str] = number,
    hover: bool = True,
) -> str:
    """One small curve: learning rate, gradient norm, tokens a second, memory."""
    curve = Curve(title.lower(), points, colour)
    return chart(title, [curve], x_max=total, height=130, waiting=waiting, told=told, hover=hover)


@dataclass(frozen=True)
class Spot:
    """One point of a scatter plot.

    Attributes:
        label: what stands beside it.
        x, y: its place; x above 0.
        colour: CSS colour.
        run: what choosing it says (`data-run`).
        told: x in words.
        front: whether the line goes through it.
    """

    label: str
    x: float
    y: float
    colour: str
    run: str
    told: str
    front: bool = False


def log_ticks(low: float, high: float) -> list[float]:
    """Round values between two powers of ten (`low` and `high` are exponents), at most about six."""
    exponents = range(math.floor(low), math.ceil(high) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [digit * 10.0**power for power in exponents for digit in digits]
        found = [value for value in found if low <= math.log10(value) <= high]
        if len(found) <= 6:
            return found
    return found[:: math.ceil(len(found) / 6)]


def scatter(
    title: str,
    spots: Sequence[Spot],
    *,
    x_label: str,
    x_told: Callable[[float], str],
    levels: Sequence[tuple[str, float]] = (),
    height: int = 300,
    waiting: str = "",
) -> str:
    """Points over a logarithmic x; those of the front are filled and joined by a line.

    Args:
        title: the heading above it.
        spots: the points.
        x_label: what x is.
        x_told: x as the axis says it.
        levels: (label, y) of grey lines across, for what has no x.
        height: of the drawing, in pixels.
        waiting: what an empty plot says.
    """
    head = f"<figcaption><strong>{esc(title)}</strong></figcaption>"
    if not spots:
        empty = f'<div class="plot" style="height:{height}px"><p class="waiting">{esc(waiting)}</p></div>'
        return f'<figure class="chart">{head}{empty}</figure>'
    logs = [math.log10(spot.x) for spot in spots]
    margin = max(0.12 * (max(logs) - min(logs)), 0.35)
    left, right = min(logs) - margin, max(logs) + margin
    low, high = bounds([Curve("", [(0, y) for y in sorted([*(s.y for s in spots), *(y for _, y in levels)])], "")])

    def at(x: float, y: float) -> tuple[float, float]:
        return round((math.log10(x) - left) / (right - left) * 100, 2), round((high - y) / (high - low) * 100, 2)

    line = " ".join(f"{x},{y}" for x, y in (at(s.x, s.y) for s in sorted(spots, key=lambda s: s.x) if s.front))
    y_ticks = [at(1, value)[1] for value in ticks(low, high)]
    grid = "".join(f'<line x1="0" x2="100" y1="{y}" y2="{y}"/>' for y in y_ticks)
    across = "".join(f'<line class="level" x1="0" x2="100" y1="{at(1, y)[1]}" y2="{at(1, y)[1]}"/>' for _, y in levels)
    names = "".join(f'<span class="level-name" style="top:{at(1, y)[1]}%">{esc(label)}</span>' for label, y in levels)
    y_marks = "".join(
        f'<span class="y" style="top:{y}%">{number(value)}</span>'
        for y, value in zip(y_ticks, ticks(low, high), strict=True)
    )
    x_marks = "".join(
        f'<span class="x" style="left:{at(value, low)[0]}%">{esc(x_told(value))}</span>'
        for value in log_ticks(left, right)
    )
    keys = "".join(f'<span class="key dots"><i style="--c:{esc(s.colour)}"></i>{esc(s.label)}</span>' for s in spots)
    said = "; ".join(_told(spot) for spot in spots)
    return (
        f'<figure class="chart spots" role="group" aria-label="{esc(f"{title}: {said}")}">{head}'
        f'<div class="plot" style="height:{height}px">'
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
        f'<g class="grid">{grid}</g>{across}<polyline class="front" points="{line}"/></svg>'
        f'{_spots(spots, at)}{names}{y_marks}{x_marks}</div><span class="x-label">{esc(x_label)}</span>'
        f'<span class="keys">{keys}</span></figure>'
    )


def _spots(spots: Sequence[Spot], at: Callable[[float, float], tuple[float, float]]) -> str:
    """The points as buttons, and their labels where none hides another."""
    taken: list[tuple[float, float]] = []
    parts = []
    for spot in sorted(spots, key=lambda spot: not spot.front):
        x, y = at(spot.x, spot.y)
        free = (
            shift
            for shift in (5, -5, 11, -11, 17, -17)
            if all(abs(x - u) > 24 or abs(y + shift - v) > 5 for u, v in taken)
        )
        place = y + next(free, 5)
        taken.append((x, place))
        side = "before" if x > 62 else "after"
        kind = "mark front" if spot.front else "mark"
        told, name = _told(spot), esc(spot.label[:28])
        parts.append(
            f'<button type="button" class="{kind}" data-run="{esc(spot.run)}" title="{esc(told)}"'
            f' aria-label="{esc(told)}" style="left:{x}%;top:{y}%;--c:{esc(spot.colour)}"></button>'
            f'<span class="spot-name {side}" style="left:{x}%;top:{place}%" aria-hidden="true">{name}</span>'
        )
    return "".join(parts)


def _told(spot: Spot) -> str:
    return t("{name}: {value} at {place}", name=spot.label, value=number(spot.y), place=spot.told)


def histogram(edges: Sequence[int], counts: Sequence[int], title: str, unit: str) -> str:
    """Bars for counts between edges."""
    if not counts:
        return ""
    most = max(counts) or 1
    bars = "".join(
        f'<span class="bar" style="height:{max(count / most * 100, 1 if count else 0):.1f}%" '
        f'title="{esc(_bar(edges[i], edges[i + 1] - 1, unit, count))}"></span>'
        for i, count in enumerate(counts)
    )
    ends = f"<span>{edges[0]:,}</span><span>{edges[-1] - 1:,} {esc(unit)}</span>"
    label = t("{title}: {low} to {high} {unit}", title=title, low=f"{edges[0]:,}", high=f"{edges[-1] - 1:,}", unit=unit)
    return (
        f'<figure class="chart histogram" role="img" aria-label="{esc(label)}">'
        f"<figcaption><strong>{esc(title)}</strong></figcaption>"
        f'<div class="bars">{bars}</div><div class="ends">{ends}</div></figure>'
    )


def _bar(low: int, high: int, unit: str, count: int) -> str:
    return t("{low} to {high} {unit}: {count} rows", low=f"{low:,}", high=f"{high:,}", unit=unit, count=f"{count:,}")


def sparkline(points: Points, colour: str = BASE_COLOUR) -> str:
    """A curve without axes, for a list."""
    points = decimate(points, 80)
    if len(points) < 2:
        return ""
    low, high = bounds([Curve("", points, colour)])
    first, last = points[0][0], points[-1][0]
    path = " ".join(
        f"{(x - first) / ((last - first) or 1) * 100:.1f},{(1 - (y - low) / (high - low)) * 100:.1f}" for x, y in points
    )
    return (
        '<svg class="spark" viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
        f'<polyline class="thick" style="stroke:{esc(colour)}" points="{path}"/></svg>'
    )
