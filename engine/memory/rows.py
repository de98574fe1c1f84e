"""The heaviest batch of a job: from its own rows where they can be read, else from rows of the full length."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from engine.errors import DataError, EngineError
from engine.memory.shapes import Unfetched, stamps
from engine.models.fetch import is_here, resolve
from engine.tasks.base import Batch, Fitting, Loaded, Task
from engine.train.events import Recorder
from engine.train.job import JobSpec

MOST_EXAMPLES = 4000
"""So many of a job's rows are tokenised; of longer data the rest is taken to be like them."""

_MOST_BATCHES = 2000
_SEQUENCES = ("ids", "learned", "source", "target")


@dataclass(frozen=True)
class Rows:
    """What a job learns from: its task (with labels, where it has any) and examples; none if they cannot be read."""

    task: Task
    examples: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Heaviest:
    """Batches to simulate, of which the one with the largest peak counts.

    Attributes:
        batches: as the loop would make them. measured: they are the job's own rows.
        tokens, length: of the first batch: what the model reads, and its longest row.
        steps: of the whole run; None where it is not known.
        lengths: how many batches differ in what the model reads; None where the rows are not known.
    """

    batches: tuple[Batch, ...]
    measured: bool
    tokens: int
    length: int
    steps: int | None
    lengths: int | None


_MOST_REMEMBERED = 2
_UNREAD = frozenset(
    {"batch_size", "gradient_accumulation", "learning_rate", "schedule", "optimizer", "warmup_ratio", "weight_decay"}
    | {"loraplus_ratio", "loraplus_embedding_rate", "max_grad_norm", "precision", "eval_every", "checkpoint_every"}
    | {"early_stopping_patience", "gradient_checkpointing", "activation_offload", "threads", "epochs", "max_steps"}
)
"""Of the training's settings, those that reading and tokenising do not look at."""

_remembered: OrderedDict[str, tuple[Rows, Sequence[Any]]] = OrderedDict()


def remembered(spec: JobSpec) -> tuple[Rows, Sequence[Any]] | None:
    """Rows and tokens of an earlier job of this process that had the same; None if there is none."""
    return _remembered.get(_key(spec))


def remember(spec: JobSpec, rows: Rows, found: Sequence[Any]) -> None:
    """Keep a job's rows and tokens for the next question, which is mostly about the same data."""
    key = _key(spec)
    if key:
        _remembered[key] = rows, found
        _remembered.move_to_end(key)
        while len(_remembered) > _MOST_REMEMBERED:
            _remembered.popitem(last=False)


def _key(spec: JobSpec) -> str:
    """Equal for jobs with the same rows and tokens, the files as they are now; "" where that cannot be told."""
    from engine.adapters import ADAPTERS

    if not is_here(spec.model):
        return ""
    plain = spec.to_dict()
    virtual = not spec.full and ADAPTERS[spec.adapter["method"]].prompt is not None
    try:
        own = {
            "files": (stamps(Path(spec.data.path)), stamps(resolve(spec.model))),
            "training": {name: value for name, value in plain["training"].items() if name not in _UNREAD},
            # Virtual tokens leave less room for a row's own.
            "adapter": plain["adapter"] if virtual else None,
        }
    except (OSError, EngineError):
        return ""
    return json.dumps({**plain, **own, "name": "", "quantization": ""}, sort_keys=True, default=str)


def read(spec: JobSpec, task: Task) -> Rows:
    """The job's training rows, or none if the data cannot be read."""
    from engine.train.worker import examples_of

    try:
        train, _ = examples_of(spec, task, Recorder())
        fitted = task.fitted(train) if isinstance(task, Fitting) else task
    except (DataError, OSError):
        return Rows(_with_two_labels(task), ())
    return Rows(fitted, tuple(train[:MOST_EXAMPLES]))


def _with_two_labels(task: Any) -> Task:
    if not isinstance(task, Fitting):
        found: Task = task
        return found
    labels = getattr(task, "labels", ()) or ("0", "1")
    return task.fitted([{"text": "", "labels": [label]} for label in labels])


