"""Long sequences of rows as bytes, in memory or in a file: a row is made when it is asked for.

A million short rows as Python tuples or dictionaries take gigabytes; as records they take what they say, and in a file
nothing of the process's memory. A file is: the records end to end, their N + 1 offsets (8 bytes each), a text of JSON,
and at its end the numbers N and the text's length, a checksum, and a mark.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import threading
import zlib
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, overload

T = TypeVar("T")
_END = struct.Struct("<QQI8s")
_MARK = b"records1"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Codec(Generic[T]):
    """How a row becomes bytes, and again a row."""

    to_bytes: Callable[[T], bytes]
    from_bytes: Callable[[bytes], T]


def json_bytes(value: Any) -> bytes:
    """A value of JSON's types, in its shortest form."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def numbers(types: str, apart: Callable[[T], Sequence[Sequence[int]]], whole: Callable[..., T]) -> Codec[T]:
    """A codec of rows that are several sequences of whole numbers.

    Args:
        types: each sequence's type, as `array` names it: `ib` is one of 32 and one of 8 bits.
        apart: a row's sequences. whole: the row of these, given as tuples.
    """
    head = struct.Struct(f"<{len(types)}I")

    def to_bytes(row: T) -> bytes:
        parts = [array(kind, part) for kind, part in zip(types, apart(row), strict=True)]
        return head.pack(*map(len, parts)) + b"".join(part.tobytes() for part in parts)

    def from_bytes(raw: bytes) -> T:
        at, parts = head.size, []
        for kind, length in zip(types, head.unpack_from(raw), strict=True):
            part = array(kind)
            part.frombytes(raw[at : at + length * part.itemsize])
            at += length * part.itemsize
            parts.append(tuple(part))
        return whole(*parts)

    return Codec(to_bytes, from_bytes)


