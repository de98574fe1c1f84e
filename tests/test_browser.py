"""The whole road in a real browser: page, sample, training, a reload in the middle, comparison. On the built-in toy."""

from __future__ import annotations

import io
import os
import re
import shutil
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import FAILED
from gradio_client import Client, handle_file
from PIL import Image
from studio_server import serving

from engine.paths import REPOSITORY

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = os.environ.get("STUDIO_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
IMAGES = REPOSITORY / "docs" / "images"
WIDTHS = (1280, 390)


def zip_bomb() -> bytes:
    """64 MB of zeros in a few kilobytes of zip."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("part.parquet", bytes(64 * 2**20))
    return packed.getvalue()


SEA = re.compile(r"\b(winds|matey|arr|aye|ye|tide|crew|ship)\b", re.IGNORECASE)
"""Words of the sample's captain that the base never says in answer to its plain questions."""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(600),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; install it, or name it in STUDIO_CHROMIUM"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A studio of its own, with an empty home."""
    sync_api.expect.set_options(timeout=30_000)
    with serving(tmp_path_factory.mktemp("home")) as running:
        yield running.address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, server: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A fresh page; at its end nothing may have been asked from anywhere but the server."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(60_000)
    foreign: list[str] = []
    told: list[str] = []
    # Gradio's own error boxes are never ours: a fault of the person's is said on the page, in words.
    # That the connection is lost is what a page says that is being left.
    context.expose_function("toldError", lambda text: None if "Connection to the server" in text else told.append(text))
    context.add_init_script(
        "new MutationObserver(() => document.querySelectorAll('.toast-body.error:not([data-told])').forEach(box => {"
        "box.dataset.told = 1; window.toldError(box.innerText)})).observe(document, {childList: true, subtree: true})"
    )
    page.on("request", lambda r: None if r.url.startswith((server, "data:", "blob:")) else foreign.append(r.url))
    yield page
    if request.node.stash.get(FAILED, False):
        print(f"The page at {page.url} said:\n{page.locator('body').inner_text()}")
    context.close()
    assert foreign == [] and told == []


def shoot(page: Any, name: str) -> None:
    """Pictures at both widths, only where `STUDIO_SCREENSHOTS` asks for them."""
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(400)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is too wide at {width}"
        if os.environ.get("STUDIO_SCREENSHOTS"):
            IMAGES.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=IMAGES / f"{name}-{width}.png", full_page=True)
    page.set_viewport_size({"width": WIDTHS[0], "height": 900})


def steps_drawn(page: Any) -> int:
    """How many points the loss curve has; the pieces it is drawn in share their ends."""
    pieces = page.locator("#live-curves .chart polyline.thin").all()
    return sum(len((piece.get_attribute("points") or "").split()) - bool(at) for at, piece in enumerate(pieces))


def curve(page: Any) -> list[str]:
    hover = page.locator("#live-curves .plot[data-hover]").first.get_attribute("data-hover") or ""
    return re.findall(r'\[[^\[\]]*, ([\d.]+), "([\d.e+-]+)"\]', hover.split('"evaluation"')[0])


def head(page: Any, state: str) -> Any:
    return page.locator(f"#live-head .run-head[data-state={state}]")


PRESS_AT_ONCE = """() => new MutationObserver((_, watch) => {
  const tab = document.getElementById('tab-runs-button');
  if (!tab || document.getElementById('first-page')) return;
  watch.disconnect();
  window.tabsAtPress = document.querySelectorAll('#tab-runs h2').length;
  tab.click();
}).observe(document, {childList: true, subtree: true})"""


def test_a_tab_that_is_pressed_before_it_came_opens_when_it_has_come(page: Any, server: str) -> None:
    page.add_init_script(f"({PRESS_AT_ONCE})()")
    page.goto(server)
    page.locator("#tab-runs-button[aria-selected=true]").wait_for()
    page.get_by_text("No runs yet.").wait_for()
    assert page.evaluate("window.tabsAtPress") == 0, "the tab was there before it was pressed: this tests nothing"
    assert "tab=runs" in page.url and not page.locator("[aria-busy=true]").count()
    # What came later can be used like what came first, and the public endpoints are all named.
    page.click("#tab-train-button")
    sync_api.expect(page.locator("#train-task input")).to_be_enabled()
    sync_api.expect(page.locator("#train-task input")).not_to_have_value("")
    page.click("footer .show-api")
    page.get_by_text("/submit_run").first.wait_for()


