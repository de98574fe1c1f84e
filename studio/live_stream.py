"""The stream that the open page of a run listens to: `GET /studio/live`, with the news of `studio.live_news`.

A stream instead of questions: to ask is dearer than to be told, in the browser, which may draw on the processor that
trains, and in the server, where a question passes through all of Gradio.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.to_thread
from gradio.context import LocalContext
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from studio import visitors
from studio.context import Studio
from studio.live_news import Follower

PATH = "/studio/live"
EVERY = 1.45
"""Seconds between two looks for news: with what comes after it, a step is on the page within a second and a half."""
ALIVE = 15.0
"""Seconds after which a silent stream says that it goes on, by an empty answer: what is between it and the page may end
it else, and the page takes a long silence for an end."""
LIFE = 300.0
"""Seconds after which the page has to ask again, and so to say again who it is."""
MOST, EACH = 500, 12
"""Streams at a time, of all and of one visitor in demo mode; further pages are drawn by Gradio's callbacks, seldom."""
DRAWING = 4
"""Threads that look for news; Gradio's callbacks have their own."""
FAULT = 15_000
"""Milliseconds after which a page may ask again where its news could not be drawn."""
CHECK = "/gradio_api/login_check"

_log = logging.getLogger(__name__)


class LiveStream:
    """ASGI middleware: answers the pages that follow a run.

    Args:
        app: what comes after it.
        studio: store and jobs.
    """

    def __init__(self, app: ASGIApp, studio: Studio) -> None:
        self.app = app
        self.studio = studio
        self.open: Counter[str] = Counter()
        self._threads: anyio.CapacityLimiter | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        ours = scope["type"] == "http" and scope["method"] == "GET"
        if not ours or scope["path"].removeprefix(scope.get("root_path", "")) != PATH:
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        # Whose runs these are is read off the request, as in a callback.
        token = LocalContext.request.set(request)  # type: ignore[arg-type]
        who = visitors.present() or ""
        self.open[who] += 1
        try:
            refused = await self._refused(scope, who)
            headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
            answer: Response = PlainTextResponse("", status_code=refused or 200)
            if not refused:
                answer = StreamingResponse(self._told(request), media_type="text/event-stream", headers=headers)
            await answer(scope, receive, send)
        finally:
            self.open[who] -= 1
            self.open += Counter()  # forgets who has none
            LocalContext.request.reset(token)

    async def _refused(self, scope: Scope, who: str) -> int:
        """The status by which Gradio refuses somebody who has not logged in, or ours; 0 for whoever may come in."""
        if self.open.total() > MOST or (who and self.open[who] > EACH):
            return 503
        status = 0

        async def nothing() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def answered(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)

        asked = {**scope, "path": CHECK, "raw_path": CHECK.encode(), "query_string": b""}
        await self.app(asked, nothing, answered)
        return 0 if status == 200 else status or 500

    async def _told(self, request: Request) -> AsyncIterator[str]:
        follower = Follower(self.studio, request.query_params)
        once = request.query_params.get("once") == "true"
        ended = request.scope["app"].stop_event
        opened = spoken = time.monotonic()
        yield f"retry: {round(1000 * EVERY)}\n\n"
        while not ended.is_set() and time.monotonic() - opened < LIFE:
            try:
                news: dict[str, Any] = await anyio.to_thread.run_sync(follower.news, limiter=self._limiter())
            except Exception:
                _log.exception("The news of a run could not be told.")
                yield f"retry: {FAULT}\n\n"
                return
            now = time.monotonic()
            if news or once or now - spoken > ALIVE:
                yield f"data: {json.dumps(news)}\n\n"
                spoken = now
            if once or news.get("gone"):
                return
            try:
                await asyncio.wait_for(ended.wait(), EVERY)
            except TimeoutError:
                continue

    def _limiter(self) -> anyio.CapacityLimiter:
        if self._threads is None:
            self._threads = anyio.CapacityLimiter(DRAWING)
        return self._threads
