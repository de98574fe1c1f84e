"""A tiny Stable Diffusion, built from its configs with fixed weights: UNet, CLIP text encoder, pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

VOCABULARY = 64


def unet(xl: bool = False, **more: Any) -> nn.Module:
    """SD 1's shape, or SDXL's: attention in the inner blocks only, linear projections, added conditions."""
    torch.manual_seed(1)
    if xl:
        more = {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 16,
            **more,
        }
    else:
        more = {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            **more,
        }
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=2,
        attention_head_dim=4,
        norm_num_groups=8,
        **{"cross_attention_dim": 32, **more},
    ).eval()


def encoder(projection: bool = False) -> nn.Module:
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        projection_dim=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=encoder(),
        tokenizer=None,
        unet=unet(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def answer(model: Any) -> torch.Tensor:
    """The output of a UNet or a text encoder, adapted or not, for a fixed input."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    generator = torch.Generator().manual_seed(5)
    if not isinstance(base, UNet2DConditionModel):
        return model(torch.randint(3, VOCABULARY, (2, 7), generator=generator)).last_hidden_state
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 7, 32, generator=generator)
    more = {}
    if base.config.addition_embed_type:
        more = {"text_embeds": torch.randn(2, 16, generator=generator), "time_ids": torch.ones(2, 6)}
    return model(sample, 11, text, added_cond_kwargs=more or None).sample


def save_pipeline(folder: Path, xl: bool = False, **scheduler: Any) -> Path:
    """A whole pipeline with random weights as diffusers writes it: pictures of 16 pixels, latents of 8."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(3)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=1.0,
    ).eval()
    words = tokenizer(folder / "words")
    noise = DDIMScheduler(steps_offset=1, clip_sample=False, **scheduler)
    if xl:
        made: Any = StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=encoder(),
            text_encoder_2=encoder(projection=True),
            tokenizer=words,
            tokenizer_2=words,
            unet=unet(xl=True, cross_attention_dim=64),
            scheduler=noise,
        )
    else:
        made = StableDiffusionPipeline(
            vae=vae,
            text_encoder=encoder(),
            tokenizer=words,
            unet=unet(),
            scheduler=noise,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    made.save_pretrained(folder / "base")
    return folder / "base"


def tokenizer(folder: Path) -> CLIPTokenizer:
    """One token a letter, within the text encoder's vocabulary."""
    letters = sorted("abcdefghijklmnopqrstuvwxyz")
    tokens = ["<pad>", "<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    found: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=16)
    return found
