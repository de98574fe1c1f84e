"""A Llama of a few thousand weights, for tests about finding and loading models."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def build(folder: Path, **changes: Any) -> Path:
    """A Llama of a few thousand weights with a word tokenizer, as `save_pretrained` writes it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    shape = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "hello": 2, "world": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)
    return folder


def as_files(folder: Path) -> dict[str, bytes]:
    """Name -> content of a folder's files."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
