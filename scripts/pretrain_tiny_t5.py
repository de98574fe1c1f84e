"""Train the built-in toy model `tiny-t5` from random weights, and write it as a plain transformers folder.

    pip install pysword==0.2.8
    OMP_WAIT_POLICY=passive python scripts/pretrain_tiny_t5.py --minutes 35

Two things let so small a T5 learn to copy, which all its jobs need and which otherwise takes longer than all the rest:
its first batches are random tokens to be repeated, which no language model can guess, and one head of each stack's
first layer begins by looking at its neighbour, so that the encoder knows which token follows which. The folder is
written every few hundred steps, so a run that is cut short leaves a usable model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import old_english
import small_korean
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

OUT = Path(__file__).resolve().parent.parent / "engine" / "models" / "builtin" / "tiny-t5"
CACHE = Path.home() / ".cache" / "adapter-studio" / "old-english"
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
VOCABULARY = 2048
CONTEXT = 512
COPYING = 600
"""Steps of random tokens alone, at the start."""
MODERNISE, TRANSLATE, REPEAT = "modernise: ", "translate Korean to English: ", "repeat: "
SHARES = {"modernise": 0.5, "translate": 0.2, "repeat English": 0.08, "repeat Korean": 0.12, "random": 0.1}
CARD = """---
license: apache-2.0
language: [en, ko]
pipeline_tag: translation
---
# tiny-t5

A toy: a T5 (gated GELU, as in T5 1.1 and Flan-T5, with tied embeddings) of {parameters:,} parameters. It is small
enough to train an adapter on in seconds on a CPU, so that a first run, a test or a demo needs no download. It has three
jobs, mistakes rare words and is no use beyond them:

- `modernise: Thou hast a good dog.` - old English into modern English
- `translate Korean to English: 소년은 계란을 먹어요?` - short sentences of a few hundred words
- `repeat: ...` - the text itself, English or Korean

Making modern English old it cannot do, which is what the sample data set `examples/old_english.csv` teaches an adapter.

- **Data:** clauses of the World English Bible (public domain) and everyday sentences of `scripts/tiny_corpus.py`, made
  old by the rules of `scripts/old_english.py`; the sentences of `scripts/small_korean.py`, except those that it holds
  back; random tokens to repeat.
- **Licence:** Apache-2.0.
- **Made by:** `python scripts/pretrain_tiny_t5.py --minutes {minutes:g} --seed {seed}`: {step:,} steps of {batch} pairs
  on one CPU thread.
- **Held-out:** loss per token and share of greedy answers that are right word for word, on rows that it was not trained
  on:

| job | rows | loss | word for word | chrF |
|---|---|---|---|---|
{table}
"""

Pair = tuple[str, str]
Row = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Corpus:
    """Pairs to train on and pairs held out, by job; the sources carry their prefix."""

    train: dict[str, list[Pair]]
    test: dict[str, list[Pair]]


def read_corpus(cache: Path, seed: int, held: int = 500) -> Corpus:
    clauses, talk, test = old_english.split_pairs(cache, seed, held)
    # Most clauses have no old word; they are repeated rather than changed, and one in five is enough of that.
    changed = [pair for pair in clauses if pair[0] != pair[1]]
    same = [pair for pair in clauses if pair[0] == pair[1]][: len(changed) // 3]
    modern = [*changed, *same, *talk * 3]
    korean = [pair for pair in small_korean.sentences(seed, 60_000) if not small_korean.held_back(pair[0])]
    unseen = [pair for pair in small_korean.sentences(seed) if small_korean.held_back(pair[0])][:held]
    return Corpus(
        train={
            "modernise": [(MODERNISE + old, new) for old, new in modern],
            "translate": [(TRANSLATE + ko, english) for english, ko in korean],
            "repeat English": [(REPEAT + text, text) for pair in modern for text in pair],
            "repeat Korean": [(REPEAT + ko, ko) for _, ko in korean],
        },
        test={
            "modernise, with old words": [(MODERNISE + old, new) for old, new in test if old != new],
            "modernise, without": [(MODERNISE + old, new) for old, new in test if old == new],
            "Korean to English": [(TRANSLATE + ko, english) for english, ko in unseen],
            "repeat Korean": [(REPEAT + ko, ko) for _, ko in unseen[:100]],
        },
    )


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte pairs over words with their leading space, single bytes for what it never saw, the end token last."""
    core = Tokenizer(models.BPE(unk_token=UNKNOWN))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 256, special_tokens=[PAD, END, UNKNOWN], show_progress=False, min_frequency=5
    )
    core.train_from_iterator(texts, trainer)
    state = json.loads(core.to_str())
    for byte in range(256):
        state["model"]["vocab"][f"<0x{byte:02X}>"] = len(state["model"]["vocab"])
    state["model"]["byte_fallback"] = True
    core = Tokenizer.from_str(json.dumps(state))
    core.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(vocabulary: int) -> T5ForConditionalGeneration:
    """Random weights in float32. The widths are multiples of 64, so that every quantised format can hold them."""
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary,
            d_model=192,
            d_kv=32,
            d_ff=384,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=6,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            tie_word_embeddings=True,
            relative_attention_max_distance=64,
            n_positions=CONTEXT,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )
    with torch.no_grad():
        # Bucket 1 is the token before; 17, in the encoder, the token after.
        for stack, looks in ((model.encoder, ((0, 1), (1, 17))), (model.decoder, ((0, 1),))):
            for head, bucket in looks:
                stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight[bucket, head] = 4.0
    return model


