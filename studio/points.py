"""Points of curves: cleaned, smoothed, fewer of them, and their places in a drawing. Pure functions over numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

POINTS = 300

Points = list[tuple[float, float]]
Column = NDArray[np.float64]


@dataclass(frozen=True)
class Frame:
    """What a drawing shows of the plane; places are percents of its width from the left, of its height from above.

    Attributes:
        left, right: the first and the last x.
        low, high: the lowest and the highest y.
    """

    left: float
    right: float
    low: float
    high: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The place of one point; what lies outside is drawn at the edge."""
        clipped = min(max((y - self.low) / (self.high - self.low), -0.02), 1.02)
        return round((x - self.left) / (self.right - self.left) * 100, 2), round((1 - clipped) * 100, 2)

    def path(self, points: Points) -> str:
        """The places of all points of a line, at once, as SVG has them."""
        xs, ys = np.array(points, dtype=float).reshape(-1, 2).T
        across = np.round((xs - self.left) / (self.right - self.left) * 100, 2)
        down = np.round((1 - np.clip((ys - self.low) / (self.high - self.low), -0.02, 1.02)) * 100, 2)
        return " ".join(f"{x},{y}" for x, y in zip(across.tolist(), down.tolist(), strict=True))


def clean(pairs: Sequence[tuple[float | None, float | None]]) -> Points:
    """The pairs that have both values, finite."""
    return [
        (float(x), float(y))
        for x, y in pairs
        if x is not None and y is not None and math.isfinite(x) and math.isfinite(y)
    ]


def smooth(points: Points, weight: float | None = None) -> Points:
    """`smoothed` of points in order of x."""
    ys = smoothed(np.array([y for _, y in points], dtype=float), weight)
    return [(x, y) for (x, _), y in zip(points, ys.tolist(), strict=True)]


def smoothed(ys: Column, weight: float | None = None) -> Column:
    """The exponential moving average, freed of its bias towards the start.

    Args:
        ys: finite values in order.
        weight: share of the past, 0 to 1; by default it grows with the number of values.
    """
    if weight is None:
        weight = 1 - 1 / max(1.0, min(len(ys) / 12, 40.0))
    # Not above: processes that draw nothing need no pandas.
    import pandas as pd

    found: Column = pd.Series(ys).ewm(alpha=1 - weight, adjust=True).mean().to_numpy()
    return found


def decimate(points: Points, limit: int = POINTS) -> Points:
    """`thinned` of points in order of x."""
    if len(points) <= limit:
        return points
    xs, ys = np.array(points, dtype=float).T
    return thinned(xs, ys, limit)


def thinned(xs: Column, ys: Column, limit: int = POINTS) -> Points:
    """At most `limit` points: the first, the last, and of each stretch the lowest and the highest: no spike is lost.

    Args:
        xs, ys: finite values in order of x.
        limit: points that may be left, 4 or more.
    """
    count, parts = len(xs), (limit - 2) // 2
    if count > limit:
        edges = np.linspace(0, count, parts + 1).astype(int)
        lows, highs = (_first(ys, of.reduceat(ys, edges[:-1]), edges) for of in (np.minimum, np.maximum))
        chosen = np.unique(np.concatenate([[0, count - 1], lows, highs]))
        xs, ys = xs[chosen], ys[chosen]
    return list(zip(xs.tolist(), ys.tolist(), strict=True))


def _first(ys: Column, sought: Column, edges: NDArray[np.int_]) -> NDArray[np.int_]:
    """Where each stretch between two edges first has the value that is sought there.

    All stretches at once: two calls for each of hundreds are most of what a drawing takes.
    """
    places = np.flatnonzero(ys == np.repeat(sought, np.diff(edges)))
    _, first = np.unique(np.searchsorted(edges, places, side="right"), return_index=True)
    return places[first]


def finite(xs: Column, ys: Column) -> tuple[Column, Column]:
    """The pairs whose y is finite."""
    good = np.isfinite(ys)
    return xs[good], ys[good]
