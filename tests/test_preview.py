"""The token preview is the truth: the tokens, the learned ones and the cut are those that training encodes."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from engine import preview
from engine.errors import ConfigError
from engine.models.loading import load_tokenizer, meta_model
from engine.tasks import get_task
from engine.tasks.base import Loaded
from engine.train.job import TrainingSpec

CHAT = {
    "messages": [
        {"role": "user", "content": "What is 안녕 🐈?"},
        {"role": "assistant", "content": "A greeting, and a cat."},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Two."},
    ],
    "line": 2,
}
ROWS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "causal_lm": (
        "tiny-llama",
        [CHAT, {"prompt": "Hi", "completion": "Hello you", "line": 3}, {"text": "a " * 40, "line": 4}],
    ),
    "preference": (
        "tiny-llama",
        [{"prompt": [{"role": "user", "content": "Hi"}], "chosen": "Hello! " * 9, "rejected": "What", "line": 1}],
    ),
    "seq2seq": ("tiny-t5", [{"source": "thou art late " * 9, "target": "you are late " * 12, "line": 1}]),
}  # fmt: skip


def encoded(task: str, base: str, example: Mapping[str, Any], length: int) -> list[Any]:
    """What training makes of one row, with a model without weights."""
    options = {"loss": "orpo"} if task == "preference" else None
    loaded = Loaded(meta_model(base, task=task), load_tokenizer(base))
    training = TrainingSpec(max_length=length)
    return list(get_task(task, options).encode([example], loaded, training, lambda *_: None).rows)


def kept(sequence: Any) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    start, stop = sequence.lost
    cut = [n for n in range(len(sequence.ids)) if not start <= n < stop]
    return tuple(sequence.ids[n] for n in cut), tuple(bool(sequence.learned[n]) for n in cut)


@pytest.mark.parametrize("length", [12, 24, 512])
@pytest.mark.parametrize("task", ["causal_lm", "preference"])
def test_what_is_shown_is_what_is_encoded(task: str, length: int) -> None:
    base, examples = ROWS[task]
    reader = preview.reader(base, task, max_length=length)
    compared = 0
    for example in examples:
        (sequences, error), *_ = reader.rows([example])
        assert not error
        shown = [kept(one) for one in sequences if one.targets]
        try:
            rows = encoded(task, base, example, length)
        except Exception as fault:  # nothing to learn within the cut
            assert "within" in str(fault) and not all(one.targets for one in sequences)
            continue
        parts = [part for row in rows for part in ([row.chosen, row.rejected] if task == "preference" else [row])]
        assert shown == [(part.ids, (False, *part.learned[1:])) for part in parts]
        compared += len(parts)
    assert compared or length == 12


@pytest.mark.parametrize("length", [12, 512])
def test_both_sides_of_a_pair_are_cut_as_in_training(length: int) -> None:
    base, (example,) = ROWS["seq2seq"]
    (source, target), error = next(preview.reader(base, "seq2seq", max_length=length).rows([example]))
    (row,) = encoded("seq2seq", base, example, length)
    assert not error and (kept(source)[0], kept(target)[0]) == (row.source, row.target)
    assert set(kept(source)[1]) == {False} and set(kept(target)[1]) == {True}
    assert (source.lost[0] < source.lost[1]) == (length == 12)


def test_a_classifiers_text_is_read_and_cut_as_its_tokenizer_cuts() -> None:
    example = {"text": "buy now and save a lot of money " * 4, "labels": ["spam"], "line": 7}
    (sequence,), _ = next(preview.reader("tiny-llama", "classification", max_length=10).rows([example]))
    tokenizer = load_tokenizer("tiny-llama")
    assert list(kept(sequence)[0]) == tokenizer(example["text"], truncation=True, max_length=10)["input_ids"]
    assert not any(sequence.learned)


def test_captions_and_words_of_pictures() -> None:
    example = {"image": "none.png", "text": "a red cat on a mat and on another mat", "line": 1}
    (caption,), _ = next(
        preview.reader("tiny-blip", "captioning", {"style": "detailed"}, max_length=12).rows([example])
    )
    assert len(kept(caption)[0]) == 12 and kept(caption)[1][0] is False and kept(caption)[1][-1] is True
    plain = next(preview.reader("tiny-blip", "captioning", max_length=12).rows([example]))[0][0]
    assert sum(caption.learned) == sum(plain.learned) and len(caption.ids) > len(plain.ids)
    long = {**example, "text": "a red cat " * 40}
    (words,), _ = next(preview.reader("tiny-sd", "text_to_image").rows([long]))
    assert words.lost[1] > words.lost[0] and len(kept(words)[0]) == words.limit and not any(words.learned)


def test_pieces_make_the_text_again_and_a_cut_character_is_one() -> None:
    tokenizer = load_tokenizer("tiny-llama")
    text = "What is 안녕 🐈?\nTwo  spaces."
    found = preview.pieces(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert "".join(piece for piece, _ in found) == text
    assert any(inside for _, inside in found) and all(not piece for piece, inside in found if inside)
    t5 = load_tokenizer("tiny-t5")
    pieces = preview.pieces(t5, t5("thou art late")["input_ids"])
    assert "".join(piece for piece, _ in pieces).strip() == "thou art late</s>"


def test_a_row_is_given_for_a_page_with_marks_counts_and_the_cut() -> None:
    reader = preview.reader("tiny-llama", "causal_lm", max_length=20)
    (shown,) = preview.shown(reader, [CHAT])
    (part,) = shown["parts"]
    marks = [mark for _, mark in part["pieces"]]
    assert shown["line"] == 2 and part["tokens"] == len(marks) and part["limit"] == 20
    assert sum(bool(mark & preview.LEARNED) for mark in marks) == part["learned"]
    assert sum(bool(mark & preview.LOST) for mark in marks) == part["lost"] == part["tokens"] - 20
    assert any(mark & preview.SPECIAL for mark in marks)
    ((tokens, lost, learned, limit),) = preview.lengths(reader, [CHAT])
    assert (tokens, lost, learned, limit) == (part["tokens"], part["lost"], part["learned"], 20)


def test_of_a_long_row_only_its_start_and_its_cut_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "MOST_PIECES", 100)
    reader = preview.reader("tiny-llama", "causal_lm", max_length=1_000_000)
    (shown,) = preview.shown(reader, [{"text": "word " * 3_000, "line": 1}])
    pieces = shown["parts"][0]["pieces"]
    gaps = [count for text, count in pieces if text is None]
    assert sum(text is not None for text, _ in pieces) + sum(gaps) == shown["parts"][0]["tokens"]
    assert len(pieces) < 120 and len(gaps) == 2 and shown["parts"][0]["limit"] == 512


def test_a_row_that_the_template_refuses_says_so_and_the_others_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = preview.reader("tiny-llama", "causal_lm")
    tokenizer: Any = reader.loaded.processor
    real = tokenizer.apply_chat_template

    def refuse(messages: list[Any], **options: Any) -> Any:
        from jinja2 import TemplateError

        if any("forbidden" in message["content"] for message in messages):
            raise TemplateError("no such word")
        return real(messages, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", refuse)
    good, bad = ({"prompt": words, "completion": "b", "line": 1} for words in ("a", "forbidden"))
    found = preview.shown(reader, [good, bad, good])
    assert [bool(one["error"]) for one in found] == [False, True, False] and found[1]["parts"] == []
    assert preview.lengths(reader, [bad]) == [[0, 0, 0, 0]]


def test_settings_that_cannot_be_are_refused() -> None:
    for settings in ({"max_length": 7}, {"loss_on": "some"}, {"max_length": True}):
        with pytest.raises(ConfigError):
            preview.reader("tiny-llama", "causal_lm", **settings)  # type: ignore[arg-type]


def test_every_task_shows_its_tokens() -> None:
    from engine.tasks import TASKS
    from engine.tasks.base import Showing

    assert all(isinstance(get_task(name), Showing) for name in TASKS)
    assert not isinstance(SimpleNamespace(), Showing)
