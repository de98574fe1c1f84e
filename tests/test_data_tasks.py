"""Parallel text, labels and preferences: recognised, checked, and given only to a task that takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.data import ClassesError, NotTakenError, Table, prepare, profile, read, recognise, split
from engine.errors import DataError
from engine.train.events import Recorder
from engine.train.job import JobSpec
from engine.train.worker import run
from studio import data_words, datasets

CHAT_FORMATS = ("messages", "alpaca", "sharegpt", "oasst", "prompt_completion", "text")


def table(tmp_path: Path, rows: Sequence[Any]) -> Table:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return read(path)


def said(*texts: str) -> list[dict[str, str]]:
    """Turns, the user first."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


SYSTEM = {"role": "system", "content": "s"}
ANSWER = [{"role": "assistant", "content": "c"}]

# --- preferences ---------------------------------------------------------------------------------------------------

PAIRS: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "texts": ({"prompt": "q", "chosen": "c", "rejected": "r"}, said("q")),
    "turns before": ({"prompt": [SYSTEM, *said("q")], "chosen": "c", "rejected": "r"}, [SYSTEM, *said("q")]),
    "turns as text": ({"prompt": json.dumps(said("q")), "chosen": "c", "rejected": "r"}, said("q")),
    "answers as turns": ({"prompt": "q", "chosen": ANSWER, "rejected": said("", "r")[1:]}, said("q")),
    "conversations": ({"chosen": said("a", "b", "q", "c"), "rejected": said("a", "b", "q", "r")}, said("a", "b", "q")),
    "conversations with their question": (
        {"prompt": "q", "chosen": [SYSTEM, *said("q", "c")], "rejected": [SYSTEM, *said("q", "r")]},
        [SYSTEM, *said("q")],
    ),
    "a system turn in the prompt alone": (
        {"prompt": [SYSTEM, *said("q")], "chosen": said("q", "c"), "rejected": said("q", "r")},
        [SYSTEM, *said("q")],
    ),
    "dialogues as text": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: q\n\nAssistant: c",
         "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: q\n\nAssistant: r"},
        said("a", "b", "q"),
    ),
    "a dialogue to go on with": (
        {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: q\n\nAssistant:", "chosen": "c", "rejected": "r"},
        said("a", "b", "q"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("row,prompt", PAIRS.values(), ids=PAIRS.keys())
def test_preference_rows_have_one_form(tmp_path: Path, row: dict[str, Any], prompt: list[dict[str, str]]) -> None:
    prepared = prepare(table(tmp_path, [row]))
    assert prepared.format == "preferences"
    assert prepared.examples == [{"prompt": prompt, "chosen": "c", "rejected": "r", "line": 1}]


BAD_PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "the same": ({"prompt": "q", "chosen": "c", "rejected": " c\n"}, "same-answers"),
    "the same, as turns": ({"prompt": "q", "chosen": said("q", "c"), "rejected": said("q", "c")}, "same-answers"),
    "no worse one": ({"prompt": "q", "chosen": "c", "rejected": None}, "null-field"),
    "an empty one": ({"prompt": "q", "chosen": " ", "rejected": "r"}, "empty-field"),
    "an empty turn": ({"prompt": "q", "chosen": said("q", ""), "rejected": said("q", "r")}, "empty-field"),
    "no prompt": ({"prompt": None, "chosen": "c", "rejected": "r"}, "no-prompt"),
    "an empty prompt": ({"prompt": "", "chosen": "c", "rejected": "r"}, "no-prompt"),
    "no question": ({"prompt": said("q", "a"), "chosen": "c", "rejected": "r"}, "no-question"),
    "only a system turn": ({"prompt": [SYSTEM], "chosen": "c", "rejected": "r"}, "no-question"),
    "a system turn and an answer": (
        {"prompt": "q", "chosen": [SYSTEM, *ANSWER], "rejected": [SYSTEM, *said("", "r")[1:]]},
        "prompt-differs",
    ),
    "parted early": ({"prompt": "q", "chosen": said("q", "x", "y", "c"), "rejected": said("q", "z", "y", "r")},
                     "no-shared-start"),
    "another question": ({"prompt": "other", "chosen": said("q", "c"), "rejected": said("q", "r")}, "prompt-differs"),
    "no answer": ({"prompt": "q", "chosen": said("q", "c", "d"), "rejected": said("q", "c", "e")}, "no-assistant"),
    "no turns": ({"prompt": "q", "chosen": [], "rejected": "r"}, "empty-conversation"),
    "a number of a kind": ({"prompt": "q", "chosen": {"a": 1}, "rejected": "r"}, "not-text"),
    "an empty turn of a dialogue": ({"prompt": "q", "chosen": "Human: \n\nAssistant: x", "rejected": "r"},
                                    "empty-field"),
}  # fmt: skip


@pytest.mark.parametrize("row,code", BAD_PAIRS.values(), ids=BAD_PAIRS.keys())
def test_bad_pairs_are_skipped_and_listed(tmp_path: Path, row: dict[str, Any], code: str) -> None:
    good = {"prompt": "q", "chosen": "c", "rejected": "r"}
    prepared = prepare(table(tmp_path, [good, row, {**good, "prompt": "p"}]))
    assert [example["line"] for example in prepared.examples] == [1, 3]
    (problem,) = [problem for problem in prepared.problems if problem.severity == "skip"]
    assert (problem.line, problem.code) == (2, code)
    assert prepared.kept + prepared.skipped == prepared.total == 3


def test_equal_answers_everywhere_are_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="answer are the same"):
        prepare(table(tmp_path, [{"prompt": "q", "chosen": "c", "rejected": "c"}] * 3))


def test_pairs_with_one_prompt_stay_on_one_side() -> None:
    rows = [{"prompt": said(f"q {n // 3}"), "chosen": "c", "rejected": "r", "line": n} for n in range(30)]
    train, held = split(rows, 0.3)
    assert held and not {row["prompt"][0]["content"] for row in train} & {row["prompt"][0]["content"] for row in held}
    assert len(train) + len(held) == 30


# --- labels --------------------------------------------------------------------------------------------------------


def labelled(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {n}", "label": label} for n, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["spam", "ham"], [["spam"], ["ham"]]),
        ([0, 1], [["0"], ["1"]]),
        (["0", 1, 1.0, "1.0"], [["0"], ["1"], ["1"], ["1"]]),
        ([True, False], [["true"], ["false"]]),
        ([" spam ", "ham"], [["spam"], ["ham"]]),
        ([["a", "b"], [], ["b"]], [["a", "b"], [], ["b"]]),
        ([[0, 1], [1]], [["0", "1"], ["1"]]),
        (['["a", "b"]', "[]"], [["a", "b"], []]),
        ([["a", "a"], ["b"]], [["a"], ["b"]]),
        (["[draft]", "b"], [["[draft]"], ["b"]]),
    ],
)
def test_labels_are_lists_of_names(tmp_path: Path, labels: list[Any], expected: list[list[str]]) -> None:
    prepared = prepare(table(tmp_path, labelled(*labels)), "labels")
    assert [example["labels"] for example in prepared.examples] == expected
    changed = [p for p in prepared.problems if p.severity == "fix"]
    assert bool(changed) == (labels in (["0", 1, 1.0, "1.0"], [" spam ", "ham"], [["a", "a"], ["b"]]))


