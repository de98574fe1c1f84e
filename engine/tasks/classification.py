"""Texts into labels: one of several (softmax) or any number of them (a sigmoid each).

Which labels there are is read from the rows before the model is loaded. The model's head starts at random, is trained
in full and saved with the adapter; the names lie beside it in `labels.json`, for PEFT's format has no place for them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from engine.adapters.base import TaskType
from engine.checkpoint import write_text
from engine.errors import CheckpointError, ConfigError, DataError
from engine.inject import HEADS
from engine.metrics import accuracy, macro_f1
from engine.records import numbers
from engine.tasks.base import Batch, Encoded, Loaded, LossSum, Progress, Sequenced, sequenced
from engine.tasks.tokenising import ids_of, tokenised
from engine.train.job import JobSpec, TrainingSpec

LABELS = "labels.json"
_MORE_CLASSES_THAN = 20
Example = Mapping[str, Any]


@dataclass(frozen=True)
class Labelled:
    """One row: token ids and the numbers of its labels."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


LABELLED = numbers("ii", lambda row: (row.ids, row.labels), Labelled)


@dataclass(frozen=True)
class Classification:
    """The task's options; `fitted` gives the task that knows its labels.

    Attributes:
        multi_label: `auto` (several labels at once if any row has none or several), `true` or `false`.
        labels: the names in the order of the model's outputs; those of the rows, sorted, when left out.
    """

    name: ClassVar[str] = "classification"
    task_type: ClassVar[TaskType | None] = TaskType.SEQ_CLS
    formats: ClassVar[tuple[str, ...]] = ("labels",)
    text_metrics: ClassVar[tuple[str, ...]] = ()

    multi_label: str | bool = "auto"
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.multi_label not in ("auto", True, False):
            raise ConfigError(f"options.multi_label is {self.multi_label!r}; needed: auto, true or false")
        names = self.labels
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
            raise ConfigError(
                f"options.labels is {names!r}; needed: a list of names as text",
                "Put labels that are numbers in quotes.",
            )
        if len(set(names)) != len(names) or len(names) == 1:
            raise ConfigError(f"options.labels is {list(names)!r}; needed: two or more different names")
        object.__setattr__(self, "labels", tuple(names))

    def fitted(self, train: Sequence[Example]) -> Classifier:
        """The task for the labels of these rows.

        Raises:
            DataError: there is one label only, as good as a label for each row, one number written in two ways, or rows
                with several labels where `multi_label` is false.
        """
        counts = Counter(label for example in train for label in example["labels"])
        _check_labels(counts, train)
        several = [example for example in train if len(example["labels"]) != 1]
        if several and self.multi_label is False:
            first = several[0]
            raise DataError(
                f"{len(several)} rows do not have exactly one label; the first, line {first.get('line', '?')}, has "
                f"{len(first['labels'])}.",
                "Leave multi_label out, or give each row one label.",
            )
        strange = [label for label in counts if self.labels and label not in self.labels]
        if strange:
            raise DataError(
                f"The rows have labels that options.labels does not name: {', '.join(map(repr, strange[:5]))}.",
                f"Named are {', '.join(map(repr, self.labels))}; add the others or correct the rows.",
            )
        sets = Counter(tuple(sorted(example["labels"])) for example in train)
        return Classifier(
            multi_label=self.multi_label,
            labels=self.labels or tuple(sorted(counts)),
            several=bool(several) if self.multi_label == "auto" else bool(self.multi_label),
            most_frequent=max(sorted(sets), key=lambda labels: sets[labels]),
        )

    def shown(self, examples: Sequence[Example], loaded: Loaded, training: TrainingSpec) -> Iterator[list[Sequenced]]:
        """The texts, of which no token is learned: what is learned is the class."""
        limit, tokenizer = _room(loaded.model, training.max_length), loaded.processor
        texts = [example["text"] for example in examples]
        for text, ids in zip(texts, ids_of(tokenizer, texts), strict=True):
            yield [sequenced(ids, (False,) * len(ids), _shortened(text, ids, limit, tokenizer), limit, tokenizer)]

    def restored(self, folder: Path) -> Classifier:
        """The task for the labels that an adapter was trained on.

        Raises:
            CheckpointError: the folder holds no readable `labels.json`.
        """
        try:
            raw = json.loads((folder / LABELS).read_text(encoding="utf-8"))
            labels, several = raw["labels"], raw["multi_label"]
            if not (isinstance(several, bool) and isinstance(labels, list) and all(isinstance(n, str) for n in labels)):
                raise ValueError("its labels are not a list of names")
            frequent = tuple(raw.get("most_frequent") or labels[:1])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder / LABELS} cannot be read: {error}.",
                "Give the adapter folder of a classification run, or write the file: the labels in the head's order.",
            ) from error
        return Classifier(self.multi_label, tuple(labels), several, frequent)


