"""The order of a run's rows: a function of seed and epoch, so that a resumed run needs no state for it."""

from __future__ import annotations

import itertools
import math
import random
from array import array
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from typing import Any

from engine.tasks.base import Task

_STRETCH = 16


def length_of(task: Task, collate: Any) -> Callable[[Any], int] | None:
    """What a row takes of a padded batch, where batches are padded: by the task, or by what makes its batches."""
    found: Callable[[Any], int] | None = getattr(task, "length", None) or getattr(collate, "length", None)
    return found


def step_rows(
    rows: Sequence[Any], per_step: int, seed: int, first_step: int, length: Callable[[Any], int] | None = None
) -> Iterator[list[Any]]:
    """The rows of each optimizer step from `first_step` on, without end; a new permutation for every epoch.

    With `length`, rows of like length stand together, which leaves little padding: the permutation is sorted in
    stretches of `_STRETCH` steps, and the steps are then shuffled.
    """
    per_epoch = math.ceil(len(rows) / per_step)
    lengths: Sequence[int] = ()
    for epoch in itertools.count(first_step // per_epoch):
        # Four bytes a row; a list of numbers would take nine times as much.
        order: MutableSequence[int] = array("I", range(len(rows)))
        rng = random.Random(f"{seed}/{epoch}")
        rng.shuffle(order)
        if length is not None:
            lengths = lengths or array("I", map(length, rows))
            order = _by_length(order, lengths, per_step, rng)
        start = first_step - epoch * per_epoch if epoch == first_step // per_epoch else 0
        for number in range(start, per_epoch):
            yield [rows[i] for i in order[number * per_step : (number + 1) * per_step]]


def _by_length(order: Sequence[int], lengths: Sequence[int], per_step: int, rng: random.Random) -> MutableSequence[int]:
    width = per_step * _STRETCH
    stretches = [sorted(order[i : i + width], key=lengths.__getitem__) for i in range(0, len(order), width)]
    ordered = list(itertools.chain.from_iterable(stretches))
    whole = [ordered[i : i + per_step] for i in range(0, len(ordered) - per_step + 1, per_step)]
    rest = ordered[len(whole) * per_step :]
    rng.shuffle(whole)
    return array("I", itertools.chain(*whole, rest))
