"""Reading: every kind of file, with the right cells, the right line numbers, and every bad file refused by name."""

from __future__ import annotations

import codecs
import csv
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.data import Limits, Table, fingerprint, read
from engine.errors import DataError
from engine.paths import REPOSITORY


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def cells(table: Table) -> list[tuple[object, ...]]:
    return [tuple(row.cells.get(column) for column in table.columns) for row in table.rows]


def lines(table: Table) -> list[int]:
    return [row.line for row in table.rows]


PAIRS = [("안녕하세요", "반갑습니다 😀"), ("a, b; c", 'say "hi"\nand go'), ("tab\tbar|", "x")]


# --- what can be read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_round_trip(tmp_path: Path, delimiter: str, newline: str, encoding: str) -> None:
    path = tmp_path / "pairs.csv"
    with open(path, "w", encoding=encoding, newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter, lineterminator=newline)
        writer.writerows([("Question", "Answer"), *PAIRS])
    table = read(path)
    assert table.columns == ["Question", "Answer"]
    assert cells(table) == PAIRS
    assert lines(table) == [2, 3, 5]
    assert (table.delimiter, table.kind, table.unit, table.problems) == (delimiter, "csv", "line", [])


def test_csv_round_trips_random_texts(tmp_path: Path) -> None:
    chance = random.Random(7)
    alphabet = ["a", "b", " ", ",", ";", '"', "\n", "\r\n", "\t", "|", "가", "😀", "\u2028", "\x0b", "'"]
    for case in range(60):
        rows = [
            tuple("x" + "".join(chance.choices(alphabet, k=chance.randrange(12))) + "y" for _ in range(3))
            for _ in range(chance.randrange(1, 15))
        ]
        path = tmp_path / f"{case}.csv"
        with open(path, "w", encoding="utf-8", newline="") as stream:
            csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([("prompt", "completion", "note"), *rows])
        table = read(path)
        assert cells(table) == rows
        starts = [2]
        for row in rows[:-1]:
            starts.append(starts[-1] + 1 + sum(cell.count("\n") for cell in row))
        assert lines(table) == starts


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_objects_round_trip(tmp_path: Path, kind: str) -> None:
    rows = [
        {
            "messages": [{"role": "user", "content": "질문 😀"}, {"role": "assistant", "content": "a\nb"}],
            "n": 1,
            "x": 0.5,
        },
        {"messages": [], "n": None, "x": None},
    ]
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "json":
        path.write_text(json.dumps({"version": 1, "data": rows}), encoding="utf-8")
    else:
        path.write_text("\r\n".join(["", *(json.dumps(row) for row in rows), ""]), encoding="utf-8")
    table = read(path)
    assert [row.cells for row in table.rows] == rows
    assert table.columns == ["messages", "n", "x"]
    assert (lines(table), table.unit) == (([2, 3], "line") if kind == "jsonl" else ([1, 2], "row"))


def test_txt_is_cut_into_paragraphs_or_lines(tmp_path: Path) -> None:
    table = read(write(tmp_path, "a.txt", "\r\none\r\ntwo\r\n\r\n \r\n셋\r\n"))
    assert cells(table) == [("one\ntwo",), ("셋",)]
    assert lines(table) == [2, 6]
    table = read(write(tmp_path, "b.txt", "one\ntwo\u2028still two\nthree"))
    assert cells(table) == [("one",), ("two\u2028still two",), ("three",)]
    assert lines(table) == [1, 2, 3]


def test_content_decides_between_json_and_jsonl(tmp_path: Path) -> None:
    row = {"text": "a"}
    assert read(write(tmp_path, "a.json", json.dumps(row) + "\n" + json.dumps(row))).kind == "jsonl"
    assert read(write(tmp_path, "b.jsonl", json.dumps([row, row], indent=1))).kind == "json"


def test_one_column_csv_keeps_commas(tmp_path: Path) -> None:
    table = read(write(tmp_path, "a.csv", 'text\n"one, two"\n"three\nfour"\nfive; six\n'))
    assert cells(table) == [("one, two",), ("three\nfour",), ("five; six",)]
    assert lines(table) == [2, 3, 5]


def test_names_and_then_rows_decide_the_delimiter(tmp_path: Path) -> None:
    table = read(write(tmp_path, "a.csv", "prompt;completion\nHello, you;Yes, me\nWell, then;No, thanks\n"))
    assert table.delimiter == ";" and len(table.rows) == 2
    table = read(write(tmp_path, "b.csv", "first|second, third\na|b, c\nd, e|f, g\n"))
    assert table.delimiter == "|" and len(table.rows) == 2


