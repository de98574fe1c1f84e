"""Parquet: checked at both ends here, read in a process of its own (`engine.data.columnar_child`)."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from engine.data.errors import EmptyError, ParquetError, TooLargeError
from engine.data.table import Limits, Problem, ProblemLog, Row, Table, held_rows
from engine.errors import DataError
from engine.paths import REPOSITORY

_SECONDS = 300.0
"""How long one file may take; 100,000 rows of chat take about three."""


def read_parquet(path: Path, raw: bytes, limits: Limits) -> Table:
    """Raises: ParquetError, TooLargeError, EmptyError."""
    _check_frame(path.name, raw)
    table = Table("parquet", [], held_rows(), ProblemLog("row"))
    ended = False
    with subprocess.Popen(
        [
            sys.executable,
            "-P",
            "-m",
            "engine.data.columnar_child",
            str(path.resolve()),
            json.dumps(dataclasses.asdict(limits)),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": _search_path()},
    ) as child:
        assert child.stdout is not None
        clock = threading.Timer(_SECONDS, child.kill)
        clock.start()
        try:
            for message in _messages(child.stdout):
                ended = _take(message, table) or ended
        finally:
            clock.cancel()
            child.kill()
    if not ended:
        raise ParquetError(
            f"{path.name} is damaged: the reader gave up without a result (exit {child.returncode}).",
            "Write the file again, or give it as jsonl.",
        )
    if not table.rows:
        first = f"The first: {table.log.items[0]}" if table.log.items else ""
        raise ParquetError(f"No row of {path.name} could be read.", first)
    return table


def _search_path() -> str:
    """Where the child finds `engine`, whatever the current folder is."""
    there = os.environ.get("PYTHONPATH")
    return f"{REPOSITORY}{os.pathsep}{there}" if there else str(REPOSITORY)


def _messages(stream: IO[bytes]) -> Iterator[Any]:
    for line in stream:
        try:
            yield json.loads(line)
        except ValueError:
            # The child was ended in the middle of a line; what is missing shows by the end that never came.
            return


def _take(message: Any, table: Table) -> bool:
    """Put one line of the child into the table; True for the last."""
    if isinstance(message, list):
        table.rows.append(Row(message[0], dict(zip(table.columns, message[1], strict=True))))
    elif "columns" in message:
        table.columns = message["columns"]
    elif "error" in message:
        fault = message["error"]
        kinds: dict[str, type[DataError]] = {kind.code: kind for kind in (EmptyError, TooLargeError, ParquetError)}
        raise kinds.get(fault["code"], ParquetError)(fault["message"], fault["hint"])
    else:
        end = message["end"]
        log = table.log
        log.items = [Problem(**problem) for problem in end["problems"]]
        log.counts, log.skipped, log.fixed = end["counts"], end["skipped"], end["fixed"]
        return True
    return False


def _check_frame(name: str, raw: bytes) -> None:
    """The marks at both ends and the footer's length, before any parser sees a byte."""
    if raw[:4] == b"PARE" and raw[-4:] == b"PARE":
        raise ParquetError(f"{name} is an encrypted Parquet file.", "Write it without encryption.")
    if raw[:4] != b"PAR1":
        what = "a zip archive" if raw[:2] == b"PK" else "gzip data" if raw[:2] == b"\x1f\x8b" else "something else"
        raise ParquetError(
            f"{name} is not a Parquet file: it begins with {raw[:4]!r} ({what}), where b'PAR1' was needed.",
            "Give the file its true ending, or write it as Parquet.",
        )
    footer = int.from_bytes(raw[-8:-4], "little")
    if len(raw) < 12 or raw[-4:] != b"PAR1" or footer > len(raw) - 12:
        raise ParquetError(f"{name} is cut off: its end is not that of a Parquet file.", "Copy or download it again.")
