"""What people read on the pages, in their language. English text is its own key.

Korean stands in `studio/locales/ko/*.json`, flat objects from the English text to the Korean one. Whose language it is
comes from the request behind the running callback; while the layout is built, from `speaking`.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from engine.paths import REPOSITORY

ENGLISH, KOREAN = "en", "ko"
LANGUAGES = {ENGLISH: "English", KOREAN: "한국어"}
NAME = "language"
"""Of the address's parameter and, after `studio-`, of the cookie."""
COOKIE = f"studio-{NAME}"

REPORTS = "reports.json"
"""The file of a language that has what processes say, see `reported`."""

_JOINTS = ((re.compile(r"(?<=[.?!]) (?=[A-Z'\"])"), " "), (re.compile("; (?=(?:[^']*'[^']*')*[^']*$)"), "; "))
"""What stands between sentences, and between their parts but not within a quoted name."""
_FOLDER = REPOSITORY / "studio" / "locales"
_log = logging.getLogger(__name__)
_spoken: ContextVar[str] = ContextVar("studio-language", default=ENGLISH)


def t(text: str, **values: Any) -> str:
    """A text in the language of whoever asks, with `{name}` filled in from `values`.

    Args:
        text: the English text, a literal, so that a missing translation can be found.
        values: what stands in for each name in braces.
    """
    asked = language()
    if asked != ENGLISH and text:
        found = catalogue(asked).get(text)
        if found is None:
            _missed(asked, text)
        else:
            text = found
    return text.format(**values) if values else text


def reported(text: str) -> str:
    """What a process said in English (progress, an error, its hint), in the language of whoever reads it.

    Such texts hold names and numbers already. `reports.json` of a language has them with a number in braces for each
    (`"There is no adapter {0}."`); one that it does not have stays as it was said. Where a text is none of them, and
    its lines, sentences or parts between semicolons are, these are translated.
    """
    asked = language()
    if asked == ENGLISH or not text:
        return text
    if "\n" in text:
        # Several faults at once stand one a line.
        return "\n".join(map(reported, text.split("\n")))
    if text.startswith("- "):
        return "- " + reported(text.removeprefix("- "))
    return _translated(text, asked) or text


def _translated(text: str, asked: str) -> str:
    """A report in a language, "" where it is not known."""
    known, patterns = _reports(asked)
    if text in known:
        return known[text]
    # Before the patterns: a gap would take what stands between two sentences for its own.
    for between, joint in _JOINTS:
        some = between.split(text)
        told = [_translated(part, asked) for part in some] if len(some) > 1 else [""]
        if all(told):
            return joint.join(told)
    for pattern, words in patterns:
        found = pattern.fullmatch(text)
        if found:
            gaps = (found[f"v{number}"] for number in range(pattern.groups))
            return words.format(*(_filling(gap, asked) for gap in gaps))
    return ""


def _filling(part: str, asked: str) -> str:
    """What fills a gap: it may be a report itself, as the cause in "cannot be read: {0}", or the name of a unit."""
    plain = part.strip()
    if " " not in plain:
        return _reports(asked)[0].get(plain.lower(), part)
    # A registry's line is in the catalogue, since pages show it by itself too.
    return part.replace(plain, _translated(plain, asked) or catalogue(asked).get(plain, plain))


def N_(text: str) -> str:  # noqa: N802 - gettext's name for it
    """Marks a text that `t` is called with later, so that its translation is asked for."""
    return text


def language() -> str:
    """The language of the callback that runs here, or of the layout that is built; English outside of both."""
    # Not imported here: what trains and measures has no page, and loads its words without Gradio.
    context = sys.modules.get("gradio.context")
    asking = context.LocalContext.request.get(None) if context else None
    # What a component asks of the server comes with the plain request, which the middleware has read already.
    request = getattr(asking, "request", None)
    if request is None:
        return _spoken.get()
    return wanted(request.query_params, request.cookies, request.headers)


def wanted(query: Mapping[str, str], cookies: Mapping[str, str], headers: Mapping[str, str]) -> str:
    """The language that a request asks for: in the address, else in the cookie, else as the browser prefers."""
    for chosen in (query.get(NAME), cookies.get(COOKIE)):
        if chosen in LANGUAGES:
            return str(chosen)
    return preferred(headers.get("accept-language") or "")


@functools.lru_cache(maxsize=256)
def preferred(header: str) -> str:
    """The first of our languages in an `Accept-Language` header, by its weights; English where there is none."""
    asked = []
    for part in header.split(","):
        tag, _, weight = part.partition(";")
        share = re.fullmatch(r"\s*q=([01](?:\.\d{0,3})?)\s*", weight) if weight else None
        asked.append((float(share[1]) if share else 1.0, tag.strip().split("-")[0].lower()))
    # A stable sort: of equal weights the first stays first.
    for share_of_it, tag in sorted(asked, key=lambda item: -item[0]):
        if tag in LANGUAGES and share_of_it > 0:
            return tag
    return ENGLISH


@contextmanager
def speaking(chosen: str) -> Iterator[None]:
    """Within the block, and with no callback running, `t` answers in this language."""
    token = _spoken.set(chosen)
    try:
        yield
    finally:
        _spoken.reset(token)


@functools.cache
def catalogue(chosen: str) -> Mapping[str, str]:
    """English text -> its text in a language, of all files of that language's folder."""
    found: dict[str, str] = {}
    for path in sorted((_FOLDER / chosen).glob("*.json")):
        if path.name == REPORTS:
            continue
        found.update(json.loads(path.read_text(encoding="utf-8")))
    return found


@functools.cache
def _reports(chosen: str) -> tuple[Mapping[str, str], list[tuple[re.Pattern[str], str]]]:
    """The reports of a language: whole ones, and those with gaps, the one with most words of its own first."""
    path = _FOLDER / chosen / REPORTS
    texts: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    gap = re.compile(r"\{(\d+)\}")
    found = []
    for key in sorted(texts, key=lambda key: -len(gap.sub("", key))):
        if gap.search(key):
            parts = gap.split(key)
            # Even parts are words, odd ones the numbers of the gaps.
            shape = "".join(f"(?P<v{part}>.*?)" if at % 2 else re.escape(part) for at, part in enumerate(parts))
            if re.search(r"\w $", parts[-3]) and not parts[-1]:
                # A part of a sentence, as "The cell {0}", is not the whole of one.
                shape += "(?<![.?!])"
            found.append((re.compile(shape), texts[key]))
    return texts, found


@functools.cache
def _missed(chosen: str, text: str) -> None:
    """Say once in the server's log that a text has no translation; the page shows it in English."""
    _log.warning("No %s text for %r", chosen, text)
