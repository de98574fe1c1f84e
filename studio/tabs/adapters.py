"""Adapters: the library, one of them in detail, the mixer, the bin."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from engine.errors import EngineError
from studio import adapter_panel, adapter_words, adapting, bin_form, mixer, mixing, work_panel
from studio.i18n import t
from studio.library import PAGE
from studio.markup import error, esc, notice
from studio.page import ADAPTERS, COMPARE, HIDDEN, START, Page, go, message

ID = ADAPTERS
FIRST = 6
"""So many cards at first: the mixer below stays near."""

_PICK = """element.addEventListener('click', (event) => {
  const named = event.target.closest('[data-adapter], [data-mix]');
  if (named) trigger('click', {adapter: named.dataset.adapter || '', mix: named.dataset.mix || ''});
});"""
_SEE = "() => setTimeout(() => document.getElementById('adapter-detail')?.scrollIntoView({behavior: 'smooth'}), 150)"
_MIX = "() => setTimeout(() => document.getElementById('adapters-mixer')?.scrollIntoView({behavior: 'smooth'}), 150)"


@dataclass
class Parts:
    """The widgets of this tab."""

    empty: gr.HTML
    to_start: gr.Button
    shelf: gr.Column
    search: gr.Textbox
    base: gr.Dropdown
    cards: gr.HTML
    count: gr.HTML
    more: gr.Button
    to_mixer: gr.Button
    fault: gr.HTML
    undo_row: gr.Row
    undo_told: gr.HTML
    undo: gr.Button
    files: gr.File
    import_name: gr.Textbox
    import_base: gr.Dropdown
    bring_in: gr.Button
    import_fault: gr.HTML
    mixing: gr.Column
    bin: gr.Accordion
    bin_choice: gr.Dropdown
    restore: gr.Button
    empty_bin: gr.Button
    empty_row: gr.Row
    empty_yes: gr.Button
    empty_no: gr.Button
    empty_told: gr.HTML
    limit: gr.State
    binned: gr.State


@dataclass
class Whole:
    """The tab with its panels."""

    tab: Parts
    work: work_panel.Parts
    detail: adapter_panel.Parts
    mixer: mixer.Parts


def build(page: Page) -> None:
    """Lay out the library, the detail, the mixer and the bin."""
    gr.HTML(f'<h2 class="page-title">{esc(t("What your models have learned"))}</h2>')
    work = work_panel.build()
    empty = gr.HTML(visible=False, elem_id="adapters-empty")
    to_start = gr.Button(t("Start with a sample"), variant="primary", visible=False)
    with gr.Column(visible=False) as shelf:
        with gr.Row():
            search = gr.Textbox(
                label=t("Search"),
                placeholder=t("Name, base, method, targets, data"),
                elem_id="adapters-search",
                scale=3,
            )
            base = gr.Dropdown([(t("every base"), "")], value="", label=t("Base"), elem_id="adapters-base", scale=1)
        fault = gr.HTML(visible=False, elem_id="adapters-fault")
        with gr.Row(visible=False) as undo_row:
            undo_told = gr.HTML()
            undo = gr.Button(t("Take it out again"), size="sm", elem_id="adapters-undo")
        cards = gr.HTML(js_on_load=_PICK, elem_id="adapters-cards")
        count = gr.HTML(elem_id="adapters-count")
        with gr.Row():
            more = gr.Button(t("Show more"), visible=False, elem_id="adapters-more")
            to_mixer = gr.Button(t("To the mixer"), visible=False, elem_id="adapters-to-mixer")
    with gr.Accordion(t("Import an adapter"), open=False, elem_id="adapters-import"):
        kinds = t(
            "A zip, PEFT's two files (adapter_config.json and adapter_model.safetensors), or a kohya or diffusers file."
            " Safetensors only: a pickle could run code, and is never opened."
        )
        gr.HTML(f'<p class="st-hint">{esc(kinds)}</p>')
        files = gr.File(label=t("Files"), file_count="multiple", type="filepath", height=140, elem_id="import-files")
        with gr.Row():
            import_name = gr.Textbox(label=t("Name"), placeholder=t("The file's own"), elem_id="import-name")
            import_base = gr.Dropdown(
                [],
                value="",
                allow_custom_value=True,
                label=t("Base"),
                info=t("Left empty: what its file says."),
                elem_id="import-base",
            )
        bring_in = gr.Button(t("Import"), elem_id="import-start")
        import_fault = gr.HTML(visible=False, elem_id="import-fault")
    detail = adapter_panel.build()
    with gr.Column(visible=False, elem_id="adapters-mixer") as mixing_part:
        lead = t(
            "Each slider says how much of an adapter answers; below 0 it is taken away. Let go of one and the answer"
            " comes anew; nothing is loaded again."
        )
        gr.HTML(f'<h2 class="page-title">{esc(t("Mix adapters"))}</h2><p class="st-lead">{esc(lead)}</p>')
        panel = mixer.build()
    bin_parts = bin_form.build("adapters-bin", t("This removes the adapters in the bin with their files, for good."))
    tab = Parts(
        empty,
        to_start,
        shelf,
        search,
        base,
        cards,
        count,
        more,
        to_mixer,
        fault,
        undo_row,
        undo_told,
        undo,
        files,
        import_name,
        import_base,
        bring_in,
        import_fault,
        mixing_part,
        *bin_parts,
        gr.State(FIRST),
        gr.State(""),
    )
    page.parts[ID] = Whole(tab, work, detail, panel)


def wire(page: Page) -> None:
    """Connect the library, the work, the bin, and both panels."""
    whole: Whole = page.parts[ID]
    parts, detail, mixed, box = whole.tab, whole.detail, whole.mixer, whole.work
    studio, library = page.studio, page.studio.library
    mine = list(vars(parts).values())
    mixers = [mixed.chosen, mixed.shelf, mixed.mixes, mixed.forget]
    outputs = [*mine, *box.widgets, *detail.widgets, *mixers]

    def shelf(search: str, base: str, limit: float, chosen: str, inside: list[str]) -> dict[Any, Any]:
        """The cards that fit the search."""
        limit = min(int(limit or FIRST), 5000)
        rows = library.rows(search, base or "", limit=limit)
        total = library.count(search, base or "")
        names = [row["id"] for row in rows]
        return {
            parts.cards: adapter_words.cards(rows, chosen, inside or []),
            parts.count: adapter_words.shown_of(len(names), total, (search or "").strip()),
            parts.more: gr.Button(visible=len(names) < total),
            parts.to_mixer: gr.Button(t("To the mixer ({count})", count=len(inside or [])), visible=bool(inside)),
            parts.limit: limit,
        }

    def listing(search: str, base: str, limit: float, chosen: str, inside: list[str]) -> dict[Any, Any]:
        """Everything as it is now, for whoever arrives or has changed something."""
        cards = shelf(search, base, limit, chosen, inside)
        gone, bases = library.rows(deleted=True), library.bases()
        none = not library.count()
        tip = notice(
            "info",
            t("No adapters yet."),
            t("An adapter is what a run has learned: a small file that changes how its base answers."),
            t("Train one, or import one below."),
        )
        first = mixer._there(studio, inside[0]) if inside else None
        return {
            **cards,
            **bin_shown(gone),
            parts.empty: gr.HTML(tip, visible=none),
            parts.to_start: gr.Button(visible=none),
            parts.shelf: gr.Column(visible=not none or bool(gone)),
            parts.base: gr.Dropdown(
                [(t("every base"), ""), *((it, it) for it in bases)], value=base if base in bases else ""
            ),
            parts.import_base: gr.Dropdown([(t("as its file says"), ""), *((it, it) for it in adapting.bases(studio))]),
            parts.mixing: gr.Column(visible=not none),
            mixed.chosen: gr.Dropdown(mixer.choices(studio, first)),
            **mixer.offered(studio, mixed),
        }

    def bin_shown(gone: list[Any]) -> dict[Any, Any]:
        return {
            parts.bin: gr.Accordion(t("Bin ({count})", count=len(gone)), visible=bool(gone)),
            parts.bin_choice: gr.Dropdown(
                [(row["name"], row["id"]) for row in gone], value=gone[0]["id"] if gone else None
            ),
            parts.empty_row: gr.Row(visible=False),
        }

    def started(work: str) -> dict[Any, Any]:
        return work_panel.shown(studio, box)

    view = [parts.search, parts.base, parts.limit, detail.chosen, mixed.chosen]

    def arrive(search: str, base: str, limit: float, chosen: str, inside: list[str], dismissed: str) -> dict[Any, Any]:
        return {**listing(search, base, limit, chosen, inside), **work_panel.arrived(studio, box, dismissed)}

    def pick(
        search: str, base: str, limit: float, chosen: str, inside: list[str], event: gr.EventData
    ) -> dict[Any, Any]:
        """A card's name was pressed, or its place in the mix."""
        asked = event._data or {}
        inside = list(inside or [])
        key = str(asked.get("mix") or asked.get("adapter") or "")
        try:
            row = library.usable(key)
        except EngineError as fault:
            return {parts.fault: gr.HTML(error(fault), visible=True)}
        if not asked.get("mix"):
            return {**adapter_panel.shown(detail, row), **shelf(search, base, limit, key, inside)}
        return into_mix(row, inside, search, base, limit, chosen)

    def into_mix(
        row: dict[str, Any], inside: list[str], search: str, base: str, limit: float, chosen: str
    ) -> dict[Any, Any]:
        """Put an adapter into the mix, or take it out."""
        inside = [it for it in inside if it != row["id"]] if row["id"] in inside else [*inside, row["id"]]
        try:
            mixing.check(studio, [(it, 1.0) for it in inside]) if inside else None
        except EngineError as fault:
            return {parts.fault: gr.HTML(error(fault, t("It does not go into this mix")), visible=True)}
        return {
            **shelf(search, base, limit, chosen, inside),
            parts.fault: gr.HTML(visible=False),
            mixed.chosen: gr.Dropdown(value=inside),
        }

    def mix_this(search: str, base: str, limit: float, chosen: str, inside: list[str]) -> dict[Any, Any]:
        """The adapter in detail, into the mix."""
        try:
            row = library.usable(chosen)
        except EngineError as fault:
            return {detail.fault: gr.HTML(error(fault), visible=True)}
        found = into_mix(row, list(inside or []), search, base, limit, chosen) if chosen not in (inside or []) else {}
        # Said where it was asked.
        return {detail.fault: found[parts.fault], **found} if parts.fault in found else found

    def rename(name: str, search: str, base: str, limit: float, chosen: str, inside: list[str]) -> dict[Any, Any]:
        try:
            library.rename(chosen, name)
        except EngineError as fault:
            return {detail.fault: gr.HTML(error(fault), visible=True)}
        return {**adapter_panel.shown(detail, library.get(chosen)), **listing(search, base, limit, chosen, inside)}

    def delete(search: str, base: str, limit: float, chosen: str, inside: list[str]) -> dict[Any, Any]:
        try:
            name = library.get(chosen)["name"]
            library.bin(chosen)
        except EngineError as fault:
            return {detail.fault: gr.HTML(error(fault), visible=True), detail.confirm: gr.Row(visible=False)}
        inside = [it for it in inside or [] if it != chosen]
        return {
            **adapter_panel.hidden(detail),
            **listing(search, base, limit, "", inside),
            mixed.chosen: gr.Dropdown(value=inside),
            parts.undo_row: gr.Row(visible=True),
            parts.undo_told: f'<p class="st-hint">{esc(t("{name} is in the bin.", name=name))}</p>',
            parts.binned: chosen,
        }

    def restore(
        key: str | None, search: str, base: str, limit: float, chosen: str, inside: list[str]
    ) -> dict[Any, Any]:
        if key:
            # Another page may have emptied the bin since; the list that follows says so.
            with contextlib.suppress(EngineError):
                library.restore(key)
        return {**listing(search, base, limit, chosen, inside), parts.undo_row: gr.Row(visible=False)}

    def empty_bin(search: str, base: str, limit: float, chosen: str, inside: list[str]) -> dict[Any, Any]:
        library.empty_bin()
        return {**listing(search, base, limit, chosen, inside), parts.undo_row: gr.Row(visible=False)}

    def bring_in(files: list[str] | None, name: str, base: str) -> dict[Any, Any]:
        try:
            work = adapting.bring_in(studio, [Path(it) for it in files or []], name, base or "")
        except EngineError as fault:
            return {parts.import_fault: gr.HTML(error(fault, t("This cannot be imported")), visible=True)}
        return {**started(work), parts.import_fault: gr.HTML(visible=False), parts.files: None, parts.import_name: ""}

    def compare(chosen: str) -> tuple[Any, Any]:
        row = library.get(chosen)
        return message(base=row["base"], runs=[row["id"]]), go(COMPARE)

    page.tab[ID].select(arrive, [*view, box.dismissed], outputs, **HIDDEN)
    parts.cards.click(pick, view, outputs, **HIDDEN)
    gr.on(
        [parts.search.change, parts.base.input, mixed.chosen.change],
        lambda search, base, limit, chosen, inside: shelf(search, base, FIRST if search else limit, chosen, inside),
        view,
        outputs,
        trigger_mode="always_last",
        **HIDDEN,
    )
    parts.more.click(
        lambda search, base, limit, chosen, inside: shelf(search, base, limit + PAGE, chosen, inside),
        view,
        outputs,
        **HIDDEN,
    )
    parts.to_mixer.click(None, None, None, js=_MIX, **HIDDEN)
    parts.to_start.click(lambda: go(START), None, page.tabs, **HIDDEN)
    detail.chosen.change(None, detail.chosen, None, js=f"(key) => {{ if (key) ({_SEE})(); }}", **HIDDEN)
    detail.mix.click(mix_this, view, outputs, **HIDDEN).then(None, None, None, js=_MIX, **HIDDEN)
    detail.compare.click(compare, detail.chosen, [page.comparison, page.tabs], **HIDDEN)
    detail.rename.click(rename, [detail.name, *view], outputs, **HIDDEN)
    detail.name.submit(rename, [detail.name, *view], outputs, **HIDDEN)
    detail.close.click(lambda: adapter_panel.hidden(detail), None, detail.widgets, **HIDDEN)
    detail.delete.click(lambda: gr.Row(visible=True), None, detail.confirm, **HIDDEN)
    detail.kept.click(lambda: gr.Row(visible=False), None, detail.confirm, **HIDDEN)
    detail.confirmed.click(delete, view, outputs, **HIDDEN)
    parts.undo.click(restore, [parts.binned, *view], outputs, **HIDDEN)
    parts.restore.click(restore, [parts.bin_choice, *view], outputs, **HIDDEN)
    parts.empty_bin.click(lambda: gr.Row(visible=True), None, parts.empty_row, **HIDDEN)
    parts.empty_no.click(lambda: gr.Row(visible=False), None, parts.empty_row, **HIDDEN)
    parts.empty_yes.click(empty_bin, view, outputs, **HIDDEN)
    parts.bring_in.click(
        bring_in, [parts.files, parts.import_name, parts.import_base], outputs, trigger_mode="once", **HIDDEN
    )
    work_panel.wire(studio, box, listing, view, outputs)
    adapter_panel.wire(page, detail, started, box.widgets)
    mixer.wire(studio, mixed, started, box.widgets)
