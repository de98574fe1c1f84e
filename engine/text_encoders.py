"""Stable Diffusion's text encoders, learning beside its UNet with adapters of the same method and rank.

The UNet's adapter lies in its folder as ever; each encoder's lies, in PEFT's format too, in a folder of its name there
(`text_encoder`, and SDXL's `text_encoder_2`).
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.adapters.base import AdapterConfig
from engine.checkpoint import CONFIG
from engine.errors import ConfigError
from engine.formats.parts import METHODS
from engine.joined import Joined
from engine.model import PeftModel, get_peft_model
from engine.models.pipelines import Pipeline

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
# What names layers of the UNet, which the encoders do not have.
_OF_THE_UNET: dict[str, Any] = {
    "rank_pattern": {},
    "alpha_pattern": {},
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "modules_to_save": None,
}


class Painting(Joined):
    """A UNet that reads the words through encoders that learn with it.

    Args:
        pipeline: the parts, which the adapters are attached to in place.
        unet, encoders: those of them that are adapted; the encoders by diffusers' names.
    """

    def __init__(self, pipeline: Pipeline, unet: PeftModel, encoders: dict[str, PeftModel]) -> None:
        super().__init__({"unet": unet, **encoders})
        self.pipeline = pipeline

    @property
    def noise_schedule(self) -> Any:
        return self.pipeline.unet.noise_schedule

    def forward(self, sample: Tensor, when: Tensor, ids: Tensor, sizes: Tensor | None = None) -> Any:
        """The UNet's answer to noisy latents (N, C, h, w) and token ids (N, encoders, tokens); `sizes` are SDXL's."""
        words, pooled = self.pipeline.read(ids)
        more = {} if sizes is None else {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
        return self.models["unet"](sample, when, encoder_hidden_states=words, **more)


def encoder_config(config: AdapterConfig) -> AdapterConfig:
    """The UNet's config for CLIP's attention.

    Raises:
        ConfigError: a method that Stable Diffusion's file formats have no place for.
    """
    if config.method not in METHODS:
        raise ConfigError(
            f"The text encoder cannot be trained with {config.method}; needed: {', '.join(METHODS)}.",
            "Turn the option train_text_encoder off, or choose one of these methods.",
        )
    own = {field.name for field in fields(config)}
    plain = {name: value for name, value in _OF_THE_UNET.items() if name in own}
    return config.replace(target_modules=list(TARGETS), **plain)


def with_encoders(pipeline: Pipeline, unet: PeftModel, folder: Path | None = None) -> Painting:
    """The adapted UNet with its encoders adapted too: anew, or from the folders in an adapter's `folder`.

    Raises:
        ConfigError: as `encoder_config`.
        CheckpointError: the folder holds no adapter for an encoder.
    """
    made: dict[str, PeftModel] = {}
    for name, encoder in pipeline.named_encoders.items():
        if folder is None:
            made[name] = get_peft_model(encoder, encoder_config(unet.peft_config["default"]))
        else:
            made[name] = PeftModel.from_pretrained(encoder, folder / name)
    return Painting(pipeline, unet, made)


def encoder_folders(folder: Path, pipeline: Pipeline) -> dict[str, Path]:
    """Encoder -> the folder of its adapter, for those that an adapter's folder has one for."""
    return {name: folder / name for name in pipeline.named_encoders if (folder / name / CONFIG).is_file()}
