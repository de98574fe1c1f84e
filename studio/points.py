"""Points of curves: cleaned, smoothed, and fewer of them. Pure functions over numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

POINTS = 300

Points = list[tuple[float, float]]
Column = NDArray[np.float64]


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
        kept = {0, count - 1}
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            part = ys[low:high]
            kept.update((low + int(part.argmin()), low + int(part.argmax())))
        chosen = sorted(kept)
        xs, ys = xs[chosen], ys[chosen]
    return list(zip(xs.tolist(), ys.tolist(), strict=True))


def finite(xs: Column, ys: Column) -> tuple[Column, Column]:
    """The pairs whose y is finite."""
    good = np.isfinite(ys)
    return xs[good], ys[good]
