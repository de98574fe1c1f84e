"""The scripts and styles that Gradio's page is made of, from memory.

A page of Gradio asks for some fifty files before it stands, and then for those of each component it first draws. Each
takes the server a few milliseconds by the way of routes, checks and threads, which is most of what a first visit waits
for. Their names change with what they hold, so they are also kept by the browser.
"""

from __future__ import annotations

import functools
import mimetypes
from pathlib import Path

import brotli  # type: ignore[import-untyped]
import gradio as gr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

FOLDER = Path(gr.__file__).parent / "templates" / "frontend" / "assets"
_PREFIX = "/assets/"
_KINDS = (".js", ".css")
_QUALITY = 6
"""Of the compression, done once a file."""


class Front:
    """ASGI middleware: answers for the files of Gradio's front end by itself."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = scope.get("path", "")
        name = path.removeprefix(_PREFIX)
        if scope["type"] != "http" or scope["method"] != "GET" or name == path or name not in names():
            await self.app(scope, receive, send)
            return
        packed = "br" in Headers(scope=scope).get("accept-encoding", "")
        body = _file(name, packed)
        headers = {
            "content-type": mimetypes.guess_type(name)[0] or "application/octet-stream",
            "content-length": str(len(body)),
            "cache-control": "public, max-age=31536000, immutable",
            "vary": "Accept-Encoding",
            **({"content-encoding": "br"} if packed else {}),
        }
        raw = [(key.encode(), value.encode()) for key, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        await send({"type": "http.response.body", "body": body})


@functools.cache
def names() -> frozenset[str]:
    """The files that are answered for: nothing else of the disk can be named."""
    return frozenset(path.name for path in FOLDER.iterdir() if path.suffix in _KINDS)


@functools.lru_cache(maxsize=512)
def _file(name: str, packed: bool) -> bytes:
    body = (FOLDER / name).read_bytes()
    return brotli.compress(body, quality=_QUALITY) if packed else body
