"""`profile`: what the page shows of a data set, as plain JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

from engine.data.prepare import Prepared

_BINS = 30
_SHOWN = 3
_CLASSES = 100


def profile(prepared: Prepared) -> dict[str, Any]:
    """Counts, lengths and first rows of a data set; only JSON's types.

    Keys: `format`, `columns`, `rows` (in the file), `kept`, `skipped`, `fixed`, `duplicates`, `unit`, `problems`
    (code -> count), `characters` (`min`, `median`, `p95`, `max`, `total`), `histogram` (`edges`, one more than
    `counts`; characters per example), `turns` (number of turns, as text -> examples; empty unless conversations),
    `examples` (the first three), `labels` (class -> examples, the most frequent first; empty unless labels).
    """
    lengths: list[int] = []
    turns: Counter[int] = Counter()
    classes: Counter[str] = Counter()
    # Once through: many rows are read from a file.
    for example in prepared.examples:
        lengths.append(_length(example))
        if "messages" in example:
            turns[len(example["messages"])] += 1
        classes.update(example.get("labels", ()))
    lengths.sort()
    return {
        "format": prepared.format,
        "columns": dict(prepared.columns),
        "rows": prepared.total,
        "kept": prepared.kept,
        "skipped": prepared.skipped,
        "fixed": prepared.fixed,
        "duplicates": prepared.duplicates,
        "unit": prepared.unit,
        "problems": dict(sorted(prepared.counts.items(), key=lambda item: -item[1])),
        "characters": _spread(lengths),
        "histogram": _histogram(lengths),
        "turns": {str(count): turns[count] for count in sorted(turns)},
        "examples": prepared.examples[:_SHOWN],
        "labels": dict(classes.most_common(_CLASSES)),
    }


def _length(example: dict[str, Any]) -> int:
    """Characters of the words, whoever says them; labels do not count."""
    total = 0
    for name, value in example.items():
        if name == "image":
            continue
        if name in ("messages", "prompt") and isinstance(value, list):
            total += sum(len(message["content"]) for message in value)
        elif isinstance(value, str):
            total += len(value)
    return total


def _spread(lengths: list[int]) -> dict[str, int]:
    if not lengths:
        return {"min": 0, "median": 0, "p95": 0, "max": 0, "total": 0}
    last = len(lengths) - 1
    return {
        "min": lengths[0],
        "median": lengths[last // 2],
        "p95": lengths[round(last * 0.95)],
        "max": lengths[-1],
        "total": sum(lengths),
    }


def _histogram(lengths: list[int]) -> dict[str, list[int]]:
    """At most 30 bins of equal, whole width; the last reaches to the longest, since a few long rows would
    otherwise press all others into the first bin."""
    if not lengths:
        return {"edges": [], "counts": []}
    low, high = lengths[0], max(lengths[round((len(lengths) - 1) * 0.99)], lengths[0] + 1)
    width = max(1, -(-(high - low + 1) // _BINS))
    bins = -(-(high - low + 1) // width)
    counts = [0] * bins
    for length in lengths:
        counts[min((length - low) // width, bins - 1)] += 1
    edges = [low + width * index for index in range(bins + 1)]
    edges[-1] = max(edges[-1], lengths[-1] + 1)
    return {"edges": edges, "counts": counts}
