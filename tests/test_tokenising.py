"""Rows into tokens: together as one by one, once for the same rows and settings, in memory as in a file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from engine.models.encoder_decoder import load_seq2seq_lm
from engine.models.loading import load_causal_lm
from engine.records import Chosen, Codec, Writer, in_order, json_bytes, numbers, open_records
from engine.tasks import tokenising
from engine.tasks.base import Loaded
from engine.tasks.causal_lm import TASK, Tokens, texts_of
from engine.tasks.classification import Classifier
from engine.tasks.preference import Preference
from engine.tasks.seq2seq import Seq2Seq
from engine.tasks.sequences import TOKENS, answer_text
from engine.train.job import TrainingSpec

WORDS = ["Ahoy", "안녕하세요 여러분", "naïve café", "emoji 🙂‍↔️ here", "tab\tand\nline", "x" * 90, "  spaces  "]
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"{w}?"}, {"role": "assistant", "content": f"{w}! {n}"}] * (1 + n % 3)}
    for n, w in enumerate(WORDS * 3)
]
PAIRS = [{"prompt": w, "completion": f"{w} {n}"} for n, w in enumerate(WORDS)]
TEXTS = [{"text": f"{n} {w}"} for n, w in enumerate(WORDS)]
# Drops earlier answers, so that each answer becomes a row.
FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'user' or loop.last %}[{{ m.role }}]{{ m.content }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def quiet(phase: str, fraction: float | None, message: str) -> None:
    pass


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    return Loaded(*load_causal_lm("tiny-llama", precision="fp32"), cache=tmp_path / "cache")


def alone(text: str, spans: Any, tokenizer: Any, loss_on: str) -> Tokens:
    """One text by a call of its own, with the rule of spans written out."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    learned = []
    for start, end in encoded["offset_mapping"]:
        inside = any(end > first and (last is None or start < last) for first, last in spans)
        learned.append(end > start and (inside or loss_on == "all"))
    return Tokens(tuple(encoded["input_ids"]), tuple(learned))


@pytest.mark.parametrize("loss_on", ["answers", "all"])
@pytest.mark.parametrize("forgetful", [False, True])
def test_rows_together_are_the_rows_one_by_one(
    loss_on: str, forgetful: bool, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenising, "CHUNK", 5)
    if forgetful:
        loaded.processor.chat_template = FORGETFUL
    training = TrainingSpec(loss_on=loss_on, max_length=24)
    for rows in (CHATS, PAIRS, TEXTS):
        expected = [
            alone(text, spans, loaded.processor, loss_on).cut(24)
            for row in rows
            for text, spans in texts_of(row, loaded.processor)
        ]
        assert len(expected) > len(rows) if forgetful and rows is CHATS else len(expected) == len(rows)
        wanted = [row for row in expected if row.targets]
        found = TASK.encode(rows, loaded, training, quiet)
        assert list(found.rows) == wanted
        some = any(not all(row.learned) for row in wanted)
        assert some is (loss_on == "answers" and rows is not TEXTS)
        assert all(type(value) is bool for row in found.rows for value in row.learned)


