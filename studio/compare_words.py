"""How comparisons look: columns with differences marked, grids, two pictures under one handle, votes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from studio.answers import Answers, Column
from studio.blind import LEFT, RIGHT, TIE, Rate
from studio.comparisons import GRID
from studio.differences import GONE, NEW, compared, share_new
from studio.grids import Cell, Drawing
from studio.i18n import reported, t
from studio.markup import BASE_COLOUR, ago, dot, esc, number, seconds
from studio.pictures import inlined, thumbnail
from studio.store import Row

SIDE = 240
_CELL = 112


def columns_html(state: Answers, marked: bool = False, heads: Sequence[str] = ()) -> str:
    """The answers side by side; under each other on a narrow screen.

    Args:
        state: the columns.
        marked: mark what an answer says that the first column, the base, does not.
        heads: heads in place of the columns' names, where these must not be seen.
    """
    parts = [
        column_html(column, state, marked=marked, head=heads[number] if heads else "")
        for number, column in enumerate(state.columns)
    ]
    share = f" ({state.fraction * 100:.0f} %)" if state.fraction is not None else ""
    if state.finished and state.took:
        took = seconds(state.took) if state.took >= 1 else t("under a second")
        tail = t("Answered in {time}.", time=took)
    else:
        tail = f"{reported(state.status)}{share} ..." if state.status else ""
    return f'<div class="st-columns">{"".join(parts)}</div><p class="st-hint" aria-live="polite">{esc(tail)}&nbsp;</p>'


def column_html(column: Column, state: Answers, marked: bool = False, head: str = "") -> str:
    """One answer under its head."""
    first = state.columns[0]
    told = marked and column is not first and first.run is None and column.done and first.done and not column.picture
    if column.picture:
        text = thumbnail(column.picture, head or column.title, SIDE)
    else:
        text = marks_html(first.text, column.text) if told else esc(column.text)
    if not text and not column.done:
        text = '<span class="skeleton" style="width:92%"></span><span class="skeleton" style="width:64%"></span>'
    elif not column.done and not state.finished:
        text += '<span class="caret"></span>'
    foot = f"<small>{esc(t('Cut at the most tokens allowed.'))}</small>" if column.reason == "length" else ""
    if told:
        foot += f'<small class="cmp-share">{esc(_share(first.text, column.text))}</small>'
    return (
        f'<section class="st-column" style="--c:{esc(column.colour)}" data-who="{esc(column.run or "base")}">'
        f"<h3>{dot(column.colour)}{esc(head or column.title)}</h3><div class='answer'>{text}</div>{foot}</section>"
    )


def _share(base: str, text: str) -> str:
    share = share_new(base, text)
    if base == text:
        return t("The same as the base's answer.")
    return t("{share} of its words are not in the base's answer.", share=f"{share * 100:.0f} %")


def marks_html(base: str, text: str) -> str:
    """A text with what is new against the base's as `<ins>`, and what is missing as `<del>`."""
    found = []
    for part in compared(base, text):
        if part.kind == NEW:
            found.append(f'<ins class="cmp-new">{esc(part.text)}</ins>')
        elif part.kind == GONE:
            found.append(f'<del class="cmp-gone">{esc(part.text)}</del>')
        else:
            found.append(esc(part.text))
    return "".join(found)


def legend_html() -> str:
    """What the marks mean."""
    new = f'<ins class="cmp-new">{esc(t("new"))}</ins>'
    gone = f'<del class="cmp-gone">{esc(t("left out"))}</del>'
    return (
        f'<p class="st-hint cmp-legend"><span class="cmp-if-new">{new} {esc(t("not in the base answer"))}</span>'
        f'<span class="cmp-if-gone"> {gone} {esc(t("only in the base answer"))}</span></p>'
    )


def halted(shown: str | None) -> str:
    """The columns as they stood when they were stopped: nothing blinks any more."""
    return re.sub(r'<span class="(caret|skeleton)"[^>]*></span>', "", shown or "")


def asked_html(prompt: str, picture: str, about: str = "") -> str:
    """What was asked: the words, or the picture."""
    shown = thumbnail(picture, t("The picture that was described"), SIDE) if picture else f"<q>{esc(prompt)}</q>"
    return f'<p class="cmp-asked">{shown} <small>{esc(about)}</small></p>'


# Grids


