"""Adapters, mixes and work on them as the page shows them: HTML from plain values."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from studio import charts, mixing, presets, scores, states
from studio.library import IMPORTED, MIXED, RESIZED, RUN
from studio.markup import ago, dot, error, esc, notice, number, seconds, size
from studio.store import Row

ORIGINS = {RUN: "trained here", IMPORTED: "imported", MIXED: "a mix", RESIZED: "another rank"}
FORMS = {
    "peft": ("PEFT zip", "The adapter alone, for PEFT, transformers and this studio."),
    "merged": ("Merged model", "The base with the adapter in its weights: a folder that needs neither PEFT nor us."),
    "kohya": ("kohya file", "For A1111, Forge and ComfyUI."),
    "diffusers": ("diffusers file", "For diffusers' load_lora_weights."),
}
FILE_METHODS = {"kohya": ("lora", "dora", "loha", "lokr"), "diffusers": ("lora", "dora", "lokr")}
"""What engine.formats writes."""


def method(name: str) -> str:
    """A method's title."""
    form = presets.methods().get(name)
    return form.title if form else name


def cards(rows: Sequence[Row], chosen: str = "", mixed: Sequence[str] = ()) -> str:
    """Adapters as cards; each has a button that opens it and one that puts it into the mix."""
    return '<div class="st-cards ad-cards">' + "".join(_card(row, chosen, mixed) for row in rows) + "</div>"


def _card(row: Row, chosen: str, mixed: Sequence[str]) -> str:
    key, inside = esc(row["id"]), row["id"] in mixed
    facts = [method(row["method"])]
    facts += [f"rank {row['rank']}"] if row["rank"] and row["method"] not in mixing.PROMPTS else []
    facts += [f"{row['rank']} tokens"] if row["rank"] and row["method"] in mixing.PROMPTS else []
    chips = "".join(f'<span class="ad-chip">{esc(fact)}</span>' for fact in facts)
    why = mixing.refusal(row)
    mix = (
        f'<p class="ad-why">Not for mixing. {esc(why)}</p>'
        if why
        else f'<button type="button" class="ad-mix" data-mix="{key}" aria-pressed="{"true" if inside else "false"}">'
        f"{'In the mix' if inside else 'Add to the mix'}</button>"
    )
    weighs = f"{row['parameters']:,} parameters, {size(row['bytes'])}" if row["bytes"] else ""
    lines = [
        ("base", row["base"]),
        ("targets", _short(row["targets"], 60)),
        ("size", weighs),
        ("from", _origin(row)),
        ("score", _score(row["score"])),
    ]
    body = "".join(f"<div><dt>{name}</dt><dd>{esc(text)}</dd></div>" for name, text in lines if text)
    mark = " aria-current='true'" if row["id"] == chosen else ""
    return (
        f'<article class="st-card ad-card" style="--c:{esc(row["colour"])}"{mark}><h3>{dot(row["colour"])}'
        f'<button type="button" class="ad-name" data-adapter="{key}">{esc(row["name"])}</button></h3>'
        f'<p class="ad-chips">{chips}</p><dl>{body}</dl>{mix}</article>'
    )


def _origin(row: Row) -> str:
    words = ORIGINS.get(row["origin"], row["origin"])
    data = f" on {row['data_name']}" if row["data_name"] else ""
    return f"{words}{data}, {ago(row['created'])}"


def _score(score: Mapping[str, Any] | None) -> str:
    if not score:
        return ""
    base = f" (base {number(score['base'])})" if score["base"] is not None else ""
    return f"{scores.metric(score['metric']).title} {number(score['value'])}{base}"


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 4].rstrip(", ") + " ..."


def shown_of(shown: int, total: int, search: str) -> str:
    """How many of all stand there."""
    if search and not total:
        return f'<p class="st-hint">No adapter has &quot;{esc(search[:80])}&quot; in it. Try fewer words.</p>'
    more = f", the newest {shown:,} are shown" if shown < total else ""
    found = "found" if search else "in the library"
    return f'<p class="st-hint" aria-live="polite">{total:,} {found}{more}.</p>'


def detail(row: Row) -> str:
    """One adapter's head and facts."""
    facts = [
        esc(row["base"]),
        esc(method(row["method"])),
        f"rank <b>{row['rank']}</b>" if row["rank"] else "",
        f"<b>{row['parameters']:,}</b> parameters" if row["parameters"] else "",
        f"<b>{size(row['bytes'])}</b>" if row["bytes"] else "",
        esc(_origin(row)),
        esc(_score(row["score"])),
    ]
    told = "".join(f"<span>{fact}</span>" for fact in facts if fact)
    more = [f"Targets: {esc(row['targets'])}."] if row["targets"] else []
    details = row["details"]
    if details.get("parts"):
        made = " ".join(f"{weight:+.2f} {name}" for name, weight in details["parts"]).removeprefix("+")
        more.append(f"Mixed from {esc(made)} by {esc(mixing.TITLES.get(details['how'], details['how']))}.")
    if details.get("from"):
        more.append(f"{esc(details['from'])} at another rank; it had {details['before']}.")
    if details.get("error") is not None:
        more.append(f"Error against what it was made from: {percent(details['error'])}.")
    if details.get("file"):
        more.append(f"From the file {esc(details['file'])}.")
    lines = "".join(f'<p class="st-hint">{line}</p>' for line in more)
    note = notice("warn", "Note", details["note"]) if details.get("note") else ""
    return (
        f'<div class="run-head" data-adapter-shown="{esc(row["id"])}"><h2>{dot(row["colour"])}{esc(row["name"])}</h2>'
        f'<div class="st-facts">{told}</div>{lines}</div>{note}'
    )


