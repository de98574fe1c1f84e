"""How every tab looks, in a real browser: contrast in light and dark, the keyboard, 390 pixels, one colour a run."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from looking import STILL, contrast, keyboard
from small_adapters import finished_run, lora
from studio_server import serving
from test_browser import IMAGES, browser, page, pytestmark, sync_api  # noqa: F401

from engine.paths import REPOSITORY
from studio import scores, states
from studio.comparisons import ANSWERS, Comparisons
from studio.context import Studio
from studio.datasets import Datasets
from studio.page import TAB_IDS

pytestmark = [*pytestmark, pytest.mark.pages]

LONG = "a run whose name goes on and on, as names do that people make of file names and settings 0123456789"
# Text that stands there only when its tab has been filled.
READY = {
    "start": "#start-board [data-goal], #start-board .gd-steps",
    "data": "#data-earlier input",
    "train": "#train-dataset input",
    "adapters": "#adapters-cards .ad-card",
    "compare": "#compare-generate",
    "runs": "#runs-table button[data-run]",
    "scores": "#scores-run input, #scores-empty, [id^=scores]",
}


@pytest.fixture(scope="module")
def runs() -> dict[str, str]:
    """Run id -> its colour, filled by `server`."""
    return {}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, runs: dict[str, str]) -> Iterator[str]:
    """A studio with rows, three runs that have adapters, their curves, and a comparison that was kept."""
    sync_api.expect.set_options(timeout=60_000)
    home = tmp_path_factory.mktemp("home")
    with contextlib.closing(Studio.open(home)) as studio:
        Datasets(studio.store, home).bring_in(REPOSITORY / "examples" / "lighthouse.jsonl")
        for seed, name in enumerate(("parrot", "captain", LONG)):
            run = finished_run(studio, name, lora(r=4 + seed), seed)
            for step in range(1, 9):
                studio.store.add_event(run, {"type": "step", "step": step, "loss": 3.0 / step, "lr": 0.001})
            runs[run] = studio.store.run(run)["colour"]
            lines = [
                {"type": "score", "who": who, "metric": "loss", "value": value, "rows": 4}
                for who, value in (("base", 3.0), ("adapter", 2.0 + seed))
            ]
            output = "\n".join(json.dumps(line) for line in lines)
            result = json.dumps(scores.read(output).to_dict())
            with studio.store.exclusive() as db:
                db["scores"].insert(
                    {"run_id": run, "state": states.DONE, "asked": "{}", "result": result, "created": time.time()}
                )
        columns = [
            {"run": run, "title": studio.store.run(run)["name"], "colour": colour, "text": "Aye."}
            for run, colour in runs.items()
        ]
        base = {"run": None, "title": "base", "colour": "#8A8F98", "text": "Yes."}
        Comparisons(studio.store, home).add(ANSWERS, "tiny-llama", "Is it so?", {}, [base, *columns[:2]])
    with serving(home) as running:
        yield running.address


WATCH = """() => {
  window.moved = [];
  const all = {childList: true, subtree: true, characterData: true, attributes: true};
  new MutationObserver(() => window.moved.push(1)).observe(document.body, all);
}"""


def visit(page: Any, address: str, tab: str) -> None:  # noqa: F811
    """Open a tab and wait until it is filled and stands still: answers that come late take the focus away."""
    asked: set[Any] = set()

    def begin(request: Any) -> None:
        # Two streams stay open.
        if not any(part in request.url for part in ("/heartbeat/", "/queue/data")):
            asked.add(request)

    def end(request: Any) -> None:
        asked.discard(request)

    listening = {"request": begin, "requestfinished": end, "requestfailed": end}
    for event, listener in listening.items():
        page.on(event, listener)
    page.goto(f"{address}/?{tab if '=' in tab else f'tab={tab}'}")
    page.locator("#start-board").wait_for(state="attached")
    page.locator(READY[tab.split("=")[0] if tab.split("=")[0] in READY else "start"]).first.wait_for()
    page.add_style_tag(content=STILL)
    page.evaluate(WATCH)
    quiet = 0
    for _ in range(120):
        page.wait_for_timeout(250)
        quiet = 0 if asked or page.evaluate("window.moved.splice(0).length") else quiet + 1
        if quiet == 6:
            break
    for event, listener in listening.items():
        page.remove_listener(event, listener)


PLACES = [*TAB_IDS, "guide=chat.data.sample.tiny-llama.sample", "guide=style.check.sample.tiny-sd.sample"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(browser: Any, server: str, scheme: str) -> None:  # noqa: F811
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    view, faults = context.new_page(), {}
    view.set_default_timeout(120_000)
    for place in PLACES:
        visit(view, server, place)
        faults[place] = contrast(view)
        if os.environ.get("STUDIO_LOOK"):
            view.screenshot(path=IMAGES / f"look-{place.split('.')[0]}-{scheme}.png", full_page=True)
    context.close()
    assert not any(faults.values()), "\n".join(f"{tab}: {line}" for tab, lines in faults.items() for line in lines)


def test_every_control_is_reached_by_the_keyboard_seen_and_named(page: Any, server: str) -> None:  # noqa: F811
    faults = []
    for place in PLACES:
        visit(page, server, place)
        faults += [f"{place}: {kind}: {what}" for kind, found in keyboard(page).items() for what in found]
    assert not faults, "\n".join(faults)


def test_no_tab_is_wider_than_a_telephone(browser: Any, server: str) -> None:  # noqa: F811
    context = browser.new_context(viewport={"width": 390, "height": 844})
    view, wide = context.new_page(), {}
    view.set_default_timeout(120_000)
    for place in PLACES:
        visit(view, server, place)
        width = view.evaluate("document.documentElement.scrollWidth")
        if width > 390:
            wide[place] = width
        if os.environ.get("STUDIO_LOOK"):
            view.screenshot(path=IMAGES / f"look-{place.split('.')[0]}-390.png", full_page=True)
    context.close()
    assert not wide


# Colour of the mark that stands before, or on the card around, each run's name; Compare's columns say whose they are.
COLOURS = """(names) => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d');
  const hex = (text) => { canvas.fillStyle = text; return canvas.fillStyle.toUpperCase(); };
  const found = {};
  const add = (name, colour) => { if (colour) (found[name] ??= []).push(hex(colour)); };
  for (const dot of document.querySelectorAll('.st-dot')) {
    if (!dot.checkVisibility()) continue;
    const said = dot.parentElement.textContent.trim();
    const name = names.find((one) => said.startsWith(one));
    if (!name) continue;
    add(name, dot.style.background);
    const around = dot.closest('[style*="--c"]');
    if (around) add(name, around.style.getPropertyValue('--c').trim());
  }
  for (const line of document.querySelectorAll('#start-last polyline')) {
    if (!line.checkVisibility()) continue;
    const name = names.find((one) => line.closest('.last-run').textContent.includes(one));
    if (name) add(name, line.getAttribute('stroke') || line.style.stroke);
  }
  return found;
}"""


def test_a_run_has_one_colour_on_every_tab(page: Any, server: str, runs: dict[str, str]) -> None:  # noqa: F811
    names = ["parrot", "captain", LONG]
    own = {name: colour.upper() for name, colour in zip(names, runs.values(), strict=True)}
    assert len(set(own.values())) == 3
    seen: dict[str, set[str]] = {}
    for tab in ("start", "adapters", "compare", "runs", "scores"):
        visit(page, server, tab)
        if tab == "start":
            page.locator("#start-last .st-dot").wait_for()
        if tab == "scores":
            page.locator("#scores-table .st-dot").first.wait_for()
        if tab == "compare":
            page.get_by_role("button", name="Earlier comparisons").click()
            page.locator("#compare-earlier .cmp-open").first.click()
            page.locator(".st-column .st-dot").first.wait_for()
        for name, colours in page.evaluate(COLOURS, names).items():
            assert set(colours) == {own[name]}, (tab, name, colours)
            seen.setdefault(tab, set()).add(name)
    assert seen["adapters"] == seen["runs"] == seen["scores"] == set(names)
    assert seen["start"] == {LONG} and seen["compare"] == set(names[:2])


def test_a_long_name_is_shortened_and_whole_on_hover(page: Any, server: str) -> None:  # noqa: F811
    visit(page, server, "start")
    name = page.locator("#start-last .st-name")
    name.wait_for()
    assert name.get_attribute("title") == LONG
    assert name.evaluate("one => one.scrollWidth > one.clientWidth && one.clientHeight < 40")
