"""The run doctor on the page: a run's findings as a box, their remedy as a form to fill, and what it changes.

What the curve says is worked out by `engine.diagnosis`; its texts are English there, and said here in the page's
language.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.diagnosis import Course, diagnose
from engine.errors import ConfigError
from engine.findings import BAD, GOOD, NOTE, WARN, Finding
from engine.train.job import JobSpec, changed, value_of
from studio import presets, recipes, states
from studio.curves import Curves
from studio.i18n import N_, t
from studio.markup import esc
from studio.store import Row

_KINDS = {BAD: "warn", WARN: "warn", NOTE: "info", GOOD: "good"}
"""None is red: that a run has failed is said above, and the doctor's box is calm."""
_OTHERS = {
    "data.eval_split": N_("Rows held back"),
    "quantization": N_("Memory of the base"),
}
"""Fields of a job that are in no list of fields."""


def course(curves: Curves, row: Row) -> Course:
    """A run's events as the doctor reads them."""
    steps, losses = curves.column("step"), curves.column("loss")
    norms, memory = curves.column("grad_norm"), curves.column("memory")
    good = np.isfinite(losses)
    known = norms[good]
    held = memory[np.isfinite(memory)]
    ended = row["state"] in states.FINISHED
    return Course(
        steps=_sequence("q", steps[good].astype(np.int64)),
        losses=_sequence("d", losses[good]),
        norms=_sequence("d", known) if np.isfinite(known).all() else (),
        evals=[(int(event["step"]), event["loss"]) for event in curves.evals if event.get("loss") is not None],
        start=curves.newest("start") or {},
        error={**(curves.newest("error") or {}), **row["error"]} if row["error"] and ended else None,
        done=curves.newest("done") if row["state"] == states.DONE else None,
        held=int(held[-1]) if len(held) else None,
        running=not ended,
    )


def _sequence(kind: str, column: np.ndarray) -> array[Any]:
    """A column as plain numbers. A list of them would take longer to make than the doctor takes to read it."""
    return array(kind, column.tobytes())


def findings(curves: Curves, row: Row) -> list[Finding]:
    """What the run's course says, the gravest first; nothing for a run whose job cannot be read any more."""
    try:
        spec = JobSpec.from_dict(row["spec"])
    except ConfigError:
        return []
    return diagnose(spec, course(curves, row))


def curable(found: Sequence[Finding]) -> Finding | None:
    """The gravest finding that something can be done about."""
    return next((finding for finding in found if finding.changes), None)


def box(found: Sequence[Finding], row: Row) -> str:
    """The findings in a calm box that is there from the first step on, so that nothing moves when they come."""
    if row["state"] in (states.QUEUED, states.STARTING) and not row["step"]:
        return ""
    if not found:
        if row["state"] in states.FINISHED:
            return _boxed("info", "none", t("Nothing stands out"), t("The curve points to no trouble."))
        text = t("It takes some twenty steps, and three checks, to tell noise from trouble.")
        return _boxed("info", "waiting", t("Too early to say"), text)
    first, remedy = found[0], curable(found)
    also = "".join(f"<li><b>{esc(t(other.title))}</b>: {esc(t(other.why, **other.values))}</li>" for other in found[1:])
    more = f'<ul class="also">{also}</ul>' if also else ""
    if remedy:
        lead = t("The remedy changes:") if remedy is first else t("A remedy for the second changes:")
        more += f'<p class="remedy">{esc(lead)}</p>{changes_table(row["spec"], remedy.changes)}'
    return _boxed(_KINDS[first.severity], first.code, t(first.title), t(first.why, **first.values), more)


def _boxed(kind: str, code: str, title: str, text: str, more: str = "") -> str:
    return (
        f'<section class="notice doctor {kind}" role="status" data-finding="{esc(code)}">'
        f'<span class="who">{esc(t("Doctor"))}</span><strong class="notice-title">{esc(title)}</strong>'
        f"<p>{esc(text)}</p>{more}</section>"
    )


def changes_table(spec: Mapping[str, Any], changes: Mapping[str, Any]) -> str:
    """What changes, field by field: its name, the old value, the new one."""
    job = JobSpec.from_dict(spec)
    rows = "".join(
        f'<li data-field="{esc(key)}"><span class="name">{esc(label(job, key))} <code>{esc(key.rpartition(".")[2])}'
        f'</code></span> <del>{esc(_said(_present(job, key)))}</del> <span aria-hidden="true">→</span> '
        f"<ins>{esc(_said(value))}</ins></li>"
        for key, value in changes.items()
    )
    return f'<ul class="changes" aria-label="{esc(t("What changes, old and new"))}">{rows}</ul>'


def label(job: JobSpec, key: str) -> str:
    """The plain name of a field of the job, as the form has it."""
    found = _field(job, key)
    if found is not None:
        return t(found.label)
    return t(_OTHERS[key]) if key in _OTHERS else key.rpartition(".")[2]


def recipe(row: Row, finding: Finding) -> dict[str, Any]:
    """The job with the remedy, as `page.recipe` takes it: the form is filled, and says what changed and why."""
    job = JobSpec.from_dict(row["spec"])
    better = changed(job, finding.changes)
    name = row["name"] if row["name"].endswith("+") else f"{row['name'][:78]} +"
    goes_on = t("That run goes on; the new one waits in the queue.") if row["state"] in states.LIVE else ""
    lead = t('The settings of "{run}" with the remedy for: {finding}.', run=row["name"], finding=t(finding.title))
    return {
        "spec": {**better.to_dict(), "name": name},
        "dataset": row["dataset"],
        "run": row["id"],
        "meaning": " ".join(part for part in (lead, goes_on) if part),
        "note": changes_table(row["spec"], finding.changes),
    }


def recipe_note(asked: Mapping[str, Any]) -> str:
    """What the Train form says of a recipe that it was filled from."""
    said = esc(asked.get("meaning") or t("Settings of an earlier run; change what you like."))
    return f'<div class="remedy-note" role="status"><p>{said}</p>{asked["note"]}</div>' if asked.get("note") else said


def _field(job: JobSpec, key: str) -> presets.Field | None:
    part, _, name = key.partition(".")
    if part == "training":
        fields = recipes.task_of(job.task).fields
    elif part == "adapter":
        fields = recipes.method_of(job.adapter.get("method")).fields
    else:
        return None
    return next((field for field in fields if field.name == name), None)


def _present(job: JobSpec, key: str) -> Any:
    """The job's value; where it is left to the method, the form's default."""
    value, field = value_of(job, key), _field(job, key)
    return field.default if value is None and field is not None else value


def _said(value: Any) -> str:
    if value is None:
        return t("empty")
    if isinstance(value, bool):
        return t("on") if value else t("off")
    return f"{value:.12g}" if isinstance(value, int | float) else str(value)
