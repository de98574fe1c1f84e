"""The process that reads one Parquet file: `python -m engine.data.columnar_child FILE LIMITS` writes JSON lines.

The Parquet library ends its whole process on some damaged files, and a small file can unfold into gigabytes. So it
runs apart, under a memory limit where the system has one. The footer is checked first; texts are read as dictionary
and indices, and their unfolded size is summed before one of them becomes a Python string.

Lines: `{"columns": [...]}`, then `[row number, [values]]` for each row, at last `{"end": {...}}` with the problems, or
`{"error": {"code", "message", "hint"}}`.
"""

from __future__ import annotations

import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any, TextIO

from engine.data.errors import EmptyError, ParquetError, TooLargeError
from engine.data.table import Limits, ProblemLog, Scrubber
from engine.errors import DataError

_BATCH = 8192


def main(path: str, limits_json: str, out: TextIO) -> None:
    """Read the file and write the lines."""
    limits = Limits(**json.loads(limits_json))
    _limit_memory(limits)
    try:
        _read(Path(path), limits, out)
    except DataError as error:
        out.write(json.dumps({"error": error.to_event()}) + "\n")


def _limit_memory(limits: Limits) -> None:
    try:
        resource = importlib.import_module("resource")
        wanted = 4 * limits.max_unpacked + 2 * limits.max_bytes + 2**31
        resource.setrlimit(resource.RLIMIT_AS, (wanted, wanted))
    except (ImportError, ValueError, OSError):
        # Windows has no such limit; the checks of the footer and of each batch remain.
        return


def _read(path: Path, limits: Limits, out: TextIO) -> None:
    pa = importlib.import_module("pyarrow")
    pq = importlib.import_module("pyarrow.parquet")
    raw = path.read_bytes()
    try:
        meta = pq.read_metadata(io.BytesIO(raw))
        _check_footer(path.name, meta, limits)
        texts = [
            meta.schema.column(index).path
            for index in range(meta.num_columns)
            if meta.schema.column(index).physical_type == "BYTE_ARRAY"
        ]
        _write_rows(path.name, pq.ParquetFile(io.BytesIO(raw), read_dictionary=texts), limits, out)
    except MemoryError as error:
        raise TooLargeError(
            f"{path.name} needs more memory than a data file may take.", "Split the file into smaller ones."
        ) from error
    except (pa.ArrowException, OSError, ValueError, TypeError, NotImplementedError, OverflowError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ParquetError(
            f"{path.name} cannot be read as Parquet: {reason}", "The file may be damaged; write it again."
        ) from error


def _check_footer(name: str, meta: Any, limits: Limits) -> None:
    if meta.num_rows == 0:
        raise EmptyError(f"{name} has columns but no row.", "Give a file with at least one row.")
    if meta.num_rows > limits.max_rows:
        raise TooLargeError(
            f"{name} has {meta.num_rows:,} rows; at most {limits.max_rows:,} are read.",
            "Split the file, or sample it.",
        )
    if meta.num_columns > limits.max_columns:
        raise TooLargeError(
            f"{name} has {meta.num_columns:,} columns; at most {limits.max_columns:,} are read.",
            "Keep the columns that hold the text, and drop the rest.",
        )
    size = 0
    for group in range(meta.num_row_groups):
        chunk = meta.row_group(group)
        for index in range(chunk.num_columns):
            column = chunk.column(index)
            size += max(column.total_uncompressed_size, 8 * column.num_values)
    _check_unpacked(name, size, limits)


def _check_unpacked(name: str, size: int, limits: Limits) -> None:
    if size > limits.max_unpacked:
        raise TooLargeError(
            f"{name} unfolds to {size / 2**20:,.0f} MiB or more; "
            f"at most {limits.max_unpacked / 2**20:,.0f} MiB are read.",
            "Split the file, or keep the columns that hold the text.",
        )


def _write_rows(name: str, file: Any, limits: Limits, out: TextIO) -> None:
    log = ProblemLog("row")
    scrub = Scrubber(limits, log)
    columns = _unique([scrub.text(str(field.name)).strip() for field in file.schema_arrow], log)
    out.write(json.dumps({"columns": columns}) + "\n")
    number, unpacked = 0, 0
    for batch in file.iter_batches(batch_size=_BATCH, use_threads=False):
        unpacked += sum(_unfolded(column) for column in batch.columns)
        _check_unpacked(name, unpacked, limits)
        values = [_plain(column) for column in batch.columns]
        for row in zip(*values, strict=True):
            number += 1
            cells = scrub.row(number, dict(zip(columns, row, strict=True)))
            if cells is not None:
                out.write(json.dumps([number, list(cells.values())]) + "\n")
    problems = [problem.to_dict() for problem in log.items]
    end = {"problems": problems, "counts": log.counts, "skipped": log.skipped, "fixed": log.fixed}
    out.write(json.dumps({"end": end}) + "\n")


def _unique(names: list[str], log: ProblemLog) -> list[str]:
    seen: dict[str, None] = {}
    for name in names:
        free, count = name, 1
        while free in seen:
            count += 1
            free = f"{name} ({count})"
        if free != name:
            log.note(1, name, "duplicate-column", f"Two columns have this name; the second is called {free!r} here.")
        seen[free] = None
    return list(seen)


def _unfolded(array: Any) -> int:
    """Bytes that the array takes as plain values, without making them; texts in a dictionary count each time."""
    pa = importlib.import_module("pyarrow")
    pc = importlib.import_module("pyarrow.compute")
    if pa.types.is_dictionary(array.type):
        if not len(array.dictionary):
            return 8 * len(array)
        lengths = pc.take(pc.binary_length(array.dictionary), array.indices)
        return 8 * len(array) + (pc.sum(pc.cast(lengths, pa.int64())).as_py() or 0)
    if pa.types.is_struct(array.type):
        return 8 * len(array) + sum(_unfolded(array.field(index)) for index in range(array.type.num_fields))
    if pa.types.is_map(array.type):
        return 8 * len(array) + _unfolded(array.keys) + _unfolded(array.items)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return 8 * len(array) + _unfolded(array.flatten())
    return max(8 * len(array), int(array.nbytes))


def _plain(array: Any) -> list[Any]:
    """Python values. A dictionary is unfolded first, which is many times faster than value by value."""
    pa = importlib.import_module("pyarrow")
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    values: list[Any] = array.to_pylist()
    return values


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.stdout)
