"""The Runs page in a real browser: the queue, search and tags, curves and settings together, clone, bin and undo."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from studio_server import serving
from test_browser import browser, page, pytestmark, shoot, sync_api  # noqa: F401

from engine.train.job import DataSpec, JobSpec, TrainingSpec
from studio import process, states
from studio.context import Studio
from studio.history import PAGE
from studio.jobs import Jobs
from studio.store import Store

pytestmark = [*pytestmark, pytest.mark.pages]

STEPS = 60
DATASET = "0123456789abcdef"


def submit(studio: Studio, name: str, rank: int = 4, rate: float = 2e-4) -> str:
    spec = JobSpec(
        model="tiny-llama",
        data=DataSpec(path=str(studio.home / "rows.jsonl"), format="prompt_completion"),
        adapter={"method": "lora", "r": rank},
        training=TrainingSpec(max_steps=STEPS, learning_rate=rate),
        name=name,
    )
    return studio.jobs.submit(spec, DATASET)


def curve(studio: Studio, run: str, last: int, began: float, floor: float = 1.0) -> None:
    """Events of a run that came to step `last`."""
    studio.store.add_event(run, {"type": "start", "total_steps": STEPS, "eval_rows": 4, "time": began})
    for step in range(1, last + 1):
        loss = floor + 2 * math.exp(-step / 15)
        moment = began + 2 * step
        studio.store.add_event(run, {"type": "step", "step": step, "loss": loss, "tokens": 100, "time": moment})
        if step % 20 == 0:
            studio.store.add_event(run, {"type": "eval", "step": step, "loss": loss + 0.1, "time": moment})


def finished(studio: Studio, name: str, age: float, state: str = states.DONE, **settings: Any) -> str:
    """A run that ended `age` seconds ago, as far as anybody can see."""
    run, now = submit(studio, name, **settings), time.time()
    curve(studio, run, STEPS, now - age - 2 * STEPS, 1.0 + age / 10_000)
    (studio.jobs.folder(run) / "adapter").mkdir()
    (studio.jobs.folder(run) / "adapter" / "adapter_model.safetensors").write_bytes(bytes(200_000))
    studio.store.update_run(run, state=state, created=now - age, started=now - age - 2 * STEPS, ended=now - age)
    return run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with 30 runs of yesterday, one that trains (its process sleeps), and three that wait."""
    sync_api.expect.set_options(timeout=60_000)
    home = tmp_path_factory.mktemp("home")
    rows = [json.dumps({"prompt": f"What is {number}?", "completion": f"It is {number}."}) for number in range(40)]
    (home / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3000)"], start_new_session=True)
    with contextlib.closing(Studio.open(home)) as studio:
        row = {"id": DATASET, "name": "answers.csv", "format": "prompt_completion", "columns": {}, "rows": 40}
        studio.store.save_dataset({**row, "path": str(home / "rows.jsonl"), "profile": {}, "created": time.time()})
        for number in range(PAGE + 3):
            finished(studio, f"earlier {number}", 86_400.0 - number)
        finished(studio, "parrot", 3600, rank=8, rate=1e-3)
        finished(studio, "captain", 1800, states.STOPPED)
        now = submit(studio, "on its way")
        curve(studio, now, 30, time.time() - 60)
        began = process.started_at(sleeper.pid)
        studio.store.update_run(now, state=states.RUNNING, pid=sleeper.pid, pid_started=began, started=time.time() - 60)
        for name in ("alpha", "beta", "gamma"):
            submit(studio, name)
    yield home
    sleeper.kill()
    sleeper.wait()


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[str]:
    with serving(home) as running:
        yield running.address


def lines(page: Any) -> Any:  # noqa: F811
    return page.locator("#runs-table tbody tr")


def line(page: Any, name: str) -> Any:  # noqa: F811
    return lines(page).filter(has=page.get_by_role("button", name=name, exact=True))


