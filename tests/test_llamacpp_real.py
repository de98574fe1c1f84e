"""GGUF files in llama.cpp itself: the same tokens and the same logits as in memory.

Wants the package `llama-cpp-python`, which is compiled when it is installed; it is no part of `requirements-dev.txt`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_adapters import lora, write
from test_llamacpp import TEXT, llama, sentencepiece

from engine.llamacpp.adapter import write_adapter
from engine.llamacpp.model import write_model
from engine.models.loading import load_causal_lm, load_config, load_tokenizer

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which is not installed")

TEXTS = (
    TEXT,
    "Hello  world\n\n 3.14 don't  ",
    "한국어 텍스트 é",
    "<|user|>hi<|end|><|assistant|>",
    "    def f(x):\n\treturn 2",
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def asked(path: Path, ids: list[int], adapter: Path | None = None) -> tuple[Any, Any]:
    """(the model in llama.cpp, its logits)."""
    over = {"lora_path": str(adapter)} if adapter else {}
    model = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1, **over)
    model.eval(ids)
    return model, np.array(model.scores[: len(ids)])


def said(model: Any, ids: list[int]) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize(
    ("base", "size"), [("tiny-llama", 0.05), pytest.param("smollm2-135m-instruct", 0.01, marks=pytest.mark.slow)]
)
def test_a_base_with_its_adapter_over_it_and_in_it(tmp_path: Path, base: str, size: float) -> None:
    from engine import PeftModel

    config = lora(target_modules=TARGETS, rank_pattern={"k_proj": 6}, alpha_pattern={"up_proj": 3}, use_rslora=True)
    folder = write(tmp_path / "adapter", config, base, size=size)
    whole, tokenizer = load_causal_lm(base, precision="fp32")
    ids = tokenizer(TEXT)["input_ids"]
    path = write_model(whole, tokenizer, tmp_path / "base.gguf", "f32")
    alone = write_adapter(folder, load_config(base), tmp_path / "lora.gguf")
    plain = said(whole, ids)
    adapted: Any = PeftModel.from_pretrained(whole, folder, "one")
    wanted = said(adapted, ids)
    largest = float(np.abs(wanted).max())
    model, found = asked(path, ids)
    np.testing.assert_allclose(found, plain, atol=0.002 * largest)
    for text in TEXTS:
        told = model.tokenize(text.encode(), add_bos=False, special=True)
        assert told == tokenizer(text, add_special_tokens=False)["input_ids"], text
    assert np.abs(wanted - plain).max() > 0.02 * largest
    np.testing.assert_allclose(asked(path, ids, alone)[1], wanted, atol=0.002 * largest)
    merged = adapted.merge_and_unload(adapter_names=["one"])
    for precision, far in (("f32", 0.002), ("f16", 0.004), ("bf16", 0.03), ("q8_0", 0.1)):
        found = asked(write_model(merged, tokenizer, tmp_path / "merged.gguf", precision), ids)[1]
        np.testing.assert_allclose(found, wanted, atol=far * largest)
        same = int((found.argmax(1) == wanted.argmax(1)).sum())
        apart = np.abs(found - wanted).max()
        print(f"{base} {precision}: {apart:.2g} of {largest:.2g}; {same} of {len(ids)} likeliest tokens the same")


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        {"head_dim": 32},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e3,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
    ids=["biases", "wide heads", "linear", "llama3"],
)
def test_each_shape_of_a_llama(tmp_path: Path, changes: dict[str, Any]) -> None:
    model, tokenizer = llama(**changes), load_tokenizer("tiny-llama")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = (tokenizer(TEXT)["input_ids"] * 9)[:120]
    wanted = said(model, ids)
    path = write_model(model, tokenizer, tmp_path / "model.gguf", "f32")
    np.testing.assert_allclose(asked(path, ids)[1], wanted, atol=0.01 * np.abs(wanted).max())


@pytest.mark.parametrize("prepend", [True, False])
def test_tokens_of_a_sentencepiece_vocabulary(tmp_path: Path, prepend: bool) -> None:
    tokenizer = sentencepiece(prepend)
    path = write_model(llama(vocab_size=300), tokenizer, tmp_path / "model.gguf", "f32")
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in ("an apple and an apple", "and  andnd apple é ½", "band ap ple", "<s>and apple</s>an"):
        told = model.tokenize(text.encode(), add_bos=False, special=True)
        assert told == tokenizer(text, add_special_tokens=False)["input_ids"], text
