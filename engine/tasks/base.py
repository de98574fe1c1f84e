"""What a task gives the one training loop: how to load, encode, collate, score and sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from engine.adapters.base import TaskType
from engine.train.job import JobSpec, TrainingSpec

Progress = Callable[[str, float | None, str], None]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Loaded:
    """A base model with what turns rows into its inputs."""

    model: nn.Module
    processor: Any


@dataclass(frozen=True)
class Encoded:
    """Rows as the model takes them, and what was cut or left out, in words."""

    rows: list[Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LossSum:
    """The loss summed over `count` targets, so that any split into batches gives the same mean."""

    total: Tensor
    count: int


class Task(Protocol):
    """One kind of training. A task is one file, and knows no other task.

    It is a frozen dataclass; its fields are the task's own options in a job (`options: {beta: 0.1}`), checked in its
    `__post_init__` (a ConfigError names the option, the value and what was needed).
    """

    name: ClassVar[str]
    task_type: ClassVar[TaskType]
    formats: ClassVar[tuple[str, ...]]
    """The data formats that it takes (`engine.data.formats`)."""

    def load(self, spec: JobSpec, device: torch.device, on_progress: Progress) -> Loaded:
        """The job's base (`spec.model`, `spec.quantization`, `spec.training.precision`) on `device`."""

    def encode(
        self, examples: Sequence[Mapping[str, Any]], loaded: Loaded, training: TrainingSpec, on_progress: Progress
    ) -> Encoded: ...

    def collator(self, loaded: Loaded) -> Callable[[list[Any]], Batch]:
        """What makes a batch of rows; it may probe the model once for the layout it can take."""

    def targets(self, batch: Batch) -> int:
        """How many targets the batch's loss will be summed over."""

    def tokens(self, batch: Batch) -> int:
        """How many tokens the model reads for it."""

    def loss(self, model: nn.Module, batch: Batch) -> LossSum: ...

    def sample(self, model: nn.Module, loaded: Loaded, prompt: str) -> str: ...
