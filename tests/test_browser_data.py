"""The Data page in a real browser: files and folders, columns, tokens, problems and their fixes, many rows, the bin."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from studio_server import serving
from test_browser import browser, page, pytestmark, shoot, sync_api  # noqa: F401

from studio.context import Studio
from studio.datasets import Datasets

pytestmark = [*pytestmark, pytest.mark.pages]

MANY = 100_000
# A folder that is dropped: entries as a browser gives them, of files made here.
DROP = """() => {
  const file = (path, content) => ({name: path.split('/').pop(), fullPath: path, isFile: true, isDirectory: false,
    file: (done) => done(new File([content], path.split('/').pop()))});
  const folder = (path, inside) => ({name: path.split('/').pop(), fullPath: path, isFile: false, isDirectory: true,
    createReader: () => {
      let left = inside;
      return {readEntries: (done) => { const some = left; left = []; done(some); }};
    }});
  const dropped = folder('/texts', [file('/texts/one.csv', 'question,answer\\na,1\\n'), file('/texts/.hidden', 'x'),
    folder('/texts/more', [file('/texts/more/one.csv', 'question,answer\\nb,2\\nc,3\\n')])]);
  const event = new Event('drop', {bubbles: true, cancelable: true});
  Object.defineProperty(event, 'dataTransfer', {value: {items: [{webkitGetAsEntry: () => dropped}], files: []}});
  document.querySelector('#data-file button').dispatchEvent(event);
}"""


def png(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A studio with one data set, of many rows."""
    sync_api.expect.set_options(timeout=60_000)
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("files")
    lines = (f"What is {n}?,It is {n}{' sparkling' if n % 10_000 == 0 else ''}." for n in range(MANY))
    (folder / "many.csv").write_text("question,answer\n" + "\n".join(lines), encoding="utf-8")
    with contextlib.closing(Studio.open(home)) as studio:
        Datasets(studio.store, studio.home).bring_in(folder / "many.csv")
    with serving(home) as running:
        yield running.address


def view(page: Any, name: str) -> None:  # noqa: F811
    page.locator(f"#data-view-{name}-button").click()


def bring(page: Any, *paths: Path) -> None:  # noqa: F811
    page.locator("#data-file input[type=file]").set_input_files(list(paths))


def test_a_hundred_thousand_rows_are_paged_searched_and_split(page: Any, server: str) -> None:  # noqa: F811
    expect = sync_api.expect
    page.goto(f"{server}/?tab=data")
    page.locator("#data-recent button", has_text="many.csv").click()
    expect(page.locator("#data-use")).to_have_text("Use these 100,000 rows", timeout=120_000)
    expect(page.locator("#data-count")).to_contain_text("Rows 1 to 20 of 100,000")
    assert page.locator("#data-recent button").count() == 0 or page.locator("#data-recent").is_hidden()
    page.click("#data-after")
    expect(page.locator("#data-count")).to_contain_text("Rows 21 to 40 of")
    page.locator("#data-page input").fill("5000")
    page.locator("#data-page input").press("Enter")
    expect(page.locator("#data-rows")).to_contain_text("What is 99999?")
    expect(page.locator("#data-after")).to_be_disabled()
    page.locator("#data-search input, #data-search textarea").first.fill("sparkling")
    expect(page.locator("#data-count")).to_contain_text("Rows 1 to 10 of 10 that have these words, of 100,000")
    assert page.locator("#data-rows tbody tr").count() == 10
    view(page, "sides")
    expect(page.locator("#data-sides")).to_contain_text("90,000 rows to train on, 10,000 held back", timeout=120_000)
    expect(page.locator("#data-sides .notice.good")).to_contain_text("No row and no question stands on both sides")
    shoot(page, "data-sides")


