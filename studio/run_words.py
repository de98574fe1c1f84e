"""The queue, the history and the bin of runs as the page shows them: HTML from plain values."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from studio import charts, states
from studio.history import Wanted, told
from studio.i18n import N_, reported, t
from studio.markup import ago, badge, dot, esc, notice, number, seconds, size
from studio.overlay import MOST
from studio.storage import Room
from studio.store import Row

SAY = "window.studioRuns(element, trigger, watch);"
"""Says what was pressed, chosen or dragged in one of these pieces, as its `data-` names have it."""
HEADS = (
    ("name", N_("run")),
    ("state", N_("state")),
    ("base", N_("base")),
    ("method", N_("method")),
    ("loss", N_("loss")),
    ("time", N_("time")),
    ("steps", N_("steps")),
    ("size", N_("size")),
    ("created", N_("started")),
)
"""The columns of the list: name in `COLUMNS`, words."""
MOVES = (
    ("next", N_("Next"), N_("Train {name} next")),
    ("up", "↑", N_("{name} one place up")),
    ("down", "↓", N_("{name} one place down")),
)
"""How a waiting run can be moved: what `Jobs.reorder` takes, the button's sign, its words."""


def queue(rows: Sequence[Row], newest: Mapping[str, Mapping[str, Any]]) -> str:
    """The run that trains, and those that wait, in their order; "" where there is neither.

    Args:
        rows: runs in a live state, in the order of the queue.
        newest: run -> what its newest event says (`eta_s`, `message`).
    """
    active = [row for row in rows if row["state"] in states.ACTIVE]
    waiting = [row for row in rows if row["state"] == states.QUEUED]
    if not rows:
        return ""
    head = f'<h3 class="rq-head">{esc(t("Queue"))}</h3>'
    top = "".join(_training(row, newest.get(row["id"], {})) for row in active)
    if not waiting:
        none = t("Nothing waits: a run that you start now begins when this one has ended.")
        rest = f'<p class="st-hint">{esc(none)}</p>'
        return f'<section class="run-queue">{head}{top}{rest}</section>'
    items = "".join(_waiting(row, place, len(waiting)) for place, row in enumerate(waiting, 1))
    label = esc(t("Waiting runs, in the order in which they will train"))
    return f'<section class="run-queue">{head}{top}<ol class="rq-list" aria-label="{label}">{items}</ol></section>'


def _training(row: Row, told: Mapping[str, Any]) -> str:
    step, total = row["step"] or 0, row["total_steps"]
    share = 100 * step / total if total else 0
    facts = [t(states.WORDS[row["state"]]) if step or not told.get("message") else reported(str(told["message"]))]
    if total:
        facts.append(t("step {step} of {total}", step=f"{step:,}", total=f"{total:,}"))
    if told.get("eta_s") is not None:
        facts.append(t("{time} left", time=seconds(told["eta_s"])))
    return (
        f'<div class="rq-now" style="--c:{esc(row["colour"])}">{_name(row)} {badge(row["state"])}'
        f'<span class="rq-facts">{esc(" · ".join(facts))}</span>'
        f'<button type="button" class="rq-button" data-open="{esc(row["id"])}">{esc(t("Watch"))}</button>'
        f'<div class="st-progress" role="progressbar" aria-label="{esc(row["name"])}" aria-valuemin="0"'
        f' aria-valuemax="100" aria-valuenow="{share:.0f}"><i style="width:{share:.1f}%"></i></div></div>'
    )


def _waiting(row: Row, place: int, count: int) -> str:
    key = esc(row["id"])
    buttons = ""
    for to, sign, words in MOVES:
        off = " disabled" if (to == "down" and place == count) or (to != "down" and place == 1) else ""
        label = esc(t(words, name=row["name"]))
        buttons += (
            f'<button type="button" class="rq-button" data-queued="{key}" data-to="{to}" aria-label="{label}"'
            f' title="{label}"{off}>{esc(t(sign))}</button>'
        )
    cancel = esc(t("Take {name} out of the queue", name=row["name"]))
    return (
        f'<li class="rq-item" draggable="true" data-place="{key}"><span class="rq-grip" aria-hidden="true"></span>'
        f'<span class="rq-number">{place}</span>{_name(row)}'
        f'<span class="rq-facts">{esc(row["model"])} · {esc(row["method"])}</span><span class="rq-buttons">{buttons}'
        f'<button type="button" class="rq-button" data-cancel="{key}" aria-label="{cancel}" title="{cancel}">'
        f"{esc(t('Cancel'))}</button></span></li>"
    )


def _name(row: Row) -> str:
    return (
        f'<span class="rq-name">{dot(row["colour"])}<button class="link" type="button" data-run="{esc(row["id"])}">'
        f"{esc(row['name'])}</button></span>"
    )


