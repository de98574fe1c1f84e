"""Data sets as the Data page shows them: rows, problems, classes, history. HTML from plain values."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from engine import data
from studio import dataset_files
from studio.datasets import Checked
from studio.i18n import N_, reported, t
from studio.markup import ago, badge, dot, error, esc, notice, size, table
from studio.pictures import thumbnail
from studio.problem_words import button_of, cause_of, severities, total, unit
from studio.store import Row

_SHOWN_TEXT = 400
TITLES = {
    "messages": N_("Conversations (messages)"),
    "sharegpt": N_("Conversations (sharegpt)"),
    "oasst": N_("Reply trees (oasst)"),
    "alpaca": N_("Instructions (alpaca)"),
    "prompt_completion": N_("Questions and answers"),
    "parallel": N_("Texts and what they become"),
    "labels": N_("Texts and classes"),
    "preferences": N_("Better and worse answers"),
    "text": N_("Plain text"),
    "images": N_("Pictures and their captions"),
    "pictures": N_("Pictures without words"),
}


def title_of(format: str) -> str:
    """What a format is called."""
    title = TITLES.get(format)
    return t(title) if title else format


def recognised(found: Checked) -> str:
    """What the file was recognised as, or what is missing."""
    if found.fault is not None:
        return error(found.fault, t("These rows cannot be used yet"))
    if found.prepared is None or found.format is None:
        return notice(
            "warn", t("Which column is which?"), reported(found.reason), t("Choose a format and its columns below.")
        )
    if found.guessed:
        title = t("Is this right? {name} read as {format}", name=found.name, format=found.format)
        return notice("warn", title, reported(found.reason), t("If not, choose a format and its columns below."))
    prepared = found.prepared
    title = t("{name}: recognised as {format}, {rows} rows ready", name=found.name, format=found.format,
              rows=f"{prepared.kept:,}")  # fmt: skip
    about = reported(found.reason) or t(data.FORMATS[found.format].about)
    return notice("good", title, about, total(prepared) if prepared.skipped else "")


def brought(found: dataset_files.Brought) -> str:
    """What came of several files; nothing to say of one."""
    parts = []
    if found.joined:
        shown = ", ".join(found.joined[:6]) + (", ..." if len(found.joined) > 6 else "")
        parts.append(t("{count} files became this one data set: {names}.", count=len(found.joined), names=shown))
    if len(found.sets) > 1:
        names = ", ".join(one.name for one in found.sets)
        parts.append(t("{count} data sets were brought in: {names}. The first is shown.", count=len(found.sets),
                       names=names))  # fmt: skip
    for name, fault in found.refused:
        parts.append(t("{name} cannot be used: {why}", name=name, why=reported(str(fault))))
    if found.left_alone:
        parts.append(t("Left alone, nothing to learn from: {names}.", names=", ".join(found.left_alone[:8])))
    if not parts:
        return ""
    return notice("warn" if found.refused else "info", t("Several files"), "\n".join(parts))


# --- rows ----------------------------------------------------------------------------------------------------------


def rows(prepared: data.Prepared, examples: Sequence[Mapping[str, Any]]) -> str:
    """Some rows as a table: grey is what the base reads, underlined what the adapter learns."""
    lines = [[f'<span class="num">{one["line"]:,}</span>', _example(one)] for one in examples]
    return table([unit(prepared.unit), t("text")], lines, t("Grey is read; underlined is learned."))


def preview(prepared: data.Prepared) -> str:
    """The first rows."""
    return rows(prepared, prepared.examples[:5])


def grid(examples: Sequence[Mapping[str, Any]]) -> str:
    """Pictures with their words below."""
    cells = "".join(
        f'<figure class="dp-cell">{thumbnail(one["image"], one["text"], 150)}<figcaption><b class="num">{one["line"]:,}'
        f"</b> {_turn('assistant' if one['text'] else '', one['text'] or t('nothing is said of it'))}</figcaption>"
        "</figure>"
        for one in examples
    )
    return f'<div class="dp-grid">{cells}</div>'


def _example(example: Mapping[str, Any]) -> str:
    if "messages" in example:
        return "<br>".join(_turn(turn["role"], turn["content"]) for turn in example["messages"])
    if "chosen" in example:
        asked = "<br>".join(_turn(turn["role"], turn["content"]) for turn in example["prompt"])
        better = _turn("assistant", t("better: {answer}", answer=example["chosen"]))
        return f"{asked}<br>{better}<br>{_turn('', t('worse: {answer}', answer=example['rejected']))}"
    if "image" in example:
        shown = thumbnail(example["image"], example["text"], 64)
        said = _turn("assistant", example["text"]) if example["text"] else ""
        return f'<span class="st-pictured">{shown} {said}</span>'
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


# --- classes, the two sides, history -------------------------------------------------------------------------------


def balance(labels: Mapping[str, int]) -> str:
    """How many rows each class has, and whether one outweighs the others."""
    if not labels:
        return ""
    most, least = max(labels.values()), min(labels.values())
    bars = "".join(
        f'<div class="dp-bar"><span>{esc(name)}</span><i style="--w:{count / most * 100:.1f}%"></i>'
        f'<b class="num">{count:,}</b></div>'
        for name, count in labels.items()
    )
    told = ""
    if most >= 10 * least:
        rare, common = min(labels, key=lambda n: labels[n]), max(labels, key=lambda n: labels[n])
        told = notice(
            "warn",
            t("The classes are uneven: {common} has {times} times the rows of {rare}.", common=common, rare=rare,
              times=f"{most / least:,.0f}"),
            t("A classifier that always says {common} would be right for {share} of the rows.", common=common,
              share=f"{most / sum(labels.values()):.0%}"),
            t("Add rows of the rare classes, and look at macro F1 rather than accuracy."),
        )  # fmt: skip
    title = t("Rows of each class ({count})", count=len(labels))
    return f'{told}<figure class="chart dp-bars"><figcaption><strong>{esc(title)}</strong></figcaption>{bars}</figure>'


def sides(train: int, held: Sequence[Mapping[str, Any]], leak: data.Leaks, prepared: data.Prepared) -> str:
    """Rows to train on, rows held back, and whether training has seen some of these."""
    whole = train + len(held)
    share = len(held) / whole * 100 if whole else 0
    told = t("{train} rows to train on, {held} held back for evaluation", train=f"{train:,}", held=f"{len(held):,}")
    bar = (
        f'<div class="dp-sides" role="img" aria-label="{esc(told)}"><i style="width:{100 - share:.1f}%"></i>'
        f'<i class="held" style="width:{share:.1f}%"></i></div>'
    )
    return f'<p class="dp-told">{esc(told)}</p>{bar}{_leaks(leak, len(held), prepared)}'


def _leaks(leak: data.Leaks, held: int, prepared: data.Prepared) -> str:
    if not held:
        return notice("info", t("Nothing is held back, so there will be no evaluation."))
    where = ", ".join(f"{line:,}" for line in leak.lines)
    if leak.rows or leak.questions:
        return notice(
            "warn",
            t("{count} of the rows held back stand in training too.", count=f"{max(leak.rows, leak.questions):,}"),
            t("An evaluation on them rewards memory. The first: {unit} {where}.", unit=unit(prepared.unit),
              where=where),
            t("Leave out what stands there twice, under Problems."),
        )  # fmt: skip
    twice = [code for code in ("duplicate", "other-answer") if prepared.counts.get(code)]
    if prepared.format in ("images", "pictures") and twice and severities(prepared).get(twice[0]) == "note":
        return notice(
            "warn",
            t("Some pictures are here more than once, and may stand on both sides."),
            "",
            t("Keep the first of each, under Problems."),
        )
    if leak.answers:
        return notice(
            "warn",
            t("{count} of the {held} rows held back have an answer that training has too.",
              count=f"{leak.answers:,}", held=f"{held:,}"),
            t("The questions differ, and the answers can be known by heart. The first: {unit} {where}.",
              unit=unit(prepared.unit), where=where),
        )  # fmt: skip
    return notice(
        "good",
        t("No row and no question stands on both sides."),
        t("Rows that ask the same stay together, whichever side they go to."),
    )


TOLD = {
    "brought": N_("Brought in from {name}"),
    "again": N_("Brought in again, from {name}"),
    "read": N_("Read as {format}"),
    "renamed": N_("Renamed from {before}"),
    "binned": N_("Put into the bin"),
    "restored": N_("Taken out of the bin"),
    "fixed": N_("{cause}: {action}, {before} rows became {after}"),
    "unfixed": N_("{cause}: decision taken back, {before} rows became {after}"),
}


def event(one: Row) -> str:
    """One line of the history in words."""
    values = {key: one.get(key, "") for key in ("name", "before", "format", "after")}
    if one["kind"] in ("fixed", "unfixed"):
        action = str(one.get("action", "")).partition(":")[0]
        values |= {"before": f"{one['before']:,}", "after": f"{one['after']:,}", "cause": cause_of(one["cause"])}
        values["action"] = button_of(one["cause"], action).lower() if action else ""
    return t(TOLD[one["kind"]], **values) if one["kind"] in TOLD else one["kind"]


def about(row: Row, history: Sequence[Row], runs: Sequence[Row], used: int) -> str:
    """Fingerprints, storage, history and runs of a data set."""
    facts = {
        t("Fingerprint"): row["id"],
        t("Fingerprint of the file"): row["file"],
        t("File"): row["file_name"] or row["name"],
        t("Storage"): size(used),
        t("Rows"): f"{row['rows']:,}",
    }
    listed = "".join(f"<div><dt>{esc(name)}</dt><dd>{esc(value)}</dd></div>" for name, value in facts.items())
    past = table(
        [t("when"), t("what"), t("version")],
        [[esc(_when(one["time"])), esc(event(one)), f"<code>{esc(one['dataset'][:8])}</code>"] for one in history],
        t("History"),
    )
    if not runs:
        learned = notice("info", t("No run has learned from it yet."))
    else:
        learned = table(
            [t("run"), t("state"), t("when"), t("version")],
            [
                [dot(run["colour"]) + esc(run["name"]), badge(run["state"]), esc(ago(run["created"])),
                 f'<code>{esc(run["dataset"][:8])}</code>']
                for run in runs
            ],
            t("Runs that learned from it"),
        )  # fmt: skip
    return f'<dl class="dp-facts">{listed}</dl>{past}{learned}'


def _when(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))


def earlier(rows: Sequence[Row]) -> str:
    """Recent data sets as cards whose names are buttons (`data-set`)."""
    cards = "".join(
        f'<article class="st-card dp-set"><h3><button type="button" class="dp-open" data-set="{row["id"]}">'
        f"{esc(row['name'])}</button></h3><p>{esc(title_of(row['format']) if row['format'] else t('not read yet'))}"
        f" · {esc(t('{count} rows', count=format(row['rows'], ',')))} · {esc(ago(row['created']))}</p></article>"
        for row in rows
    )
    return (
        f'<h3 class="dp-head">{esc(t("Your data sets"))}</h3><div class="st-cards dp-sets">{cards}</div>'
        if cards
        else ""
    )
