"""What differs between the settings of runs: one line a setting, in readable words beside its exact name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.train.job import TrainingSpec
from studio import presets
from studio.i18n import N_, t
from studio.markup import dot, esc, notice
from studio.store import Row, Store

WORDS: Mapping[str, str] = {
    "task": N_("Task"),
    "model": N_("Base"),
    "quantization": N_("Bits of the base"),
    "full": N_("Full fine-tuning"),
    "data": N_("Data set"),
    "data.format": N_("Format of the data"),
    "data.columns": N_("Columns"),
    "data.eval_split": N_("Share held back"),
    "adapter.method": N_("Method"),
    "training.loraplus_embedding_rate": N_("LoRA+: learning rate of embeddings"),
    "training.threads": N_("CPU threads"),
}
"""Exact name -> words, for settings that are no field of a form."""
MISSING = object()
"""The setting is left to its default."""
_LONGEST = 400
_LEFT_OUT = ("name", "data.path")


@dataclass(frozen=True)
class Line:
    """One setting.

    Attributes:
        key: its exact name in the job, with dots.
        words: its plain name; empty where there is none.
        values: of each run, in order; `MISSING` where the job leaves it out.
    """

    key: str
    words: str
    values: tuple[Any, ...]

    @property
    def differs(self) -> bool:
        """Whether the runs have unequal values."""
        return any(value != self.values[0] for value in self.values[1:])


def lines(specs: Sequence[Mapping[str, Any]], data: Sequence[str | None] = ()) -> list[Line]:
    """Every setting of these jobs (as dictionaries), in the order of a job file.

    Args:
        specs: the jobs.
        data: what to call each job's data set; its path where there is no name.
    """
    names = [name or "" for name in data] or [""] * len(specs)
    flat = [_flat(spec, name) for spec, name in zip(specs, names, strict=True)]
    keys: dict[str, None] = {}
    for one in flat:
        keys |= dict.fromkeys(one)
    # By parts, so that what only a later run has stands with its like.
    parts = list(dict.fromkeys(key.partition(".")[0] for key in keys))
    ordered = sorted(keys, key=lambda key: parts.index(key.partition(".")[0]))
    return [Line(key, words(key, specs), tuple(one.get(key, MISSING) for one in flat)) for key in ordered]


def of_runs(store: Store, rows: Sequence[Row]) -> list[Line]:
    """The settings of these runs; data sets by the names that they have in the studio."""
    known = dict(store.db.execute("SELECT id, name FROM datasets WHERE mine(owner)").fetchall())
    used = {row["dataset"]: known[row["dataset"]] for row in rows if row["dataset"] in known}
    names = [*used.values()]
    told_apart = {key: f"{name} ({key[:6]})" if names.count(name) > 1 else name for key, name in used.items()}
    return lines([row["spec"] for row in rows], [told_apart.get(row["dataset"]) for row in rows])


def _flat(spec: Mapping[str, Any], data: str) -> dict[str, Any]:
    usual = {field.name: field.default for field in dataclasses.fields(TrainingSpec)}
    whole = {**spec, "training": {**usual, **(spec.get("training") or {})}}
    found: dict[str, Any] = {}
    for key, value in whole.items():
        if key == "data":
            found["data"] = data or str(value.get("path", "")).replace("\\", "/").rsplit("/", 1)[-1]
        found |= dict(_leaves(key, value))
    return {key: value for key, value in found.items() if key not in _LEFT_OUT}


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and key in ("data", "adapter", "training", "options"):
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key, list(value) if isinstance(value, tuple) else value


def words(key: str, specs: Sequence[Mapping[str, Any]] = ()) -> str:
    """The plain name of a setting, as the forms of these jobs have it; empty where there is none."""
    if key in WORDS:
        return t(WORDS[key])
    part, _, name = key.partition(".")
    methods, tasks = presets.methods(), presets.tasks()
    used = [methods.get((spec.get("adapter") or {}).get("method", "")) for spec in specs]
    forms = [tasks.get(spec.get("task", "causal_lm")) for spec in specs]
    fields = {
        "adapter": [field for method in used if method for field in method.fields],
        "training": [field for form in [*forms, *tasks.values()] if form for field in form.fields],
        "options": [field for form in forms if form for field in form.options],
    }.get(part, [])
    label = next((field.label for field in fields if field.name == name), "")
    return t(label) if label else ""


def told(value: Any) -> str:
    """A value as people read it."""
    if value is MISSING:
        return t("default")
    if value is None or value in ("", [], {}):
        return t("not set")
    if isinstance(value, bool):
        return t("yes") if value else t("no")
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        text = ", ".join(value)
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def table(found: Sequence[Line], rows: Sequence[Mapping[str, Any]], whole: bool = False) -> str:
    """The settings side by side, those that differ marked; all of them when `whole`.

    Args:
        found: from `lines`.
        rows: what is compared, each with `name` and `colour`.
        whole: show what is equal too.
    """
    count = sum(line.differs for line in found)
    shown = [line for line in found if whole or line.differs]
    if not shown:
        return notice("good", t("The same settings."), t("These runs differ in nothing that was set."))
    heads = "".join(f'<th scope="col">{dot(row["colour"])}{esc(row["name"])}</th>' for row in rows)
    body = "".join(_line(line, rows) for line in shown)
    caption = t("{count} of {total} settings differ.", count=count, total=len(found))
    return (
        f'<div class="scroll-x" tabindex="0" role="region" aria-label="{esc(t("Settings side by side"))}">'
        f'<table class="sheet run-diff"><caption>{esc(caption)}</caption><thead><tr><th scope="col">{esc(t("setting"))}'
        f"</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _line(line: Line, rows: Sequence[Mapping[str, Any]]) -> str:
    exact = f"<code>{esc(line.key)}</code>"
    name = f"{esc(line.words)} {exact}" if line.words else exact
    cells = "".join(
        f'<td data-head="{esc(row["name"])}">{esc(told(value))}</td>'
        for row, value in zip(rows, line.values, strict=True)
    )
    return f'<tr{" class=differs" if line.differs else ""}><th scope="row">{name}</th>{cells}</tr>'
