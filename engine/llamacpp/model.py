"""A whole model as GGUF: the shape of a Llama, its tokenizer, its weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.llamacpp import check_precision
from engine.llamacpp.files import FILE_TYPES, KINDS, Entry, Names, check_family, head_width, kind_for, write
from engine.llamacpp.vocabulary import vocabulary

_HEAD = "lm_head.weight"


def write_model(
    model: nn.Module,
    tokenizer: Any,
    path: str | Path,
    precision: str = "f16",
    name: str = "",
    tell: Callable[[float], None] | None = None,
) -> Path:
    """Write a causal language model of the Llama family; it appears whole or not at all.

    Args:
        model: a plain model in full precision, its adapters merged; on any device, one tensor at a time is copied.
        tokenizer: its tokenizer, with the chat template that goes into the file.
        path: a name that ends in `.gguf`.
        precision: of matrices, one of `PRECISIONS`; vectors are float32.
        name: what the file says that it is.
        tell: told the share of bytes that is written.

    Raises:
        ConfigError: another family, a part that llama.cpp's Llama does not have, a tokenizer that it does not know, or
            numbers that the precision cannot hold.
        CheckpointError: another kind of file name.
    """
    check_precision(precision)
    config: Any = model.config
    check_family(config)
    if type(model).__name__ != "LlamaForCausalLM":
        raise ConfigError(
            f"The model is a {type(model).__name__}; needed: LlamaForCausalLM, which writes texts.",
            "Merge and export an adapter of a chat or text model.",
        )
    words = vocabulary(tokenizer, config.vocab_size)
    entries = _entries(model, precision)

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.MODEL)
        if name:
            writer.add_name(name)
        writer.add_file_type(FILE_TYPES[precision])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _shape(writer, config)
        words.describe(writer)

    return write(Path(path), describe, entries, tell)


def _shape(writer: gguf.GGUFWriter, config: Any) -> None:
    """The model's shape, as llama.cpp has to know it before it reads a tensor."""
    rope, width = config.rope_parameters or {}, head_width(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_vocab_size(config.vocab_size)


def _entries(model: nn.Module, precision: str) -> list[Entry]:
    config: Any = model.config
    names, state = Names(config), model.state_dict()
    if config.tie_word_embeddings:
        # llama.cpp takes the embedding where a file has no output matrix.
        state.pop(_HEAD, None)
    entries = [
        Entry(
            names.of(key),
            tuple(tensor.shape),
            kind_for(tensor.shape, precision),
            partial(names.rows, key.rpartition(".")[0], tensor),
        )
        for key, tensor in state.items()
    ]
    if (config.rope_parameters or {}).get("rope_type") == "llama3":
        factors = _rope_factors(model, config)
        entries.append(Entry("rope_freqs.weight", tuple(factors.shape), KINDS["f32"], factors.float))
    return entries


def _rope_factors(model: Any, config: Any) -> Tensor:
    """What Llama 3.1 divides each frequency theta^(-2i/width) by, from those by which the model itself turns."""
    width = head_width(config)
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    factors: Tensor = plain / model.model.rotary_emb.inv_freq.double().cpu()
    return factors.float()
