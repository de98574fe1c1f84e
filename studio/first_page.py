"""The first page at once: what it says stands in the HTML itself, before Gradio's script has built the page.

Gradio draws in the browser, from a configuration of every tab; until it has, a browser shows nothing. This middleware
puts the same goals and samples that Start shows into the HTML, with the styles of the page. What is pressed meanwhile
is pressed on the page once it stands, and the other tabs come after that (`studio.filling`). It also takes the parts of
the configuration that never change out of the reach of Gradio's reactive proxies, through which each of thousands of
comparisons would go, and sees to it that no answer of the server is left waiting there.
"""

from __future__ import annotations

import functools
from urllib.parse import parse_qs

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.paths import REPOSITORY
from studio import guide_words, theme
from studio.filling import FIRST, WHOLE, asking
from studio.i18n import t
from studio.languages import switch
from studio.markup import esc
from studio.page import START, TAB_TITLES

_FOLDER = REPOSITORY / "studio" / "assets" / "first"
ELSEWHERE = ("run", "guide", "deep_link", "view")
"""What in the address means that another page than the first is wanted."""


class FirstPage:
    """ASGI middleware: the page at `/` is sent with its first view in it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"] != "/" or scope["method"] != "GET":
            await self.app(scope, receive, send)
            return
        first = is_first(scope["query_string"].decode("latin-1"))
        with asking(FIRST if first else WHOLE):
            await self.app(scope, receive, _Whole(send, first))


class _Whole:
    """Passes an answer on; a page is held back until it is whole, and then filled."""

    def __init__(self, send: Send, first: bool) -> None:
        self.send, self.first = send, first
        self.start: Message | None = None
        self.body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = MutableHeaders(raw=message["headers"]).get("content-type", "")
            if message["status"] == 200 and kind.startswith("text/html"):
                self.start = message
                return
        elif self.start is not None:
            self.body += message.get("body", b"")
            if message.get("more_body"):
                return
            body = filled(self.body, self.first)
            start, self.start = self.start, None
            MutableHeaders(raw=start["headers"])["content-length"] = str(len(body))
            await self.send(start)
            message = {**message, "body": body}
        await self.send(message)


def is_first(query: str) -> bool:
    """Whether an address's query asks for the first page and its first step."""
    asked = parse_qs(query)
    return not any(name in asked for name in ELSEWHERE) and asked.get("tab", [START])[0] == START


def filled(page: bytes, first: bool) -> bytes:
    """Gradio's page with our script in its head, and the first view in its body where that is what was asked for.

    Args:
        page: its HTML.
        first: whether the first page is asked for.
    """
    scripts = "".join(map(_asset, ("config.js", "stream.js", "frames.js", "hold.js")))
    extra = f"<style>{theme.sheet()}</style><script>{scripts}</script></head>"
    page = page.replace(b"</head>", extra.encode(), 1)
    # Someone who has yet to log in is shown the form for that alone.
    if not first or b'"auth_required":true' in page[:100_000]:
        return page
    head, mark, tail = page.partition(b"<gradio-app")
    return head + view().encode() + mark + tail


def view() -> str:
    """The first view: what Start says in its first step, under the page's head."""
    tabs = "".join(
        f'<button type="button" data-tab="{esc(tab)}"{_now(tab)}>{esc(t(title))}</button>'
        for tab, title in TAB_TITLES.items()
    )
    saying = t("teach a model something small, and see what it changed")
    return (
        f'<div id="first-page"><style>{_asset("first.css")}</style><div class="first-inside">'
        f'<div class="brand"><b>Adapter Studio</b><span>{esc(saying)}</span>{switch()}</div>'
        f'<div class="first-tabs">{tabs}</div>'
        f'<div class="prose first-board">{guide_words.goals(ids=False)}</div></div></div>'
        f"<script>{_asset('fill.js')}{_asset('first.js')}</script>"
    )


def _now(tab_id: str) -> str:
    return ' aria-current="page"' if tab_id == START else ""


@functools.cache
def _asset(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