def test_columns_tokens_and_the_cut_before_anything_starts(page: Any, server: str, tmp_path: Path) -> None:  # noqa: F811
    expect = sync_api.expect
    lines = [f"{n},The answer to {n} is here.,What is {n}?" for n in range(30)]
    lines.append("30," + "a very long answer " * 60 + ",What is long?")
    (tmp_path / "odd.csv").write_text("number,first,second\n" + "\n".join(lines), encoding="utf-8")
    page.goto(f"{server}/?tab=data")
    bring(page, tmp_path / "odd.csv")
    page.locator("#data-verdict .notice.warn >> text=Is this right?").wait_for()
    expect(page.locator("#data-rows tbody tr").first.locator(".learn")).to_have_text("What is 0?")
    page.get_by_label("Column of the prompt").click()
    page.get_by_role("option", name="second", exact=True).click()
    # A list of choices takes a moment to fold up, and the other one has the same choices.
    expect(page.get_by_role("option")).to_have_count(0)
    page.get_by_label("Column of the completion").click()
    page.get_by_role("option", name="first", exact=True).click()
    expect(page.locator("#data-rows tbody tr").first.locator(".learn")).to_have_text("The answer to 0 is here.")

    view(page, "tokens")
    rows = page.locator("#token-rows .dp-tokens")
    rows.first.wait_for(timeout=180_000)
    assert rows.count() == 5
    first = rows.first
    learned = "".join(first.locator(".tk.l").all_inner_texts())
    assert learned == "The answer to 0 is here.<|end|>", learned
    assert first.locator(".tk.s").count() >= 4 and first.locator(".tk.x").count() == 0
    assert int(first.get_attribute("data-tokens")) == first.locator(".tk").count()
    lengths = page.locator("#token-lengths .dp-lengths")
    expect(lengths).to_have_attribute("data-cut", "1")
    expect(page.locator("#token-lengths .notice")).to_contain_text("longer than 128 tokens and cut: 1.")
    page.click("#token-cut")
    expect(rows.first.locator("h4")).to_contain_text("cut at 128")
    assert rows.first.locator(".tk.x").count() > 100
    page.wait_for_timeout(500)
    shoot(page, "data-tokens")
    page.locator("#token-length input").fill("1000")
    page.locator("#token-length input").press("Enter")
    # The base's own context ends before that.
    expect(lengths).to_have_attribute("data-limit", "512")
    page.locator("#token-loss label", has_text="all").click()
    expect(page.locator("#token-rows .tk.l", has_text="What").first).to_be_visible()
    view(page, "rows")
    view(page, "tokens")
    assert page.locator("#token-length input").input_value() == "1000"


def test_problems_are_fixed_and_taken_back(page: Any, server: str, tmp_path: Path) -> None:  # noqa: F811
    expect = sync_api.expect
    lines = [f"q{n},a{n}" for n in range(20)]
    lines += ["q1,a1", "q2,a2", "q3,another", "q90,", "q91,", "q92", "q93, spaces "]
    path = tmp_path / "messy.csv"
    path.write_text("question,answer\n" + "\n".join(lines), encoding="utf-8")
    page.goto(f"{server}/?tab=data")
    bring(page, path)
    expect(page.locator("#data-use")).to_have_text("Use these 24 rows")
    view(page, "problems")
    problems, rows = page.locator("#data-problems"), page.locator("#data-problem-rows tbody tr")
    expect(problems).to_contain_text("24 kept + 3 skipped = 27 rows")
    counts = {
        card.get_attribute("data-cause"): card.get_attribute("data-count")
        for card in problems.locator(".dp-cause").all()
    }
    assert counts == {"duplicate": "2", "other-answer": "1", "empty-field": "2", "ragged": "1", "outer-spaces": "1"}
    assert rows.count() == 7
    page.wait_for_timeout(500)
    shoot(page, "data-problems")
    problems.locator("[data-see=duplicate]").click()
    expect(rows).to_have_count(2)
    expect(rows.first).to_contain_text("The same as line 3")

    problems.locator("[data-fix=duplicate]").click()
    expect(page.locator("#data-use")).to_have_text("Use these 22 rows")
    expect(page.locator("#data-done")).to_contain_text("24 rows became 22. The file is as it was.")
    problems.locator("[data-fix=empty-field]").click()
    # Without words nothing is filled in; the box is where the cursor is now.
    expect(problems.locator("[data-cause=empty-field] input")).to_be_focused()
    page.keyboard.type("no answer")
    page.keyboard.press("Enter")
    expect(page.locator("#data-use")).to_have_text("Use these 24 rows")
    problems.locator("[data-fix=outer-spaces][data-action=trim]").click()
    expect(problems.locator("[data-cause=outer-spaces]")).to_contain_text("Decided: Trim")
    expect(problems).to_contain_text("24 kept + 3 skipped = 27 rows")
    view(page, "about")
    about = page.locator("#data-about")
    expect(about).to_contain_text("The same row twice: keep the first of each, 24 rows became 22")
    prints = about.locator("dd").all_inner_texts()
    assert re.fullmatch(r"[0-9a-f]{16}", prints[0]) and prints[0] != prints[1]
    page.wait_for_timeout(300)
    shoot(page, "data-about")

    view(page, "problems")
    for cause in ("duplicate", "empty-field", "outer-spaces"):
        problems.locator(f"[data-fix={cause}][data-action='']").click()
        expect(problems.locator(f"[data-fix={cause}][data-action='']")).to_have_count(0)
    expect(page.locator("#data-use")).to_have_text("Use these 24 rows")
    view(page, "about")
    expect(about.locator("dd").first).to_have_text(prints[1])

    page.locator("#data-name input, #data-name textarea").first.fill("my questions")
    page.click("#data-rename")
    expect(page.locator("#data-verdict")).to_contain_text("my questions: recognised as")
    page.click("#data-delete")
    page.click("#data-delete-yes")
    expect(page.locator("#data-said")).to_contain_text("my questions is in the bin")
    assert page.locator("#data-use").is_hidden() and page.locator("#data-recent", has_text="my questions").count() == 0
    page.locator("#data-bin button.label-wrap").click()
    page.click("#data-bin-restore")
    expect(page.locator("#data-use")).to_have_text("Use these 24 rows")


