"""The live page in a real browser: the doctor and its remedy, pause and resume, runs that failed or were lost."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from courses import healthy, overfitting, run_of
from studio_server import serving
from test_browser import IMAGES, WIDTHS, browser, head, page, pytestmark, steps_drawn, sync_api  # noqa: F401

from engine.train.job import DataSpec, JobSpec, TrainingSpec
from studio import process, states
from studio.context import Studio

pytestmark = [*pytestmark, pytest.mark.pages]

RUNS: dict[str, str] = {}
TRACEBACK = "Traceback (most recent call last):\n  File ...\nengine.errors.DivergedError: the run diverged"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A studio with runs that ended in every way, and one that really trains."""
    sync_api.expect.set_options(timeout=60_000)
    home = tmp_path_factory.mktemp("home")
    with contextlib.closing(Studio.open(home)) as studio:
        RUNS["overfit"] = run_of(studio, "captain", overfitting())
        sick = {"learning_rate": 0.5, "warmup_ratio": 0.0}
        ended = healthy(steps=40, total=100)
        RUNS["diverged"] = run_of(studio, "too fast", ended, states.FAILED, "diverged", True, TRACEBACK, **sick)
        RUNS["memory"] = run_of(studio, "too large", [], states.FAILED, "memory", log="MemoryError")
        RUNS["lost"] = run_of(studio, "gone", healthy(steps=30, total=100), states.LOST, "lost", True, "step 30")
        RUNS["healthy"] = run_of(studio, "calm", healthy(steps=60, total=100), states.PAUSED, checkpoint=True)
        early = {"type": "done", "step": 60, "loss": 0.3, "eval_loss": 1.7, "best_step": 30, "early": True}
        course = overfitting(steps=60, total=100)
        RUNS["early"] = run_of(studio, "patient", [*course, early], early_stopping_patience=3)
    RUNS["home"] = str(home)
    with serving(home) as running:
        yield running.address


def submit(name: str, steps: int = 3000) -> str:
    """A run that really trains, for as long as it is let; the studio's queue finds it."""
    with contextlib.closing(Studio.open(Path(RUNS["home"]))) as studio:
        rows = studio.store.dataset(studio.store.run(RUNS["overfit"])["dataset"])
        data = DataSpec(path=rows["path"], format=rows["format"], columns=rows["columns"])
        training = TrainingSpec(max_steps=steps, batch_size=2, max_length=64, eval_every=1000, checkpoint_every=1000)
        return studio.jobs.submit(JobSpec(model="tiny-llama", data=data, training=training, name=name), rows["id"])


def drawn(page: Any, more_than: int) -> None:  # noqa: F811
    """Wait until the loss has more points than that."""
    page.wait_for_function(
        "count => [...document.querySelectorAll('#live-curves polyline.thin')]"
        ".reduce((sum, piece, at) => sum + piece.points.length - (at > 0), 0) > count",
        arg=more_than,
        timeout=240_000,
    )


def show(page: Any, server: str, run: str, more: str = "") -> None:  # noqa: F811
    page.goto(f"{server}/?run={RUNS[run]}{more}")
    page.locator(f"#live-head .run-head[data-run={RUNS[run]}]").wait_for()


def look(page: Any, name: str) -> None:  # noqa: F811
    """As wide as the screen at most; with `STUDIO_SCREENSHOTS` also pictures, which are not committed."""
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(400)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is too wide at {width}"
        if os.environ.get("STUDIO_SCREENSHOTS"):
            IMAGES.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=IMAGES / f"look-{name}-{width}.png", full_page=True)
    page.set_viewport_size({"width": WIDTHS[0], "height": 900})


def primaries(page: Any) -> list[str]:  # noqa: F811
    """The primary buttons in view."""
    return [str(text) for text in page.locator("#live-actions button.primary:visible").all_inner_texts()]


