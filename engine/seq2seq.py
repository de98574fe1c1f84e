"""Answers of encoder-decoder models: the encoder reads the whole prompt, then the decoder writes, by beams or drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from engine.errors import PromptError

if TYPE_CHECKING:
    from engine.generation import Piece, Sampling
    from engine.rows import Row


@torch.no_grad()
def write(model: nn.Module, tokenizer: Any, prompt: str, sampling: Sampling, who: Row = "") -> tuple[str, bool]:
    """The answer to one prompt, and whether the model ended it.

    Args:
        who: the adapter or mix that answers, None for the base; left out, the model answers as it is switched.
        sampling: at temperature 0 the best of `sampling.beams` beams; otherwise drawn, each seed its own answer.

    Raises:
        PromptError: the prompt is empty or longer than the model's positions.
    """
    if not prompt.strip():
        raise PromptError("The prompt is empty.", "Write what the model should answer.")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    find: Any = getattr(model, "get_base_model", None)
    base: Any = find() if find else model
    limit = positions(base.config)
    if limit is not None and inputs["input_ids"].shape[1] > limit:
        raise PromptError(
            f"The prompt is {inputs['input_ids'].shape[1]} tokens long; the model reads at most {limit}.",
            "Shorten the prompt.",
        )
    device = next(model.parameters()).device
    how: dict[str, Any] = {"do_sample": False, "num_beams": sampling.beams}
    if sampling.temperature:
        how = {"do_sample": True, "num_beams": 1, "temperature": float(sampling.temperature)}
        how |= {"top_p": float(sampling.top_p), "top_k": sampling.top_k}
    if who != "" and hasattr(model, "switchboard"):
        how["adapter_names"] = [who]
    before = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(sampling.seed)
            out = model.generate(  # type: ignore[operator]
                **inputs.to(device),
                max_new_tokens=sampling.max_new_tokens,
                repetition_penalty=sampling.repetition_penalty,
                **how,
            )
    finally:
        model.train(before)
    ended = out.shape[1] <= sampling.max_new_tokens or int(out[0, -1]) in _ends(base, tokenizer)
    return tokenizer.decode(out[0], skip_special_tokens=True).strip(), ended


def answers(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], who: Sequence[Row], sampling: Sampling
) -> Iterator[Piece]:
    """One finished piece for each column, which has a prompt of its own.

    Beams are only known at their end, so nothing comes word by word.
    """
    from engine.generation import Piece

    for number, (name, prompt) in enumerate(zip(who, prompts, strict=True)):
        text, ended = write(model, tokenizer, prompt, sampling, name)
        yield Piece(number, text, True, "stop" if ended else "length")


def positions(config: Any) -> int | None:
    """The most tokens that either side may have; None where positions are relative, as T5's are."""
    value = getattr(config, "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def _ends(base: Any, tokenizer: Any) -> set[int]:
    from engine.generation import end_tokens

    return end_tokens(base, tokenizer)
