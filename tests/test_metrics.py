"""Scores by hand-worked values; ROUGE-L's were also compared with the `rouge_score` package when it was written."""

from __future__ import annotations

import math

import pytest

from engine.errors import ConfigError
from engine.metrics import accuracy, exact_match, macro_f1, rouge_l, text_scores


def sets(*rows: str) -> list[frozenset[int]]:
    return [frozenset(map(int, row)) for row in rows]


def test_accuracy_wants_all_labels_of_a_row() -> None:
    assert accuracy(sets("0", "01", "", "2"), sets("0", "0", "", "1")) == 0.5


def test_macro_f1_counts_every_label_alike() -> None:
    wanted, got = sets("0", "0", "0", "1", "2"), sets("0", "0", "1", "1", "0")
    # Label 0: tp 2, fp 1, fn 1; label 1: tp 1, fp 1; label 2: never found.
    assert macro_f1(wanted, got) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    # A label that nobody wanted or gave does not count; one that was given in vain does.
    assert macro_f1(sets("0", "0"), sets("0", "3")) == pytest.approx((2 / 3 + 0) / 2)
    assert macro_f1(sets("", ""), sets("", "")) == 1.0


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    assert rouge_l(["the cat sat on the mat"], ["the cat lay on a mat"]) == pytest.approx(2 * 4 / 12)
    assert rouge_l(["Don't stop, now!"], ["don t STOP now"]) == 1.0
    assert rouge_l(["a b c"], ["c b a"]) == pytest.approx(1 / 3)
    assert rouge_l(["same", "words"], ["same", ""]) == 0.5
    assert rouge_l(["바다 위의 배"], ["바다 위의 섬"]) == pytest.approx(2 / 3)


def test_texts() -> None:
    wanted = ["The harbour is quiet tonight.", "Ships leave at dawn."]
    assert exact_match(wanted, [" The  harbour is quiet tonight.\n", "ships leave at dawn."]) == 0.5
    same = text_scores(("bleu", "chrf", "rouge_l", "exact_match"), wanted, wanted)
    assert same == {"bleu": pytest.approx(100), "chrf": pytest.approx(100), "rouge_l": 1.0, "exact_match": 1.0}
    # Every word right, 7 tokens of 11: BLEU is the penalty for shortness alone, so answer and wanted are not swapped.
    short = ["The harbour is quiet", "Ships leave at"]
    assert text_scores(("bleu",), wanted, short)["bleu"] == pytest.approx(100 * math.exp(1 - 11 / 7))
    with pytest.raises(ConfigError, match="no text metric"):
        text_scores(("meteor",), wanted, wanted)
