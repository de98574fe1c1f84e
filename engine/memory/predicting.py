"""Predict a job's peak, the largest batch within a budget, and what to change where it does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine import threads
from engine.errors import ConfigError
from engine.memory.machine import overhead, products, slack
from engine.memory.prediction import PARTS, Prediction
from engine.train.job import JobSpec, TrainingSpec, changed

if TYPE_CHECKING:
    from engine.memory.rows import Heaviest, Rows

TASKS = ("causal_lm", "preference", "seq2seq", "classification")
"""The tasks whose memory can be predicted."""

MOST_ROWS = 4096
"""No larger batch is looked for."""


class PredictionError(ConfigError):
    """The memory of this job cannot be predicted."""

    code = "prediction"


def predict(
    spec: JobSpec, *, device: str = "cpu", batch_size: int | None = None, length: int | None = None
) -> Prediction:
    """The peak memory of a job, from a model without data: two optimizer steps over its heaviest batch.

    Args:
        spec: the job.
        device: `cpu` or `cuda`.
        batch_size: instead of the job's own.
        length: tokens of every row; left out: the job's rows as they are, where they can be read, else `max_length`.

    Raises:
        PredictionError: a task that this cannot follow.
        EngineError: as the training itself would, for a model, an adapter or a task's options that cannot work.
    """
    return Job(spec, device).predict(batch_size, length)


def largest_batch(spec: JobSpec, budget_bytes: int, *, device: str = "cpu") -> int:
    """The most rows in a batch with which the job's peak is within the budget; 0 where not even one row is.

    No more than the job has rows to fill a batch with, and than `MOST_ROWS`.
    """
    return Job(spec, device).largest_batch(budget_bytes)


@dataclass(frozen=True)
class Remedy:
    """A change with which a job fits.

    Attributes:
        changes: key of the job -> its new value, such as `{"training.batch_size": 2, "quantization": "nf4"}`.
        prediction: of the changed job.
    """

    changes: Mapping[str, Any]
    prediction: Prediction

    def words(self) -> str:
        """The changes as a person would write them: `training.batch_size: 2, quantization: nf4`."""
        return ", ".join(
            f"{key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in self.changes.items()
        )


def remedy(spec: JobSpec, budget: int, *, device: str = "cpu") -> Remedy | None:
    """The first change that brings a job's peak within `budget` bytes; None if none of them does.

    They come in the order of what they cost: smaller batches with as many rows in a step, which learn the same;
    gradient checkpointing, which takes time; another optimizer; a base in 4 bits, which changes the result; and these
    together.
    """
    return Job(spec, device).remedy(budget)


class Job:
    """One job's predictions, its rows and its model made once.

    Args:
        like: a job over the same rows, to take them from.
        whole: run all blocks of the model, where four would do (`engine.memory.depth`); for comparison.

    Raises:
        PredictionError, EngineError: as `predict`.
    """

    def __init__(self, spec: JobSpec, device: str = "cpu", like: Job | None = None, whole: bool = False) -> None:
        from engine.memory import rows as reading
        from engine.memory.shapes import shaped
        from engine.memory.step import Simulation
        from engine.tasks import get_task

        if spec.task not in TASKS:
            raise PredictionError(
                f"The memory of the task {spec.task} cannot be predicted yet; it can for {', '.join(TASKS)}.",
                "Start with a batch of 1, and raise it while the machine has room.",
            )
        self.spec, self.device = spec, device
        known = (like.rows, like.encoded) if like else reading.remembered(spec)
        self.rows: Rows = known[0] if known else reading.read(spec, get_task(spec.task, spec.options))
        self.model = shaped(spec, self.rows.task, device)
        self.encoded: Sequence[Any] = known[1] if known else reading.encoded(self.rows, self.model.loaded, spec)
        reading.remember(spec, self.rows, self.encoded)
        self.simulation = Simulation(spec, self.rows.task, self.model, device, whole)
        self._found: dict[tuple[int, int | None], Prediction] = {}

    def predict(self, batch_size: int | None = None, length: int | None = None) -> Prediction:
        """As `predict`."""
        from engine.memory.rows import heaviest

        key = (batch_size or self.spec.training.batch_size, length)
        if key not in self._found:
            spec = changed(self.spec, {"training.batch_size": key[0]})
            # Whoever makes batches may ask the model what it takes, which each of its blocks tells.
            with self.simulation.shortened():
                found = heaviest(self.rows.task, self.model.loaded, self.encoded, spec, length)
            self._found[key] = self._predicted(spec, found)
        return self._found[key]

    def largest_batch(self, budget: int) -> int:
        """As `largest_batch`."""
        most = min(MOST_ROWS, len(self.encoded) or MOST_ROWS)
        # What was asked before is known already.
        known = {size: found.peak for (size, length), found in self._found.items() if length is None and size <= most}
        fitting = max((size for size, peak in known.items() if peak <= budget), default=0)
        failing = min((size for size, peak in known.items() if size > fitting and peak > budget), default=most + 1)
        slow = 0
        while failing - fitting > 1:
            gap = failing - fitting
            # A straight line that twice left more than half of the gap is no good here: then the middle. Where nothing
            # failed yet there is no middle, and a batch of thousands takes long to follow.
            middle, slow = (True, 0) if slow == 2 else (False, slow)
            guess = (fitting + failing) // 2 if middle else _next_guess(known, fitting, failing, budget)
            known[guess] = self.predict(guess).peak
            if known[guess] <= budget:
                fitting = guess
            else:
                failing = guess
            slow = slow + 1 if failing in known and failing - fitting > gap // 2 else 0
        return fitting

    def remedy(self, budget: int) -> Remedy | None:
        """As `remedy`."""
        for changes in _candidates(self.spec):
            try:
                job = Job(changed(self.spec, changes), self.device, like=self) if changes else self
            except ConfigError:
                # A method that cannot stand on a quantised base, for example.
                continue
            for batch in _batches(self.spec.training):
                prediction = job.predict(batch["training.batch_size"])
                if prediction.peak <= budget and (changes or batch["training.batch_size"] != self._batch_size):
                    smaller = batch if batch["training.batch_size"] != self._batch_size else {}
                    return Remedy({**changes, **smaller}, prediction)
        return None

    @property
    def _batch_size(self) -> int:
        return self.spec.training.batch_size

    def _predicted(self, spec: JobSpec, found: Heaviest) -> Prediction:
        parts = max((self.simulation.peak(batch) for batch in found.batches), key=lambda one: sum(one.values()))
        state = self.simulation.state
        process = overhead(self.device, len(self.model.loaded.processor))
        working = process + products(self.device, self._lengths(found))
        # The loop writes none at its end; one on request (stop, pause) can come at any time, and is not counted.
        copies = state["optimizer"] + self.simulation.trained
        if found.steps is not None and found.steps <= spec.training.checkpoint_every:
            copies = 0
        converted = self.model.file_bytes if self.model.converted else 0
        return Prediction(
            **{name: int(parts[name]) for name in PARTS},
            slack=slack(
                parts,
                self.device,
                checkpointing=spec.training.gradient_checkpointing,
                layers=self.simulation.adapted,
                quantised=spec.quantization != "none",
            ),
            overhead=working,
            peak_loading=process + state["weights"] + converted,
            peak_checkpoint=working + sum(state.values()) + copies,
            batch_size=spec.training.batch_size,
            tokens=found.tokens,
            length=found.length,
            measured_rows=found.measured,
            device=self.device,
        )

    def _lengths(self, found: Heaviest) -> int:
        """Different lengths of batches whose products are in bfloat16; without rows to look at, more than are kept."""
        from engine.models.loading import dtype_of

        half = str(dtype_of(self.spec.training.precision, self.device)) == "torch.bfloat16"
        return (threads.SHAPES if found.lengths is None else found.lengths) if half else 0


def _candidates(spec: JobSpec) -> Iterator[dict[str, Any]]:
    """Changes beside the batch's size, from the cheapest on; none at all comes first."""
    checkpointing = {} if spec.training.gradient_checkpointing else {"training.gradient_checkpointing": True}
    adafactor = {} if spec.training.optimizer == "adafactor" else {"training.optimizer": "adafactor"}
    four = {"quantization": "nf4"} if not spec.full and spec.quantization in ("none", "int8") else {}
    seen: list[dict[str, Any]] = []
    for one in ({}, checkpointing, adafactor, {**checkpointing, **adafactor}, four, {**four, **checkpointing}):
        if one not in seen:
            seen.append(one)
            yield one


def _batches(training: TrainingSpec) -> Iterator[dict[str, int]]:
    """The batch as it is, and each smaller one with which a step has as many rows."""
    for size in range(training.batch_size, 0, -1):
        if training.batch_size % size == 0:
            times = training.gradient_accumulation * training.batch_size // size
            yield {"training.batch_size": size, "training.gradient_accumulation": times}


def _next_guess(known: Mapping[int, int], fitting: int, failing: int, budget: int) -> int:
    """Where a straight line through two known peaks meets the budget; between the bounds."""
    below = sorted(size for size in known if size <= fitting)
    above = sorted(size for size in known if size >= failing)
    pair = [*below[-1:], *above[:1]] if below and above else below[-2:] or above[:2]
    if not known:
        guess = 1
    elif len(pair) == 1:
        guess = 2 * pair[0] if below else pair[0] // 2
    else:
        low, high = pair
        slope = (known[high] - known[low]) / (high - low)
        guess = low + int((budget - known[low]) // slope) if slope > 0 else 2 * high
    return min(max(guess, fitting + 1), failing - 1)
