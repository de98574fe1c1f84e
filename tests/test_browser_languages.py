"""Both languages in a real browser: the browser's choice, the switch, every tab in Korean on a home that is in use."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_adapters import finished_run, lora
from studio_server import Running, serving
from test_browser import WIDTHS, browser, pytestmark, shoot, sync_api  # noqa: F401

from engine.adapters import ADAPTERS
from engine.models.catalogue import BUILTIN
from studio import presets, scores
from studio.context import Studio
from studio.page import TAB_IDS

pytestmark = [*pytestmark, pytest.mark.pages]

HANGUL = re.compile("[가-힣]")
ENGLISH = re.compile(r"[A-Za-z]{3,}")
NAMES = {
    *(base.title for base in BUILTIN.values()),
    *(base.name for base in BUILTIN.values()),
    *(method.title for method in presets.methods().values()),
    *ADAPTERS,
    "full",
    "Adapter Studio",
    "English",
    # Gradio's own, which it says in English only.
    "Click to upload or drop files",
    "Reset to default value",
}
"""What is called the same in every language."""

# What can be read on the page now: its texts, and what its fields and signs are called. Left out: code and the log, and
# what the page marks as not to be translated.
READABLE = """() => {
  const found = [];
  const out = 'pre, code, .cm-editor, script, style, textarea, [translate=no], footer, [lang=en]';
  const shown = (element) => element.checkVisibility({visibilityProperty: true, opacityProperty: true})
    && element.getClientRects().length > 0;
  const walker = document.createTreeWalker(document.querySelector('.gradio-container'), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim(), parent = walker.currentNode.parentElement;
    if (text && !parent.closest(out) && shown(parent)) found.push(text);
  }
  for (const element of document.querySelectorAll('.gradio-container *')) {
    if (element.closest(out) && !element.matches('textarea') || !shown(element)) continue;
    for (const name of ['placeholder', 'aria-label', 'title', 'alt', 'data-head', 'aria-description']) {
      const text = (element.getAttribute(name) || '').trim();
      if (text) found.push(text);
    }
    if (element.matches('input[role=listbox], input[role=combobox]') && element.value) found.push(element.value);
  }
  return [...new Set(found)];
}"""


def korean_home(home: Path) -> None:
    """A home whose owner writes Korean, with one run to its end, its samples and its score."""
    with contextlib.closing(Studio.open(home)) as studio:
        rows = home / "질문.csv"
        pairs = [f"{n}번 질문은 무엇인가요?,{n}번 대답입니다." for n in range(24)]
        rows.write_text("question,answer\n" + "\n".join(pairs) + "\n", encoding="utf-8")
        from studio.datasets import Datasets

        found = Datasets(studio.store, home).bring_in(rows)
        run = finished_run(studio, "앵무새", lora(), 1)
        finished_run(studio, "선장", lora(r=6), 2)
        studio.store.db.execute("UPDATE runs SET dataset = ? WHERE id = ?", [found.id, run])
        say = studio.store.add_event
        start = {"total_steps": 12, "trainable": 6144, "parameters": 2_000_000, "train_rows": 22, "eval_rows": 2}
        say(run, {"type": "start", **start})
        for step in range(1, 13):
            say(run, {"type": "step", "step": step, "loss": 4 - step / 6, "lr": 1e-3, "grad_norm": 1.5, "tokens": 90})
            if step % 4 == 0:
                say(run, {"type": "eval", "step": step, "loss": 4.2 - step / 8, "tokens": 80})
                say(run, {"type": "sample", "step": step, "prompt": "안녕하세요?", "text": f"{step}번째 대답"})
        say(run, {"type": "done", "step": 12, "loss": 2.0, "eval_loss": 2.7, "first_eval_loss": 3.7, "seconds": 21})
        lines = [
            {"who": who, "metric": "loss", "value": value, "rows": 2, "type": "score"}
            for who, value in (("base", 3.7), ("adapter", 2.7))
        ]
        result = scores.read("\n".join(map(json.dumps, lines))).to_dict()
        studio.store.db.execute(
            "INSERT INTO scores (run_id, state, asked, version, created, ended, result)"
            " VALUES (?, 'done', '{}', 1, ?, ?, ?)",
            [run, time.time() - 9, time.time(), json.dumps(result)],
        )


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    sync_api.expect.set_options(timeout=120_000)
    home = tmp_path_factory.mktemp("home")
    korean_home(home)
    with serving(home) as running:
        yield running


@contextlib.contextmanager
def visiting(browser: Any, locale: str) -> Iterator[Any]:  # noqa: F811
    context = browser.new_context(viewport={"width": 1280, "height": 900}, locale=locale)
    page = context.new_page()
    page.set_default_timeout(120_000)
    yield page
    context.close()


def settled(page: Any) -> None:
    """What is drawn has stayed as it is for a while."""
    before = None
    while (now := page.evaluate("document.querySelector('.gradio-container').innerText")) != before:
        before = now
        page.wait_for_timeout(1000)


def english(readable: list[str]) -> list[str]:
    """What is said in English words, and neither a name nor a term."""
    left = []
    for text in readable:
        if text in NAMES:
            continue
        rest = text
        # A layer's or a file's name, q_proj or adapter_config.json.
        rest = re.sub(r"[A-Za-z]\w*[_.-]\w[\w.-]*", "", rest)
        for name in sorted(NAMES, key=len, reverse=True):
            rest = rest.replace(name, "")
        if not HANGUL.search(text) and ENGLISH.search(rest):
            left.append(text)
    return left


@pytest.mark.parametrize("tab", TAB_IDS)
def test_a_page_in_korean_says_nothing_in_english(browser: Any, running: Running, tab: str) -> None:  # noqa: F811
    with visiting(browser, "ko-KR") as page:
        page.goto(f"{running.address}/?tab={tab}")
        page.locator(f"#tab-{tab}-button[aria-selected=true]").wait_for()
        settled(page)
        assert page.locator("html").get_attribute("lang") == "ko"
        shoot(page, f"korean-{tab}")
        left = english(page.evaluate(READABLE))
        assert not left, f"{len(left)} texts in English:\n" + "\n".join(left)


def test_an_adapter_in_detail_and_in_a_mix_says_nothing_in_english(browser: Any, running: Running) -> None:  # noqa: F811
    with visiting(browser, "ko-KR") as page:
        page.goto(f"{running.address}/?tab=adapters")
        page.locator("#adapters-cards .ad-name >> text=앵무새").click()
        page.locator("#adapter-head .run-head").wait_for()
        page.locator("#adapter-export button").first.click()
        page.locator("#export-peft").wait_for()
        page.locator("#adapters-import button").first.click()
        page.locator("#import-start").wait_for()
        page.locator("#adapters-cards button.ad-mix").first.click()
        page.locator("#mix-weight-0").wait_for()
        page.locator("#adapter-delete").click()
        page.locator("#adapter-delete-yes").wait_for()
        settled(page)
        shoot(page, "korean-adapter")
        left = english(page.evaluate(READABLE))
        assert not left, "\n".join(left)


def test_the_switch_changes_the_language_for_good_and_keeps_the_place(browser: Any, running: Running) -> None:  # noqa: F811
    with visiting(browser, "en-US") as page:
        page.goto(f"{running.address}/?tab=adapters")
        chosen = page.locator("#tab-adapters-button[aria-selected=true]")
        sync_api.expect(chosen).to_have_text("Adapters")
        settled(page)
        assert not HANGUL.search(" ".join(page.evaluate(READABLE)).replace("앵무새", "").replace("선장", ""))
        page.get_by_role("link", name="한국어").click()
        sync_api.expect(chosen).to_have_text("어댑터")
        assert page.locator("html").get_attribute("lang") == "ko" and "language" not in page.url
        # Gradio's own words too, and what callbacks answer after the page is there.
        assert page.evaluate("navigator.language") == "ko"
        # At once, before the page has come to its tab: the place is kept in the address.
        page.reload()
        page.locator("#tab-start-button").wait_for()
        page.reload()
        sync_api.expect(chosen).to_have_text("어댑터")
        page.locator("#adapters-cards .ad-card").first.wait_for()
        page.get_by_role("link", name="English").click()
        sync_api.expect(chosen).to_have_text("Adapters")


def test_an_address_that_names_a_language_goes_before_the_browsers(browser: Any, running: Running) -> None:  # noqa: F811
    with visiting(browser, "ko-KR") as page:
        page.goto(f"{running.address}/?tab=scores&language=en")
        sync_api.expect(page.locator("#tab-scores-button[aria-selected=true]")).to_have_text("Scores")
        settled(page)
        assert "language=en" in page.url
        readable = " ".join(page.evaluate(READABLE))
        assert not HANGUL.search(readable.replace("앵무새", "").replace("선장", "").replace("질문", ""))


def test_no_text_was_looked_for_in_vain_on_all_these_pages(running: Running) -> None:
    missed = re.findall(r"No ko text for (.*)", running.log.read_text())
    assert not missed, "\n".join(missed)
