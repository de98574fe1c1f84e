"""One page in each language: the layout is built once per language, and each browser is handed the one it asks for.

Gradio numbers components and callbacks as they are made. Built a second time from the same number on, the layout in
another language has the same ones, so that only what the browser draws differs; the callbacks, and everything that the
server keeps of a visit, are those of the first.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from typing import Any, cast

import gradio as gr
from gradio.context import Context
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.paths import REPOSITORY
from studio import filling
from studio.i18n import ENGLISH, LANGUAGES, NAME, catalogue, language, speaking, wanted

_log = logging.getLogger(__name__)
_SCRIPTS = REPOSITORY / "studio" / "assets" / "scripts"
_DRAWN = ("components", "layout", "dependencies", "page")
"""The parts of Gradio's configuration that come of the layout; the rest comes of `launch`."""


class Pages(gr.Blocks):
    """Gradio's page whose `config` is in the language of the request that asks for it.

    Attributes:
        drawn: language -> the parts of the configuration that the layout makes; none for English, which is our own.
        fills: see `studio.filling.chain`.
    """

    drawn: dict[str, dict[str, Any]]
    fills: dict[int, int]
    _own: dict[str, Any]
    _browsers: dict[tuple[str, str], dict[str, Any]]
    _rests: dict[str, dict[int, dict[str, Any]]]

    @property
    def config(self) -> Any:
        """What a browser draws the page from."""
        page, spoken, whole = filling.asked(), language(), self._whole()
        if not page:
            return whole
        if (page, spoken) not in self._browsers:
            self._browsers[page, spoken] = filling.first(whole, self.fills.values() if page == filling.FIRST else ())
        return {**whole, **self._browsers[page, spoken]}

    @config.setter
    def config(self, value: Any) -> None:
        self._own, self._browsers, self._rests = value, {}, {}

    def _whole(self) -> Any:
        other = getattr(self, "drawn", {}).get(language())
        return {**self._own, **other} if other else self._own

    async def process_api(self, block_fn: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """A callback's answer; that of one which brings a tab has the tab's layout in the asker's language."""
        answer = await super().process_api(block_fn, *args, **kwargs)
        number = block_fn if isinstance(block_fn, int) else block_fn._id
        if number in self.fills:
            with speaking(asked_by(kwargs.get("request"))):
                spoken = language()
                if spoken not in self._rests:
                    self._rests[spoken] = filling.rest(self._whole(), self.fills)
            answer["render_config"] = self._rests[spoken][number]
        return answer

    def get_api_info(self, *args: Any, **kwargs: Any) -> Any:
        """The public endpoints, in English: Gradio keeps the first answer for everyone."""
        with speaking(ENGLISH):
            return super().get_api_info(*args, **kwargs)

    def launch(self, *args: Any, **kwargs: Any) -> Any:
        """Serve, with the language of each request known."""
        given = dict(kwargs.pop("app_kwargs", None) or {})
        given["middleware"] = [Middleware(Languages), *given.get("middleware", [])]
        return super().launch(*args, app_kwargs=given, **kwargs)


def in_each_language(build: Callable[[], Pages]) -> Pages:
    """The English page, with its layout in every other language beside it.

    A layout with other components or callbacks than the English one would answer to the wrong ones: it is left out, and
    the page stays English in that language.
    """
    start = Context.id
    with speaking(ENGLISH):
        pages = build()
    end, drawn = Context.id, {}
    for name in LANGUAGES:
        if name == ENGLISH:
            continue
        Context.id = start
        with speaking(name):
            # As `launch` draws it up: after the last word on the callbacks, which comes once the layout is done.
            config = cast(dict[str, Any], build().get_config_file())
        if Context.id == end and shape(config) == shape(pages.config):
            drawn[name] = {part: config[part] for part in _DRAWN}
        else:
            Context.id = max(Context.id, end)
            _log.error("The layout in %s has other components or callbacks than the English one.", name)
    pages.drawn = drawn
    return pages


def shape(config: dict[str, Any]) -> Any:
    """What two languages of one layout have in common: components, callbacks and how they are laid out."""
    return (
        [(item["id"], item["type"], item["props"].get("elem_id")) for item in config["components"]],
        [(item["id"], item["targets"], item["inputs"], item["outputs"]) for item in config["dependencies"]],
        config["layout"],
    )


def asked_by(request: Any) -> str:
    """The language of whoever sent a `gr.Request`; English where nobody did."""
    known = getattr(request, "request", None)
    return wanted(known.query_params, known.cookies, known.headers) if known is not None else ENGLISH


class Languages:
    """ASGI middleware: whatever answers a request knows its language, and the page says which one it is in."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        chosen = wanted(request.query_params, request.cookies, request.headers)
        with speaking(chosen):
            await self.app(scope, receive, _Marked(send, chosen) if scope["method"] == "GET" else send)


class _Marked:
    """Passes an answer on; a page is held back until it is whole, and marked with its language."""

    def __init__(self, send: Send, chosen: str) -> None:
        self.send, self.chosen = send, chosen
        self.start: Message | None = None
        self.body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            if headers.get("content-type", "").startswith("text/html"):
                self.start = message
                return
        elif self.start is not None:
            self.body += message.get("body", b"")
            if message.get("more_body"):
                return
            start, self.start = self.start, None
            body = mark(self.body, self.chosen)
            headers = MutableHeaders(raw=start["headers"])
            headers["content-length"] = str(len(body))
            headers.add_vary_header("Accept-Language, Cookie")
            start["headers"] = headers.raw
            await self.send(start)
            message = {**message, "body": body}
        await self.send(message)


def mark(page: bytes, chosen: str) -> bytes:
    """A page's HTML with its language named, for readers aloud and for Gradio, whose own words follow the browser's."""
    texts = {text: catalogue(chosen)[text] for text in script_texts() if text in catalogue(chosen)}
    script = (
        f"<script>Object.defineProperty(navigator, 'language', {{get: () => '{chosen}'}});"
        f"window.studioTexts = {_script_json(texts)};</script>"
    )
    page = page.replace(b'lang="en"', f'lang="{chosen}"'.encode(), 1)
    return page.replace(b"<head>", b"<head>" + script.encode(), 1)


def script_texts() -> list[str]:
    """The texts that the scripts of the page say, by `studioText("...")`."""
    sources = (path.read_text(encoding="utf-8") for path in sorted(_SCRIPTS.glob("*.js")))
    found = (text for source in sources for text in re.findall(r'studioText\(\s*("(?:[^"\\]|\\.)*")', source))
    return [cast(str, json.loads(text)) for text in found]


def _script_json(value: Any) -> str:
    # No text may end the script that it stands in.
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


def switch() -> str:
    """The choice of language: a link for each, by its own name, the one in use marked."""
    links = []
    for code, name in LANGUAGES.items():
        now = ' aria-current="true"' if code == language() else ""
        links.append(f'<a href="?{NAME}={code}" lang="{code}" hreflang="{code}" data-language="{code}"{now}>{name}</a>')
    return f'<nav class="st-language" aria-label="Language / 언어">{"".join(links)}</nav>'
