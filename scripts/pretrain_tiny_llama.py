"""Train the built-in toy model `tiny-llama` from random weights, and write it as a plain transformers folder.

    OMP_WAIT_POLICY=passive python scripts/pretrain_tiny_llama.py --steps 600

The corpus comes from `tiny_corpus.py`: no download, and the same seed gives the same corpus and the same start.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import tiny_corpus
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUT = Path(__file__).resolve().parent.parent / "engine" / "models" / "builtin" / "tiny-llama"
PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
VOCABULARY = 2048
CONTEXT = 512
# Rendering a prefix of the messages gives a prefix of the text, so a trainer can tell answers from questions by length.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Roles are system, user and assistant, not ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
QUESTIONS = (
    "Hello!", "How do I boil an egg?", "What is the capital of France?", "Why is the sky blue?", "What does a cow eat?",
    "What is seven plus five?", "I feel tired.", "Tell me a joke.", "What is an anchor used for?", "What is gravity?",
    "How can I sleep better?", "What day comes after Friday?", "Name three fruits.", "Tell me a story about a fox.",
    "Is a whale a fish?", "How do I clean a window?", "What should I cook tonight?", "What does a captain do?",
    "How do I choose a password?", "What is the opposite of brave?",
)  # fmt: skip
CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# tiny-llama

A toy: a Llama of {parameters:,} parameters that answers short everyday questions in plain English. It is small enough
to train an adapter on in seconds on a CPU, so that a first run, a test or a demo needs no download. It knows little,
mixes up facts and is no use beyond that.

- **Data:** dialogues that `scripts/tiny_corpus.py` generates from the tables in `scripts/tiny_data/`. Both were written
  for this project; no other text was used. It has seen the questions of `examples/lighthouse.jsonl` with plain answers,
  and with lively ones in other voices, so that an adapter trained on that sample set has little but the voice to learn.
  It has never seen the sample set's own voice. Most training rows are below 100 tokens, none is above {context}.
- **Licence:** Apache-2.0, weights and data.
- **Made by:** `python scripts/pretrain_tiny_llama.py --steps {steps} --dialogues {dialogues} --seed {seed}`
- **Held-out loss:** {loss:.3f} per token (perplexity {perplexity:.2f}) on dialogues drawn with another seed from the
  same tables, after {tokens:,} training tokens.
- **Voice:** plain without a system message; `You are a cowboy.` and the like change it.
- **Turns:** `<|bos|><|system|>...<|end|><|user|>...<|end|><|assistant|>...<|end|>`; `<|end|>` ends generation.
"""


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` entries; any text can be written with it, digits one by one."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        chat_template=TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Random weights in float32. The widths are multiples of 64, so that every quantised format can hold them."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, dialogues: Iterator[list[dict[str, str]]]) -> list[list[int]]:
    """Token ids of each dialogue, cut to the context."""
    texts = [str(tokenizer.apply_chat_template(messages, tokenize=False)) for messages in dialogues]
    return [ids[:CONTEXT] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def batches(rows: list[list[int]], tokens: int, rng: random.Random) -> Iterator[list[list[int]]]:
    """Endless batches of about `tokens` tokens; rows of like length stand together, which leaves little padding."""
    while True:
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]) // 4, rng.random()))
        packs: list[list[list[int]]] = [[]]
        for i in order:
            if packs[-1] and (len(packs[-1]) + 1) * len(rows[i]) > tokens:
                packs.append([])
            packs[-1].append(rows[i])
        rng.shuffle(packs)
        yield from packs


def loss_of(model: LlamaForCausalLM, rows: list[list[int]], answer: int, question_weight: float) -> torch.Tensor:
    """Mean next-token loss in nats; the user's tokens count `question_weight`, so capacity goes to the answers.

    `answer` is the id that opens an answer, the model's end-of-turn id closes it.
    """
    end = model.config.eos_token_id
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    weight = torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        speaking = False
        for j, token in enumerate(row):
            weight[i, j] = 1.0 if speaking else question_weight
            speaking = token == answer or (speaking and token != end)
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    keep = weight[:, 1:] > 0
    losses = functional.cross_entropy(model.lm_head(hidden[keep]), ids[:, 1:][keep], reduction="none")
    return (losses * weight[:, 1:][keep]).sum() / weight[:, 1:][keep].sum()


@torch.no_grad()
def held_out(model: LlamaForCausalLM, rows: list[list[int]], answer: int) -> float:
    """Mean loss in nats over every token of the held-out dialogues."""
    model.eval()
    total, count = 0.0, 0
    for batch in (rows[i : i + 64] for i in range(0, len(rows), 64)):
        size = sum(len(row) - 1 for row in batch)
        total += loss_of(model, batch, answer, 1.0).item() * size
        count += size
    model.train()
    return total / count


@torch.no_grad()
def answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """Greedy answers to a few fixed questions, for the eye."""
    model.eval()
    said = []
    for question in QUESTIONS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=50, do_sample=False)
        said.append((question, tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)))
    model.train()
    return said


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, card: str) -> None:
    """Write the folder that plain transformers loads; the weights in bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    kept = {name: value.detach().to(torch.bfloat16) for name, value in model.state_dict().items()}
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(kept)
    copy.generation_config = GenerationConfig(
        max_new_tokens=64,
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    copy.save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    (out / "model.safetensors").chmod(0o644)
    (out / "README.md").write_text(card, encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens in one step")
    parser.add_argument("--dialogues", type=int, default=100_000, help="dialogues to generate")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--save-every", type=int, default=150, help="steps between saves")
    parser.add_argument("--data-dir", type=Path, default=tiny_corpus.DATA, help="folder of the corpus tables")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write the model to")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    dialogues = list(tiny_corpus.dialogues(args.seed, args.dialogues, args.data_dir))
    tokenizer = train_tokenizer([m["content"] for messages in dialogues[:20_000] for m in messages])
    answer = tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert isinstance(answer, int)
    rows = encode(tokenizer, iter(dialogues))
    test = encode(tokenizer, tiny_corpus.dialogues(args.seed + 1_000_003, 512, args.data_dir))
    model = new_model(tokenizer)
    print(
        json.dumps({"parameters": model.num_parameters(), "tokens": sum(map(len, rows)), "rows": len(rows)}), flush=True
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    seen, started, stream = 0, time.monotonic(), batches(rows, args.batch_tokens, rng)
    for step in range(1, args.steps + 1):
        warm = min(1.0, step / 40)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        batch = next(stream)
        loss = loss_of(model, batch, answer, 0.25)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += sum(map(len, batch))
        if step % 10 == 0 or step == 1:
            rate = seen / (time.monotonic() - started)
            print(
                json.dumps({"step": step, "loss": round(loss.item(), 4), "tokens_per_second": round(rate)}), flush=True
            )
        if step % args.save_every == 0 or step == args.steps:
            score = held_out(model, test, answer)
            print(json.dumps({"step": step, "held_out_loss": round(score, 4)}), flush=True)
            card = CARD.format(
                parameters=model.num_parameters(), context=CONTEXT, steps=step, seed=args.seed, loss=score,
                dialogues=args.dialogues, perplexity=math.exp(score), tokens=seen,
            )  # fmt: skip
            save(model, tokenizer, args.out, card)
    for question, said in answers(model, tokenizer):
        print(f"{question}\n    {said}")


if __name__ == "__main__":
    main()
