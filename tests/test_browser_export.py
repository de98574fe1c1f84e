"""Export and push in a real browser: a GGUF that downloads, a push that is asked about first, and what is greyed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import gguf
import pytest
from hub_server import Hub, listening
from small_adapters import finished_run, lora
from studio_server import serving
from test_browser import browser, page, pytestmark, shoot, sync_api  # noqa: F401

from engine import PromptTuningConfig
from studio.context import Studio

SECRET = "hf_browser_secret"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with listening() as found:
        found.token = SECRET
        yield found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, hub: Hub, request: pytest.FixtureRequest) -> Iterator[str]:
    """A studio that knows a hub on this machine; its environment has a token for it, or none."""
    sync_api.expect.set_options(timeout=30_000)
    home = tmp_path_factory.mktemp("home")
    with contextlib.closing(Studio.open(home)) as studio:
        finished_run(studio, "captain", lora(), 1)
        finished_run(studio, "twenty words", PromptTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM"), 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        patch.setenv("HF_TOKEN", getattr(request, "param", SECRET))
        patch.setenv("HF_ENDPOINT", hub.address)
        patch.delenv("HF_HUB_OFFLINE")
        with serving(home) as running:
            yield running.address


def opened(page: Any, server: str, name: str = "captain", more: str = "") -> None:  # noqa: F811
    page.goto(f"{server}/?tab=adapters{more}")
    page.locator("#adapters-cards .ad-card").filter(has_text=name).locator("button.ad-name").click()
    page.locator(f"#adapter-head >> text={name}").wait_for()
    page.locator("#adapter-export button.label-wrap").click()
    page.locator("#export-gguf").wait_for()


def typed(page: Any, repository: str) -> None:  # noqa: F811
    page.locator("#push-repository input, #push-repository textarea").first.fill(repository)


def test_a_gguf_of_the_chosen_precision_downloads(page: Any, server: str, tmp_path: Any) -> None:  # noqa: F811
    opened(page, server)
    page.locator("#export-precision input").click()
    page.get_by_role("option", name="Q8_0").click()
    page.click("#export-gguf")
    page.locator("#adapters-work [data-kind=export]").wait_for(timeout=120_000)
    with page.expect_download() as waiting:
        page.locator("#work-download").click()
    waiting.value.save_as(tmp_path / "captain.gguf")
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "captain.gguf").tensors}
    assert kinds == {"F32", "Q8_0"} and waiting.value.suggested_filename == "captain-q8_0.gguf"
    page.click("#work-close")


def test_a_push_says_what_and_where_before_it_does_it(page: Any, server: str, hub: Hub) -> None:  # noqa: F811
    opened(page, server)
    assert page.locator("input[type=password]").count() == 0
    typed(page, "parrot")
    page.click("#push-ask")
    page.locator("#push-fault >> text=needed: owner/name").wait_for()
    assert not page.locator("#push-confirm").is_visible()
    typed(page, "me/captain")
    page.click("#push-ask")
    asked = page.locator("#push-confirm")
    sync_api.expect(asked).to_contain_text("adapter_model.safetensors")
    for words in ("captain", "adapter_config.json", "README.md", f"{hub.address}/me/captain", "Only you"):
        sync_api.expect(asked).to_contain_text(words)
    shoot(page, "push")
    page.click("#push-no")
    sync_api.expect(asked).to_be_hidden()
    page.click("#push-ask")
    sync_api.expect(asked).to_be_visible()
    # What is asked about is what stands in the fields: a change takes the question back.
    page.locator("#push-private input").uncheck()
    sync_api.expect(asked).to_be_hidden()
    # The studio itself may look for a base's files.
    assert not [asked for asked in hub.requests if asked.method != "GET"]
    page.click("#push-ask")
    sync_api.expect(asked).to_contain_text("Everybody can see")
    page.click("#push-yes")
    page.locator("#adapters-work [data-kind=push]").wait_for(timeout=120_000)
    link = page.locator("#adapters-work a")
    assert link.get_attribute("href") == f"{hub.address}/me/captain" and "noopener" in link.get_attribute("rel")
    assert hub.repositories["me/captain"]["private"] is False and len(hub.repositories["me/captain"]["files"]) == 3
    assert SECRET not in page.content()
    page.click("#work-close")

    page.click("#push-ask")
    page.click("#push-yes")
    page.locator("#adapters-work .notice.error >> text=is taken").wait_for(timeout=120_000)
    page.click("#work-close")


def test_what_has_no_place_is_greyed_with_the_reason(page: Any, server: str) -> None:  # noqa: F811
    opened(page, server, "twenty words")
    assert page.locator("#export-gguf").is_disabled() and page.locator("#export-gguf-adapter").is_disabled()
    assert "Virtual tokens change no weight" in page.locator("#adapter-export").inner_text()
    sync_api.expect(page.locator("#push-what input")).to_have_count(1)


@pytest.mark.parametrize("server", [""], indirect=True)
def test_without_a_token_the_push_is_greyed_and_says_what_to_do(page: Any, server: str) -> None:  # noqa: F811
    opened(page, server)
    assert page.locator("#push-ask").is_disabled()
    sync_api.expect(page.locator("#push-refused")).to_contain_text("HF_TOKEN")
    assert page.locator("#push-repository input, #push-repository textarea").first.is_disabled()
    assert page.locator("#export-gguf").is_enabled()
