"""docs/jobs.md says what a job's dataclasses say."""

from __future__ import annotations

import dataclasses

import pytest

from engine.tasks import TASKS, get_task
from engine.train.job import DataSpec, JobSpec, TrainingSpec
from scripts import jobs_page


def test_the_page_is_what_the_code_makes() -> None:
    assert jobs_page.PAGE.read_text(encoding="utf-8") == jobs_page.page(), "run python scripts/jobs_page.py"


@pytest.mark.parametrize("kind", [JobSpec, DataSpec, TrainingSpec, *(type(get_task(name)) for name in TASKS)])
def test_every_key_has_its_meaning(kind: type) -> None:
    told = jobs_page.meanings(kind)
    assert {*told} == {field.name for field in dataclasses.fields(kind)}
    assert all(text.endswith(".") for text in told.values())
