"""Preferences: a better answer made likelier than a worse one, next to the base's own opinion of both.

    DPO   -(1 - e) log s(b d) - e log s(-b d),   d = (c - c0) - (r - r0)      https://arxiv.org/abs/2305.18290
    IPO   ((c - c0) / |c| - (r - r0) / |r| - 1 / (2 b))^2                     https://arxiv.org/abs/2310.12036
    ORPO  -c / |c| - b log s(odds(c / |c|) - odds(r / |r|))                   https://arxiv.org/abs/2403.07691

c and r are the summed log-probabilities of the chosen and the rejected answer, |c| and |r| their tokens, c0 and r0 the
same under the reference, s the sigmoid, b `beta`, e `label_smoothing`, odds(p) = p - log(1 - exp(p)).

The reference is the base with the adapter switched off: no second model. Its two numbers a row never change, so they
are computed once before training and kept in the run's folder.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.adapters.base import TaskType
from engine.checkpoint import write_safetensors
from engine.errors import ConfigError, DataError
from engine.records import Rows, numbers
from engine.tasks.base import Batch, Encoded, Loaded, LossSum, Progress, Sequenced, sequenced
from engine.tasks.sequences import (
    Tokens,
    answer_text,
    answered,
    batcher,
    load_decoder,
    room,
    target_losses,
    tokens_from,
    tokens_in,
    tokens_of,
)
from engine.tasks.tokenising import tokenised
from engine.train.job import JobSpec, TrainingSpec

LOSSES = ("dpo", "ipo", "orpo")


@dataclass(frozen=True)
class Pair:
    """One row: both answers after the prompt, and the reference's log-probabilities of them."""

    chosen: Tokens
    rejected: Tokens
    reference: tuple[float, float] = (0.0, 0.0)


PAIR = numbers(
    "ibib",
    lambda row: (row.chosen.ids, row.chosen.learned, row.rejected.ids, row.rejected.learned),
    lambda *parts: Pair(tokens_from(*parts[:2]), tokens_from(*parts[2:])),
)
"""How a pair is kept: without the reference's opinion, which is another model's."""


class Judged(Rows[Pair]):
    """Pairs with the reference's opinion of each, (N, 2)."""

    def __init__(self, pairs: Sequence[Pair], reference: Tensor) -> None:
        self.pairs = pairs
        self.reference = reference

    def __len__(self) -> int:
        return len(self.pairs)

    def one(self, number: int) -> Pair:
        chosen, rejected = self.reference[number].tolist()
        return replace(self.pairs[number], reference=(chosen, rejected))