def test_labels_that_are_numbers_are_said_to_be_names(tmp_path: Path) -> None:
    path = tmp_path / "stars.csv"
    path.write_text("text,label\nbad,1\ngood,5\nfine,5\n", encoding="utf-8")
    prepared = prepare(read(path))
    assert prepared.format == "labels" and [e["labels"] for e in prepared.examples] == [["1"], ["5"], ["5"]]
    assert "names of 2 classes" in next(p.message for p in prepared.problems if p.code == "number-labels")
    assert profile(prepared)["labels"] == {"5": 2, "1": 1}


def test_doubtful_labels_are_noted(tmp_path: Path) -> None:
    prepared = prepare(table(tmp_path, labelled("Spam", "spam", "spam", "ham", "ham")))
    assert {(p.code, p.line) for p in prepared.problems} == {("similar-labels", 2), ("rare-label", 1)}


@pytest.mark.parametrize("bad,code", [(None, "null-field"), (" ", "empty-field"), ({"a": 1}, "not-a-label"),
                                      ([["a"]], "not-a-label"), ([None], "null-field"),
                                      (float("nan"), "null-field")])  # fmt: skip
def test_bad_labels_are_skipped_and_listed(tmp_path: Path, bad: Any, code: str) -> None:
    prepared = prepare(table(tmp_path, labelled("a", bad, "b")), "labels")
    (problem,) = [problem for problem in prepared.problems if problem.severity == "skip"]
    assert (problem.line, problem.code, prepared.kept, prepared.total) == (2, code, 2, 3)


@pytest.mark.parametrize("labels", [["a"] * 5, [["a", "b"], ["b", "a"]], [[], []], [f"class {n}" for n in range(30)]])
def test_labels_that_are_no_classes(tmp_path: Path, labels: list[Any]) -> None:
    with pytest.raises(ClassesError, match="column 'label'") as caught:
        prepare(table(tmp_path, labelled(*labels)), "labels")
    assert caught.value.code == "data-classes" and caught.value.hint


