"""Load an encoder-decoder model (T5, mT5, BART and their like) and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ModelError
from engine.models.fetch import resolve
from engine.models.loading import (
    _align_pad,
    _config,
    _first_line,
    _tokenizer,
    default_device,
    dtype_of,
    quantized_loading,
    quiet,
)
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
    import torch
    from transformers import AutoModelForSeq2SeqLM

    from engine import bnb

    place = torch.device(device if device is not None else default_device())
    dtype = dtype_of(precision, place)
    folder = resolve(name, on_progress)
    config = _config(folder, name)
    if not getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} (model type {config.model_type!r}) has no encoder and decoder, which the task seq2seq needs.",
            "Choose a T5-like model such as google/flan-t5-large, or the task causal_lm for this one.",
        )
    tokenizer = _tokenizer(folder, name)
    if on_progress:
        on_progress("loading", None, f"Loading {name}")
    with quiet():
        try:
            loaded: Any = AutoModelForSeq2SeqLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **quantized_loading(quantization, dtype, place, config, AutoModelForSeq2SeqLM),
            )
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise ModelError(
                f"{name} cannot be loaded as an encoder-decoder model: {_first_line(error)}.",
                "Choose a T5-like model that this version of transformers knows.",
            ) from error
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"The files of {name} lack {len(missing)} weights, among them {', '.join(missing[:3])}.",
            "It is damaged; fetch it again or choose another one.",
        )
    model.name_or_path = model.config.name_or_path = str(folder) if Path(name).expanduser().is_dir() else name
    (bnb.steady(model) if quantization != "none" else model.to(place)).eval()
    _align_pad(model, tokenizer)
    return model, tokenizer