@dataclass(frozen=True)
class Classifier(Classification):
    """The task once its labels are known.

    Attributes:
        several: a row may have any number of labels.
        most_frequent: the labels of the most frequent kind of training row, which a base without a trained head is
            scored by.
    """

    several: bool = False
    most_frequent: tuple[str, ...] = ()

    def load(self, spec: JobSpec, device: torch.device, on_progress: Progress) -> Loaded:
        from engine.models.classifiers import load_classifier

        return Loaded(
            *load_classifier(
                spec.model,
                self.labels,
                heads=HEADS[TaskType.SEQ_CLS],
                multi_label=self.several,
                seed=spec.training.seed,
                saved=spec.adapter.get("modules_to_save") or (),
                quantization=spec.quantization,
                precision=spec.training.precision,
                device=device,
                on_progress=on_progress,
            )
        )

    def encode(
        self, examples: Sequence[Example], loaded: Loaded, training: TrainingSpec, on_progress: Progress
    ) -> Encoded:
        """Token ids cut to `max_length`; rows with a label that was not trained on are left out and told.

        Raises:
            DataError: no row is left.
        """
        places = {label: number for number, label in enumerate(self.labels)}
        limit = _room(loaded.model, training.max_length)
        tokenizer = loaded.processor

        def encode(part: Sequence[Example], counts: Counter[str]) -> Iterator[Labelled]:
            known = []
            for example in part:
                strange = [label for label in example["labels"] if label not in places]
                if strange:
                    counts["unknown:" + strange[0]] += 1
                else:
                    known.append(example)
            every = ids_of(tokenizer, [example["text"] for example in known])
            for example, ids in zip(known, every, strict=True):
                counts["cut"] += len(ids) > limit
                short = _shortened(example["text"], ids, limit, tokenizer)
                yield Labelled(short, tuple(sorted({places[label] for label in example["labels"]})))

        settings = {"task": self.name, "limit": limit, "labels": self.labels}
        rows, counts = tokenised(examples, loaded, LABELLED, encode, settings, on_progress)
        cut = counts["cut"]
        unknown = Counter({key[8:]: count for key, count in counts.items() if key.startswith("unknown:")})
        if not rows:
            raise DataError(
                f"None of the {len(examples)} rows has a label that occurs in training "
                f"({', '.join(map(repr, self.labels[:5]))}).",
                "Give each label several rows, or hold back fewer.",
            )
        notes = [f"{cut} of {len(examples)} rows are longer than {limit} tokens and were cut."] if cut else []
        if unknown:
            named = ", ".join(f"{label!r} ({count})" for label, count in unknown.most_common(5))
            notes.append(f"{unknown.total()} rows were left out: no training row has their label: {named}.")
        return Encoded(rows, tuple(notes))

    def collator(self, loaded: Loaded) -> Callable[[list[Labelled]], Batch]:
        pad = loaded.processor.pad_token_id
        return lambda rows: self._pad(rows, pad)

    def _pad(self, rows: Sequence[Labelled], pad: int) -> Batch:
        """`input_ids` and `attention_mask` (N, T) padded on the right; `targets` (N,), with several labels (N, C)."""
        width = max(len(row.ids) for row in rows)
        if self.several:
            targets = torch.zeros(len(rows), len(self.labels))
            for number, row in enumerate(rows):
                targets[number, list(row.labels)] = 1
        else:
            targets = torch.tensor([row.labels[0] for row in rows])
        return {
            "input_ids": torch.tensor([[*row.ids, *[pad] * (width - len(row.ids))] for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows]),
            "targets": targets,
        }

    def targets(self, batch: Batch) -> int:
        return len(batch["targets"])

    def tokens(self, batch: Batch) -> int:
        return int(batch["attention_mask"].sum())

    def length(self, row: Labelled) -> int:
        return len(row.ids)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Cross-entropy, or binary cross-entropy averaged over the labels, summed over the rows, in float32."""
        targets = batch["targets"]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        if self.several:
            total = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1).sum()
        else:
            total = F.cross_entropy(logits, targets, reduction="sum")
        # Reading the answers back stops an accelerator, so only evaluations do.
        outcome = None if torch.is_grad_enabled() else (self._chosen(targets, logits=False), self._chosen(logits))
        return LossSum(total, len(targets), outcome)

    def _chosen(self, values: Tensor, logits: bool = True) -> list[frozenset[int]]:
        """The labels of each row, by number, of logits or of targets."""
        if self.several:
            chosen = values > (0.0 if logits else 0.5)
            return [frozenset(n for n, yes in enumerate(row) if yes) for row in chosen.tolist()]
        return [frozenset([number]) for number in (values.argmax(-1) if logits else values).tolist()]

    def metrics(self, outcomes: Sequence[Any]) -> dict[str, float]:
        """Accuracy and macro F1 over the batches' outcomes."""
        wanted = [labels for outcome in outcomes for labels in outcome[0]]
        got = [labels for outcome in outcomes for labels in outcome[1]]
        return {"accuracy": accuracy(wanted, got), "macro_f1": macro_f1(wanted, got)}

    def baseline(self, rows: Sequence[Labelled]) -> tuple[dict[str, float], str, str]:
        """Metrics of the base, its one answer, and a sentence why: a random head's own answers would say nothing."""
        wanted = [frozenset(row.labels) for row in rows]
        known = frozenset(self.labels.index(label) for label in self.most_frequent)
        always = [known] * len(rows)
        answer = ", ".join(self.most_frequent) or "no label"
        note = f"The base's head is untrained: it is scored as always answering the most frequent label, {answer!r}."
        return {"accuracy": accuracy(wanted, always), "macro_f1": macro_f1(wanted, always)}, answer, note

    def reference(self, example: Example) -> tuple[str, str]:
        return example["text"], ", ".join(example["labels"]) or "no label"

    @torch.no_grad()
    def sample(self, model: nn.Module, loaded: Loaded, prompt: str) -> str:
        """The label with its probability (`spam (97 %)`); with several at once, each that is likelier than not."""
        limit = _room(loaded.model, 1 << 20)
        encoded = loaded.processor(prompt, truncation=True, max_length=limit, return_tensors="pt")
        device = next(model.parameters()).device
        training = model.training
        model.eval()
        try:
            inputs = {key: encoded[key].to(device) for key in ("input_ids", "attention_mask")}
            logits = model(**inputs).logits[0].float()
        finally:
            model.train(training)
        chances = (logits.sigmoid() if self.several else logits.softmax(-1)).tolist()
        order = sorted(range(len(chances)), key=lambda number: -chances[number])
        shown = [number for number in order if chances[number] > 0.5] if self.several else order[:1]
        words = [f"{self.labels[number]} ({chances[number]:.0%})" for number in shown]
        return ", ".join(words) or f"no label (nearest: {self.labels[order[0]]}, {chances[order[0]]:.0%})"

    def save(self, folder: Path) -> None:
        """Write the labels beside an adapter."""
        plain = {"labels": self.labels, "multi_label": self.several, "most_frequent": self.most_frequent}
        write_text(folder / LABELS, json.dumps(plain, ensure_ascii=False, indent=1))


