"""Adapters, mixes and work on them as the page shows them: HTML from plain values."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from studio import charts, mixing, presets, scores, states
from studio.i18n import N_, reported, t
from studio.library import IMPORTED, MIXED, RESIZED, RUN
from studio.markup import ago, badge, dot, error, esc, notice, number, seconds, size, strong
from studio.store import Row

ORIGINS = {RUN: N_("trained here"), IMPORTED: N_("imported"), MIXED: N_("a mix"), RESIZED: N_("another rank")}


def method(name: str) -> str:
    """A method's title."""
    form = presets.methods().get(name)
    return t(form.title) if form else name


def cards(rows: Sequence[Row], chosen: str = "", mixed: Sequence[str] = ()) -> str:
    """Adapters as cards; each has a button that opens it and one that puts it into the mix."""
    return '<div class="st-cards ad-cards">' + "".join(_card(row, chosen, mixed) for row in rows) + "</div>"


def _card(row: Row, chosen: str, mixed: Sequence[str]) -> str:
    key, inside = esc(row["id"]), row["id"] in mixed
    facts = [method(row["method"])]
    facts += [t("rank {rank}", rank=row["rank"])] if row["rank"] and row["method"] not in mixing.PROMPTS else []
    facts += [t("{count} tokens", count=row["rank"])] if row["rank"] and row["method"] in mixing.PROMPTS else []
    chips = "".join(f'<span class="ad-chip">{esc(fact)}</span>' for fact in facts)
    why = mixing.refusal(row)
    mix = (
        f'<p class="ad-why">{esc(t("Not for mixing."))} {esc(why)}</p>'
        if why
        else f'<button type="button" class="ad-mix" data-mix="{key}" aria-pressed="{"true" if inside else "false"}">'
        f"{esc(t('In the mix' if inside else 'Add to the mix'))}</button>"
    )
    weighs = ""
    if row["bytes"]:
        weighs = t("{count:,} parameters, {size}", count=row["parameters"], size=size(row["bytes"]))
    lines = [
        (t("base"), row["base"]),
        (t("targets"), _short(row["targets"], 60)),
        (t("size"), weighs),
        (t("from"), _origin(row)),
        (t("score"), _score(row["score"])),
    ]
    body = "".join(f"<div><dt>{esc(name)}</dt><dd>{esc(text)}</dd></div>" for name, text in lines if text)
    mark = " aria-current='true'" if row["id"] == chosen else ""
    return (
        f'<article class="st-card ad-card" style="--c:{esc(row["colour"])}"{mark}><h3>{dot(row["colour"])}'
        f'<button type="button" class="ad-name" data-adapter="{key}">{esc(row["name"])}</button></h3>'
        f'<p class="ad-chips">{chips}</p><dl>{body}</dl>{mix}</article>'
    )


def _origin(row: Row) -> str:
    words, when = t(ORIGINS[row["origin"]]), ago(row["created"])
    if row["data_name"]:
        return t("{origin} on {data}, {when}", origin=words, data=row["data_name"], when=when)
    return t("{origin}, {when}", origin=words, when=when)


def _score(score: Mapping[str, Any] | None) -> str:
    if not score:
        return ""
    told = f"{t(scores.metric(score['metric']).title)} {number(score['value'])}"
    return told if score["base"] is None else t("{score} (base {value})", score=told, value=number(score["base"]))


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 4].rstrip(", ") + " ..."


def shown_of(shown: int, total: int, search: str) -> str:
    """How many of all stand there."""
    if search and not total:
        words = t('No adapter has "{search}" in it. Try fewer words.', search=search[:80])
        return f'<p class="st-hint">{esc(words)}</p>'
    if shown < total:
        words = t(
            "{total:,} found, the newest {shown:,} are shown."
            if search
            else "{total:,} in the library, the newest {shown:,} are shown.",
            total=total,
            shown=shown,
        )
    else:
        words = t("{total:,} found." if search else "{total:,} in the library.", total=total)
    return f'<p class="st-hint" aria-live="polite">{esc(words)}</p>'