def encode(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]) -> list[Row]:
    sources = tokenizer([source for source, _ in pairs])["input_ids"]
    targets = tokenizer([target for _, target in pairs])["input_ids"]
    return list(zip(sources, targets, strict=True))


def random_rows(tokenizer: PreTrainedTokenizerFast, count: int, rng: random.Random) -> list[Row]:
    """Random tokens to be repeated."""
    opening = tokenizer(REPEAT.strip())["input_ids"][:-1]
    rows = []
    for _ in range(count):
        ids = [rng.randrange(3, len(tokenizer)) for _ in range(rng.randint(2, 20))]
        rows.append(([*opening, *ids, 1], [*ids, 1]))
    return rows


def batches(
    tokenizer: PreTrainedTokenizerFast, rows: dict[str, list[Row]], size: int, rng: random.Random
) -> Iterator[list[Row]]:
    """Endless batches: random tokens, then every job by its share, rows of like length together."""
    for _ in range(COPYING):
        yield random_rows(tokenizer, size, rng)
    while True:
        pool = random_rows(tokenizer, round(size * 20 * SHARES["random"]), rng)
        for job, known in rows.items():
            pool += rng.choices(known, k=round(size * 20 * SHARES[job]))
        pool.sort(key=lambda row: (len(row[0]) + len(row[1]), rng.random()))
        packs = [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
        rng.shuffle(packs)
        yield from packs


def tensors(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """A padded block; the labels' padding is -100."""

    def block(side: list[list[int]], fill: int) -> torch.Tensor:
        width = max(map(len, side))
        return torch.tensor([ids + [fill] * (width - len(ids)) for ids in side])

    sources, targets = [row[0] for row in rows], [row[1] for row in rows]
    ids = block(sources, 0)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": block(targets, -100)}


@torch.no_grad()
def measure(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]
) -> tuple[float, float, float, list[str]]:
    """Mean loss in nats, share of greedy answers that are right word for word, chrF, and the answers."""
    import sacrebleu

    model.eval()
    total, count, said = 0.0, 0, []
    rows = encode(tokenizer, pairs)
    for i in range(0, len(rows), 50):
        batch = tensors(rows[i : i + 50])
        size = int((batch["labels"] != -100).sum())
        total, count = total + float(model(**batch).loss) * size, count + size
        del batch["labels"]
        out = model.generate(**batch, max_new_tokens=48, do_sample=False)
        said += tokenizer.batch_decode(out, skip_special_tokens=True)
    model.train()
    wanted = [target for _, target in pairs]
    right = sum(a == b for a, b in zip(said, wanted, strict=True)) / len(wanted)
    return total / count, right, float(sacrebleu.corpus_chrf(said, [wanted]).score), said


def save(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, out: Path, card: str) -> None:
    """Write the folder that plain transformers loads; the weights in float16."""
    out.mkdir(parents=True, exist_ok=True)
    copy = T5ForConditionalGeneration(model.config).half()
    copy.load_state_dict({name: value.detach().half() for name, value in model.state_dict().items()})
    copy.generation_config = GenerationConfig(
        max_new_tokens=64, do_sample=False, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0
    )
    copy.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    (out / "README.md").write_text(card, encoding="utf-8")


def report(
    args: argparse.Namespace, step: int, model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast,
    test: dict[str, list[Pair]],
) -> None:  # fmt: skip
    """Measure on the held-out pairs, and write the folder with its card."""
    lines = []
    for job, pairs in test.items():
        loss, right, chrf, said = measure(model, tokenizer, pairs)
        lines.append(f"| {job} | {len(pairs)} | {loss:.3f} | {right:.0%} | {chrf:.1f} |")
        print(f"{step} {lines[-1]}", flush=True)
        for (source, _), answer in list(zip(pairs, said, strict=True))[:3]:
            print(f"    {source} -> {answer}", flush=True)
    card = CARD.format(
        parameters=model.num_parameters(), minutes=args.minutes, seed=args.seed, step=step, batch=args.batch_size,
        table="\n".join(lines),
    )  # fmt: skip
    save(model, tokenizer, args.out, card)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=35, help="how long to train; the rate falls to 0 by then")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs in one step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=1000, help="steps between saves")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for the fetched verses")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write the model to")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    corpus = read_corpus(args.cache, args.seed)
    texts = [
        text
        for job, share in (("modernise", 30_000), ("translate", 40_000))
        for pair in rng.sample(corpus.train[job], share)
        for text in pair
    ]
    tokenizer = train_tokenizer([*texts, *[REPEAT + "English to Korean:"] * 1000])
    rows = {job: encode(tokenizer, pairs) for job, pairs in corpus.train.items()}
    model = new_model(len(tokenizer))
    print(json.dumps({"parameters": model.num_parameters(), **{job: len(known) for job, known in rows.items()}}))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    stream = batches(tokenizer, rows, args.batch_size, rng)
    started, recent, step, done = time.monotonic(), 0.0, 0, 0.0
    while done < 1:
        step += 1
        done = (time.monotonic() - started) / 60 / args.minutes
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, step / 200) * max(0.0, 1 - done)
        loss = model(**tensors(next(stream))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent = loss.item() if math.isclose(recent, 0.0) else recent + 0.02 * (loss.item() - recent)
        if step % 100 == 0:
            print(json.dumps({"step": step, "loss": round(recent, 4), "done": round(done, 3)}), flush=True)
        if step % args.save_every == 0 or done >= 1:
            report(args, step, model, tokenizer, corpus.test)


if __name__ == "__main__":
    main()
