"""Rows -> charts. Pure functions that return SVG with HTML labels: sharp at any width, no library, no network.

Curves are cut to a few hundred points (`studio.points`), so that a long run costs the browser no more than a short one.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from studio.i18n import t
from studio.markup import BASE_COLOUR, esc, number
from studio.points import PIECE, POINTS, Column, Frame, Points, finite, smoothed, thinned
from studio.points import clean as clean
from studio.points import decimate as decimate
from studio.points import smooth as smooth

RAW_POINTS = 600
"""Of the thin curve of every step, whose extremes are what it is looked at for."""
SIDE_POINTS = 200
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


@dataclass(frozen=True)
class Drawing:
    """A chart, taken apart into what moves with each step and what does not.

    Attributes:
        said: what a screen reader says of it; nothing of an empty one.
        before, after: its HTML on both sides of its lines.
        lines: (how it looks, its places) of each piece of a line.
    """

    said: str
    before: str
    lines: tuple[tuple[str, str], ...]
    after: str

    def html(self) -> str:
        """The whole chart."""
        role = f' role="img" aria-label="{esc(self.said)}"' if self.said else ""
        lines = "".join(f'<polyline {looks} points="{places}"/>' for looks, places in self.lines)
        return f'<figure class="chart"{role}>{self.before}{lines}{self.after}</figure>'

    def since(self, former: Drawing | None) -> str | dict[str, Any] | None:
        """What makes this of a former drawing: nothing, `said` and places of `lines` by their number, or all of it."""
        if former is None or self.before != former.before or self.after != former.after:
            return self.html()
        if [looks for looks, _ in self.lines] != [looks for looks, _ in former.lines]:
            return self.html()
        pairs = enumerate(zip(self.lines, former.lines, strict=True))
        moved = {str(at): now[1] for at, (now, was) in pairs if now[1] != was[1]}
        return {"said": self.said, "lines": moved} if moved or self.said != former.said else None


def bounds(curves: Sequence[Curve]) -> tuple[float, float]:
    """The y range: all dots and thick lines, and thin lines but for their wildest hundredth."""
    values: list[float] = []
    for curve in curves:
        ys = [y for _, y in curve.points]
        if curve.style == "thin" and len(ys) >= 100:
            ys, cut = sorted(ys), len(ys) // 100
            ys = ys[cut : len(ys) - cut]
        values += [min(ys), max(ys)] if ys else []
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if high == low:
        low, high = low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9
    margin = (high - low) * 0.06
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def steadied(low: float, high: float) -> tuple[float, float]:
    """A range around another that stays the same while that one moves a little: up to a sixteenth more on each side."""
    unit = _round((high - low) / 16)
    lower, higher = math.floor(low / unit) * unit, math.ceil(high / unit) * unit
    return (max(0.0, lower) if low >= 0 else lower), higher


def _round(least: float) -> float:
    """The next of 1, 2, 2.5 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= least)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round values between low and high, about `count` of them."""
    span = high - low
    if span <= 0:
        return [low]
    step = _round(span / count)
    first = math.ceil(low / step)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def drawing(
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
) -> Drawing:
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
        return Drawing("", f"{head}{empty}", (), "")
    low, high = steadied(*bounds(drawn))
    # Points stand in order of x.
    ends = [x for c in drawn for x, _ in (c.points[0], c.points[-1])]
    left, right = min(0.0, *ends), max(*ends, x_max or 0.0)
    right = right if right > left else left + 1

    frame = Frame(left, right, low, high)
    at = frame.at
    lines = tuple(
        (f'class="{c.style}" style="stroke:{esc(c.colour)}"', places)
        for c in drawn
        if c.style != "dots"
        for places in frame.paths(c.points, PIECE if c.style in ("thin", "thick") else len(c.points))
    )
    y_ticks = [value for value in ticks(low, high) if low <= value <= high]
    grid = "".join(f'<line x1="0" x2="100" y1="{at(0, v)[1]}" y2="{at(0, v)[1]}"/>' for v in y_ticks)
    y_marks = "".join(f'<span class="y" style="top:{at(0, v)[1]}%">{told(10**v if log else v)}</span>' for v in y_ticks)
    x_ticks = [value for value in ticks(left, right, 5) if value == int(value)]
    x_marks = "".join(f'<span class="x" style="left:{at(v, low)[0]}%">{number(v)}</span>' for v in x_ticks)
    dots = "".join(_dots(frame, c.colour, tuple(c.points)) for c in drawn if c.style == "dots")
    known = f' data-hover="{esc(json.dumps(_hover(drawn, x_label, log, told, at)))}"' if hover else ""
    return Drawing(
        said=_described(title, drawn, log, told),
        before=(
            f'{head}<div class="plot" style="height:{height}px"{known}>'
            '<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
            f'<g class="grid">{grid}</g>'
        ),
        lines=lines,
        after=(
            f'</svg>{dots}{y_marks}{x_marks}<div class="tip" hidden></div></div>'
            f'<span class="x-label">{esc(x_label)}</span>'
        ),
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


@functools.lru_cache(maxsize=64)
def _dots(frame: Frame, colour: str, points: tuple[tuple[float, float], ...]) -> str:
    places = (frame.at(*point) for point in points)
    return "".join(
        f'<span class="mark" style="left:{x}%;top:{y}%;border-color:{esc(colour)}"></span>' for x, y in places
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
    """`loss_curves` of events, as HTML."""
    raw = np.array(clean([(row.get("step"), row.get("loss")) for row in steps]), dtype=float).reshape(-1, 2)
    return loss_curves(raw[:, 0], raw[:, 1], evals, colour, total, log=log, smoothing=smoothing, waiting=waiting).html()


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
) -> Drawing:
    """Training loss raw and smoothed, evaluation as dots.

    Args:
        xs, ys: the training loss of each step; values that are not finite are left out.
        evals: events of evaluations.
        colour: the run's.
        total: the run's last step.
        log: logarithmic y.
        smoothing: as in `smoothed`.
        waiting: what an empty chart says.
        hover: as in `drawing`.
    """
    xs, ys = finite(xs, ys)
    dots = clean([(row.get("step"), row.get("loss")) for row in evals])
    curves = [
        Curve(t("each step"), thinned(xs, ys, RAW_POINTS), colour, "thin"),
        Curve(t("smoothed"), thinned(xs, smoothed(ys, smoothing)), colour, "thick"),
        Curve(t("evaluation"), dots, colour, "dots"),
    ]
    return drawing(t("Loss (lower is better)"), curves, x_max=total, log=log, height=260, waiting=waiting, hover=hover)


def side_chart(
    title: str,
    points: Points,
    colour: str,
    total: float | None,
    waiting: str = "",
    told: Callable[[float], str] = number,
    hover: bool = True,
) -> Drawing:
    """One small curve: learning rate, gradient norm, tokens a second, memory."""
    curve = Curve(title.lower(), points, colour)
    return drawing(title, [curve], x_max=total, height=130, waiting=waiting, told=told, hover=hover)


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