def waiting(page: Any) -> Any:  # noqa: F811
    return page.locator("#runs-queue .rq-item .link")


def press(page: Any, label: str) -> None:  # noqa: F811
    page.locator("#runs-queue").get_by_role("button", name=label, exact=True).click()


def opened(page: Any, server: str) -> None:  # noqa: F811
    page.goto(f"{server}/?tab=runs")
    lines(page).first.wait_for()


def test_the_queue_is_moved_by_buttons_keys_and_dragging_and_stays_so(
    page: Any,  # noqa: F811
    server: str,
    home: Path,
) -> None:
    opened(page, server)
    assert "on its way" in page.locator("#runs-queue .rq-now").inner_text()
    assert "step 30 of 60" in page.locator("#runs-queue .rq-now").inner_text()
    assert waiting(page).all_inner_texts() == ["alpha", "beta", "gamma"]
    press(page, "Train gamma next")
    sync_api.expect(waiting(page)).to_have_text(["gamma", "alpha", "beta"])
    # By the keyboard: the focus goes along with the run that moves.
    page.locator("#runs-queue").get_by_role("button", name="gamma one place down", exact=True).focus()
    page.keyboard.press("Enter")
    sync_api.expect(waiting(page)).to_have_text(["alpha", "gamma", "beta"])
    page.wait_for_function("document.activeElement.getAttribute('aria-label') === 'gamma one place down'")
    page.keyboard.press("Enter")
    sync_api.expect(waiting(page)).to_have_text(["alpha", "beta", "gamma"])
    page.wait_for_function("document.activeElement.dataset.queued && !document.activeElement.disabled")
    items = page.locator("#runs-queue .rq-item")
    items.nth(2).drag_to(items.nth(0), target_position={"x": 300, "y": 3})
    sync_api.expect(waiting(page)).to_have_text(["gamma", "alpha", "beta"])

    # Another server on the same home moves one; this page follows.
    with contextlib.closing(Store(home)) as store:
        other = Jobs(store, home)
        other.reorder(other.waiting()[2], "next")
    sync_api.expect(waiting(page)).to_have_text(["beta", "gamma", "alpha"])
    press(page, "Take gamma out of the queue")
    sync_api.expect(waiting(page)).to_have_text(["beta", "alpha"])
    opened(page, server)
    assert waiting(page).all_inner_texts() == ["beta", "alpha"]
    press(page, "Take alpha out of the queue")
    page.click("#runs-undo")
    sync_api.expect(waiting(page)).to_have_text(["beta", "alpha"])
    page.locator("#runs-queue").get_by_role("button", name="Watch").click()
    page.locator("#live-head .run-head >> text=on its way").wait_for()


def test_the_queue_is_moved_by_a_finger(browser: Any, server: str) -> None:  # noqa: F811
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    view = context.new_page()
    view.set_default_timeout(60_000)
    opened(view, server)
    names = waiting(view).all_inner_texts()
    assert len(names) == 2
    touch = context.new_cdp_session(view)

    def finger(kind: str, *places: tuple[float, float]) -> None:
        points = [{"x": x, "y": y} for x, y in places]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    def box(part: str, number: int) -> dict[str, float]:
        found = view.locator(f"#runs-queue .rq-item {part}".strip()).nth(number).bounding_box()
        assert found is not None
        return dict(found)

    grip, first = box(".rq-grip", 1), box("", 0)
    start = (grip["x"] + grip["width"] / 2, grip["y"] + grip["height"] / 2)
    finger("touchStart", start)
    finger("touchMove", (start[0], first["y"] + first["height"] / 2))
    finger("touchMove", (start[0], first["y"] + 4))
    view.locator("#runs-queue .rq-item.above").wait_for()
    assert view.locator("#runs-queue .rq-item.moving").count() == 1
    finger("touchEnd")
    sync_api.expect(waiting(view)).to_have_text(names[::-1])
    assert view.locator("#runs-queue :is(.above, .below, .moving)").count() == 0
    # Anywhere else a finger scrolls, and the queue stays as it is.
    named = box(".rq-facts", 1)
    view.evaluate("window.scrollTo(0, 0)")
    finger("touchStart", (named["x"] + 60, named["y"] + 5))
    for step in range(1, 9):
        finger("touchMove", (named["x"] + 60, named["y"] + 5 - 20 * step))
    finger("touchEnd")
    view.wait_for_function("window.scrollY > 20")
    assert waiting(view).all_inner_texts() == names[::-1]
    context.close()


