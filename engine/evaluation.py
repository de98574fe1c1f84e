"""Base against adapter on the same held-out rows: `python -m engine eval JOB --adapter DIR`.

The rows are those that the job's `eval_split` and `seed` hold back, so an adapter that this job trained has not seen
them. The base is the same model with the adapter switched off: no second copy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.data.errors import PictureError
from engine.data.images import PICTURES, open_picture
from engine.errors import CheckpointError, DataError
from engine.sheets import sheet, write_picture
from engine.tasks.base import Answering, Baseline, Fitting, Joining, Loaded, Progress, Task, metrics_of
from engine.train.events import Event, Recorder
from engine.train.job import JobSpec

ANSWERED = 64
Asked = tuple[int, str, str]
"""Line in the data, prompt, wanted answer."""


@dataclass
class Side:
    """What one of the two was found to be worth.

    Attributes:
        scores: metric -> (value, rows it was worked out on).
        answers: what it said to the rows that were asked.
        note: why a score is not the model's own, if so.
    """

    scores: dict[str, tuple[float, int]] = field(default_factory=dict)
    answers: list[Any] = field(default_factory=list)
    note: str = ""


def evaluate_job(
    spec: JobSpec,
    adapter: Path,
    on_progress: Progress,
    *,
    answered: int = ANSWERED,
    shown: int = 0,
    out: Path | None = None,
) -> Iterator[Event]:
    """Scores, and rows with both answers, as events.

    Args:
        spec: the job; its `data`, `task`, `model`, `options`, and of `training` the lengths, seed and precision count.
        adapter: the folder of an adapter; of a model, for a job of full fine-tuning.
        on_progress: told what is done.
        answered: at most so many rows are answered in words for metrics of texts (each takes a generation).
        shown: so many rows come with both answers.
        out: a folder for `sheet.png`, which shows these rows, and for answers that are pictures; without it, those are
            left out of the rows.

    Yields:
        `{"type": "score", "who": "base" | "adapter", "metric", "value", "rows"}`, with `note` where the base is stood
        in for; then `{"type": "row", "row", "prompt", "wanted", "base", "adapter"}`, `row` being the line in the data.

    Raises:
        DataError: the job holds no rows back, or none of them can be used.
        EngineError: the adapter, the base or the data cannot be read.
    """
    import torch

    from engine.model import PeftModel
    from engine.models.loading import default_device
    from engine.tasks import get_task
    from engine.train.worker import examples_of

    task, sink = get_task(spec.task, spec.options), Recorder()
    _, held = examples_of(spec, task, sink)
    yield from sink.of("warning")
    if not held:
        raise DataError(
            f"The job holds no rows back (data.eval_split is {spec.data.eval_split}), so there is nothing to score on.",
            "Set data.eval_split to 0.1, for example, and train again: rows that were trained on prove nothing.",
        )
    _check_result(spec, adapter)
    if isinstance(task, Fitting):
        task = task.restored(adapter)
    device = torch.device(default_device())
    loaded = task.load(spec, device, on_progress)
    if not spec.full:
        adapted = PeftModel.from_pretrained(loaded.model, adapter)
        loaded = replace(
            loaded, model=task.together(loaded, adapted, adapter) if isinstance(task, Joining) else adapted
        )
    encoded = task.encode(held, loaded, spec.training, on_progress)
    for note in encoded.notes:
        yield {"type": "warning", "message": note}
    asked = _asked(task, held, answered, shown)
    sides = {}
    for who in ("base", "adapter"):
        on_progress("scoring", None, f"Scoring the {who} on {len(encoded.rows)} rows")
        if spec.full and who == "adapter":
            # One of the two in memory at a time.
            del loaded
            loaded = task.load(replace(spec, model=str(adapter.resolve())), device, on_progress)
        off = who == "base" and not spec.full
        with loaded.model.disable_adapter() if off else nullcontext():  # type: ignore[operator]
            size = spec.training.batch_size
            sides[who] = score_side(task, loaded, encoded.rows, asked, size, answered, who, on_progress)
        for metric, (value, rows) in sides[who].scores.items():
            why = {"note": sides[who].note} if sides[who].note else {}
            yield {"type": "score", "who": who, "metric": metric, "value": value, "rows": rows, **why}
    table: list[list[Any]] = []
    for number, (line, prompt, wanted) in enumerate(asked[:shown]):
        both = {who: side.answers[number] for who, side in sides.items()}
        table.append([_seen(prompt), _seen(wanted), *both.values()])
        said = {who: _kept(answer, out, f"{number:03}-{who}.png") for who, answer in both.items()}
        yield {"type": "row", "row": line, "prompt": prompt, "wanted": wanted, **said}
    if out is not None and table:
        path = write_picture(sheet(["asked", "wanted", *sides], table), out / "sheet.png")
        yield {"type": "sheet", "file": str(path)}


def _seen(value: str) -> Any:
    """A picture for its reference, any other text as it is."""
    if not value.lower().endswith(PICTURES):
        return value
    try:
        return open_picture(value)
    except PictureError:
        return value


def _kept(answer: Any, out: Path | None, name: str) -> str:
    """An answer for an event: a text, or the file of a picture."""
    if isinstance(answer, str):
        return answer
    return str(write_picture(answer, out / name)) if out is not None else "(a picture)"


def _check_result(spec: JobSpec, folder: Path) -> None:
    what, mark = ("model", "config.json") if spec.full else ("adapter", "adapter_config.json")
    if not (folder / mark).is_file():
        raise CheckpointError(f"{folder} is no {what} folder.", f"Give the folder `{what}` of a run of this job.")


def score_side(
    task: Task,
    loaded: Loaded,
    rows: Sequence[Any],
    asked: Sequence[Asked],
    size: int,
    answered: int,
    who: str,
    on_progress: Progress,
) -> Side:
    """One pass over the encoded rows, then the answers, of which each is told as it begins."""
    side = Side()
    if who == "base" and isinstance(task, Baseline):
        found, answer, side.note = task.baseline(rows)
        side.scores = {name: (value, len(rows)) for name, value in found.items()}
        side.answers = [answer] * len(asked)
        return side
    loss, metrics = measure(task, loaded, rows, size)
    side.scores["loss"] = (loss, len(rows))
    names = task.text_metrics if isinstance(task, Answering) else ()
    if "perplexity" in names:
        # Beyond e^700 there is no float, and no meaning either.
        side.scores["perplexity"] = (math.exp(min(loss, 700.0)), len(rows))
    side.scores |= {name: (value, len(rows)) for name, value in metrics.items()}
    for number, (_, prompt, _) in enumerate(asked):
        on_progress("scoring", number / len(asked), f"The {who} answers row {number + 1} of {len(asked)}")
        side.answers.append(task.sample(loaded.model, loaded, prompt))
    told, spoken = asked[:answered], [name for name in names if name != "perplexity"]
    if spoken and told:
        from engine.metrics import text_scores

        found = text_scores(spoken, [wanted for _, _, wanted in told], side.answers[: len(told)])
        side.scores |= {name: (value, len(told)) for name, value in found.items()}
    return side


def measure(task: Task, loaded: Loaded, rows: Sequence[Any], size: int) -> tuple[float, dict[str, float]]:
    """The mean loss over the rows and the task's metrics, in batches of like length where the task tells lengths."""
    import torch

    model, collate = loaded.model, task.collator(loaded)
    device = next(model.parameters()).device
    length: Any = getattr(task, "length", None)
    ordered = sorted(rows, key=length) if length else list(rows)
    total, count, outcomes = 0.0, 0, []
    model.eval()
    with torch.no_grad():
        for batch in _batches(ordered, size):
            inputs = {key: value.to(device) for key, value in collate(batch).items()}
            part = task.loss(model, inputs)
            total, count = total + float(part.total), count + part.count
            outcomes.append(part.outcome)
    return total / count, metrics_of(task, outcomes)


def _asked(task: Task, held: Sequence[Mapping[str, Any]], answered: int, shown: int) -> list[Asked]:
    """The first rows that have one prompt and one answer, as many as are wanted."""
    if not isinstance(task, Answering):
        return []
    wanted = max(answered if set(task.text_metrics) - {"perplexity"} else 0, shown)
    pairs = ((example.get("line", 0), task.reference(example)) for example in held)
    return list(itertools.islice(((line, *pair) for line, pair in pairs if pair is not None), wanted))


def _batches(rows: list[Any], size: int) -> Iterator[list[Any]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))
