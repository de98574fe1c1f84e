"""What a comparison is while it is answered: its columns, and how far they have come."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Column:
    """One answer.

    Attributes:
        run: what answers: an id of a run, an adapter or a mix; None for the base.
        title: its head.
        colour: its colour.
        text: so far.
        done: whether it is complete.
        reason: `stop` or `length`, when done.
        picture: the file of the answer, where it is a picture.
    """

    run: str | None
    title: str
    colour: str
    text: str = ""
    done: bool = False
    reason: str = ""
    picture: str = ""


@dataclass
class Answers:
    """The state of one comparison while it streams.

    Attributes:
        columns: the base first.
        status: what is being waited for.
        fraction: how much of that is done, 0 to 1, where it is known.
        finished: whether every column is complete.
        took: seconds, when finished.
        began: on the monotonic clock.
        kept: the id under which it was kept, when it was.
    """

    columns: list[Column]
    status: str = ""
    fraction: float | None = None
    finished: bool = False
    took: float = 0.0
    began: float = field(default_factory=time.monotonic)
    kept: int | None = None
