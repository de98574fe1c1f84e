"""The guided path without a browser: what stands in the address, defaults, options, the jobs that come of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.models.catalogue import BUILTIN
from studio import demo, guide, guide_words
from studio.context import Studio
from studio.datasets import Datasets
from studio.guide import GOALS, SAMPLE, STEPS, TASTE
from studio.samples import SAMPLES
from studio.tabs.start import misfit

NOTHING: list[Any] = []


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    with contextlib.closing(Studio.open(tmp_path)) as studio:
        yield studio


@pytest.mark.parametrize("goal", GOALS)
def test_every_recipe_of_every_goal_is_a_job_on_the_base_that_is_there(studio: Studio, goal: str) -> None:
    path = guide.begin(goal, NOTHING)
    assert BUILTIN[path.model].bundled
    found = Datasets(studio.store, studio.home).bring_in(guide.sample_of(path).rows())
    row = studio.store.dataset(found.id)
    assert path.about.takes(row)
    options = guide.preset_options(path)
    assert options[0].value == path.preset and options[-1].value == TASTE
    for option in options:
        spec = guide.job(replace(path, preset=option.value), row)
        assert (spec.task, spec.model, spec.data.path) == (path.about.task, path.model, row["path"])
        assert (spec.training.max_steps == guide.TASTE_STEPS) == (option.value == TASTE)


def test_the_samples_own_recipe_is_kept_whole(studio: Studio) -> None:
    path = guide.begin("style", NOTHING)
    found = Datasets(studio.store, studio.home).bring_in(guide.sample_of(path).rows())
    assert path.preset == SAMPLE
    spec, sample = guide.job(path, studio.store.dataset(found.id)), guide.sample_of(path).spec()
    assert (spec.training, spec.options, dict(spec.adapter)) == (sample.training, sample.options, dict(sample.adapter))


def test_a_larger_base_brings_the_sample_that_was_made_for_it() -> None:
    path = guide.settled(replace(guide.begin("chat", NOTHING), model="smollm2-135m-instruct"), NOTHING)
    assert guide.sample_of(path).name == "captain" and path.preset == SAMPLE


def test_own_texts_are_not_said_to_be_in_the_samples_languages(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("source,target\n" + "".join(f"a {n},b {n}\n" for n in range(9)))
    found = Datasets(studio.store, studio.home).bring_in(tmp_path / "own.csv")
    path = guide.begin("translator", studio.store.datasets(), found.id)
    assert path.data == found.id and path.preset == "quick-look"
    assert "prefix" not in guide.job(path, studio.store.dataset(found.id)).options
    assert "prefix" in guide.job(replace(path, preset="translate"), studio.store.dataset(found.id)).options


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("step", STEPS[1:])
def test_a_path_comes_back_from_the_address(goal: str, step: str) -> None:
    path = replace(guide.begin(goal, NOTHING), step=step)
    assert guide.read(str(path), NOTHING) == path
    assert path.on().step == STEPS[min(STEPS.index(step) + 1, 4)]
    assert path.back() == (guide.Path() if step == "data" else replace(path, step=STEPS[STEPS.index(step) - 1]))


@pytest.mark.parametrize(
    "text",
    [
        "",
        None,
        "chat",
        "chat.check",
        "nothing.data.sample.tiny-llama.sample",
        "chat.goal.sample.tiny-llama.sample",
        "chat.data.../../x.tiny-llama.sample",
        "chat.<b>.sample.tiny-llama.sample",
        "a" * 10_000,
    ],
)
def test_what_is_no_path_is_the_beginning(text: str | None) -> None:
    assert guide.read(text, NOTHING) == guide.Path()


def test_answers_that_are_no_longer_there_are_at_their_defaults() -> None:
    path = guide.read("chat.check.0123456789abcdef.minilm.translate", NOTHING)
    assert path == replace(guide.begin("chat", NOTHING), step="check")


def test_rows_for_another_goal_say_which(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("text,label\n" + "".join(f"number {n},{n % 2}\n" for n in range(20)))
    (tmp_path / "open.csv").write_text("x,y,z\n1,2,3\n4,5,6\n7,8,9\n")
    datasets = Datasets(studio.store, studio.home)
    labels = datasets.bring_in(tmp_path / "labels.csv")
    assert misfit(guide.begin("classifier", NOTHING), labels) == ""
    said = misfit(guide.begin("chat", NOTHING), labels)
    assert f'data-goal="classifier" data-rows="{labels.id}"' in said and 'data-goal="style"' not in said


def test_names_from_outside_never_become_markup() -> None:
    hostile = "<img src=x onerror=alert(1)>"
    drawn = guide_words.options([guide.Option(hostile, hostile, hostile, (hostile,))], hostile)
    assert "<img" not in drawn


def test_in_the_demo_only_bases_that_it_opens_are_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDIO_DEMO", "1")
    monkeypatch.setenv("STUDIO_DEMO_MODELS", "")
    larger = SAMPLES["captain"]
    assert f'data-sample="{larger.name}"' not in guide_words.goals()
    for goal in GOALS:
        path = guide.begin(goal, [])
        offered = [option.value for option in guide.model_options(path)]
        assert offered and path.model in offered
        assert all(demo.offers(name) for name in offered), offered
    monkeypatch.delenv("STUDIO_DEMO_MODELS")
    assert larger.spec().model in [option.value for option in guide.model_options(guide.begin("chat", []))]
    assert f'data-sample="{larger.name}"' in guide_words.goals()
