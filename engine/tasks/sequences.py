"""Sequences of tokens with targets among them: what the tasks on decoder models share.

A batch is one row of concatenated sequences with restarting position ids where the model keeps them apart (checked on
the model itself, once), so nothing is spent on padding; otherwise a padded block. Either way only the positions that
have a target go through the output layer, which for small models with large vocabularies is most of the work.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import DataError
from engine.kernels import packed
from engine.kernels.loss import token_losses
from engine.records import numbers
from engine.tasks.base import Batch, Loaded, Progress
from engine.train.job import JobSpec, TrainingSpec


@dataclass(frozen=True)
class Tokens:
    """One row: token ids, and for each whether the loss counts it."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]

    def cut(self, limit: int) -> Tokens:
        return Tokens(self.ids[:limit], self.learned[:limit])

    @property
    def targets(self) -> int:
        """The first token has nothing before it to be predicted from."""
        return sum(self.learned[1:])


def tokens_from(ids: tuple[int, ...], learned: tuple[int, ...]) -> Tokens:
    return Tokens(ids, tuple(map(bool, learned)))


TOKENS = numbers("ib", lambda row: (row.ids, row.learned), tokens_from)
"""How `Tokens` are kept: five bytes a token."""


def load_decoder(spec: JobSpec, device: torch.device, on_progress: Progress) -> Loaded:
    """The job's base and its tokenizer."""
    from engine.models.loading import load_causal_lm

    return Loaded(
        *load_causal_lm(
            spec.model,
            precision=spec.training.precision,
            quantization=spec.quantization,
            device=device,
            on_progress=on_progress,
        )
    )


def room(loaded: Loaded, training: TrainingSpec) -> int:
    """Tokens that a row may have: `max_length`, the model's context less its virtual tokens."""
    from engine.models.loading import context_length

    context = context_length(loaded.model.config)
    count: Any = getattr(loaded.model, "virtual_tokens", None)
    left = context - (count() if count else 0) if context else training.max_length
    return min(training.max_length, left)


Spans = list[tuple[int, int | None]]
"""Parts of a text from one character to another, or to its end."""


def answer_tokens(before: Sequence[Mapping[str, str]], answer: str, tokenizer: Any, loss_on: str = "answers") -> Tokens:
    """One answer after the turns before it, by the chat template; the answer and the token that ends it are learned."""
    return spans_of(*answer_text(before, answer, tokenizer), tokenizer, loss_on)


def answer_text(before: Sequence[Mapping[str, str]], answer: str, tokenizer: Any) -> tuple[str, Spans]:
    """The text of `answer_tokens`, and where its answer stands.

    Raises:
        DataError: the template rewrites answers.
    """
    start_text = render(tokenizer, before, answer_next=True)
    whole = render(tokenizer, [*before, {"role": "assistant", "content": answer}])
    start = len(start_text) if whole.startswith(start_text) else whole.rfind(answer.strip())
    if start < 0:
        raise DataError(
            "The model's chat template rewrites the answers, so they cannot be told from the questions.",
            "Use loss_on: all, or another base.",
        )
    return whole, [(start, len(whole.rstrip()))]


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]], answer_next: bool = False) -> str:
    """The conversation as text by the model's chat template; `answer_next` opens the assistant's turn.

    Raises:
        DataError: the template refuses the conversation (roles that do not alternate, for example).
    """
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer_next)
    except TemplateError as error:
        raise DataError(
            f"The model's chat template refuses this conversation: {error}.",
            "Start it with the user, and let user and assistant take turns.",
        ) from error
    assert isinstance(text, str)
    return text


def spans_of(text: str, spans: Spans, tokenizer: Any, loss_on: str) -> Tokens:
    """Tokens of `text`; those that overlap a span of characters are learned."""
    return tokens_of([(text, spans)], tokenizer, loss_on)[0]


def tokens_of(texts: Sequence[tuple[str, Spans]], tokenizer: Any, loss_on: str) -> list[Tokens]:
    """Tokens of each text with its spans, as `spans_of` gives them, in one call of the tokenizer."""
    if not texts:
        return []
    options: dict[str, Any] = {"add_special_tokens": False, "return_offsets_mapping": True}
    options |= {"return_attention_mask": False, "return_token_type_ids": False}
    encoded = tokenizer([text for text, _ in texts], **options)
    found = []
    for ids, offsets, (_, spans) in zip(encoded["input_ids"], encoded["offset_mapping"], texts, strict=True):
        found.append(Tokens(tuple(ids), tuple(_learned(offsets, [(0, None)] if loss_on == "all" else spans))))
    return found


def _learned(offsets: Sequence[tuple[int, int]], spans: Spans) -> list[bool]:
    """Whether each token overlaps a span; one that stands for no character does not."""
    if len(spans) == 1:
        ((first, last),) = spans
        if last is None:
            return [end > start and end > first for start, end in offsets]
        return [end > start and end > first and start < last for start, end in offsets]
    return [
        end > start and any(end > first and (last is None or start < last) for first, last in spans)
        for start, end in offsets
    ]


def batcher(loaded: Loaded) -> Callable[[list[Tokens]], Batch]:
    """What makes a batch of rows, in the layout that the model takes."""
    if not keeps_rows_apart(loaded.model):
        return Padding(loaded.processor.pad_token_id)
    if not packed.install(loaded.model):
        return pack
    limit = packed.longest(loaded.model)
    return lambda rows: pack(rows, apart=limit is None or max(len(row.ids) for row in rows) <= limit)


