"""The Adapters page in a real browser: search, mix with sliders, save, keep, export, rename, delete and undo."""

from __future__ import annotations

import contextlib
import re
import statistics
import zipfile
from collections.abc import Iterator
from typing import Any

import pytest
from small_adapters import finished_run, lora
from studio_server import serving
from test_browser import browser, page, pytestmark, shoot, sync_api  # noqa: F401

from engine import PromptTuningConfig
from studio.context import Studio

MOVES = 7
# When the pointer let go of a slider, and when the first words after that stood in the mix's column.
WATCH = """() => {
  window.heard = [];
  let since = 0, head = '';
  const column = () => document.querySelector('#mix-answers [data-who=mix]');
  document.addEventListener('pointerup', (event) => {
    if (!event.target.matches('#mix-sliders input[type=range]')) return;
    since = performance.now();
    head = column() ? column().querySelector('h3').innerText : '';
  }, true);
  new MutationObserver(() => {
    const now = column();
    if (!since || !now || now.querySelector('h3').innerText === head) return;
    if (!now.querySelector('.answer').innerText.trim()) return;
    window.heard.push(performance.now() - since);
    since = 0;
  }).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A studio with two LoRAs of one base and one adapter that cannot be mixed."""
    sync_api.expect.set_options(timeout=30_000)
    home = tmp_path_factory.mktemp("home")
    with contextlib.closing(Studio.open(home)) as studio:
        finished_run(studio, "parrot", lora(), 1)
        finished_run(studio, "captain", lora(r=6), 2)
        finished_run(studio, "twenty words", PromptTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM"), 3)
    with serving(home) as running:
        yield running.address


def cards(page: Any) -> Any:  # noqa: F811
    return page.locator("#adapters-cards .ad-card")


def said(page: Any) -> str:  # noqa: F811
    page.locator("#mix-answers >> text=Answered in").wait_for(timeout=120_000)
    return str(page.locator("#mix-answers [data-who=mix] .answer").inner_text())


def slide(page: Any, number: int, share: float) -> None:  # noqa: F811
    """Press on a slider's track and let go, as a person does."""
    box = page.locator(f"#mix-weight-{number} input[type=range]").bounding_box()
    page.mouse.move(box["x"] + box["width"] * share, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.up()


def test_two_adapters_are_mixed_heard_saved_and_found_again(page: Any, server: str) -> None:  # noqa: F811
    page.goto(f"{server}/?tab=adapters")
    cards(page).first.wait_for()
    assert cards(page).count() == 3
    other = cards(page).filter(has_text="twenty words")
    assert other.locator("button.ad-mix").count() == 0 and "virtual tokens" in other.inner_text()
    page.locator("#adapters-search textarea, #adapters-search input").first.fill("captain")
    sync_api.expect(cards(page)).to_have_count(1)
    page.locator("#adapters-search textarea, #adapters-search input").first.fill("")
    sync_api.expect(cards(page)).to_have_count(3)

    for name in ("captain", "parrot"):
        cards(page).filter(has_text=name).locator("button.ad-mix").click()
        cards(page).filter(has_text=name).locator("button[aria-pressed=true]").wait_for()
    sync_api.expect(page.locator("#mix-weight-1")).to_be_visible()
    page.locator("#mix-prompt textarea").fill("What colour is grass?")
    page.click("#mix-answer")
    first = said(page)
    base = page.locator("#mix-answers [data-who=base] .answer").inner_text()
    assert first and base

    page.evaluate(WATCH)
    answers = []
    for move in range(MOVES):
        slide(page, 0, 0.05 if move % 2 else 0.95)
        page.wait_for_function("count => window.heard.length > count", arg=move)
        answers.append(said(page))
    assert answers[0] != answers[1] and set(answers[::2]) == {answers[0]}, answers
    assert page.locator("#mix-answers [data-who=base] .answer").inner_text() == base
    waits = page.evaluate("window.heard")
    print(
        f"from letting go to the first words: median {statistics.median(waits):.0f} ms of {sorted(map(round, waits))}"
    )

    page.locator("#mix-name textarea, #mix-name input").first.fill("a calm sea")
    page.click("#mix-save")
    page.locator("#adapters-work [data-work=live]").wait_for()
    page.locator("#adapters-work [data-kind=save_mix]").wait_for(timeout=120_000)
    sync_api.expect(cards(page)).to_have_count(4)
    assert "a calm sea" in cards(page).first.inner_text() and "a mix" in cards(page).first.inner_text()
    page.click("#work-close")

    page.click("#mix-keep")
    page.locator("#mix-kept .notice.good").wait_for()
    weight = page.locator("#mix-weight-0 input[type=number]").input_value()
    page.wait_for_timeout(300)
    shoot(page, "adapters")
    page.reload()
    page.locator("#mix-open input").click()
    page.get_by_role("option", name="a calm sea", exact=True).click()
    sync_api.expect(page.locator("#mix-weight-0 input[type=number]")).to_have_value(weight)
    sync_api.expect(page.locator("#mix-weight-1")).to_be_visible()


def test_one_adapter_is_exported_renamed_resized_deleted_and_taken_back(
    page: Any,  # noqa: F811
    server: str,
    tmp_path: Any,
) -> None:
    page.goto(f"{server}/?tab=adapters")
    cards(page).filter(has_text="captain").locator("button.ad-name").click()
    page.locator("#adapter-head >> text=captain").wait_for()
    page.locator("#adapter-export button.label-wrap").click()
    assert page.locator("#export-kohya").is_disabled()
    assert "Such files are for Stable Diffusion" in page.locator("#adapter-export").inner_text()
    page.click("#export-peft")
    page.locator("#adapters-work [data-kind=export]").wait_for(timeout=60_000)
    with page.expect_download() as waiting:
        page.locator("#work-download").click()
    waiting.value.save_as(tmp_path / "captain.zip")
    assert "adapter_model.safetensors" in zipfile.ZipFile(tmp_path / "captain.zip").namelist()
    page.click("#work-close")

    page.locator("#adapter-ranks button.label-wrap").click()
    page.locator("#adapter-cost >> text=its error is").wait_for(timeout=120_000)
    page.wait_for_timeout(500)
    shoot(page, "adapter")
    page.click("#adapter-resize")
    page.locator("#adapters-work [data-kind=resize]").wait_for(timeout=120_000)
    sync_api.expect(cards(page).filter(has_text="captain r3")).to_have_count(1)

    page.locator("#adapter-name textarea, #adapter-name input").first.fill("the old captain")
    page.click("#adapter-rename")
    page.locator("#adapter-head >> text=the old captain").wait_for()
    before = cards(page).count()
    page.click("#adapter-delete")
    page.click("#adapter-delete-yes")
    sync_api.expect(cards(page)).to_have_count(before - 1)
    assert page.locator("#adapter-detail").is_hidden()
    page.click("#adapters-undo")
    sync_api.expect(cards(page)).to_have_count(before)
    assert cards(page).filter(has_text=re.compile("the old captain")).count() == 1

    page.locator("#adapters-import button.label-wrap").click()
    page.locator("#import-files input[type=file]").set_input_files(tmp_path / "captain.zip")
    page.locator("#import-name textarea, #import-name input").first.fill("back again")
    page.wait_for_timeout(500)
    page.click("#import-start")
    page.locator("#adapters-work [data-kind=import]").wait_for(timeout=120_000)
    sync_api.expect(cards(page).filter(has_text="back again")).to_have_count(1)
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    page.locator("#import-files input[type=file]").set_input_files(tmp_path / "bad.safetensors")
    page.wait_for_timeout(500)
    page.click("#import-start")
    page.locator("#import-fault .notice.error[data-code=checkpoint]").wait_for()


def test_an_empty_library_says_what_to_do(browser: Any, tmp_path: Any) -> None:  # noqa: F811
    with serving(tmp_path) as running:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"{running.address}/?tab=adapters")
        page.locator("#adapters-empty >> text=No adapters yet").wait_for()
        assert page.locator("#adapters-mixer").is_hidden()
        page.wait_for_timeout(500)
        shoot(page, "adapters-empty")
        page.get_by_role("button", name="Start with a sample").first.click()
        page.locator("#start-toy").wait_for()
        page.close()
