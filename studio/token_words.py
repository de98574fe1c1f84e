"""Rows as tokens: what the loss sees, and how long rows are. HTML from what `engine.preview` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from studio.i18n import N_, t
from studio.markup import esc, notice

LEARNED, SPECIAL, LOST, INSIDE = 1, 2, 4, 8
"""As `engine.preview` marks them (this process imports nothing of it: it would bring torch)."""
_BINS = 40
PARTS = {
    "source": N_("source"),
    "target": N_("target"),
    "chosen": N_("better answer"),
    "rejected": N_("worse answer"),
    "caption": N_("caption"),
    "words": N_("words"),
}
OF_TASK = {
    "classification": N_("All of the text is read; what is learned is the class, which is no token."),
    "text_to_image": N_("The words are read; what is learned is the picture, which is no token."),
    "captioning": N_("The picture is read first; the words of its caption are learned."),
    "preference": N_("Both answers are learned from: one becomes likelier than the other."),
}


def legend() -> str:
    """What the colours mean."""
    keys = (
        ("", t("read")),
        ("l", t("learned")),
        ("s", t("special token")),
        ("x", t("cut off, never seen")),
    )
    shown = "".join(f'<span class="dp-key"><span class="tk {kind}">{esc(text)}</span></span>' for kind, text in keys)
    return f'<div class="dp-legend">{shown}</div>'


def rows(found: Sequence[Mapping[str, Any]], task: str, unit: str) -> str:
    """Rows as coloured tokens with their borders."""
    hint = f'<p class="st-hint">{esc(t(OF_TASK[task]))}</p>' if task in OF_TASK else ""
    return legend() + hint + "".join(_row(one, unit, task) for one in found)


def _row(one: Mapping[str, Any], unit: str, task: str) -> str:
    head = f'<h4>{esc(unit)} <b class="num">{one["line"]:,}</b>'
    if one["error"]:
        why = notice("error", t("This base cannot take the row."), one["error"])
        return f'<article class="dp-tokens">{head}</h4>{why}</article>'
    return "".join(_part(head, part, task) for part in one["parts"])


def _part(head: str, part: Mapping[str, Any], task: str) -> str:
    facts = [t("{count} tokens", count=f"{part['tokens']:,}")]
    unlearned = task in ("classification", "text_to_image") or part["part"] == "source"
    if not unlearned:
        facts.append(t("{count} learned", count=f"{part['learned']:,}"))
    if part["lost"]:
        facts.append(t("{count} cut at {limit}", count=f"{part['lost']:,}", limit=f"{part['limit']:,}"))
    name = f" · {esc(t(PARTS[part['part']]))}" if part["part"] in PARTS else ""
    told = ""
    if not part["learned"] and not unlearned:
        told = notice("warn", t("Nothing of this row is learned: it is left out of the training."))
    pieces = "".join(_piece(text, marks) for text, marks in part["pieces"])
    lost = ' data-lost="1"' if part["lost"] else ""
    return (
        f'<article class="dp-tokens" data-tokens="{part["tokens"]}" data-learned="{part["learned"]}"{lost}>{head}{name}'
        f'<small>{esc(" · ".join(facts))}</small></h4>{told}<p dir="auto">{pieces}</p></article>'
    )


def _piece(text: str | None, marks: int) -> str:
    if text is None:
        more = t("{count} more tokens", count=f"{marks:,}")
        return f'<span class="dp-more">... {esc(more)} ...</span>'
    kinds = ["tk"]
    kinds += ["x"] if marks & LOST else ["l"] if marks & LEARNED else []
    kinds += ["s"] if marks & SPECIAL else []
    if marks & INSIDE:
        # Bytes of the character that the token before shows.
        return f'<span class="{" ".join([*kinds, "i"])}" title="{esc(t("part of the character before"))}">·</span>'
    shown = esc(text).replace("\n", "↵<br>").replace("\t", "⇥")
    return f'<span class="{" ".join(kinds)}">{shown or "∅"}</span>'


def histogram(lengths: Sequence[Sequence[int]], task: str, total: int) -> str:
    """How long rows are in tokens, where they are cut, and how many are.

    Args:
        lengths: of each row [tokens, cut, learned, limit], as `engine.preview.lengths` gives them.
        task: of some tasks no token is learned.
        total: rows of the data set; `lengths` may be of some of them.
    """
    if not lengths:
        return ""
    sizes = sorted(row[0] for row in lengths)
    limit = max(row[3] for row in lengths)
    cut = sum(row[1] > 0 for row in lengths)
    none = 0 if task in ("classification", "text_to_image") else sum(row[2] == 0 for row in lengths)
    high = max(sizes[min(len(sizes) - 1, round(len(sizes) * 0.995))], 8)
    # The line stands in the picture wherever it is near the rows; a far longer limit would press them flat.
    top = max(high, round(limit * 1.05)) if limit <= 2 * high else high
    width = max(1, -(-(top + 1) // _BINS))
    counts = [0] * (top // width + 1)
    for size in sizes:
        counts[min(size // width, len(counts) - 1)] += 1
    most = max(counts)
    bars = "".join(
        _bar(at * width, (at + 1) * width - 1, count, count / most * 100, at * width >= limit)
        for at, count in enumerate(counts)
    )
    span = len(counts) * width
    mark = ""
    if limit <= span:
        place = limit / span * 100
        side = "before" if place > 60 else "after"
        told = esc(t("cut at {limit}", limit=f"{limit:,}"))
        mark = f'<span class="dp-cut {side}" style="left:{place:.1f}%"><b>{told}</b></span>'
    said = t("Length of rows in tokens: median {median}, longest {longest}", median=sizes[len(sizes) // 2],
             longest=f"{sizes[-1]:,}")  # fmt: skip
    return (
        f'<figure class="chart histogram dp-lengths" role="img" data-cut="{cut}" data-limit="{limit}" aria-label="'
        f'{esc(said)}"><figcaption><strong>{esc(said)}</strong></figcaption><div class="dp-plot"><div class="bars">'
        f'{bars}</div>{mark}</div><div class="ends"><span>0</span><span>{span - 1:,} {esc(t("tokens"))}</span></div>'
        "</figure>"
        f"{_verdict(len(lengths), total, cut, none, limit, sizes[-1])}"
    )


def _bar(low: int, high: int, count: int, height: float, over: bool) -> str:
    told = t("{low} to {high} tokens: {count} rows", low=f"{low:,}", high=f"{high:,}", count=f"{count:,}")
    shown = max(height, 1.5 if count else 0)
    return f'<span class="bar{" over" if over else ""}" style="height:{shown:.1f}%" title="{esc(told)}"></span>'


def _verdict(counted: int, total: int, cut: int, none: int, limit: int, longest: int) -> str:
    of = (
        t("Of {counted} rows, evenly chosen from {total}:", counted=f"{counted:,}", total=f"{total:,}")
        if counted < total
        else t("Of all {total} rows:", total=f"{total:,}")
    )
    if not cut and not none:
        fits = t("none is cut; the longest has {longest} tokens, and {limit} fit.", longest=f"{longest:,}",
                 limit=f"{limit:,}")  # fmt: skip
        return notice("good", f"{of} {fits}")
    parts = []
    if cut:
        parts.append(t("longer than {limit} tokens and cut: {count}.", count=f"{cut:,}", limit=f"{limit:,}"))
    if none:
        parts.append(t("left out, with nothing to learn within that: {count}.", count=f"{none:,}"))
    return notice("warn", f"{of} {' '.join(parts)}", "", t("Raise the length, or shorten these rows."))