class Rows(Sequence[T]):
    """A sequence whose rows are made one by one (`one`), when they are asked for."""

    @abstractmethod
    def one(self, number: int) -> T:
        """Row `number`, from 0."""

    def raws(self) -> Callable[[int], bytes] | None:
        """What gives a row's bytes by its number, where rows are held as bytes."""
        return None

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self.one(number) for number in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} rows, and none of number {index}")
        return self.one(number)

    def __iter__(self) -> Iterator[T]:
        return (self.one(number) for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class Records(Rows[T]):
    """Rows in the order in which they were written; `info` is what was said of them.

    Made by a `Writer`, or by `open_records` of a file.
    """

    def __init__(
        self, codec: Codec[T], count: int, info: Any, data: bytes | bytearray | IO[bytes], offsets: array[int] | int
    ) -> None:
        self.codec = codec
        self.info = info
        self._count = count
        self._data = data
        # Where the offsets stand in the file; in memory, the offsets themselves.
        self._offsets = offsets
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def raws(self) -> Callable[[int], bytes]:
        return self._raw

    def _raw(self, number: int) -> bytes:
        if isinstance(self._offsets, array):
            assert isinstance(self._data, bytes | bytearray)
            return bytes(self._data[self._offsets[number] : self._offsets[number + 1]])
        start, end = struct.unpack("<QQ", self._read(self._offsets + 8 * number, 16))
        return self._read(start, end - start)

    def _read(self, at: int, size: int) -> bytes:
        file: Any = self._data
        with self._lock:
            file.seek(at)
            return bytes(file.read(size))

    def one(self, number: int) -> T:
        return self.codec.from_bytes(self._raw(number))


class Chosen(Rows[T]):
    """Some rows of a sequence, in an order of its own, held by their numbers."""

    def __init__(self, rows: Sequence[T], order: array[int]) -> None:
        self.rows = rows
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def raws(self) -> Callable[[int], bytes] | None:
        found = self.rows.raws() if isinstance(self.rows, Rows) else None
        return None if found is None else lambda number: found(self.order[number])

    def one(self, number: int) -> T:
        return self.rows[self.order[number]]


class Writer(Generic[T]):
    """Takes rows one after another.

    Args:
        codec: how they become bytes.
        path: the file that they shall lie in; it appears whole at `close`. None: in memory.
        file: one that is open for reading and writing, instead of a path.
    """

    def __init__(self, codec: Codec[T], path: Path | None = None, file: IO[bytes] | None = None) -> None:
        self.codec = codec
        self.path = path
        self._draft: Path | None = None
        self._file = file
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".draft-", dir=path.parent)
            self._draft, self._file = Path(name), os.fdopen(handle, "w+b")
        self._memory = bytearray()
        self._lengths = array("I")
        self._check = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def append(self, row: T) -> None:
        self.append_raw(self.codec.to_bytes(row))

    def append_raw(self, raw: bytes) -> None:
        """A row that is bytes already."""
        if self._file is None:
            self._memory += raw
        else:
            self._file.write(raw)
            self._check = zlib.crc32(raw, self._check)
        self._lengths.append(len(raw))

    def close(self, info: Any = None) -> Records[T]:
        """The rows, to be read; with a path, from the file that now is there.

        Args:
            info: what is kept with them, of JSON's types.

        Raises:
            OSError: the file cannot be written.
        """
        count = len(self)
        if self._file is None:
            return Records(self.codec, count, info, self._memory, array("Q", self._starts()))
        said = json_bytes(info)
        at = self._file.tell()
        starts = self._starts()
        blocks = iter(lambda: array("Q", islice(starts, _BLOCK // 8)).tobytes(), b"")
        for part in chain(blocks, [said]):
            self._file.write(part)
            self._check = zlib.crc32(part, self._check)
        self._file.write(_END.pack(count, len(said), self._check, _MARK))
        self._file.flush()
        if self._draft is None or self.path is None:
            return Records(self.codec, count, info, self._file, at)
        self._file.close()
        os.replace(self._draft, self.path)
        return Records(self.codec, count, info, open(self.path, "rb", buffering=0), at)

    def _starts(self) -> Iterator[int]:
        """Where each row starts, and the last one ends."""
        return accumulate(self._lengths, initial=0)

    def drop(self) -> None:
        """Take the unfinished file away."""
        if self._draft is not None and self._file is not None:
            self._file.close()
            self._draft.unlink(missing_ok=True)


def open_records(path: Path, codec: Codec[T], in_memory: int = 0) -> Records[T] | None:
    """The rows of a file that a `Writer` made; None where there is none, or it is damaged.

    Args:
        path: the file. codec: as they were written.
        in_memory: files of at most so many bytes are read whole.
    """
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115
    except OSError:
        return None
    try:
        size = os.fstat(file.fileno()).st_size
        file.seek(size - _END.size if size >= _END.size else 0)
        count, said, check, mark = _END.unpack(file.read(_END.size))
        start = size - _END.size - said - 8 * (count + 1)
        if mark != _MARK or start < 0 or check != _checksum(file, size - _END.size):
            raise ValueError("the file is not whole")
        file.seek(start)
        rest = file.read(8 * (count + 1) + said)
        info = json.loads(rest[8 * (count + 1) :])
    except (OSError, ValueError, struct.error):
        file.close()
        return None
    if size > in_memory:
        return Records(codec, count, info, file, start)
    offsets = array("Q")
    offsets.frombytes(rest[: 8 * (count + 1)])
    file.seek(0)
    with file:
        return Records(codec, count, info, file.read(start), offsets)


def _checksum(file: IO[bytes], size: int) -> int:
    file.seek(0)
    found = 0
    while size > 0:
        block = file.read(min(_BLOCK, size))
        if not block:
            raise ValueError("the file ends early")
        found = zlib.crc32(block, found)
        size -= len(block)
    return found


def in_order(rows: Sequence[T], length: Callable[[T], int]) -> Chosen[T]:
    """The rows from the shortest on, by their numbers."""
    lengths = array("I", map(length, rows))
    return Chosen(rows, array("I", sorted(range(len(rows)), key=lengths.__getitem__)))
