"""docs/api.md: its first block runs as it stands against a real server, and its table names every endpoint."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from studio_server import Running, serving, start

from engine.paths import REPOSITORY
from studio.tools import TOOLS

PAGE = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8")
CHANGING = (
    "submit",
    "control",
    "delete",
    "export",
    "push",
    "download",
    "import",
    "save",
    "rename",
    "resize",
    "score_",
    "stop",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("home")) as running:
        yield running


def endpoints(server: Running) -> dict[str, Any]:
    named: dict[str, Any] = json.load(urllib.request.urlopen(f"{server.address}/gradio_api/info"))["named_endpoints"]
    return named


def test_the_table_names_the_arguments(server: Running) -> None:
    named = endpoints(server)
    for row in re.findall(r"^\| (`/.*)$", PAGE, re.MULTILINE):
        cells = row.split("|")
        known = [named[name] for name in re.findall(r"`(/\w+)`", cells[0])]
        told = set(re.findall(r"\w+", cells[1])) - {"or"}
        assert told == {one["parameter_name"] for each in known for one in each["parameters"]}, row


def test_the_first_block_runs(server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(import time.*?)```", PAGE, re.DOTALL)
    assert code.count("http://127.0.0.1:7860") == 1
    lines = "".join(f"What comes after {n}?,After {n} comes {n + 1}.\n" for n in range(40))
    (tmp_path / "answers.csv").write_text("question,answer\n" + lines, encoding="utf-8")
    code = code.replace("http://127.0.0.1:7860", server.address).replace("answers.csv", str(tmp_path / "answers.csv"))
    found: dict[str, Any] = {}
    exec(compile(code, "docs/api.md", "exec"), found)
    assert found["data"]["profile"]["kept"] == 40
    assert found["status"]["state"] == "done" and found["status"]["step"] == 12
    assert len(found["texts"]) == 2 and all(found["texts"].values())
    assert "prompt_completion" in capsys.readouterr().out


def test_the_table_names_every_endpoint_and_each_says_what_it_does(server: Running) -> None:
    named = endpoints(server)
    table = PAGE[PAGE.index("## The endpoints") : PAGE.index("## Scores")]
    assert set(re.findall(r"`(/[a-z_]+)`", table)) == set(named)
    assert all(entry.get("description") for entry in named.values())


def test_the_tools_are_endpoints_that_change_nothing(server: Running) -> None:
    assert {f"/{name}" for name in TOOLS} <= set(endpoints(server))
    assert not [name for name in TOOLS if name.startswith(CHANGING)]
    assert all(f"`{name}`" in PAGE for name in TOOLS)


def test_tools_are_refused_in_words_where_they_cannot_be(tmp_path: Path) -> None:
    environment = {**os.environ, "STUDIO_HOME": str(tmp_path), "STUDIO_MCP": "1", "PYTHONPATH": str(REPOSITORY)}
    asked = [({"STUDIO_DEMO": "1"}, "demo")]
    if importlib.util.find_spec("mcp") is None:
        asked.append(({}, 'pip install "gradio[mcp]"'))
    for more, word in asked:
        argv = [sys.executable, str(REPOSITORY / "app.py"), "--no-browser"]
        ended = subprocess.run(argv, env={**environment, **more}, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 1 and word in ended.stderr and "Traceback" not in ended.stderr


def test_the_served_tools_are_those_and_no_other(tmp_path: Path) -> None:
    pytest.importorskip("mcp", reason="needs the package mcp")
    import asyncio

    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    running = start(tmp_path, STUDIO_MCP="1")

    async def asked() -> tuple[set[str], bool, bool]:
        place = f"{running.address}/gradio_api/mcp/"
        async with streamablehttp_client(place) as (read, write, _), ClientSession(read, write) as session:
            await session.initialize()
            names = {tool.name for tool in (await session.list_tools()).tools}
            reading = await session.call_tool("list_runs", {})
            starting = await session.call_tool("submit_run", {"job": {"model": "tiny-llama"}})
            return names, bool(reading.isError), bool(starting.isError)

    try:
        assert asyncio.run(asked()) == (set(TOOLS), False, True)
    finally:
        running.process.terminate()
        running.process.wait(30)
