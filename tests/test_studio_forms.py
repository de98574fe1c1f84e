"""Presets, form fields and charts: pure functions, every preset a job that can run."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.train.job import JobSpec, TrainingSpec
from studio import charts, forms, markup, presets, samples

DATASET = {"path": "rows.jsonl", "format": "messages", "columns": {"messages": "messages"}}
EVERY_PRESET = [(task, name) for task, form in presets.tasks().items() for name in form.presets]


@pytest.mark.parametrize(("task", "name"), EVERY_PRESET)
def test_every_preset_is_a_job_and_comes_back_from_its_form_unchanged(task: str, name: str) -> None:
    form = presets.tasks()[task]
    preset = form.presets[name]
    method = presets.methods()[preset.adapter["method"]]
    adapter, training = forms.preset_values(form, method, preset)
    again = forms.read_all(method.fields, [forms.show(f, adapter[f.name]) for f in method.fields])
    assert again == adapter
    again = forms.read_all(form.fields, [forms.show(f, training[f.name]) for f in form.fields])
    assert again == training
    spec = forms.job(
        name=name,
        task=task,
        model="tiny-llama",
        dataset=DATASET,
        eval_split=preset.eval_split,
        method=method.name,
        adapter=adapter,
        training=training,
        quantization=preset.quantization,
    )
    assert spec.quantization == preset.quantization
    for key, value in preset.training.items():
        assert getattr(spec.training, key) == value, key
    for key, value in preset.adapter.items():
        assert spec.adapter[key] == value, key
    assert JobSpec.from_dict(spec.to_dict()) == spec


def test_every_preset_names_only_fields_that_the_form_shows() -> None:
    for form in presets.tasks().values():
        for preset in form.presets.values():
            method = presets.methods()[preset.adapter["method"]]
            assert set(preset.training) <= {field.name for field in form.fields}
            assert set(preset.adapter) - {"method"} <= {field.name for field in method.fields}


def test_the_form_shows_every_training_field_with_the_defaults_of_the_job() -> None:
    fields = {field.name: field for field in presets.tasks()["causal_lm"].fields}
    assert set(fields) == {field.name for field in dataclasses.fields(TrainingSpec)}
    plain = TrainingSpec()
    for name, field in fields.items():
        expected = getattr(plain, name)
        assert forms.read_default(field) == (list(expected) if isinstance(expected, tuple) else expected), name


def test_the_recipes_are_there_by_their_numbers() -> None:
    lora = presets.methods()["lora"].presets
    assert lora["conservative"] == {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1}
    assert lora["aggressive"] == {"r": 64, "lora_alpha": 128, "lora_dropout": 0.05}
    chat = presets.tasks()["causal_lm"].presets["chat-sft"]
    assert chat.quantization == "nf4"
    with pytest.raises(ConfigError, match="int3"):
        dataclasses.replace(chat, quantization="int3")
    assert (chat.adapter["r"], chat.adapter["lora_alpha"], chat.training["max_length"]) == (64, 16, 2048)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("r", "0", "1 to 256"),
        ("r", "2.5", "whole number"),
        ("learning_rate", "fast", "a number"),
        ("learning_rate", "nan", "needed"),
        ("learning_rate", "", "empty"),
        ("schedule", "sideways", "one of linear"),
        ("batch_size", "1e999", "1 to 512"),
    ],
)
def test_a_value_that_cannot_work_is_named_with_what_is_needed(name: str, value: str, words: str) -> None:
    fields = [*presets.methods()["lora"].fields, *presets.tasks()["causal_lm"].fields]
    values = [value if f.name == name else forms.show(f, forms.read_default(f)) for f in fields]
    with pytest.raises(ConfigError) as fault:
        forms.read_all(fields, values)
    assert name in fault.value.message and words in fault.value.message


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("all-linear", "all-linear"),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("q_proj", ["q_proj"]),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        ("", None),
    ],
)
def test_names_are_read_as_people_write_them(typed: str, meant: Any) -> None:
    field = next(f for f in presets.methods()["lora"].fields if f.name == "target_modules")
    assert forms.read(field, typed) == meant


@pytest.mark.parametrize("sample", samples.SAMPLES.values(), ids=lambda sample: sample.name)
def test_every_sample_is_a_job_with_rows_and_a_prompt_to_compare_with(sample: samples.Sample) -> None:
    spec = sample.spec()
    assert sample.rows().is_file() and spec.training.sample_prompts


def test_decimation_keeps_the_spike_and_the_limit() -> None:
    points = [(float(x), 1.0) for x in range(10_000)]
    points[7_777] = (7_777.0, 50.0)
    kept = charts.decimate(points)
    assert len(kept) <= charts.POINTS and (7_777.0, 50.0) in kept
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


def test_smoothing_starts_at_the_first_value_and_stays_inside() -> None:
    points = [(float(x), float(x % 2)) for x in range(100)]
    smoothed = charts.smooth(points, 0.9)
    assert smoothed[0] == (0.0, 0.0)
    assert all(0.3 < y < 0.7 for _, y in smoothed[30:])
    assert charts.smooth(points, 0.0) == points


def test_a_chart_of_a_long_run_stays_small_and_an_empty_one_says_why() -> None:
    steps: list[dict[str, float | None]] = [{"step": x, "loss": 3.0 - x / 5_000} for x in range(10_000)]
    steps[5]["loss"] = None
    drawn = charts.loss_chart(steps, [{"step": 0, "loss": 3.0}], "#0072B2", 10_000)
    assert len(drawn) < 40_000 and "from 3 to 1" in drawn
    assert "not yet" in charts.loss_chart([], [], "#0072B2", None, waiting="not yet")
    assert "polyline" in charts.loss_chart(steps, [], "#0072B2", 10_000, log=True)


def test_text_from_outside_never_becomes_markup() -> None:
    hostile = "<img src=x onerror=alert(1)>\"'${document.cookie}{{value}}`"
    safe = markup.esc(hostile)
    assert not re.search(r"[<>\"'${}`]", safe)
    assert "<img" not in charts.chart(hostile, [charts.Curve(hostile, [(0, 1), (1, 2)], hostile)])
    assert "<img" not in markup.notice("error", hostile, hostile, hostile)


@pytest.mark.parametrize(
    ("seconds", "said"), [(None, ""), (4.4, "4 s"), (125, "2 min 05 s"), (4320, "1 h 12 min"), (float("inf"), "")]
)
def test_durations_are_said_as_people_say_them(seconds: float | None, said: str) -> None:
    assert markup.seconds(seconds) == said
