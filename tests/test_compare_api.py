"""The endpoints of comparisons without a server: what they answer, and what they refuse in words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from small_adapters import finished_run, lora

from engine import LoraConfig
from studio.api import Endpoints, refusal
from studio.compare_api import ENDPOINTS, CompareEndpoints
from studio.context import Studio

ASKED = ("What colour is grass?", 0, 0.0, 8)


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with contextlib.closing(Studio.open(tmp_path_factory.mktemp("home"))) as studio:
        finished_run(studio, "parrot", lora(), 1)
        finished_run(studio, "style", LoraConfig(r=2, target_modules=["to_q"]), 2, "tiny-sd")
        yield studio


def test_compare_takes_keys_and_what_it_kept_is_listed_deleted_and_given_back(studio: Studio) -> None:
    ends, old = CompareEndpoints(studio), Endpoints(studio)
    (column,) = ends.list_columns("tiny-llama")["columns"]
    assert column["name"] == "parrot"
    *_, last = old.compare("tiny-llama", [column["key"]], *ASKED)
    assert last["finished"] and [it["run"] for it in last["columns"]] == [None, column["key"]]
    (kept,) = ends.list_comparisons()["comparisons"]
    assert kept["id"] == last["comparison"] and [it["text"] for it in kept["results"]] == [
        it["text"] for it in last["columns"]
    ]
    ends.delete_comparison(kept["id"])
    assert ends.list_comparisons()["comparisons"] == []
    assert [it["id"] for it in ends.list_comparisons(20, True)["comparisons"]] == [kept["id"]]
    ends.restore_comparison(kept["id"])
    assert len(ends.list_comparisons()["comparisons"]) == 1


def test_a_pair_is_asked_voted_on_and_counted(studio: Studio) -> None:
    ends = CompareEndpoints(studio)
    keys = [it["key"] for it in ends.list_columns("tiny-llama")["columns"]]
    messages = list(ends.blind_pair("tiny-llama", keys, *ASKED))
    assert all(message["pair"] is None for message in messages[:-1]) and messages[-1]["pair"]
    assert messages[-1]["left"]["text"] and "parrot" not in str(messages) and keys[0] not in str(messages)
    told = ends.vote(messages[-1]["pair"], "right")
    assert {told["left"]["column"], told["right"]["column"]} == {None, keys[0]}
    rates = ends.win_rates("tiny-llama")["rates"]
    assert [(it["title"], it["rate"]) for it in rates] == [(told["right"]["title"], 1.0), (told["left"]["title"], 0.0)]
    assert rates[0]["interval"] == pytest.approx([0.2065, 1.0], abs=1e-4)


def test_a_grid_comes_picture_by_picture(studio: Studio) -> None:
    ends = CompareEndpoints(studio)
    (style,) = (it["key"] for it in ends.list_columns("tiny-sd")["columns"])
    messages = list(ends.draw_grid("tiny-sd", [style], ["a cat"], [0.5, 1], [3], 1, 2.0))
    cells = [message["cell"] for message in messages if message["cell"]]
    assert [(it["column"], it["weight"], it["seed"]) for it in cells] == [
        (None, None, 3),
        (style, 0.5, 3),
        (style, 1, 3),
    ]
    assert all(it["picture"].startswith("data:image/") for it in cells)
    assert messages[-1]["finished"] and messages[-1]["comparison"]
    (row,) = (it for it in ends.list_comparisons()["comparisons"] if it["kind"] == "grid")
    assert row["settings"]["weights"] == [0.5, 1] and str(studio.home) not in str(row)


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("list_columns", [3], "config"),
        ("vote", ["0123456789abcdef", "left"], "unknown-id"),
        ("vote", [["x"], "left"], "unknown-id"),
        ("vote", ["0123456789abcdef", "both"], "config"),
        ("list_comparisons", [0], "config"),
        ("delete_comparison", ["1"], "unknown-id"),
        ("restore_comparison", [10**9], "unknown-id"),
        ("win_rates", [None], "config"),
        ("draw_grid", ["tiny-llama", [], ["a"]], "config"),
        ("draw_grid", ["tiny-sd", "all", ["a"]], "config"),
        ("draw_grid", ["tiny-sd", [], ["a"], [9]], "config"),
        ("draw_grid", ["tiny-sd", [], ["a"], [1], ["x"]], "config"),
        ("draw_grid", ["tiny-sd", [], "a"], "config"),
        ("draw_grid", ["tiny-sd", [], ["a"], [1], [0], 0], "config"),
        ("blind_pair", ["tiny-llama", [], "hi"], "config"),
        ("blind_pair", ["tiny-llama", ["ad-00000000"], "hi"], "unknown-id"),
        ("blind_pair", ["tiny-llama", [], 5], "config"),
    ],
)
def test_what_is_refused_is_said_in_words(studio: Studio, name: str, arguments: list[Any], code: str) -> None:
    function = getattr(CompareEndpoints(studio), name)
    try:
        answered = function(*arguments)
        answered = list(answered)[-1] if not isinstance(answered, dict) else answered
    except Exception as fault:
        answered = refusal(fault)
    assert answered["error"]["code"] == code and answered["error"]["message"]


def test_every_endpoint_is_described() -> None:
    assert all(getattr(CompareEndpoints, name).__doc__ for name in ENDPOINTS)