def listing(rows: Sequence[Row], wanted: Wanted, picked: Collection[str], chosen: str = "") -> str:
    """Runs as a table: the heads are buttons that sort, the names open a run, the boxes choose runs to lay together."""
    ordered, _, way = wanted.sort.rpartition("-")
    heads = f'<th scope="col"><span class="sr-only">{esc(t("choose"))}</span></th>'
    for name, words in HEADS:
        sense = f' aria-sort="{"ascending" if way == "up" else "descending"}"' if name == ordered else ""
        mark = {"up": " ▲", "down": " ▼"}[way] if name == ordered else ""
        title = esc(told(wanted.turned(name)))
        heads += (
            f'<th scope="col"{sense}><button type="button" class="rl-head" data-sort="{name}" title="{title}">'
            f"{esc(t(words))}<span aria-hidden='true'>{mark}</span></button></th>"
        )
    body = "".join(_line(row, row["id"] in picked, row["id"] == chosen) for row in rows)
    return (
        f'<table class="sheet run-list" data-most="{MOST}"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
        if rows
        else notice("info", t("No run fits."), t("Take a word out of the search, or ask for any state."))
    )


def _line(row: Row, picked: bool, chosen: bool) -> str:
    key = esc(row["id"])
    took = (row["ended"] or time.time()) - row["started"] if row["started"] else None
    steps = f"{row['step'] or 0:,}" + (f" / {row['total_steps']:,}" if row["total_steps"] else "")
    final = row["eval_loss"] if row["eval_loss"] is not None else row["loss"]
    loss = number(final)
    if row["eval_loss"] is not None:
        loss = f'<abbr title="{esc(t("on the rows held back"))}">{loss}</abbr>'
    label = esc(t("Choose {name}", name=row["name"]))
    check = " checked" if picked else ""
    tags = "".join(tag_chip(tag) for tag in row["tags"])
    under = f'<span class="rl-data">{esc(row["data_name"])}</span>' if row["data_name"] else ""
    cells = (
        f'<div><span class="rl-name">{dot(row["colour"])}<button class="link" type="button" data-run="{key}">'
        f'{esc(row["name"])}</button></span><span class="rl-under">{under}{tags}</span></div>',
        badge(row["state"]),
        esc(row["model"]),
        esc(row["method"]),
        f'<span class="rl-loss">{charts.sparkline(row["curve"], row["colour"])}<span class="num">{loss}</span></span>'
        if loss
        else "",
        f'<span class="num">{seconds(took)}</span>' if took is not None else "",
        f'<span class="num">{steps}</span>',
        f'<span class="num rl-size">{size(row["bytes"]) if row["bytes"] is not None else "…"}</span>',
        f'<span class="num">{esc(ago(row["created"]))}</span>',
    )
    body = "".join(
        f'<td data-head="{esc(t(words))}">{cell}</td>' for (_, words), cell in zip(HEADS, cells, strict=True)
    )
    return (
        f'<tr data-line="{key}"{" class=chosen" if chosen else ""}><td data-head="{esc(t("choose"))}"><input'
        f' type="checkbox" data-pick="{key}" aria-label="{label}"{check}></td>{body}</tr>'
    )


def tag_chip(tag: str) -> str:
    """A tag as a button that searches for it."""
    label = esc(t("Search for {tag}", tag=tag))
    return f'<button type="button" class="run-tag" data-tag="{esc(tag)}" title="{label}">{esc(tag)}</button>'


def tags(found: Sequence[str]) -> str:
    """The tags of the run in detail, each with a button that takes it off."""
    if not found:
        return (
            f'<p class="st-hint">{esc(t("No tags yet. With a tag, runs that belong together are found together."))}</p>'
        )
    chips = ""
    for tag in found:
        label = esc(t("Take the tag {tag} off", tag=tag))
        chips += (
            f'<button type="button" class="run-tag" data-untag="{esc(tag)}" aria-label="{label}" title="{label}">'
            f'{esc(tag)} <span aria-hidden="true">×</span></button>'
        )
    return f'<div class="run-tags">{chips}</div>'


def summary(shown: int, total: int, room: Room, busy: bool) -> str:
    """How many runs are shown, and the room that all of them take."""
    parts = [t("{shown} of {total} runs", shown=f"{shown:,}", total=f"{total:,}")]
    parts.append(t("{size} on this disk", size=size(room.listed)))
    if room.binned:
        parts.append(t("{size} in the bin", size=size(room.binned)))
    if busy or room.unknown:
        parts.append(t("measuring"))
    return f'<p class="st-hint rl-summary">{esc(" · ".join(parts))}</p>'


def undo_told(names: Sequence[str], what: str) -> str:
    """What has just been done with these runs and can be taken back; `what` is `bin` or `queue`."""
    name = names[0] if len(names) == 1 else t("{count} runs", count=len(names))
    said = t("{name} is in the bin.", name=name) if what == "bin" else t("{name} has left the queue.", name=name)
    return f'<p class="st-hint" role="status">{esc(said)}</p>'


def binned(count: int, freed: int) -> str:
    """What emptying the bin costs and gives."""
    runs = t("1 run") if count == 1 else t("{count} runs", count=f"{count:,}")
    return (
        '<p class="st-hint">'
        + esc(
            t(
                "This removes {runs} in the bin with their adapters, for good. It frees {size}.",
                runs=runs,
                size=size(freed),
            )
        )
        + "</p>"
    )