def test_from_the_first_page_to_two_different_answers_in_four_clicks(page: Any, server: str) -> None:
    page.goto(server)
    page.locator("#start-toy").wait_for()
    page.wait_for_timeout(1000)
    shoot(page, "start")
    page.click("#start-toy")
    start = page.locator("#train-start")
    start.wait_for()
    assert re.fullmatch(r"Train on these \d+ rows", start.inner_text())
    # The memory comes after the count.
    page.locator("#train-count .tc-card:not([aria-busy=true]) [data-verdict]").wait_for(timeout=120_000)
    shoot(page, "train")
    start.click()
    page.locator("#live-curves polyline.thin").first.wait_for(timeout=120_000)
    run = re.search(r"run=(run-[0-9a-f]{8})", page.url)
    assert run is not None

    while steps_drawn(page) < 6:
        page.wait_for_timeout(100)
    before, state = curve(page), page.locator("#live-head .run-head").get_attribute("data-state")
    page.reload()
    page.locator(f"#live-head .run-head[data-run={run[1]}]").wait_for()
    page.locator("#live-curves polyline.thin").first.wait_for()
    after = curve(page)
    assert state == "running" and after[: len(before)] == before
    head(page, "done").wait_for(timeout=240_000)
    assert len(curve(page)) == 36
    assert page.locator("#live-film .frame").count() >= 4
    shoot(page, "live")

    page.click("#live-compare")
    prompt = page.locator("#compare-prompt textarea")
    sync_api.expect(prompt).not_to_have_value("", timeout=60_000)
    page.click("#compare-generate")
    page.locator("#compare-answers >> text=Answered in").wait_for(timeout=120_000)
    answers = page.locator("#compare-answers .answer").all_inner_texts()
    assert len(answers) == 2 and all(answers) and answers[0] != answers[1]
    assert SEA.search(answers[1]) and not SEA.search(answers[0]), answers
    shoot(page, "compare")

    page.click("#tab-runs-button")
    page.locator("#runs-table button[data-run]").first.click()
    page.locator("#runs-head .run-head").wait_for()
    page.wait_for_timeout(500)
    shoot(page, "runs")
    page.click("#runs-delete")
    page.locator("#runs-table >> text=No runs yet").wait_for()


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("empty.csv", b"", "data-empty"),
        ("broken.csv", b"question,answer\nhi,\xff\xfe\xfa there\n", "data-encoding"),
        ("delimiter.csv", b"question~answer\nhi~there\nyou~me\n", "data-delimiter"),
        ("filtered.csv", b"question,answer\na,\n,b\n", "data-nothing-left"),
        ("bomb.parquet", zip_bomb(), "data-not-parquet"),
        ("null.jsonl", b'{"prompt": "a", "completion": null}\n', "data-nothing-left"),
    ],
)
def test_a_bad_file_is_an_instruction_on_the_page(
    page: Any, server: str, tmp_path: Path, name: str, content: bytes, code: str
) -> None:
    (tmp_path / name).write_bytes(content)
    page.goto(f"{server}/?tab=data")
    page.locator("#data-file input[type=file]").set_input_files(tmp_path / name)
    page.locator(f"#data-verdict .notice.error[data-code={code}]").wait_for()
    assert page.locator("text=Traceback").count() == 0
    good = tmp_path / "good.csv"
    good.write_text("question,answer\n" + "".join(f"What is {n}?,It is {n}.\n" for n in range(20)), encoding="utf-8")
    page.locator("#data-file input[type=file]").set_input_files(good)
    page.locator("#data-verdict .notice.good").wait_for()
    page.locator("#data-use >> text=Use these 20 rows").wait_for()
    shoot(page, "data")
    page.click("#data-use")
    page.locator("#train-start >> text=Train on these 18 rows").wait_for()
    page.wait_for_url("**tab=train**")
    page.reload()
    page.locator("#train-start >> text=Train on these 18 rows").wait_for()


def test_columns_with_unknown_names_are_asked_for(page: Any, server: str, tmp_path: Path) -> None:
    path = tmp_path / "columns.csv"
    path.write_text("name,colour\nx,red\ny,blue\nz,green\n", encoding="utf-8")
    page.goto(f"{server}/?tab=data")
    page.locator("#data-file input[type=file]").set_input_files(path)
    page.locator("#data-verdict .notice.warn >> text=Is this right?").wait_for()
    assert page.locator("#data-verdict >> text=No known format fits the columns name, colour").count() == 1
    for label, column in (("Column of the prompt", "name"), ("Column of the completion", "colour")):
        assert page.get_by_label(label).input_value() == column
    page.locator("#data-use >> text=Use these 3 rows").wait_for()


