"""What is decided about problem rows: each remedy, what it leaves, and that no row is lost without a word."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine import data
from engine.data import FixError, NothingLeftError, leaks, load, split, version
from engine.errors import ConfigError
from engine.train.job import DataSpec, JobSpec


def rows(tmp_path: Path, lines: list[dict[str, Any]]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    return path


def pair(question: str | None, answer: str | None) -> dict[str, Any]:
    return {"prompt": question, "completion": answer}


def whole(prepared: data.Prepared, total: int) -> None:
    """Never a silent drop."""
    assert prepared.kept + prepared.skipped == prepared.total == total
    assert prepared.skipped == sum(
        count
        for code, count in prepared.counts.items()
        if {p.severity for p in prepared.problems if p.code == code} == {"skip"}
    )


REPEATED = [pair("a", "1"), pair("b", "2"), pair("a", "1"), pair("a", "3"), pair("a", "3"), pair("c", "4")]


def test_repeats_and_other_answers_are_counted_and_kept(tmp_path: Path) -> None:
    prepared = load(rows(tmp_path, REPEATED))
    assert dict(prepared.counts) == {"duplicate": 2, "other-answer": 1}
    assert [(p.line, p.code) for p in prepared.problems] == [(3, "duplicate"), (4, "other-answer"), (5, "duplicate")]
    assert prepared.duplicates == 2
    whole(prepared, 6)


@pytest.mark.parametrize(
    ("fixes", "lines"),
    [
        ({"duplicate": "skip"}, [1, 2, 4, 6]),
        ({"other-answer": "skip"}, [1, 2, 3, 6]),
        ({"other-answer": "skip-all"}, [2, 6]),
        ({"duplicate": "skip", "other-answer": "skip"}, [1, 2, 6]),
        ({"duplicate": "skip", "other-answer": "skip-all"}, [2, 6]),
    ],
)
def test_repeats_and_other_answers_are_left_out_as_decided(
    tmp_path: Path, fixes: dict[str, str], lines: list[int]
) -> None:
    prepared = load(rows(tmp_path, REPEATED), fixes=fixes)
    assert [example["line"] for example in prepared.examples] == lines
    assert sum(prepared.counts.values()) >= 6 - len(lines)
    assert prepared.kept + prepared.skipped == prepared.total == 6


def test_of_many_rows_in_a_file_the_same_are_left_out(tmp_path: Path) -> None:
    lines = [pair(f"q{n % 25_000}", f"a{n % 25_000}") for n in range(30_000)]
    prepared = load(rows(tmp_path, lines), fixes={"duplicate": "skip"})
    assert (prepared.kept, prepared.skipped, prepared.total) == (25_000, 5_000, 30_000)
    assert prepared.examples[24_999]["prompt"] == "q24999" and len(prepared.problems) == 1_000
    train, held = split(prepared.examples, 0.1)
    assert len(train) + len(held) == 25_000 and not leaks(train, held)


def test_empty_cells_are_filled_and_only_they(tmp_path: Path) -> None:
    lines = [pair("a", "1"), pair("b", ""), pair(None, None), pair("c", "  ")]
    path = rows(tmp_path, lines)
    assert load(path).kept == 1
    prepared = load(path, fixes={"empty-field": "fill:no answer", "null-field": "fill:nothing"})
    assert [(one["prompt"], one["completion"]) for one in prepared.examples] == [
        ("a", "1"), ("b", "no answer"), ("nothing", "nothing"), ("c", "no answer"),
    ]  # fmt: skip
    assert dict(prepared.counts) == {"empty-field": 2, "null-field": 2} and prepared.fixed == 4
    whole(prepared, 4)
    half = load(path, fixes={"empty-field": "fill:no answer"})
    assert (half.kept, half.skipped) == (3, 1)


def test_a_conversation_is_not_written_over_where_one_of_its_turns_is_empty(tmp_path: Path) -> None:
    lines = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]} for text in ("", "x")
    ]
    prepared = load(rows(tmp_path, lines), fixes={"empty-field": "fill:words"})
    assert prepared.kept == 1 and prepared.examples[0]["messages"][1]["content"] == "x"


def test_spaces_are_told_trimmed_or_left_out(tmp_path: Path) -> None:
    path = rows(tmp_path, [pair("a", "1 "), pair("b", "2"), pair(" c\n", "3")])
    assert dict(load(path).counts) == {"outer-spaces": 2} and load(path).examples[0]["completion"] == "1 "
    trimmed = load(path, fixes={"outer-spaces": "trim"})
    assert [(one["prompt"], one["completion"]) for one in trimmed.examples] == [("a", "1"), ("b", "2"), ("c", "3")]
    left = load(path, fixes={"outer-spaces": "skip"})
    assert (left.kept, left.skipped, left.total) == (1, 2, 3)


def test_ragged_rows_are_cut_or_filled_to_the_header(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\na,1\nb,2,3\nc\nd,4\ne,5\nf,6\n", encoding="utf-8")
    assert (load(path).kept, load(path).skipped) == (4, 2)
    level = load(path, fixes={"ragged": "trim"})
    assert [one["line"] for one in level.examples] == [2, 3, 5, 6, 7] and level.examples[1]["completion"] == "2"
    assert dict(level.counts) == {"ragged": 2, "empty-field": 1} and level.kept + level.skipped == level.total == 6
    both = load(path, fixes={"ragged": "trim", "empty-field": "fill:-"})
    assert both.kept == both.total == 6


def test_classes_of_one_row_are_left_out_and_spellings_joined(tmp_path: Path) -> None:
    labels = ["spam", "spam", "Spam", "ham", "ham", "odd"]
    path = rows(tmp_path, [{"text": f"t{n}", "label": label} for n, label in enumerate(labels)])
    assert load(path).counts["similar-labels"] == 1 and load(path).counts["rare-label"] == 2
    joined = load(path, fixes={"similar-labels": "join"})
    assert [one["labels"] for one in joined.examples][:3] == [["spam"]] * 3
    assert joined.counts["similar-labels"] == 1 and joined.counts["rare-label"] == 1
    rare = load(path, fixes={"similar-labels": "join", "rare-label": "skip"})
    assert (rare.kept, rare.skipped, rare.total) == (5, 1, 6)


def test_turns_that_were_mended_can_be_left_out(tmp_path: Path) -> None:
    ask, say = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
    path = rows(tmp_path, [{"messages": turns} for turns in ([ask, say], [ask, say, ask], [ask, ask, say])])
    assert load(path).kept == 3
    prepared = load(path, fixes={"cut-ending": "skip", "joined-turns": "skip"})
    assert [one["line"] for one in prepared.examples] == [1]
    whole(prepared, 3)


def png(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(out, "PNG")
    return out.getvalue()


def test_equal_pictures_are_known_by_their_content(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, colour, words in (
            ("a", "red", "one"),
            ("b", "red", "one"),
            ("c", "red", "two"),
            ("d", "blue", "one"),
        ):
            archive.writestr(f"{name}.png", png(colour))
            archive.writestr(f"{name}.txt", words)
        archive.writestr("e.png", png("green"))
    prepared = load(path)
    assert dict(prepared.counts) == {"duplicate": 1, "other-answer": 1, "no-caption": 1}
    assert set(prepared.examples[0]) == {"image", "text", "line"}
    fixed = load(path, fixes={"duplicate": "skip", "other-answer": "skip", "no-caption": "fill:a thing"})
    assert [one["text"] for one in fixed.examples] == ["one", "one", "a thing"]
    assert fixed.kept + fixed.skipped == fixed.total == 5


def test_a_pair_that_is_also_there_the_other_way_round(tmp_path: Path) -> None:
    both = [{"prompt": "q", "chosen": a, "rejected": b} for a, b in (("x", "y"), ("y", "x"), ("x", "z"))]
    prepared = load(rows(tmp_path, both))
    assert [(p.line, p.code) for p in prepared.problems] == [(2, "other-answer")]


@pytest.mark.parametrize(
    "fixes",
    [{"orphan": "skip"}, {"duplicate": "fill:x"}, {"empty-field": "fill:"}, {"empty-field": "fill"}, {"x": "skip"},
     {"duplicate": "skip:x"}],
)  # fmt: skip
def test_a_fix_that_does_not_exist_is_refused(tmp_path: Path, fixes: dict[str, str]) -> None:
    with pytest.raises(FixError):
        load(rows(tmp_path, REPEATED), fixes=fixes)
    with pytest.raises(ConfigError, match=r"data\.fixes"):
        JobSpec(model="tiny-llama", data=DataSpec("rows.jsonl", fixes=fixes))


def test_a_job_carries_its_fixes_and_a_version_is_named_by_them() -> None:
    fixes = {"duplicate": "skip", "empty-field": "fill:x"}
    spec = JobSpec.from_dict({"model": "tiny-llama", "data": {"path": "a", "fixes": fixes}})
    assert JobSpec.from_dict(spec.to_dict()) == spec and spec.data.fixes == fixes
    names = {version("0" * 16, one) for one in (fixes, {"duplicate": "skip"}, {"empty-field": "fill:y"})}
    assert len(names) == 3 and all(len(name) == 16 for name in names)
    assert version("0" * 16, {}) == "0" * 16 and version("0" * 16, dict(reversed(fixes.items()))) in names


def test_a_fix_that_leaves_nothing_is_said(tmp_path: Path) -> None:
    with pytest.raises(NothingLeftError, match="ask the same"):
        load(rows(tmp_path, [pair("a", "1"), pair("a", "2")]), fixes={"other-answer": "skip-all"})


def test_leaks_are_seen_whatever_parted_the_rows() -> None:
    def row(line: int, question: str, answer: str) -> dict[str, Any]:
        return {"prompt": question, "completion": answer, "line": line}

    long = "an answer of more than twenty characters"
    train = [row(1, "Same", "One"), row(2, "other", long)]
    held = [row(3, "same ", "one"), row(4, "same", "two"), row(5, "new", long.upper()), row(6, "free", "no")]
    found = leaks(train, held)
    assert (found.rows, found.questions, found.answers, found.lines) == (1, 2, 1, (3, 4, 5))
    assert not leaks(train, held[3:]) and leaks(train, held)
    labels = [{"text": f"t{n}", "labels": ["a"], "line": n} for n in range(4)]
    assert not leaks(labels[:2], labels[2:])