def percent(share: float) -> str:
    """A relative error as people say it."""
    if share < 0.0001:
        return "none beyond rounding"
    return f"{share * 100:.2g} %"


def export_refusal(row: Mapping[str, Any], form: str) -> str:
    """Why an adapter cannot be exported so; "" where it can."""
    if form == "peft":
        return ""
    if form == "merged":
        return (
            "Virtual tokens change no weight that it could be merged into." if row["method"] in mixing.PROMPTS else ""
        )
    if row["task"] != "text_to_image":
        return "Such files are for Stable Diffusion."
    if row["method"] not in FILE_METHODS[form]:
        return f"The format has no place for {method(row['method'])}."
    whole = row["details"].get("whole")
    return f"The format has no place for what it trains in full ({whole})." if whole else ""


def resize_refusal(row: Mapping[str, Any]) -> str:
    """Why an adapter's rank cannot be changed; "" where it can."""
    if row["method"] != "lora":
        return f"{method(row['method'])} has no rank that can be changed without training; LoRA has."
    return ""


def exports(row: Mapping[str, Any]) -> str:
    """What each form is for, and why some are not to be had."""
    parts = []
    for form, (title, meaning) in FORMS.items():
        why = export_refusal(row, form)
        parts.append(f"<li><b>{esc(title)}</b> {esc(meaning)}{f' <em>Not here: {esc(why)}</em>' if why else ''}</li>")
    return f'<ul class="ad-forms">{"".join(parts)}</ul>'


def rank_chart(errors: Sequence[float], rank: int, colour: str) -> str:
    """What each rank would cost, the chosen one marked, in a curve and a sentence."""
    points = [(float(r), 100 * value) for r, value in enumerate(errors, 1)]
    chosen = 100 * errors[rank - 1] if rank <= len(errors) else 0.0
    curves = [
        charts.Curve("error", points, colour),
        charts.Curve("chosen", [(float(min(rank, len(errors))), chosen)], colour, "dots"),
    ]
    if rank < len(errors):
        words = f"Rank {rank} keeps the nearest change of weights; its error is {percent(errors[rank - 1])}."
    elif rank == len(errors):
        words = f"Rank {rank} is the one that it has."
    else:
        words = f"Rank {rank} answers exactly as now, with room to learn more."
    drawn = charts.chart("Error of lowering the rank (%)", curves, x_label="rank", height=150)
    return f'<p class="st-count"><b>{esc(words)}</b></p>{drawn}'


def work(row: Row | None, dismissed: str = "") -> str:
    """Work under way, or what came of the newest; nothing once it was dismissed."""
    if row is None or row["id"] == dismissed:
        return ""
    if row["state"] in (states.STARTING, states.RUNNING):
        share = row["fraction"]
        kind, width = (
            ("st-progress unsure", "") if share is None else ("st-progress", f' style="width:{100 * share:.1f}%"')
        )
        return (
            f'<div class="run-head" data-work="live"><h2>{esc(row["title"])} <span class="st-badge live">running</span>'
            f'</h2><div class="{kind}" role="progressbar"><i{width}></i></div><div class="st-facts" aria-live="polite">'
            f"<span>{esc(row['message'])}</span><span><b>{seconds(time.time() - row['created'])}</b> so far</span>"
            "</div></div>"
        )
    if row["state"] == states.STOPPED:
        return notice("info", f"{row['title']}: stopped", "Nothing of it was kept.")
    if row["error"]:
        return error(row["error"], f"{row['title']}: that did not work")
    result, hint = row["result"] or {}, ""
    if row["kind"] == "export":
        hint = f"{size(result['bytes'])}. It lies in the home folder: works/{row['id']}/{result['path']}."
        if result["form"] == "merged":
            hint += " Give its full path as a base, here or in transformers' from_pretrained."
    if result.get("error") is not None and row["kind"] in ("save_mix", "resize"):
        hint = f"Error against what it was made from: {percent(result['error'])}."
    box = notice("good", result.get("message", "Done."), result.get("note", ""), hint)
    return box.replace('class="notice good"', f'class="notice good" data-work="done" data-kind="{esc(row["kind"])}"', 1)


def meaning(how: str) -> str:
    """A combination type in a line."""
    return f'<p class="st-hint">{esc(mixing.MEANINGS.get(how, ""))}</p>'