# --- rows that cannot be read, or only after a change --------------------------------------------------------------

ROW_PROBLEMS = {
    "ragged csv row": ("a.csv", "prompt,completion\na,b\nc\n\"d\ne\",f\ng,h,i\nj,k,,\n", {"ragged": [3, 6]}, [2, 4, 7]),
    "quote never closed": ("a.csv", 'prompt,completion\na,b\nc,"d\ne,f\ng,h\n', {"open-quote": [3]}, [2, 4, 5]),
    "duplicate name": ("a.csv", "text,text\na,b\n", {"duplicate-column": [1]}, [2]),
    "unnamed column": ("a.csv", ",prompt,completion\n0,a,b\n", {"unnamed-column": [1]}, [2]),
    "header is data": ("a.csv", "How are you?,I am fine.\nWho?,Me.\n", {"no-header": [1]}, [1, 2]),
    "null bytes in csv": ("a.csv", "prompt,completion\na,b\0c\nd,e\n", {"bad-characters": [2]}, [2, 3]),
    "commas in a tsv": ("a.tsv", "prompt,completion\na,b\n", {"not-tabs": [1]}, [2]),
    "bad jsonl line": ("a.jsonl", '{"text": "a"}\n{"text": \n[1]\n{}\n{"text": "b"}\n',
                       {"bad-json": [2], "not-an-object": [3], "empty-row": [4]}, [1, 5]),
    "half surrogate": ("a.jsonl", '{"text": "\\ud83d x"}\n{"text": "\\ud83d\\ude00"}\n',
                       {"bad-characters": [1]}, [1, 2]),
    "deep jsonl line": ("a.jsonl", '{"text": "a"}\n{"text": ' + "[" * 5000 + "]" * 5000 + "}\n",
                        {"too-deep": [2]}, [1]),
    "fairly deep line": ("a.jsonl", '{"text": "a"}\n{"text": ' + "[" * 90 + "]" * 90 + "}\n", {"too-deep": [2]}, [1]),
    "endless number": ("a.jsonl", '{"text": "a"}\n{"n": ' + "9" * 5000 + "}\n", {"bad-json": [2]}, [1]),
    "not an object": ("a.json", '[{"text": "a"}, 3, null]', {"not-an-object": [2, 3]}, [1]),
    "long cell": ("a.csv", "prompt,completion\n" + "x" * 1001 + ",b\na,b\n", {"cell-too-long": [2]}, [3]),
}  # fmt: skip


@pytest.mark.parametrize("name,content,problems,kept", ROW_PROBLEMS.values(), ids=ROW_PROBLEMS.keys())
def test_problem_rows(tmp_path: Path, name: str, content: str, problems: dict[str, list[int]], kept: list[int]) -> None:
    table = read(write(tmp_path, name, content), limits=Limits(max_cell=1000))
    found: dict[str, list[int]] = {}
    for problem in table.problems:
        found.setdefault(problem.code, []).append(problem.line)
        assert str(problem).startswith(f"{table.unit.capitalize()} {problem.line}")
    assert found == problems
    assert lines(table) == kept
    assert table.skipped == sum(problem.severity == "skip" for problem in table.problems)
    assert table.total == len(kept) + table.skipped
    json.dumps([row.cells for row in table.rows], ensure_ascii=False).encode("utf-8")


def test_duplicate_and_missing_names_are_replaced(tmp_path: Path) -> None:
    assert read(write(tmp_path, "a.csv", "text,text, Text ,,\na,b,c,,\n")).columns == ["text", "text (2)", "Text"]
    table = read(write(tmp_path, "b.csv", "2,three\n4,five\n"))
    assert table.columns == ["column 1", "column 2"] and cells(table) == [("2", "three"), ("4", "five")]


def test_split_surrogate_pair_becomes_its_character(tmp_path: Path) -> None:
    assert cells(read(write(tmp_path, "a.jsonl", '{"text": "\\ud83d\\ude00"}'))) == [("😀",)]


def test_problems_are_counted_exactly_and_kept_in_part(tmp_path: Path) -> None:
    table = read(write(tmp_path, "a.jsonl", '{"text": "a"}\n' + "oops\n" * 2500))
    assert table.log.counts == {"bad-json": 2500} and len(table.problems) == 1000
    assert table.total == 2501


