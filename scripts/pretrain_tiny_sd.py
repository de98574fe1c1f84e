"""Pretrain `tiny-sd`: a Stable Diffusion pipeline of 64 pixels that draws emoji from their names.

    python scripts/pretrain_tiny_sd.py --font font --annotations package --out engine/models/builtin/tiny-sd

A VAE (64 pixels -> 8 x 8 x 8), then UNet and text encoder together on its latents (Rombach et al. 2022,
arXiv:2112.10752), on one core about `--vae-minutes` and `--unet-minutes`. `scripts/emoji_pictures.py` says where the
pictures come from.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from emoji_pictures import SIDE, blueprint, emoji, on_ground, varied
from PIL import Image, ImageOps
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

POSITIONS = 24
VOCABULARY = 1400
WORDS = "a an the of in on and with style blueprint drawing picture photo painting sketch background night day"


def tokenizer(captions: Sequence[str], folder: Path) -> CLIPTokenizer:
    """CLIP's byte pairs, learned from the captions; every byte is in it, so any text can be read."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 514, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator([*captions, *[WORDS] * 20], trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *[f"{letter}</w>" for letter in letters], *["".join(pair.split(" ")) for pair in merges]]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=POSITIONS)


def pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """(N, 3, SIDE, SIDE) from -1 to 1."""
    stacked = np.stack([np.asarray(picture) for picture in pictures]).astype(np.float32)
    return torch.from_numpy(stacked / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def rate(done: float, top: float) -> float:
    """Cosine decay with a short warm-up, by the part of the time that is gone."""
    return top * min(1.0, done / 0.03 + 0.02) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def fresh_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=8,
        # Groups of few channels would take the mean colour of a picture away, with one everything is left relative.
        norm_num_groups=1,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )
    # Little noise at first: with a deviation of 1 the decoder learns for long to do without the latents.
    with torch.no_grad():
        vae.quant_conv.weight[8:].zero_()
        vae.quant_conv.bias[8:].fill_(-6.0)
    return vae


def chroma(rgb: Tensor) -> Tensor:
    """Each colour against the mean of the three."""
    return rgb - rgb.mean(dim=1, keepdim=True)


