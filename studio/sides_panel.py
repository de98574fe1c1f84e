"""The rows held back for evaluation, on the Data page: which they would be, and whether training has seen them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from engine import data
from studio import data_words
from studio.datasets import Checked
from studio.i18n import t
from studio.markup import esc
from studio.page import HIDDEN, Page

SHOWN = 5
_known: dict[tuple[Any, ...], tuple[int, Sequence[Any], data.Leaks]] = {}


@dataclass
class Parts:
    """The widgets."""

    share: gr.Slider
    seed: gr.Number
    sides: gr.HTML


def build() -> Parts:
    """Lay them out."""
    with gr.Row(elem_classes="fields"):
        share = gr.Slider(
            0, 0.5, 0.1, step=0.01, label=t("Share held back (eval_split)"), elem_id="sides-share", scale=3
        )
        seed = gr.Number(0, label=t("Seed"), precision=0, minimum=0, elem_id="sides-seed", scale=1)
    return Parts(share, seed, gr.HTML(elem_id="data-sides"))


def drawn(found: Checked, share: float, seed: int) -> str:
    """Both sides of a data set in words."""
    if found.prepared is None:
        return ""
    train, held, leak = sides(found, share, seed)
    rows = data_words.rows(found.prepared, held[:SHOWN]) if held else ""
    head = f'<h4 class="dp-head">{esc(t("The first rows held back"))}</h4>' if held else ""
    return f"{data_words.sides(train, held, leak, found.prepared)}{head}{rows}"


def sides(found: Checked, share: float, seed: int) -> tuple[int, Sequence[Any], data.Leaks]:
    """How many rows are trained on, those held back, and what stands on both sides; remembered for a while."""
    assert found.prepared is not None
    key = (found.id, found.format, repr(sorted(found.columns.items())), share, seed)
    if key not in _known:
        train, held = data.split(found.prepared.examples, share, seed)
        while len(_known) >= 4:
            _known.pop(next(iter(_known)))
        _known[key] = len(train), held, data.leaks(train, held)
    return _known[key]


def wire(page: Page, parts: Parts, dataset: gr.State) -> dict[str, Any]:
    """Connect share and seed; returns what looks at the sides, for whoever opens this view."""

    def look(dataset_id: str, share: float | None, seed: float | None) -> str:
        """Split as a run with this share and seed would."""
        if not dataset_id:
            return ""
        return drawn(page.datasets.open(dataset_id), min(max(share or 0.0, 0.0), 0.5), int(max(seed or 0, 0)))

    how = {"fn": look, "inputs": [dataset, parts.share, parts.seed], "outputs": parts.sides, **HIDDEN}
    events = [parts.share.release, parts.share.change, parts.seed.submit, parts.seed.blur]
    gr.on(events, trigger_mode="always_last", **how)
    return how
