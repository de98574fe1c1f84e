"""Load an encoder-decoder model (T5, mT5, BART and their like) and its tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.errors import ModelError
from engine.models.loading import check_whole, first_line, open_model
from engine.models.progress import Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_seq2seq_lm(
    name: str,
    *,
    quantization: str = "none",
    precision: str = "auto",
    device: str | torch.device | None = None,
    on_progress: Progress | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An encoder-decoder model in evaluation mode, and its tokenizer with a pad token.

    Args:
        name, quantization, precision, device, on_progress: as `load_causal_lm`.

    Raises:
        ModelError: it cannot be found, fetched or loaded, weights are missing, or it has no encoder and decoder.
        UnsafeFileError: its weights are pickles, or it needs code of its own.
        ConfigError: an unknown precision or quantization.
    """

    def configure(config: Any) -> dict[str, Any]:
        if not getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"{name} (model type {config.model_type!r}) has no encoder and decoder, which the task seq2seq needs.",
                "Choose a T5-like model such as google/flan-t5-large, or the task causal_lm for this one.",
            )
        return {}

    model, tokenizer, missing = open_model(
        name,
        "AutoModelForSeq2SeqLM",
        precision=precision,
        quantization=quantization,
        device=device,
        on_progress=on_progress,
        configure=configure,
        refuse=_refusal,
    )
    check_whole(name, missing, "It is damaged; fetch it again or choose another one.")
    return model, tokenizer


def _refusal(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"{name} cannot be loaded as an encoder-decoder model: {first_line(error)}.",
        "Choose a T5-like model that this version of transformers knows.",
    )
