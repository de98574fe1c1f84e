"""Who is asking, where one server serves many strangers (demo mode): a random id in a cookie that the server made.

`store`, `jobs`, `library` and the others ask `present` and `mine`; no page has to know of visitors. Outside of demo
mode everybody is nobody in particular and sees everything.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from http.cookies import CookieError, SimpleCookie
from typing import Any

COOKIE = "studio-visitor"
NOBODY = "nobody"
"""Whoever asks without having come through the door: owns nothing, sees nothing."""

_KEY = "studio.visitor"
_UNSET = object()
_acting: ContextVar[Any] = ContextVar("acting", default=_UNSET)
_apart = threading.Event()


def keep_apart(on: bool = True) -> None:
    """From now on, in this process: whoever asks sees their own only. Off again with `on=False`."""
    if on:
        _apart.set()
    else:
        _apart.clear()


def present() -> str | None:
    """The visitor on whose behalf this thread works; None where everything may be seen.

    A thread of the server that serves no request has to say so (`everyone`), else it is `NOBODY`.
    """
    acting = _acting.get()
    if acting is not _UNSET:
        return acting or None
    if not _apart.is_set():
        return None
    # Gradio is not imported for this: a worker's process does without.
    context = sys.modules.get("gradio.context")
    request = context.LocalContext.request.get(None) if context is not None else None
    # A callback has Gradio's request; what a component asks of the server comes with the plain one.
    scope = getattr(getattr(request, "request", request), "scope", None) or {}
    return str(scope.get(_KEY) or NOBODY)


def owner() -> str:
    """What a new row's `owner` is: the visitor, or "" where there are none."""
    return present() or ""


def mine(owner: str | None) -> bool:
    """Whether a row of this owner may be seen; SQLite knows it as `mine(owner)`."""
    visitor = present()
    return visitor is None or visitor == owner


def own(key: str) -> str:
    """An id made of content, as this visitor's own: 16 hex digits that differ from those of anyone else."""
    visitor = present()
    return key if visitor is None else hashlib.sha256(f"{visitor}\0{key}".encode()).hexdigest()[:16]


@contextmanager
def acting(owner: str) -> Iterator[None]:
    """Work on behalf of a visitor; "" for everyone."""
    token = _acting.set(owner)
    try:
        yield
    finally:
        _acting.reset(token)


def everyone() -> Any:
    """For the server's own threads, which look after everybody's work: a context in which everything may be seen."""
    return acting("")


Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Visitors:
    """The visitors of one server process. Ids are signed with a key that ends with it, so none outlives a restart."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._seen: dict[str, float] = {}

    def cookie(self, visitor: str) -> str:
        """A visitor's id with its signature."""
        return f"{visitor}.{hmac.new(self._key, visitor.encode(), hashlib.sha256).hexdigest()[:32]}"

    def known(self, cookie: str) -> str:
        """The visitor of a cookie that this server made, noted as seen now; "" for any other."""
        visitor = cookie.partition(".")[0]
        if not visitor or not hmac.compare_digest(cookie.encode(), self.cookie(visitor).encode()):
            return ""
        self._seen[visitor] = time.time()
        return visitor

    def last_seen(self, visitor: str) -> float:
        """When (seconds since the epoch) the visitor asked last; 0.0 for one who never came back."""
        return self._seen.get(visitor, 0.0)

    def forget(self, before: float) -> None:
        """Drop those who were last seen before a moment."""
        for visitor, seen in list(self._seen.items()):
            if seen < before:
                self._seen.pop(visitor, None)


class Door:
    """ASGI middleware: every request has a visitor, a new one gets the cookie.

    Args:
        app: what comes after it.
        visitors: whom this server knows.
    """

    def __init__(self, app: Any, visitors: Visitors) -> None:
        self.app = app
        self.visitors = visitors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Name the visitor in the request's scope and pass it on."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        visitor = self.visitors.known(_cookie(scope))
        fresh = not visitor
        scope[_KEY] = visitor = visitor or secrets.token_hex(16)

        async def answer(message: MutableMapping[str, Any]) -> None:
            if fresh and message["type"] == "http.response.start":
                line = f"{COOKIE}={self.visitors.cookie(visitor)}; Path=/; HttpOnly; {_rules(scope)}"
                message["headers"] = [*message.get("headers", []), (b"set-cookie", line.encode())]
            await send(message)

        await self.app(scope, receive, answer)


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope.get("headers", []) if key == name), "")


def _cookie(scope: Scope) -> str:
    try:
        found = SimpleCookie(_header(scope, b"cookie")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


def _rules(scope: Scope) -> str:
    """A Space is shown inside a page of another site, where only such a cookie comes back; it needs https."""
    secure = scope.get("scheme") == "https" or _header(scope, b"x-forwarded-proto").startswith("https")
    return "SameSite=None; Secure; Partitioned" if secure else "SameSite=Lax"
