"""Texts into labels: learned, saved, opened again; one label and several; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import PeftModel
from engine.errors import CheckpointError, ConfigError, DataError, ModelError
from engine.evaluation import evaluate_job
from engine.generation import Sampling
from engine.labelling import UNTRAINED, Labeller, labels
from engine.tasks import get_task
from engine.tasks.base import Loaded
from engine.tasks.classification import Classification
from engine.train.events import Recorder
from engine.train.job import JobSpec
from engine.train.worker import run
from tests import small_bert
from tests.small_bert import rows


class Never:
    def poll(self) -> str | None:
        return None


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bert.build(tmp_path_factory.mktemp("bert"))


def write(path: Path, data: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return path


def job(model: Path | str, data: Path, adapter: dict[str, Any] | None = None, **training: Any) -> JobSpec:
    settings = {"max_steps": 100, "batch_size": 8, "learning_rate": 1e-2, "precision": "fp32", "max_length": 32}
    return JobSpec.from_dict(
        {
            "task": "classification",
            "model": str(model),
            "data": {"path": str(data), "eval_split": 0.25},
            "adapter": adapter or {"method": "lora", "r": 4, "target_modules": ["query", "value"]},
            "training": {"eval_every": 50, "sample_prompts": ["the song 2 was sweet very 3"], **settings, **training},
        }
    )


def train(spec: JobSpec, out: Path) -> Recorder:
    recorder = Recorder()
    assert run(spec, out, recorder, Never()) == "done"
    return recorder


def scores(spec: JobSpec, adapter: Path, **options: Any) -> tuple[dict[tuple[str, str], float], list[dict[str, Any]]]:
    events = list(evaluate_job(spec, adapter, lambda *_: None, **options))
    found = {(event["who"], event["metric"]): event["value"] for event in events if event["type"] == "score"}
    return found, events


def test_labels_are_learned_saved_and_scored(bert: Path, tmp_path: Path) -> None:
    spec = job(bert, write(tmp_path / "rows.jsonl", rows(80)))
    recorder = train(spec, tmp_path / "run")
    metrics = [event["metrics"] for event in recorder.of("eval")]
    assert metrics[-1]["accuracy"] >= 0.95 and metrics[-1]["macro_f1"] >= 0.95 and metrics[0]["accuracy"] < 0.8
    assert recorder.of("sample")[-1]["text"].startswith("good (")
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "labels.json").read_text())["labels"] == ["bad", "good"]
    found, events = scores(spec, adapter, shown=3)
    assert found["adapter", "accuracy"] == metrics[-1]["accuracy"]
    assert found["adapter", "loss"] == pytest.approx(recorder.of("eval")[-1]["loss"], rel=1e-5)
    assert found["base", "accuracy"] <= 0.6 and ("base", "loss") not in found
    assert all("untrained" in event["note"] for event in events if event.get("who") == "base")
    assert all(event["rows"] == 20 for event in events if event["type"] == "score")
    shown = [event for event in events if event["type"] == "row"]
    assert len(shown) == 3 and all(event["adapter"].startswith(event["wanted"] + " (") for event in shown)


def test_without_a_learning_rate_the_labels_are_not_learned(bert: Path, tmp_path: Path) -> None:
    """The counterpart of the test above: its thresholds are not reached by accident."""
    spec = job(bert, write(tmp_path / "rows.jsonl", rows(80)), learning_rate=1e-12)
    train(spec, tmp_path / "run")
    assert scores(spec, tmp_path / "run" / "adapter")[0]["adapter", "accuracy"] < 0.8


def test_several_labels_at_once(bert: Path, tmp_path: Path) -> None:
    spec = job(bert, write(tmp_path / "rows.jsonl", rows(120, several=True)), max_steps=120, schedule="constant")
    recorder = train(spec, tmp_path / "run")
    before, after = (recorder.of("eval")[place]["metrics"]["accuracy"] for place in (0, -1))
    assert before < 0.6 and after >= 0.9
    adapter = tmp_path / "run" / "adapter"
    task = get_task("classification").restored(adapter)  # type: ignore[attr-defined]
    assert task.several
    base = task.load(spec, torch.device("cpu"), lambda *_: None)
    assert base.model.config.problem_type == "multi_label_classification"
    loaded = Loaded(PeftModel.from_pretrained(base.model, adapter), base.processor)
    both = task.sample(loaded.model, loaded, "a song lovely and dark")
    assert "good (" in both and "bad (" in both
    assert task.sample(loaded.model, loaded, "a room and the room").startswith("no label")


@pytest.mark.parametrize("method", [{"method": "prompt_tuning", "num_virtual_tokens": 4}, {"method": "ia3"}])
def test_other_methods_train_on_an_encoder(bert: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    spec = job(bert, write(tmp_path / "rows.jsonl", rows(80)), method, learning_rate=3e-2, max_steps=160)
    train(spec, tmp_path / "run")
    assert scores(spec, tmp_path / "run" / "adapter")[0]["adapter", "accuracy"] >= 0.9


def test_a_language_model_as_classifier(tmp_path: Path) -> None:
    adapter = {"method": "lora", "r": 4}
    spec = job("tiny-llama", write(tmp_path / "rows.jsonl", rows(64)), adapter, max_steps=48, learning_rate=3e-3)
    train(spec, tmp_path / "run")
    found, _ = scores(spec, tmp_path / "run" / "adapter")
    assert found["adapter", "accuracy"] >= 0.9


def test_padding_changes_no_answer(bert: Path, tmp_path: Path) -> None:
    spec = job(bert, write(tmp_path / "rows.jsonl", rows(16)))
    task: Any = Classification().fitted([{"text": "x", "labels": [label]} for label in ("a", "b")])
    loaded = task.load(spec, torch.device("cpu"), lambda *_: None)
    texts = ["the song", "the very very very quite lovely song was bright and warm"]
    encoded = task.encode([{"text": text, "labels": ["a"]} for text in texts], loaded, spec.training, lambda *_: None)
    collate = task.collator(loaded)
    with torch.no_grad():
        apart = sum(float(task.loss(loaded.model, collate([row])).total) for row in encoded.rows)
        together = float(task.loss(loaded.model, collate(encoded.rows)).total)
    assert together == pytest.approx(apart, rel=1e-5)
    assert task.targets(collate(encoded.rows)) == 2


def test_the_head_is_the_same_for_a_seed_and_kept_in_float32(bert: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", rows(16))
    task: Any = Classification().fitted([{"text": "x", "labels": [label]} for label in ("a", "b", "c")])
    heads = [
        task.load(job(bert, data, seed=seed, precision="bf16"), torch.device("cpu"), lambda *_: None).model
        for seed in (1, 1, 2)
    ]
    first, again, other = (model.classifier.weight for model in heads)
    assert first.dtype == torch.float32 and heads[0].bert.pooler.dense.weight.dtype == torch.bfloat16
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape[0] == 3
    assert heads[0].config.id2label == {0: "a", 1: "b", 2: "c"}


def test_rows_with_labels_that_training_lacks_are_told(bert: Path, tmp_path: Path) -> None:
    spec = job(bert, write(tmp_path / "rows.jsonl", rows(16)))
    task: Any = Classification().fitted([{"text": "x", "labels": [label]} for label in ("a", "b")])
    loaded = task.load(spec, torch.device("cpu"), lambda *_: None)
    held = [{"text": "the day", "labels": [label]} for label in ("a", "strange", "strange")]
    encoded = task.encode(held, loaded, spec.training, lambda *_: None)
    assert len(encoded.rows) == 1 and "2 rows were left out" in encoded.notes[0] and "'strange' (2)" in encoded.notes[0]
    with pytest.raises(DataError, match="None of the 2 rows"):
        task.encode(held[1:], loaded, spec.training, lambda *_: None)


@pytest.mark.parametrize(
    ("labels", "options", "says"),
    [
        ([["a"]] * 4, {}, "All 4 training rows have the label 'a'"),
        ([["1"], ["01"], ["2"]], {}, "same number written in two ways"),
        ([[str(n)] for n in range(40)], {}, "looks like a quantity"),
        ([["a"], ["a", "b"]], {"multi_label": False}, "do not have exactly one label"),
        ([["a"], ["b"]], {"labels": ["a", "c"]}, "does not name: 'b'"),
    ],
)
def test_labels_that_cannot_be_learned_are_refused(labels: list[Any], options: dict[str, Any], says: str) -> None:
    examples = [{"text": "x", "labels": one, "line": number} for number, one in enumerate(labels, start=1)]
    with pytest.raises(DataError, match=says):
        get_task("classification", options).fitted(examples)  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [{"multi_label": "maybe"}, {"labels": "ab"}, {"labels": [0, 1]}, {"labels": ["a"]}])
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="options"):
        get_task("classification", options)


def test_what_is_not_there_is_named(bert: Path, tmp_path: Path) -> None:
    spec = job(bert, write(tmp_path / "rows.jsonl", rows(16)))
    with pytest.raises(CheckpointError, match="no adapter folder"):
        scores(spec, tmp_path)
    with pytest.raises(CheckpointError, match=r"labels\.json"):
        Classification().restored(tmp_path)
    whole = JobSpec.from_dict({**spec.to_dict(), "data": {"path": spec.data.path, "eval_split": 0}})
    with pytest.raises(DataError, match="no rows back"):
        scores(whole, tmp_path)


def test_a_model_that_lacks_more_than_its_head_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    folder = small_bert.build(tmp_path / "model")
    shape = BertConfig.from_pretrained(folder)
    BertModel(shape, add_pooling_layer=False).save_pretrained(folder)
    data = write(tmp_path / "rows.jsonl", rows(32))
    adapter = {"method": "lora", "r": 2, "target_modules": ["query", "value"]}
    with pytest.raises(ModelError, match="pooler"):
        run(job(folder, data, adapter), tmp_path / "refused", Recorder(), Never())
    train(job(folder, data, {**adapter, "modules_to_save": ["pooler"]}, max_steps=2), tmp_path / "run")


def test_labellers_answer_with_each_adapters_own_labels(bert: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", rows(48))
    other = [{"text": row["text"], "label": f"{row['label']}!"} for row in rows(48)]
    for name, path in (("one", data), ("two", data), ("three", write(tmp_path / "other.jsonl", other))):
        train(job(bert, path, seed=len(name), max_steps=20), tmp_path / name)
    folders = {name: tmp_path / name / "adapter" for name in ("one", "two", "three")}
    assert labels(str(bert), list(folders.values())) and not labels(str(bert), [])
    labeller = Labeller(str(bert), precision="fp32")
    for name, folder in folders.items():
        labeller.attach(name, folder)
    assert len(labeller._models) == 2
    asked = [{"role": "user", "content": rows(48)[0]["text"]}]
    said = [piece.text for piece in labeller.stream(asked, [None, *folders], Sampling())]
    assert said[0] == UNTRAINED and said[3].split(" (")[0].endswith("!") and not said[1].split(" (")[0].endswith("!")
    alone = Labeller(str(bert), precision="fp32")
    alone.attach("two", folders["two"])
    assert [piece.text for piece in alone.stream(asked, ["two"], Sampling())] == [said[2]]
    labeller.detach("three")
    labeller.detach("one")
    assert [piece.text for piece in labeller.stream(asked, ["two"], Sampling())] == [said[2]]
    with pytest.raises(ConfigError, match="no adapter 'one'"):
        list(labeller.stream(asked, ["one"], Sampling()))
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "adapter_config.json").write_text('{"task_type": "CAUSAL_LM"}')
    with pytest.raises(ConfigError, match="those of one task"):
        labels(str(bert), [folders["one"], tmp_path / "chat"])


def test_a_fully_trained_classifier_is_scored_and_answers_by_itself(bert: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", rows(64))
    plain = job(bert, data, max_steps=40, learning_rate=2e-3).to_dict()
    spec = JobSpec.from_dict({**{k: v for k, v in plain.items() if k != "adapter"}, "full": True})
    train(spec, tmp_path / "run")
    folder = tmp_path / "run" / "model"
    found, _ = scores(spec, folder)
    assert found["adapter", "accuracy"] > found["base", "accuracy"] + 0.2
    assert labels(str(folder), [])
    asked = [{"role": "user", "content": rows(1)[0]["text"]}]
    said = [piece.text for piece in Labeller(str(folder)).stream(asked, [None], Sampling())]
    assert said[0].split(" (")[0] in {row["label"] for row in rows(64)}
    with pytest.raises(CheckpointError, match="no model folder"):
        scores(spec, tmp_path)
