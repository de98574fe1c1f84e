"""Data rows and runs as the pages show them: HTML from plain values."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from studio import states
from studio.i18n import N_, reported, t
from studio.markup import badge, dot, esc, number, seconds, table
from studio.pictures import thumbnail
from studio.store import Row

_SHOWN_FRAMES = 24
METRICS = {
    "accuracy": N_("Accuracy on rows held back (higher is better)"),
    "macro_f1": N_("Macro F1 on rows held back (higher is better)"),
    "margin": N_("Margin of the better answer (higher is better)"),
    "reward_chosen": N_("Reward of the better answer"),
    "reward_rejected": N_("Reward of the worse answer"),
}


def metric(name: str) -> str:
    """What a chart of a metric is called."""
    return t(METRICS[name]) if name in METRICS else name.replace("_", " ").capitalize()


def run_head(row: Row, extra: Mapping[str, Any] | None = None, adapter: bool = False) -> str:
    """A run's title, state, progress and the facts of its newest step; `adapter` says whether it has one."""
    extra = extra or {}
    state = row["state"]
    total, step = row["total_steps"], row["step"] or 0
    facts = []
    if total:
        facts.append(t("step {step} of {total}", step=f"<b>{step:,}</b>", total=f"{total:,}"))
    if state in states.ACTIVE and extra.get("eta_s") is not None:
        facts.append(t("{time} left", time=f"<b>{seconds(extra['eta_s'])}</b>"))
    if extra.get("tokens_per_s"):
        facts.append(t("{count} tokens/s", count=f"<b>{extra['tokens_per_s']:,.0f}</b>"))
    if row["loss"] is not None:
        facts.append(t("loss {value}", value=f"<b>{number(row['loss'])}</b>"))
    if row["eval_loss"] is not None:
        facts.append(t("evaluation {value}", value=f"<b>{number(row['eval_loss'])}</b>"))
    if state in states.FINISHED and row["started"] and row["ended"]:
        facts.append(t("took {time}", time=f"<b>{seconds(row['ended'] - row['started'])}</b>"))
    return (
        f'<div class="run-head" data-run="{esc(row["id"])}" data-state="{esc(state)}"><h2>{dot(row["colour"])}'
        f"{esc(row['name'])} {badge(state)}</h2>"
        f"{_bar(row, extra)}<div class='st-facts'><span>{esc(_state(row, extra, adapter))}</span>"
        + "".join(f"<span>{fact}</span>" for fact in facts)
        + "</div></div>"
    )


def _state(row: Row, extra: Mapping[str, Any], adapter: bool) -> str:
    """What the run is doing, or how it ended, in words."""
    state, message = row["state"], extra.get("message")
    if state == states.STOPPED:
        return t("Stopped early, adapter kept") if adapter else t("Stopped early; no adapter was saved")
    if state == states.DONE and extra.get("early"):
        return t("Done early: step {step} was the best, and is kept", step=f"{extra['best_step']:,}")
    if state in (states.STARTING, states.RUNNING, states.PAUSING) and message and not row["step"]:
        return reported(str(message))
    return t(states.WORDS[state])


def _bar(row: Row, extra: Mapping[str, Any]) -> str:
    state, total, step = row["state"], row["total_steps"], row["step"] or 0
    colour = f"--c:{esc(row['colour'])}"
    named = f'role="progressbar" aria-label="{esc(row["name"])}"'
    if state in states.ACTIVE and not step:
        fraction = extra.get("fraction")
        if fraction is None:
            return f'<div class="st-progress unsure" {named} style="{colour}"><i></i></div>'
        share = 100 * float(fraction)
    else:
        share = 100.0 if state == states.DONE else 100 * step / total if total else 0.0
    return (
        f'<div class="st-progress" {named} aria-valuenow="{share:.0f}" style="{colour}">'
        f'<i style="width:{share:.1f}%"></i></div>'
    )


def film(samples: Sequence[Mapping[str, Any]]) -> str:
    """The sample prompts' answers from the first check to now; of many checks the first, the last and some between."""
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
            f'<div class="frame"><small>{esc(t("step {step}", step=f"{step:,}"))}</small>'
            f"{thumbnail(drawn[prompt, step], prompt, 160) if (prompt, step) in drawn else esc(answers[step])}</div>"
            for step in _some(sorted(answers))
        )
        head = thumbnail(pictures[prompt], t("the picture")) if prompt in pictures else esc(prompt)
        parts.append(f'<h4>{head}</h4><div class="frames">{frames}</div>')
    return f'<div class="film">{"".join(parts)}</div>'


def _some(steps: Sequence[int]) -> list[int]:
    """At most `_SHOWN_FRAMES` of them, evenly from the first to the last."""
    last = len(steps) - 1
    if last < _SHOWN_FRAMES:
        return list(steps)
    return [steps[round(number * last / (_SHOWN_FRAMES - 1))] for number in range(_SHOWN_FRAMES)]


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
    return table([t("run"), t("state"), t("base"), t("method"), t("loss"), t("time"), t("steps")], lines)
