"""The Compare page in a real browser: mixes and imported adapters, differences, grid, handle, votes, the file."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_adapters import finished_run, lora, write
from studio_server import serving
from test_browser import browser, page, pytestmark, shoot, sync_api  # noqa: F401

from studio.context import Studio
from studio.library import IMPORTED

pytestmark = [*pytestmark, pytest.mark.pages]

QUESTION = "What colour is grass?"


def unet_lora() -> Any:
    from engine import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two runs, an imported adapter and two mixes of the toy Llama, two runs of the toy Stable Diffusion."""
    sync_api.expect.set_options(timeout=60_000)
    home = tmp_path_factory.mktemp("home")
    with contextlib.closing(Studio.open(home)) as studio:
        finished_run(studio, "blueprint", unet_lora(), 4, "tiny-sd")
        finished_run(studio, "watercolour", unet_lora(), 5, "tiny-sd")
        parrot = finished_run(studio, "parrot", lora(), 1)
        captain = finished_run(studio, "captain", lora(), 2)
        ids = [studio.library.of_run(run)["id"] for run in (parrot, captain)]  # type: ignore[index]
        folder = write(home / "draft", lora(r=6), seed=3)
        studio.library.add(folder, "from a friend", IMPORTED, "tiny-llama", "causal_lm")
        studio.library.save_mix(
            "calm sea", "tiny-llama", [(ids[0], 0.7), (ids[1], -0.4)], {"how": "live", "rank": None, "density": 0.5}
        )
        studio.library.save_mix(
            "pruned", "tiny-llama", [(ids[0], 0.5), (ids[1], 0.5)], {"how": "ties", "rank": None, "density": 0.5}
        )
    with serving(home) as running:
        yield running.address


def choose(page: Any, field: str, *names: str) -> None:  # noqa: F811
    """Choose entries of a list by their words."""
    for name in names:
        page.locator(f"{field} input").click()
        page.get_by_role("option", name=name, exact=True).click()


def arrive(page: Any, server: str, base: str) -> None:  # noqa: F811
    page.goto(f"{server}/?tab=compare")
    sync_api.expect(page.locator("#compare-base input")).not_to_have_value("")
    sync_api.expect(page.locator("#compare-adapters .token")).to_have_count(1)
    if page.locator("#compare-base input").input_value() != base:
        choose(page, "#compare-base", base)
        sync_api.expect(page.locator("#compare-base input")).to_have_value(base)


def answered(page: Any) -> Any:  # noqa: F811
    page.click("#compare-generate")
    page.locator("#compare-answers >> text=Answered in").wait_for(timeout=180_000)
    return page.locator("#compare-answers .st-column")