@dataclass(frozen=True)
class Preference:
    """The task's record.

    Attributes:
        loss_kind: (`loss` in a job) `dpo`, `ipo`, or `orpo`, which has no reference.
        beta: how strongly it holds to the reference (DPO, IPO); the weight of the odds ratio (ORPO).
        label_smoothing: DPO alone: the share of rows, below 0.5, in which the answers may be the wrong way round.
    """

    loss_kind: str = field(default="dpo", metadata={"option": "loss"})
    beta: float = 0.1
    label_smoothing: float = 0.0

    name: ClassVar[str] = "preference"
    task_type: ClassVar[TaskType | None] = TaskType.CAUSAL_LM
    formats: ClassVar[tuple[str, ...]] = ("preferences",)

    def __post_init__(self) -> None:
        found = []
        if self.loss_kind not in LOSSES:
            found.append(f"options.loss is {self.loss_kind!r}; needed: one of {', '.join(LOSSES)}")
        if not (_number(self.beta) and 0 < self.beta < math.inf):
            found.append(f"options.beta is {self.beta!r}; needed: a finite number above 0")
        if not (_number(self.label_smoothing) and 0 <= self.label_smoothing < 0.5):
            found.append(f"options.label_smoothing is {self.label_smoothing!r}; needed: 0 or more, below 0.5")
        elif self.label_smoothing and self.loss_kind != "dpo":
            found.append(f"options.label_smoothing is {self.label_smoothing} with {self.loss_kind}; only dpo has it")
        if found:
            raise ConfigError("The job cannot run:\n" + "\n".join(f"- {fault}" for fault in found))

    def load(self, spec: JobSpec, device: torch.device, on_progress: Progress) -> Loaded:
        return load_decoder(spec, device, on_progress)

    def encode(
        self, examples: Sequence[Mapping[str, Any]], loaded: Loaded, training: TrainingSpec, on_progress: Progress
    ) -> Encoded:
        """Pairs whose answers both begin, and differ, within `max_length`, with the reference's opinion of them.

        Raises:
            ConfigError: `loss_on` is not `answers`.
            DataError: no pair is left.
        """
        if training.loss_on != "answers":
            raise ConfigError(
                f"training.loss_on is {training.loss_on!r}; preferences are about answers.", "Set it to answers."
            )
        limit = room(loaded, training)
        tokenizer = loaded.processor

        def encode(part: Sequence[Mapping[str, Any]], counts: Counter[str]) -> Iterator[Pair]:
            for whole in _whole(part, tokenizer):
                counts["cut"] += any(len(tokens.ids) > limit for tokens in whole)
                chosen, rejected = (tokens.cut(limit) for tokens in whole)
                if not (chosen.targets and rejected.targets):
                    counts["empty"] += 1
                elif chosen.ids == rejected.ids:
                    counts["same"] += 1
                else:
                    yield Pair(chosen, rejected)

        pairs: Sequence[Pair]
        pairs, counts = tokenised(examples, loaded, PAIR, encode, {"task": self.name, "limit": limit}, on_progress)
        cut, empty, same = counts["cut"], counts["empty"], counts["same"]
        notes = []
        if cut:
            notes.append(f"{cut} of {len(examples)} pairs are longer than {limit} tokens and were cut.")
        if empty:
            notes.append(f"{empty} pairs were left out: no answer within {limit} tokens.")
        if same:
            notes.append(f"{same} pairs were left out: within {limit} tokens both answers are the same.")
        if not pairs:
            raise DataError(
                f"None of the {len(examples)} pairs has two different answers within {limit} tokens.",
                "Raise max_length, or check which columns hold the answers.",
            )
        if self.loss_kind != "orpo":
            pairs = self._with_reference(pairs, loaded, training.batch_size, on_progress)
        return Encoded(pairs, tuple(notes))

    def shown(
        self, examples: Sequence[Mapping[str, Any]], loaded: Loaded, training: TrainingSpec
    ) -> Iterator[list[Sequenced]]:
        limit, tokenizer = room(loaded, training), loaded.processor
        for pair in _whole(examples, tokenizer):
            yield [
                sequenced(row.ids, (False, *row.learned[1:]), row.ids[:limit], limit, tokenizer, role)
                for row, role in zip(pair, _ROLES, strict=True)
            ]

    def collator(self, loaded: Loaded) -> Callable[[list[Pair]], Batch]:
        together = batcher(loaded)
        length: Any = getattr(together, "length", None)

        def collate(pairs: list[Pair]) -> Batch:
            answers = [tokens for pair in pairs for tokens in (pair.chosen, pair.rejected)]
            lengths = torch.tensor([tokens.targets for tokens in answers])
            return {
                **together(answers),
                "lengths": lengths,
                "owners": torch.repeat_interleave(torch.arange(len(answers)), lengths),
                "reference": torch.tensor([pair.reference for pair in pairs]),
            }

        if length is not None:
            # Both answers stand in one block.
            collate.length = lambda pair: max(length(pair.chosen), length(pair.rejected))  # type: ignore[attr-defined]
        return collate

    def targets(self, batch: Batch) -> int:
        return len(batch["reference"])

    def tokens(self, batch: Batch) -> int:
        return tokens_in(batch)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The loss summed over the pairs; the outcome is what each answer of a pair is worth, (N, 2)."""
        sums = log_probs(model, batch)
        losses, rewards = self.pair_losses(sums, batch["reference"], batch["lengths"].view(-1, 2))
        return LossSum(losses.sum(), len(losses), rewards.detach())

    def pair_losses(self, sums: Tensor, reference: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) losses and (N, 2) rewards from summed log-probabilities, all (N, 2): chosen, rejected."""
        if self.loss_kind == "orpo":
            means = sums / lengths
            odds = means - torch.log(-torch.expm1(means))
            losses = -means[:, 0] - self.beta * F.logsigmoid(odds[:, 0] - odds[:, 1])
            return losses, self.beta * means
        ratios = sums - reference
        if self.loss_kind == "ipo":
            means = ratios / lengths
            losses = (means[:, 0] - means[:, 1] - 1 / (2 * self.beta)) ** 2
        else:
            margin = self.beta * (ratios[:, 0] - ratios[:, 1])
            smooth = self.label_smoothing
            losses = -(1 - smooth) * F.logsigmoid(margin) - smooth * F.logsigmoid(-margin)
        return losses, self.beta * ratios

    def metrics(self, outcomes: Sequence[Any]) -> dict[str, float]:
        """Mean rewards, their difference, and the share of pairs in which the chosen answer is worth more."""
        rewards = torch.cat(list(outcomes)).double()
        margins = rewards[:, 0] - rewards[:, 1]
        return {
            "margin": float(margins.mean()),
            "accuracy": float((margins > 0).double().mean()),
            "reward_chosen": float(rewards[:, 0].mean()),
            "reward_rejected": float(rewards[:, 1].mean()),
        }

    def sample(self, model: nn.Module, loaded: Loaded, prompt: str) -> str:
        """The greedy answer to a prompt, at most 48 tokens."""
        return answered(model, loaded, prompt)

    def _with_reference(
        self, pairs: Sequence[Pair], loaded: Loaded, batch_size: int, on_progress: Progress
    ) -> Sequence[Pair]:
        """The pairs with the base's log-probabilities, from the run's folder where they are there."""
        kept = loaded.cache / f"reference-{_digest(pairs, loaded.model)}.safetensors" if loaded.cache else None
        found = _read(kept, len(pairs)) if kept else None
        if found is None:
            found = self._reference(pairs, loaded, batch_size, on_progress)
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_safetensors(kept, {"reference": found})
        return Judged(pairs, found)

    @torch.no_grad()
    def _reference(self, pairs: Sequence[Pair], loaded: Loaded, batch_size: int, on_progress: Progress) -> Tensor:
        model, collate = loaded.model, self.collator(loaded)
        device = next(model.parameters()).device
        off: Any = getattr(model, "disable_adapter", nullcontext)
        was_training = model.training
        model.eval()
        parts = []
        try:
            with off():
                for start in range(0, len(pairs), batch_size):
                    on_progress("reference", start / len(pairs), f"The base reads pair {start + 1} of {len(pairs)}")
                    batch = collate(list(pairs[start : start + batch_size]))
                    parts.append(log_probs(model, {name: value.to(device) for name, value in batch.items()}).cpu())
        finally:
            model.train(was_training)
        return torch.cat(parts)


