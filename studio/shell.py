"""The page: head, the tabs in order, and the public endpoints."""

from __future__ import annotations

from typing import Any, cast

import gradio as gr

from studio import api, callbacks, demo, filling
from studio.context import Studio
from studio.i18n import t
from studio.languages import Pages, in_each_language, switch
from studio.markup import esc
from studio.page import HIDDEN, START, TAB_IDS, TAB_TITLES, TRAIN, Page, go
from studio.store import is_run_id
from studio.tabs import TABS
from studio.visits import Visits


def create_app(studio: Studio) -> Pages:
    """The whole page over an opened home folder, in every language."""
    return in_each_language(lambda: _page(studio))


def _page(studio: Studio) -> Pages:
    """The page in the language that is spoken now."""
    with Pages(title="Adapter Studio", analytics_enabled=False, delete_cache=demo.cache_rule()) as blocks:
        saying = t("teach a model something small, and see what it changed")
        gr.HTML(f'<div class="brand"><b>Adapter Studio</b><span>{esc(saying)}</span>{switch()}</div>')
        demo.banner()
        # First, so that no callback of the page takes one of their names.
        api.build(studio)
        run = gr.Textbox(visible="hidden", elem_id="run-id")
        # What the page presses when an answer waits at the server (assets/first/stream.js).
        gr.Button(visible="hidden", elem_id="studio-wake").click(lambda: None, None, None, **HIDDEN)
        # What the first page presses once it stands (assets/first/fill.js).
        fill = gr.Button(visible="hidden", elem_id="studio-fill")
        recipe, comparison, dataset = gr.State(None), gr.State(None), gr.State(None)
        with gr.Tabs() as tabs:
            page = Page(studio, blocks, tabs, run, recipe, comparison, dataset)
            for module in TABS:
                title = t(TAB_TITLES[module.ID])
                with gr.Tab(title, id=module.ID, elem_id=f"tab-{module.ID}", render_children=True) as tab:
                    page.tab[module.ID] = tab
                    module.build(page)
        for module in TABS:
            # Gradio selects the first tab when it draws the page; that must not take the place out of the address. It
            # comes before what else a tab does when it is selected: an event's callbacks wait for one another.
            when = "window.studioArrived && " if module.ID == START else ""
            page.tab[module.ID].select(
                None, None, None, js=f"() => {when}window.studioAddress('tab', '{module.ID}')", **HIDDEN
            )
            module.wire(page)

        def arrive(request: gr.Request) -> tuple[str, Any]:
            """Come back to the run and the tab that the address names."""
            asked = dict(request.query_params)
            run_id = asked.get("run", "")
            run_id = run_id if is_run_id(run_id) else ""
            tab_id = asked.get("tab", "")
            return run_id, go(tab_id) if tab_id in TAB_IDS else go(TRAIN) if run_id else gr.skip()

        arrival = blocks.load(arrive, None, [run, tabs], **HIDDEN)
        arrival.then(None, None, None, js="() => { window.studioArrived = true; }", **HIDDEN)
        fills = filling.chain(fill, [page.tab[module.ID] for module in TABS if module.ID != START])
    _lighten(blocks, run)
    callbacks.tell_all(blocks)
    blocks.fills = fills
    blocks.default_config = Visits.of(blocks)
    return cast(Pages, blocks)


def _lighten(blocks: gr.Blocks, place: gr.Component) -> None:
    """Let the hidden progress of every callback belong to one component.

    At each change of a callback's state Gradio's page looks up, one by one, every component that any callback has
    written to so far. With the hundreds of this page that is a third of a second between a click and the request it
    makes, for progress that is never shown.
    """
    for function in blocks.fns.values():
        if function.show_progress == "hidden":
            function.show_progress_on = [place]
