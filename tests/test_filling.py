"""The page in two goes: what comes first, what the chain of callbacks brings, and that nothing is left out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import gradio as gr
import pytest
from gradio.state_holder import SessionState

from studio import filling, first_page, front
from studio.context import Studio
from studio.i18n import KOREAN, speaking
from studio.languages import Pages
from studio.shell import create_app
from studio.visits import Visits

Config = dict[str, Any]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    studio = Studio.open(tmp_path_factory.mktemp("filling"))
    yield create_app(studio)
    studio.close()


@pytest.fixture(scope="module")
def first(pages: Pages) -> Config:
    with filling.asking(filling.FIRST):
        return pages.config


def ids(node: Config) -> list[int]:
    return [number for child in node.get("children") or [] for number in (child["id"], *ids(child))]


def answers(pages: Pages) -> list[Config]:
    """What each callback of the chain answers."""

    async def asked(number: int) -> Config:
        found = await pages.process_api(pages.fns[number], [], request=None, state=SessionState(pages))
        return found["render_config"]

    return [asyncio.run(asked(number)) for number in pages.fills]


def test_the_first_page_is_small_and_the_whole_one_is_as_before(pages: Pages, first: Config) -> None:
    whole = pages.config
    assert len(whole["components"]) > 900
    called = [call for call in first["dependencies"] if call["api_visibility"] != "public"]
    assert len(first["components"]) < 50 and len(called) < 40
    drawn = set(ids(first["layout"]))
    assert {item["id"] for item in first["components"]} == drawn == set(first["page"][""]["components"])
    assert {call["id"] for call in first["dependencies"]} == set(first["page"][""]["dependencies"])
    for call in called:
        assert {*call["inputs"], *call["outputs"]} <= drawn


def test_the_first_page_can_do_its_first_step_and_begin_the_chain(pages: Pages, first: Config) -> None:
    named = {item["props"].get("elem_id"): item["id"] for item in first["components"]}
    targets = {(target, event) for call in first["dependencies"] for target, event in call["targets"]}
    assert (named["start-board"], "click") in targets and (named["studio-fill"], "click") in targets
    assert (named["studio-wake"], "click") in targets
    assert set(pages.fills) <= {call["id"] for call in first["dependencies"]}
    # The titles of the tabs stand from the start.
    assert [item["type"] for item in first["components"]].count("tabitem") == len(pages.fills) + 1
    assert not any(event == "load" for _, event in targets)
    public = {call["api_name"] for call in pages.config["dependencies"] if call["api_visibility"] == "public"}
    assert public <= {call["api_name"] for call in first["dependencies"]} and "submit_run" in public


def test_first_and_rest_together_are_the_whole_page(pages: Pages, first: Config) -> None:
    whole, brought = pages.config, answers(pages)
    unseen = {item["id"] for item in whole["components"] if item["type"] == "api"}
    unseen |= {
        number
        for node in whole["layout"]["children"]
        if next(item for item in whole["components"] if item["id"] == node["id"])["props"].get("visible") is False
        for number in (node["id"], *ids(node))
    }
    came = {item["id"] for part in (first, *brought) for item in part["components"]}
    assert came == {item["id"] for item in whole["components"]} - unseen
    assert len({part["render_id"] for part in brought}) == len(brought)
    for part, tab in zip(brought, pages.fills.values(), strict=True):
        assert part["layout"]["id"] == tab and ids(part["layout"])
        assert {item["id"] for item in part["components"]} == {tab, *ids(part["layout"])}
    calls = {call["id"]: call for call in brought[-1]["dependencies"]}
    assert not any(part["dependencies"] for part in brought[:-1])
    for call in whole["dependencies"]:
        leads = [target for target in call["targets"] if target[1] != "load"]
        if call["id"] in pages.fills or not (leads or call.get("trigger_after") is not None):
            assert call["id"] not in calls
        else:
            assert calls[call["id"]] == {**call, "targets": leads}


def test_what_can_be_changed_is_decided_by_the_whole_page(pages: Pages, first: Config) -> None:
    parts = {item["props"].get("elem_id"): item["props"] for part in answers(pages) for item in part["components"]}
    assert parts["train-task"]["interactive"] and parts["train-dataset"]["interactive"]
    before = {item["id"]: item["props"].get("interactive") for item in pages.config["components"]}
    for part in (first, *answers(pages)):
        for item in part["components"]:
            assert item["props"]["interactive"] in (True, False)
            if before[item["id"]] is not None:
                assert item["props"]["interactive"] == before[item["id"]]


def test_the_first_page_speaks_the_language_of_whoever_asks(pages: Pages) -> None:
    with speaking(KOREAN), filling.asking(filling.FIRST):
        korean = {item["id"]: item["props"] for item in pages.config["components"] if item["type"] == "tabitem"}
    with filling.asking(filling.FIRST):
        english = {item["id"]: item["props"] for item in pages.config["components"] if item["type"] == "tabitem"}
    assert english.keys() == korean.keys()
    assert all(korean[number]["label"] != english[number]["label"] for number in english)


def test_a_visit_has_its_own_values_of_a_layout_that_is_described_once(pages: Pages) -> None:
    assert isinstance(pages.default_config, Visits)
    one, other = SessionState(pages), SessionState(pages)
    assert one.config_values.keys() == pages.blocks.keys()
    asked = {
        number: gr.blocks.BlocksConfig.config_for_block(number, [], block) for number, block in pages.blocks.items()
    }
    assert one.config_values == asked
    number = next(number for number, block in pages.blocks.items() if isinstance(block, gr.Textbox))
    one._update_value_in_config(number, "mine")
    assert one.config_values[number]["props"]["value"] == "mine"
    assert other.config_values[number] == SessionState(pages).config_values[number] == asked[number]
    # Another component in its place is described for itself.
    one[number] = gr.Textbox(value="new", render=False)
    one._update_config(number)
    assert one.config_values[number]["props"]["value"] == "new"


def test_a_visit_takes_little_memory(pages: Pages) -> None:
    import tracemalloc

    SessionState(pages)
    tracemalloc.start()
    visit = SessionState(pages)  # noqa: F841 # held while its memory is looked at
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert taken < 450_000, taken


async def _get(name: str, accept: str = "") -> tuple[list[Any], bool]:
    """What is sent for a path, and whether the app behind was asked."""
    sent: list[Any] = []
    passed = False

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal passed
        passed = True

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    scope = {"type": "http", "method": "GET", "path": name, "headers": [(b"accept-encoding", accept.encode())]}
    await front.Front(app)(scope, receive, send)
    return sent, passed


def test_scripts_come_from_memory_as_they_are_on_the_disk() -> None:
    import brotli

    name = sorted(front.names())[0]
    body = (front.FOLDER / name).read_bytes()
    plain, passed = asyncio.run(_get(f"/assets/{name}"))
    assert not passed and plain[1]["body"] == body
    packed, passed = asyncio.run(_get(f"/assets/{name}", "gzip, br"))
    assert not passed and brotli.decompress(packed[1]["body"]) == body
    for start, answer in ((plain[0], plain[1]), (packed[0], packed[1])):
        headers = {key.decode(): value.decode() for key, value in start["headers"]}
        assert headers["content-length"] == str(len(answer["body"])) and "immutable" in headers["cache-control"]
    # What a middleware around it writes into the headers is not there the next time.
    plain[0]["headers"].append((b"content-encoding", b"br"))
    again, _ = asyncio.run(_get(f"/assets/{name}"))
    assert b"content-encoding" not in dict(again[0]["headers"])


@pytest.mark.parametrize(
    "path", ["/assets/../index.html", "/assets/%2e%2e/app.py", "/assets/", "/x.js", "/assets/no.js"]
)
def test_nothing_but_those_scripts_is_answered_for(path: str) -> None:
    sent, passed = asyncio.run(_get(path))
    assert passed and not sent


def test_an_address_with_a_place_in_it_is_sent_whole(pages: Pages) -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(filling.asked())

    async def ask(query: bytes) -> None:
        scope = {"type": "http", "method": "GET", "path": "/", "query_string": query, "headers": []}
        await first_page.FirstPage(app)(scope, None, None)  # type: ignore[arg-type] # neither is used

    for query in (b"", b"tab=start", b"tab=train", b"run=run-01234567"):
        asyncio.run(ask(query))
    assert seen == ["first", "first", "whole", "whole"] and not filling.asked()


def test_a_whole_page_leaves_out_only_what_nobody_sees(pages: Pages) -> None:
    whole = pages.config
    with filling.asking(filling.WHOLE):
        drawn = pages.config
    assert drawn["layout"]["id"] == whole["layout"]["id"] and len(ids(drawn["layout"])) == len(drawn["components"])
    gone = {item["id"] for item in whole["components"]} - {item["id"] for item in drawn["components"]}
    kinds = {item["id"]: item["type"] for item in whole["components"]}
    assert {kinds[number] for number in gone} >= {"api"} and "api" not in {item["type"] for item in drawn["components"]}
    calls = {call["id"]: call for call in drawn["dependencies"]}
    for call in whole["dependencies"]:
        known = calls[call["id"]]
        assert known == call if call["api_visibility"] != "public" else known["api_name"] == call["api_name"]
