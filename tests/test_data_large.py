"""Data of many rows lies in files, and is what it would be in memory: rows, problems, parts, the losses of a run."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from array import array
from pathlib import Path
from typing import Any

import pytest

from engine.data import FileError, held, load, read, split
from engine.data.held import Held, repeats
from engine.data.split import _question
from engine.records import Chosen
from engine.train.events import Recorder
from engine.train.job import JobSpec
from engine.train.worker import run

WORDS = ["sea", "ship", "gull", "안녕", "🙂", "a\u2028b", "quote \" and ' and ,"]


def rows(count: int) -> list[dict[str, Any]]:
    chance = random.Random(3)
    return [
        {"prompt": f"{chance.choice(WORDS)} {n % 17}", "completion": chance.choice(WORDS), "n": n} for n in range(count)
    ]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    """The rows in the kind that the name says, with a bad and an empty one among them."""
    bad = [*lines[:3], {"prompt": "", "completion": "x", "n": 0}, *lines[3:]]
    if path.suffix == ".jsonl":
        text = [json.dumps(line, ensure_ascii=False) for line in bad]
        path.write_bytes(("\r\n".join([*text[:5], "{not json", "", *text[5:]])).encode())
    elif path.suffix == ".json":
        path.write_text(json.dumps(bad))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(bad), path)
    elif path.suffix == ".txt":
        path.write_text("\r".join(line["prompt"] + " " + line["completion"] for line in bad), newline="")
    else:
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["prompt", "completion", "n"])
            writer.writeheader()
            writer.writerows(bad)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "txt"])
def test_many_rows_are_what_few_are(kind: str, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / f"rows.{kind}", rows(60))
    few_table, few = read(path), load(path)
    monkeypatch.setattr(held, "MOST", 7)
    table, many = read(path), load(path)
    assert isinstance(few.examples, list) and isinstance(many.examples, Held) and len(many.examples) > 7
    assert list(table.rows) == list(few_table.rows) and table.problems == few_table.problems
    assert list(many.examples) == few.examples and many.examples[5:9] == few.examples[5:9]
    for name in ("format", "columns", "problems", "counts", "total", "skipped", "fixed", "duplicates"):
        assert getattr(many, name) == getattr(few, name), name
    if kind != "txt":
        assert many.skipped >= 1
    for share in (0, 0.1, 0.5):
        parts = split(many.examples, share, 4)
        assert [list(part) for part in parts] == [list(part) for part in split(few.examples, share, 4)]
    assert isinstance(parts[0], Chosen) and parts[0].raws() is not None
    # Nothing with a name is left behind.
    assert [*(home / "cache").iterdir()] == []
    with pytest.raises(ValueError, match="no more can be added"):
        many.examples.append({})


@pytest.mark.parametrize("questions", [1, 2, 5, 400])
def test_the_split_is_the_one_by_questions(questions: int) -> None:
    """Against the rule written out over a dictionary of questions."""
    chance = random.Random(questions)
    for seed in range(12):
        share, count = chance.choice([0.05, 0.1, 0.3, 0.5]), chance.randint(1, 300)
        examples = [{"prompt": f" Q{chance.randrange(questions)}", "completion": str(n)} for n in range(count)]
        groups: dict[str, list[int]] = {}
        for number, example in enumerate(examples):
            groups.setdefault(_question(example), []).append(number)
        order = sorted(groups, key=lambda question: hashlib.sha256(f"{seed}\0{question}".encode()).digest())
        wanted, kept = max(1, round(share * count)), set[int]()
        for question in order:
            if len(kept) + len(groups[question]) <= wanted:
                kept.update(groups[question])
        if not kept:
            kept.update(groups[min(order, key=lambda question: len(groups[question]))])
        expected = kept if len(groups) > 1 else set()
        train, evaluation = split(examples, share, seed)
        assert evaluation == [example for number, example in enumerate(examples) if number in expected]
        assert train == [example for number, example in enumerate(examples) if number not in expected]


def test_a_disk_without_room_is_told(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl", rows(20))
    monkeypatch.setattr(held, "MOST", 7)
    (home / "cache").write_text("a file where the folder should be")
    with pytest.raises(FileError, match="through a temporary file"):
        load(path)


def test_repeats_name_the_first_of_each_key() -> None:
    keys = [5, -1, 5, 7, 5, -1, 9, 7]
    assert list(repeats(array("q", keys))) == [(2, 0), (4, 0), (5, 1), (7, 3)]
    assert list(repeats(array("q", [3, 1, 2]))) == [] and list(repeats(array("q"))) == []


def test_a_run_on_many_rows_is_the_run_on_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl", rows(40))
    spec = JobSpec.from_dict(
        {
            "model": "tiny-llama",
            "data": {"path": str(path), "eval_split": 0.2},
            "adapter": {"method": "lora", "r": 2},
            "training": {"max_steps": 3, "batch_size": 4, "precision": "fp32", "max_length": 64},
        }
    )
    never = type("Never", (), {"poll": lambda self: None})()
    curves = []
    for name in ("few", "many"):
        recorder = Recorder()
        assert run(spec, tmp_path / name, recorder, never, False) == "done"
        curves.append([event["loss"] for kind in ("step", "eval") for event in recorder.of(kind)])
        start = recorder.of("start")[0]
        curves[-1] += [start["train_rows"], start["eval_rows"]]
        # The second time from files: the rows', and the tokens' too.
        monkeypatch.setattr(held, "MOST", 7)
        monkeypatch.setattr("engine.tasks.tokenising.IN_MEMORY", 0)
    assert curves[0] == curves[1] and len(curves[0]) == 7