def test_runs_an_imported_adapter_and_mixes_answer_beside_the_base_with_differences_marked(
    page: Any,  # noqa: F811
    server: str,
) -> None:
    arrive(page, server, "tiny-llama")
    choose(page, "#compare-adapters", "parrot", "captain", "calm sea (mix)", "pruned (mix)")
    sync_api.expect(page.locator("#compare-adapters .token")).to_have_count(5)
    page.locator("#compare-prompt textarea").fill(QUESTION)
    columns = answered(page)
    heads = [text.strip() for text in page.locator("#compare-answers h3").all_inner_texts()]
    assert heads[0] == "base" and sorted(heads[1:]) == ["calm sea", "captain", "from a friend", "parrot", "pruned"]
    colours = {columns.nth(n).evaluate("it => it.style.getPropertyValue('--c')") for n in range(6)}
    assert len(colours) == 6 and columns.first.get_attribute("data-who") == "base"
    texts = page.locator("#compare-answers .answer").all_inner_texts()
    assert all(texts) and len(set(texts)) >= 3

    base = texts[0]
    marked = columns.nth(1).locator("ins.cmp-new")
    sync_api.expect(marked.first).to_be_visible()
    assert columns.first.locator("ins, del").count() == 0
    assert "underline" in marked.first.evaluate("it => getComputedStyle(it).textDecorationLine")
    gone = page.locator("#compare-answers del.cmp-gone").first
    sync_api.expect(gone).to_be_hidden()
    page.locator("#compare-marks label", has_text="New and left out").click()
    sync_api.expect(gone).to_be_visible()
    assert "line-through" in gone.evaluate("it => getComputedStyle(it).textDecorationLine")
    assert gone.inner_text().split()[0] in base
    page.locator("#compare-marks label", has_text="What is new").click()
    page.wait_for_timeout(300)
    shoot(page, "compare-mixes")
    page.locator("#compare-marks label", has_text="No marks").click()
    sync_api.expect(marked.first).to_have_css("text-decoration-line", "none")

    with page.expect_download() as waiting:
        page.click("#compare-share")
    text = Path(waiting.value.path()).read_text(encoding="utf-8")
    assert waiting.value.suggested_filename.endswith(".html") and "<script" not in text
    shared = page.context.new_page()
    shared.set_content(text)
    assert [it.strip() for it in shared.locator("h3").all_inner_texts()] == heads
    assert (
        "calm sea" in shared.locator(".settings").inner_text()
        and "+0.70" not in shared.locator("h3").first.inner_text()
    )
    assert "0.70 parrot" in shared.locator(".settings").inner_text()
    shared.close()

    page.reload()
    page.locator("#compare-kept button.label-wrap").click()
    page.locator("#compare-earlier button[data-comparison]", has_text=QUESTION).first.click()
    sync_api.expect(page.locator("#compare-answers .st-column")).to_have_count(6)
    again = page.locator("#compare-answers .answer").all_inner_texts()
    assert again == texts
    entries = page.locator("#compare-earlier li")
    before = entries.count()
    page.locator("#compare-earlier button[data-remove]").first.click()
    sync_api.expect(entries).to_have_count(before - 1)
    page.click("#compare-undo")
    sync_api.expect(entries).to_have_count(before)


def test_a_grid_is_drawn_cell_by_cell_enlarged_and_wiped_by_the_keyboard(page: Any, server: str) -> None:  # noqa: F811
    arrive(page, server, "tiny-sd")
    choose(page, "#compare-adapters", "blueprint")
    sync_api.expect(page.locator("#compare-adapters .token")).to_have_count(2)
    page.locator("#compare-prompt textarea").fill("a red apple")
    page.locator("button", has_text="Seed and sampling").locator("visible=true").click()
    page.get_by_label("range slider for Steps").locator("visible=true").focus()
    for key in ("Home", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    page.get_by_role("tab", name="Grid", exact=True).click()
    page.locator("#grid-weights input, #grid-weights textarea").first.fill("0.5, 1")
    page.locator("#grid-seeds input, #grid-seeds textarea").first.fill("0, 7")
    sync_api.expect(page.locator("#grid-draw")).to_have_text("Draw 10 pictures")
    page.click("#grid-draw")
    cells = page.locator("#grid-table button.cmp-cell")
    cells.first.wait_for(timeout=180_000)
    page.locator("#grid-progress >> text=10 pictures in").wait_for(timeout=180_000)
    sync_api.expect(cells).to_have_count(10)
    heads = [it.strip() for it in page.locator("#grid-table thead th").all_inner_texts()]
    assert heads[3] == "base" and sorted(heads[4:]) == ["blueprint", "watercolour"]
    pictures = page.locator("#grid-table button.cmp-cell img")
    assert len({pictures.nth(n).get_attribute("src") for n in range(10)}) == 10
    shoot(page, "compare-grid")

    cells.nth(9).click()
    large = page.locator("#grid-cell figure.cmp-large")
    large.wait_for()
    facts = large.inner_text()
    assert "a red apple" in facts and re.search(r"Steps\s+3\b", facts) and re.search(r"Seed\s+[07]\b", facts)
    wipe = page.locator("#grid-cell .cmp-wipe")
    handle = wipe.locator("input[type=range]")
    handle.focus()
    at = "it => it.style.getPropertyValue('--at').trim()"
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert wipe.evaluate(at) == "55%"
    page.keyboard.press("Home")
    assert wipe.evaluate(at) == "0%"
    box = wipe.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2)
    assert abs(float(wipe.evaluate(at).rstrip("%")) - 75) <= 3
    clip = wipe.locator("img.over").evaluate("it => getComputedStyle(it).clipPath")
    assert "25" in clip or "2" in clip
    page.wait_for_timeout(600)
    shoot(page, "compare-cell")

    with page.expect_download() as waiting:
        page.click("#grid-share")
    text = Path(waiting.value.path()).read_text(encoding="utf-8")
    assert text.count("data:image/") == 20 and "<script" not in text

    page.get_by_role("tab", name="Side by side", exact=True).click()
    answered(page)
    assert page.locator("#compare-answers .answer img").count() == 3
    side = page.locator("#compare-wipe .cmp-wipe")
    side.locator("input").focus()
    page.keyboard.press("ArrowLeft")
    assert side.evaluate(at) == "49%"