def test_the_doctor_names_overfitting_and_its_remedy_fills_the_form(page: Any, server: str) -> None:  # noqa: F811
    show(page, server, "overfit")
    box = page.locator("#live-doctor [data-finding=overfitting]")
    box.wait_for()
    assert "above its best" in box.inner_text()
    change = box.locator("[data-field='adapter.r']")
    assert (change.locator("del").inner_text(), change.locator("ins").inner_text()) == ("32", "8")
    look(page, "live-overfit")
    page.click("#live-remedy")
    note = page.locator(".remedy-note")
    note.wait_for()
    assert '"captain"' in note.inner_text() and "Overfitting" in note.inner_text()
    assert note.locator("[data-field='training.weight_decay'] ins").inner_text() == "0.01"
    sync_api.expect(page.locator("#field-lora-r input, #field-lora-r textarea")).to_have_value("8")
    page.get_by_role("button", name="Advanced").click()
    wanted = {"lora-lora_alpha": "16", "lora-lora_dropout": "0.2", "weight_decay": "0.01", "learning_rate": "0.0002"}
    for name, value in {**wanted, "early_stopping_patience": "3", "max_steps": "100"}.items():
        field = page.locator(f"#field-{name} input, #field-{name} textarea").first
        sync_api.expect(field).to_have_value(value)
    sync_api.expect(page.locator("#train-start")).to_be_visible()
    assert "run=" not in page.url
    look(page, "live-remedy")


def test_a_failed_run_says_why_offers_the_cure_and_its_log(page: Any, server: str) -> None:  # noqa: F811
    show(page, server, "diverged")
    assert "the run diverged" in page.locator("#live-fault .notice.error[data-code=diverged]").inner_text()
    page.locator("#live-doctor [data-finding=diverged]").wait_for()
    assert primaries(page) == ["Try the remedy"]
    sync_api.expect(page.locator("#live-resume")).to_have_text("Resume from the last checkpoint")
    assert "Traceback" not in page.locator("body").inner_text()
    look(page, "live-failed")
    page.click("#live-show-log")
    page.locator("#live-log >> text=Traceback").wait_for()
    page.click("#live-remedy")
    sync_api.expect(page.locator("#field-learning_rate input, #field-learning_rate textarea")).to_have_value("0.0002")
    page.get_by_role("button", name="Advanced").click()
    sync_api.expect(page.locator("#field-warmup_ratio input, #field-warmup_ratio textarea")).to_have_value("0.1")


def test_a_run_out_of_memory_is_offered_what_fits(page: Any, server: str) -> None:  # noqa: F811
    show(page, server, "memory")
    page.locator("#live-doctor [data-finding=memory]").wait_for()
    assert primaries(page) == ["Try the remedy"]
    # It had no step, so there is nothing to draw.
    assert page.locator("#live-curves .chart").count() == 0 and not page.locator("#smoothing").is_visible()
    look(page, "live-memory")
    page.click("#live-remedy")
    sync_api.expect(page.locator("#field-batch_size input, #field-batch_size textarea")).to_have_value("2")


def test_lost_paused_and_early_runs_have_one_next_step_each(page: Any, server: str) -> None:  # noqa: F811
    show(page, server, "lost")
    assert "the process ended without a word" in page.locator("#live-head").inner_text()
    assert primaries(page) == ["Resume from the last checkpoint"]
    sync_api.expect(page.locator("#live-show-log")).to_be_visible()
    look(page, "live-lost")
    show(page, server, "healthy")
    assert primaries(page) == ["Resume from the last checkpoint"]
    assert "The curve looks healthy" in page.locator("#live-doctor").inner_text()
    sync_api.expect(page.locator("#live-remedy")).to_be_hidden()
    charts = page.locator("#live-curves figcaption strong").all_inner_texts()
    assert charts == ["Loss (lower is better)", "Learning rate", "Gradient norm", "Tokens a second", "Memory"]
    look(page, "live-paused")
    show(page, server, "early")
    assert "step 30 was the best, and is kept" in page.locator("#live-head").inner_text()
    assert "Stopped early" in page.locator("#live-doctor").inner_text()
    look(page, "live-early")
    show(page, server, "overfit", "&__theme=dark")
    page.locator("body.dark").wait_for()
    look(page, "live-overfit-dark")
    show(page, server, "diverged", "&__theme=dark")
    look(page, "live-failed-dark")


FRAMES = """window.framesAsked = 0;
const native = window.requestAnimationFrame;
window.requestAnimationFrame = (call) => { window.framesAsked += 1; return native.call(window, call); };"""
"""Counts the frames that the page's scripts ask for; before any of them, so that it sees what the browser sees."""


def test_a_page_at_rest_asks_for_no_frames(page: Any, server: str) -> None:  # noqa: F811
    page.add_init_script(FRAMES)
    for address in (server, f"{server}/?run={RUNS['healthy']}"):
        page.goto(address)
        page.locator("#live-head .run-head, #start-board [data-live], #start-board[data-live]").first.wait_for()
        # The rest of the first page is drawn by then.
        page.wait_for_timeout(6000)
        page.evaluate("window.framesAsked = 0")
        page.wait_for_timeout(2000)
        assert page.evaluate("window.framesAsked") < 20, address


