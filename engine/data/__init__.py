"""Data: read a file, recognise its format, map its columns, check every row, split.

    table = read("answers.csv")        # rows with line numbers, problems
    found = recognise(table)           # which format, which column plays which role, why
    prepared = prepare(table)          # examples in one canonical form; kept + skipped = total
    train, evaluation = split(prepared.examples, share=0.1, seed=0)

Nothing here imports torch or transformers, so the page uses it in its own process.
"""

from engine.data.errors import (
    ArchiveError,
    ClassesError,
    ColumnError,
    DelimiterError,
    EmptyError,
    EncodingError,
    FileError,
    FixError,
    FormatError,
    JsonError,
    KindError,
    NothingLeftError,
    NotTakenError,
    ParquetError,
    PictureError,
    TooLargeError,
)
from engine.data.fixes import REMEDIES, version
from engine.data.fixes import checked as checked_fixes
from engine.data.formats import FORMATS, Format, FormatInfo, recognise
from engine.data.images import open_picture
from engine.data.ingest import KINDS, fingerprint, read
from engine.data.prepare import Prepared, load, prepare
from engine.data.split import Leaks, leaks, split
from engine.data.summary import profile
from engine.data.table import Limits, Problem, Row, Table

__all__ = [
    "FORMATS",
    "KINDS",
    "REMEDIES",
    "ArchiveError",
    "ClassesError",
    "ColumnError",
    "DelimiterError",
    "EmptyError",
    "EncodingError",
    "FileError",
    "FixError",
    "Format",
    "FormatError",
    "FormatInfo",
    "JsonError",
    "KindError",
    "Leaks",
    "Limits",
    "NotTakenError",
    "NothingLeftError",
    "ParquetError",
    "PictureError",
    "Prepared",
    "Problem",
    "Row",
    "Table",
    "TooLargeError",
    "checked_fixes",
    "fingerprint",
    "leaks",
    "load",
    "open_picture",
    "prepare",
    "profile",
    "read",
    "recognise",
    "split",
    "version",
]