def test_a_column_of_long_or_single_texts_is_no_label(tmp_path: Path) -> None:
    assert recognise(table(tmp_path, labelled(*(f"title {n}" for n in range(30))))).name == "text"
    assert recognise(table(tmp_path, labelled(*["a long story " * 20] * 3))).name == "text"


# --- parallel ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target,code", [("", "empty-field"), (None, "null-field"), (["x"], "not-text")])
def test_an_empty_target_is_skipped_and_listed(tmp_path: Path, target: Any, code: str) -> None:
    prepared = prepare(table(tmp_path, [{"source": "a", "target": "b"}, {"source": "c", "target": target}]))
    assert prepared.kept == 1 and [(p.line, p.code, p.column) for p in prepared.problems] == [(2, code, "target")]


def test_sources_stay_on_one_side() -> None:
    rows = [{"source": f"s {n % 5}", "target": str(n), "line": n} for n in range(20)]
    train, held = split(rows, 0.25)
    assert held and not {row["source"] for row in train} & {row["source"] for row in held}


# --- what a task takes ---------------------------------------------------------------------------------------------

AMBIGUOUS: list[tuple[dict[str, Any], str, tuple[str, ...], str]] = [
    ({"source": "s", "target": "t"}, "parallel", CHAT_FORMATS, "prompt_completion"),
    ({"text": "t", "label": "x"}, "labels", CHAT_FORMATS, "text"),
    ({"question": "q", "answer": "a"}, "prompt_completion", ("parallel",), "parallel"),
    ({"text": "t", "category": "x"}, "text", ("labels",), "labels"),
    ({"text": "t", "summary": "x"}, "text", ("parallel",), "parallel"),
]


@pytest.mark.parametrize("row,alone,formats,taken", AMBIGUOUS)
def test_a_table_is_read_as_the_task_takes_it(
    tmp_path: Path, row: dict[str, Any], alone: str, formats: tuple[str, ...], taken: str
) -> None:
    rows = table(tmp_path, [row, {name: f"{value} 2" for name, value in row.items()}])
    assert recognise(rows).name == alone
    assert prepare(rows, formats=formats).format == taken
    assert alone in {other.name for other in recognise(rows, formats).suggestions}


def test_a_table_for_another_task_is_refused(tmp_path: Path) -> None:
    pairs = table(tmp_path, [{"prompt": "q", "chosen": "c", "rejected": "r"}])
    with pytest.raises(NotTakenError, match="has the format preferences") as caught:
        prepare(pairs, formats=CHAT_FORMATS)
    assert caught.value.code == "data-format" and caught.value.found == "preferences"
    # By a person's word, the better answers alone.
    chosen = prepare(pairs, "prompt_completion", {"prompt": "prompt", "completion": "chosen"}, CHAT_FORMATS)
    assert chosen.examples == [{"prompt": "q", "completion": "c", "line": 1}]
    assert recognise(pairs).suggestions[0].columns == {"prompt": "prompt", "completion": "chosen"}
    with pytest.raises(NotTakenError, match="Asked for as text"):
        prepare(pairs, "text", {"text": "chosen"}, formats=("preferences",))


class Never:
    def poll(self) -> str | None:
        return None


def test_a_job_with_data_of_another_task_is_refused_before_the_model(tmp_path: Path) -> None:
    table(tmp_path, [{"messages": said("q", "a")}] * 3)
    path = str(tmp_path / "rows.jsonl")
    recorder = Recorder()
    job = {"model": "no/such-model", "data": {"path": path, "format": "labels", "columns": {"text": "messages"}}}
    with pytest.raises(NotTakenError, match="The task causal_lm"):
        run(JobSpec.from_dict(job), tmp_path / "run", recorder, Never())
    assert not [event for event in recorder.of("status") if event["phase"] == "loading"]


# --- what the page shows -------------------------------------------------------------------------------------------


def test_the_page_shows_each_format(tmp_path: Path) -> None:
    rows: list[tuple[list[Any], str, tuple[str, ...]]] = [
        ([{"prompt": "ask", "chosen": "yes", "rejected": "no"}], "ask", ("ask", "better: yes", "worse: no")),
        ([{"source": "one", "target": "eins"}], "one", ("one", "eins")),
        ([{"text": "buy", "label": "spam"}, {"text": "hi", "label": "ham"}], "buy", ("buy", "spam")),
    ]
    for given, first, shown in rows:
        prepared = prepare(table(tmp_path, given))
        page = data_words.preview(prepared)
        assert all(word in page for word in shown)
        assert datasets.first_prompt({"profile": profile(prepared)}) == first
        assert profile(prepared)["characters"]["total"] > 0