_ROLES = ("chosen", "rejected")
_SAMPLED = 64
_OF_ADAPTERS = re.compile(r"(^|\.)(adapters|copies|biases)\.|^(shared|prompts)\.")


def _whole(part: Sequence[Mapping[str, Any]], tokenizer: Any) -> Iterator[tuple[Tokens, Tokens]]:
    """Both answers of each example after its prompt, uncut."""
    texts = [answer_text(example["prompt"], example[role], tokenizer) for example in part for role in _ROLES]
    every = tokens_of(texts, tokenizer, "answers")
    return zip(every[0::2], every[1::2], strict=True)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """(N, 2): the log-probabilities of the answers' tokens, summed, in float32."""
    each = -target_losses(model, batch)
    sums = each.new_zeros(len(batch["lengths"]))
    return sums.index_add(0, batch["owners"], each).view(-1, 2)


def _digest(pairs: Sequence[Pair], model: nn.Module) -> str:
    """A name for these pairs under this base: the tokens, and some numbers of every weight of the base."""
    found = hashlib.sha256()
    for pair in pairs:
        found.update(repr((pair.chosen, pair.rejected)).encode())
    for name, tensor in model.named_parameters():
        if _OF_ADAPTERS.search(name):
            continue
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].contiguous().cpu()
        found.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode() + some.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:20]


def _read(path: Path, count: int) -> Tensor | None:
    """What an earlier start of this run computed; None where it is not there, or is damaged."""
    try:
        found: Tensor = load_file(path)["reference"]
    except (OSError, SafetensorError, KeyError):
        return None
    return found if found.shape == (count, 2) and bool(found.isfinite().all()) else None


TASK = Preference()
