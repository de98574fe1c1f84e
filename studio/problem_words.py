"""Problems of a data set as the Data page shows them: causes, what can be done about each, the rows. HTML."""

from __future__ import annotations

from engine import data
from engine.data.fixes import way, words
from studio.datasets import Checked
from studio.i18n import N_, reported, t
from studio.markup import esc, notice, table

_SHOWN_PROBLEMS = 50
UNITS = {"line": N_("line"), "row": N_("row"), "picture": N_("picture")}
CAUSES = {
    "null-field": N_("A needed text is missing"),
    "empty-field": N_("A needed text is empty"),
    "not-text": N_("Something else than text"),
    "ragged": N_("More or fewer cells than the header"),
    "open-quote": N_("A quote is never closed"),
    "bad-json": N_("Not valid JSON"),
    "not-an-object": N_("No object"),
    "empty-row": N_("An empty row"),
    "cell-too-long": N_("A text is too long"),
    "too-deep": N_("Lists nested too deeply"),
    "not-turns": N_("No list of turns"),
    "unknown-role": N_("A speaker that is not known"),
    "empty-conversation": N_("An empty conversation"),
    "no-assistant": N_("No answer to learn"),
    "assistant-first": N_("The question is missing"),
    "system-not-first": N_("A system turn in the middle"),
    "duplicate-id": N_("An id that comes twice"),
    "orphan": N_("A reply to nothing"),
    "same-answers": N_("Both answers are the same"),
    "no-prompt": N_("No prompt"),
    "no-question": N_("The prompt ends without a question"),
    "prompt-differs": N_("The prompt is not the conversation's start"),
    "no-shared-start": N_("The conversations part early"),
    "not-a-label": N_("No label"),
    "picture": N_("A damaged picture"),
    "picture-too-large": N_("A picture that is too large"),
    "no-caption": N_("Nothing is said of a picture"),
    "no-picture": N_("A name without a picture"),
    "link": N_("A link, not followed"),
    "repeated-name": N_("A name that comes twice"),
    "no-file": N_("No file with contents"),
    "nested-archive": N_("An archive inside"),
    "unused-file": N_("A file that was not used"),
    "unread-words": N_("A caption that cannot be read"),
    "animated": N_("An animated picture"),
    "cmyk": N_("Colours for print"),
    "deep": N_("16 bits a colour"),
    "changed-label": N_("A label was read as another"),
    "repeated-label": N_("A label twice in one row"),
    "number-labels": N_("Classes named by numbers"),
    "similar-labels": N_("Classes that differ in spelling only"),
    "rare-label": N_("A class with one row"),
    "joined-turns": N_("Two turns of one speaker were joined"),
    "cut-ending": N_("A last turn without an answer was cut"),
    "bad-characters": N_("Characters that are none"),
    "no-header": N_("No header line"),
    "duplicate-column": N_("A column name that comes twice"),
    "unnamed-column": N_("A column without a name"),
    "not-tabs": N_("Another delimiter than the name says"),
    "duplicate": N_("The same row twice"),
    "other-answer": N_("The same question with another answer"),
    "outer-spaces": N_("Spaces or empty lines around a text"),
    "other-branches": N_("Replies on other branches"),
}
"""Cause -> what it is, in plain words."""
BUTTONS = {
    ("duplicate", "skip"): N_("Keep the first of each"),
    ("other-answer", "skip"): N_("Keep the first answer"),
    ("other-answer", "skip-all"): N_("Leave them all out"),
    ("outer-spaces", "trim"): N_("Trim"),
    ("ragged", "trim"): N_("Cut or fill to the header"),
    ("similar-labels", "join"): N_("Join the spellings"),
    ("", "skip"): N_("Leave them out"),
    ("", "fill"): N_("Fill in"),
}
DONE = {"skip": N_("skipped"), "fix": N_("mended, kept"), "note": N_("kept")}


def unit(name: str) -> str:
    """What a row's place counts, in the person's language."""
    word = UNITS.get(name) or UNITS["row"]
    return t(word)


def total(prepared: data.Prepared) -> str:
    """Kept and skipped rows, which add up to all."""
    return t(
        "{kept} kept + {skipped} skipped = {total} rows",
        kept=f"{prepared.kept:,}",
        skipped=f"{prepared.skipped:,}",
        total=f"{prepared.total:,}",
    )


def cause_of(code: str) -> str:
    """A cause in plain words."""
    told = CAUSES.get(code)
    return t(told) if told else code


def button_of(code: str, action: str) -> str:
    """What the button of a remedy says."""
    said = BUTTONS.get((code, action)) or BUTTONS["", action]
    return t(said)


def severities(prepared: data.Prepared) -> dict[str, str]:
    """Code -> what was done, by the first row of each."""
    found: dict[str, str] = {}
    for item in prepared.problems:
        found.setdefault(item.code, item.severity)
    return found


