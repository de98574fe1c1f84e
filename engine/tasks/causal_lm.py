"""Chat and text models: next-token prediction, on the answers only unless told otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, ClassVar

import torch
from torch import nn

from engine.adapters.base import TaskType
from engine.errors import ConfigError, DataError
from engine.tasks.base import Batch, Encoded, Loaded, LossSum, Progress, Sequenced, sequenced
from engine.tasks.sequences import (
    TOKENS,
    Spans,
    answer_text,
    answered,
    batcher,
    load_decoder,
    render,
    room,
    spans_of,
    target_losses,
    tokens_in,
    tokens_of,
)
from engine.tasks.sequences import Tokens as Tokens
from engine.tasks.sequences import keeps_rows_apart as keeps_rows_apart
from engine.tasks.sequences import pack as pack
from engine.tasks.sequences import pad_rows as pad_rows
from engine.tasks.tokenising import tokenised
from engine.train.job import JobSpec, TrainingSpec


@dataclass(frozen=True)
class CausalLM:
    """The task's record and its options.

    Attributes:
        temperature: of samples; 0 takes the likeliest token.
        max_new_tokens: most tokens of a sample.
    """

    temperature: float = 0.0
    max_new_tokens: int = 48

    name: ClassVar[str] = "causal_lm"
    task_type: ClassVar[TaskType | None] = TaskType.CAUSAL_LM
    formats: ClassVar[tuple[str, ...]] = ("messages", "alpaca", "sharegpt", "oasst", "prompt_completion", "text")
    text_metrics: ClassVar[tuple[str, ...]] = ("perplexity", "exact_match")

    def __post_init__(self) -> None:
        found = []
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, int | float):
            found.append(f"temperature is {self.temperature!r}; needed: a number from 0 to 5")
        elif not 0 <= self.temperature <= 5:
            found.append(f"temperature is {self.temperature}; needed: 0 to 5")
        most = self.max_new_tokens
        if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= 4096:
            found.append(f"max_new_tokens is {most!r}; needed: a whole number from 1 to 4096")
        if found:
            raise ConfigError(
                "These options of the task causal_lm cannot be used:\n" + "\n".join(f"- {fault}" for fault in found)
            )

    def load(self, spec: JobSpec, device: torch.device, on_progress: Progress) -> Loaded:
        return load_decoder(spec, device, on_progress)

    def encode(
        self, examples: Sequence[Mapping[str, Any]], loaded: Loaded, training: TrainingSpec, on_progress: Progress
    ) -> Encoded:
        """Rows with at least one target, cut to `max_length`; the notes say how many were cut or left out.

        Raises:
            DataError: no row is left.
        """
        limit = room(loaded, training)
        tokenizer, loss_on = loaded.processor, training.loss_on

        def encode(part: Sequence[Mapping[str, Any]], counts: Counter[str]) -> Iterator[Tokens]:
            for tokens in chain.from_iterable(_whole(part, tokenizer, loss_on)):
                counts["cut"] += len(tokens.ids) > limit
                short = tokens.cut(limit)
                counts["empty"] += not short.targets
                if short.targets:
                    yield short

        settings = {"task": self.name, "limit": limit, "loss_on": loss_on}
        rows, counts = tokenised(examples, loaded, TOKENS, encode, settings, on_progress)
        cut, empty = counts["cut"], counts["empty"]
        if not rows:
            raise DataError(
                f"None of the {len(examples)} rows has an answer within {limit} tokens.",
                "Raise max_length, or check which column holds the answers.",
            )
        notes = []
        if cut:
            notes.append(f"{cut} of {len(examples)} rows are longer than {limit} tokens and were cut.")
        if empty:
            notes.append(f"{empty} rows were left out: no answer within {limit} tokens.")
        return Encoded(rows, tuple(notes))

    def shown(
        self, examples: Sequence[Mapping[str, Any]], loaded: Loaded, training: TrainingSpec
    ) -> Iterator[list[Sequenced]]:
        limit, tokenizer = room(loaded, training), loaded.processor
        for rows in _whole(examples, tokenizer, training.loss_on):
            yield [sequenced(row.ids, (False, *row.learned[1:]), row.ids[:limit], limit, tokenizer) for row in rows]

    def collator(self, loaded: Loaded) -> Callable[[list[Tokens]], Batch]:
        return batcher(loaded)

    def targets(self, batch: Batch) -> int:
        return int(batch["targets"].numel())

    def tokens(self, batch: Batch) -> int:
        return tokens_in(batch)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Cross-entropy summed over the targets, in float32."""
        losses = target_losses(model, batch)
        return LossSum(losses.sum(), int(losses.numel()))

    def reference(self, example: Mapping[str, Any]) -> tuple[str, str] | None:
        """Question and answer, where the row is one question with one answer."""
        if "prompt" in example:
            return example["prompt"], example["completion"]
        turns = example.get("messages", ())
        if [turn["role"] for turn in turns] != ["user", "assistant"]:
            return None
        return turns[0]["content"], turns[1]["content"]

    def sample(self, model: nn.Module, loaded: Loaded, prompt: str) -> str:
        """The answer to a prompt, always from the same random numbers."""
        return answered(model, loaded, prompt, self.temperature, self.max_new_tokens)


TASK = CausalLM()


def _whole(part: Sequence[Mapping[str, Any]], tokenizer: Any, loss_on: str) -> list[list[Tokens]]:
    """The sequences of each example, uncut."""
    texts = [list(texts_of(example, tokenizer)) for example in part]
    every = iter(tokens_of(list(chain.from_iterable(texts)), tokenizer, loss_on))
    return [list(islice(every, len(own))) for own in texts]


def encode_example(example: Mapping[str, Any], tokenizer: Any, loss_on: str) -> Iterator[Tokens]:
    """One row of `engine.data` as tokens (`texts_of`)."""
    for text, spans in texts_of(example, tokenizer):
        yield spans_of(text, spans, tokenizer, loss_on)


def texts_of(example: Mapping[str, Any], tokenizer: Any) -> Iterator[tuple[str, Spans]]:
    """The texts that one row of `engine.data` is to the model, and what of them is learned.

    - `messages`: rendered by the chat template; targets are the assistant's words and the token that ends its turn.
    - `prompt`, `completion`: a user's and an assistant's message, in the form in which prompts are asked later.
    - `text`: every token is a target.
    """
    if "messages" in example:
        yield from _chat(example["messages"], tokenizer)
    elif "prompt" in example:
        roles = (
            {"role": "user", "content": example["prompt"]},
            {"role": "assistant", "content": example["completion"]},
        )
        yield from _chat(roles, tokenizer)
    else:
        yield example["text"] + (tokenizer.eos_token or ""), [(0, None)]


def _chat(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> Iterator[tuple[str, Spans]]:
    whole = render(tokenizer, messages)
    spans: Spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:number], answer_next=True)
        # Behind the last turn there is nothing more to render.
        after = whole if number == len(messages) - 1 else render(tokenizer, messages[: number + 1])
        if not (whole.startswith(before) and whole.startswith(after)):
            # A template that rewrites earlier turns (one that drops reasoning, say): each answer becomes its own row.
            yield from _turns_apart(messages, tokenizer)
            return
        spans.append((len(before), len(after.rstrip())))
    yield whole, spans


def _turns_apart(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> Iterator[tuple[str, Spans]]:
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            yield answer_text(messages[:number], message["content"], tokenizer)