def grid_html(drawing: Drawing, chosen: int = -1, buttons: bool = True) -> str:
    """The grid as a table: the base first, then a column for each adapter; a row for each prompt, seed and weight.

    Args:
        drawing: the grid.
        chosen: the cell that is shown enlarged.
        buttons: whether a cell is a button that enlarges it.
    """
    columns, settings = drawing.settings["columns"], drawing.settings
    weights, seeds, prompts = settings["weights"], settings["seeds"], settings["prompts"]
    heads = "".join(f'<th scope="col">{dot(it["colour"])}{esc(it["title"])}</th>' for it in columns)
    rows: list[str] = []
    for prompt in prompts:
        lines = [(seed, weight) for seed in seeds for weight in weights]
        for line, (seed, weight) in enumerate(lines):
            first = weight == weights[0]
            cells: list[str] = []
            if line == 0:
                cells.append(f'<th scope="rowgroup" rowspan="{len(lines)}" class="cmp-words">{esc(prompt)}</th>')
            if first:
                cells.append(f'<th scope="rowgroup" rowspan="{len(weights)}">{seed}</th>')
            cells.append(f'<th scope="row">{number(weight)}</th>')
            if first:
                # The base has no weight: its one picture stands beside all of them.
                place = drawing.find(None, None, seed, prompt)
                cells.append(f'<td rowspan="{len(weights)}">{_cell(drawing, place, chosen, buttons)}</td>')
            for it in columns[1:]:
                place = drawing.find(it["run"], weight, seed, prompt)
                cells.append(f"<td>{_cell(drawing, place, chosen, buttons)}</td>")
            rows.append(f"<tr{' class=cmp-next' if first and rows else ''}>{''.join(cells)}</tr>")
    names = "".join(f'<th scope="col">{esc(name)}</th>' for name in (t("Prompt"), t("Seed"), t("Weight")))
    return (
        f'<div class="cmp-scroll" tabindex="0" role="region" aria-label="{esc(t("Grid of pictures"))}">'
        f'<table class="cmp-grid"><thead><tr>{names}{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _cell(drawing: Drawing, place: int, chosen: int, buttons: bool) -> str:
    cell = drawing.cells[place] if place >= 0 else None
    if cell is None or not cell.picture:
        waits = cell is not None and not drawing.finished
        return f'<span class="cmp-cell {"skeleton" if waits else "cmp-none"}"></span>'
    source = inlined(cell.picture, _CELL)
    image = f'<img class="st-thumb small" src="{source}" alt="{esc(told(cell))}">'
    if not buttons:
        return f'<span class="cmp-cell" style="--c:{esc(cell.colour)}">{image}</span>'
    pressed = "true" if place == chosen else "false"
    return (
        f'<button type="button" class="cmp-cell" data-cell="{place}" aria-pressed="{pressed}"'
        f' style="--c:{esc(cell.colour)}" title="{esc(t("Enlarge"))}">{image}</button>'
    )


def told(cell: Cell) -> str:
    """A cell in words."""
    weight = "" if cell.weight is None else f", {t('weight {weight}', weight=number(cell.weight))}"
    return f"{cell.title}{weight}, {t('seed {seed}', seed=cell.seed)}: {cell.prompt}"


def grid_progress(drawing: Drawing) -> str:
    """How far the grid has come, and how long the rest will take."""
    done, total = drawing.drawn, len(drawing.cells)
    if drawing.finished:
        took = sum(cell.seconds for cell in drawing.cells)
        words = t("{done} pictures in {time}.", done=done, time=seconds(took))
        return f'<p class="st-hint" role="status">{esc(words)}</p>'
    spent = [cell.seconds for cell in drawing.cells if cell.picture]
    left = (
        t("about {time} left", time=seconds(sum(spent) / len(spent) * (total - done)))
        if spent
        else reported(drawing.status)
    )
    words = t("{done} of {total} pictures", done=done, total=total)
    return (
        f'<div class="st-progress" role="progressbar" aria-valuemin="0" aria-valuemax="{total}" aria-valuenow="{done}"'
        f' aria-label="{esc(words)}"><i style="width:{100 * done / total:.1f}%"></i></div>'
        f'<p class="st-hint" role="status">{esc(words)}{", " if left else ""}{esc(left)}</p>'
    )


def cell_html(drawing: Drawing, place: int) -> str:
    """One picture enlarged, with its exact settings."""
    cell = drawing.cells[place]
    rows = [
        (t("Who"), f"{dot(cell.colour)}{esc(cell.title)}"),
        (t("Weight"), "" if cell.weight is None else number(cell.weight)),
        (t("Seed"), str(cell.seed)),
        (t("Prompt"), esc(cell.prompt)),
        (t("Steps"), str(drawing.settings["steps"])),
        (t("Guidance"), number(drawing.settings["guidance"])),
        (t("Base"), esc(base_name(drawing.base))),
    ]
    facts = "".join(f"<dt>{esc(name)}</dt><dd>{value}</dd>" for name, value in rows if value)
    image = thumbnail(cell.picture, told(cell), 420)
    return f'<figure class="cmp-large" data-large="{place}">{image}<figcaption><dl>{facts}</dl></figcaption></figure>'


# Two pictures


def wipe_html(left: tuple[str, str, str], right: tuple[str, str, str]) -> str:
    """Two pictures over each other with one handle, moved by a pointer or the arrow keys.

    Args:
        left: its picture's file, its name, its colour; seen left of the handle.
        right: the same, seen right of it.
    """
    first, second = inlined(left[0]), inlined(right[0])
    if not first or not second:
        return ""
    label = t("How much of {left} is seen before {right} begins", left=left[1], right=right[1])
    return (
        '<div class="cmp-wipe" style="--at:50%">'
        f'<img src="{second}" alt="{esc(right[1])}"><img class="over" src="{first}" alt="{esc(left[1])}">'
        f'<span class="cmp-line" aria-hidden="true"></span>'
        f'<input type="range" min="0" max="100" step="1" value="50" aria-label="{esc(label)}"></div>'
        f'<p class="cmp-sides"><span>{dot(left[2])}{esc(left[1])}</span>'
        f"<span>{dot(right[2])}{esc(right[1])}</span></p>"
    )


# Votes


def verdict_html(choice: str, columns: Sequence[Column]) -> str:
    """What was voted, with the names."""
    left, right = columns
    names = t("A was {left}, B was {right}.", left=left.title, right=right.title)
    said = {
        LEFT: t("You found {name} better.", name=left.title),
        RIGHT: t("You found {name} better.", name=right.title),
        TIE: t("A tie: half a win for each."),
    }[choice]
    return f'<p class="cmp-verdict" role="status"><strong>{esc(said)}</strong> {esc(names)}</p>'


def rates_html(rates: Sequence[Rate], pairs: Sequence[tuple[Rate, Rate]]) -> str:
    """How often each has won, with the interval as a bar; below, by pairs."""
    if not rates:
        return f'<p class="st-hint">{esc(t("No votes on this base yet. Ask for a pair and say which is better."))}</p>'
    heads = [t("Who"), t("Win rate"), t("95 % interval"), t("Won"), t("Tied"), t("Lost")]
    body = "".join(_rate(rate, heads) for rate in rates)
    note = t(
        "Win rate: (won + half of the ties) / votes. The interval is Wilson's, each tie counted as half a win: with"
        " few votes it is wide, and two whose intervals overlap much may be equally good."
    )
    against = "".join(
        f"<li>{dot(one.colour)}{esc(one.title)} <b>{one.wins}</b> : <b>{other.wins}</b> {esc(other.title)}"
        f"{dot(other.colour)} ({esc(t('{count} ties', count=one.ties))})</li>"
        for one, other in pairs
    )
    head = "".join(f'<th scope="col">{esc(name)}</th>' for name in heads)
    return (
        f'<table class="sheet cmp-rates"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        f'<p class="st-hint">{esc(note)}</p><details class="cmp-pairs"><summary>{esc(t("By pairs"))}</summary>'
        f"<ul>{against}</ul></details>"
    )


def _rate(rate: Rate, heads: Sequence[str]) -> str:
    low, high = rate.interval
    words = f"{low * 100:.0f} - {high * 100:.0f} %"
    bar = (
        f'<span class="cmp-bar" style="--c:{esc(rate.colour)}" aria-hidden="true"><i style="left:{low * 100:.1f}%;'
        f'width:{(high - low) * 100:.1f}%"></i><b style="left:{rate.rate * 100:.1f}%"></b></span>'
    )
    cells = [
        f'<span class="st-named">{dot(rate.colour)}{esc(rate.title)}</span>',
        f'<span class="num">{rate.rate * 100:.0f} %</span>',
        f'<span>{bar}<span class="num">{words}</span></span>',
        str(rate.wins),
        str(rate.ties),
        str(rate.losses),
    ]
    inside = "".join(f'<td data-head="{esc(name)}">{cell}</td>' for name, cell in zip(heads, cells, strict=True))
    return f'<tr data-version="{esc(rate.version)}">{inside}</tr>'


# Earlier ones


def earlier_html(rows: Sequence[Row], total: int) -> str:
    """Comparisons that were kept: each can be opened and deleted."""
    if not rows:
        return f'<p class="st-hint">{esc(t("Nothing is kept yet. What you compare is kept here by itself."))}</p>'
    items = "".join(_earlier(row) for row in rows)
    more = t("{shown} of {total} comparisons", shown=len(rows), total=total)
    return f'<ul class="cmp-earlier">{items}</ul><p class="st-hint">{esc(more)}</p>'


def _earlier(row: Row) -> str:
    grid = row["kind"] == GRID
    who = row["settings"].get("columns", []) if grid else row["results"]
    dots = "".join(dot(it.get("colour") or BASE_COLOUR) for it in who)
    kind = t("grid of {count}", count=len(row["results"])) if grid else t("{count} columns", count=len(who))
    title = name_of(row)
    about = f"{kind}, {base_name(row['base'])}, {ago(row['created'])}"
    return (
        f'<li><span class="cmp-dots">{dots}</span><button type="button" class="cmp-open"'
        f' data-comparison="{row["id"]}">{esc(title)}</button><small>{esc(about)}</small>'
        f'<button type="button" class="cmp-delete" data-remove="{row["id"]}"'
        f' aria-label="{esc(t("Delete {name}", name=title))}">{esc(t("Delete"))}</button></li>'
    )


def base_name(base: str) -> str:
    """A base as others may read it: a folder's place on this machine is nobody's business."""
    return re.split(r"[/\\]", base.rstrip("/\\"))[-1] if re.match(r"[/~.]|\w:|.*\\", base) else base


def name_of(row: Mapping[str, Any]) -> str:
    """A comparison in a line: its prompt, cut."""
    words = row["prompt"] or t("A picture described")
    return words if len(words) <= 90 else words[:89] + "…"
