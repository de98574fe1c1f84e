"""Small pieces of HTML. Every text from outside goes through `esc`."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine.errors import EngineError
from studio import states
from studio.i18n import N_, reported, t

BASE_COLOUR = "#8A8F98"


def esc(text: Any) -> str:
    """Text made safe for HTML; `$` and braces too, which the page's own templates would read."""
    safe = html.escape(str(text), quote=True)
    return safe.replace("$", "&#36;").replace("{", "&#123;").replace("}", "&#125;").replace("`", "&#96;")


def strong(text: str, **values: Any) -> str:
    """`t(text)` as HTML, with each value in bold."""
    words = html.escape(t(text), quote=True)
    return words.format(**{name: f"<b>{esc(value)}</b>" for name, value in values.items()})


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


def error(fault: EngineError | Mapping[str, Any], title: str = "") -> str:
    """An error as an instruction; its code is there for whoever looks it up. Without a title it did not work."""
    if isinstance(fault, EngineError):
        fault = fault.to_event()
    message, hint = (reported(str(fault.get(part, ""))) for part in ("message", "hint"))
    box = notice("error", title or t("That did not work"), message, hint)
    return box.replace('class="notice error"', f'class="notice error" data-code="{esc(fault.get("code", ""))}"', 1)


def _lines(text: str) -> str:
    return esc(text).replace("\n", "<br>")


def dot(colour: str) -> str:
    """A run's colour mark."""
    return f'<span class="st-dot" style="background:{esc(colour)}" aria-hidden="true"></span>'


STATES = {
    states.QUEUED: N_("queued"),
    states.STARTING: N_("starting"),
    states.RUNNING: N_("running"),
    states.PAUSING: N_("pausing"),
    states.PAUSED: N_("paused"),
    states.STOPPING: N_("stopping"),
    states.STOPPED: N_("stopped"),
    states.DONE: N_("done"),
    states.FAILED: N_("failed"),
    states.LOST: N_("lost"),
}
"""A run's state in a word."""


def badge(state: str) -> str:
    """A run's state as a mark."""
    kind = {
        states.DONE: "good",
        states.FAILED: "bad",
        states.LOST: "bad",
        states.RUNNING: "live",
        states.STARTING: "live",
        states.PAUSING: "live",
        states.STOPPING: "live",
    }.get(state, "calm")
    return f'<span class="st-badge {kind}">{esc(t(STATES[state]) if state in STATES else state)}</span>'


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
        return t("{seconds} s", seconds=whole)
    if whole < 3600:
        return t("{minutes} min {seconds:02d} s", minutes=whole // 60, seconds=whole % 60)
    return t("{hours} h {minutes:02d} min", hours=whole // 3600, minutes=whole % 3600 // 60)


def ago(moment: float | None) -> str:
    """A moment in the past as people say it."""
    if moment is None:
        return ""
    passed = time.time() - moment
    if passed < 60:
        return t("just now")
    if passed < 3600:
        return t("{minutes} min ago", minutes=int(passed // 60))
    if passed < 86400:
        return t("{hours} h ago", hours=int(passed // 3600))
    return time.strftime("%Y-%m-%d", time.localtime(moment))


def number(value: float | None, digits: int = 3) -> str:
    """A number with sensible digits; nothing where there is none."""
    if value is None:
        return ""
    if value and (abs(value) < 0.0001 or abs(value) >= 100_000):
        return f"{value:.{digits}g}"
    told = f"{value:,.{digits}g}"
    # From 999.5 on three digits are 1e+03.
    return told if abs(value) < 1000 and "e" not in told else f"{value:,.0f}"


def size(count: float) -> str:
    """Bytes as people say it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return t("{count:.0f} bytes", count=count) if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
