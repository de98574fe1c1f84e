"""A BERT of a few thousand weights with a word tokenizer, as `save_pretrained` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GOOD = ("lovely", "bright", "warm", "gentle", "happy", "sweet")
BAD = ("awful", "dark", "cold", "harsh", "sad", "bitter")
REST = ("the", "a", "day", "room", "song", "meal", "was", "and", "very", "quite")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *REST)


def build(folder: Path, **changes: Any) -> Path:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    shape = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0, "initializer_range": 0.2,
             "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
    BertModel(BertConfig(**{**shape, **changes})).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    return folder


def rows(count: int, several: bool = False) -> list[dict[str, Any]]:
    """Texts whose words tell their labels: `good` or `bad`; with `several` also `dark` rooms, both, or none."""
    found: list[dict[str, Any]] = []
    for number in range(count):
        good, bad, rest = (words[number // 4 % len(words)] for words in (GOOD, BAD, REST))
        kinds = ((["good"], f"the {rest} {number % 5} was {good}"), (["bad"], f"the {rest} {number % 5} was {bad}"))
        both = ((["good", "bad"], f"a {rest} {good} and {bad}"), ([], f"a {rest} and the {rest}"))
        labels, text = (kinds + both if several else kinds)[number % (4 if several else 2)]
        found.append({"text": f"{text} {' '.join(['very'] * (number % 6))} {number}", "label": labels})
    return found if several else [{**row, "label": row["label"][0]} for row in found]
