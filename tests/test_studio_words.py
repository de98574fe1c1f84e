"""What pages and answers say of one run: numbers, progress in the reader's language, no paths of this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.train.job import DataSpec, JobSpec
from studio import adapter_words, charts, run_words, score_words, states, train_cost, words
from studio.api import Endpoints
from studio.context import Studio
from studio.i18n import KOREAN, reported, speaking
from studio.markup import number
from studio.shell import create_app
from studio.store import Row


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    with contextlib.closing(Studio.open(tmp_path)) as studio:
        yield studio


def starting(studio: Studio) -> Row:
    run = studio.store.add_run(JobSpec(model="tiny-llama", data=DataSpec(path="rows.jsonl"), name="<calm> sea"))
    studio.store.update_run(run, state=states.STARTING)
    return studio.store.run(run)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (999.4, "999"),
        (999.6, "1,000"),
        (-999.7, "-1,000"),
        (1000, "1,000"),
        (0.25, "0.25"),
        (9e-5, "9e-05"),
        (1.234e6, "1.23e+06"),
    ],
)
def test_a_number_reads_as_one(value: float, text: str) -> None:
    assert number(value) == text and number(99.6, 2) == "100"


def test_a_curve_without_a_value_above_zero_is_left_out_of_a_logarithmic_chart() -> None:
    steps = [{"step": float(step), "loss": -0.5} for step in range(5)]
    drawn = charts.loss_chart(steps, [{"step": 2.0, "loss": 0.5}], "#0072B2", 10, log=True)
    assert "evaluation from 0.5" in drawn and "<polyline" not in drawn
    waiting = charts.loss_chart(steps, [], "#0072B2", 10, log=True, waiting="nothing above zero")
    assert "nothing above zero" in waiting


def test_the_queue_says_in_the_readers_language_what_a_process_does(studio: Studio) -> None:
    row = starting(studio)
    with speaking(KOREAN):
        korean = reported("Loading tiny-llama")
        told = run_words.queue([row], {row["id"]: {"message": "Loading tiny-llama"}})
    assert korean != "Loading tiny-llama" and korean in told and "Loading" not in told


def test_every_bar_of_progress_has_a_name(studio: Studio) -> None:
    row = starting(studio)
    run = "&lt;calm&gt; sea"
    for fraction in (None, 0.5):
        work = {**row, "title": "Exporting x", "fraction": fraction, "message": "", "created": 0.0}
        assert f'role="progressbar" aria-label="{run}"' in words.run_head(row, {"fraction": fraction}, False)
        assert 'role="progressbar" aria-label="Exporting x"' in adapter_words.work(work)
        assert f'role="progressbar" aria-label="Scoring {run}"' in score_words.progress(row, ("", fraction), 1.0)


def test_no_event_tells_where_pictures_lie(studio: Studio) -> None:
    row = starting(studio)
    for fields in (
        {"prompt": "a red apple", "file": "/home/x/runs/a/samples/1.png"},
        {"prompt": "/home/x/pictures/2.png", "image": "/home/x/pictures/2.png", "text": "an apple"},
    ):
        studio.store.add_event(row["id"], {"type": "sample", "step": 1, **fields})
    events = Endpoints(studio).run_status(row["id"])["events"]
    assert "/home/x" not in str(events)
    assert [event.get("prompt") for event in events] == ["a red apple", None] and events[1]["text"] == "an apple"


def test_a_refusal_that_nobody_waits_for_is_not_shown(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def late(page: Any, spec: Any, wanted: Any) -> Iterator[dict[str, Any]]:
        # The form changes while the process works out why it cannot be.
        asked.append(newest.begin("me"))
        raise ConfigError("too late")
        yield {}

    newest = train_cost.Newest()
    monkeypatch.setattr(train_cost, "asked", late)
    monkeypatch.setattr(train_cost, "Newest", lambda: newest)
    monkeypatch.setattr(train_cost, "PAUSE", 0.0)
    monkeypatch.setattr(train_cost, "read_form", lambda *inputs, **how: JobSpec(model="x", data=DataSpec(path="x")))
    blocks = create_app(studio)
    cost = next(it.fn for it in blocks.fns.values() if it.fn and it.name == "cost")
    values = [None, "causal_lm", *[None] * 5, "lora", *[None] * 100]
    found = list(cost(SimpleNamespace(session_hash="me"), [], *values))
    assert len(asked) == 1 and len(found) == 1 and "too late" not in str(found)
