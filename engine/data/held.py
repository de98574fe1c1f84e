"""Rows of a file while and after it is read: a list of few, and of many a temporary file, so that memory stays flat."""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from engine.data.errors import FileError
from engine.paths import studio_home
from engine.records import Codec, Records, Rows, Writer, json_bytes

T = TypeVar("T")
MOST = 20_000
"""So many rows are held as they are."""


def _no_room(error: OSError) -> FileError:
    return FileError(
        f"More than {MOST:,} rows go through a temporary file, which cannot be written: {error.strerror or error}.",
        "Free some space, or set STUDIO_HOME to a folder on a larger disk.",
    )


def json_of(raw: bytes) -> Any:
    """The inverse of `json_bytes`."""
    return json.loads(raw.decode("utf-8", "surrogatepass"))


OF_JSON: Codec[Any] = Codec(json_bytes, json_of)


class Held(Rows[T]):
    """A sequence that is appended to, and then read.

    Args:
        codec: how a row is written to the file, where there are more than `MOST`.

    Raises:
        FileError: (any use) the file cannot be written.
        ValueError: (`append`) a row was read from the file already.
    """

    def __init__(self, codec: Codec[T] = OF_JSON) -> None:
        self._codec = codec
        self._few: list[T] = []
        self._writer: Writer[T] | None = None
        self._many: Records[T] | None = None

    def append(self, row: T) -> None:
        if self._many is not None:
            raise ValueError("The rows have been read; no more can be added.")
        if self._writer is None and len(self._few) < MOST:
            self._few.append(row)
            return
        try:
            if self._writer is None:
                self._writer = self._spilled()
            self._writer.append(row)
        except OSError as error:
            raise _no_room(error) from error

    def _spilled(self) -> Writer[T]:
        folder = studio_home() / "cache"
        folder.mkdir(exist_ok=True)
        # It has no name, so that it is gone with the process, however that ends.
        writer = Writer(self._codec, file=tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
        for former in self._few:
            writer.append(former)
        self._few = []
        return writer

    def settled(self) -> Held[T] | list[T]:
        """The list, of few rows; of many this."""
        return self._few if self._writer is None else self

    def __len__(self) -> int:
        return len(self._few) if self._writer is None else len(self._writer)

    def _records(self) -> Records[T]:
        if self._many is None:
            assert self._writer is not None
            try:
                self._many = self._writer.close()
            except OSError as error:
                raise _no_room(error) from error
        return self._many

    def one(self, number: int) -> T:
        return self._few[number] if self._writer is None else self._records().one(number)

    def __iter__(self) -> Iterator[T]:
        return iter(self._few) if self._writer is None else iter(self._records())

    def raws(self) -> Callable[[int], bytes] | None:
        return None if self._writer is None else self._records().raws()


def repeats(keys: array[int]) -> Iterator[tuple[int, int]]:
    """(place, first place) of each key that came before, in their order."""
    import numpy as np

    values = np.frombuffer(keys, dtype=np.int64)
    # A stable order: of equal keys the first comes first.
    order = np.argsort(values, kind="stable").astype(np.uint32)
    new = np.ones(len(values), dtype=bool)
    new[1:] = values[order[1:]] != values[order[:-1]]
    if new.all():
        return
    firsts = order[np.maximum.accumulate(np.where(new, np.arange(len(values)), 0))]
    later = np.flatnonzero(~new)
    places, befores = order[later], firsts[later]
    for at in np.argsort(places, kind="stable"):
        yield int(places[at]), int(befores[at])
