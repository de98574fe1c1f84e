"""Data rows and runs as the pages show them: HTML from plain values."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from engine import data
from studio import states
from studio.charts import histogram
from studio.datasets import Checked
from studio.i18n import N_, reported, t
from studio.markup import badge, dot, error, esc, notice, number, seconds, table
from studio.pictures import thumbnail
from studio.store import Row

_SHOWN_ROWS = 5
_SHOWN_PROBLEMS = 50
_SHOWN_TEXT = 400
_SHOWN_FRAMES = 24
METRICS = {
    "accuracy": N_("Accuracy on rows held back (higher is better)"),
    "macro_f1": N_("Macro F1 on rows held back (higher is better)"),
    "margin": N_("Margin of the better answer (higher is better)"),
    "reward_chosen": N_("Reward of the better answer"),
    "reward_rejected": N_("Reward of the worse answer"),
}
_UNITS = {"line": N_("line"), "row": N_("row"), "picture": N_("picture")}
_DONE = {"skip": N_("skipped"), "fix": N_("mended, kept"), "note": N_("kept")}


def metric(name: str) -> str:
    """What a chart of a metric is called."""
    return t(METRICS[name]) if name in METRICS else name.replace("_", " ").capitalize()


def preview(prepared: data.Prepared) -> str:
    """The first rows: grey is what the base reads, underlined what the adapter learns."""
    rows = []
    for example in prepared.examples[:_SHOWN_ROWS]:
        rows.append([f'<span class="num">{example["line"]}</span>', _example(example)])
    caption = t("First rows. Grey is read; underlined is learned.")
    return table([_unit(prepared), t("text")], rows, caption)


def _unit(prepared: data.Prepared) -> str:
    """What a row is counted by."""
    return t(_UNITS[prepared.unit]) if prepared.unit in _UNITS else prepared.unit


def _example(example: Mapping[str, Any]) -> str:
    if "messages" in example:
        return "<br>".join(_turn(turn["role"], turn["content"]) for turn in example["messages"])
    if "chosen" in example:
        asked = "<br>".join(_turn(turn["role"], turn["content"]) for turn in example["prompt"])
        better = _turn("assistant", t("better: {answer}", answer=example["chosen"]))
        worse = _turn("", t("worse: {answer}", answer=example["rejected"]))
        return f"{asked}<br>{better}<br>{worse}"
    if "image" in example:
        shown = thumbnail(example["image"], example["text"], 64)
        return f'<span class="st-pictured">{shown} {_turn("assistant", example["text"])}</span>'
    if "labels" in example:
        classes = ", ".join(example["labels"]) or t("none")
        return _turn("", example["text"]) + "<br>" + _turn("assistant", classes)
    if "source" in example:
        return _turn("", example["source"]) + "<br>" + _turn("assistant", example["target"])
    if "prompt" in example:
        return _turn("user", example["prompt"]) + "<br>" + _turn("assistant", example["completion"])
    return _turn("assistant", example["text"])


def _turn(role: str, text: str) -> str:
    cut = text if len(text) <= _SHOWN_TEXT else text[:_SHOWN_TEXT] + " ..."
    return f'<span class="{"learn" if role == "assistant" else "read"}">{esc(cut)}</span>'


def problems(prepared: data.Prepared) -> str:
    """What was skipped or mended, by line; kept and skipped add up to all rows."""
    total = t(
        "{kept} kept + {skipped} skipped = {total} rows",
        kept=f"{prepared.kept:,}",
        skipped=f"{prepared.skipped:,}",
        total=f"{prepared.total:,}",
    )
    if not prepared.problems:
        return notice("good", t("No problems found."), total)
    shown = prepared.problems[:_SHOWN_PROBLEMS]
    rows = [
        [
            f'<span class="num">{f"{item.line:,}" if item.line else ""}</span>',
            esc(item.column),
            esc(item.message),
            t(_DONE[item.severity]) if item.severity in _DONE else "",
        ]
        for item in shown
    ]
    counts = ", ".join(f"{code} {count:,}" for code, count in prepared.counts.items())
    more = sum(prepared.counts.values()) - len(shown)
    tail = f'<p class="st-hint">{esc(t("and {count} more", count=f"{more:,}"))}</p>' if more > 0 else ""
    return (
        notice("warn", total, t("By cause: {counts}.", counts=counts), t("Training works with the rows that are kept."))
        + '<div class="scroll" tabindex="0">'
        + table([_unit(prepared), t("column"), t("problem"), t("what was done")], rows)
        + "</div>"
        + tail
    )


def lengths(prepared: data.Prepared) -> str:
    """How long the rows are."""
    shape = data.profile(prepared)["histogram"]
    return histogram(shape["edges"], shape["counts"], t("Length of rows"), t("characters"))


def recognised(found: Checked) -> str:
    """What the file was recognised as, or what is missing."""
    if found.fault is not None:
        return error(found.fault, t("These rows cannot be used yet"))
    if found.prepared is None or found.format is None:
        return notice("warn", t("Which column is which?"), found.reason, t("Choose a format and its columns below."))
    if found.guessed:
        title = t("Is this right? {name} read as {format}", name=found.name, format=found.format)
        return notice("warn", title, found.reason, t("If not, choose a format and its columns below."))
    about = data.FORMATS[found.format].about
    title = t(
        "{name}: recognised as {format}, {kept} rows ready",
        name=found.name,
        format=found.format,
        kept=f"{found.prepared.kept:,}",
    )
    return notice("good", title, found.reason or about)


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
