"""Several files at once: pictures with their words become one zip, tables of one shape one table, others stay apart."""

from __future__ import annotations

import csv
import io
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.data import KINDS, read
from engine.data.encoding import decode
from engine.data.images import PICTURES
from engine.errors import DataError, EngineError
from studio.datasets import Checked, Datasets

FOLDED = "_,_"
"""Stands for the slash in the name of a file that came with its folder: uploads keep names, and no folders."""
_JOINED = (".csv", ".tsv", ".jsonl", ".ndjson", ".txt")
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Brought:
    """What came of bringing in files.

    Attributes:
        sets: the data sets, in the order of the files.
        refused: (name, why) of files that cannot be used.
        left_alone: names of files that are nothing to learn from.
        joined: the names of the files that became the one data set; empty where none were joined.
    """

    sets: tuple[Checked, ...] = ()
    refused: tuple[tuple[str, EngineError], ...] = ()
    left_alone: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()


def bring_in(datasets: Datasets, paths: Sequence[Path]) -> Brought:
    """Bring in what was chosen or dropped together.

    Raises:
        DataError: it is one file, and cannot be used; or nothing of several can.
        UnsafeFileError: a name leads out of its folder.
    """
    if len(paths) == 1 and not _is_picture(paths[0]):
        return Brought((datasets.bring_in(paths[0]),))
    names = {path: path.name.replace(FOLDED, "/") for path in sorted(paths, key=lambda path: path.name)}
    if any(map(_is_picture, names)):
        return _pictures(datasets, names)
    tables = [path for path in names if path.suffix.lower() in KINDS]
    left = tuple(name for path, name in names.items() if path not in tables)
    if not tables:
        return Brought((datasets.bring_in(next(iter(names))),))
    together = _together(tables)
    with tempfile.TemporaryDirectory() as folder:
        if together is not None:
            one = Path(folder) / f"joined{tables[0].suffix.lower()}"
            one.write_text(together, encoding="utf-8")
            title = f"{_short(names[tables[0]])} and {len(tables) - 1} more"
            return Brought((datasets.bring_in(one, title),), (), left, tuple(names[path] for path in tables))
    found: list[Checked] = []
    refused: list[tuple[str, EngineError]] = []
    for path in tables:
        try:
            found.append(datasets.bring_in(path, _short(names[path])))
        except EngineError as error:
            refused.append((names[path], error))
    if not found:
        raise refused[0][1]
    return Brought(tuple(found), tuple(refused), left)


def _is_picture(path: Path) -> bool:
    return path.name.lower().endswith(PICTURES)


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _pictures(datasets: Datasets, names: dict[Path, str]) -> Brought:
    """A zip of all files; equal files make equal zips, whenever they are brought in."""
    roots = {name.partition("/")[0] for name in names.values() if "/" in name}
    count = sum(map(_is_picture, names))
    title = next(iter(roots)) if len(roots) == 1 else f"{count} pictures"
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "pictures.zip"
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
            for path, name in names.items():
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), path.read_bytes())
        return Brought((datasets.bring_in(packed, title),), joined=tuple(names.values()))


def _together(tables: Sequence[Path]) -> str | None:
    """The tables as the text of one, where they have one kind and one header; None where they have not.

    Line by line nothing is lost: what is wrong with a row is found in the joined table as in its own.
    """
    kinds = {path.suffix.lower() for path in tables}
    if len(tables) < 2 or len(kinds) != 1 or not kinds <= set(_JOINED):
        return None
    try:
        texts = [decode(path.name, path.read_bytes())[0] for path in tables]
        shapes = {(tuple(table.columns), table.delimiter) for table in map(read, tables)}
    except (DataError, OSError):
        return None
    kind = kinds.pop()
    if kind == ".txt":
        # Files of paragraphs stay paragraphs; where each line is a row, it stays one.
        blank = any(not line.strip() for text in texts for line in text.strip("\r\n").splitlines())
        return ("\n\n" if blank else "\n").join(text.strip("\r\n") for text in texts)
    if len(shapes) != 1:
        return None
    if kind in (".csv", ".tsv"):
        heads = [next(csv.reader(io.StringIO(text, newline=""))) for text in texts]
        if any(head != heads[0] or "\n" in "".join(head) for head in heads):
            return None
        texts = [texts[0], *(text.split("\n", 1)[-1] for text in texts[1:])]
    elif any(text.lstrip().startswith("[") for text in texts):
        return None
    return "\n".join(text.rstrip("\r\n") for text in texts) + "\n"
