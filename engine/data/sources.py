"""Where pictures lie: a folder, or a zip that is read where it is and never unpacked to disk."""

from __future__ import annotations

import functools
import io
import lzma
import re
import stat
import struct
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from engine.data.errors import ArchiveError, TooLargeError
from engine.data.table import Limits

_ENTRY = b"PK\x01\x02"
_END = b"PK\x05\x06"
_END64 = b"PK\x06\x06"
# What reading a damaged, or a strangely packed, member may raise.
_UNREADABLE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, KeyError, NotImplementedError, RuntimeError,
    ValueError,
)  # fmt: skip


class Source(Protocol):
    """A folder or a zip: its files by name (with `/`), and their bytes.

    Attributes:
        names: the files that can be read.
        left_out: (name, code, why) of what is there and is not read.
    """

    names: list[str]
    left_out: list[tuple[str, str, str]]

    def size(self, name: str) -> int: ...

    def read(self, name: str) -> bytes:
        """The bytes.

        Raises:
            OSError: they cannot be read; also for a damaged part of a zip.
        """

    def reference(self, name: str) -> str: ...


@dataclass
class FolderSource:
    """A folder with its folders; links that lead out of it are left out."""

    path: Path
    names: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        root = self.path.resolve()
        for file in sorted(self.path.rglob("*")):
            name = file.relative_to(self.path).as_posix()
            if file.is_symlink() and not (file.is_file() and file.resolve().is_relative_to(root)):
                where = "to a folder" if file.is_dir() else "out of the folder" if file.is_file() else "to no file"
                self.left_out.append((name, "link", f"{name[:80]} is a link {where}; it was not followed."))
            elif file.is_file():
                self.names.append(name)
            elif not file.is_dir():
                self.left_out.append((name, "no-file", f"{name[:80]} is no file with contents (a pipe, a device)."))

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def reference(self, name: str) -> str:
        return str(self.path.absolute() / name)


@dataclass
class ZipSource:
    """A zip; links in it, and all but the last of equal names, are left out.

    Raises:
        ArchiveError: no zip, encrypted, or a name in it leads out of it.
        TooLargeError: more files, or more bytes unpacked, than the limits allow.
    """

    path: Path
    limits: Limits
    names: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_directory(self.path, self.limits)
        listed = [entry for entry in _opened(self.path, self.limits).infolist() if not entry.is_dir()]
        for entry in listed:
            _check_entry(self.path.name, entry.filename, entry)
        unpacked = sum(entry.file_size for entry in listed)
        if unpacked > self.limits.max_unpacked_zip:
            raise TooLargeError(
                f"{self.path.name} would be {unpacked / 2**30:,.1f} GiB unpacked; at most "
                f"{self.limits.max_unpacked_zip / 2**30:,.0f} GiB are read.",
                "Take out what is no picture, make the pictures smaller, or split the archive.",
            )
        # The last of equal names is the one that programs unpack to.
        self.entries = {entry.filename: entry for entry in listed}
        for name, times in Counter(entry.filename for entry in listed).items():
            again = (name, "repeated-name", f"{name[:80]} is in the archive {times} times; the last is used.")
            self.left_out += [again] * (times - 1)
        for name, entry in list(self.entries.items()):
            if stat.S_ISLNK(entry.external_attr >> 16):
                del self.entries[name]
                self.left_out.append((name, "link", f"{name[:80]} is a link inside the archive; it was not followed."))
        self.names = sorted(self.entries)

    def size(self, name: str) -> int:
        return self.entries[name].file_size

    def read(self, name: str) -> bytes:
        return read_member(self.path, name, self.limits)

    def reference(self, name: str) -> str:
        return f"{self.path.absolute()}!{name}"


def read_member(path: Path, name: str, limits: Limits) -> bytes:
    """At most `limits.max_picture_bytes` of a file in a zip, whatever its header promises.

    Raises:
        OSError: it is longer, damaged or not there.
        ArchiveError, TooLargeError: as `ZipSource`.
    """
    limit = limits.max_picture_bytes
    try:
        with _opened(path, limits).open(name) as member:
            raw = member.read(limit + 1)
    except _UNREADABLE as error:
        raise OSError(str(error)) from error
    if len(raw) > limit:
        raise OSError(f"it is longer than {limit / 2**20:,.0f} MiB")
    return raw


def _opened(path: Path, limits: Limits) -> zipfile.ZipFile:
    """The zip, its table read once for all its members."""
    found = path.stat()
    return _open_once(path, found.st_mtime_ns, found.st_size, limits)


@functools.lru_cache(maxsize=4)
def _open_once(path: Path, changed: int, size: int, limits: Limits) -> zipfile.ZipFile:
    file = _Guarded(path, _most_entries(limits))
    try:
        opened = zipfile.ZipFile(file)
    except (*_UNREADABLE, OSError) as error:
        file.close()
        raise ArchiveError(f"{path.name} is no zip that can be read: {error}.", "Pack it again.") from error
    file.most = None
    return opened


class _Guarded(io.BufferedReader):
    """A zip's file while its table is read: the numbers at the end of a zip may lie, the table itself cannot."""

    def __init__(self, path: Path, most: int) -> None:
        super().__init__(io.FileIO(path))
        self.path = path
        self.most: int | None = most

    def read(self, size: int | None = -1, /) -> bytes:
        if self.most is not None and size is not None and size > 512 * self.most:
            raise _too_many(self.path.name, size // 46, self.most)
        raw = super().read(size)
        if self.most is not None and raw.count(_ENTRY) > self.most:
            raise _too_many(self.path.name, raw.count(_ENTRY), self.most)
        return raw


def _most_entries(limits: Limits) -> int:
    """Each picture may have a text beside it; a table of so many names is a few megabytes."""
    return 3 * limits.max_pictures


def _too_many(name: str, count: int, most: int) -> TooLargeError:
    return TooLargeError(f"{name} lists {count:,} files; at most {most:,} are read.", "Split it.")


def _check_directory(path: Path, limits: Limits) -> None:
    """Refuse a zip by the numbers at its end, before its table is read at all.

    Raises:
        ArchiveError: there is no such end.
        TooLargeError: it lists more files than the limits allow.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 65_557))
        tail = file.read()
        place = tail.rfind(_END)
        if place < 0 or len(tail) < place + 22:
            raise ArchiveError(f"{path.name} is no zip, or was cut off.", "Pack it again, or fetch it again.")
        count, length = struct.unpack("<HI", tail[place + 10 : place + 16])
        if count == 0xFFFF or length == 0xFFFFFFFF:
            wide = tail.rfind(_END64)
            if wide < 0 or len(tail) < wide + 48:
                raise ArchiveError(f"{path.name} is no zip, or was cut off.", "Pack it again, or fetch it again.")
            count, length = struct.unpack("<QQ", tail[wide + 32 : wide + 48])
    most = _most_entries(limits)
    if count > most or length > 512 * most:
        raise _too_many(path.name, count, most)


def _check_entry(archive: str, name: str, entry: zipfile.ZipInfo) -> None:
    parts = re.split(r"[/\\]", name)
    if ".." in parts or name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name) or "\0" in name:
        raise ArchiveError(
            f"{archive} holds the name {name[:80]!r}, which leads out of the archive.", "Pack it again without it."
        )
    if entry.flag_bits & 0x1:
        raise ArchiveError(f"{archive} is encrypted ({name[:80]}).", "Pack it again without a password.")