@dataclass(frozen=True)
class Padding:
    """Makes padded batches; `length` lets the loop put rows of like length together."""

    pad: int

    def __call__(self, rows: Sequence[Tokens]) -> Batch:
        return pad_rows(rows, self.pad)

    def length(self, row: Tokens) -> int:
        return len(row.ids)


def pack(rows: Sequence[Tokens], apart: bool = False) -> Batch:
    """One row of all sequences end to end, (1, T), positions restarting; `sources` are positions in it.

    `apart` adds the rows' lengths, for a model whose attention takes them (engine.kernels.packed).
    """
    ids: list[int] = []
    positions: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    for row in rows:
        start = len(ids)
        ids += row.ids
        positions += range(len(row.ids))
        for offset in range(1, len(row.ids)):
            if row.learned[offset]:
                sources.append(start + offset - 1)
                targets.append(row.ids[offset])
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "sources": torch.tensor(sources),
        "targets": torch.tensor(targets),
        **({"row_lengths": torch.tensor([len(row.ids) for row in rows])} if apart else {}),
    }


def pad_rows(rows: Sequence[Tokens], pad: int) -> Batch:
    """A padded block, (N, T); `sources` are positions in the flattened block."""
    width = max(len(row.ids) for row in rows)
    sources, targets = [], []
    for number, row in enumerate(rows):
        for offset in range(1, len(row.ids)):
            if row.learned[offset]:
                sources.append(number * width + offset - 1)
                targets.append(row.ids[offset])
    return {
        "input_ids": torch.tensor([list(row.ids) + [pad] * (width - len(row.ids)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows]),
        "sources": torch.tensor(sources),
        "targets": torch.tensor(targets),
    }


def takes(model: nn.Module, argument: str) -> bool:
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    find: Any = getattr(inner, "get_base_model", None)
    base = find() if find else inner
    return argument in inspect.signature(base.forward).parameters


def tokens_in(batch: Batch) -> int:
    """How many tokens the model reads for a batch."""
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


def target_losses(model: nn.Module, batch: Batch) -> Tensor:
    """(targets,): the cross-entropy of each target, float32, in the batch's order."""
    names: tuple[str, ...] = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: batch[name] for name in names if name in batch}
    sources = batch["sources"]
    count, width = batch["input_ids"].shape
    if "row_lengths" in batch and count == 1 and packed.installed(model):
        inputs["attention_mask"] = packed.as_mask(batch["row_lengths"])
    rows, places = sources // width, sources % width
    keeps = takes(model, "logits_to_keep")
    if keeps:
        # The columns in which any row has a target.
        columns, places = torch.unique(places, return_inverse=True) if count > 1 else (sources, places)
        inputs["logits_to_keep"] = columns

    def pick(values: Tensor) -> Tensor:
        if keeps and count == 1:
            return values[0]
        # Without logits_to_keep virtual tokens have values too, before the row's own.
        return (values if keeps else values[:, -width:])[rows, places]

    return token_losses(model, lambda: model(**inputs, use_cache=False), pick, batch["targets"])


def answered(model: nn.Module, loaded: Loaded, prompt: str, temperature: float = 0.0, max_new_tokens: int = 48) -> str:
    """The answer to a prompt; at a temperature of 0 the likeliest tokens."""
    from engine.generation import Sampling, decode, encode_prompt

    ids = encode_prompt(loaded.processor, [{"role": "user", "content": prompt}])
    pieces = decode(model, loaded.processor, ids, [], Sampling(max_new_tokens=max_new_tokens, temperature=temperature))
    return "".join(piece.text for piece in pieces)


@torch.no_grad()
def keeps_rows_apart(model: nn.Module) -> bool:
    """Whether packed sequences do not see each other in this model.

    transformers reads restarting position ids as block-diagonal attention in most models, but not in all; so the model
    itself is asked: the logits of a sequence must be the same alone and behind another one. Virtual tokens stand before
    a row, so of packed sequences only the first would see them.
    """
    count: Any = getattr(model, "virtual_tokens", None)
    if count and count():
        return False
    if not (takes(model, "position_ids") and takes(model, "logits_to_keep")):
        return False
    parameter = next(model.parameters())
    if type(parameter).__name__ == "FakeTensor":
        # Shapes without numbers (engine.memory): nothing can be compared, and most models keep rows apart.
        return True
    device = parameter.device
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    base: Any = model
    vocabulary = base.get_input_embeddings().num_embeddings
    first, second = (torch.randint(vocabulary, (1, n), generator=generator).to(device) for n in (5, 7))
    try:
        packed = model(
            input_ids=torch.cat([first, second], dim=1),
            position_ids=torch.tensor([[*range(5), *range(7)]], device=device),
            use_cache=False,
        ).logits[:, 5:]
        alone = model(input_ids=second, use_cache=False).logits
    finally:
        model.train(was_training)
    # The error of mixing is of the logits' own size; rounding is far below.
    scale = float(alone.float().abs().max()) or 1.0
    limit = 0.05 if alone.dtype is not torch.float32 else 1e-3
    difference: Tensor = (packed - alone).float().abs().max()
    return float(difference) <= limit * scale
