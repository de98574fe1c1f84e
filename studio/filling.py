"""The page in two goes: what Start needs comes with the page, each other tab as soon as Start stands.

Gradio draws a page in the browser from one configuration, and the work grows with the product of its components and
callbacks. So the first page is sent without what stands in other tabs (`first`). Once it is drawn, a chain of callbacks
brings the tabs, each answered as Gradio answers `gr.render`: with the part of the layout that is to be drawn (`rest`).
The callbacks behind the components come with the last tab. `assets/first/fill.js` starts the chain, and holds what is
pressed before its end. Every other address is sent whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import gradio as gr

from studio.page import HIDDEN

_RENDERED = 1_000_000
"""The renders of the chain are numbered from here, out of the way of Gradio's own."""
FIRST, WHOLE = "first", "whole"
_asked: ContextVar[str] = ContextVar("studio-asked-page", default="")

Config = dict[str, Any]


@contextmanager
def asking(page: str) -> Iterator[None]:
    """The configuration that is asked for within is to draw the `FIRST` page or a `WHOLE` one in a browser."""
    token = _asked.set(page)
    try:
        yield
    finally:
        _asked.reset(token)


def asked() -> str:
    """Which page's configuration a browser asks for; "" where it is something else that asks, such as a client."""
    return _asked.get()


def chain(button: gr.Button, tabs: Iterable[gr.Tab]) -> dict[int, int]:
    """The callbacks that bring the tabs one after another: number of a callback -> id of its tab."""
    found: dict[int, int] = {}
    then = button.click
    for tab in tabs:
        step = then(lambda: None, None, None, **HIDDEN)
        found[step["id"]] = tab._id
        then = step.then
    then(None, None, None, js="() => window.studioFilled && window.studioFilled()", **HIDDEN)
    return found


def first(config: Config, tabs: Iterable[int]) -> Config:
    """The parts of a configuration that the first page is drawn from; with no tabs to come later, the whole page.

    A callback that reads or writes what is not there yet is left out with all that lead to it, and no tab is filled
    when the page loads. The components that stand for the parameters of public endpoints are left out; they stand
    unseen at the top of the layout.

    Args:
        config: the whole of a layout.
        tabs: ids of the tabs that come later; their titles stay.
    """
    later, items = set(tabs), {item["id"]: item for item in config["components"]}
    unseen = {
        node["id"]
        for node in config["layout"]["children"]
        if items[node["id"]]["type"] == "api" or items[node["id"]]["props"].get("visible") is False
    }

    def pruned(node: Config) -> Config:
        below = [] if node["id"] in later else node.get("children") or []
        return {**node, "children": [pruned(child) for child in below if child["id"] not in unseen]}

    layout = pruned(config["layout"])
    drawn = set(_ids(layout))
    # A callback on nothing drawn (the load of the page, the end of another) belongs here by what it reads and writes.
    known = map(_unloaded, config["dependencies"]) if later else config["dependencies"]
    calls = {call["id"]: call for call in known if _led(call)}
    able = {number for number, call in calls.items() if _parts(call) <= drawn}
    while True:
        broken = {
            leading
            for number, call in calls.items()
            if number not in able and (leading := call.get("trigger_after")) in able
        }
        orphans = {n for n in able if (after := calls[n].get("trigger_after")) is not None and after not in able}
        if not broken | orphans:
            break
        able -= broken | orphans
    components = [item for item in _settled(config) if item["id"] in drawn]
    # The public endpoints are named on the page that Gradio makes of them, wherever they lead.
    public = [{**call, "targets": []} for call in config["dependencies"] if call["api_visibility"] == "public"]
    dependencies = [*(call for number, call in calls.items() if number in able), *public]
    numbers = sorted(call["id"] for call in dependencies)
    page = {"layout": layout, "components": sorted(drawn), "dependencies": numbers}
    return {
        "layout": layout,
        "components": components,
        "dependencies": dependencies,
        "page": {**config["page"], "": page},
    }


def rest(config: Config, fills: Mapping[int, int]) -> dict[int, Config]:
    """What each callback of the chain answers: number of the callback -> what Gradio calls a render's configuration.

    Args:
        config: the whole of a layout.
        fills: what `chain` found.
    """
    nodes, settled = {node["id"]: node for node in _nodes(config["layout"])}, _settled(config)
    found: dict[int, Config] = {}
    for place, (number, tab) in enumerate(fills.items()):
        drawn = {tab, *_ids(nodes[tab])}
        components = [item for item in settled if item["id"] in drawn]
        found[number] = {
            "render_id": _RENDERED + place,
            "layout": nodes[tab],
            "components": components,
            "dependencies": [],
        }
    # Those of the first page too: of one component's event the page keeps the callbacks that came last.
    found[number]["dependencies"] = [
        call for call in map(_unloaded, config["dependencies"]) if call["id"] not in fills and _led(call)
    ]
    return found


def _settled(config: Config) -> list[Config]:
    """The components, each with its word on whether it can be changed.

    Where the layout says nothing, the page asks what the callbacks do with it: a component that one reads can be, or
    one that none writes and that holds nothing. It would ask only those of the first page.
    """
    read = {part for call in config["dependencies"] for part in call["inputs"]}
    written = {part for call in config["dependencies"] for part in call["outputs"]}

    def can(item: Config) -> bool:
        given = item["props"].get("interactive")
        if given is not None:
            return bool(given)
        return item["id"] in read or (item["id"] not in written and not item["props"].get("value"))

    return [{**item, "props": {**item["props"], "interactive": can(item)}} for item in config["components"]]


def _unloaded(call: Config) -> Config:
    """A callback that the load of the page does not call: its address has nothing to come back to, and what a tab
    shows is filled when the tab is selected, as Start is at once."""
    return {**call, "targets": [target for target in call["targets"] if target[1] != "load"]}


def _led(call: Config) -> bool:
    """Whether anything on the page leads to a callback; nothing does to a public endpoint."""
    return bool(call["targets"]) or call.get("trigger_after") is not None


def _parts(call: Config) -> set[int]:
    """The components that a callback is about."""
    targets = {target for target, event in call["targets"] if target is not None and event != "load"}
    return {*call["inputs"], *call["outputs"], *targets}


def _nodes(node: Config) -> Iterator[Config]:
    for child in node.get("children") or []:
        yield child
        yield from _nodes(child)


def _ids(node: Config) -> list[int]:
    return [child["id"] for child in _nodes(node)]