def causes(found: Checked, chosen: str = "") -> str:
    """Each cause with its count and what can be done; what was decided can be taken back."""
    prepared = found.prepared
    if prepared is None:
        return ""
    done = severities(prepared)
    order = {"skip": 0, "note": 1, "fix": 2}
    codes = sorted(prepared.counts, key=lambda code: (order.get(done.get(code, ""), 3), -prepared.counts[code]))
    decided = [code for code in found.fixes if code not in prepared.counts]
    cards = [_cause(found, code, done.get(code, ""), chosen) for code in [*codes, *decided]]
    if not cards:
        return notice("good", t("No problems found."), total(prepared))
    head = notice(
        "warn" if prepared.skipped or any(done.get(code) == "note" for code in codes) else "good",
        total(prepared),
        t("What you decide here is kept beside the file, which is never changed; every decision can be taken back."),
    )
    return f'{head}<div class="dp-causes">{"".join(cards)}</div>'


def _cause(found: Checked, code: str, severity: str, chosen: str) -> str:
    assert found.prepared is not None
    count = found.prepared.counts.get(code, 0)
    first = next((item for item in found.prepared.problems if item.code == code), None)
    fix = found.fixes.get(code, "")
    if fix:
        filled = words(found.fixes, code)
        how = button_of(code, way(found.fixes, code)) + (f": {filled}" if filled else "")
        acts = (
            f'<span class="dp-decided">{esc(t("Decided: {what}", what=how))}</span>'
            f'<button type="button" class="dp-act" data-fix="{code}" data-action="">{esc(t("Take back"))}</button>'
        )
    else:
        acts = "".join(_remedy(code, action) for action in data.REMEDIES.get(code, ()))
    see = ""
    if count:
        label = t("Show these rows") if chosen != code else t("Shown below")
        see = (
            f'<button type="button" class="dp-act quiet" data-see="{code}" aria-pressed="{str(chosen == code).lower()}"'
            f">{esc(label)}</button>"
        )
    kind = f'<span class="dp-kind {severity}">{esc(t(DONE[severity]))}</span>' if severity in DONE else ""
    told = f"<p>{esc(str(first))}</p>" if first else ""
    return (
        f'<section class="dp-cause" data-cause="{code}" data-count="{count}"><h3><b class="num">{count:,}</b> '
        f"{esc(cause_of(code))} {kind}</h3>{told}<div class='dp-acts'>{acts}{see}</div></section>"
    )


def _remedy(code: str, action: str) -> str:
    button = (
        f'<button type="button" class="dp-act" data-fix="{code}" data-action="{action}">'
        f"{esc(button_of(code, action))}</button>"
    )
    if action != "fill":
        return button
    label = t("Words for: {cause}", cause=cause_of(code))
    box = f'placeholder="{esc(t("words"))}" aria-label="{esc(label)}"'
    return f'<input type="text" class="dp-fill" maxlength="200" {box}>{button}'


def problem_rows(prepared: data.Prepared, code: str, page: int, size: int) -> tuple[str, int]:
    """Rows with a problem, a page of them, and how many are listed; `code` "" is all causes."""
    items = [item for item in prepared.problems if not code or item.code == code]
    lines = [
        [
            f'<span class="num">{f"{item.line:,}" if item.line else ""}</span>',
            esc(item.column),
            esc(reported(item.message)),
            esc(t(DONE[item.severity])) if item.severity in DONE else "",
        ]
        for item in items[page * size : (page + 1) * size]
    ]
    more = sum(n for one, n in prepared.counts.items() if not code or one == code) - len(items)
    tail = t("and {more} more, which are counted and not listed", more=f"{more:,}") if more > 0 else ""
    head = [unit(prepared.unit), t("column"), t("problem"), t("what was done")]
    shown = table(head, lines, cause_of(code) if code else t("All causes"))
    return shown + (f'<p class="st-hint">{esc(tail)}</p>' if tail else ""), len(items)


def problems(prepared: data.Prepared) -> str:
    """What was skipped or mended, by line, with the counts by cause."""
    if not prepared.problems:
        return notice("good", t("No problems found."), total(prepared))
    counts = ", ".join(f"{code} {count:,}" for code, count in prepared.counts.items())
    return notice("warn", total(prepared), counts) + problem_rows(prepared, "", 0, _SHOWN_PROBLEMS)[0]


def decided(before: Checked, found: Checked, cause: str, action: str) -> str:
    """What a decision has changed."""
    was = before.prepared.kept if before.prepared else 0
    now = found.prepared.kept if found.prepared else 0
    what = button_of(cause, action.partition(":")[0]) if action else t("Taken back")
    told = t("{before} rows became {after}. The file is as it was.", before=f"{was:,}", after=f"{now:,}")
    return notice("good", f"{cause_of(cause)}: {what}", told)
