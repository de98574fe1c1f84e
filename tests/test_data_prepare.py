"""Recognising, mapping, checking, splitting: every format, every kind of problem row, nothing dropped silently."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from engine.data import FORMATS, Table, load, prepare, profile, read, recognise, split
from engine.data.formats import OF_PICTURES
from engine.errors import ConfigError, DataError


def table(tmp_path: Path, rows: list[Any]) -> Table:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return read(path)


def csv(tmp_path: Path, text: str) -> Table:
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8")
    return read(path)


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = [USER, ANSWER]
SHARED = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]

# --- recognise -----------------------------------------------------------------------------------------------------

RECOGNISED: dict[str, tuple[dict[str, Any], str, dict[str, str], float]] = {
    "messages": ({"messages": CHAT}, "messages", {"messages": "messages"}, 1.0),
    "messages as text": ({"messages": json.dumps(CHAT)}, "messages", {"messages": "messages"}, 1.0),
    "messages elsewhere": ({"id": 1, "Chat": CHAT}, "messages", {"messages": "Chat"}, 0.9),
    "sharegpt": ({"conversations": SHARED}, "sharegpt", {"conversations": "conversations"}, 1.0),
    "sharegpt in messages": ({"messages": SHARED}, "sharegpt", {"conversations": "messages"}, 0.9),
    "role in conversations": ({"conversations": CHAT}, "messages", {"messages": "conversations"}, 0.9),
    "alpaca": ({"instruction": "i", "input": "", "output": "o"}, "alpaca",
               {"instruction": "instruction", "output": "output", "input": "input"}, 1.0),
    "alpaca without input": ({"Instruction": "i", "OUTPUT": "o", "text": "t"}, "alpaca",
                             {"instruction": "Instruction", "output": "OUTPUT"}, 1.0),
    "dolly": ({"instruction": "i", "context": "c", "response": "r", "category": "x"}, "alpaca",
              {"instruction": "instruction", "output": "response", "input": "context"}, 0.8),
    "pairs": ({"prompt": "p", "completion": "c"}, "prompt_completion",
              {"prompt": "prompt", "completion": "completion"}, 1.0),
    "pairs with spaces": ({" Prompt": "p", "COMPLETION ": "c"}, "prompt_completion",
                          {"prompt": "Prompt", "completion": "COMPLETION"}, 1.0),
    "question": ({"Question": "p", "Answer": "c"}, "prompt_completion",
                 {"prompt": "Question", "completion": "Answer"}, 0.8),
    "query": ({"query": "p", "response": "c"}, "prompt_completion", {"prompt": "query", "completion": "response"}, 0.8),
    "in and out": ({"input": "p", "output": "c"}, "prompt_completion",
                   {"prompt": "input", "completion": "output"}, 0.8),
    "korean": ({"질문": "p", "답변": "c"}, "prompt_completion", {"prompt": "질문", "completion": "답변"}, 0.8),
    "own name first": ({"question": "x", "prompt": "p", "completion": "c"}, "prompt_completion",
                       {"prompt": "prompt", "completion": "completion"}, 1.0),
    "context": ({"question": "q", "context": "c", "answer": "a"}, "alpaca",
                {"instruction": "question", "output": "answer", "input": "context"}, 0.8),
    "text": ({"text": "t", "title": "x"}, "text", {"text": "text"}, 1.0),
    "labels": ({"text": "t", "label": 1}, "labels", {"text": "text", "label": "label"}, 1.0),
    "labels by other names": ({"Sentence": "t", "Sentiment": "good"}, "labels",
                              {"text": "Sentence", "label": "Sentiment"}, 0.8),
    "parallel": ({"source": "s", "target": "t"}, "parallel", {"source": "source", "target": "target"}, 1.0),
    "a summary": ({"document": "s", "summary": "t"}, "parallel", {"source": "document", "target": "summary"}, 0.8),
    "preferences": ({"prompt": "p", "chosen": "c", "rejected": "r"}, "preferences",
                    {"chosen": "chosen", "rejected": "rejected", "prompt": "prompt"}, 1.0),
    "preferences as turns": ({"chosen": CHAT, "rejected": CHAT}, "preferences",
                             {"chosen": "chosen", "rejected": "rejected"}, 1.0),
    "content": ({"id": 1, "Content": "t"}, "text", {"text": "Content"}, 0.8),
    "only column": ({"verse": "t"}, "text", {"text": "verse"}, 0.5),
    "oasst": ({"message_id": "1", "parent_id": None, "text": "t", "role": "prompter", "rank": None}, "oasst",
              {name: name for name in ("message_id", "parent_id", "text", "role", "rank")}, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("row,name,columns,confidence", RECOGNISED.values(), ids=RECOGNISED.keys())
def test_recognised(tmp_path: Path, row: dict[str, Any], name: str, columns: dict[str, str], confidence: float) -> None:
    found = recognise(table(tmp_path, [row] * 3))
    assert (found.name, dict(found.columns), found.confidence) == (name, columns, confidence)
    assert all(repr(column) in found.reason for column in columns.values())
    assert set(columns) <= set(FORMATS[name].roles)
    json.dumps(found.to_dict())


def test_every_format_is_recognised_in_the_table_above() -> None:
    assert {name for _, name, _, _ in RECOGNISED.values()} == set(FORMATS) - set(OF_PICTURES)


def test_unknown_columns_give_suggestions(tmp_path: Path) -> None:
    found = recognise(table(tmp_path, [{"n": 1, "left": "a short one", "right": "a longer text than that"}] * 3))
    assert found.name is None and found.confidence == 0
    assert [(one.name, dict(one.columns)) for one in found.suggestions] == [
        ("prompt_completion", {"prompt": "left", "completion": "right"}),
        ("text", {"text": "right"}),
    ]
    assert "left" in found.reason and "prompt" in found.reason
    with pytest.raises(DataError) as caught:
        prepare(table(tmp_path, [{"n": 1, "left": "a", "right": "b"}]))
    assert caught.value.code == "data-format" and "prompt = left" in caught.value.hint


def test_header_that_is_data_still_gets_a_suggestion(tmp_path: Path) -> None:
    rows = csv(tmp_path, "How are you?,I am fine.\nWho are you?,Only me.\n")
    found = recognise(rows)
    assert found.name is None
    assert dict(found.suggestions[0].columns) == {"prompt": "column 1", "completion": "column 2"}
    assert prepare(rows, columns=found.suggestions[0].columns).kept == 2


# --- prepare: what a good row becomes ------------------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "s"}
CANONICAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "messages": ({"messages": [SYSTEM, *CHAT, *CHAT]}, {"messages": [SYSTEM, *CHAT, *CHAT]}),
    "messages as text": ({"messages": json.dumps(CHAT)}, {"messages": CHAT}),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]}, {"messages": CHAT}),
    "other speakers": ({"messages": [{"role": "Prompter", "text": "q"}, {"role": "bot", "content": "a"}]},
                       {"messages": CHAT}),
    "sharegpt": ({"conversations": SHARED}, {"messages": [SYSTEM, *CHAT]}),
    "alpaca": ({"instruction": "i", "input": "x", "output": 7},
               {"messages": [{"role": "user", "content": "i\n\nx"}, {"role": "assistant", "content": "7"}]}),
    "alpaca, null input": ({"instruction": "q", "input": None, "output": "a", "system": "s"},
                           {"messages": [SYSTEM, *CHAT]}),
    "pairs": ({"prompt": 3.5, "completion": True}, {"prompt": "3.5", "completion": "true"}),
    "text": ({"text": " 안녕 😀\n"}, {"text": " 안녕 😀\n"}),
    "parallel": ({"source": "안녕", "target": "hello"}, {"source": "안녕", "target": "hello"}),
}  # fmt: skip


@pytest.mark.parametrize("row,example", CANONICAL.values(), ids=CANONICAL.keys())
def test_canonical_form(tmp_path: Path, row: dict[str, Any], example: dict[str, Any]) -> None:
    prepared = prepare(table(tmp_path, [row]))
    assert prepared.examples == [{**example, "line": 1}]
    assert (prepared.kept, prepared.skipped, prepared.total, prepared.problems) == (1, 0, 1, [])


# --- prepare: problem rows -----------------------------------------------------------------------------------------


def chat(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


SKIPPED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "null field": ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}, "null-field", "completion"),
    "missing field": ({"prompt": "a", "completion": "b"}, {"prompt": "a"}, "null-field", "completion"),
    "empty field": ({"prompt": "a", "completion": "b"}, {"prompt": " \n", "completion": "b"}, "empty-field", "prompt"),
    "list for text": ({"text": "a"}, {"text": ["a"]}, "not-text", "text"),
    "null instruction": (
        {"instruction": "a", "output": "b"},
        {"instruction": None, "output": "b"},
        "null-field",
        "instruction",
    ),
    "null list": (chat(*CHAT), {"messages": None}, "null-field", "messages"),
    "no list": (chat(*CHAT), {"messages": "hello"}, "not-turns", "messages"),
    "broken text": (chat(*CHAT), {"messages": "[{]"}, "not-turns", "messages"),
    "turn is text": (chat(*CHAT), chat("hello"), "not-turns", "messages"),
    "empty list": (chat(*CHAT), chat(), "empty-conversation", "messages"),
    "unknown role": (chat(*CHAT), chat(USER, {"role": "tool", "content": "x"}, ANSWER), "unknown-role", "messages"),
    "no role": (chat(*CHAT), chat({"content": "q"}, ANSWER), "unknown-role", "messages"),
    "null turn": (chat(*CHAT), chat(USER, {"role": "assistant", "content": None}), "null-field", "messages"),
    "empty turn": (chat(*CHAT), chat({"role": "user", "content": ""}, ANSWER), "empty-field", "messages"),
    "picture part": (
        chat(*CHAT),
        chat({"role": "user", "content": [{"type": "image"}]}, ANSWER),
        "not-text",
        "messages",
    ),
    "no assistant": (chat(*CHAT), chat(SYSTEM, USER), "no-assistant", "messages"),
    "assistant first": (chat(*CHAT), chat(SYSTEM, ANSWER, USER, ANSWER), "assistant-first", "messages"),
    "late system": (chat(*CHAT), chat(USER, SYSTEM, ANSWER), "system-not-first", "messages"),
}


@pytest.mark.parametrize("good,bad,code,column", SKIPPED.values(), ids=SKIPPED.keys())
def test_bad_rows_are_skipped_with_their_line(
    tmp_path: Path, good: dict[str, Any], bad: dict[str, Any], code: str, column: str
) -> None:
    prepared = prepare(table(tmp_path, [good, bad, good, good]))
    assert [example["line"] for example in prepared.examples] == [1, 3, 4]
    (problem,) = [problem for problem in prepared.problems if problem.severity == "skip"]
    assert (problem.line, problem.code, problem.column) == (2, code, column)
    assert prepared.kept + prepared.skipped == prepared.total == 4
    assert prepared.counts == {code: 1, "duplicate": 2} and prepared.duplicates == 2


def test_fixed_turns_are_reported(tmp_path: Path) -> None:
    prepared = prepare(table(tmp_path, [chat(USER, USER, ANSWER), chat(*CHAT, USER)]))
    assert prepared.examples[0]["messages"] == [{"role": "user", "content": "q\n\nq"}, ANSWER]
    assert prepared.examples[1]["messages"] == CHAT
    assert [(problem.line, problem.code, problem.severity) for problem in prepared.problems] == [
        (1, "joined-turns", "fix"),
        (2, "cut-ending", "fix"),
    ]
    assert prepared.fixed == 2


def test_rows_lost_while_reading_count_too(tmp_path: Path) -> None:
    prepared = prepare(csv(tmp_path, 'prompt,completion\n"a\nb",c\nd\n,e\nf,g\n'))
    assert [(problem.line, problem.code) for problem in prepared.problems] == [(4, "ragged"), (5, "empty-field")]
    assert [example["line"] for example in prepared.examples] == [2, 6]
    assert (prepared.kept, prepared.skipped, prepared.total) == (2, 2, 4)


def test_nothing_left_names_the_three_most_common_reasons(tmp_path: Path) -> None:
    rows: list[Any] = [chat()] * 1500 + [chat(USER)] * 3 + [{"messages": None}] * 2 + [chat(ANSWER)]
    with pytest.raises(DataError) as caught:
        prepare(table(tmp_path, rows), "messages")
    assert caught.value.code == "data-nothing-left"
    message = caught.value.message
    assert "1,506 rows" in message and "(first: line 1)" in message and "(first: line 1501)" in message
    assert message.index("1,500 x") < message.index("3 x") < message.index("2 x") and "1 x The" not in message


# --- prepare: columns ----------------------------------------------------------------------------------------------


def test_columns_that_a_person_named(tmp_path: Path) -> None:
    rows = csv(tmp_path, "Frage,Antwort,Notiz\na,b,c\n")
    prepared = prepare(rows, "prompt_completion", {"prompt": "frage", "completion": "Antwort"})
    assert prepared.examples == [{"prompt": "a", "completion": "b", "line": 2}]
    assert prepared.columns == {"prompt": "Frage", "completion": "Antwort"}
    assert prepare(rows, columns={"text": "Notiz"}).examples == [{"text": "c", "line": 2}]
    named = csv(tmp_path, "Frage,output\na,b\n")
    assert prepare(named, columns={"instruction": "Frage"}).examples[0]["messages"][1]["content"] == "b"


def test_a_format_asked_for_finds_its_columns(tmp_path: Path) -> None:
    rows = csv(tmp_path, "question,context,answer\na,b,c\n")
    assert prepare(rows, "prompt_completion").examples == [{"prompt": "a", "completion": "c", "line": 2}]
    assert prepare(rows).examples[0]["messages"][0]["content"] == "a\n\nb"


@pytest.mark.parametrize(
    "format,columns,code,says",
    [
        ("prompt_completion", {"prompt": "promt_text", "completion": "reply"}, "data-column", "'prompt_text'"),
        ("alpaca", None, "data-column", "'instruction'"),
        ("text", {"text": "nothing like it"}, "data-column", "prompt_text, reply"),
        ("text", {"prompt": "reply"}, "data-column", "Its roles: text"),
        (None, {"colour": "reply"}, "data-column", "colour"),
        ("promt_completion", None, "data-format", "'prompt_completion'"),
        (None, None, "data-format", "prompt_text"),
    ],
)
def test_wrong_columns_and_formats(
    tmp_path: Path, format: str | None, columns: dict[str, str] | None, code: str, says: str
) -> None:
    with pytest.raises(DataError) as caught:
        prepare(csv(tmp_path, "prompt_text,reply\na,b\n"), format, columns)
    assert caught.value.code == code and says in str(caught.value)


# --- conversation trees --------------------------------------------------------------------------------------------


def message(name: str, parent: str | None, role: str, rank: int | None = None, **more: Any) -> dict[str, Any]:
    return {"message_id": name, "parent_id": parent, "role": role, "text": name, "rank": rank, **more}


def test_oasst_rows_follow_the_best_rank(tmp_path: Path) -> None:
    rows = [
        message("b", "a", "assistant", 1),
        message("a", None, "prompter"),
        message("c", "a", "assistant", 0),
        message("d", "c", "prompter", None),
        message("e", "c", "prompter", 0),
        message("f", "e", "assistant", 0, deleted=True),
        message("g", "e", "assistant", 2),
        message("lost", "nowhere", "assistant"),
        message("x", "y", "prompter"),
        message("y", "x", "assistant"),
        message("alone", None, "prompter"),
    ]
    prepared = prepare(table(tmp_path, rows))
    assert prepared.format == "oasst"
    (example,) = prepared.examples
    assert [turn["content"] for turn in example["messages"]] == ["a", "c", "e", "g"]
    assert [turn["role"] for turn in example["messages"]] == ["user", "assistant"] * 2
    assert example["line"] == 2
    assert prepared.counts == {"orphan": 3, "no-assistant": 1, "other-branches": 1}
    (note,) = [problem for problem in prepared.problems if problem.code == "other-branches"]
    assert note.message.startswith("3 replies")
    assert prepared.kept + prepared.skipped == prepared.total == 5


def test_oasst_trees_follow_the_best_rank(tmp_path: Path) -> None:
    tree = {"text": "a", "role": "prompter", "replies": [
        {"text": "b", "role": "assistant", "rank": 1, "replies": []},
        {"text": "c", "role": "assistant", "rank": 0, "replies": [{"text": "d", "role": "prompter", "replies": []}]},
    ]}  # fmt: skip
    prepared = prepare(table(tmp_path, [{"message_tree_id": "1", "prompt": tree}]))
    assert [turn["content"] for turn in prepared.examples[0]["messages"]] == ["a", "c"]
    assert prepared.counts == {"cut-ending": 1}


def test_oasst_chain_of_thousands_is_no_recursion(tmp_path: Path) -> None:
    roles = ("prompter", "assistant")
    rows = [message(str(n), str(n - 1) if n else None, roles[n % 2]) for n in range(5000)]
    assert len(prepare(table(tmp_path, rows)).examples[0]["messages"]) == 5000


# --- split ---------------------------------------------------------------------------------------------------------


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {n}", "completion": "a", "line": n} for n in range(count)]


@pytest.mark.parametrize(
    "count,share,held", [(100, 0.1, 10), (100, 0, 0), (2, 0.01, 1), (2, 0.5, 1), (1, 0.5, 0), (7, 0.5, 4)]
)
def test_split_sizes(count: int, share: float, held: int) -> None:
    train, evaluation = split(pairs(count), share, seed=0)
    assert (len(train), len(evaluation)) == (count - held, held)
    for part in (train, evaluation):
        assert [row["line"] for row in part] == sorted(row["line"] for row in part)
    assert sorted(row["line"] for row in train + evaluation) == list(range(count))


def test_split_is_the_same_everywhere() -> None:
    """Written down, so that a change of platform, Python or our code shows."""
    state = random.getstate()
    assert [row["line"] for row in split(pairs(20), 0.2, seed=0)[1]] == [6, 9, 12, 19]
    assert [row["line"] for row in split(pairs(20), 0.2, seed=1)[1]] == [4, 7, 14, 16]
    assert random.getstate() == state


def test_one_question_is_never_on_both_sides() -> None:
    chance = random.Random(3)
    for case in range(200):
        count = chance.randrange(2, 40)
        kinds = chance.randrange(1, count + 1)
        rows: list[dict[str, Any]] = [
            {"prompt": f"Q  {chance.randrange(kinds)}", "completion": str(n), "line": n} for n in range(count)
        ]
        rows += [{"prompt": row["prompt"].lower().replace("  ", " "), "completion": "z", "line": 0} for row in rows[:2]]
        train, evaluation = split(rows, chance.choice([0.05, 0.2, 0.5]), seed=case)
        asked = [{" ".join(row["prompt"].lower().split()) for row in part} for part in (train, evaluation)]
        assert not asked[0] & asked[1]
        assert len(train) + len(evaluation) == len(rows) and train
        assert bool(evaluation) == (len(asked[0] | asked[1]) > 1)


def test_split_compares_conversations_by_their_question() -> None:
    rows = [{"messages": [USER, {"role": "assistant", "content": str(n)}], "line": n} for n in range(5)]
    rows += [{"messages": [SYSTEM, *CHAT], "line": 5}]
    train, evaluation = split(rows, 0.5)
    assert {len(train), len(evaluation)} == {1, 5}


def test_split_refuses_a_share_out_of_range() -> None:
    for share in (-0.1, 0.6, float("nan")):
        with pytest.raises(ConfigError):
            split(pairs(3), share)


# --- profile -------------------------------------------------------------------------------------------------------


def test_profile_counts_every_row(tmp_path: Path) -> None:
    rows: list[Any] = [chat(*CHAT), chat(SYSTEM, *CHAT), chat(), chat(*CHAT)]
    rows += [chat(USER, {"role": "assistant", "content": "x" * n}) for n in range(2, 400)]
    rows += [chat(USER, {"role": "assistant", "content": "x" * 90_000})]
    prepared = prepare(table(tmp_path, rows))
    facts = profile(prepared)
    json.dumps(facts)
    assert (facts["rows"], facts["kept"], facts["skipped"]) == (403, 402, 1)
    assert facts["problems"] == {"other-answer": 399, "empty-conversation": 1, "duplicate": 1}
    edges, counts = facts["histogram"]["edges"], facts["histogram"]["counts"]
    assert sum(counts) == 402 and len(edges) == len(counts) + 1 <= 31
    assert edges == sorted(set(edges)) and edges[0] == 2 and edges[-1] == 90_002
    assert max(counts) < 40, "one long row must not press the others into one bin"
    assert facts["turns"] == {"2": 401, "3": 1}
    assert facts["characters"]["max"] == 90_001 and facts["characters"]["min"] == 2
    assert facts["examples"] == prepared.examples[:3]


@pytest.mark.parametrize("lengths", [[1], [5, 5, 5], [1, 2], [1, 1000]])
def test_histogram_of_few_rows(tmp_path: Path, lengths: list[int]) -> None:
    facts = profile(prepare(table(tmp_path, [{"text": "x" * length} for length in lengths])))
    edges, counts = facts["histogram"]["edges"], facts["histogram"]["counts"]
    assert sum(counts) == len(lengths) and len(edges) == len(counts) + 1 and len(counts) <= 30
    assert edges[0] == lengths[0] and edges[-1] > lengths[-1]


def test_load_reads_and_prepares(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("F,A\na,b\n", encoding="utf-8")
    assert load(path, "prompt_completion", {"prompt": "F", "completion": "A"}).kept == 1
    assert load(str(path), None, {"text": "F"}).examples == [{"text": "a", "line": 2}]
