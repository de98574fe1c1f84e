"""Two answers word by word: hand-worked cases, Korean, and what has to hold for any two texts."""

from __future__ import annotations

import random
import unicodedata

import pytest

from studio.differences import GONE, NEW, SAME, Part, compared, share_new, words


def said(text: str) -> list[str]:
    return [text[start:end] for start, end in words(text)]


def test_a_word_that_is_new_and_one_that_is_left_out_are_told_in_place() -> None:
    assert compared("The grass is green.", "The deep grass was green.") == [
        Part(SAME, "The "),
        Part(NEW, "deep"),
        Part(SAME, " grass "),
        Part(GONE, "is"),
        Part(NEW, "was"),
        Part(SAME, " green."),
    ]
    assert compared("one two three", "one three") == [Part(SAME, "one"), Part(GONE, "two"), Part(SAME, " three")]
    assert compared("", "hello") == [Part(NEW, "hello")]
    assert compared("hello", "") == [Part(GONE, "hello")]
    assert compared("a  b\n", "a b") == [Part(SAME, "a b")]


def test_korean_words_are_compared_whole_and_however_they_are_composed() -> None:
    assert compared("바다는 넓고 푸르다.", "바다는 깊고 푸르다.") == [
        Part(SAME, "바다는 "),
        Part(GONE, "넓고"),
        Part(NEW, "깊고"),
        Part(SAME, " 푸르다."),
    ]
    decomposed = unicodedata.normalize("NFD", "바다는 깊다")
    assert decomposed != "바다는 깊다"
    assert compared("바다는 깊다", decomposed) == [Part(SAME, decomposed)]
    assert share_new("바다는 넓고, 푸르다.", "바다는 깊고 푸르다!") == pytest.approx(1 / 3)


def test_words_are_cut_where_people_cut_them() -> None:
    assert said("don't stop, é!") == ["don't", "stop", ",", "é", "!"]
    assert said("e\u0301te\u0301 ") == ["e\u0301te\u0301"]
    assert said("我很好 ok") == ["我", "很", "好", "ok"]
    assert said("x2 = 3.5") == ["x2", "=", "3", ".", "5"]
    assert said(" \n\t") == []


def test_same_and_new_are_the_second_text_and_same_and_gone_the_firsts_words() -> None:
    draw = random.Random(3)
    letters = ["the", "sea", "is", "blue", "바다", ",", ".", "\n", "  ", "é", "我", "$x", "<b>"]
    for _ in range(300):
        first, second = (" ".join(draw.choices(letters, k=draw.randrange(12))) for _ in range(2))
        parts = compared(first, second)
        assert "".join(part.text for part in parts if part.kind != GONE) == second
        kept = [word for part in parts if part.kind != NEW for word in said(part.text)]
        assert kept == said(first)
        new = " ".join(part.text for part in parts if part.kind == NEW)
        assert 0 <= share_new(first, second) <= 1
        assert (share_new(first, second) == 0) == (not any(letter.isalnum() for letter in new))
