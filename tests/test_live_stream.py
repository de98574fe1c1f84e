"""The stream of a run's news, over real HTTP: for whoever may see the page, as long as they listen."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from courses import healthy, run_of
from starlette.middleware import Middleware

from studio import curves, doctor, live, live_stream, states
from studio.context import Studio

STEP = {"type": "step", "loss": 0.8, "lr": 1e-4, "grad_norm": 1.0, "eta_s": 60.0}


class Served:
    """A page with the stream behind it."""

    def __init__(self, home: Path, **launched: Any) -> None:
        self.studio = Studio.open(home)
        self.run = run_of(self.studio, "walk", healthy(steps=40, total=400), states.RUNNING)
        self.streams: list[live_stream.LiveStream] = []
        with gr.Blocks() as self.blocks:
            gr.HTML("page")
        kept = Middleware(self.made, studio=self.studio)
        quiet = {"prevent_thread_lock": True, "quiet": True, "server_name": "127.0.0.1", "ssr_mode": False}
        _, address, _ = self.blocks.launch(app_kwargs={"middleware": [kept]}, **quiet, **launched)
        self.address = address.rstrip("/")

    def made(self, app: Any, studio: Studio) -> live_stream.LiveStream:
        self.streams.append(live_stream.LiveStream(app, studio))
        return self.streams[-1]

    def listen(self, client: httpx.Client, **more: str) -> Any:
        asked = {"run": self.run, "looks": "", **more}
        return client.stream("GET", f"{self.address}/studio/live", params=asked, timeout=20)

    def listening(self) -> int:
        return sum(stream.open.total() for stream in self.streams)

    def nobody_listens(self) -> bool:
        for _ in range(200):
            if not self.listening():
                return True
            time.sleep(0.1)
        return False


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_stream, "EVERY", 0.1)


@pytest.fixture
def served(tmp_path: Path, quick: None) -> Iterator[Served]:
    found = Served(tmp_path / "home")
    yield found
    found.blocks.close(verbose=False)
    found.studio.close()


def told(lines: Iterator[str]) -> dict[str, Any]:
    """The next news."""
    return next(json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: "))


def test_news_come_as_they_happen_for_as_long_as_somebody_listens(served: Served) -> None:
    with httpx.Client() as client, served.listen(client) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        assert next(lines) == "retry: 100"
        # Its mark says another page than there is.
        assert told(lines) == {"stale": True}
        assert served.listening() == 1
    row, found = served.studio.store.run(served.run), curves.of_run(served.studio.store, served.run)
    looks = live.looks(row, found, live.steady(served.studio, row, found, doctor.findings(found, row)))
    with httpx.Client() as client, served.listen(client, looks=looks) as answer:
        lines = answer.iter_lines()
        assert "<b>40</b>" in told(lines)["head"]
        for step in (41, 42):
            served.studio.store.add_event(served.run, {**STEP, "step": step})
            assert f"<b>{step}</b>" in told(lines)["head"]
    assert served.nobody_listens()
    with httpx.Client() as client, served.listen(client, run="run-00000000") as answer:
        assert [told(answer.iter_lines())] == [{"gone": True}]
    assert served.nobody_listens()


def test_a_silent_stream_says_that_it_goes_on_and_ends_after_its_life(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_stream.Follower, "news", lambda follower: {})
    monkeypatch.setattr(live_stream, "ALIVE", 0.3)
    monkeypatch.setattr(live_stream, "LIFE", 1.5)
    with httpx.Client() as client, served.listen(client) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[0].startswith("retry") and set(lines[1:]) == {"data: {}"} and len(lines) >= 3


def test_a_fault_ends_the_stream_and_is_not_met_again_at_once(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(follower: Any) -> dict[str, Any]:
        raise ZeroDivisionError

    monkeypatch.setattr(live_stream.Follower, "news", broken)
    with httpx.Client() as client, served.listen(client) as answer:
        assert [line for line in answer.iter_lines() if line] == ["retry: 100", f"retry: {live_stream.FAULT}"]
    assert "ZeroDivisionError" in caplog.text and served.nobody_listens()


def test_one_visitor_does_not_take_all_of_them(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    who = iter(["ann", "ann", "bob"])
    monkeypatch.setattr(live_stream.visitors, "present", lambda: next(who, None))
    monkeypatch.setattr(live_stream.Follower, "news", lambda follower: {})
    monkeypatch.setattr(live_stream, "EACH", 1)
    with (
        httpx.Client() as client,
        served.listen(client) as first,
        served.listen(client) as second,
        served.listen(client) as third,
    ):
        assert [answer.status_code for answer in (first, second, third)] == [200, 503, 200]


def test_a_run_that_rests_is_asked_for_once(served: Served) -> None:
    with httpx.Client() as client, served.listen(client, once="true") as answer:
        assert sum(line.startswith("data: ") for line in answer.iter_lines()) == 1


def test_only_who_has_logged_in_is_told_anything(tmp_path: Path, quick: None) -> None:
    guarded = Served(tmp_path / "guarded", auth=("ann", "secret"))
    try:
        with httpx.Client() as client:
            with served_status(guarded, client) as status:
                assert status == 401
            answer = client.post(f"{guarded.address}/login", data={"username": "ann", "password": "secret"})
            assert answer.status_code == 200
            with served_status(guarded, client) as status:
                assert status == 200
    finally:
        guarded.blocks.close(verbose=False)
        guarded.studio.close()


class served_status:  # noqa: N801 - reads as a question
    """The status that a listener gets."""

    def __init__(self, served: Served, client: httpx.Client) -> None:
        self.stream = served.listen(client, once="true")

    def __enter__(self) -> int:
        return int(self.stream.__enter__().status_code)

    def __exit__(self, *raised: Any) -> None:
        self.stream.__exit__(*raised)


def test_there_is_an_end_to_how_many_listen(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_stream, "MOST", 1)
    with httpx.Client() as client, served.listen(client) as first:
        assert first.status_code == 200 and next(first.iter_lines())
        with served.listen(client) as second:
            assert second.status_code == 503
    assert served.nobody_listens()
    with httpx.Client() as client, served.listen(client) as again:
        assert again.status_code == 200


def test_the_server_ends_though_somebody_listens(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_stream.Follower, "news", lambda follower: {})
    ended = threading.Event()

    def listen() -> None:
        with httpx.Client() as client, served.listen(client) as answer, contextlib.suppress(httpx.HTTPError):
            list(answer.iter_lines())
        ended.set()

    listener = threading.Thread(target=listen)
    listener.start()
    while not served.listening():
        time.sleep(0.05)
    started = time.monotonic()
    served.blocks.close(verbose=False)
    assert ended.wait(20) and time.monotonic() - started < 15
    listener.join()
