"""Small pieces of HTML. Every text from outside goes through `esc`."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine.errors import EngineError
from studio import states

BASE_COLOUR = "#8A8F98"


def esc(text: Any) -> str:
    """Text made safe for HTML; `$` and braces too, which the page's own templates would read."""
    safe = html.escape(str(text), quote=True)
    return safe.replace("$", "&#36;").replace("{", "&#123;").replace("}", "&#125;").replace("`", "&#96;")


def began(text: str) -> str:
    """Words as they stand at the beginning of a line."""
    return text[:1].upper() + text[1:]


def notice(kind: str, title: str, text: str = "", hint: str = "") -> str:
    """A box that says what happened and what to do. `kind` is `error`, `warn`, `good` or `info`."""
    parts = [f'<strong class="notice-title">{esc(title)}</strong>']
    parts += [f"<p>{_lines(text)}</p>"] if text else []
    parts += [f'<p class="notice-hint">{_lines(hint)}</p>'] if hint else []
    role = "alert" if kind == "error" else "status"
    return f'<div class="notice {esc(kind)}" role="{role}">{"".join(parts)}</div>'


def error(fault: EngineError | Mapping[str, Any], title: str = "That did not work") -> str:
    """An error as an instruction; its code is there for whoever looks it up."""
    if isinstance(fault, EngineError):
        fault = fault.to_event()
    box = notice("error", title, str(fault.get("message", "")), str(fault.get("hint", "")))
    return box.replace('class="notice error"', f'class="notice error" data-code="{esc(fault.get("code", ""))}"', 1)


def _lines(text: str) -> str:
    return esc(text).replace("\n", "<br>")


def dot(colour: str) -> str:
    """A run's colour mark."""
    return f'<span class="st-dot" style="background:{esc(colour)}" aria-hidden="true"></span>'


def badge(state: str) -> str:
    """A run's state in a word."""
    kind = {
        states.DONE: "good",
        states.FAILED: "bad",
        states.LOST: "bad",
        states.RUNNING: "live",
        states.STARTING: "live",
        states.PAUSING: "live",
        states.STOPPING: "live",
    }.get(state, "calm")
    return f'<span class="st-badge {kind}">{esc(state)}</span>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table of ready HTML cells; on a narrow screen each row becomes a card that repeats the heads."""
    heads = "".join(f'<th scope="col">{esc(text)}</th>' for text in head)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-head="{esc(name)}">{cell}</td>' for name, cell in zip(head, row, strict=True))
        + "</tr>"
        for row in rows
    )
    title = f"<caption>{esc(caption)}</caption>" if caption else ""
    return f'<table class="sheet">{title}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


def seconds(value: float | None) -> str:
    """A duration as people say it: 4 s, 2 min 05 s, 1 h 12 min."""
    if value is None or not math.isfinite(value):
        return ""
    whole = max(0, round(value))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def ago(moment: float | None) -> str:
    """A moment in the past as people say it."""
    if moment is None:
        return ""
    passed = time.time() - moment
    if passed < 60:
        return "just now"
    if passed < 3600:
        return f"{int(passed // 60)} min ago"
    if passed < 86400:
        return f"{int(passed // 3600)} h ago"
    return time.strftime("%Y-%m-%d", time.localtime(moment))


def number(value: float | None, digits: int = 3) -> str:
    """A number with sensible digits; nothing where there is none."""
    if value is None:
        return ""
    if value and (abs(value) < 0.0001 or abs(value) >= 100_000):
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def size(count: float) -> str:
    """Bytes as people say it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