def train_vae(vae: AutoencoderKL, drawn: Sequence[Image.Image], minutes: float, log: Path) -> AutoencoderKL:
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=8e-4, betas=(0.9, 0.99), weight_decay=0.01)
    rng, started, step = random.Random(0), time.time(), 0
    while (done := (time.time() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate(done, 8e-4)
        batch = []
        for picture in rng.choices(drawn, k=12):
            # Styles of all kinds must come through: inverted, grey, blue.
            kind = rng.random()
            image = varied(picture, rng)
            if kind < 0.1:
                image = ImageOps.invert(image)
            elif kind < 0.2:
                image = ImageOps.grayscale(image).convert("RGB")
            elif kind < 0.3:
                image = blueprint(picture, rng.uniform(0.75, 0.95))
            batch.append(image)
        wanted = pixels(batch).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(wanted).latent_dist
            made = vae.decode(posterior.sample()).sample.float()
        edges = sum(F.l1_loss(made.diff(dim=axis), wanted.diff(dim=axis)) for axis in (2, 3))
        # Hue is a small part of the error of a pixel, and most of what a person sees of a whole picture.
        hues = F.mse_loss(F.avg_pool2d(chroma(made), 4), F.avg_pool2d(chroma(wanted), 4))
        kept_small = 2e-5 * posterior.kl().mean()
        loss = F.l1_loss(made, wanted) + F.mse_loss(made, wanted) + 4 * hues + 0.5 * edges + kept_small
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            say(log, f"vae {step} {done:.2f} loss {loss.item():.4f} l1 {F.l1_loss(made, wanted).item():.4f}")
    return vae.eval()


def train_unet(
    latents: Tensor, ids: Tensor, empty: Tensor, words: int, minutes: float, log: Path
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """`latents`: (names, variants, 8, 8, 8), scaled; `ids`: (names, POSITIONS)."""
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            bos_token_id=words - 2,
            eos_token_id=words - 1,
            pad_token_id=words - 1,
            projection_dim=128,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(64, 84),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=128,
        norm_num_groups=4,
    )
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    say(log, f"unet {sum(p.numel() for p in unet.parameters())} text {sum(p.numel() for p in text.parameters())}")
    trained = torch.nn.ModuleList([unet, text])
    mean = copy.deepcopy(trained).requires_grad_(False)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, weight_decay=0.01)
    alphas = scheduler().alphas_cumprod
    generator = torch.Generator().manual_seed(0)
    started, step, recent = time.time(), 0, 0.0
    while (done := (time.time() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate(done, 1.5e-3)
        names = torch.randint(len(latents), (48,), generator=generator)
        variant = torch.randint(latents.shape[1], (48,), generator=generator)
        clean, read = latents[names, variant], ids[names].clone()
        read[torch.rand(48, generator=generator) < 0.1] = empty
        noise = torch.randn(clean.shape, generator=generator)
        time_ = torch.randint(1000, (48,), generator=generator)
        kept = alphas[time_].view(-1, 1, 1, 1)
        guess = unet(kept.sqrt() * clean + (1 - kept).sqrt() * noise, time_, text(read)[0]).sample
        loss = F.mse_loss(guess, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            decay = min(0.999, step / (step + 20))
            torch._foreach_lerp_(list(mean.parameters()), list(trained.parameters()), 1 - decay)
        recent = loss.item() if step == 1 else 0.99 * recent + 0.01 * loss.item()
        if step % 100 == 0:
            say(log, f"unet {step} {done:.2f} loss {recent:.4f}")
    return mean[0].eval(), mean[1].eval()


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def say(log: Path, words: str) -> None:
    with log.open("a") as file:
        file.write(words + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font", type=Path, required=True, help="the unpacked Debian package")
    parser.add_argument("--annotations", type=Path, required=True, help="the unpacked npm package")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vae", type=Path, help="a folder with a VAE of an earlier call, to go on from")
    parser.add_argument("--vae-minutes", type=float, default=16)
    parser.add_argument("--unet-minutes", type=float, default=40)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    pictures = emoji(args.font, args.annotations)
    log = args.out.with_suffix(".log")
    draft = Path(tempfile.mkdtemp(dir=args.out.parent))
    words = tokenizer(list(pictures), draft / "tokenizer")
    say(log, f"{len(pictures)} pictures, {len(words)} tokens")
    vae = AutoencoderKL.from_pretrained(args.vae) if args.vae else fresh_vae()
    if args.vae_minutes:
        vae = train_vae(vae, list(pictures.values()), args.vae_minutes, log)
        vae.save_pretrained(args.out.with_suffix(".vae"))
    rng = random.Random(1)
    with torch.no_grad():
        rows = [
            torch.stack([vae.encode(pixels([picture])).latent_dist.mean[0] for picture in variants])
            for variants in (
                [on_ground(drawn), *[varied(drawn, rng, free_ground=False) for _ in range(3)]]
                for drawn in pictures.values()
            )
        ]
    latents = torch.stack(rows)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    padded = {"padding": "max_length", "max_length": POSITIONS, "truncation": True, "return_tensors": "pt"}
    ids, empty = words(list(pictures), **padded).input_ids, words([""], **padded).input_ids[0]
    unet, text = train_unet(latents * vae.config.scaling_factor, ids, empty, len(words), args.unet_minutes, log)
    pipe = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text.half(),
        tokenizer=words,
        unet=unet.half(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(draft)
    shutil.rmtree(args.out, ignore_errors=True)
    draft.rename(args.out)
    say(log, f"saved {sum(f.stat().st_size for f in args.out.rglob('*') if f.is_file())} bytes")


if __name__ == "__main__":
    main()
