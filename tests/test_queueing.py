"""The queue of the page: it looks for work as often as there is reason to."""

from __future__ import annotations

import time

import gradio as gr
import pytest
from gradio_client import Client

from studio import queueing


@pytest.fixture
def blocks() -> gr.Blocks:
    with gr.Blocks() as found:
        gr.Button().click(lambda: time.sleep(0.3) or 7, None, gr.Number(), api_name="seven")
    found.queue()
    queueing.calm(found)
    return found


def test_it_looks_often_while_somebody_presses_and_seldom_otherwise(blocks: gr.Blocks) -> None:
    queue, looks = blocks._queue, []
    assert isinstance(queue, queueing.CalmQueue)
    try:
        _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
        resting = (queue.sleep_when_free, queue.progress_update_sleep_when_free)
        assert resting == (queueing.CALM, queueing.IDLE)
        job = Client(address, verbose=False).submit(api_name="/seven")
        while not job.done():
            looks.append((queue.sleep_when_free, queue.progress_update_sleep_when_free))
            time.sleep(0.02)
        assert job.result() == 7 and (queueing.QUICK, queueing.PROGRESS) in looks
        assert queue.sleep_when_free == queueing.QUICK
        queue._pressed -= queueing.AWAKE
        assert (queue.sleep_when_free, queue.progress_update_sleep_when_free) == resting
    finally:
        blocks.close(verbose=False)


def test_what_gradio_sets_does_not_count(blocks: gr.Blocks) -> None:
    blocks._queue.sleep_when_free = 0.0
    blocks._queue.progress_update_sleep_when_free = 0.0
    assert blocks._queue.sleep_when_free == queueing.CALM and blocks._queue.progress_update_sleep_when_free > 0
