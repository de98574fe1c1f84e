"""Pretrain `tiny-blip`: a BLIP of 64 pixels that names emoji, on whatever ground they stand.

One caption in eight names the ground instead, or begins with the words of a style, so that every word has a meaning.

    python scripts/pretrain_tiny_blip.py --font font --annotations package --out engine/models/builtin/tiny-blip

The language-modelling half of BLIP (Li et al. 2022, arXiv:2201.12086), on one core for `--minutes`.
`scripts/emoji_pictures.py` says where the pictures come from.
"""

from __future__ import annotations

import argparse
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
from emoji_pictures import COLOURS, SIDE, emoji, varied
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

MEAN, STD = 0.5, 0.5
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
WORDS = "a an the of in on and with view detailed artistic style picture photo painting sketch background ground"


def tokenizer(captions: Sequence[str], folder: Path) -> BertTokenizer:
    """BERT's word pieces, learned from the captions, the colours and a few common words."""
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer()
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters = [chr(code) for code in range(33, 127)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=1500, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False
    )
    learner.train_from_iterator([*captions, *[f"{WORDS} {' '.join(COLOURS)}"] * 50], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    ranked = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("\n".join(token for token, _ in ranked) + "\n")
    return BertTokenizer.from_pretrained(folder, bos_token="[DEC]", model_max_length=48)


PER_NAME = 1 + len(COLOURS) + 2


def captions(name: str) -> list[str]:
    """The name, the name with each ground, and in two styles."""
    grounds = [f"a {colour} background with {name}" for colour in COLOURS]
    return [name, *grounds, f"a detailed picture of {name}", f"an artistic view of {name}"]


def fresh(words: BertTokenizer) -> BlipForConditionalGeneration:
    ids = {name: words.convert_tokens_to_ids(f"[{name}]") for name in ("PAD", "SEP", "DEC")}
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = BlipConfig(
        vision_config={**shape, "image_size": SIDE, "patch_size": 8, "projection_dim": 64},
        text_config={
            **shape,
            "vocab_size": len(words),
            "encoder_hidden_size": 128,
            "projection_dim": 64,
            "max_position_embeddings": 64,
            "bos_token_id": ids["DEC"],
            "eos_token_id": ids["SEP"],
            "sep_token_id": ids["SEP"],
            "pad_token_id": ids["PAD"],
            "label_smoothing": 0.0,
        },
        projection_dim=64,
        image_text_hidden_size=64,
    )
    return BlipForConditionalGeneration(config)


def pixels(pictures: Sequence[Image.Image]) -> torch.Tensor:
    stacked = np.stack([np.asarray(picture) for picture in pictures]).astype(np.float32) / 255
    return torch.from_numpy((stacked - MEAN) / STD).permute(0, 3, 1, 2).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font", type=Path, required=True, help="the unpacked Debian package")
    parser.add_argument("--annotations", type=Path, required=True, help="the unpacked npm package")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a folder that an earlier call wrote, to go on from")
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    pictures = emoji(args.font, args.annotations)
    draft = Path(tempfile.mkdtemp(dir=args.out.parent))
    if args.start:
        words = BertTokenizer.from_pretrained(args.start)
        model = BlipForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32).train()
    else:
        words = tokenizer(list(pictures), draft / "words")
        shutil.rmtree(draft / "words")
        model = fresh(words)
    names = list(pictures)
    said = [text for name in names for text in captions(name)]
    ids = words(said, padding=True, return_tensors="pt").input_ids
    ids[:, 0] = words.convert_tokens_to_ids("[DEC]")
    pad = words.pad_token_id
    log = args.out.with_suffix(".log")
    with log.open("a") as file:
        file.write(f"{len(names)} pictures, {sum(p.numel() for p in model.parameters())} parameters\n")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    rng, started, step, recent = random.Random(0), time.time(), 0, 0.0
    while (done := (time.time() - started) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, done / 0.05 + 0.01) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        drawn, rows = [], []
        for n in rng.choices(range(len(names)), k=32):
            how = rng.randrange(1, PER_NAME) if rng.random() < 0.125 else 0
            ground = list(COLOURS.values())[how - 1] if 0 < how <= len(COLOURS) else None
            drawn.append(varied(pictures[names[n]], rng, ground=ground))
            rows.append(n * PER_NAME + how)
        batch, read = pixels(drawn), ids[rows]
        read = read[:, : int((read != pad).sum(dim=1).max())]
        logits = model(pixel_values=batch, input_ids=read, attention_mask=(read != pad).long()).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), read[:, 1:].flatten(), ignore_index=pad)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        recent = loss.item() if step == 1 else 0.98 * recent + 0.02 * loss.item()
        if step % 100 == 0:
            with log.open("a") as file:
                file.write(f"{step} {done:.2f} loss {recent:.4f}\n")
    model.eval().half().save_pretrained(draft)
    seen = BlipImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=[MEAN] * 3, image_std=[STD] * 3)
    BlipProcessor(seen, words).save_pretrained(draft)
    shutil.rmtree(args.out, ignore_errors=True)
    draft.rename(args.out)


if __name__ == "__main__":
    main()
