"""Every task's presets train from the command line, by a margin that the same run without a learning rate misses."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engine.__main__ import main
from engine.paths import REPOSITORY
from studio import presets
from tests import small_bert

EXAMPLES = REPOSITORY / "examples"
BASES = {
    "causal_lm": "tiny-llama",
    "preference": "tiny-llama",
    "seq2seq": "tiny-t5",
    "captioning": "tiny-blip",
    "text_to_image": "tiny-sd",
}
ROWS = {
    "causal_lm": "lighthouse.jsonl",
    "preference": "captain_preferences.jsonl",
    "seq2seq": "old_english.csv",
    "classification": "question_topics.csv",
    "captioning": "emoji_grounds.zip",
    "text_to_image": "emoji_blueprints.zip",
}


@dataclass(frozen=True)
class Case:
    """How far the evaluation loss must fall, and what of the preset's training gives way to the toy and the clock."""

    margin: float
    training: dict[str, Any] = field(default_factory=dict)
    rows: str = ""
    eval_split: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


# Passes over all rows become a few steps: the clock. Rates of 1e-6 to 5e-4 are for real models over many more steps;
# the toys get 2e-3 to 5e-3 instead. A case without changes trains as it is. Adapter, options, bits and batches stay.
CASES = {
    ("causal_lm", "quick-look"): Case(1.0, {"max_steps": 24}),
    ("causal_lm", "conservative"): Case(1.0, {"max_steps": 16, "learning_rate": 0.003}),
    ("causal_lm", "aggressive"): Case(1.0, {"max_steps": 12, "learning_rate": 0.002}),
    ("causal_lm", "chat-sft"): Case(1.0, {"max_steps": 8, "learning_rate": 0.005}),
    ("causal_lm", "code"): Case(1.0, {"max_steps": 12, "learning_rate": 0.005}, "small_functions.jsonl"),
    ("causal_lm", "completion"): Case(0.5, {"max_steps": 6, "learning_rate": 0.005}),
    ("causal_lm", "low-memory"): Case(1.0, {"max_steps": 6, "learning_rate": 0.005}),
    ("preference", "quick-look"): Case(0.02),
    ("preference", "dpo"): Case(0.3, {"max_steps": 16, "learning_rate": 0.005}),
    ("seq2seq", "quick-look"): Case(0.25, {"max_steps": 12}),
    ("seq2seq", "translate"): Case(0.25, {"max_steps": 16, "learning_rate": 0.003}),
    ("seq2seq", "summarise"): Case(0.2, {"max_steps": 16, "learning_rate": 0.003}),
    ("captioning", "quick-look"): Case(3.0, {"max_steps": 20}),
    ("captioning", "plain"): Case(2.0, {"max_steps": 12, "learning_rate": 0.005}),
    ("captioning", "detailed"): Case(2.0, {"max_steps": 12, "learning_rate": 0.005}),
    ("captioning", "artistic"): Case(2.0, {"max_steps": 12, "learning_rate": 0.005}),
    ("text_to_image", "quick-look"): Case(0.01, {"max_steps": 30}),
    ("text_to_image", "captioned"): Case(0.01, {"max_steps": 30, "learning_rate": 0.002}),
    # Few pictures of the class, and rows held back to compare with.
    ("text_to_image", "dreambooth"): Case(
        0.01, {"max_steps": 30, "learning_rate": 0.002}, eval_split=0.1, options={"class_pictures": 2, "steps": 5}
    ),
    ("preference", "conservative"): Case(0.1, {"max_steps": 8, "learning_rate": 0.005}),
    ("preference", "aggressive"): Case(0.1, {"max_steps": 6, "learning_rate": 0.002}),
    ("preference", "low-memory"): Case(0.3, {"max_steps": 6, "learning_rate": 0.005}),
    ("seq2seq", "conservative"): Case(0.1, {"max_steps": 12, "learning_rate": 0.005}),
    ("seq2seq", "aggressive"): Case(0.25, {"max_steps": 12, "learning_rate": 0.002}),
    ("seq2seq", "low-memory"): Case(0.06, {"max_steps": 6, "learning_rate": 0.005}),
    ("captioning", "conservative"): Case(1.0, {"max_steps": 12, "learning_rate": 0.005}),
    ("captioning", "aggressive"): Case(2.0, {"max_steps": 12, "learning_rate": 0.002}),
    ("captioning", "low-memory"): Case(1.0, {"max_steps": 6, "learning_rate": 0.005}),
    ("text_to_image", "conservative"): Case(0.005, {"max_steps": 30, "learning_rate": 0.005}),
    ("text_to_image", "aggressive"): Case(0.01, {"max_steps": 30, "learning_rate": 0.002}),
    ("text_to_image", "low-memory"): Case(0.005, {"max_steps": 30, "learning_rate": 0.005}),
    ("classification", "conservative"): Case(0.02, {"learning_rate": 0.002}),
    ("classification", "aggressive"): Case(0.1),
    ("classification", "low-memory"): Case(0.02, {"max_steps": 20, "learning_rate": 0.005}),
    ("classification", "quick-look"): Case(0.15),
    ("classification", "classify"): Case(0.1),
    ("classification", "every-layer"): Case(0.35),
}