# --- files that cannot be used -------------------------------------------------------------------------------------

BAD_FILES: dict[str, tuple[str, str | bytes, str, str]] = {
    "no bytes": ("a.csv", b"", "data-empty", "0 bytes"),
    "white space": ("a.jsonl", b" \n\r\n\t ", "data-empty", "empty"),
    "wide white space": ("a.txt", "\u3000\n\u00a0\n", "data-empty", "white space"),
    "only a mark": ("a.csv", codecs.BOM_UTF8 + b"\n", "data-empty", "white space"),
    "only a header": ("a.csv", "prompt,completion\n\n", "data-empty", "prompt, completion"),
    "empty list": ("a.json", "[]", "data-empty", "empty list"),
    "unknown ending": ("a.docx", "x", "data-kind", ".docx"),
    "no ending": ("data", "x", "data-kind", "no ending"),
    "spreadsheet": ("a.xlsx", b"PK\x03\x04", "data-kind", "CSV"),
    "packed": ("a.csv.gz", b"\x1f\x8b", "data-kind", "Unpack"),
    "zip in disguise": ("a.csv", b"PK\x03\x04" + b"x" * 50, "data-kind", "zip"),
    "gzip in disguise": ("a.jsonl", b"\x1f\x8b" + b"x" * 50, "data-kind", "gzip"),
    "parquet in disguise": ("a.csv", b"PAR1" + b"x" * 50, "data-kind", "Parquet"),
    "pickle in disguise": ("a.json", b"\x80\x04\x95" + b"x" * 50, "data-kind", "pickle"),
    "web page": ("a.csv", "\n<!DOCTYPE html><html>", "data-kind", "web page"),
    "broken utf-8": ("a.csv", b"prompt,completion\na,b\nc,\xff\xfe\n", "data-encoding", "byte 24 (0xff), in line 3"),
    "korean windows": ("a.csv", "prompt,completion\n안녕,반가워\n".encode("cp949"), "data-encoding", "cp949"),
    "western windows": ("a.csv", "prompt,completion\ncafé,déjà\n".encode("cp1252"), "data-encoding", "cp1252"),
    "utf-16 without mark": ("a.csv", "prompt,completion\na,b\n".encode("utf-16-le"), "data-encoding", "UTF-16"),
    "cut off utf-16": ("a.csv", "prompt,x\na,b\n".encode("utf-16")[:-1], "data-encoding", "UTF-16"),
    "binary": ("a.txt", bytes(range(1, 128)) + bytes(300), "data-encoding", "null bytes"),
    "unknown delimiter": ("a.csv", "prompt^completion\na^b\n", "data-delimiter", "prompt^completion"),
    "spaces as delimiter": ("a.csv", "question answer\na b\n", "data-delimiter", "question answer"),
    "ambiguous delimiter": ("a.csv", "v,w;x,y;z\n1,2;3,4;5\n", "data-delimiter", "ambiguous"),
    "text without quotes": ("a.csv", "prompt,completion\na,b,c\nd,e,f\ng,h\n", "data-delimiter", "lines 2, 3"),
    "header quote": ("a.csv", 'prompt,"completion\na,b\nc,d\n', "data-delimiter", "header"),
    "no json": ("a.json", '[{"text": "a"},\n {"text": }]', "data-json", "line 2"),
    "deep json": ("a.json", "[" * 200_000 + "]" * 200_000, "data-json", "nested too deeply"),
    "deep object": ("a.json", '{"a":' * 50_000 + "1" + "}" * 50_000, "data-json", "nested too deeply"),
    "deep jsonl": ("a.jsonl", '{"a":' * 50_000 + "1" + "}" * 50_000, "data-json", "nested too deeply"),
    "one object": ("a.json", '{"text": "a"}', "data-json", "one object"),
    "single value": ("a.json", "3", "data-json", "single value"),
    "no objects": ("a.json", "[1, 2]", "data-json", "None of the 2 items"),
    "all lines bad": ("a.jsonl", "oops\nno\n", "data-json", "Line 1"),
    "endless number": ("a.json", '[{"n": ' + "9" * 5000 + "}]", "data-json", "number"),
    "text as parquet": ("a.parquet", "prompt,completion\na,b\n", "data-not-parquet", "begins with"),
    "gzip as parquet": ("a.parquet", b"\x1f\x8b" + b"x" * 50, "data-not-parquet", "gzip"),
    "cut off parquet": ("a.parquet", b"PAR1" + b"x" * 50, "data-not-parquet", "cut off"),
    "lying parquet": ("a.parquet", b"PAR1" + b"\x15" * 50 + b"\x20\0\0\0PAR1", "data-not-parquet", "Parquet"),
    "locked parquet": ("a.parquet", b"PARE" + b"x" * 50 + b"PARE", "data-not-parquet", "encrypted"),
}


