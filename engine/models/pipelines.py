"""Load a Stable Diffusion pipeline (SD 1, SD 2, SDXL) as diffusers writes it: a folder for each of its parts.

diffusers is imported when a function is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError, ModelError
from engine.models import folders
from engine.models.fetch import resolve, resolve_config
from engine.models.loading import default_device, dtype_of, first_line, quiet
from engine.models.progress import Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Pipeline:
    """The parts of a pipeline; `unet` is what learns, and what an adapter is attached to.

    Attributes:
        unet: predicts the noise of latents (N, C, height / scale, width / scale).
        vae: pixels from -1 to 1 to latents and back, in float32: in 16 bits SDXL's overflows.
        encoders: text encoders, in the order in which their outputs are joined; with their `tokenizers`.
        scheduler: how noise is added and taken away, as the pipeline's folder says.
        xl: SDXL's shape: two encoders, a pooled text and sizes as further conditions.
    """

    unet: nn.Module
    vae: Any
    encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    scheduler: Any
    xl: bool

    @property
    def scale(self) -> int:
        """Pixels to one latent, along one side."""
        return 1 << (len(self.vae.config.block_out_channels) - 1)

    @property
    def side(self) -> int:
        """The side of the pictures that it was made for, in pixels."""
        size: Any = self.unet.config
        return int(size.sample_size) * self.scale

    @property
    def step(self) -> int:
        """Sides of pictures must be a multiple of this, or the UNet's halves do not meet again."""
        config: Any = self.unet.config
        return self.scale << (len(config.block_out_channels) - 1)

    def diffusers(self) -> Any:
        """The same parts as a pipeline of diffusers, with whatever adapter the UNet carries."""
        import diffusers

        parts = {"vae": self.vae, "unet": self.unet, "scheduler": self.scheduler}
        parts |= {"text_encoder": self.encoders[0], "tokenizer": self.tokenizers[0]}
        if self.xl:
            parts |= {"text_encoder_2": self.encoders[1], "tokenizer_2": self.tokenizers[1]}
            made: Any = diffusers.StableDiffusionXLPipeline(**parts)
        else:
            made = diffusers.StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        made.set_progress_bar_config(disable=True)
        return made

    @property
    def named_encoders(self) -> dict[str, Any]:
        """The text encoders by diffusers' names."""
        return dict(zip(("text_encoder", "text_encoder_2"), self.encoders, strict=False))

    def embed(self, texts: list[str]) -> tuple[Tensor, Tensor | None]:
        """What the UNet reads of texts: (N, tokens, width), and SDXL's pooled (N, width)."""
        import torch

        with torch.no_grad():
            return self.read(self.tokens(texts))

    def tokens(self, texts: list[str]) -> Tensor:
        """Token ids of texts for each encoder, (N, encoders, tokens), on the CPU."""
        import torch

        each = [
            tokenizer(
                texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
            ).input_ids
            for tokenizer in self.tokenizers
        ]
        return torch.stack(each, dim=1)

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `embed`, of token ids (N, encoders, tokens); gradients reach the encoders."""
        import torch

        hidden, pooled = [], None
        ids = ids.to(next(self.encoders[0].parameters()).device)
        for number, encoder in enumerate(self.encoders):
            if self.xl:
                # SDXL was trained on the last but one layer, of both.
                out = encoder(ids[:, number], output_hidden_states=True)
                hidden.append(out.hidden_states[-2])
                pooled = out[0]
            else:
                hidden.append(encoder(ids[:, number])[0])
        return torch.cat(hidden, dim=-1), pooled


def load_pipeline(
    name: str,
    *,
    quantization: str = "none",
    precision: str = "auto",
    device: str | torch.device | None = None,
    on_progress: Progress | None = None,
) -> Pipeline:
    """A pipeline in evaluation mode, without a safety checker; nothing of it is set to train but the UNet.

    Args:
        name, precision, device, on_progress: as `load_causal_lm`.
        quantization: of the UNet's linear layers.

    Raises:
        ModelError: it cannot be found, fetched or loaded, or it is no Stable Diffusion.
        UnsafeFileError: its weights are pickles, or it needs code of its own.
        ConfigError: an unknown precision or quantization.
    """
    import torch

    from engine import bnb

    place = torch.device(device if device is not None else default_device())
    dtype = dtype_of(precision, place)
    if quantization not in ("none", *bnb.KINDS):
        raise ConfigError(f"quantization is {quantization!r}; needed: none, {', '.join(bnb.KINDS)}.")
    folder = resolve(name, on_progress)
    if not is_pipeline(folder):
        raise ModelError(
            f"{name} is no Stable Diffusion pipeline: it has no {folders.PIPELINE}.",
            "Choose one such as stable-diffusion-v1-5/stable-diffusion-v1-5, or another task for this model.",
        )
    if on_progress:
        on_progress("loading", None, f"Loading {name}")
    loaded = _load(folder, name, dtype)
    from diffusers import DDPMScheduler

    xl = hasattr(loaded, "text_encoder_2")
    unet = loaded.unet.eval()
    # Where a task that is handed the UNet alone finds how noise was added to what it learned from.
    unet.noise_schedule = DDPMScheduler.from_config(loaded.scheduler.config)
    unet.name_or_path = str(folder) if Path(name).expanduser().is_dir() else name
    encoders = (loaded.text_encoder, loaded.text_encoder_2) if xl else (loaded.text_encoder,)
    for part in (loaded.vae, *encoders):
        part.requires_grad_(False).eval().to(place)
    unet.to(place)
    if quantization != "none":
        bnb.quantize_model(unet, quantization, dtype)
    tokenizers = (loaded.tokenizer, loaded.tokenizer_2) if xl else (loaded.tokenizer,)
    return Pipeline(unet, loaded.vae, encoders, tokenizers, loaded.scheduler, xl)


def is_pipeline(folder: Path) -> bool:
    """Whether a model's folder holds a diffusers pipeline."""
    return (folder / folders.PIPELINE).is_file()