MOVING = (
    "document.getAnimations().filter((one) => one.playState === 'running')"
    ".map((one) => one.effect.target.outerHTML.slice(0, 200))"
)
"""What moves by itself: it is drawn sixty times a second."""


@contextlib.contextmanager
def walking(name: str, steps: int = 30) -> Iterator[Callable[..., None]]:
    """A run of this process that goes on, as its row says; gives what adds an event to it, the next step by default."""
    with contextlib.closing(Studio.open(Path(RUNS["home"]))) as studio:
        RUNS[name] = run_of(studio, name, healthy(steps=steps, total=400), states.RUNNING)
        studio.store.update_run(RUNS[name], pid=os.getpid(), pid_started=process.started_at(os.getpid()))
        count = steps

        def happen(**event: Any) -> None:
            nonlocal count
            if not event:
                count += 1
                event = {"type": "step", "step": count, "loss": 0.75, "lr": 1e-4, "grad_norm": 1.0, "eta_s": 60.0}
            studio.store.add_event(RUNS[name], event)

        try:
            yield happen
        finally:
            studio.store.update_run(RUNS[name], state=states.STOPPED)


def asked_by(page: Any) -> list[str]:  # noqa: F811
    """The last part of each address that the page asks from now on; the list grows."""
    found: list[str] = []
    page.on("request", lambda request: found.append(request.url.split("?")[0].rstrip("/").rpartition("/")[2]))
    return found


def at_step(page: Any, step: int) -> None:  # noqa: F811
    sync_api.expect(page.locator("#live-head .st-facts b").first).to_have_text(str(step), timeout=20_000)


def test_new_steps_change_numbers_and_lines_where_they_stand(page: Any, server: str) -> None:  # noqa: F811
    page.add_init_script(FRAMES)
    with walking("walk") as happen:
        show(page, server, "walk")
        line = page.locator("#live-curves polyline.thin").first
        line.wait_for()
        page.wait_for_timeout(3000)
        line.evaluate("line => { line.held = true; window.framesAsked = 0; }")
        page.evaluate("document.querySelector('#live-doctor .doctor').held = true")
        described = page.locator("#live-curves figure").first.get_attribute("aria-label")
        asked, begun = asked_by(page), time.monotonic()
        for step in range(31, 35):
            happen()
            at_step(page, step)
            assert page.evaluate(MOVING) == []
        assert steps_drawn(page) == 34 and line.evaluate("line => line.held")
        # The doctor comes by every four seconds.
        sync_api.expect(page.locator("#live-doctor")).to_contain_text(re.compile("3[1-4] steps"), timeout=20_000)
        assert page.evaluate("document.querySelector('#live-doctor .doctor').held")
        assert page.locator("#live-curves figure").first.get_attribute("aria-label") != described
        # All of it was told by one stream, and nothing on the page counts frames (sixty a second would).
        assert asked == []
        assert page.evaluate("window.framesAsked") < 10 * (time.monotonic() - begun)
        # A long line comes in pieces; one more of them is drawn as the ends of those before are.
        for _ in range(40):
            happen()
        at_step(page, 74)
        assert steps_drawn(page) == 74 and page.locator("#live-curves polyline.thin").count() == 2
        assert line.evaluate("line => line.held")
        # In another language it has its own words.
        show(page, server, "walk", "&language=ko")
        happen()
        at_step(page, 75)
        assert "400단계 중 75" in page.locator("#live-head").inner_text()
        assert "학습률" in page.locator("#live-curves figcaption strong").all_inner_texts()


def test_the_pointer_finds_the_newest_values_and_keeps_them_new(page: Any, server: str) -> None:  # noqa: F811
    with walking("pointed") as happen:
        show(page, server, "pointed")
        happen()
        at_step(page, 31)
        plot = page.locator("#live-curves .plot").first
        box = plot.bounding_box()
        # The chart has room for eighty steps.
        page.mouse.move(box["x"] + box["width"] * 31 / 80, box["y"] + box["height"] / 2)
        page.mouse.move(box["x"] + box["width"] * 31.2 / 80, box["y"] + box["height"] / 2)
        tip = plot.locator(".tip")
        sync_api.expect(tip.locator("strong")).to_have_text("step 31")
        happen()
        happen(type="eval", step=32, loss=0.5)
        at_step(page, 32)
        page.mouse.move(box["x"] + box["width"] * 32.1 / 80, box["y"] + box["height"] / 2)
        sync_api.expect(tip.locator("strong")).to_have_text("step 32")
        sync_api.expect(tip).to_contain_text("evaluation: 0.5")
        happen(type="eval", step=32, loss=0.25)
        # The pointer rests.
        sync_api.expect(tip).to_contain_text("evaluation: 0.25")