def detail(row: Row) -> str:
    """One adapter's head and facts."""
    facts = [
        esc(row["base"]),
        esc(method(row["method"])),
        strong("rank {rank}", rank=row["rank"]) if row["rank"] else "",
        strong("{count} parameters", count=f"{row['parameters']:,}") if row["parameters"] else "",
        f"<b>{size(row['bytes'])}</b>" if row["bytes"] else "",
        esc(_origin(row)),
        esc(_score(row["score"])),
    ]
    told = "".join(f"<span>{fact}</span>" for fact in facts if fact)
    more = [t("Targets: {names}.", names=row["targets"])] if row["targets"] else []
    details = row["details"]
    if details.get("parts"):
        made = " ".join(f"{weight:+.2f} {name}" for name, weight in details["parts"]).removeprefix("+")
        more.append(t("Mixed from {parts} by {how}.", parts=made, how=t(mixing.TITLES[details["how"]])))
    if details.get("from"):
        more.append(t("{name} at another rank; it had {rank}.", name=details["from"], rank=details["before"]))
    if details.get("error") is not None:
        more.append(t("Error against what it was made from: {share}.", share=percent(details["error"])))
    if details.get("file"):
        more.append(t("From the file {name}.", name=details["file"]))
    lines = "".join(f'<p class="st-hint">{esc(line)}</p>' for line in more)
    note = notice("warn", t("Note"), reported(details["note"])) if details.get("note") else ""
    return (
        f'<div class="run-head" data-adapter-shown="{esc(row["id"])}"><h2>{dot(row["colour"])}{esc(row["name"])}</h2>'
        f'<div class="st-facts">{told}</div>{lines}</div>{note}'
    )


def percent(share: float) -> str:
    """A relative error as people say it."""
    if share < 0.0001:
        return t("none beyond rounding")
    return f"{share * 100:.2g} %"


def resize_refusal(row: Mapping[str, Any]) -> str:
    """Why an adapter's rank cannot be changed; "" where it can."""
    if row["method"] != "lora":
        name = method(row["method"])
        return t("{method} has no rank that can be changed without training; LoRA has.", method=name)
    return ""


def rank_chart(errors: Sequence[float], rank: int, colour: str) -> str:
    """What each rank would cost, the chosen one marked, in a curve and a sentence."""
    points = [(float(r), 100 * value) for r, value in enumerate(errors, 1)]
    chosen = 100 * errors[rank - 1] if rank <= len(errors) else 0.0
    curves = [
        charts.Curve(t("error"), points, colour),
        charts.Curve(t("chosen"), [(float(min(rank, len(errors))), chosen)], colour, "dots"),
    ]
    if rank < len(errors):
        share = percent(errors[rank - 1])
        words = t("Rank {rank} keeps the nearest change of weights; its error is {share}.", rank=rank, share=share)
    elif rank == len(errors):
        words = t("Rank {rank} is the one that it has.", rank=rank)
    else:
        words = t("Rank {rank} answers exactly as now, with room to learn more.", rank=rank)
    drawn = charts.drawing(t("Error of lowering the rank (%)"), curves, x_label=t("rank"), height=150)
    return f'<p class="st-count"><b>{esc(words)}</b></p>{drawn.html()}'


def work(row: Row | None, dismissed: str = "") -> str:
    """Work under way, or what came of the newest; nothing once it was dismissed."""
    if row is None or row["id"] == dismissed:
        return ""
    if row["state"] in (states.STARTING, states.RUNNING):
        share, title = row["fraction"], esc(reported(row["title"]))
        kind, width = (
            ("st-progress unsure", "") if share is None else ("st-progress", f' style="width:{100 * share:.1f}%"')
        )
        return (
            f'<div class="run-head" data-work="live"><h2>{title} {badge(states.RUNNING)}</h2>'
            f'<div class="{kind}" role="progressbar" aria-label="{title}"><i{width}></i></div>'
            '<div class="st-facts" aria-live="polite">'
            f"<span>{esc(reported(row['message']))}</span>"
            f"<span>{strong('{time} so far', time=seconds(time.time() - row['created']))}</span>"
            "</div></div>"
        )
    if row["state"] == states.STOPPED:
        title = t("{work}: stopped", work=reported(row["title"]))
        if row["kind"] == "push":
            return notice("info", title, t("What had arrived at the hub by then stays there."))
        return notice("info", title, t("Nothing of it was kept."))
    if row["error"]:
        return error(row["error"], t("{work}: that did not work", work=reported(row["title"])))
    result, hint = row["result"] or {}, ""
    if row["kind"] == "export":
        path = f"works/{row['id']}/{result['path']}"
        hint = t("{size}. It lies in the home folder: {path}.", size=size(result["bytes"]), path=path)
        if result["form"] == "merged":
            hint += " " + t("Give its full path as a base, here or in transformers' from_pretrained.")
    if result.get("error") is not None and row["kind"] in ("save_mix", "resize"):
        hint = t("Error against what it was made from: {share}.", share=percent(result["error"]))
    box = notice("good", reported(result.get("message", "Done.")), reported(result.get("note", "")), hint)
    if row["kind"] == "push":
        url = esc(result["url"])
        link = f'<p><a href="{url}" target="_blank" rel="noopener noreferrer">{url}</a></p>'
        box = box.replace("</strong>", f"</strong>{link}", 1)
    return box.replace('class="notice good"', f'class="notice good" data-work="done" data-kind="{esc(row["kind"])}"', 1)


def meaning(how: str) -> str:
    """A combination type in a line."""
    return f'<p class="st-hint">{esc(t(mixing.MEANINGS[how]) if how in mixing.MEANINGS else "")}</p>'
