"""Chat and text models: next-token prediction, on the answers only unless told otherwise.

A batch is one row of concatenated sequences with restarting position ids where the model keeps them apart (checked on
the model itself, once), so nothing is spent on padding; otherwise a padded block. Either way only the positions that
have a target go through the output layer, which for small models with large vocabularies is most of the work.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from engine.adapters.base import TaskType
from engine.errors import DataError
from engine.tasks.base import Batch, Encoded, Loaded, LossSum, Progress
from engine.train.job import JobSpec, TrainingSpec

IGNORED = -100


@dataclass(frozen=True)
class Tokens:
    """One row: token ids, and for each whether the loss counts it."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]


@dataclass(frozen=True)
class CausalLM:
    """The task's record; it has no options."""

    name: ClassVar[str] = "causal_lm"
    task_type: ClassVar[TaskType] = TaskType.CAUSAL_LM
    formats: ClassVar[tuple[str, ...]] = ("messages", "alpaca", "sharegpt", "oasst", "prompt_completion", "text")
    text_metrics: ClassVar[tuple[str, ...]] = ("perplexity", "exact_match")

    def load(self, spec: JobSpec, device: torch.device, on_progress: Progress) -> Loaded:
        from engine.models.loading import load_causal_lm

        return Loaded(
            *load_causal_lm(spec.model, precision=spec.training.precision, device=device, on_progress=on_progress)
        )

    def encode(
        self, examples: Sequence[Mapping[str, Any]], loaded: Loaded, training: TrainingSpec, on_progress: Progress
    ) -> Encoded:
        """Rows with at least one target, cut to `max_length`; the notes say how many were cut or left out.

        Raises:
            DataError: no row is left.
        """
        from engine.models.loading import context_length

        rows: list[Tokens] = []
        cut = empty = 0
        context = context_length(loaded.model.config)
        count: Any = getattr(loaded.model, "virtual_tokens", None)
        room = context - (count() if count else 0) if context else training.max_length
        limit = min(training.max_length, room)
        for number, example in enumerate(examples):
            if number % 200 == 0:
                on_progress("tokenising", number / len(examples), f"Tokenising row {number + 1} of {len(examples)}")
            for tokens in encode_example(example, loaded.processor, training.loss_on):
                cut += len(tokens.ids) > limit
                short = Tokens(tokens.ids[:limit], tokens.learned[:limit])
                # The first token has nothing before it to be predicted from.
                if any(short.learned[1:]):
                    rows.append(short)
                else:
                    empty += 1
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

    def collator(self, loaded: Loaded) -> Callable[[list[Tokens]], Batch]:
        if keeps_rows_apart(loaded.model):
            return pack
        pad = loaded.processor.pad_token_id
        return lambda rows: pad_rows(rows, pad)

    def targets(self, batch: Batch) -> int:
        return int(batch["targets"].numel())

    def tokens(self, batch: Batch) -> int:
        mask = batch.get("attention_mask")
        return int(batch["input_ids"].numel() if mask is None else mask.sum())

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Cross-entropy summed over the targets, in float32."""
        inputs = {key: value for key, value in batch.items() if key not in ("targets", "sources")}
        sources, targets = batch["sources"], batch["targets"]
        count, width = batch["input_ids"].shape
        if not _takes(model, "logits_to_keep"):
            # Virtual tokens have logits too, before the row's own.
            logits = model(**inputs, use_cache=False).logits[:, -width:].flatten(0, 1)[sources]
        elif count == 1:
            logits = model(**inputs, use_cache=False, logits_to_keep=sources).logits[0]
        else:
            # The columns in which any row has a target.
            columns, places = torch.unique(sources % width, return_inverse=True)
            logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits[sources // width, places]
        return LossSum(F.cross_entropy(logits.float(), targets, reduction="sum"), int(targets.numel()))

    def reference(self, example: Mapping[str, Any]) -> tuple[str, str] | None:
        """Question and answer, where the row is one question with one answer."""
        if "prompt" in example:
            return example["prompt"], example["completion"]
        turns = example.get("messages", ())
        if [turn["role"] for turn in turns] != ["user", "assistant"]:
            return None
        return turns[0]["content"], turns[1]["content"]

    def sample(self, model: nn.Module, loaded: Loaded, prompt: str) -> str:
        """The greedy answer to a prompt, at most 48 tokens."""
        from engine.generation import Sampling, decode, encode_prompt

        ids = encode_prompt(loaded.processor, [{"role": "user", "content": prompt}])
        pieces = decode(model, loaded.processor, ids, [], Sampling(max_new_tokens=48, temperature=0))
        return "".join(piece.text for piece in pieces)


TASK = CausalLM()


def encode_example(example: Mapping[str, Any], tokenizer: Any, loss_on: str) -> Iterator[Tokens]:
    """One row of `engine.data` as tokens.

    - `messages`: rendered by the chat template; targets are the assistant's words and the token that ends its turn.
    - `prompt`, `completion`: a user's and an assistant's message, in the form in which prompts are asked later.
    - `text`: every token is a target.
    """
    if "messages" in example:
        yield from _chat(example["messages"], tokenizer, loss_on)
    elif "prompt" in example:
        roles = (
            {"role": "user", "content": example["prompt"]},
            {"role": "assistant", "content": example["completion"]},
        )
        yield from _chat(roles, tokenizer, loss_on)
    else:
        yield _spans(example["text"] + (tokenizer.eos_token or ""), [(0, None)], tokenizer, loss_on)


def _chat(messages: Sequence[Mapping[str, str]], tokenizer: Any, loss_on: str) -> Iterator[Tokens]:
    whole = render(tokenizer, messages)
    spans: list[tuple[int, int | None]] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:number], answer_next=True)
        after = render(tokenizer, messages[: number + 1])
        if not (whole.startswith(before) and whole.startswith(after)):
            # A template that rewrites earlier turns (one that drops reasoning, say): each answer becomes its own row.
            yield from _turns_apart(messages, tokenizer, loss_on)
            return
        spans.append((len(before), len(after.rstrip())))
    yield _spans(whole, spans, tokenizer, loss_on)


def _turns_apart(messages: Sequence[Mapping[str, str]], tokenizer: Any, loss_on: str) -> Iterator[Tokens]:
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(tokenizer, messages[:number], answer_next=True)
            whole = render(tokenizer, messages[: number + 1])
            start = len(before) if whole.startswith(before) else whole.rfind(message["content"].strip())
            if start < 0:
                raise DataError(
                    "The model's chat template rewrites the answers, so they cannot be told from the questions.",
                    "Use loss_on: all, or another base.",
                )
            yield _spans(whole, [(start, len(whole.rstrip()))], tokenizer, loss_on)


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


def _spans(text: str, spans: list[tuple[int, int | None]], tokenizer: Any, loss_on: str) -> Tokens:
    """Tokens of `text`; those that overlap a span of characters are learned."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    learned = []
    for start, end in encoded["offset_mapping"]:
        inside = any(end > first and (last is None or start < last) for first, last in spans)
        learned.append(end > start and (inside or loss_on == "all"))
    return Tokens(tuple(encoded["input_ids"]), tuple(learned))


def pack(rows: Sequence[Tokens]) -> Batch:
    """One row of all sequences end to end, (1, T), positions restarting; `sources` are positions in it."""
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


def _takes(model: nn.Module, argument: str) -> bool:
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    find: Any = getattr(inner, "get_base_model", None)
    base = find() if find else inner
    return argument in inspect.signature(base.forward).parameters


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
    if not (_takes(model, "position_ids") and _takes(model, "logits_to_keep")):
        return False
    device = next(model.parameters()).device
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
