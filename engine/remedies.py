"""What to change in a job that does badly: the usual cures, fitted to the job. Torch-free.

Each function answers the changes alone, as `engine.train.job.changed` takes them: key of the job -> new value. What the
job has already is left out; what its method does not have, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from engine.errors import ConfigError
from engine.train.job import JobSpec, changed, value_of

Changes = dict[str, Any]

USUAL_RATE = 2e-4
USUAL_RATES = {
    "full": 5e-5,
    "adalora": 5e-3,
    "ia3": 5e-3,
    "p_tuning": 3e-3,
    "prefix_tuning": 1e-2,
    "prompt_tuning": 3e-2,
    "vera": 1e-2,
}
"""Learning rates that methods usually need, where they are not LoRA's; the presets name the same."""

PATIENCE = 3
PASSES = 5
"""Passes over the rows that are enough where a run took many times as many."""

_RANKED = ("lora", "dora", "lorafa", "qalora")
"""Methods with `r`, `lora_alpha` and `lora_dropout`."""


def method_of(spec: JobSpec) -> str:
    """The adapter's method, or `full`."""
    return "full" if spec.full else str(spec.adapter.get("method", "lora"))


def usual_rate(spec: JobSpec) -> float:
    """The learning rate that the job's method usually needs."""
    return USUAL_RATES.get(method_of(spec), USUAL_RATE)


def rows_per_step(spec: JobSpec) -> int:
    """Rows that one step learns from."""
    return spec.training.batch_size * spec.training.gradient_accumulation


def not_learning(spec: JobSpec) -> Changes:
    """More capacity and the usual rate: r 16, alpha 32, dropout 0.05, rate 2e-4; a higher rate where all that is so."""
    wanted: Changes = {}
    if method_of(spec) in _RANKED:
        if _number(spec, "adapter.r", 8) < 16:
            wanted |= {"adapter.r": 16, "adapter.lora_alpha": 32}
        if _number(spec, "adapter.lora_dropout", 0.0) > 0.05:
            wanted["adapter.lora_dropout"] = 0.05
    if spec.training.learning_rate < usual_rate(spec):
        wanted["training.learning_rate"] = usual_rate(spec)
    return _fitting(spec, wanted) or _fitting(spec, {"training.learning_rate": _round(3 * spec.training.learning_rate)})


def rate_too_low(spec: JobSpec) -> Changes:
    """The rate that the method usually needs."""
    return _fitting(spec, {"training.learning_rate": usual_rate(spec)})


def rate_too_high(spec: JobSpec) -> Changes:
    """The usual rate, or a third of the present one where that is lower; gradients clipped, a warm-up."""
    rate = min(usual_rate(spec), spec.training.learning_rate / 3)
    return _fitting(spec, {"training.learning_rate": _round(rate), **_calming(spec)})


def diverged(spec: JobSpec) -> Changes:
    """The usual rate, or a tenth of the present one where that is lower; gradients clipped, a warm-up."""
    rate = min(usual_rate(spec), spec.training.learning_rate / 10)
    return _fitting(spec, {"training.learning_rate": _round(rate), **_calming(spec)})


def spikes(spec: JobSpec) -> Changes:
    """Half the rate, and eight rows a step at least: a step follows single rows less."""
    wanted: Changes = {"training.learning_rate": _round(spec.training.learning_rate / 2), **_calming(spec)}
    if rows_per_step(spec) < 8:
        wanted["training.gradient_accumulation"] = math.ceil(8 / spec.training.batch_size)
    return _fitting(spec, wanted)


def overfitting(spec: JobSpec) -> Changes:
    """Less capacity and more forgetting: r 8, alpha 16, dropout 0.2, weight decay 0.01; and an end at the best check.

    A rate far above the usual one goes there. Where all that is so, half the rate.
    """
    wanted: Changes = {}
    if method_of(spec) in _RANKED:
        if _number(spec, "adapter.r", 8) > 8:
            wanted |= {"adapter.r": 8, "adapter.lora_alpha": 16}
        if _number(spec, "adapter.lora_dropout", 0.0) < 0.2:
            wanted["adapter.lora_dropout"] = 0.2
    if spec.training.weight_decay < 0.01:
        wanted["training.weight_decay"] = 0.01
    if spec.training.learning_rate > 5 * usual_rate(spec):
        wanted["training.learning_rate"] = usual_rate(spec)
    wanted |= _early(spec)
    return _fitting(spec, wanted) or _fitting(spec, {"training.learning_rate": _round(spec.training.learning_rate / 2)})


def repeated(spec: JobSpec, rows: int) -> Changes:
    """Fewer passes over `rows` rows, and an end at the best check; rows to check on where none are held back."""
    if spec.training.max_steps is None:
        wanted: Changes = {"training.epochs": min(spec.training.epochs, float(PASSES))}
    else:
        steps = max(1, round(PASSES * rows / rows_per_step(spec)))
        wanted = {"training.max_steps": min(spec.training.max_steps, steps)}
    if not spec.data.eval_split and rows >= 20:
        wanted["data.eval_split"] = 0.1
    return _fitting(spec, {**wanted, **(_early(spec) if rows >= 20 else {})})


def memory(spec: JobSpec, predicted: Mapping[str, Any] | None = None) -> Changes:
    """What is predicted to fit; else batch 1 with as many rows a step (32 at most), checkpointing and adafactor."""
    if predicted:
        return _fitting(spec, dict(predicted))
    return _fitting(
        spec,
        {
            "training.batch_size": 1,
            "training.gradient_accumulation": min(32, rows_per_step(spec)),
            "training.gradient_checkpointing": True,
            "training.optimizer": "adafactor",
        },
    )


def _early(spec: JobSpec) -> Changes:
    patience = spec.training.early_stopping_patience
    return {} if patience is not None else {"training.early_stopping_patience": PATIENCE}


def _calming(spec: JobSpec) -> Changes:
    training = spec.training
    clipped = {} if 0 < training.max_grad_norm <= 1 else {"training.max_grad_norm": 1.0}
    return clipped if training.warmup_ratio >= 0.1 else {**clipped, "training.warmup_ratio": 0.1}


def _fitting(spec: JobSpec, wanted: Changes) -> Changes:
    """What of the wanted values is new, if the job can run with them; without an evaluation nothing can end early."""
    if not wanted.get("data.eval_split", spec.data.eval_split):
        wanted.pop("training.early_stopping_patience", None)
    found = {key: value for key, value in wanted.items() if value_of(spec, key) != value}
    try:
        changed(spec, found)
    except ConfigError:
        return {}
    return found


def _number(spec: JobSpec, key: str, default: float) -> float:
    value = value_of(spec, key)
    return float(value) if isinstance(value, int | float) else default


def _round(rate: float) -> float:
    """Two digits, as people write a rate."""
    return float(f"{rate:.2g}")
