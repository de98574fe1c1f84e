"""Points of curves: cleaned, smoothed, fewer of them, and their places in a drawing. Pure functions over numbers.

While a run goes on its curves are drawn anew each second, and what it costs to look falls on the training. So of what
was drawn nothing moves as long as it can stay: the stretches that points are taken from, the frame, and the pieces that
a line is drawn in.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

POINTS = 300
PIECE = 64
"""Points of one piece of a line, of which only the last changes with a step."""

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

    def paths(self, points: Points, piece: int = PIECE) -> list[str]:
        """The places of all points of a line as SVG has them, in pieces that begin where the one before ends.

        Args:
            points: of the line.
            piece: points of one piece; dashes begin anew with each.
        """
        held = np.array(points, dtype=float).reshape(-1, 2)
        starts = range(0, max(len(held) - 1, 1), max(piece, 1))
        return [_path(self, held[start : start + piece + 1].tobytes()) for start in starts]


@functools.lru_cache(maxsize=2048)
def _path(frame: Frame, points: bytes) -> str:
    """One piece, remembered: to write numbers is most of what a drawing takes, and most pieces are those of before."""
    xs, ys = np.frombuffer(points).reshape(-1, 2).T
    across = np.round((xs - frame.left) / (frame.right - frame.left) * 100, 2)
    down = np.round((1 - np.clip((ys - frame.low) / (frame.high - frame.low), -0.02, 1.02)) * 100, 2)
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

    Stretches are of a power of two of points, so that one more at the end leaves all but the last as they were.

    Args:
        xs, ys: finite values in order of x.
        limit: points that may be left, 4 or more.
    """
    count, parts = len(xs), (limit - 2) // 2
    if count > limit:
        width = 1 << math.ceil(math.log2(count / parts))
        rest = count - count % width
        starts, stretches = np.arange(0, rest, width), ys[:rest].reshape(-1, width)
        ends = [0, count - 1] + (
            [rest + int(ys[rest:].argmin()), rest + int(ys[rest:].argmax())] if rest < count else []
        )
        chosen = np.unique(np.concatenate([ends, starts + stretches.argmin(1), starts + stretches.argmax(1)]))
        xs, ys = xs[chosen], ys[chosen]
    return list(zip(xs.tolist(), ys.tolist(), strict=True))


def finite(xs: Column, ys: Column) -> tuple[Column, Column]:
    """The pairs whose y is finite."""
    good = np.isfinite(ys)
    return xs[good], ys[good]
