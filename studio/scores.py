"""What an evaluation says, and what several say together: lines, metrics, the leaderboard. Nothing here draws."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.paths import REPOSITORY
from studio import presets
from studio.i18n import N_, t
from studio.markup import BASE_COLOUR

Row = dict[str, Any]
CONTENDERS = {
    "full": N_("Full fine-tuning"),
    "lora": N_("LoRA, query and value"),
    "lora-all": N_("LoRA, every linear layer"),
    "lora-pooler": N_("LoRA, every linear layer and the pooler"),
}
"""Contender of the project's own leaderboard -> its title, in English; the others are methods by their names."""
MEASURED = REPOSITORY / "bench" / "results" / "leaderboard.json"


@dataclass(frozen=True)
class Metric:
    """A metric as the pages show it.

    Attributes:
        title: its name, in English.
        sense: 1 where higher is better, -1 where lower is, 0 where neither is.
    """

    title: str
    sense: int = 1

    @property
    def hint(self) -> str:
        """Which way is better, in words."""
        return t("higher is better" if self.sense > 0 else "lower is better") if self.sense else ""


METRICS = {
    "accuracy": Metric(N_("Accuracy")),
    "macro_f1": Metric(N_("Macro F1")),
    "margin": Metric(N_("Margin of the better answer")),
    "chrf": Metric(N_("chrF")),
    "bleu": Metric(N_("BLEU")),
    "rouge_l": Metric(N_("ROUGE-L")),
    "perplexity": Metric(N_("Perplexity"), -1),
    "loss": Metric(N_("Loss"), -1),
    "exact_match": Metric(N_("Exact match")),
    "reward_chosen": Metric(N_("Reward of the better answer"), 0),
    "reward_rejected": Metric(N_("Reward of the worse answer"), 0),
}
"""In the order in which a leaderboard offers them: exact match comes late, being 0 for most texts."""


def metric(name: str) -> Metric:
    """A metric by its name in the events; of an unknown one nobody can say which way is better."""
    return METRICS.get(name) or Metric(name.replace("_", " ").capitalize(), 0)


@dataclass
class Output:
    """The lines of `python -m engine eval --json --progress`, as far as they have come.

    Attributes:
        scores: `who`, `metric`, `value` (None where it is no number), `rows`, with `note` where there is one.
        rows: `row`, `prompt`, `wanted`, `base`, `adapter`.
        notes: warnings.
        sheet: the file of the contact sheet, "" without one.
        error: `code`, `message`, `hint`, where the evaluation failed.
        progress: what is being done, and the share of the whole that is done, None while that cannot be said.
    """

    scores: list[Row] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sheet: str = ""
    error: Row | None = None
    progress: tuple[str, float | None] = ("Starting", None)

    @property
    def complete(self) -> bool:
        """Whether both sides have been scored."""
        return {score["who"] for score in self.scores} == {"base", "adapter"}

    def to_dict(self) -> Row:
        """What is kept of it."""
        kept = asdict(self)
        del kept["error"], kept["progress"]
        return kept


def read(text: str) -> Output:
    """The lines that are whole and known; a line that is still being written is left for the next look."""
    found, half = Output(), 0.0
    for line in text.splitlines():
        try:
            event = json.loads(line)
            kind = event["type"]
        except (ValueError, TypeError, KeyError):
            continue
        if kind == "score":
            half = 0.5
            finite = isinstance(event["value"], int | float) and math.isfinite(event["value"])
            score = {key: event[key] for key in ("who", "metric", "value", "rows", "note") if key in event}
            found.scores.append({**score, "value": event["value"] if finite else None})
        elif kind == "row":
            found.rows.append({key: event[key] for key in ("row", "prompt", "wanted", "base", "adapter")})
        elif kind == "warning":
            found.notes.append(str(event["message"]))
        elif kind == "sheet":
            found.sheet = str(event["file"])
        elif kind == "error":
            found.error = {key: str(event.get(key, "")) for key in ("code", "message", "hint")}
        elif kind == "status":
            share = event.get("fraction") if event.get("phase") == "scoring" else None
            found.progress = (str(event["message"]), None if share is None else half + float(share) / 2)
    return found


def sides(result: Mapping[str, Any]) -> dict[str, dict[str, Row]]:
    """Metric -> `base` and `adapter` -> the score, in the order of `METRICS`; a side may be missing."""
    found: dict[str, dict[str, Row]] = {}
    for score in result["scores"]:
        found.setdefault(score["metric"], {})[score["who"]] = score
    return {name: found[name] for name in in_order(found)}


def in_order(names: Iterable[str]) -> list[str]:
    """Each metric once, those that tell most first."""
    order = [*METRICS]
    return sorted(dict.fromkeys(names), key=lambda name: order.index(name) if name in order else len(order))


def better(name: str, base: float | None, adapter: float | None) -> str:
    """Which of the two is better: `base`, `adapter`, or "" where that cannot be said."""
    sense = metric(name).sense
    if base is None or adapter is None or base == adapter or not sense:
        return ""
    return "adapter" if (adapter > base) == (sense > 0) else "base"