def test_a_fixed_set_is_what_is_trained_on(page: Any, server: str, tmp_path: Path) -> None:  # noqa: F811
    expect = sync_api.expect
    path = tmp_path / "twice.csv"
    path.write_text("question,answer\n" + "".join(f"q{n % 20},a{n % 20}\n" for n in range(40)), encoding="utf-8")
    page.goto(f"{server}/?tab=data")
    bring(page, path)
    expect(page.locator("#data-use")).to_have_text("Use these 40 rows")
    view(page, "problems")
    page.locator("#data-problems [data-fix=duplicate]").click()
    expect(page.locator("#data-use")).to_have_text("Use these 20 rows")
    page.click("#data-use")
    page.locator("#train-start >> text=Train on these 18 rows").wait_for()


def test_a_folder_of_pictures_and_several_files(page: Any, server: str, tmp_path: Path) -> None:  # noqa: F811
    expect = sync_api.expect
    folder = tmp_path / "cats"
    (folder / "dark").mkdir(parents=True)
    colours = ("red", "green", "blue", "red", "orange")
    for number, colour in enumerate(colours):
        (folder / f"{number}.png").write_bytes(png(colour))
        (folder / f"{number}.txt").write_text(f"a {colour} cat", encoding="utf-8")
    (folder / "dark" / "0.png").write_bytes(png("black"))
    page.goto(f"{server}/?tab=data")
    page.locator("input[type=file][webkitdirectory]").set_input_files(folder)
    expect(page.locator("#data-use")).to_have_text("Use these 5 rows")
    expect(page.locator("#data-verdict")).to_contain_text("cats: recognised as images")
    expect(page.locator("#data-verdict")).to_contain_text("5 kept + 1 skipped = 6 rows")
    assert page.locator("#data-rows .dp-cell img").count() == 5
    page.wait_for_timeout(500)
    shoot(page, "data-grid")
    page.locator("#data-search input, #data-search textarea").first.fill("red")
    expect(page.locator("#data-rows .dp-cell")).to_have_count(2)
    page.locator("#data-view label", has_text="Table").click()
    expect(page.locator("#data-rows tbody tr")).to_have_count(2)
    view(page, "problems")
    expect(page.locator("#data-problems [data-cause=duplicate]")).to_be_visible()
    page.locator("#data-problems [data-cause=no-caption] input").fill("a cat in the dark")
    page.locator("#data-problems [data-fix=no-caption]").click()
    expect(page.locator("#data-use")).to_have_text("Use these 6 rows")
    view(page, "tokens")
    expect(page.locator("#token-rows .dp-tokens").first).to_be_visible(timeout=180_000)
    assert page.locator("#token-rows .tk.l").count() > 0

    page.goto(f"{server}/?tab=data")
    loose = [*sorted(folder.glob("*.png"))[:2], *sorted(folder.glob("*.txt"))[:2]]
    bring(page, *loose)
    expect(page.locator("#data-use")).to_have_text("Use these 2 rows")
    expect(page.locator("#data-several")).to_contain_text("4 files became this one data set")


def test_a_folder_that_is_dropped_is_read_with_the_folders_in_it(page: Any, server: str) -> None:  # noqa: F811
    page.goto(f"{server}/?tab=data")
    page.locator("#data-file button").first.wait_for()
    page.evaluate(DROP)
    sync_api.expect(page.locator("#data-use")).to_have_text("Use these 3 rows")
    sync_api.expect(page.locator("#data-several")).to_contain_text("texts/more/one.csv, texts/one.csv")


def test_an_empty_page_offers_samples_and_uneven_classes_are_said(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    with serving(tmp_path) as running:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        page.goto(f"{running.address}/?tab=data")
        page.locator("#data-sample-topics").wait_for()
        page.wait_for_timeout(500)
        shoot(page, "data-empty")
        page.click("#data-sample-topics")
        page.locator("#data-balance .dp-bar").first.wait_for()
        assert page.locator("#data-offered").is_hidden() and page.locator("#data-balance .notice.warn").count() == 0
        uneven = tmp_path / "uneven.csv"
        uneven.write_text("text,label\n" + "".join(f"t{n},{'a' if n else 'b'}\n" for n in range(15)), encoding="utf-8")
        bring(page, uneven)
        told = page.locator("#data-balance .notice.warn", has_text="a has 14 times the rows of b")
        told.wait_for()
        shoot(page, "data-classes")
        page.close()
