"""The Train form in a real browser: costs, what cannot be combined, jobs as text, presets of one's own, differences."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from studio_server import serving
from test_browser import browser, page, pytestmark, shoot, sync_api  # noqa: F401

from engine.paths import REPOSITORY
from engine.train.job import JobSpec
from studio import states
from studio.context import Studio
from studio.datasets import Datasets

pytestmark = [*pytestmark, pytest.mark.pages]

WAIT = 120_000


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a data set and a run that ended, whose steps took half a second each."""
    home = tmp_path_factory.mktemp("home")
    with contextlib.closing(Studio.open(home)) as studio:
        found = Datasets(studio.store, home).bring_in(REPOSITORY / "examples" / "lighthouse.jsonl")
        training = {"max_steps": 36, "max_length": 128, "batch_size": 8, "learning_rate": 0.001}
        spec = {
            "name": "the keeper",
            "model": "tiny-llama",
            "data": {"path": studio.store.dataset(found.id)["path"], "format": "messages", "eval_split": 0.1},
            "adapter": {"method": "lora", "r": 8, "target_modules": "all-linear"},
            "training": training,
        }
        run = studio.jobs.submit(JobSpec.from_dict(spec), found.id)
        studio.store.update_run(run, state=states.DONE, started=time.time() - 60, ended=time.time(), step=36)
    return home


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[str]:
    sync_api.expect.set_options(timeout=WAIT)
    with serving(home) as running:
        yield running.address


def opened(page: Any, server: str) -> None:  # noqa: F811
    """The form with the toy as its base, whose costs are found out in a moment."""
    page.set_default_timeout(WAIT)
    page.goto(f"{server}/?tab=train")
    page.locator("#train-start").wait_for()
    choose(page, "#train-base", "Tiny Llama (toy)")


