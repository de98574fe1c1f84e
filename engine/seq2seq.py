"""Answers of encoder-decoder models: the encoder reads the whole prompt, then the decoder writes, by beams or drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from engine.columns import batches, resting, settings
from engine.errors import PromptError
from engine.generation import Piece, Sampling, end_tokens
from engine.prompts import unshared
from engine.rows import Row


def write(model: nn.Module, tokenizer: Any, prompt: str, sampling: Sampling, who: Row = "") -> tuple[str, bool]:
    """The answer to one prompt, and whether the model ended it; see `write_together`.

    Args:
        who: the adapter or mix that answers, None for the base; left out, the model answers as it is switched.
    """
    return write_together(model, tokenizer, [prompt], sampling, None if who == "" else [who])[0]


@torch.no_grad()
def write_together(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], sampling: Sampling, who: Sequence[Row] | None
) -> list[tuple[str, bool]]:
    """The answers to prompts as one batch, and of each whether the model ended it.

    Args:
        who: for each prompt the adapter or mix that answers, None for the base; None: the model as it is switched.
        sampling: at temperature 0 the best of `sampling.beams` beams; otherwise drawn, each seed its own answer.

    Raises:
        PromptError: a prompt is empty or longer than the model's positions.
    """
    if not all(prompt.strip() for prompt in prompts):
        raise PromptError("The prompt is empty.", "Write what the model should answer.")
    inputs = tokenizer(
        list(prompts), padding=len(prompts) > 1, padding_side="right", return_tensors="pt", return_token_type_ids=False
    )
    base = _base(model)
    limit = positions(base.config)
    if limit is not None and inputs["input_ids"].shape[1] > limit:
        raise PromptError(
            f"The prompt is {inputs['input_ids'].shape[1]} tokens long; the model reads at most {limit}.",
            "Shorten the prompt.",
        )
    how = settings(sampling, len(prompts))
    if who is not None and hasattr(model, "switchboard"):
        how["adapter_names"] = list(who)
    with resting(model):
        out = model.generate(  # type: ignore[operator]
            **inputs.to(next(model.parameters()).device), max_new_tokens=sampling.max_new_tokens, **how
        )
    # Behind a row's end stands padding, or the end again.
    ends = end_tokens(base, tokenizer)
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    return [(text.strip(), not ends.isdisjoint(row[1:].tolist())) for text, row in zip(texts, out, strict=True)]


def answers(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], who: Sequence[Row], sampling: Sampling
) -> Iterator[Piece]:
    """One finished piece for each column, which has a prompt of its own; the columns are one batch.

    Beams are only known at their end, so nothing comes word by word. Columns with unequal numbers of virtual tokens
    stand apart where the base cannot tell positions behind padding.
    """
    for numbers in batches([unshared(model, row) for row in who]):
        asked, rows = [prompts[i] for i in numbers], [who[i] for i in numbers]
        for number, (text, ended) in zip(numbers, write_together(model, tokenizer, asked, sampling, rows), strict=True):
            yield Piece(number, text, True, "stop" if ended else "length")


def positions(config: Any) -> int | None:
    """The most tokens that either side may have; None where positions are relative, as T5's are."""
    value = getattr(config, "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def _base(model: nn.Module) -> Any:
    find: Any = getattr(model, "get_base_model", None)
    return find() if find else model
