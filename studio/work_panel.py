"""The box that says which work on adapters is under way and what came of the last, wherever on the page one is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from engine.errors import EngineError
from studio import adapter_words, exporting, states
from studio.adapter_api import served
from studio.context import Studio
from studio.i18n import t
from studio.page import HIDDEN, TICK


@dataclass
class Parts:
    """The widgets of the box; `seen` is the work that it watches, `dismissed` the one that was closed."""

    told: gr.HTML
    row: gr.Row
    stop: gr.Button
    download: gr.DownloadButton
    dismiss: gr.Button
    timer: gr.Timer
    seen: gr.State
    dismissed: gr.State

    @property
    def widgets(self) -> list[Any]:
        """All of them in one list."""
        return list(vars(self).values())


def build() -> Parts:
    """Lay out the box, hidden until there is work."""
    with gr.Column(elem_id="adapters-work"):
        told = gr.HTML(visible=False)
        with gr.Row(visible=False) as row:
            stop = gr.Button(t("Stop"), size="sm", visible=False, elem_id="work-stop")
            download = gr.DownloadButton(t("Download"), size="sm", visible=False, elem_id="work-download")
            dismiss = gr.Button(t("Close"), size="sm", visible=False, elem_id="work-close")
    return Parts(told, row, stop, download, dismiss, gr.Timer(0.7, active=False), gr.State(""), gr.State(""))


def shown(studio: Studio, parts: Parts, dismissed: str = "") -> dict[Any, Any]:
    """The work that is under way, or what came of the newest; the timer runs only as long as it does."""
    row = studio.works.newest()
    told = adapter_words.work(row, dismissed)
    live = row is not None and row["state"] in (states.STARTING, states.RUNNING)
    path = None
    if row and told and row["kind"] == "export" and row["state"] == states.DONE:
        with contextlib.suppress(EngineError):
            path = served(parts.download, exporting.exported(studio, row["id"]))
    return {
        parts.told: gr.HTML(told, visible=bool(told)),
        parts.row: gr.Row(visible=bool(told)),
        parts.stop: gr.Button(visible=live),
        parts.download: gr.DownloadButton(value=path, visible=path is not None),
        parts.dismiss: gr.Button(visible=bool(told) and not live),
        parts.timer: gr.Timer(active=live),
        parts.seen: row["id"] if row and live else "",
    }


def arrived(studio: Studio, parts: Parts, dismissed: str) -> dict[Any, Any]:
    """As `shown`, for whoever opens the page: what had ended before is no news."""
    row = studio.works.newest()
    old = row["id"] if row and row["ended"] and not dismissed else dismissed
    return {**shown(studio, parts, old), parts.dismissed: old}


def wire(
    studio: Studio, parts: Parts, changed: Callable[..., dict[Any, Any]], view: Sequence[Any], outputs: Sequence[Any]
) -> None:
    """Connect the box.

    Args:
        studio: whose work it is.
        parts: its widgets.
        changed: what the page shows when a work has ended, from the values of `view`.
        view: inputs of `changed`.
        outputs: the widgets that `changed` writes to, and those of the box.
    """

    def tick(seen: str, *values: Any) -> dict[Any, Any]:
        """The progress; when the work has ended, what came of it, and the library with it."""
        found = shown(studio, parts)
        return found if seen and found[parts.seen] == seen else {**found, **changed(*values)}

    def stop(dismissed: str) -> dict[Any, Any]:
        studio.works.stop()
        return shown(studio, parts, dismissed)

    def dismiss() -> dict[Any, Any]:
        row = studio.works.newest()
        key = row["id"] if row else ""
        return {**shown(studio, parts, key), parts.dismissed: key}

    parts.timer.tick(tick, [parts.seen, *view], outputs, **TICK)
    parts.stop.click(stop, parts.dismissed, parts.widgets, **HIDDEN)
    parts.dismiss.click(dismiss, None, parts.widgets, **HIDDEN)
