"""Scores of answers, by the definitions that papers report. Torch-free.

chrF and BLEU are sacrebleu's (Post 2018), so that their values can be compared with published ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from engine.errors import ConfigError

TEXT_METRICS = ("exact_match", "chrf", "bleu", "rouge_l")


def accuracy(wanted: Sequence[frozenset[int]], got: Sequence[frozenset[int]]) -> float:
    """Share of rows (0 to 1) whose labels are all right and complete."""
    return sum(a == b for a, b in zip(wanted, got, strict=True)) / len(wanted)


def macro_f1(wanted: Sequence[frozenset[int]], got: Sequence[frozenset[int]]) -> float:
    """The mean of F1 = 2 tp / (2 tp + fp + fn) over the labels that occur in the rows or in the answers."""
    labels = frozenset().union(*wanted, *got)
    if not labels:
        return 1.0
    total = 0.0
    for label in labels:
        hit = sum(label in a and label in b for a, b in zip(wanted, got, strict=True))
        wrong = sum((label in a) != (label in b) for a, b in zip(wanted, got, strict=True))
        total += 2 * hit / (2 * hit + wrong)
    return total / len(labels)


def exact_match(wanted: Sequence[str], got: Sequence[str]) -> float:
    """Share of answers (0 to 1) that are the wanted text, spaces at the ends and runs of them aside."""
    return sum(a.split() == b.split() for a, b in zip(wanted, got, strict=True)) / len(wanted)


def chrf(wanted: Sequence[str], got: Sequence[str]) -> float:
    """Corpus chrF2, 0 to 100."""
    import sacrebleu

    return float(sacrebleu.corpus_chrf(list(got), [list(wanted)]).score)


def bleu(wanted: Sequence[str], got: Sequence[str]) -> float:
    """Corpus BLEU with sacrebleu's default tokenizer (13a), 0 to 100."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(got), [list(wanted)]).score)


def rouge_l(wanted: Sequence[str], got: Sequence[str]) -> float:
    """Mean over rows of ROUGE-L's F1 (Lin 2004) on lower-cased words, 0 to 1.

    Words are runs of letters and digits of any script; for ASCII text that is what the `rouge_score` package counts.
    """
    return sum(_rouge_l(_words(a), _words(b)) for a, b in zip(wanted, got, strict=True)) / len(wanted)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _rouge_l(wanted: list[str], got: list[str]) -> float:
    if not wanted or not got:
        return 0.0
    # The longest common subsequence, one row of the table at a time.
    row = [0] * (len(got) + 1)
    for word in wanted:
        before = 0
        for place, other in enumerate(got, start=1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    common = row[-1]
    return 2 * common / (len(wanted) + len(got))


def text_scores(names: Iterable[str], wanted: Sequence[str], got: Sequence[str]) -> dict[str, float]:
    """Name -> value of the `TEXT_METRICS` asked for.

    Raises:
        ConfigError: an unknown name.
    """
    known = {"exact_match": exact_match, "chrf": chrf, "bleu": bleu, "rouge_l": rouge_l}
    scores = {}
    for name in names:
        if name not in known:
            raise ConfigError(f"There is no text metric {name!r}.", f"Known: {', '.join(TEXT_METRICS)}.")
        scores[name] = known[name](wanted, got)
    return scores