def test_other_tasks_rows_are_those_of_single_calls(loaded: Loaded, tmp_path: Path) -> None:
    tokenizer = loaded.processor
    labelled = [{"text": w, "labels": [label]} for w, label in zip(WORDS, "abcabca", strict=True)]
    task = Classifier(labels=("a", "b"))
    found = task.encode(labelled, loaded, TrainingSpec(max_length=8), quiet)
    kept = [row for row in labelled if row["labels"] != ["c"]]
    calls = [tokenizer(row["text"], truncation=True, max_length=8)["input_ids"] for row in kept]
    assert [list(row.ids) for row in found.rows] == calls
    assert [row.labels for row in found.rows] == [(0,), (1,), (0,), (1,), (0,)]
    assert any("2 rows were left out" in note for note in found.notes)

    preferred = [{"prompt": [{"role": "user", "content": "Q"}], "chosen": w, "rejected": w + " no"} for w in WORDS]
    pairs = Preference(loss_kind="orpo").encode(preferred, loaded, TrainingSpec(max_length=100), quiet).rows
    for row, pair in zip(preferred, pairs, strict=True):
        for role, tokens in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            assert tokens == alone(*answer_text(row["prompt"], row[role], tokenizer), tokenizer, "answers")

    t5 = Loaded(*load_seq2seq_lm("tiny-t5", precision="fp32"), cache=tmp_path)
    rows = [{"source": w, "target": f"{n} {w}"} for n, w in enumerate(WORDS)]
    for row, made in zip(rows, Seq2Seq(prefix="say: ").encode(rows, t5, TrainingSpec(), quiet).rows, strict=True):
        assert list(made.source) == t5.processor("say: " + row["source"])["input_ids"]
        assert list(made.target) == t5.processor(text_target=row["target"])["input_ids"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many examples each encoding has read."""
    seen: list[int] = []
    plain = tokenising._made

    def counted(examples: Any, *more: Any) -> Any:
        seen.append(len(examples))
        return plain(examples, *more)

    monkeypatch.setattr(tokenising, "_made", counted)
    yield seen


@pytest.mark.parametrize("in_memory", [0, 1 << 24])
def test_the_same_rows_are_tokenised_once(
    in_memory: int, loaded: Loaded, calls: list[int], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenising, "IN_MEMORY", in_memory)
    training = TrainingSpec(max_length=24)
    messages: list[str] = []
    first = TASK.encode(CHATS, loaded, training, quiet)
    again = TASK.encode(CHATS, loaded, training, lambda phase, share, message: messages.append(message))
    assert calls == [len(CHATS)] and messages == [f"{len(CHATS)} rows were tokenised before"]
    assert list(first.rows) == list(again.rows) and first.notes == again.notes and first.notes
    assert first.rows[3:5] == [first.rows[3], first.rows[4]] and first.rows[-1] == list(again.rows)[-1]
    (file,) = (home / "cache" / "tokens").iterdir()

    # Whatever the tokens depend on makes other ones.
    TASK.encode(CHATS[1:], loaded, training, quiet)
    TASK.encode(CHATS, loaded, dataclasses.replace(training, max_length=25), quiet)
    TASK.encode(CHATS, loaded, dataclasses.replace(training, loss_on="all"), quiet)
    template = loaded.processor.chat_template
    loaded.processor.chat_template = template + " "
    TASK.encode(CHATS, loaded, training, quiet)
    loaded.processor.chat_template = template
    loaded.processor.add_tokens(["Ahoy"])
    TASK.encode(CHATS, loaded, training, quiet)
    assert len(calls) == 6 and len([*file.parent.iterdir()]) == 6
    # Without a folder of the run nothing is kept.
    TASK.encode(CHATS, dataclasses.replace(loaded, cache=None), training, quiet)
    assert len(calls) == 7 and len([*file.parent.iterdir()]) == 6


def test_a_damaged_file_is_made_again(loaded: Loaded, calls: list[int], home: Path) -> None:
    training = TrainingSpec()
    expected = list(TASK.encode(TEXTS, loaded, training, quiet).rows)
    (file,) = (home / "cache" / "tokens").iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole[:20], whole[:8] + bytes([whole[8] ^ 1]) + whole[9:], b"x" * len(whole)):
        file.write_bytes(damaged)
        assert list(TASK.encode(TEXTS, loaded, training, quiet).rows) == expected
        assert file.read_bytes() == whole
    assert len(calls) == 6


def test_a_disk_that_takes_nothing_is_no_reason_to_stop(loaded: Loaded, calls: list[int], home: Path) -> None:
    (home / "cache").write_text("a file where the folder should be")
    assert len(TASK.encode(TEXTS, loaded, TrainingSpec(), quiet).rows) == len(TEXTS)
    assert calls == [len(TEXTS)] * 2


def test_an_error_leaves_no_draft(loaded: Loaded, home: Path) -> None:
    def broken(part: Any, counts: Any) -> Iterator[Any]:
        yield Tokens((1,), (True,))
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        tokenising.tokenised(TEXTS, loaded, TOKENS, broken, {}, quiet)
    assert [*(home / "cache" / "tokens").iterdir()] == []


def test_the_oldest_files_go_first(tmp_path: Path) -> None:
    for number in range(5):
        path = tmp_path / f"{number}.records"
        path.write_bytes(bytes(100))
        os.utime(path, (1000 + number, 1000 + number))
    os.utime(tmp_path / "0.records", (2000, 2000))
    draft, fresh = tmp_path / ".draft-old", tmp_path / ".draft-new"
    for path in (draft, fresh):
        path.write_bytes(b"half")
    os.utime(draft, (1000, 1000))
    tokenising.sweep(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".draft-new", "0.records", "4.records"]
    tokenising.sweep(tmp_path, 10)
    assert (tmp_path / "0.records").exists(), "the newest stays, however large it is"


def test_chunks_hold_so_many_rows_or_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenising, "CHUNK", 3)
    monkeypatch.setattr(tokenising, "CHARACTERS", 50)
    rows: list[Mapping[str, Any]] = [{"text": "a" * n} for n in (1, 1, 1, 1, 60, 2, 30, 30)]
    assert [[len(row["text"]) for row in part] for part in tokenising.parts(rows)] == [[1, 1, 1], [1, 60], [2, 30, 30]]


def test_records_are_the_rows_that_were_written(tmp_path: Path) -> None:
    values: list[Any] = [{"a": 1, "b": ["x", "로", "\ud800"]}, [], "", None, 2**70, {"long": "y" * 100_000}]
    codec: Codec[Any] = Codec(json_bytes, lambda raw: json.loads(raw.decode("utf-8", "surrogatepass")))
    for place in (None, tmp_path / "deep" / "file.records"):
        writer = Writer(codec, place)
        for value in values:
            writer.append(value)
        found = writer.close({"said": 1})
        assert list(found) == values and found == values and found != values[1:] and found.info == {"said": 1}
        assert found[-1] == values[-1] and found[1:3] == values[1:3]
        with pytest.raises(IndexError):
            found[len(values)]
    opened = open_records(tmp_path / "deep" / "file.records", codec)
    assert opened == values and opened is not None and opened.info == {"said": 1}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file.records"]
    assert open_records(tmp_path / "none", codec) is None

    rows = [(3, 1), (1, 1), (2, 2)]
    pairs = numbers("ib", lambda row: ([row[0]] * row[1], [row[1]]), lambda first, second: (first, second))
    kept = Writer(pairs)
    for row in rows:
        kept.append(row)  # type: ignore[arg-type]
    assert list(kept.close()) == [((3,), (1,)), ((1,), (1,)), ((2, 2), (2,))]


def test_rows_in_another_order_are_a_view() -> None:
    rows = ["ccc", "a", "bb", "x"]
    ordered = in_order(rows, len)
    assert isinstance(ordered, Chosen) and list(ordered) == sorted(rows, key=len) and ordered[-2:] == ["bb", "ccc"]
