"""Encoder-decoder models (T5 and its family): a source text in, a target text out (translation, summaries)."""

from __future__ import annotations

import json
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engine.adapters.base import TaskType
from engine.checkpoint import write_text
from engine.errors import CheckpointError, ConfigError, DataError
from engine.kernels.loss import token_losses
from engine.records import numbers
from engine.tasks.base import Batch, Encoded, Loaded, LossSum, Progress, Sequenced, sequenced
from engine.tasks.tokenising import ids_of, tokenised
from engine.train.job import JobSpec, TrainingSpec

IGNORED = -100
PREFIX = "prefix.json"


@dataclass(frozen=True)
class Pair:
    """One row: the token ids of both sides, each closed by the tokenizer's end token."""

    source: tuple[int, ...]
    target: tuple[int, ...]


PAIR = numbers("ii", lambda row: (row.source, row.target), Pair)


@dataclass(frozen=True)
class Seq2Seq:
    """The task's record and its options.

    Attributes:
        prefix: what stands before each source, such as `summarize: `. `{source}` and `{target}` in it are replaced by
            the options of these names (`translate {source} to {target}: `), `{text}` by the source where it is not to
            stand at the end.
        source: the language or style of the sources, for the prefix.
        target: that of the targets, for the prefix.
        beams: beams of a sample's search; 1 is greedy.
        max_new_tokens: most tokens of a sample.
    """

    prefix: str = ""
    source: str = ""
    target: str = ""
    beams: int = 4
    max_new_tokens: int = 64

    name: ClassVar[str] = "seq2seq"
    task_type: ClassVar[TaskType | None] = TaskType.SEQ_2_SEQ_LM
    formats: ClassVar[tuple[str, ...]] = ("parallel",)
    text_metrics: ClassVar[tuple[str, ...]] = ("perplexity", "exact_match", "chrf", "bleu")

    def __post_init__(self) -> None:
        found = [
            f"{name} is {value!r}; needed: text"
            for name, value in (("prefix", self.prefix), ("source", self.source), ("target", self.target))
            if not isinstance(value, str)
        ]
        for name, value, most in (("beams", self.beams, 32), ("max_new_tokens", self.max_new_tokens, 4096)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                found.append(f"{name} is {value!r}; needed: a whole number from 1 to {most}")
        found = found or self._prefix_faults()
        if found:
            raise ConfigError(
                "These options of the task seq2seq cannot be used:\n" + "\n".join(f"- {fault}" for fault in found)
            )

    def _prefix_faults(self) -> list[str]:
        try:
            parts = list(string.Formatter().parse(self.prefix))
        except ValueError as error:
            return [f"prefix is {self.prefix!r}: {error}; write {{{{ and }}}} for braces that mean themselves"]
        found = []
        fields = [name for _, name, _, _ in parts if name is not None]
        for name in dict.fromkeys(fields):
            if name not in ("source", "target", "text"):
                found.append(f"prefix has {{{name}}}; needed: only {{source}}, {{target}} and {{text}} in braces")
            elif name != "text" and not getattr(self, name):
                found.append(f"prefix has {{{name}}}, and the option {name} is empty; name a language or style there")
        if any(form or turned for _, name, form, turned in parts if name is not None):
            found.append(f"prefix is {self.prefix!r}; needed: nothing but the name within braces")
        if fields.count("text") > 1:
            found.append("prefix has {text} more than once")
        return found

    def asked(self, text: str) -> str:
        """A source as the model reads it, with the prefix."""
        filled = self.prefix.format(source=self.source, target=self.target, text=text)
        return filled if "text" in [name for _, name, _, _ in string.Formatter().parse(self.prefix)] else filled + text

    def load(self, spec: JobSpec, device: torch.device, on_progress: Progress) -> Loaded:
        from engine.models.encoder_decoder import load_seq2seq_lm

        return Loaded(
            *load_seq2seq_lm(
                spec.model,
                quantization=spec.quantization,
                precision=spec.training.precision,
                device=device,
                on_progress=on_progress,
            )
        )

    def encode(
        self, examples: Sequence[Mapping[str, Any]], loaded: Loaded, training: TrainingSpec, on_progress: Progress
    ) -> Encoded:
        """Rows with each side cut to `max_length`, the end token kept; the notes say how many were cut or left out.

        Raises:
            DataError: no row has both a source and a target.
        """
        limit = _limit(loaded.model, training.max_length)
        tokenizer, end = loaded.processor, loaded.processor.eos_token_id

        def encode(part: Sequence[Mapping[str, Any]], counts: Counter[str]) -> Iterator[Pair]:
            both = [(str(example["source"]), str(example["target"])) for example in part]
            full = [(source, target) for source, target in both if source.strip() and target.strip()]
            counts["empty"] += len(both) - len(full)
            for ids, labels in self._whole(full, tokenizer):
                counts["cut"] += max(len(ids), len(labels)) > limit
                yield Pair(_shortened(ids, limit, end), _shortened(labels, limit, end))

        words = {"prefix": self.prefix, "source": self.source, "target": self.target}
        settings = {"task": self.name, "limit": limit, **words}
        rows, counts = tokenised(examples, loaded, PAIR, encode, settings, on_progress)
        cut, empty = counts["cut"], counts["empty"]
        if not rows:
            raise DataError(
                f"None of the {len(examples)} rows has both a source and a target.",
                "Check which columns hold them (data.columns).",
            )
        notes = []
        if cut:
            notes.append(f"{cut} of {len(examples)} rows have a side longer than {limit} tokens, which was cut.")
        if empty:
            notes.append(f"{empty} rows were left out: their source or target is empty.")
        return Encoded(rows, tuple(notes))

    def _whole(self, full: Sequence[tuple[str, str]], tokenizer: Any) -> Iterator[tuple[list[int], list[int]]]:
        """The ids of both sides of each pair, uncut."""
        sources = ids_of(tokenizer, [self.asked(source) for source, _ in full])
        options = {"text_target": [target for _, target in full]}
        return zip(sources, tokenizer(**options)["input_ids"] if full else [], strict=True)

    def shown(
        self, examples: Sequence[Mapping[str, Any]], loaded: Loaded, training: TrainingSpec
    ) -> Iterator[list[Sequenced]]:
        limit = _limit(loaded.model, training.max_length)
        tokenizer, end = loaded.processor, loaded.processor.eos_token_id
        for both in self._whole([(str(one["source"]), str(one["target"])) for one in examples], tokenizer):
            yield [
                sequenced(ids, (side == "target",) * len(ids), _shortened(ids, limit, end), limit, tokenizer, side)
                for ids, side in zip(both, ("source", "target"), strict=True)
            ]

    def length(self, row: Pair) -> int:
        """What a row costs, so that rows of like cost can stand in one batch."""
        return len(row.source) + len(row.target)

    def collator(self, loaded: Loaded) -> Callable[[list[Pair]], Batch]:
        base = _base(loaded.model)
        pad = loaded.processor.pad_token_id

        def collate(rows: list[Pair]) -> Batch:
            ids = _block([row.source for row in rows], pad)
            labels = _block([row.target for row in rows], IGNORED)
            # By length, not by value: a tokenizer may pad with a token that also stands in texts.
            mask = _block([(1,) * len(row.source) for row in rows], 0)
            # Models shift with the pad token where a label is ignored.
            shifted = base.prepare_decoder_input_ids_from_labels(labels=labels)
            return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": shifted, "labels": labels}

        return collate

    def targets(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def tokens(self, batch: Batch) -> int:
        return int(batch["attention_mask"].sum()) + self.targets(batch)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Cross-entropy summed over the targets' tokens, in float32."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        labels = batch["labels"]
        kept = labels != IGNORED
        # Virtual tokens stand before the decoder's own in some methods.
        losses = token_losses(
            model,
            lambda: model(**inputs, use_cache=False),
            lambda values: values[:, -labels.shape[1] :][kept],
            labels[kept],
        )
        return LossSum(losses.sum(), int(losses.numel()))

    def reference(self, example: Mapping[str, Any]) -> tuple[str, str] | None:
        """The source and its target, for metrics of texts."""
        return str(example["source"]), str(example["target"])

    def save(self, folder: Path) -> None:
        """Write the words before each source beside an adapter, so that prompts get them later too."""
        if self.prefix:
            words = {"prefix": self.prefix, "source": self.source, "target": self.target}
            write_text(folder / PREFIX, json.dumps(words, ensure_ascii=False, indent=1))

    def restored(self, folder: Path) -> Seq2Seq:
        """The task with the words that an adapter was trained with; without them where its folder has none.

        Raises:
            CheckpointError: the file is damaged.
        """
        if not (folder / PREFIX).is_file():
            return Seq2Seq()
        try:
            words = json.loads((folder / PREFIX).read_text(encoding="utf-8"))
            return Seq2Seq(prefix=words["prefix"], source=words["source"], target=words["target"])
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(
                f"{folder / PREFIX} cannot be read: {error}.", "Take it away to give prompts as they are."
            ) from error

    def sample(self, model: nn.Module, loaded: Loaded, prompt: str) -> str:
        """The best beam's answer to a source, which gets the prefix."""
        from engine.generation import Sampling
        from engine.seq2seq import write

        sampling = Sampling(max_new_tokens=self.max_new_tokens, temperature=0, beams=self.beams)
        return write(model, loaded.processor, self.asked(prompt), sampling)[0]


TASK = Seq2Seq()


def _base(model: nn.Module) -> Any:
    find: Any = getattr(model, "get_base_model", None)
    return find() if find else model


def _limit(model: nn.Module, wanted: int) -> int:
    """Tokens of one side: what was asked for, or less where the model's positions end earlier."""
    from engine.seq2seq import positions

    room = positions(_base(model).config)
    virtual: Any = getattr(model, "virtual_tokens", None)
    return wanted if room is None else min(wanted, room - (virtual() if virtual else 0))


def _shortened(ids: Sequence[int], limit: int, end: int | None) -> tuple[int, ...]:
    if len(ids) <= limit:
        return tuple(ids)
    # Without the end token the decoder would learn to go on for ever.
    return tuple(ids[:limit]) if end is None else (*ids[: limit - 1], end)


def _block(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