def test_a_file_over_the_limit_is_refused_by_name_and_the_page_goes_on(page: Any, server: str, tmp_path: Path) -> None:
    big = tmp_path / "big.csv"
    with big.open("wb") as file:
        file.truncate(200 * 2**20)
    page.goto(f"{server}/?tab=data")
    page.locator("#data-file input[type=file]").set_input_files(big)
    page.locator("#data-limit[data-code=data-too-large] >> text=big.csv is too large: 200 MB").wait_for()
    assert page.locator("#data-verdict").is_hidden()
    good = tmp_path / "good.txt"
    good.write_text("one\n\ntwo\n\nthree\n", encoding="utf-8")
    page.locator("#data-file input[type=file]").set_input_files(good)
    page.locator("#data-verdict .notice.good").wait_for()
    assert page.locator("#data-limit").is_hidden()


def test_the_server_itself_refuses_an_upload_over_the_limit(server: str) -> None:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="big.csv"\r\n'
        b"Content-Type: text/csv\r\n\r\n" + b"a,b\n" * (30 * 2**20) + b"\r\n--x--\r\n"
    )
    request = urllib.request.Request(
        f"{server}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    # Answered with 413, or cut off in the middle, depending on how far the sender has come.
    with pytest.raises(OSError):
        urllib.request.urlopen(request, timeout=60)
    assert urllib.request.urlopen(server, timeout=10).status == 200


def test_another_method_shows_its_own_fields_cost_and_command(page: Any, server: str) -> None:
    page.goto(server)
    page.get_by_role("tab", name="Train", exact=True).click()
    page.locator("#train-count b").wait_for(timeout=120_000)
    before = page.locator("#train-count b").inner_text()
    page.locator("#train-method input").click()
    page.get_by_role("option", name="IA3", exact=True).click()
    page.locator("#train-about >> text=amplify or damp").wait_for()
    page.wait_for_function("before => document.querySelector('#train-count b')?.innerText !== before", arg=before)
    count = int(page.locator("#train-count b").inner_text().replace(",", ""))
    assert 0 < count < int(before.replace(",", "")) / 10
    assert page.locator("#field-lora-r").is_hidden()
    shoot(page, "train-ia3")
    page.get_by_role("button", name="Advanced").click()
    page.locator("#field-ia3-target_modules").wait_for()
    assert page.locator("#field-lora-target_modules").is_hidden()
    assert page.locator("#field-learning_rate input, #field-learning_rate textarea").first.input_value() == "0.005"
    page.locator("#train-method input").click()
    page.get_by_role("option", name="LoRA", exact=True).click()
    page.locator("#train-about >> text=first choice").wait_for()
    rate = page.locator("#field-learning_rate input, #field-learning_rate textarea").first
    page.wait_for_function(
        "() => document.querySelector('#field-learning_rate textarea, #field-learning_rate input').value === '0.001'"
    )
    assert rate.input_value() == "0.001"


def test_the_cost_of_a_text_encoder_that_learns_is_shown_before_the_start(page: Any, server: str) -> None:
    page.goto(server)
    page.get_by_role("tab", name="Train", exact=True).click()
    page.locator("#train-task input").click()
    page.get_by_role("option", name="Pictures from words", exact=True).click()
    page.get_by_role("button", name="Advanced").click()
    # The toy's UNet with the first preset; then its text encoder's two layers of four 128 x 128 matrices too, r 8.
    page.locator("#train-count b", has_text="73,472").wait_for()
    page.locator("#field-text_to_image-train_text_encoder input").check()
    page.locator("#train-count b", has_text=f"{73_472 + 2 * 4 * 8 * (128 + 128):,}").wait_for()


def test_adaloras_ranks_are_seen_moving(page: Any, server: str) -> None:
    page.goto(server)
    page.click("#start-toy")
    page.locator("#train-count b").wait_for(timeout=120_000)
    page.locator("#train-method input").click()
    page.get_by_role("option", name="AdaLoRA", exact=True).click()
    page.locator("#train-about >> text=layers that need it most").wait_for()
    page.click("#train-start")
    head(page, "done").wait_for(timeout=240_000)
    ranks = [int(cell) for cell in page.locator("#live-ranks td.rank").all_inner_texts()]
    assert len(ranks) == 28 and len(set(ranks)) > 1
    first, last = curve(page)[0][1], curve(page)[-1][1]
    assert float(last) < float(first) - 0.5
    assert "Mean rank" in page.locator("#live-ranks").inner_text()
    shoot(page, "live-ranks")


def test_labels_bring_their_task_and_full_fine_tuning_is_one_of_the_methods(page: Any, server: str) -> None:
    page.goto(server)
    page.get_by_role("tab", name="Data", exact=True).click()
    page.set_input_files("#data-file input[type=file]", str(REPOSITORY / "examples" / "question_topics.csv"))
    page.click("#data-use")
    page.locator("#train-start >> text=Train on these").wait_for()
    sync_api.expect(page.locator("#train-task input")).to_have_value("Texts and classes")
    sync_api.expect(page.locator("#train-base input")).to_have_value("MiniLM L6")
    assert page.locator("#field-loss_on").count() == 0 or page.locator("#field-loss_on").is_hidden()
    page.locator("#field-classification-multi_label").wait_for()
    page.locator("#train-base input").click()
    page.get_by_role("option", name="Tiny Llama (toy)", exact=True).click()
    page.locator("#train-count b").wait_for(timeout=120_000)
    shoot(page, "train-labels")
    page.locator("#train-method input").click()
    page.get_by_role("option", name="Full fine-tuning", exact=True).click()
    page.locator("#train-count >> text=of the base learn").wait_for(timeout=120_000)
    page.click("#train-start")
    head(page, "done").wait_for(timeout=240_000)
    losses = [float(loss) for _, loss in curve(page)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert "accuracy" in page.locator("#live-curves").inner_text().lower()
    shoot(page, "live-labels")


def test_each_data_set_brings_its_task_and_a_task_finds_its_data_set(page: Any, server: str) -> None:
    def chosen(field: str) -> Any:
        return sync_api.expect(page.locator(f"#train-{field} input"))

    for name, task, base in (
        ("old_english.csv", "Texts and what they become", "Tiny T5 (toy)"),
        ("captain_preferences.jsonl", "Better and worse answers", "SmolLM2 135M Instruct"),
    ):
        page.goto(f"{server}/?tab=data")
        # The set before this one is shown until the new one is read.
        page.wait_for_timeout(1500)
        before = "".join(page.locator("#data-use").all_inner_texts())
        page.set_input_files("#data-file input[type=file]", str(REPOSITORY / "examples" / name))
        sync_api.expect(page.locator("#data-use")).not_to_have_text(before, timeout=60_000)
        page.click("#data-use")
        chosen("task").to_have_value(task)
        chosen("base").to_have_value(base)
    page.locator("#train-preset-preference label", has_text="Preferences (DPO)").click()
    page.wait_for_timeout(1000)
    page.locator("#train-task input").click()
    page.get_by_role("option", name="Texts and what they become", exact=True).click()
    chosen("base").to_have_value("Tiny T5 (toy)")
    sync_api.expect(page.locator("#train-dataset input")).to_have_value(re.compile("old_english.csv"))
    page.locator("#field-seq2seq-prefix").wait_for()
    assert page.locator("#train-preset-preference").is_hidden()
    page.locator("#train-count b").wait_for(timeout=120_000)
    shoot(page, "train-seq2seq")


def test_captions_of_pictures_from_the_first_page_to_a_picture_of_ones_own(
    page: Any, server: str, tmp_path: Path
) -> None:
    page.goto(server)
    page.click("#start-captions")
    page.locator("#train-count b").wait_for(timeout=120_000)
    sync_api.expect(page.locator("#train-task input")).to_have_value("Captions of pictures")
    page.locator("#train-start").click()
    head(page, "done").wait_for(timeout=240_000)
    frames = page.locator("#live-film")
    assert frames.locator("h4 img").count() == 4 and frames.locator(".frame").count() == 12
    sync_api.expect(frames.locator(".frame").nth(2)).to_contain_text("background")
    shoot(page, "live-captions")
    page.click("#live-compare")
    page.locator("#compare-picture img").wait_for()
    assert page.locator("#compare-prompt").is_hidden()
    answers = page.locator("#compare-answers .answer")
    page.click("#compare-generate")
    page.locator("#compare-answers", has_text="Answered in").wait_for(timeout=120_000)
    assert answers.count() == 2 and re.search(r"on an? \w+ background", answers.nth(1).inner_text())
    shoot(page, "compare-captions")
    own = tmp_path / "own.png"
    Image.new("RGB", (300, 200), (52, 103, 205)).save(own)
    page.locator("#compare-picture button[aria-label*=lear], #compare-picture button[aria-label*=emove]").first.click()
    page.set_input_files("#compare-picture input[type=file]", str(own))
    page.locator("#compare-picture img").wait_for()
    page.click("#compare-generate")
    sync_api.expect(answers.nth(1)).to_contain_text("blue background", timeout=60_000)


def test_a_zip_of_pictures_is_seen_with_what_cannot_be_used(page: Any, server: str, tmp_path: Path) -> None:
    path = tmp_path / "pictures.zip"
    drawn = io.BytesIO()
    Image.new("RGB", (40, 40), "orange").save(drawn, "PNG")
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("one", "two", "silent"):
            archive.writestr(f"{name}.png", drawn.getvalue())
        archive.writestr("broken.png", b"\x89PNG nothing")
        for name in ("one", "two", "broken"):
            archive.writestr(f"{name}.txt", f"{name} orange square")
    page.goto(f"{server}/?tab=data")
    page.set_input_files("#data-file input[type=file]", str(path))
    page.locator("#data-use", has_text="Use these 2 rows").wait_for()
    assert page.locator("img.st-thumb").count() == 2
    shoot(page, "data-pictures")
    page.click("#data-view-problems-button")
    sync_api.expect(page.locator("#data-problems")).to_contain_text("2 kept + 2 skipped = 4 rows")
    sync_api.expect(page.locator("#data-problem-rows")).to_contain_text("Nothing is said of silent.png")


def test_runs_are_scored_and_compared_by_quality_and_size(page: Any, server: str) -> None:
    client = Client(server, verbose=False)
    rows = client.predict(handle_file(REPOSITORY / "examples" / "old_english.csv"), "", api_name="/upload_data")
    words = {"prefix": "translate {source} to {target}: ", "source": "English", "target": "old English", "beams": 1}
    lora = {"method": "lora", "r": 16, "lora_alpha": 32, "target_modules": ["q", "v", "wi_0", "wi_1", "wo"]}
    kinds: dict[str, tuple[dict[str, Any], float]] = {
        "LoRA r16": ({"adapter": lora}, 0.003),
        "IA3": ({"adapter": {"method": "ia3"}}, 0.005),
        "Every weight": ({"full": True}, 0.0005),
    }
    runs = []
    for name, (kind, rate) in kinds.items():
        training = {"learning_rate": rate, "max_steps": 30, "batch_size": 16, "max_length": 96, "eval_every": 30}
        job = {"task": "seq2seq", "model": "tiny-t5", "dataset": rows["dataset"], "options": words, "name": name}
        asked = {**job, **kind, "training": training, "data": {"eval_split": 0.02}}
        runs.append(client.predict(asked, api_name="/submit_run")["run"])
    page.goto(f"{server}/?run={runs[-1]}")
    head(page, "done").wait_for(timeout=240_000)

    page.get_by_role("tab", name="Scores", exact=True).click()
    page.locator("#scores-run input").click()
    page.get_by_role("option", name="LoRA r16", exact=True).click()
    button = page.locator("#scores-start")
    sync_api.expect(button).to_have_text("Score base and adapter on the 24 rows held back")
    button.click()
    going = page.locator("#scores-progress .run-head[data-scoring=live]")
    going.wait_for()
    sync_api.expect(button).to_be_disabled()
    page.reload()
    going.wait_for()
    result = page.locator("#scores-result")
    result.locator(".run-head[data-scoring=done]").wait_for(timeout=240_000)
    assert going.count() == 0 or going.is_hidden()
    sync_api.expect(result.locator("h2")).to_have_text("LoRA r16")
    losses = result.locator("tr", has_text="Loss").locator("td").all_inner_texts()
    assert float(losses[2].split()[0]) < float(losses[1]) and "better" in losses[2] and losses[3] == "24"
    assert result.locator(".scroll tbody tr").count() == 8

    for run in runs[1:]:
        assert "score" in client.predict(run, 8, 64, api_name="/score_run")
        page.reload()
        sync_api.expect(page.locator(f"#scores-table button[data-run={run}]")).to_be_visible(timeout=240_000)
    board = page.locator("#scores-table tbody tr")
    assert board.count() == 4 and board.locator(".base-name").count() == 1
    assert page.locator("#scores-plot button[data-run]").count() == 3
    page.locator(f"#scores-plot button[data-run={runs[0]}]").click()
    sync_api.expect(result.locator("h2")).to_have_text("LoRA r16")
    page.wait_for_timeout(1500)
    page.evaluate("window.scrollTo(0, 0)")
    shoot(page, "scores")
    page.locator("#scores-cost label", has_text="Trained parameters").click()
    sync_api.expect(page.locator("#scores-plot figure")).to_have_attribute("aria-label", re.compile("parameters"))
    page.locator(f"#scores-table button[data-run={runs[1]}]").click()
    sync_api.expect(result.locator("h2")).to_have_text("IA3")