def encoded(rows: Rows, loaded: Loaded, spec: JobSpec) -> Sequence[Any]:
    """The rows as the model takes them; empty where there are none, or no tokenizer to read them with."""
    if not rows.examples or isinstance(loaded.processor, Unfetched):
        return []
    task: Any = rows.task
    if spec.task == "preference":
        # The reference's opinion takes numbers, not memory: it is computed before, without gradients.
        task = dataclasses.replace(task, loss_kind="orpo", label_smoothing=0.0)
    found: Sequence[Any] = task.encode(rows.examples, loaded, spec.training, lambda phase, share, message: None).rows
    return found


def heaviest(task: Task, loaded: Loaded, own: Sequence[Any], spec: JobSpec, length: int | None) -> Heaviest:
    """The batches of a run with the most tokens and with the most targets.

    Args:
        task, loaded: as the loop has them.
        own: the job's rows, encoded; may be empty.
        length: every row is given this many tokens; None: the rows as they are (without rows: `max_length`).
    """
    from engine.train.order import length_of, step_rows

    collate, training = task.collator(loaded), spec.training
    total = training.max_steps
    if length is not None or not own:
        wanted = min(length or training.max_length, longest_row(loaded.model, training.max_length, length))
        rows = [stretched(row, wanted) for row in itertools.islice(itertools.cycle(own or [_blank(spec.task)]), 64)]
        groups = [list(itertools.islice(itertools.cycle(rows), training.batch_size))]
    else:
        per_step = training.batch_size * training.gradient_accumulation
        order = length_of(task, collate) if training.group_by_length else None
        steps = step_rows(own, per_step, training.seed, 0, order)
        per_epoch = -(-len(own) // per_step)
        total = total or max(1, round(training.epochs * per_epoch))
        groups = [
            step[start : start + training.batch_size]
            for step in itertools.islice(steps, min(total, _MOST_BATCHES))
            for start in range(0, len(step), training.batch_size)
        ]
    weighed = [(int(batch["input_ids"].numel()), task.targets(batch), batch) for batch in map(collate, groups)]
    longest = max(weighed, key=lambda item: item[:2])
    most = max(weighed, key=lambda item: (item[1], item[0]))
    found = (longest[2],) if longest[:2] == most[:2] else (longest[2], most[2])
    group = groups[next(i for i, item in enumerate(weighed) if item is longest)]
    return Heaviest(
        batches=found,
        measured=bool(own) and length is None,
        tokens=task.tokens(longest[2]),
        length=max(map(row_length, group)),
        steps=total,
        lengths=len({item[0] for item in weighed}) if own and length is None else None,
    )


def longest_row(model: nn.Module, wanted: int, length: int | None) -> int:
    """Tokens that a row can have: what is asked for, or less where the model's positions, less virtual tokens, end."""
    from engine.models.loading import context_length

    config: Any = model.config
    context = context_length(config)
    count: Any = getattr(model, "virtual_tokens", None)
    asked = length or wanted
    return min(asked, context - (count() if count else 0)) if context else asked


def stretched(row: Any, length: int) -> Any:
    """A row's sequences repeated or cut to `length`, so that the share of its targets stays."""
    changes = {}
    for item in dataclasses.fields(row):
        value = getattr(row, item.name)
        if dataclasses.is_dataclass(value):
            changes[item.name] = stretched(value, length)
        elif item.name in _SEQUENCES:
            changes[item.name] = tuple(itertools.islice(itertools.cycle(value), length))
    if "learned" in changes and not any(changes["learned"][1:]):
        # Cut before its first target; a row without one would not be trained on.
        changes["learned"] = (*changes["learned"][:-1], True)
    return dataclasses.replace(row, **changes)


def row_length(row: Any) -> int:
    """Tokens of a row's longest sequence."""
    sizes = []
    for item in dataclasses.fields(row):
        value = getattr(row, item.name)
        if dataclasses.is_dataclass(value):
            sizes.append(row_length(value))
        elif item.name in _SEQUENCES:
            sizes.append(len(value))
    return max(sizes, default=0)


def _blank(task: str) -> Any:
    """A row whose every token is a target; to be stretched."""
    from engine.tasks import classification, preference, seq2seq
    from engine.tasks.sequences import Tokens

    text = Tokens((0,), (True,))
    rows: dict[str, Any] = {
        "causal_lm": text,
        "preference": preference.Pair(text, text),
        "seq2seq": seq2seq.Pair((0,), (0,)),
        "classification": classification.Labelled((0,), (0,)),
    }
    return rows[task]