def named_pipeline(name: str, on_progress: Progress | None = None) -> bool:
    """Whether a model's name stands for a diffusers pipeline; its weights are not fetched.

    Raises:
        ModelError, UnsafeFileError: as `resolve_config`.
    """
    return is_pipeline(resolve_config(name, on_progress))


def meta_unet(name: str, on_progress: Progress | None = None) -> nn.Module:
    """The UNet on torch's meta device, for counting.

    Raises:
        ModelError, UnsafeFileError: as `resolve_config`; or the folder has no UNet's config.
    """
    return unet_of(folders.read_json(resolve_config(name, on_progress) / "unet" / folders.CONFIG))


def unet_of(config: Mapping[str, Any]) -> nn.Module:
    """A UNet of this config on torch's meta device."""
    import torch

    with quiet(), torch.device("meta"):
        from diffusers import UNet2DConditionModel

        made: nn.Module = UNet2DConditionModel.from_config(dict(config))
        return made


def tokenizers_of(name: str) -> tuple[Any, ...]:
    """The tokenizers of a pipeline's text encoders, without a weight.

    Raises:
        ModelError, UnsafeFileError: as `load_pipeline`; or a tokenizer is missing or damaged.
    """
    from transformers import CLIPTokenizer

    folder = resolve(name)
    index = folders.read_json(folder / folders.PIPELINE)
    folders.check_pipeline_index(index, str(name))
    xl = index["_class_name"] == "StableDiffusionXLPipeline"
    found = []
    for part in ("tokenizer", "tokenizer_2") if xl else ("tokenizer",):
        try:
            with quiet():
                found.append(CLIPTokenizer.from_pretrained(folder / part, local_files_only=True))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"The {part} of {name} cannot be loaded: {first_line(error)}.", "Fetch it again, or choose another."
            ) from error
    return tuple(found)


def meta_pipeline(name: str, unet: nn.Module, on_progress: Progress | None = None) -> Pipeline:
    """A UNet with its text encoders on torch's meta device, for counting; the other parts are missing.

    Raises:
        ModelError, UnsafeFileError: as `resolve_config`; it is no Stable Diffusion, or an encoder's config is missing.
    """
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    folder = resolve_config(name, on_progress)
    index = folders.read_json(folder / folders.PIPELINE)
    folders.check_pipeline_index(index, str(name))
    xl = index["_class_name"] == "StableDiffusionXLPipeline"
    kinds: dict[str, Any] = {"text_encoder": CLIPTextModel}
    if xl:
        kinds["text_encoder_2"] = CLIPTextModelWithProjection
    encoders = []
    with quiet(), torch.device("meta"):
        for part, kind in kinds.items():
            config = CLIPTextConfig.from_dict(folders.read_json(folder / part / folders.CONFIG))
            encoders.append(kind(config).requires_grad_(False))
    return Pipeline(unet, None, tuple(encoders), (), None, xl)


def _load(folder: Path, name: str, dtype: torch.dtype) -> Any:
    import torch

    kind = folders.read_json(folder / folders.PIPELINE)["_class_name"]
    with quiet():
        import diffusers
        from diffusers.utils import logging

        logging.disable_progress_bar()
        more: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        if kind == "StableDiffusionXLPipeline":
            more = {}
        try:
            return getattr(diffusers, kind).from_pretrained(
                folder,
                dtype={"default": dtype, "vae": torch.float32},
                use_safetensors=True,
                local_files_only=True,
                **more,
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, AttributeError) as error:
            raise ModelError(
                f"{name} cannot be loaded as a Stable Diffusion pipeline: {first_line(error)}.",
                "Choose a folder that diffusers' save_pretrained wrote.",
            ) from error