def choose(page: Any, widget: str, option: str) -> None:  # noqa: F811
    page.locator(f"{widget} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def box(page: Any, widget: str) -> Any:  # noqa: F811
    return page.locator(f"{widget} textarea, {widget} input").first


def expect(page: Any, selector: str) -> Any:  # noqa: F811
    return sync_api.expect(page.locator(selector))


def test_memory_parameters_and_the_methods_costs_stand_before_the_start(page: Any, server: str) -> None:  # noqa: F811
    opened(page, server)
    expect(page, "#train-count [data-verdict]").to_have_text("fits")
    expect(page, "#train-count").to_contain_text("The largest batch that fits:")
    expect(page, "#train-count").to_contain_text("131,072 of")
    expect(page, "#train-count").to_contain_text("36 steps")
    assert page.locator("#train-count .tc-bar i").count() >= 5
    assert page.locator("#field-processes").is_hidden(), "one device has no use for more processes"
    page.get_by_role("button", name="What each method costs here").click()
    expect(page, "#train-methods .tc-methods:not([aria-busy]) tbody tr").to_have_count(15)
    rows = page.locator("#train-methods tbody tr").all_inner_texts()
    assert "131,072" in rows[0] and "chosen" in rows[0] and "Full fine-tuning" in rows[-1]
    shoot(page, "train-cost")


def test_what_cannot_be_is_refused_at_its_field_before_the_start(page: Any, server: str) -> None:  # noqa: F811
    opened(page, server)
    start = sync_api.expect(page.locator("#train-start"))
    box(page, "#field-learning_rate").fill("fast")
    expect(page, "#field-learning_rate").to_contain_text("learning_rate is 'fast'; needed: a number")
    start.to_be_disabled()
    expect(page, "#train-fault").to_contain_text("learning_rate is 'fast'")
    box(page, "#field-learning_rate").fill("0.002")
    expect(page, "#field-learning_rate").to_contain_text("How big each step is")
    start.to_be_enabled()
    assert box(page, "#field-learning_rate").input_value() == "0.002", "what was typed stays"

    # The reason is the engine's, found on the base's own shapes.
    choose(page, "#train-method", "DoRA")
    page.get_by_role("button", name="Advanced").click()
    choose(page, "#field-quantization", "4 bits (nf4)")
    expect(page, "#field-quantization").to_contain_text("is quantised")
    expect(page, "#train-count .notice.error").to_contain_text("DoRA needs the norms")
    start.to_be_disabled()
    shoot(page, "train-refused")
    page.click("#train-remedy")
    expect(page, "#field-quantization input").to_have_value("as it is (none)")
    expect(page, "#field-quantization").to_contain_text("Fewer bits")
    start.to_be_enabled()
    expect(page, "#train-count [data-verdict]").to_be_visible()

    choose(page, "#field-optimizer", "paged_adamw_8bit")
    expect(page, "#field-optimizer").to_contain_text("NVIDIA card and the machine's memory")
    start.to_be_disabled()
    choose(page, "#field-optimizer", "adamw")
    start.to_be_enabled()
    choose(page, "#train-method", "Full fine-tuning")
    choose(page, "#field-quantization", "8 bits (int8)")
    expect(page, "#train-method").to_contain_text("codes of a few bits cannot take small steps")
    start.to_be_disabled()


def test_a_job_goes_out_as_a_file_and_comes_in_as_text(page: Any, server: str, tmp_path: Path) -> None:  # noqa: F811
    opened(page, server)
    box(page, "#field-max_length").fill("96")
    page.get_by_role("button", name="As a file and a command").click()
    expect(page, "#train-same").to_contain_text("max_length: 96")
    expect(page, "#train-command").to_contain_text("python -m engine train job.yaml --out my-run")
    with page.expect_download() as download:
        page.click("#train-save")
    assert download.value.suggested_filename == "job.yaml"
    download.value.save_as(tmp_path / "job.yaml")
    job = yaml.safe_load((tmp_path / "job.yaml").read_text(encoding="utf-8"))
    assert JobSpec.from_dict(job).training.max_length == 96 and job["model"] == "tiny-llama"

    taken = {**job, "data": {"path": "/etc/passwd"}, "quantization": "int8"}
    taken["training"] = {**job["training"], "batch_size": 3}
    box(page, "#train-paste").fill(yaml.safe_dump({**taken, "hooks": "x", "model": "/etc"}))
    page.click("#train-take")
    expect(page, "#train-text-fault").to_contain_text("hooks is not a key of a job")
    assert box(page, "#field-batch_size").input_value() == "8"
    box(page, "#train-paste").fill(yaml.safe_dump(taken))
    page.click("#train-take")
    expect(page, "#train-text-fault").to_contain_text("The form is filled")
    sync_api.expect(box(page, "#field-batch_size")).to_have_value("3")
    expect(page, "#train-dataset input").to_have_value("lighthouse.jsonl (304 rows)")
    expect(page, "#train-same").to_contain_text("quantization: int8")
    assert "passwd" not in page.locator("#train-same").inner_text()

    (tmp_path / "other.json").write_text(json.dumps({**job, "task": "preference", "options": {}}), encoding="utf-8")
    page.set_input_files("#train-upload input[type=file], input[type=file][accept*='.yaml']", tmp_path / "other.json")
    expect(page, "#train-task input").to_have_value("Better and worse answers")
    # The rows that are chosen are no pairs, so others have to be chosen.
    expect(page, "#train-to-data").to_be_visible()


def test_a_preset_of_ones_own_is_kept_used_deleted_and_brought_back(page: Any, server: str) -> None:  # noqa: F811
    opened(page, server)
    box(page, "#field-batch_size").fill("5")
    page.get_by_role("button", name="Presets of your own").click()
    page.click("#train-own-save")
    expect(page, "#train-own-said").to_contain_text("Give it a name")
    box(page, "#train-own-name").fill("small batches")
    page.click("#train-own-save")
    expect(page, "#train-own-said").to_contain_text("Kept as small batches")
    expect(page, "#train-own-choice input").to_have_value("small batches (Chat and text)")
    shoot(page, "train-own")
    page.goto(f"{server}/?tab=train")
    page.get_by_role("button", name="Presets of your own").click()
    sync_api.expect(box(page, "#field-batch_size")).to_have_value("8")
    choose(page, "#train-own-choice", "small batches (Chat and text)")
    page.click("#train-own-use")
    sync_api.expect(box(page, "#field-batch_size")).to_have_value("5")
    expect(page, "#train-base input").to_have_value("Tiny Llama (toy)")
    expect(page, "#train-start").to_be_visible()
    page.click("#train-own-delete")
    expect(page, "#train-own-said").to_contain_text("small batches is deleted")
    expect(page, "#train-own-choice").to_be_hidden()
    page.click("#train-own-undo")
    expect(page, "#train-own-choice input").to_have_value("small batches (Chat and text)")


def test_a_form_filled_from_a_run_says_what_differs_from_it(page: Any, server: str, home: Path) -> None:  # noqa: F811
    page.set_default_timeout(WAIT)
    with contextlib.closing(Studio.open(home)) as studio:
        run = next(row["id"] for row in studio.store.runs() if row["name"] == "the keeper")
    page.goto(f"{server}/?run={run}")
    page.get_by_role("button", name="Change settings").click()
    expect(page, "#train-diff").to_contain_text("As in the keeper: no setting is changed")
    box(page, "#field-learning_rate").fill("0.01")
    expect(page, "#train-diff table").to_contain_text("training.learning_rate")
    row = page.locator("#train-diff tbody tr").first.inner_text()
    assert "0.001" in row and "0.01" in row.replace("0.001", "")
    shoot(page, "train-differences")
