"""The guided path in a real browser, for every goal with its built-in model: from the first card to the comparison."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from studio_server import serving
from test_browser import browser, head, page, pytestmark, shoot, sync_api  # noqa: F401

from engine.models.catalogue import BUILTIN
from studio.guide import GOALS, TASTE

pytestmark = [*pytestmark, pytest.mark.pages]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A studio with an empty home, so that every goal's base is the one that comes with it."""
    sync_api.expect.set_options(timeout=60_000)
    with serving(tmp_path_factory.mktemp("home")) as running:
        yield running.address


AT_ONCE = """([leads, asks]) => new Promise((done) => {
  const press = () => {
    const button = document.querySelector(asks);
    if (!button?.checkVisibility()) return requestAnimationFrame(press);
    button.click();
    done();
  };
  document.querySelector(leads).click();
  press();
})"""
"""Presses a button that leads to another page, and one of that page in the first frame in which it is seen."""


def now(page: Any) -> Any:  # noqa: F811
    return page.locator("#start-board .gd-steps [aria-current=step]")


def on(page: Any, words: str | re.Pattern[str]) -> None:  # noqa: F811
    """Press the one primary button, once it says this."""
    button = page.locator("#guide-on")
    sync_api.expect(button).to_have_text(words)
    button.click()


@pytest.mark.parametrize("goal", GOALS.values(), ids=list(GOALS))
def test_each_goal_leads_to_a_trained_adapter_beside_its_base(page: Any, server: str, goal: Any) -> None:  # noqa: F811
    page.goto(server)
    page.locator(f"#start-board [data-goal={goal.name}]").click()
    sync_api.expect(now(page)).to_contain_text("Data")
    page.locator("#guide-rows table").wait_for()
    on(page, re.compile(r"Use these [\d,]+ rows"))

    sync_api.expect(now(page)).to_contain_text("Model")
    pressed = page.locator("#start-board [data-choice][aria-pressed=true]")
    model = pressed.get_attribute("data-choice")
    assert BUILTIN[model].bundled and goal.task in BUILTIN[model].tasks
    on(page, f"Take {BUILTIN[model].title}")

    sync_api.expect(now(page)).to_contain_text("Recipe")
    page.locator(f"#start-board [data-choice={TASTE}]").click()
    sync_api.expect(pressed).to_have_attribute("data-choice", TASTE)
    page.wait_for_url(f"**guide={goal.name}.preset.sample.{model}.{TASTE}**")
    page.reload()
    sync_api.expect(now(page)).to_contain_text("Recipe")
    sync_api.expect(pressed).to_have_attribute("data-choice", TASTE)
    on(page, "Take this recipe")

    sync_api.expect(now(page)).to_contain_text("Check")
    sync_api.expect(page.locator("#guide-cost")).to_contain_text("parameters learn", timeout=120_000)
    if goal.name == "chat":
        shoot(page, "start-check")
    on(page, re.compile(r"Train on these [\d,]+ rows"))
    head(page, "done").wait_for(timeout=240_000)
    assert "guide=" not in page.url and "run=" in page.url

    page.locator("#live-compare").wait_for()
    page.evaluate(AT_ONCE, ["#live-compare", "#compare-generate"])
    page.locator("#compare-answers >> text=Answered in").wait_for(timeout=120_000)
    assert page.locator("#compare-answers .st-column").count() == 2

    page.get_by_role("tab", name="Start", exact=True).click()
    last = page.locator("#start-last")
    sync_api.expect(last).to_contain_text("Continue where you left off")
    assert last.locator("svg polyline").count() == 1
    page.locator("#start-open").click()
    head(page, "done").wait_for()


def test_steps_can_be_gone_back_and_the_full_form_is_one_click_away(page: Any, server: str) -> None:  # noqa: F811
    page.goto(f"{server}/?guide=translator.preset.sample.tiny-t5.quick-look")
    sync_api.expect(now(page)).to_contain_text("Recipe")
    page.click("#guide-back")
    sync_api.expect(now(page)).to_contain_text("Model")
    page.locator("#start-board [data-step=data]").click()
    sync_api.expect(now(page)).to_contain_text("Data")
    page.click("#guide-every")
    page.locator("#train-start >> text=Train on these").wait_for()
    sync_api.expect(page.locator("#train-base input")).to_have_value("Tiny T5 (toy)")
    page.get_by_role("tab", name="Start", exact=True).click()
    sync_api.expect(now(page)).to_contain_text("Data")
    page.click("#guide-back")
    page.locator("#start-board [data-goal=chat]").wait_for()
    page.wait_for_url(lambda url: "guide=" not in url)


def test_rows_of_ones_own_take_the_place_of_the_sample_or_say_what_they_are_for(
    page: Any,  # noqa: F811
    server: str,
    tmp_path: Path,
) -> None:
    own, labels = tmp_path / "own.csv", tmp_path / "labels.csv"
    own.write_text("question,answer\n" + "".join(f"What is {n}?,It is {n}.\n" for n in range(20)), encoding="utf-8")
    labels.write_text("text,label\n" + "".join(f"number {n},{'even' if n % 2 else 'odd'}\n" for n in range(20)))
    page.goto(server)
    page.locator("#start-board [data-goal=chat]").click()
    page.locator("#guide-file input[type=file]").set_input_files(own)
    sync_api.expect(page.locator("#start-board [data-choice][aria-pressed=true]")).to_contain_text("own.csv")
    sync_api.expect(page.locator("#guide-on")).to_have_text("Use these 20 rows")

    page.goto(server)
    page.locator("#start-board [data-goal=chat]").click()
    page.locator("#guide-file input[type=file]").set_input_files(labels)
    page.locator("#guide-fault >> text=These rows teach something else").wait_for()
    page.locator("#guide-fault [data-goal=classifier]").click()
    sync_api.expect(page.locator("#start-board .gd-goal")).to_have_text("A classifier")
    sync_api.expect(page.locator("#start-board [data-choice][aria-pressed=true]")).to_contain_text("labels.csv")


def test_an_unknown_path_in_the_address_is_the_first_page(page: Any, server: str) -> None:  # noqa: F811
    page.goto(f"{server}/?guide=chat.preset.nothing")
    page.locator("#start-board [data-goal=chat]").wait_for()
    page.goto(f"{server}/?guide=chat.check.0123456789abcdef.no-such-model.nor-this")
    sync_api.expect(now(page)).to_contain_text("Check")
    sync_api.expect(page.locator("#start-board .gd-summary")).to_contain_text("lighthouse.jsonl")
