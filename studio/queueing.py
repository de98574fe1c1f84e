"""Gradio's queue, woken by what the page asks for instead of looking whether there is anything.

Gradio looks a thousand times a second for work, and a hundred times for words on progress. To wake up is dear (a
quarter of a millisecond of the processor on a small cloud machine), and was most of what an idle server took from the
training beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator
from typing import Any

import gradio as gr
from gradio.queueing import Queue

CALM, PROGRESS = 1.0, 0.05
"""Seconds between two looks while there is no reason to, and for words on progress while something works."""
SOON = 0.01
"""Seconds before its end in which a pause is left to end by itself."""


class Rests:
    """One of the queue's endless loops, awaited so that a pause of it can be ended.

    The loop says by `rest` that it pauses next, and for how long.
    """

    def __init__(self) -> None:
        self._said: float | None = None
        self._pause: asyncio.Future[None] | None = None
        self._until = 0.0

    def rest(self, seconds: float) -> float:
        """What the loop is told to pause."""
        self._said = seconds
        return seconds

    def wake(self) -> None:
        """End the pause, where there is one that does not end by itself just now."""
        loop = asyncio.get_running_loop()
        if self._pause is not None and not self._pause.done() and self._until - loop.time() > SOON:
            self._pause.set_result(None)

    def through(self, work: Awaitable[None]) -> Awaitable[None]:
        """The loop itself, to be awaited in its place."""
        return _Followed(self, work)

    def follow(self, work: Awaitable[None]) -> Generator[Any, None, None]:
        """Go on with the loop, and keep what it waits for while that is a pause."""
        steps, raised = work.__await__(), None
        while True:
            self._said = None
            try:
                waits = steps.send(None) if raised is None else steps.throw(raised)
            except StopIteration:
                return
            self._pause = waits if self._said is not None else None
            self._until = asyncio.get_running_loop().time() + (self._said or 0.0)
            try:
                raised = None
                yield waits
            except BaseException as stop:  # a cancelled loop hears of it where it waits
                raised = stop


class _Followed:
    def __init__(self, rests: Rests, work: Awaitable[None]) -> None:
        self._rests, self._work = rests, work

    def __await__(self) -> Generator[Any, None, None]:
        return self._rests.follow(self._work)


class CalmQueue(Queue):
    """Gradio's queue, which rests until it is asked for something."""

    _work: Rests
    _progress: Rests

    async def push(self, *given: Any, **named: Any) -> Any:
        """Take in what the page asks for."""
        answer = await super().push(*given, **named)
        self._work.wake()
        return answer

    async def process_events(self, *given: Any, **named: Any) -> None:
        """Answer it. What waits for the place that this takes comes next."""
        self._progress.wake()
        try:
            await super().process_events(*given, **named)
        finally:
            self._work.wake()

    async def start_processing(self) -> None:
        """Start what is asked for, until the server ends."""
        await self._work.through(super().start_processing())

    async def start_progress_updates(self) -> None:
        """Tell the page how far things have got, until the server ends."""
        await self._progress.through(super().start_progress_updates())

    # Gradio reads both before each pause, and sets them once, to what it takes for good.
    @property
    def sleep_when_free(self) -> float:
        """Seconds until the queue looks by itself whether there is anything to start."""
        return self._work.rest(CALM)

    @sleep_when_free.setter
    def sleep_when_free(self, value: float) -> None:
        pass

    @property
    def progress_update_sleep_when_free(self) -> float:
        """Seconds until the queue looks whether anything has got on."""
        return self._progress.rest(PROGRESS if any(job is not None for job in self.active_jobs) else CALM)

    @progress_update_sleep_when_free.setter
    def progress_update_sleep_when_free(self, value: float) -> None:
        pass


def calm(blocks: gr.Blocks) -> None:
    """Let the queue of a page, which `Blocks.queue` has made, rest until it is asked for something."""
    queue = blocks._queue
    queue.__class__ = CalmQueue
    assert isinstance(queue, CalmQueue)
    queue._work, queue._progress = Rests(), Rests()
