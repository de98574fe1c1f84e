"""The optimizer and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from engine.train.job import TrainingSpec


def make_optimizer(parameters: Mapping[str, nn.Parameter], training: TrainingSpec) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101) over the adapter's parameters, in their order."""
    return torch.optim.AdamW(
        list(parameters.values()), lr=training.learning_rate, weight_decay=training.weight_decay, betas=(0.9, 0.999)
    )


def rate_at(step: int, total: int, training: TrainingSpec) -> float:
    """The learning rate of optimizer step `step` (from 0) of `total`: no state, so a resumed run needs none restored.

    It rises linearly over the first w = ceil(warmup_ratio * total) steps, by peak / w each, then with
    p = (step - w) / (total - w): linear (1 - p), cosine (1 + cos(pi p)) / 2, or constant.
    """
    warmup = math.ceil(training.warmup_ratio * total)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    p = (step - warmup) / max(1, total - warmup)
    if training.schedule == "linear":
        return training.learning_rate * max(0.0, 1 - p)
    if training.schedule == "cosine":
        return training.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, p)))
    return training.learning_rate
