"""What a form shows of a job before it starts: the engine's own figures and refusals, piece by piece."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError, EngineError, TargetError
from engine.inspection import count
from engine.memory import preview
from engine.memory.predicting import Job, changed
from engine.train.job import JobSpec
from studio import forms, recipes

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LORA = {"method": "lora", "r": 4, "target_modules": "all-linear"}


def job(model: str = "tiny-llama", task: str = "causal_lm", **more: Any) -> JobSpec:
    training = {"max_steps": 2, "batch_size": 4, "max_length": 64, "precision": "fp32", **more.pop("training", {})}
    plain = {
        "model": model,
        "task": task,
        "data": {"path": str(EXAMPLES / "lighthouse.jsonl")},
        "adapter": LORA,
        "training": training,
    }
    return JobSpec.from_dict({**plain, **more})


def staged(spec: JobSpec, **more: Any) -> dict[str, dict[str, Any]]:
    return {stage["stage"]: stage for stage in preview.stages(spec, **more)}


def test_the_stages_are_the_engines_own_figures_the_cheapest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, own = job(), Job(job())
    peak = own.predict()
    monkeypatch.setattr(preview, "available", lambda place: int(peak.peak * 1.1))
    found = list(preview.stages(spec))
    assert [stage["stage"] for stage in found] == ["machine", "count", "peak", "largest"]
    by_name = {stage["stage"]: stage for stage in found}
    assert by_name["machine"]["budget"] == int(peak.peak * 1.1) and by_name["machine"]["device"] == "cpu"
    figures = count("tiny-llama", LORA)
    assert {name: by_name["count"][name] for name in figures} == figures and not by_name["count"]["full"]
    assert by_name["peak"] == {"stage": "peak", "prediction": peak.to_dict(), "verdict": "tight"}
    assert by_name["largest"]["batch"] == own.largest_batch(int(peak.peak * 1.1)) >= 4


def test_a_job_that_does_not_fit_comes_with_the_change_with_which_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = job(training={"batch_size": 64})
    small, large = Job(spec).predict(8).peak, Job(spec).predict(64).peak
    budget = (small + large) // 2
    monkeypatch.setattr(preview, "available", lambda place: budget)
    found = staged(spec)
    assert found["peak"]["verdict"] == "exceeds"
    changes = found["remedy"]["changes"]
    assert changes["training.batch_size"] < 64 and found["remedy"]["peak"] <= budget
    # The same number of rows in a step: it learns the same.
    assert changes["training.batch_size"] * changes["training.gradient_accumulation"] == 64
    assert staged(changed(spec, changes))["peak"]["verdict"] != "exceeds"
    assert found["largest"]["batch"] < 64


def test_full_fine_tuning_counts_the_base() -> None:
    found = list(itertools.islice(preview.stages(job(adapter={}, full=True)), 2))[1]
    assert found["full"] and found["base"] == count("tiny-llama", LORA)["base"]


def test_what_training_refuses_is_refused_before_it_with_the_setting_to_blame() -> None:
    quantised = job(adapter={"method": "dora"}, quantization="nf4")
    with pytest.raises(TargetError) as dora:
        staged(quantised)
    assert preview.culprit(quantised, dora.value) == "quantization"
    start = job(adapter={**LORA, "init_lora_weights": "pissa"}, quantization="int8")
    with pytest.raises(TargetError) as pissa:
        staged(start)
    assert preview.culprit(start, pissa.value) == "quantization"
    paged = job(training={"optimizer": "paged_adamw_8bit"})
    with pytest.raises(ConfigError, match=r"^training\.optimizer is 'paged_adamw_8bit'") as optimizer:
        staged(paged)
    assert preview.culprit(paged, optimizer.value) == ""
    nowhere = job(adapter={**LORA, "target_modules": ["to_k"]}, quantization="nf4")
    with pytest.raises(TargetError) as target:
        staged(nowhere)
    assert preview.culprit(nowhere, target.value) == "", "it fails over the base as it is, too"


@pytest.mark.parametrize(
    ("model", "task", "targets"),
    [("tiny-sd", "text_to_image", ["to_k", "to_q"]), ("tiny-blip", "captioning", ["query"])],
)
def test_tasks_whose_memory_is_not_followed_are_counted_and_checked_and_say_so(
    model: str, task: str, targets: list[str]
) -> None:
    lora = {**LORA, "target_modules": targets}
    found = staged(job(model, task, adapter=lora, quantization="nf4"))
    assert set(found) == {"machine", "count", "peak"} and task in found["peak"]["unknown"]
    dora = job(model, task, adapter={**lora, "method": "dora"}, quantization="nf4")
    with pytest.raises(TargetError) as refused:
        staged(dora)
    assert preview.culprit(dora, refused.value) == "quantization"


@pytest.mark.parametrize(("patience", "reached"), [(0, 2), (2000, 2), (10**9, 4)])
def test_the_stages_end_in_the_middle_of_a_simulation_when_nobody_waits(patience: int, reached: int) -> None:
    asked = itertools.count()
    found = list(preview.stages(job(), lambda: next(asked) < patience))
    assert [stage["stage"] for stage in found] == ["machine", "count", "peak", "largest"][:reached]
    # Nothing of what was broken off stays behind.
    if patience == 2000:
        assert Job(job()).predict().peak > 0


def test_rows_and_tokenizer_are_read_once_while_their_files_stay(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    shutil.copy(EXAMPLES / "lighthouse.jsonl", path)
    first = Job(job(data={"path": str(path)}))
    other = Job(job(data={"path": str(path)}, adapter={"method": "ia3"}, training={"batch_size": 2}))
    assert other.encoded is first.encoded and other.rows is first.rows
    assert other.model.loaded.processor is first.model.loaded.processor
    cut = Job(job(data={"path": str(path)}, training={"max_length": 8}))
    assert max(len(row.ids) for row in cut.encoded) == 8
    # Virtual tokens leave less of the context to a row.
    prompted = job(data={"path": str(path)}, adapter={"method": "prompt_tuning", "num_virtual_tokens": 4})
    assert Job(prompted).encoded is not first.encoded
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert len(Job(job(data={"path": str(path)})).encoded) <= 3 < len(first.encoded)


def test_every_method_has_its_cost_or_the_engines_reason() -> None:
    widgets = [forms.show(o.field, forms.read_default(o.field)) for o in recipes.fields()]
    adapters = recipes.adapters(widgets)
    assert [adapter["method"] for adapter in adapters] == [m.name for m in recipes.methods() if m is not recipes.FULL]
    found = {row["method"]: row for row in preview.methods(job(quantization="nf4"), adapters)}
    assert set(found) == {adapter["method"] for adapter in adapters}
    assert {name for name, row in found.items() if "refused" in row} == {"dora"}
    assert "quantised" in found["dora"]["refused"]
    for adapter in adapters:
        row = found[adapter["method"]]
        if "refused" not in row:
            assert row["trainable"] == count("tiny-llama", adapter)["trainable"] > 0
    pictures = {row["method"]: row for row in preview.methods(job("tiny-sd", "text_to_image"), adapters)}
    assert {"prompt_tuning", "p_tuning", "prefix_tuning"} <= {n for n, row in pictures.items() if "refused" in row}
    with pytest.raises(EngineError, match=pictures["mora"]["refused"][:20]):
        count("tiny-sd", next(adapter for adapter in adapters if adapter["method"] == "mora"), "text_to_image")