def test_two_visitors_vote_blindly_and_the_rates_follow(browser: Any, page: Any, server: str) -> None:  # noqa: F811
    other = browser.new_page(viewport={"width": 1280, "height": 900})
    other.set_default_timeout(60_000)
    for visitor in (page, other):
        arrive(visitor, server, "tiny-llama")
        choose(visitor, "#compare-adapters", "captain")
        visitor.locator("#compare-prompt textarea").fill(QUESTION)
        visitor.get_by_role("tab", name="Blind test", exact=True).click()
    for visitor in (page, other):
        visitor.click("#blind-ask")
    for visitor in (page, other):
        visitor.locator("#blind-voting").wait_for(timeout=180_000)
        shown = visitor.locator("#blind-answers").evaluate("it => it.outerHTML")
        for name in ("captain", "from a friend", ">base<", "ad-", "mix-"):
            assert name not in shown
        assert (
            len({it.evaluate("it => it.style.cssText") for it in visitor.locator("#blind-answers section").all()}) == 1
        )
        assert [it.strip() for it in visitor.locator("#blind-answers h3").all_inner_texts()] == ["A", "B"]
    page.click("#blind-left")
    page.locator("#blind-verdict >> text=You found").wait_for()
    heads = page.locator("#blind-answers h3").all_inner_texts()
    assert heads[0].strip().startswith("A: ") and heads[0] != heads[1]
    winner = heads[0].strip().removeprefix("A: ")
    row = page.locator("#blind-rates tbody tr", has_text=winner).first
    sync_api.expect(row).to_contain_text("100 %")
    sync_api.expect(row).to_contain_text("21 - 100 %")
    shoot(page, "compare-blind")
    other.click("#blind-tie")
    other.locator("#blind-verdict >> text=A tie").wait_for()
    total = sum(int(cell) for cell in other.locator("#blind-rates tbody tr td:nth-child(5)").all_inner_texts())
    assert total == 2
    sync_api.expect(other.locator("#blind-ask")).to_have_text("Next pair")
    other.close()


def test_shift_and_enter_ask_as_the_open_view_asks(page: Any, server: str) -> None:  # noqa: F811
    arrive(page, server, "tiny-llama")
    choose(page, "#compare-adapters", "captain")
    page.get_by_role("tab", name="Blind test", exact=True).click()
    prompt = page.locator("#compare-prompt textarea")
    prompt.fill("What colour is the sea?")
    prompt.press("Shift+Enter")
    page.locator("#blind-voting").wait_for(timeout=180_000)
    # The answers are to what was typed last, and the other view has not been asked.
    assert "What colour is the sea?" in page.locator("#blind-answers").inner_text()
    page.get_by_role("tab", name="Side by side", exact=True).click()
    assert page.locator("#compare-answers .st-column").count() == 0
    prompt.fill(QUESTION)
    prompt.press("Shift+Enter")
    page.locator("#compare-answers >> text=Answered in").wait_for(timeout=180_000)