def test_runs_are_tagged_renamed_found_and_ordered(page: Any, server: str) -> None:  # noqa: F811
    opened(page, server)
    assert lines(page).count() == PAGE
    page.click("#runs-more")
    sync_api.expect(lines(page)).not_to_have_count(PAGE)
    page.locator("#runs-search textarea, #runs-search input").first.fill("parrot")
    sync_api.expect(lines(page)).to_have_count(1)
    assert lines(page).locator("svg.spark").count() == 1
    sync_api.expect(lines(page)).to_contain_text("kB")
    page.locator("#runs-table").get_by_role("button", name="parrot", exact=True).click()
    page.locator("#runs-head >> text=parrot").wait_for()
    for tag in ("for the paper", "seed 2"):
        page.locator("#runs-tag textarea, #runs-tag input").first.fill(tag)
        page.keyboard.press("Enter")
        line(page, "parrot").get_by_role("button", name=tag, exact=True).wait_for()
    page.locator("#runs-name textarea, #runs-name input").first.fill("the old parrot")
    page.click("#runs-rename")
    page.locator("#runs-head >> text=the old parrot").wait_for()

    opened(page, server)
    line(page, "the old parrot").get_by_role("button", name="for the paper").click()
    sync_api.expect(page.locator("#runs-search textarea, #runs-search input").first).to_have_value("for the paper")
    sync_api.expect(lines(page)).to_have_count(1)
    page.locator("#runs-table").get_by_role("button", name="the old parrot", exact=True).click()
    page.locator("#runs-tags").get_by_role("button", name="Take the tag seed 2 off").click()
    sync_api.expect(line(page, "the old parrot").locator(".run-tag")).to_have_count(1)

    page.locator("#runs-search textarea, #runs-search input").first.fill("nothing has this name")
    page.locator("#runs-table >> text=No run fits").wait_for()
    page.locator("#runs-search textarea, #runs-search input").first.fill("")
    sync_api.expect(lines(page)).to_have_count(PAGE)
    page.locator("#runs-table [data-sort=loss]").click()
    page.locator("#runs-table th[aria-sort=ascending] [data-sort=loss]").wait_for()
    losses = [float(text) for text in page.locator("#runs-table .rl-loss .num").all_inner_texts()]
    assert len(losses) > 10 and losses == sorted(losses)
    page.locator("#runs-state input").click()
    page.get_by_role("option", name="Paused or stopped").click()
    sync_api.expect(lines(page).filter(has=page.locator(".st-badge.good"))).to_have_count(0)
    assert line(page, "captain").count() == 1 and line(page, "on its way").count() == 0


