"""Pages of a data set's rows, and the rows in which words stand. Many rows stay in their file; none is drawn twice."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from studio.datasets import Checked

PAGE = 20
GRID = 24
_MOST = 8
_found: OrderedDict[tuple[str, ...], Sequence[int]] = OrderedDict()
_lock = Lock()


@dataclass(frozen=True)
class Shown:
    """A page of rows.

    Attributes:
        examples: the rows.
        number: of the page, from 1.
        pages: how many there are.
        first: which of the rows found is the first one, from 1.
        count: rows found; all where nothing is searched for.
    """

    examples: Sequence[Mapping[str, Any]]
    number: int
    pages: int
    first: int
    count: int


def page(found: Checked, query: str = "", number: float | None = 1, size: int = PAGE) -> Shown:
    """One page of the rows that are kept; a number beyond the last page gives the last."""
    places = search(found, query)
    pages = max(1, -(-len(places) // size))
    asked = 1 if number is None or number != number else int(min(max(number, 1), pages))
    start = (asked - 1) * size
    assert found.prepared is not None
    examples = [found.prepared.examples[place] for place in places[start : start + size]]
    return Shown(examples, asked, pages, start + 1 if examples else 0, len(places))


def search(found: Checked, query: str = "") -> Sequence[int]:
    """The places of the rows in which all words of `query` stand, without regard to case; remembered for a while."""
    assert found.prepared is not None
    examples = found.prepared.examples
    words = (query or "").casefold().split()
    if not words:
        return range(len(examples))
    key = (found.id, found.format or "", repr(sorted(found.columns.items())), *words)
    with _lock:
        if key in _found:
            _found.move_to_end(key)
            return _found[key]
    places = [n for n, one in enumerate(examples) if all(word in text for text in (_text(one),) for word in words)]
    with _lock:
        _found[key] = places
        while len(_found) > _MOST:
            _found.popitem(last=False)
    return places


def spread(count: int, most: int) -> range | list[int]:
    """At most `most` places of `count`, evenly chosen, the first among them."""
    if count <= most:
        return range(count)
    return [place * count // most for place in range(most)]


def _text(example: Mapping[str, Any]) -> str:
    return "\n".join(_texts(example)).casefold()


def _texts(value: Any, name: str = "") -> Iterator[str]:
    if isinstance(value, str):
        # Of a picture's reference only its name is for people.
        yield value.replace("!", "/").rpartition("/")[2] if name == "image" else value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            if key != "role":
                yield from _texts(one, key)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)