def test_scale_and_smoothing_stay_as_they_were_set(page: Any, server: str) -> None:  # noqa: F811
    scale = page.locator("#live-curves figure").first.locator(".y")
    with walking("scaled") as happen:
        show(page, server, "scaled")
        sync_api.expect(scale).to_have_text(["2", "2.5", "3"])
        page.locator("#log-scale input").check()
        # Round powers of ten.
        sync_api.expect(scale.filter(has_text="2.51")).to_have_count(1)
        happen()
        at_step(page, 31)
        assert "2.51" in scale.all_inner_texts()


def test_nothing_is_asked_for_a_page_out_of_sight_and_all_of_it_once_it_is_seen(page: Any, server: str) -> None:  # noqa: F811
    hide = (
        "on => { Object.defineProperty(document, 'hidden', {configurable: true, get: () => on});"
        "document.dispatchEvent(new Event('visibilitychange')); }"
    )
    with walking("hidden") as happen:
        show(page, server, "hidden")
        happen()
        at_step(page, 31)
        page.evaluate(hide, True)
        page.wait_for_timeout(500)
        asked = asked_by(page)
        happen()
        page.wait_for_timeout(3000)
        assert asked == []
        page.evaluate(hide, False)
        page.wait_for_timeout(600)
        at_step(page, 32)
        # Another of the page's tabs covers it as well.
        page.click("#tab-data-button")
        page.locator("#data-file").wait_for()
        page.wait_for_timeout(1500)
        asked.clear()
        happen()
        page.wait_for_timeout(3000)
        assert "live" not in asked
        page.click("#tab-train-button")
        at_step(page, 33)


def test_a_run_that_is_resumed_elsewhere_is_followed_by_who_comes_back_to_it(page: Any, server: str) -> None:  # noqa: F811
    with walking("resumed") as happen, contextlib.closing(Studio.open(Path(RUNS["home"]))) as studio:
        studio.store.update_run(RUNS["resumed"], state=states.PAUSED)
        show(page, server, "resumed")
        head(page, "paused").wait_for()
        page.click("#tab-data-button")
        page.locator("#data-file").wait_for()
        studio.store.update_run(RUNS["resumed"], state=states.RUNNING)
        happen()
        page.click("#tab-train-button")
        sync_api.expect(page.locator("#live-pause")).to_be_visible(timeout=20_000)
        happen()
        at_step(page, 32)


def test_a_page_in_another_language_than_the_cookies_is_not_drawn_again_and_again(page: Any, server: str) -> None:  # noqa: F811
    with walking("two tongues") as happen:
        show(page, server, "two tongues")
        page.evaluate("document.documentElement.lang = 'ko'")
        happen()
        at_step(page, 31)
        asked = asked_by(page)
        for step in (32, 33):
            happen()
            at_step(page, step)
        # Gradio's drawing when the page was opened may come late, and has the stream begun anew.
        assert asked in ([], ["live"])


def test_a_browser_that_lacks_what_is_new_fills_the_page_and_follows_the_run(page: Any, server: str) -> None:  # noqa: F811
    page.add_init_script("delete window.requestIdleCallback; delete Element.prototype.checkVisibility;")
    with walking("old browser") as happen:
        page.goto(server)
        page.click("#tab-data-button")
        page.locator("#data-file").wait_for()
        show(page, server, "old browser")
        happen()
        at_step(page, 31)
        # Nobody presses anything: the page's own tabs come by themselves.
        page.goto(server)
        page.wait_for_function("window.studioArrived === true")


def test_a_run_that_ends_is_drawn_whole_and_asked_for_no_more(page: Any, server: str) -> None:  # noqa: F811
    with walking("ends") as happen:
        show(page, server, "ends")
        happen()
        at_step(page, 31)
        happen(type="sample", step=31, prompt="hello", text="ahoy, matey")
        page.locator("#live-film >> text=ahoy, matey").wait_for()
        sync_api.expect(page.locator("#live-pause")).to_be_visible()
    head(page, "stopped").wait_for()
    sync_api.expect(page.locator("#live-pause")).to_be_hidden()
    asked = asked_by(page)
    page.wait_for_timeout(3000)
    assert asked == []


