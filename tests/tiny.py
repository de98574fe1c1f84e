"""Tiny real models, built from their configs with fixed weights, for tests that compare numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 64
# No dropout of their own: training must give the same numbers twice.
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def llama(tie: bool = False) -> nn.Module:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_bias=True,
            tie_word_embeddings=tie,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(1)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
            **QUIET,
        )
    ).eval()


def t5() -> nn.Module:
    torch.manual_seed(1)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            dropout_rate=0.0,
        )
    ).eval()


def bert() -> nn.Module:
    torch.manual_seed(1)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).eval()


class Pixels(nn.Module):
    """Convolutions of every shape that LoRA serves."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=2, dilation=2, padding_mode="reflect", bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).mean((2, 3)))


def pixels() -> nn.Module:
    torch.manual_seed(1)
    return Pixels().eval()


def grouped() -> nn.Module:
    """Pixels with a grouped convolution, and padded with zeros: PEFT's adapters know no other padding."""
    model = pixels()
    model.second = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2).eval()
    return model


def shake(model: nn.Module, size: float = 0.1) -> nn.Module:
    """Random values into everything trainable, so that nothing is the identity by accident."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * size
    return model


def ids(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


def logits(model: nn.Module) -> torch.Tensor:
    """The model's answer to fixed inputs, whatever family it is of."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(base, Pixels):
        return model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)))
    if isinstance(base, T5ForConditionalGeneration):
        return model(input_ids=ids(), decoder_input_ids=ids(length=5)).logits
    return model(input_ids=ids()).logits


FAMILIES: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2, "t5": t5, "bert": bert}
TASK_TYPES = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}
