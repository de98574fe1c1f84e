"""Predict a job's peak, the largest batch within a budget, and what to change where it does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.memory.prediction import Prediction
from engine.train.job import JobSpec

if TYPE_CHECKING:
    from engine.memory.rows import Rows

TASKS = ("causal_lm", "preference", "seq2seq", "classification")
"""The tasks whose memory can be predicted."""

MOST_ROWS = 4096
"""No larger batch is looked for."""

OVERHEAD = 390_000_000


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


class Job:
    """One job's predictions, its rows and its model made once.

    Raises:
        PredictionError, EngineError: as `predict`.
    """

    def __init__(self, spec: JobSpec, device: str = "cpu", rows: Any = None) -> None:
        from engine.memory import rows as reading
        from engine.memory.shapes import PredictionError, shaped
        from engine.tasks import get_task

        if spec.task not in TASKS:
            raise PredictionError(
                f"The memory of the task {spec.task} cannot be predicted yet; it can for {', '.join(TASKS)}.",
                "Start with a batch of 1, and raise it while the machine has room.",
            )
        self.spec, self.device = spec, device
        self.rows = rows or reading.read(spec, get_task(spec.task, spec.options))
        self.model = shaped(spec, self.rows.task, device)
        self.encoded = reading.encoded(self.rows, self.model.loaded, spec)
        self._found: dict[tuple[int, int | None], Prediction] = {}

    def predict(self, batch_size: int | None = None, length: int | None = None) -> Prediction:
        """As `predict`."""
        from engine.memory.rows import heaviest

        key = (batch_size or self.spec.training.batch_size, length)
        if key not in self._found:
            training = dataclasses.replace(self.spec.training, batch_size=key[0])
            spec = dataclasses.replace(self.spec, training=training)
            found = heaviest(self.rows.task, self.model.loaded, self.encoded, spec, length)
            self._found[key] = self._predicted(spec, found)
        return self._found[key]

    def _predicted(self, spec: JobSpec, found: Any) -> Prediction:
        from engine.memory.step import simulate

        peaks = [simulate(spec, self.rows.task, self.model, batch) for batch in found.batches]
        parts = max(peaks, key=lambda one: one.peak).at_peak
        overhead = OVERHEAD
        still = {name: peaks[0].live[name] for name in ("weights", "adapter", "optimizer")}
        trained = sum(p.numel() * p.element_size() for p in self.model.trainee.parameters().values())
        return Prediction(
            **{name: int(parts[name]) for name in ("weights", "adapter", "gradients", "optimizer", "activations", "logits")},
            overhead=overhead,
            peak_loading=overhead + still["weights"] + self.model.largest,
            peak_checkpoint=overhead + sum(still.values()) + still["optimizer"] + trained,
            batch_size=spec.training.batch_size,
            tokens=found.tokens,
            length=found.length,
            measured_rows=found.measured,
            device=self.device,
        )

    def largest_batch(self, budget: int) -> int:
        return 0


@dataclass(frozen=True)
class Remedy:
    changes: Mapping[str, Any]
    prediction: Prediction


def remedy(spec: JobSpec, budget: int, *, device: str = "cpu") -> Remedy | None:
    return None