@pytest.mark.parametrize("name,content,code,says", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_files_are_refused_by_name(tmp_path: Path, name: str, content: str | bytes, code: str, says: str) -> None:
    path = write(tmp_path, name, content)
    before = path.read_bytes()
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.code == code
    assert says in str(caught.value)
    assert path.name in str(caught.value) or code == "data-json"
    assert path.read_bytes() == before


def test_folders_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for name, code in (("folder.csv", "data-empty"), ("missing.csv", "data-file")):
        with pytest.raises(DataError) as caught:
            read(tmp_path / name)
        assert caught.value.code == code
    with pytest.raises(DataError):
        fingerprint(tmp_path / "missing.csv")


@pytest.mark.parametrize(
    "name,content,limits",
    [
        ("a.csv", "text\n" + "a\n" * 300, Limits(max_bytes=500)),
        ("a.csv", "text\n" + "a\n" * 11, Limits(max_rows=10)),
        ("a.csv", ",".join(f"n{i}" for i in range(11)) + "\n" + ",".join("x" * 11) + "\n", Limits(max_columns=10)),
        ("a.txt", "a\n" * 11, Limits(max_rows=10)),
        ("a.jsonl", '{"text": "a"}\n' * 11, Limits(max_rows=10)),
        ("a.json", json.dumps([{"text": "a"}] * 11), Limits(max_rows=10)),
        ("a.json", json.dumps([{f"n{i}": "a"} for i in range(11)]), Limits(max_columns=10)),
        ("a.json", json.dumps([{"a": [[]] * 100}]), Limits(max_nested=50)),
    ],
)
def test_limits(tmp_path: Path, name: str, content: str, limits: Limits) -> None:
    path = write(tmp_path, name, content)
    assert read(path).rows
    with pytest.raises(DataError) as caught:
        read(path, limits=limits)
    assert caught.value.code == "data-too-large"


def test_file_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.csv"
    with open(path, "wb") as stream:
        stream.truncate(200 * 2**20)
    started = time.perf_counter()
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.code == "data-too-large" and "200.0 MiB" in caught.value.message
    assert time.perf_counter() - started < 0.5


# --- size, identity, weight ----------------------------------------------------------------------------------------


def test_a_hundred_thousand_rows_take_seconds(tmp_path: Path) -> None:
    rows = [(f"question {number}, with a comma", f"answer\n{number}") for number in range(100_000)]
    path = tmp_path / "big.csv"
    with open(path, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("prompt", "completion"), *rows])
    started = time.perf_counter()
    table = read(path)
    assert time.perf_counter() - started < 10
    assert cells(table) == rows and table.rows[-1].line == 200_000


def test_many_open_quotes_end_quickly(tmp_path: Path) -> None:
    text = "prompt,completion\n" + 'b",",x\n' * 20_000
    started = time.perf_counter()
    with pytest.raises(DataError) as caught:
        read(write(tmp_path, "a.csv", text))
    assert caught.value.code == "data-delimiter"
    assert time.perf_counter() - started < 10


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    one, two = write(tmp_path, "a.csv", "x,y\n"), write(tmp_path, "b.txt", "x,y\n")
    assert fingerprint(one) == fingerprint(two) == fingerprint(b"x,y\n") == fingerprint(str(one))
    assert len(fingerprint(one)) == 16 and fingerprint(b"x,y") != fingerprint(one)
    assert fingerprint(b"") == "e3b0c44298fc1c14"


def test_reading_needs_no_heavy_library(tmp_path: Path) -> None:
    """The page imports `engine.data` when it starts: no torch, and not even pandas or pyarrow until it must."""
    path = write(tmp_path, "a.csv", "prompt,completion\na,b\nc,d\n")
    script = (
        "import sys; from engine.data import load, profile; profile(load(sys.argv[1]));"
        "print([m for m in ('torch', 'transformers', 'pandas', 'pyarrow', 'gradio', 'sqlite3') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "[]"
