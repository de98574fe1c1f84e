"""Writes the sample data sets of `examples/` that are made of this repository's own texts.

    python scripts/sample_data.py [FOLDER]

- `captain_preferences.jsonl`: a question, the old sea captain's answer (`lighthouse.jsonl`) as the better one, the
  plain answer (`tiny_data/everyday.txt`) as the worse one.
- `captain_parallel.csv`: the plain answer as the source, the captain's as the target.
- `question_topics.csv`: a question of the toy's tables and the table it is from, 40 of each of eight.
- `old_english.csv`: up to 1,200 everyday sentences and the same made old (`old_english.py`): the way back of what
  `tiny-t5` can do.
- `small_functions.jsonl`: what a short Python function does, and the function (`small_functions.py`).
"""

from __future__ import annotations

import csv
import json
import random
import sys
from pathlib import Path

import old_english
import small_functions
import tiny_corpus

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
TOPICS = ("animals", "foods", "countries", "jobs", "things", "sums", "calendar", "feelings")
EACH = 40


def both_answers() -> list[tuple[str, str, str]]:
    """(question, the captain's answer, the plain answer), in the order of the captain's file."""
    lines = (tiny_corpus.DATA / "everyday.txt").read_text(encoding="utf-8").splitlines()
    plain = dict(line.split("|") for line in lines if line and not line.startswith("#"))
    rows = []
    for line in (EXAMPLES / "lighthouse.jsonl").read_text(encoding="utf-8").splitlines():
        asked, answered = (turn["content"] for turn in json.loads(line)["messages"])
        rows.append((asked, answered, plain[asked]))
    return rows


def topics() -> list[tuple[str, str]]:
    """(question, topic), mixed; the same on every machine."""
    chance = random.Random("question topics")
    tables = tiny_corpus.single_turns()
    rows = []
    for topic in TOPICS:
        questions = sorted({question for question, _ in tables[topic]})
        rows += [(question, topic) for question in chance.sample(questions, min(EACH, len(questions)))]
    chance.shuffle(rows)
    return rows


def old(count: int = 1200) -> list[tuple[str, str]]:
    """(modern sentence, the same made old), the changed ones of the everyday sentences."""
    pairs = [(modern, made) for made, modern in old_english.everyday() if made != modern]
    random.Random("old english").shuffle(pairs)
    return pairs[:count]


def write(folder: Path) -> None:
    """All files."""
    rows = both_answers()
    with open(folder / "captain_preferences.jsonl", "w", encoding="utf-8", newline="\n") as file:
        for asked, captain, plain in rows:
            row = {"prompt": asked, "chosen": captain, "rejected": plain}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    with open(folder / "small_functions.jsonl", "w", encoding="utf-8", newline="\n") as file:
        file.write("".join(json.dumps(row) + "\n" for row in small_functions.rows()))
    tables = (
        ("captain_parallel.csv", ("source", "target"), [(plain, captain) for _, captain, plain in rows]),
        ("question_topics.csv", ("text", "label"), topics()),
        ("old_english.csv", ("source", "target"), old()),
    )
    for name, header, lines in tables:
        with open(folder / name, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *lines])


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else EXAMPLES)