def bert(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A BERT that was never trained, with the words of the sample."""
    with (EXAMPLES / ROWS["classification"]).open(encoding="utf-8", newline="") as file:
        words = {word for row in csv.DictReader(file) for word in re.findall(r"\w+|[^\w\s]+", row["text"])}
    monkeypatch.setattr(small_bert, "WORDS", (*small_bert.WORDS[:4], *sorted(words)))
    return small_bert.build(folder, max_position_embeddings=256)


def job(task: str, name: str, base: str, training: dict[str, Any]) -> dict[str, Any]:
    preset, case = presets.tasks()[task].presets[name], CASES[task, name]
    # Two checks are enough to compare: one before and one after.
    last = {"eval_every": 1000, "checkpoint_every": 1000}
    return {
        "task": task,
        "model": base,
        "data": {"path": str(EXAMPLES / (case.rows or ROWS[task])), "eval_split": preset.eval_split or case.eval_split},
        "options": {**preset.options, **case.options},
        "quantization": preset.quantization,
        "adapter": {key: value for key, value in preset.adapter.items() if value is not None},
        "training": {**preset.training, **last, **training},
    }


def trained(spec: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The last event of a run from the command line."""
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(spec), encoding="utf-8")
    capsys.readouterr()
    code = main(["train", str(folder / "job.json"), "--out", str(folder / "run"), "--json"])
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == 0, events[-1]
    (done,) = [event for event in events if event["type"] == "done"]
    return dict(done)


def test_every_preset_has_a_case() -> None:
    assert set(CASES) == {(task, name) for task, form in presets.tasks().items() for name in form.presets}


# One row at a time, each recomputed; and the tasks' further recipes, whose every part another case has too.
LONG = {(task, name) for task, name in CASES if name == "low-memory"} | {
    (task, name) for task, name in CASES if task != "causal_lm" and name in ("conservative", "aggressive")
}


@pytest.mark.parametrize(
    ("task", "name"), [pytest.param(*key, marks=[pytest.mark.slow] if key in LONG else []) for key in CASES]
)
def test_a_preset_learns_by_its_margin_and_not_without_a_rate(
    task: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[task, name]
    base = BASES[task] if task in BASES else str(bert(tmp_path / "bert", monkeypatch))
    falls = []
    for which, change in (("learns", {}), ("stays", {"learning_rate": 1e-12})):
        done = trained(job(task, name, base, {**case.training, **change}), tmp_path / which, capsys)
        falls.append(done["first_eval_loss"] - done["eval_loss"])
    assert falls[0] > case.margin
    assert not falls[1] > case.margin
