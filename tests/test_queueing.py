"""The queue of the page: it rests until it is asked for something, and then answers at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import gradio as gr
import pytest
from gradio_client import Client

from studio import queueing

RUNNING = threading.Event()


def slowly(progress: Any = gr.Progress()) -> int:  # noqa: B008 - Gradio's own way to ask for it
    progress(0.5, desc="half")
    RUNNING.wait(0.4)
    return 7


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[gr.Blocks, Client]]:
    """A served page whose queue looks by itself only after longer than a test takes."""
    monkeypatch.setattr(queueing, "CALM", 600.0)
    with gr.Blocks() as blocks:
        button, number = gr.Button(), gr.Number()
        button.click(lambda: 5, None, number, api_name="five")
        button.click(slowly, None, number, api_name="slowly", concurrency_limit=1)
    blocks.queue()
    queueing.calm(blocks)
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield blocks, Client(address, verbose=False)
    blocks.close(verbose=False)


def five(client: Client) -> Any:
    return client.submit(api_name="/five").result(timeout=20)


def test_a_press_is_answered_at_once_though_the_queue_rests(page: tuple[gr.Blocks, Client]) -> None:
    _, client = page
    assert five(client) == 5
    time.sleep(0.3)
    assert five(client) == 5


def test_what_waits_for_its_place_starts_when_that_is_free(page: tuple[gr.Blocks, Client]) -> None:
    _, client = page
    jobs = [client.submit(api_name="/slowly") for _ in range(3)]
    assert [job.result(timeout=20) for job in jobs] == [7, 7, 7]


def test_progress_is_told_while_something_works(page: tuple[gr.Blocks, Client]) -> None:
    _, client = page
    job, told = client.submit(api_name="/slowly"), []
    while not job.done():
        told += [unit.desc for unit in job.status().progress_data or ()]
        time.sleep(0.02)
    assert "half" in told


def test_it_hardly_wakes_up_while_nobody_asks(page: tuple[gr.Blocks, Client]) -> None:
    blocks, client = page
    looks = []
    queue = blocks._queue

    class Counted(queueing.CalmQueue):
        def __len__(self) -> int:
            looks.append(time.monotonic())
            return super().__len__()

    five(client)
    time.sleep(0.3)
    queue.__class__ = Counted
    time.sleep(0.5)
    assert not looks
    five(client)
    assert looks


def test_the_server_ends_at_once(page: tuple[gr.Blocks, Client]) -> None:
    blocks, client = page
    five(client)
    started = time.monotonic()
    blocks.close(verbose=False)
    assert time.monotonic() - started < 10


def test_what_gradio_sets_does_not_count(page: tuple[gr.Blocks, Client]) -> None:
    blocks, _ = page
    blocks._queue.sleep_when_free = 0.0
    blocks._queue.progress_update_sleep_when_free = 0.0
    assert blocks._queue.sleep_when_free == blocks._queue.progress_update_sleep_when_free == 600.0
