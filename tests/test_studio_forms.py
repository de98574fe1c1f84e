"""Presets, form fields and charts: pure functions, every preset a job that can run."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.tasks import TASKS, get_task
from engine.train.job import JobSpec, TrainingSpec
from studio import charts, forms, markup, presets, recipes, samples

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
        options=preset.options,
        quantization=preset.quantization,
    )
    assert spec.quantization == preset.quantization
    for key, value in preset.training.items():
        assert getattr(spec.training, key) == value, key
    for key, value in preset.adapter.items():
        assert spec.adapter.get(key) == value, key
    assert JobSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(("task", "name"), EVERY_PRESET)
def test_a_filled_form_is_the_job_of_its_preset_and_comes_back_from_a_run(task: str, name: str) -> None:
    form = recipes.task_of(task)
    dataset = {**DATASET, "name": "rows.jsonl", "format": form.formats[0]}

    def through_the_form(recipe: dict[str, Any]) -> JobSpec:
        values = recipes.shown_values(recipe)
        return recipes.job(
            dataset,
            task=task,
            base=form.base,
            preset=name,
            eval_split=recipe["eval_split"],
            name="",
            quantization=recipe["quantization"],
            method=recipe["adapter"]["method"],
            values=[values.get(owned.key, "not shown") for owned in recipes.fields()],
        )

    preset = form.presets[name]
    spec = through_the_form(recipes.of_preset(form, preset))
    assert spec.task == task and spec.quantization == preset.quantization
    assert {key: spec.options[key] for key in preset.options} == dict(preset.options)
    assert spec.adapter.get("target_modules") == preset.adapter.get(
        "target_modules", spec.adapter.get("target_modules")
    )
    get_task(task, spec.options)
    again = through_the_form(recipes.of_spec(spec.to_dict()))
    assert again == spec
    full = through_the_form({**recipes.of_preset(form, preset), "adapter": {"method": "full"}, "quantization": "none"})
    assert full.full and not full.adapter and recipes.of_spec(full.to_dict())["adapter"] == {"method": "full"}


def test_the_form_offers_every_task_with_what_it_learns_from_and_a_base_that_can() -> None:
    assert {task.name for task in recipes.tasks()} == set(TASKS)
    for task in recipes.tasks():
        assert task.formats == get_task(task.name).formats
        assert task.base in {name for _, name in recipes.bases(task)} or "/" in task.base
        assert {option.name for option in task.options} <= {
            field.metadata.get("option", field.name) for field in dataclasses.fields(get_task(task.name))
        }
    assert [task.name for task in recipes.tasks_for("labels")] == ["classification"]


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
    # Captions are asked for pictures that are held back.
    assert sample.rows().is_file() and (spec.training.sample_prompts or spec.task == "captioning")


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
    assert "<img" not in charts.drawing(hostile, [charts.Curve(hostile, [(0, 1), (1, 2)], hostile)]).html()
    assert "<img" not in markup.notice("error", hostile, hostile, hostile)


@pytest.mark.parametrize(
    ("seconds", "said"), [(None, ""), (4.4, "4 s"), (125, "2 min 05 s"), (4320, "1 h 12 min"), (float("inf"), "")]
)
def test_durations_are_said_as_people_say_them(seconds: float | None, said: str) -> None:
    assert markup.seconds(seconds) == said