TASK = Classification()


def _shortened(text: str, ids: Sequence[int], limit: int, tokenizer: Any) -> tuple[int, ...]:
    """The ids within the limit, as the tokenizer cuts: what it puts at the end stays there."""
    if len(ids) <= limit:
        return tuple(ids)
    return tuple(tokenizer(text, truncation=True, max_length=limit)["input_ids"])


def _room(model: nn.Module, wanted: int) -> int:
    """Tokens of a row's own: no more than wanted, and than the model takes beside virtual tokens."""
    from engine.models.loading import context_length

    config: Any = model.config
    context = context_length(config)
    count: Any = getattr(model, "virtual_tokens", None)
    return min(wanted, context - (count() if count else 0)) if context else wanted


def _check_labels(counts: Mapping[str, int], train: Sequence[Example]) -> None:
    rows = len(train)
    # One label that some rows have and others lack can be learned too.
    if len({frozenset(example["labels"]) for example in train}) < 2:
        raise DataError(
            f"All {rows} training rows have the label {next(iter(counts), 'none')!r}; needed: two labels or more.",
            "Add rows of another label, or check which column holds the labels.",
        )
    if len(counts) > _MORE_CLASSES_THAN and len(counts) > rows / 2:
        numbers = all(_number(label) is not None for label in counts)
        said = f"The {rows} training rows have {len(counts)} different labels, nearly one for each row."
        raise DataError(
            f"{said} All are numbers: this looks like a quantity, not a label." if numbers else said,
            "Check which column holds the labels, or replace the numbers by a few ranges with names."
            if numbers
            else "Check which column holds the labels; a label needs several rows.",
        )
    written: dict[float, str] = {}
    for label in sorted(counts):
        number = _number(label)
        if number is not None and written.setdefault(number, label) != label:
            raise DataError(
                f"The labels {written[number]!r} and {label!r} are the same number written in two ways.",
                "Write it the same way in every row.",
            )


def _number(label: str) -> float | None:
    try:
        return float(label)
    except ValueError:
        return None
