"""Load a model that says what a picture shows (BLIP), with what turns pictures and words into its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.errors import ModelError
from engine.models.fetch import resolve
from engine.models.loading import check_whole, first_line, open_model, quiet
from engine.models.progress import Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

KINDS = ("blip",)


def load_captioner(
    name: str,
    *,
    quantization: str = "none",
    precision: str = "auto",
    device: str | torch.device | None = None,
    on_progress: Progress | None = None,
) -> tuple[PreTrainedModel, Any]:
    """A captioning model in evaluation mode, and its processor (`image_processor`, `tokenizer`).

    Args:
        name, quantization, precision, device, on_progress: as `load_causal_lm`. The image encoder is quantised too;
            it is never trained.

    Raises:
        ModelError: it cannot be found, fetched or loaded, weights are missing, or it is no BLIP.
        UnsafeFileError: its weights are pickles, or it needs code of its own.
        ConfigError: an unknown precision or quantization.
    """

    def configure(config: Any) -> dict[str, Any]:
        if config.model_type not in KINDS:
            raise ModelError(
                f"{name} (model type {config.model_type!r}) is no BLIP, which the task captioning needs.",
                "Choose one such as Salesforce/blip-image-captioning-large.",
            )
        return {}

    model, tokenizer, missing = open_model(
        name,
        "AutoModelForImageTextToText",
        precision=precision,
        quantization=quantization,
        device=device,
        on_progress=on_progress,
        configure=configure,
        refuse=_refusal,
    )
    check_whole(name, missing, "It is damaged; fetch it again or choose another one.")
    # The one that wrote the hub's files has no chat, and a template of ours must not land in what is saved.
    tokenizer.chat_template = None
    with quiet():
        from transformers import AutoImageProcessor, BlipProcessor

        try:
            pictures = AutoImageProcessor.from_pretrained(
                resolve(name), trust_remote_code=False, local_files_only=True, backend="pil"
            )
            return model, BlipProcessor(pictures, tokenizer)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise ModelError(
                f"What prepares pictures for {name} cannot be loaded: {first_line(error)}.",
                "The folder must also hold preprocessor_config.json or processor_config.json; copy it there.",
            ) from error


def _refusal(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"{name} cannot be loaded as a captioning model: {first_line(error)}.",
        "Choose a BLIP such as Salesforce/blip-image-captioning-base.",
    )
