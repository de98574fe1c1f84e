"""What answers that come whole share when columns are answered in one batch: which rows fit together, and their draws.

Words of chat models come token by token from `engine.generation.decode`; encoder-decoder models and captions go through
transformers' generate, where a batch's rows would share one random generator.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.generation import MOST_COLUMNS, Sampling, pick


def batches(kinds: Sequence[Hashable], most: int = MOST_COLUMNS) -> Iterator[list[int]]:
    """The columns' numbers by batches: columns of one kind stand together, at most so many."""
    for kind in dict.fromkeys(kinds):
        same = [number for number, own in enumerate(kinds) if own == kind]
        yield from (same[start : start + most] for start in range(0, len(same), most))


@contextmanager
def resting(*models: nn.Module) -> Iterator[None]:
    """Models in evaluation mode inside the block."""
    # Only where it changes something: switching the mode forgets what layers keep from call to call. An adapter that
    # was just attached learns on a base that does not.
    before = [(model, model.training) for model in models if any(part.training for part in model.modules())]
    for model, _ in before:
        model.eval()
    try:
        yield
    finally:
        for model, was in before:
            model.train(was)


def settings(sampling: Sampling, rows: int) -> dict[str, Any]:
    """The arguments of transformers' generate for so many rows."""
    if sampling.temperature:
        # A draw sees to the repetition penalty itself.
        how = {"num_beams": 1, "repetition_penalty": 1.0, "logits_processor": [Draws(sampling, rows)]}
        return {"do_sample": False, **how}
    return {"do_sample": False, "num_beams": sampling.beams, "repetition_penalty": sampling.repetition_penalty}


class Draws:
    """A logits processor that draws each row's token from a generator of its own, and leaves no other to choose.

    So a column's answer does not depend on the columns beside it.
    """

    def __init__(self, sampling: Sampling, rows: int) -> None:
        self.sampling = sampling
        self.randoms = [torch.Generator().manual_seed(sampling.seed) for _ in range(rows)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` (rows, vocabulary) with all but the drawn tokens at minus infinity, for `input_ids` (rows, T)."""
        drawn = [
            pick(own, seen, self.sampling, random)
            for own, seen, random in zip(scores, input_ids, self.randoms, strict=True)
        ]
        tokens = torch.tensor(drawn, device=scores.device)[:, None]
        return torch.full_like(scores, float("-inf")).scatter(1, tokens, 0.0)
