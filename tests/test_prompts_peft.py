"""Prompt Tuning, P-Tuning and Prefix Tuning against the PEFT library, in both directions."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import engine
from tests import differential, tiny
from tests.differential import peft

SMALL = {"num_virtual_tokens": 4}
HIDDEN = {**SMALL, "encoder_hidden_size": 16}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", SMALL),
    "sampled": ("PromptTuningConfig", {**SMALL, "prompt_tuning_init": "SAMPLE_VOCAB"}),
    "mlp": ("PromptEncoderConfig", HIDDEN),
    "lstm": ("PromptEncoderConfig", {**HIDDEN, "encoder_reparameterization_type": "LSTM"}),
    "prefix": ("PrefixTuningConfig", SMALL),
    "projected": ("PrefixTuningConfig", {**HIDDEN, "prefix_projection": True}),
}
CASES = [(method, family) for method in METHODS for family in tiny.FAMILIES]
each_case = pytest.mark.parametrize(("method", "family"), CASES, ids=lambda part: part)
each_family = pytest.mark.parametrize("family", list(tiny.FAMILIES))


def pair(method: str, family: str, folder: Path, size: float = 0.1) -> tuple[Any, Any]:
    """The same adapter in both libraries, ready to train: PEFT's file, and its encoder beside it."""
    config, fields = METHODS[method]
    theirs = tiny.shake(differential.make(peft, config, family, fields), size)
    differential.save(theirs, folder)
    encoder = {k: v.clone() for k, v in theirs.prompt_encoder["default"].state_dict().items()}
    if len(encoder) > 1:
        save_file(encoder, folder / "prompt_encoder.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours = differential.load(engine, family, folder, is_trainable=True)
    return ours, theirs


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Gradients by names that both libraries share."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")
            short = ".".join(parts[-2:]) if len(parts) < 5 else ".".join(parts[-3:])
            short = short.removeprefix("default.").replace("prompt_embeddings", "embedding.weight")
            assert parameter.grad is not None, name
            found[short] = parameter.grad
    return found


def inputs(family: str) -> dict[str, torch.Tensor]:
    """Rows padded on the right, with labels."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    labels = torch.tensor([0, 2]) if family == "bert" else tiny.ids().masked_fill(mask == 0, -100)
    return {"input_ids": tiny.ids(), "attention_mask": mask, "labels": labels}


@each_case
def test_files_logits_and_gradients(method: str, family: str, tmp_path: Path) -> None:
    ours, theirs = pair(method, family, tmp_path / "theirs")
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    mine, other = ours(**inputs(family)), theirs(**inputs(family))
    assert mine.logits.shape == other.logits.shape
    assert (mine.logits - other.logits).abs().max() < 1e-5
    assert (mine.loss - other.loss).abs() < 1e-5
    mine.loss.backward()
    other.loss.backward()
    a, b = list(gradients(ours).values()), list(gradients(theirs).values())
    assert len(a) == len(b)
    for left, right in zip(sorted(a, key=_order), sorted(b, key=_order), strict=True):
        assert left.shape == right.shape
        assert torch.allclose(left, right, atol=1e-5)
    our_file = differential.save(ours, tmp_path / "ours")
    their_file = differential.save(theirs, tmp_path / "theirs")
    assert our_file.keys() == their_file.keys()
    assert all(torch.allclose(our_file[key], their_file[key], atol=1e-6) for key in their_file)
    again = differential.load(peft, family, tmp_path / "ours")
    assert (tiny.logits(again) - tiny.logits(theirs)).abs().max() < 1e-5
    fields = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    known = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert fields["peft_type"] == known["peft_type"]
    for key in ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"):
        assert fields[key] == known[key], key


def _order(tensor: torch.Tensor) -> tuple[tuple[int, ...], float]:
    return tuple(tensor.shape), round(float(tensor.double().sum()), 3)


@each_case
def test_fresh_adapters_have_the_same_parameters(method: str, family: str) -> None:
    differential.same_fresh_parameters(*_spread(method, family))


def _spread(method: str, family: str) -> tuple[str, str, dict[str, Any]]:
    config, fields = METHODS[method]
    return config, family, fields


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("method", ["prompt", "mlp", "lstm", "prefix", "projected"])
def test_twenty_steps_from_the_same_weights(method: str, family: str, tmp_path: Path) -> None:
    ours, theirs = pair(method, family, tmp_path)
    losses: list[list[float]] = []
    for model in (ours, theirs):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        losses.append([])
        for _ in range(20):
            loss = model(**inputs(family)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][0] - losses[0][-1] > 0.02
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 8}], ids=["greedy", "beams", "sample"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("method", ["prompt", "mlp", "prefix", "projected"])
def test_generation(method: str, family: str, how: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = pair(method, family, tmp_path, 0.5)
    settings = {"input_ids": tiny.ids(), "max_new_tokens": 10, "pad_token_id": 0, **how}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    found = []
    for model in (ours, theirs, tiny.FAMILIES[family]()):
        torch.manual_seed(0)
        found.append(model.generate(**settings))
    assert torch.equal(found[0].sequences, found[1].sequences)
    for step in range(10):
        assert (found[0].logits[step] - found[1].logits[step]).abs().max() < 1e-5
    assert (found[0].logits[0] - found[2].logits[0]).abs().max() > 1e-4


@pytest.mark.parametrize("method", ["mlp", "projected"])
def test_an_encoder_without_its_file_goes_on_as_the_table(method: str, tmp_path: Path) -> None:
    """What PEFT saves of such an adapter is the table alone; PEFT itself cannot train on from it."""
    config, fields = METHODS[method]
    theirs = tiny.shake(differential.make(peft, config, "llama", fields))
    differential.save(theirs, tmp_path)
    ours = differential.load(engine, "llama", tmp_path, is_trainable=True)
    assert list(ours.adapter_parameters()) == ["prompt_encoder.prompt_embeddings"]
    assert (tiny.logits(ours) - tiny.logits(theirs)).abs().max() < 1e-5
    tiny.logits(ours).square().sum().backward()
    assert ours.adapter_parameters()["prompt_encoder.prompt_embeddings"].grad is not None
    assert set(differential.save(ours, tmp_path / "ours")) == {"prompt_embeddings"}
    assert not (tmp_path / "ours" / "prompt_encoder.safetensors").exists()