def test_curves_and_settings_of_chosen_runs_and_their_settings_again(page: Any, server: str) -> None:  # noqa: F811
    opened(page, server)
    for name in ("captain", "the old parrot"):
        line(page, name).locator("input[type=checkbox]").check()
    page.locator("#runs-picked >> text=2 runs chosen").wait_for()
    colours = {
        line(page, name).locator(".spark polyline").get_attribute("style") for name in ("captain", "the old parrot")
    }
    drawn = page.locator("#together-curves .chart").first.locator("polyline.thick")
    sync_api.expect(drawn).to_have_count(2)
    assert {drawn.nth(number).get_attribute("style") for number in range(2)} == colours
    page.locator("#together-by").get_by_text("Time of training").click()
    page.locator("#together-curves >> text=minutes of training").first.wait_for()
    before = drawn.first.get_attribute("points")
    page.locator("#together-log input").check()
    sync_api.expect(drawn.first).not_to_have_attribute("points", before)

    settings = page.locator("#together-diff tbody tr")
    assert settings.locator("code").all_inner_texts() == ["adapter.r", "training.learning_rate"]
    assert "Capacity" in settings.first.inner_text() and "Learning rate" in settings.last.inner_text()
    page.locator("#together-whole input").check()
    sync_api.expect(settings.filter(has_text="training.max_steps")).to_have_count(1)
    assert page.locator("#together-diff tr.differs").count() == 2
    line(page, "captain").locator("button.link").click()
    page.locator("#runs-head >> text=captain").wait_for()
    page.wait_for_timeout(800)
    shoot(page, "runs-together")

    page.click("#runs-clear")
    sync_api.expect(page.locator("#runs-together")).to_be_hidden()
    assert page.locator("#runs-table input:checked").count() == 0
    page.locator("#runs-table").get_by_role("button", name="the old parrot", exact=True).click()
    page.locator("#runs-head >> text=the old parrot").wait_for()
    page.click("#runs-reuse")
    page.locator("#train-start >> text=Train on these").wait_for()
    sync_api.expect(page.locator("#field-lora-r input, #field-lora-r textarea").first).to_have_value("8")
    rate = page.locator("#field-learning_rate input, #field-learning_rate textarea").first
    sync_api.expect(rate).to_have_value("0.001")
    assert page.locator("#live-head .run-head").is_hidden()


def test_runs_go_to_the_bin_come_back_and_leave_for_good(page: Any, server: str, home: Path) -> None:  # noqa: F811
    opened(page, server)
    line(page, "captain").locator("button.link").click()
    page.locator("#runs-head >> text=captain").wait_for()
    page.click("#runs-delete")
    sync_api.expect(line(page, "captain")).to_have_count(0)
    assert page.locator("#run-detail").is_hidden()
    page.click("#runs-undo")
    sync_api.expect(line(page, "captain")).to_have_count(1)

    # Several at once; the one that trains stays, and it says so.
    for name in ("captain", "the old parrot", "on its way"):
        line(page, name).locator("input[type=checkbox]").check()
    page.locator("#runs-picked >> text=3 runs chosen").wait_for()
    page.click("#runs-delete-picked")
    page.locator("#runs-fault .notice.error[data-code=state]").wait_for()
    sync_api.expect(line(page, "captain")).to_have_count(0)
    sync_api.expect(line(page, "the old parrot")).to_have_count(0)
    assert line(page, "on its way").count() == 1

    page.locator("#runs-bin button.label-wrap").click()
    page.locator("#runs-bin-choice input").click()
    page.get_by_role("option", name="captain", exact=True).click()
    page.click("#runs-bin-restore")
    sync_api.expect(line(page, "captain")).to_have_count(1)
    page.click("#runs-bin-empty")
    page.locator("#runs-bin-told >> text=It frees 2").wait_for()
    assert "1 run" in page.locator("#runs-bin-told").inner_text() and len(list((home / "runs").iterdir())) == 34
    page.click("#runs-bin-yes")
    sync_api.expect(page.locator("#runs-bin")).to_be_hidden()
    assert len(list((home / "runs").iterdir())) == 33


def test_an_empty_history_says_what_to_do(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    with serving(tmp_path) as running:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"{running.address}/?tab=runs")
        page.locator("#runs-table >> text=No runs yet").wait_for()
        assert page.locator("#runs-shelf").is_hidden() and page.locator("#runs-queue .run-queue").count() == 0
        shoot(page, "runs-empty")
        page.get_by_role("button", name="Start with a sample").last.click()
        page.locator("#start-toy").wait_for()
        page.close()