@pytest.mark.parametrize("refusal", ["none", "503"])
def test_where_there_is_no_stream_gradio_draws(page: Any, server: str, refusal: str) -> None:  # noqa: F811
    def refuse(route: Any) -> None:
        route.abort() if refusal == "none" else route.fulfill(status=int(refusal))

    page.route("**/studio/live?*", refuse)
    with walking("unheard of") as happen:
        show(page, server, "unheard of")
        page.locator("#live-curves polyline.thin").first.wait_for()
        happen()
        at_step(page, 31)
        assert steps_drawn(page) == 31


def test_the_stream_is_asked_for_at_the_pages_own_address(page: Any, server: str) -> None:  # noqa: F811
    asked = []
    page.on("request", lambda request: "/studio/live" in request.url and asked.append(request.url))
    page.add_init_script(
        "let told; Object.defineProperty(window, 'gradio_config', {get: () => told,"
        " set: (given) => { told = {...given, root: 'https://127.0.0.1:9'}; }});"
    )
    with walking("misled") as happen:
        show(page, server, "misled")
        happen()
        at_step(page, 31)
    assert asked and all(address.startswith(f"{server}/studio/live?") for address in asked)


def test_of_two_pages_of_a_browser_one_has_a_stream_and_both_follow(page: Any, server: str) -> None:  # noqa: F811
    asked: list[str] = []
    other = page.context.new_page()
    other.on("request", lambda request: "/studio/live" in request.url and asked.append(request.url))
    with walking("seen twice") as happen:
        show(page, server, "seen twice")
        happen()
        at_step(page, 31)
        show(other, server, "seen twice")
        for step in (32, 33):
            happen()
            at_step(page, step)
            at_step(other, step)
        assert asked and all("once=true" in address for address in asked)
        # What the first gives up the other takes.
        page.goto("about:blank")
        happen()
        at_step(other, 34)
        other.wait_for_timeout(3000)
        asked.clear()
        happen()
        at_step(other, 35)
        assert asked == []


LATE_CLOSING = """(() => {
  const fetched = window.fetch;
  window.lateClosings = 0;
  window.fetch = async (...given) => {
    const answer = await fetched(...given);
    if (!String(given[0]?.url ?? given[0]).includes('/queue/data?')) return answer;
    const late = new TransformStream({
      async transform(chunk, out) {
        const at = new TextDecoder('latin1').decode(chunk).indexOf('data: {"msg":"close_stream"');
        if (at < 0) return out.enqueue(chunk);
        out.enqueue(chunk.slice(0, at));
        await new Promise((done) => setTimeout(done, 1500));
        window.lateClosings += 1;
        out.enqueue(chunk.slice(at));
      },
    });
    return new Response(answer.body.pipeThrough(late), { status: answer.status, headers: answer.headers });
  };
})()"""
"""Each end of a stream of answers reaches the page a second and a half late: what it asks meanwhile goes unheard."""


def test_a_page_whose_question_meets_the_end_of_a_stream_follows_the_run_to_its_end(page: Any, server: str) -> None:  # noqa: F811
    RUNS["unheard"] = submit("unheard", steps=30)
    page.add_init_script(LATE_CLOSING)
    show(page, server, "unheard")
    head(page, "done").wait_for(timeout=240_000)
    assert page.evaluate("window.lateClosings") > 0


def test_pause_and_resume_while_the_curve_grows(page: Any, server: str) -> None:  # noqa: F811
    RUNS["real"] = submit("a long way")
    show(page, server, "real")
    head(page, "running").wait_for(timeout=240_000)
    drawn(page, 4)
    assert "Too early to say" in page.locator("#live-doctor").inner_text()
    assert primaries(page) == []
    look(page, "live-running")
    show(page, server, "real", "&__theme=dark")
    look(page, "live-running-dark")
    page.click("#live-pause")
    head(page, "paused").wait_for(timeout=240_000)
    page.locator("#live-resume").wait_for()
    assert primaries(page) == ["Resume from the last checkpoint"]
    before = steps_drawn(page)
    page.click("#live-resume")
    head(page, "running").wait_for(timeout=240_000)
    drawn(page, before)
    page.click("#live-stop")
    head(page, "stopped").wait_for(timeout=240_000)
    assert "adapter kept" in page.locator("#live-head").inner_text()
    assert re.search(r"step [\d,]+ of 3,000", page.locator("#live-head").inner_text())
