"""Turn a GGUF file into a normal model folder: safetensors in bf16, tokenizer with its chat template.

`python -m engine.models.convert FILE.gguf FOLDER` is the child of `engine.models.fetch`: it imports torch, which the
process that fetches must not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_SPECIAL = 3  # GGUF's token type "control"


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file to `folder`, as `save_pretrained` does; plain transformers loads it.

    The weights keep the quantised file's rounding: they are its values, stored as bf16.
    """
    tokenizer = _tokenizer(gguf)
    model = _model(gguf)
    model.config.bos_token_id = model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    # The file's own title, which transformers would show as the place that the model was loaded from.
    vars(model.config).pop("_model_name_or_path", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _settle(folder)


def _model(gguf: Path) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    # save_pretrained would otherwise write a GGUF quantisation that the saved weights no longer have.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # GGUF has no flag for tied embeddings: it leaves the output matrix out when it is the input matrix.
    config.tie_word_embeddings = "output.weight" not in _tensor_names(gguf)
    fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    small: PreTrainedModel = fresh.to(dtype=torch.bfloat16)
    return small


def _settle(folder: Path) -> None:
    """Name the tokenizer's class as every version of transformers knows it; give all files the user's usual rights."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(path.stat().st_mode)


def _tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """The byte-level BPE of the file, with SmolLM2's rule that every digit is a token of its own.

    Built from the file's own vocabulary: the general GGUF reader of transformers splits the words by another rule.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = _fields(gguf)
    if (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise ValueError(f"{gguf.name} has the tokenizer {fields['tokenizer.ggml.pre']!r}; needed: 'smollm'")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    fast = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    fast.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    fast.add_special_tokens(
        [AddedToken(token, special=True, normalized=False)
         for token, kind in zip(tokens, kinds, strict=True) if kind == _SPECIAL]
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def _fields(gguf: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(gguf).fields.items()}


def _tensor_names(gguf: Path) -> set[str]:
    from gguf import GGUFReader

    return {tensor.name for tensor in GGUFReader(gguf).tensors}


def main(argv: Sequence[str] | None = None) -> int:
    """Convert one file; the exit code is 0 when the folder is complete."""
    parser = argparse.ArgumentParser(prog="python -m engine.models.convert", description=main.__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(argv)
    threads.apply()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    convert(options.gguf, options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
