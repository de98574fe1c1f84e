"""What a task gives the one training loop: how to load, encode, collate, score and sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from engine.adapters.base import TaskType
from engine.train.job import JobSpec, TrainingSpec

if TYPE_CHECKING:
    from engine.model import PeftModel

Progress = Callable[[str, float | None, str], None]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Loaded:
    """A base model with what turns rows into its inputs.

    `cache` is a folder of the run for what a task computes once, before training; None: nothing is kept.
    """

    model: nn.Module
    processor: Any
    cache: Path | None = None


@dataclass(frozen=True)
class Encoded:
    """Rows as the model takes them, and what was cut or left out, in words."""

    rows: Sequence[Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LossSum:
    """The loss summed over `count` targets, so that any split into batches gives the same mean.

    `outcome` is what the task's `metrics` wants of this batch, if it has any.
    """

    total: Tensor
    count: int
    outcome: Any = None


@dataclass(frozen=True)
class Sequenced:
    """One sequence of tokens that a row is to the model, before anything of it is cut.

    Attributes:
        ids: token ids.
        learned: for each, whether the loss counts it where it is kept.
        lost: the tokens that are cut, from the first to before the last; (n, n) where none is.
        limit: the most tokens that are kept.
        part: which of the row's sequences it is (`source`, `chosen`, ...), "" of an only one.
        tokenizer: what the ids are of.
    """

    ids: tuple[int, ...]
    learned: tuple[bool, ...]
    lost: tuple[int, int]
    limit: int
    part: str
    tokenizer: Any

    @property
    def targets(self) -> int:
        """How many tokens the loss counts, after the cut."""
        start, stop = self.lost
        return sum(self.learned[:start]) + sum(self.learned[stop:])


def sequenced(
    ids: Sequence[int], learned: Sequence[bool], kept: Sequence[int], limit: int, tokenizer: Any, part: str = ""
) -> Sequenced:
    """A sequence and what is cut of it; `kept` are the ids of the row that is trained on, at most `limit`."""
    start = next((n for n, (one, other) in enumerate(zip(ids, kept, strict=False)) if one != other), len(kept))
    return Sequenced(tuple(ids), tuple(learned), (start, len(ids) - (len(kept) - start)), limit, part, tokenizer)


class Task(Protocol):
    """One kind of training. A task is one file, and knows no other task.

    It is a frozen dataclass; its fields are the task's own options in a job (`options: {beta: 0.1}`), checked in its
    `__post_init__` (a ConfigError names the option, the value and what was needed).

    A task whose batches all have one shape says `one_shape: ClassVar[bool] = True`.
    """

    name: ClassVar[str]
    task_type: ClassVar[TaskType | None]
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

    def sample(self, model: nn.Module, loaded: Loaded, prompt: str) -> Any:
        """The answer to a prompt: text, or a picture (PIL)."""


@runtime_checkable
class Measured(Protocol):
    """A task that says more of an evaluation than its loss."""

    def metrics(self, outcomes: Sequence[Any]) -> dict[str, float]:
        """Metric -> value, from the `outcome` of every batch."""


@runtime_checkable
class Fitting(Protocol):
    """A task whose model depends on the rows, as a classifier's head does on the labels."""

    def fitted(self, train: Sequence[Mapping[str, Any]]) -> Task:
        """The task for these training rows; a DataError says why they cannot be learned from."""

    def restored(self, folder: Path) -> Task:
        """The task that an adapter in `folder` was trained for."""


@runtime_checkable
class Keeping(Protocol):
    """A task that writes files of its own beside an adapter."""

    def save(self, folder: Path) -> None: ...


@runtime_checkable
class Showing(Protocol):
    """A task that shows rows as the tokens that `encode` makes of them."""

    def shown(
        self, examples: Sequence[Mapping[str, Any]], loaded: Loaded, training: TrainingSpec
    ) -> Iterator[list[Sequenced]]:
        """The sequences of each example, in their order.

        Args:
            examples: rows of `engine.data`.
            loaded: its processor, and a model of which only `config` is asked.
            training: its `max_length` and `loss_on` count.
        """


@runtime_checkable
class Prompting(Protocol):
    """A task whose prompts are pictures: those of rows that are held back, where the job names none."""

    def prompts(self, held: Sequence[Mapping[str, Any]]) -> list[str]: ...


@runtime_checkable
class Extending(Protocol):
    """A task that adds rows of its own to those that are trained on."""

    def extra(self, loaded: Loaded, on_progress: Progress) -> list[Any]: ...


@runtime_checkable
class Joining(Protocol):
    """A task that may train other models beside its own, with adapters of the same method."""

    @property
    def joins(self) -> bool:
        """Whether it does so, with the options that it has."""

    def together(self, loaded: Loaded, model: PeftModel, folder: Path | None = None) -> nn.Module:
        """The adapted model with the others as one (`engine.joined`), or alone.

        Args:
            loaded: as `load` gave it.
            model: the task's own, adapted.
            folder: an adapter's, from which the others take theirs; None: they get new ones.

        Raises:
            ConfigError: the others cannot have an adapter of this method.
            CheckpointError: the folder has none for one of them.
        """


@runtime_checkable
class Exporting(Protocol):
    """A task that writes an adapter in another format too, beside PEFT's."""

    def export(self, model: nn.Module, folder: Path) -> None: ...


@runtime_checkable
class Baseline(Protocol):
    """A task whose base cannot answer before it is trained."""

    def baseline(self, rows: Sequence[Any]) -> tuple[dict[str, float], str, str]:
        """What stands for the base on encoded rows: metrics, the one answer that it gives, and why, in a sentence."""


@runtime_checkable
class Answering(Protocol):
    """A task whose answers can be held against the rows' own.

    `text_metrics` names those of `engine.metrics.TEXT_METRICS` that are worked out from generated answers, and
    `perplexity` where exp(loss) is one.
    """

    text_metrics: ClassVar[tuple[str, ...]]

    def reference(self, example: Mapping[str, Any]) -> tuple[str, str] | None:
        """A row's prompt and the wanted answer; None where it has no single one."""


def metrics_of(task: Task, outcomes: Sequence[Any]) -> dict[str, float]:
    """The task's metrics of an evaluation; none where it has none."""
    return task.metrics(outcomes) if isinstance(task, Measured) else {}