@dataclass(frozen=True)
class Entry:
    """One row of a leaderboard.

    Attributes:
        run: the run's id; "" for a base.
        name, colour: the run's own.
        base: the base model.
        method: the adapter's method, `full`, or "" for a base.
        values: metric -> (value, rows).
        held: share and seed by which rows were held back; scores of other rows are other scores.
        rests_on: what the base's own scores depend on; runs that have it in common share a base row.
        trained: how many parameters learned.
        bytes: size of what is kept.
        peak: most memory while training, in bytes.
        seconds: of training.
        note: why a value is not the model's own.
    """

    run: str
    name: str
    colour: str
    base: str
    method: str
    values: Mapping[str, tuple[float | None, int]]
    held: tuple[Any, ...] = ()
    rests_on: str = ""
    trained: int | None = None
    bytes: int | None = None
    peak: int | None = None
    seconds: float | None = None
    note: str = ""

    def value(self, name: str) -> float | None:
        """The value of a metric, None without one."""
        return self.values.get(name, (None, 0))[0]


def entry(run: Row, result: Row, start: Row, done: Row, size: int | None) -> Entry:
    """A scored run as a row of a leaderboard; `start` and `done` are the run's events of these types."""
    took = run["ended"] - run["started"] if run["ended"] and run["started"] else None
    return Entry(
        run=run["id"],
        name=run["name"],
        colour=run["colour"],
        base=run["model"],
        method=run["method"],
        values=_values(result, "adapter"),
        held=_held(run),
        rests_on=_rests_on(run),
        trained=start.get("trainable"),
        bytes=size,
        peak=done.get("peak_bytes"),
        seconds=done.get("seconds", took),
    )


def base_entry(run: Row, result: Row) -> Entry:
    """The base of a scored run as a row of its own."""
    note = next((score["note"] for score in result["scores"] if score["who"] == "base" and score.get("note")), "")
    values, rests_on = _values(result, "base"), _rests_on(run)
    return Entry("", "base", BASE_COLOUR, run["model"], "", values, _held(run), rests_on, note=note)


def _values(result: Row, who: str) -> dict[str, tuple[float | None, int]]:
    return {score["metric"]: (score["value"], score["rows"]) for score in result["scores"] if score["who"] == who}


def _held(run: Row) -> tuple[Any, ...]:
    spec = run["spec"]
    return spec["data"].get("eval_split"), spec["training"].get("seed")


def _rests_on(run: Row) -> str:
    spec = run["spec"]
    return json.dumps([run["model"], spec.get("quantization"), spec.get("options"), *_held(run)], sort_keys=True)


def offered(entries: Iterable[Entry]) -> list[str]:
    """The metrics that the entries have."""
    return in_order(name for entry in entries for name in entry.values)


def ranked(entries: Iterable[Entry], name: str) -> list[Entry]:
    """The best value of a metric first; entries without one last."""
    sense = metric(name).sense or 1

    def place(entry: Entry) -> tuple[bool, float]:
        value = entry.value(name)
        return value is None, 0.0 if value is None else -sense * value

    return sorted(entries, key=place)


COSTS: dict[str, tuple[str, Callable[[Entry], float | None]]] = {
    "bytes": (N_("Size of the result"), lambda entry: entry.bytes),
    "trained": (N_("Trained parameters"), lambda entry: entry.trained),
}
"""What quality can be held against: name -> (title, value of an entry)."""


def front(entries: Iterable[Entry], name: str, cost: str) -> list[Entry]:
    """The runs that no other beats in quality and cost at once, the cheapest first.

    An entry is beaten by one that is at least as good in both and better in one. Bases cost nothing and are no runs:
    they take no part.
    """
    sense, of = metric(name).sense, COSTS[cost][1]
    points = [(e, of(e), e.value(name)) for e in entries if e.run]
    known = [(e, x, sense * y) for e, x, y in points if x and y is not None]
    if not sense:
        return []
    best = [
        (x, y, e) for e, x, y in known if not any(ox <= x and oy >= y and (ox < x or oy > y) for _, ox, oy in known)
    ]
    return [e for _, _, e in sorted(best, key=lambda item: item[:2])]


def cautions(entries: Sequence[Entry]) -> list[str]:
    """Why the rows of a leaderboard may not be held against each other, in words."""
    runs, found = [entry for entry in entries if entry.run], []
    if len({entry.held for entry in runs}) > 1:
        found.append(
            t("Not all of these runs held back the same rows (share or seed differ): that alone changes a score.")
        )
    if len({entry.base for entry in runs}) > 1:
        found.append(t("Loss and perplexity count each base's own tokens: compare them between runs of one base only."))
    return found


def measured(path: Path = MEASURED) -> list[Row]:
    """The project's own leaderboard as `python -m bench.leaderboard` measured it: a row a contender, means over seeds,
    the best accuracy first; nothing where it has no runs. `title` is in English."""
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        known, grouped = presets.methods(), dict[str, list[Row]]()
        for run in runs:
            grouped.setdefault(run["contender"], []).append(run)
        rows = [
            {
                "contender": name,
                "title": CONTENDERS.get(name) or (known[name].title if name in known else name),
                "seeds": len(group),
                "trainable": group[0]["trainable"],
                "bytes": group[0]["bytes"],
                "peak_bytes": max(run["peak_bytes"] for run in group),
                **{key: statistics.fmean(run[key] for run in group) for key in ("accuracy", "macro_f1", "cpu_seconds")},
            }
            for name, group in grouped.items()
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return sorted(rows, key=lambda row: -row["accuracy"])
