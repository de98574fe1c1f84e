"""Runs as the pages show them: HTML from plain values."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from studio import states
from studio.markup import badge, dot, esc, number, seconds, table
from studio.pictures import thumbnail
from studio.store import Row

METRICS = {
    "accuracy": "Accuracy on rows held back (higher is better)",
    "macro_f1": "Macro F1 on rows held back (higher is better)",
    "margin": "Margin of the better answer (higher is better)",
    "reward_chosen": "Reward of the better answer",
    "reward_rejected": "Reward of the worse answer",
}


def metric(name: str) -> str:
    """What a chart of a metric is called."""
    return METRICS.get(name, name.replace("_", " ").capitalize())


def run_head(row: Row, extra: Mapping[str, Any] | None = None, adapter: bool = False) -> str:
    """A run's title, state, progress and the facts of its newest step; `adapter` says whether it has one."""
    extra = extra or {}
    state = row["state"]
    total, step = row["total_steps"], row["step"] or 0
    facts = []
    if total:
        facts.append(f"step <b>{step:,}</b> of {total:,}")
    if state in states.ACTIVE and extra.get("eta_s") is not None:
        facts.append(f"<b>{seconds(extra['eta_s'])}</b> left")
    if extra.get("tokens_per_s"):
        facts.append(f"<b>{extra['tokens_per_s']:,.0f}</b> tokens/s")
    if row["loss"] is not None:
        facts.append(f"loss <b>{number(row['loss'])}</b>")
    if row["eval_loss"] is not None:
        facts.append(f"evaluation <b>{number(row['eval_loss'])}</b>")
    if state in states.FINISHED and row["started"] and row["ended"]:
        facts.append(f"took <b>{seconds(row['ended'] - row['started'])}</b>")
    word = states.WORDS[state]
    if state == states.STOPPED:
        word += ", adapter kept" if adapter else "; no adapter was saved"
    message = extra.get("message")
    if state in (states.STARTING, states.RUNNING, states.PAUSING) and message and not step:
        word = message
    return (
        f'<div class="run-head" data-run="{esc(row["id"])}" data-state="{esc(state)}"><h2>{dot(row["colour"])}'
        f"{esc(row['name'])} {badge(state)}</h2>"
        f"{_bar(row, extra)}<div class='st-facts'><span>{esc(word)}</span>"
        + "".join(f"<span>{fact}</span>" for fact in facts)
        + "</div></div>"
    )


def _bar(row: Row, extra: Mapping[str, Any]) -> str:
    state, total, step = row["state"], row["total_steps"], row["step"] or 0
    colour = f"--c:{esc(row['colour'])}"
    if state in states.ACTIVE and not step:
        fraction = extra.get("fraction")
        if fraction is None:
            return f'<div class="st-progress unsure" role="progressbar" style="{colour}"><i></i></div>'
        share = 100 * float(fraction)
    else:
        share = 100.0 if state == states.DONE else 100 * step / total if total else 0.0
    return (
        f'<div class="st-progress" role="progressbar" aria-valuenow="{share:.0f}" style="{colour}">'
        f'<i style="width:{share:.1f}%"></i></div>'
    )


def film(samples: Sequence[Mapping[str, Any]]) -> str:
    """The sample prompts' answers from the first check to now."""
    if not samples:
        return ""
    prompts: dict[str, dict[int, str]] = {}
    drawn = {(str(e.get("prompt", "")), int(e.get("step") or 0)): str(e["file"]) for e in samples if e.get("file")}
    pictures = {str(event.get("prompt", "")): str(event["image"]) for event in samples if event.get("image")}
    for event in samples:
        prompts.setdefault(str(event.get("prompt", "")), {})[int(event.get("step") or 0)] = str(event.get("text", ""))
    parts = []
    for prompt, answers in prompts.items():
        frames = "".join(
            f'<div class="frame"><small>step {step:,}</small>'
            f"{thumbnail(drawn[prompt, step], prompt, 160) if (prompt, step) in drawn else esc(text)}</div>"
            for step, text in sorted(answers.items())
        )
        head = thumbnail(pictures[prompt], "the picture") if prompt in pictures else esc(prompt)
        parts.append(f'<h4>{head}</h4><div class="frames">{frames}</div>')
    return f'<div class="film">{"".join(parts)}</div>'


def run_table(rows: Sequence[Row], chosen: str = "") -> str:
    """Runs as a table whose names are buttons (`data-run`)."""
    lines = []
    for row in rows:
        link = f'<button class="link" type="button" data-run="{esc(row["id"])}">{esc(row["name"])}</button>'
        name = dot(row["colour"]) + link
        took = (row["ended"] or time.time()) - row["started"] if row["started"] else None
        steps = f"{row['step'] or 0:,}" + (f" / {row['total_steps']:,}" if row["total_steps"] else "")
        final = row["eval_loss"] if row["eval_loss"] is not None else row["loss"]
        lines.append(
            [
                f'<span style="display:inline-flex;align-items:center">{name}</span>',
                badge(row["state"]),
                esc(row["model"]),
                esc(row["method"]),
                f'<span class="num">{number(final)}</span>',
                f'<span class="num">{seconds(took)}</span>',
                f'<span class="num">{steps}</span>',
            ]
        )
    return table(["run", "state", "base", "method", "loss", "time", "steps"], lines)
