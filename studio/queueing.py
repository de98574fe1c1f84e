"""How often the server looks whether the page has asked for something: often while somebody presses, seldom otherwise.

Gradio's queue is not woken by what comes in; it looks a thousand times a second, and for words on progress a hundred
times. To wake up is most of what an idle server takes from the training beside it.
"""

from __future__ import annotations

import time
from typing import Any

import gradio as gr
from gradio.queueing import Queue

QUICK, CALM = 0.01, 0.02
"""Seconds between two looks for work."""
PROGRESS, IDLE = 0.05, 0.25
"""Seconds between two looks for words on progress, while something works and while nothing does."""
AWAKE = 3.0
"""Seconds after a press in which the next is likely."""


class CalmQueue(Queue):
    """Gradio's queue, which looks as often as there is reason to."""

    _pressed = 0.0

    async def push(self, *given: Any, **named: Any) -> Any:
        """Take in what the page asks for."""
        self._pressed = time.monotonic()
        return await super().push(*given, **named)

    def _works(self) -> bool:
        return any(job is not None for job in self.active_jobs)

    # Gradio reads both before each pause, and sets them once, to what it takes for good.
    @property
    def sleep_when_free(self) -> float:
        """Seconds until the queue looks again whether there is anything to start."""
        expected = time.monotonic() - self._pressed < AWAKE or self._works() or len(self) > 0
        return QUICK if expected else CALM

    @sleep_when_free.setter
    def sleep_when_free(self, value: float) -> None:
        pass

    @property
    def progress_update_sleep_when_free(self) -> float:
        """Seconds until the queue looks again whether anything has got on."""
        return PROGRESS if self._works() else IDLE

    @progress_update_sleep_when_free.setter
    def progress_update_sleep_when_free(self, value: float) -> None:
        pass


def calm(blocks: gr.Blocks) -> None:
    """Let the queue of a page, which `Blocks.queue` has made, look only as often as there is reason to."""
    blocks._queue.__class__ = CalmQueue
