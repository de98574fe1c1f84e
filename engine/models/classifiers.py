"""Load a base model with a classification head. torch and transformers are imported when a function is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.errors import ModelError
from engine.models.loading import first_line, open_model
from engine.models.progress import Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBLEMS = {False: "single_label_classification", True: "multi_label_classification"}


def load_classifier(
    name: str,
    labels: Sequence[str],
    *,
    heads: Sequence[str],
    multi_label: bool = False,
    seed: int = 0,
    quantization: str = "none",
    saved: Sequence[str] = (),
    precision: str = "auto",
    device: str | torch.device | None = None,
    on_progress: Progress | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with a head for `labels` in evaluation mode, and its tokenizer with a pad token.

    The head is drawn anew from `seed`, unless the model is already a classifier of exactly these labels. It is kept and
    computed in float32, whatever the precision, for it is trained in full.

    Args:
        name: a built-in name, a local folder or a hub id.
        labels: the names in the order of the logits; the model's config keeps them (`id2label`).
        heads: names that a head has; other modules that the files lack are an error.
        multi_label: several labels may hold at once.
        seed: draws the head.
        saved: further modules that the adapter trains in full, which may therefore be new.
        quantization, precision, device, on_progress: as `load_causal_lm`.

    Raises:
        ModelError: it cannot be found, fetched or loaded, or lacks weights other than those of a head.
        UnsafeFileError: its weights are pickles, or it needs code of its own.
    """
    import torch

    fresh = True

    def configure(config: Any) -> dict[str, Any]:
        nonlocal fresh
        fresh = list((config.id2label or {}).values()) != list(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
        config.problem_type = PROBLEMS[multi_label]
        return {"ignore_mismatched_sizes": fresh}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, tokenizer, missing = open_model(
            name,
            "AutoModelForSequenceClassification",
            precision=precision,
            quantization=quantization,
            device=device,
            on_progress=on_progress,
            configure=configure,
            keep=[*heads, *saved],
            refuse=_refusal,
        )
        _only_heads_are_new(name, missing, [*heads, *saved])
        for part, module in model.named_children():
            if part in heads:
                if fresh:
                    _draw(model, module)
                in_float32(module)
    return model, tokenizer


def _refusal(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"{name} cannot be loaded as a text classifier: {first_line(error)}.",
        "Choose an encoder such as minilm, or a language model that transformers can give a classifier's head.",
    )


def _only_heads_are_new(name: str, missing: Sequence[str], allowed: Sequence[str]) -> None:
    new = sorted(
        {
            key.rsplit(".", 1)[0]
            for key in missing
            if not any(part.endswith(head) for part in key.split(".") for head in allowed)
        }
    )
    if new:
        raise ModelError(
            f"The files of {name} lack the weights of {', '.join(new[:3])}, which would stay random.",
            "If they belong to a new head, let the adapter train them: "
            f"adapter.modules_to_save: [{', '.join(new[:3])}]; otherwise choose another model.",
        )


def _draw(model: Any, head: nn.Module) -> None:
    """Random weights by the model's own rule: those of another set of labels would be a wrong start."""
    import torch

    spread = float(getattr(model.config, "initializer_range", 0.02) or 0.02)
    for parameter in head.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=spread)
        else:
            torch.nn.init.zeros_(parameter)


def in_float32(head: nn.Module) -> None:
    """The head in float32, taking any input; its copies for adapters carry the hook with them."""
    head.float()
    head.register_forward_pre_hook(_widen)


def _widen(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].float(), *inputs[1:])
