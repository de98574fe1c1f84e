"""Files made to harm: each is refused with a name, quickly, and the process that asked lives on."""

from __future__ import annotations

import datetime
import decimal
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.data import Limits, load, read
from engine.errors import DataError
from engine.paths import REPOSITORY


def refused(path: Path, limits: Limits | None = None) -> DataError:
    started = time.perf_counter()
    with pytest.raises(DataError) as caught:
        read(path, limits=limits)
    assert time.perf_counter() - started < 15
    return caught.value


def test_zip_bomb_named_parquet(tmp_path: Path) -> None:
    path = tmp_path / "bomb.parquet"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("data", "w") as stream:
        for _ in range(300):
            stream.write(bytes(2**20))
    assert path.stat().st_size < 2**20
    fault = refused(path)
    assert fault.code == "data-not-parquet" and "zip" in fault.message


def test_parquet_that_declares_more_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "bomb.parquet"
    column = pa.array(["a" * 2**20] * 130)
    with pq.ParquetWriter(path, pa.schema({"text": pa.string()}), compression="zstd", use_dictionary=False) as writer:
        for _ in range(4):
            writer.write_table(pa.table({"text": column}))
    assert path.stat().st_size < 2**20
    assert pq.read_metadata(path).row_group(0).total_byte_size > 100 * 2**20
    content = bytearray(path.read_bytes())
    content[4:64] = b"\xff" * 60
    path.write_bytes(content)  # The pages are spoilt: only a check of the footer, before them, can give this answer.
    fault = refused(path)
    assert fault.code == "data-too-large" and "520 MiB" in fault.message


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "in turns"])
def test_parquet_whose_dictionary_repeats_one_long_text(tmp_path: Path, nested: bool) -> None:
    """The footer declares 1 MB; the rows are 600 MB."""
    path = tmp_path / "bomb.parquet"
    long = "a" * 1_000_000
    values = [[{"role": "user", "content": long}]] * 600 if nested else [long] * 600
    pq.write_table(pa.table({"column": pa.array(values)}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    assert pq.read_metadata(path).row_group(0).total_byte_size < 2**21
    assert refused(path).code == "data-too-large"


def test_parquet_with_too_many_rows_in_few_bytes(tmp_path: Path) -> None:
    path = tmp_path / "nulls.parquet"
    pq.write_table(pa.table({"text": pa.nulls(2_000_000, pa.string())}), path)
    assert path.stat().st_size < 10_000
    fault = refused(path)
    assert fault.code == "data-too-large" and "2,000,000" in fault.message


def test_parquet_with_one_endless_list(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    numbers = pa.ListArray.from_arrays(pa.array([0, 70_000_000], pa.int32()), pa.nulls(70_000_000, pa.int8()))
    pq.write_table(pa.table({"text": numbers}), path)
    assert path.stat().st_size < 2**20
    assert refused(path).code == "data-too-large"


def test_damaged_parquet_never_ends_the_process(tmp_path: Path) -> None:
    """The library aborts its process on some of these; ours must only see a named error."""
    path = tmp_path / "good.parquet"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    pq.write_table(pa.table({"messages": [turns] * 30, "n": list(range(30))}), path)
    good = path.read_bytes()
    assert load(path).kept == 30
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    for position in range(footer, len(good) - 8, max(1, (len(good) - 8 - footer) // 12)):
        damaged = bytearray(good)
        damaged[position : position + 3] = b"\xff\x15\x19"
        path.write_bytes(damaged)
        try:
            assert read(path).rows
        except DataError as error:
            assert error.code in ("data-not-parquet", "data-too-large", "data-empty")
    path.write_bytes(good)
    assert load(path).kept == 30


@pytest.mark.skipif(os.name == "nt", reason="the stand-in reader is a shell script")
def test_reader_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "good.parquet"
    pq.write_table(pa.table({"text": ["a", "b"]}), path)
    wrapper = tmp_path / "dies"
    wrapper.write_text('#!/bin/sh\necho \'{"columns": ["text"]}\'\necho \'[1, ["a"\'\nkill -ABRT $$\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(wrapper))
    fault = refused(path)
    assert fault.code == "data-not-parquet" and "damaged" in fault.message


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on address space is Linux's")
def test_reader_is_under_a_memory_limit() -> None:
    """With the checks passed, the reader itself still cannot take the machine's memory."""
    script = (
        "from engine.data import columnar_child as child; from engine.data.table import Limits;"
        "child._limit_memory(Limits());"
        "block = bytearray(8 * 2**30)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1 and "MemoryError" in done.stderr


def test_nothing_is_run_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("raise SystemExit('wrong engine')\n")
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "good.parquet")
    monkeypatch.chdir(tmp_path)
    assert read("good.parquet").total == 2
    assert os.getcwd() == str(tmp_path)


def test_parquet_values_that_json_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "types.parquet"
    rows = {
        "text": ["a", "b", "c"],
        "day": [datetime.date(2024, 2, 29)] * 3,
        "price": [decimal.Decimal("1.50")] * 3,
        "score": [1.5, float("nan"), float("inf")],
        "raw": [b"bytes", "글".encode(), b"\xff\xfe"],
    }
    pq.write_table(pa.table(rows), path)
    table = read(path)
    assert [row.line for row in table.rows] == [1, 2]
    assert table.rows[0].cells == {"text": "a", "day": "2024-02-29", "price": "1.50", "score": 1.5, "raw": "bytes"}
    assert table.rows[1].cells["score"] is None and table.rows[1].cells["raw"] == "글"
    assert [(problem.line, problem.code, problem.unit) for problem in table.problems] == [(3, "not-text", "row")]


def test_json_escapes_inside_a_csv_cell_are_made_safe(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    turns = '[{"role": "user", "content": "a\\ud83d"}, {"role": "assistant", "content": "b\\u0000c"}]'
    path.write_text('messages\n"' + turns.replace('"', '""') + '"\n', encoding="utf-8")
    prepared = load(path)
    assert [turn["content"] for turn in prepared.examples[0]["messages"]] == ["a\ufffd", "bc"]
    assert prepared.counts == {"bad-characters": 2}
    json.dumps(prepared.examples, ensure_ascii=False).encode("utf-8")
