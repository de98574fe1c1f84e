"""Evaluations and leaderboards as the pages show them: HTML from plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from studio import charts, scores, states
from studio.i18n import reported, t
from studio.markup import ago, badge, dot, esc, notice, number, seconds, size, strong, table
from studio.pictures import thumbnail
from studio.store import Row

_SHOWN_TEXT = 600
PICTURED = {"captioning": {"prompt"}, "text_to_image": {"wanted", "base", "adapter"}}
"""Task -> what of a row is a picture. Elsewhere a text that looks like a path is a text."""


def progress(row: Row, progress: tuple[str, float | None], since: float) -> str:
    """An evaluation under way: whose, what is being done, how far it is."""
    told, share = progress
    colour = f"--c:{esc(row['colour'])}"
    title = esc(t("Scoring {name}", name=row["name"]))
    named = f'role="progressbar" aria-label="{title}"'
    bar = f'<div class="st-progress unsure" {named} style="{colour}"><i></i></div>'
    if share is not None:
        whole = 100 * share
        bar = (
            f'<div class="st-progress" {named} aria-valuenow="{whole:.0f}" style="{colour}">'
            f'<i style="width:{whole:.1f}%"></i></div>'
        )
    return (
        f'<div class="run-head" data-run="{esc(row["id"])}" data-scoring="live"><h2>{dot(row["colour"])}'
        f"{title} {badge(states.RUNNING)}</h2>{bar}"
        f'<div class="st-facts" aria-live="polite"><span>{esc(reported(told))}</span>'
        f"<span>{strong('{time} so far', time=seconds(since))}</span></div></div>"
    )


def result(row: Row, score: Row) -> str:
    """A scored run: base against its result by metric, then the rows with both answers."""
    found = score["result"]
    what = t("full model" if row["method"] == "full" else "adapter")
    facts = [esc(row["model"]), esc(row["method"]), esc(t("scored {when}", when=ago(score["ended"])))]
    head = (
        f'<div class="run-head" data-run="{esc(row["id"])}" data-scoring="done"><h2>{dot(row["colour"])}'
        f"{esc(row['name'])}</h2><div class='st-facts'>"
        + "".join(f"<span>{fact}</span>" for fact in facts)
        + "</div></div>"
    )
    stale = notice(
        "warn",
        t("This run was trained on since."),
        t("The scores are of what it was before."),
        t("Score it again."),
    )
    notes = "".join(notice("warn", t("Note"), reported(text)) for text in found["notes"][:3])
    parts = [head, "" if score["fresh"] else stale, notes, metrics_table(found, what), rows_table(row, found, what)]
    return f'<div class="st-stack">{"".join(parts)}</div>'


def metrics_table(found: Row, what: str) -> str:
    """Base against adapter: one row a metric, the better value marked."""
    lines, told = [], dict.fromkeys(score["note"] for score in found["scores"] if score.get("note"))
    for name, pair in scores.sides(found).items():
        values = {who: score["value"] for who, score in pair.items()}
        best = scores.better(name, values.get("base"), values.get("adapter"))
        if len({number(value) for value in values.values()}) == 1:
            # What differs where nobody sees it is no better.
            best = ""
        about, rows = scores.metric(name), {score["rows"] for score in pair.values()}
        hint = f' <span class="st-hint">{about.hint}</span>' if about.hint else ""
        lines.append(
            [
                f"<span>{esc(t(about.title))}{hint}</span>",
                *(_value(pair.get(who), best == who) for who in ("base", "adapter")),
                f'<span class="num">{" / ".join(f"{count:,}" for count in sorted(rows))}</span>',
            ]
        )
    caption = t("Base against {what}, on rows that were held back.", what=what)
    shown = table([t("metric"), t("base"), what, t("rows")], lines, caption)
    return shown + "".join(f'<p class="st-hint">{esc(_of_base(note))}</p>' for note in told)


def _of_base(note: str) -> str:
    return t("Base: {note}", note=reported(note))


def _value(score: Row | None, best: bool) -> str:
    if score is None:
        return f'<span class="st-hint">{esc(t("not measured"))}</span>'
    if score["value"] is None:
        return f'<span class="st-hint">{esc(t("no number"))}</span>'
    value = f'<span class="num">{number(score["value"])}</span>'
    return f"<span><b>{value}</b>{_good(t('better'))}</span>" if best else value


def _good(text: str) -> str:
    return f' <span class="st-badge good">{esc(text)}</span>'


def rows_table(row: Row, found: Row, what: str) -> str:
    """The rows with both answers beside each other; those that are the wanted text word for word are marked."""
    if not found["rows"]:
        return f'<p class="st-hint">{esc(t("No rows were kept with their answers."))}</p>'
    pictured = PICTURED.get(row["task"], set())
    lines = []
    for item in found["rows"]:
        cells = []
        for part in ("prompt", "wanted", "base", "adapter"):
            text = str(item[part])
            if part in pictured:
                cells.append(thumbnail(text, "", 112))
                continue
            cut = text if len(text) <= _SHOWN_TEXT else text[:_SHOWN_TEXT] + " ..."
            right = part in ("base", "adapter") and "wanted" not in pictured and text.split() == item["wanted"].split()
            mark = _good(t("as wanted")) if right else ""
            cells.append(f'<span class="st-said">{esc(cut)}{mark}</span>')
        lines.append([f'<span class="num">{item["row"]:,}</span>', *cells])
    heads = [t("line"), t("asked"), t("wanted"), t("base"), what]
    shown = table(heads, lines, t("Rows behind the scores."))
    return f'<div class="scroll tall" tabindex="0">{shown}</div>'


def leaderboard(entries: Sequence[scores.Entry], name: str, cost: str, chosen: str) -> str:
    """All scored runs of one data set and task, the best first; names are buttons (`data-run`), bases are grey."""
    best = {entry.run for entry in scores.front(entries, name, cost)} if cost else set()
    runs = sum(1 for entry in entries if entry.run)
    bases = {entry.base for entry in entries}
    lines = []
    for entry in scores.ranked(entries, name):
        value, rows = entry.values.get(name, (None, 0))
        lines.append(
            [
                _name(entry, entry.run in best and runs > 1, entry.run == chosen, len(bases) > 1),
                esc(entry.base),
                esc(entry.method),
                f'<span class="num">{number(value) or esc(t("no number"))}</span>',
                f'<span class="num">{rows:,}</span>' if rows else "",
                _amount(entry.trained, "{:,}".format),
                _amount(entry.bytes, size),
                _amount(entry.peak, size),
                _amount(entry.seconds, seconds),
            ]
        )
    about = scores.metric(name)
    title = t(about.title)
    title = title if any(letter.isupper() for letter in title[1:]) else title.lower()
    peak = t("peak memory")
    heads = [t("run"), t("base"), t("method"), title, t("rows"), t("trained"), t("size"), peak, t("time")]
    if not any(entry.peak for entry in entries):
        at = heads.index(peak)
        heads, lines = [*heads[:at], *heads[at + 1 :]], [[*line[:at], *line[at + 1 :]] for line in lines]
    caption = "; ".join(filter(None, [t("Choose a run to see the rows behind its score"), about.hint])) + "."
    told = "".join(f'<p class="st-hint">{esc(text)}</p>' for text in scores.cautions(entries))
    notes = dict.fromkeys(entry.note for entry in entries if entry.note)
    told += "".join(f'<p class="st-hint">{esc(_of_base(note))}</p>' for note in notes)
    return f'<div class="board">{table(heads, lines, caption)}</div>{told}'


def _name(entry: scores.Entry, best: bool, chosen: bool, several: bool) -> str:
    if not entry.run:
        return f'<span class="st-named base-name">{dot(entry.colour)}{esc(t("base"))}</span>'
    mark = _good(t("best for its size")) if best else ""
    current = ' aria-current="true"' if chosen else ""
    link = f'<button class="link" type="button" data-run="{esc(entry.run)}"{current}>{esc(entry.name)}</button>'
    return f'<span class="st-named">{dot(entry.colour)}<span>{link}{mark}</span></span>'


def _amount(value: Any, told: Callable[[Any], str]) -> str:
    return "" if value is None else f'<span class="num">{told(value)}</span>'


def short(value: float) -> str:
    """A count as an axis says it: 950, 12 k, 2.4 M."""
    for unit, power in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= power:
            return f"{value / power:.3g} {unit}"
    return f"{value:.3g}"


def pareto(entries: Sequence[scores.Entry], name: str, cost: str) -> str:
    """Quality against cost; a line joins the runs that no other beats in both, a grey one is the base."""
    (cost_title, of), quality = scores.COSTS[cost], t(scores.metric(name).title)
    title = t(cost_title).lower()
    about, best = scores.metric(name), [entry.run for entry in scores.front(entries, name, cost)]
    spots = []
    for entry in entries:
        x, y = of(entry), entry.value(name)
        if entry.run and x and y is not None:
            told = size(x) if cost == "bytes" else t("{count:,.0f} parameters", count=x)
            spots.append(charts.Spot(entry.name, float(x), y, entry.colour, entry.run, told, entry.run in best))
    levels = [(entry, entry.value(name)) for entry in entries if not entry.run]
    several = len(levels) > 1
    return charts.scatter(
        t("{quality} against {cost}", quality=quality, cost=title) + (f" ({about.hint})" if about.hint else ""),
        spots,
        x_label=title,
        x_told=(lambda value: size(value).replace(".0 ", " ")) if cost == "bytes" else short,
        levels=[
            (t("base {name}", name=entry.base) if several else t("base"), value)
            for entry, value in levels
            if value is not None
        ],
        waiting=t("A point for each scored run that saved a result."),
    )


def measured_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The project's own leaderboard, where it has been measured."""
    lines = [
        [
            esc(t(row["title"])),
            f'<span class="num">{row["accuracy"]:.3f}</span>',
            f'<span class="num">{row["macro_f1"]:.3f}</span>',
            f'<span class="num">{row["trainable"]:,}</span>',
            f'<span class="num">{size(row["bytes"])}</span>',
            f'<span class="num">{size(row["peak_bytes"])}</span>',
            f'<span class="num">{seconds(row["cpu_seconds"])}</span>',
            f'<span class="num">{row["seeds"]}</span>',
        ]
        for row in rows
    ]
    heads = [
        t("method"),
        t("accuracy"),
        t("macro F1"),
        t("trained"),
        t("size"),
        t("peak memory"),
        t("CPU time"),
        t("seeds"),
    ]
    caption = t("Measured by python -m bench.leaderboard; not with your runs. Means over seeds.")
    return f'<div class="own-board" tabindex="0">{table(heads, lines, caption)}</div>'
