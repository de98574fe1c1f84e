"""A method against the PEFT library, both directions: what the tests of each method have in common.

`config` is the config's name in both libraries, `fields` its settings.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

import engine
from tests import tiny

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

Fields = dict[str, Any]


def make(library: Any, config: str, family: str, fields: Fields) -> Any:
    """A tiny model of `family` with a fresh adapter of `library`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(library, config)(task_type=tiny.TASK_TYPES[family], **fields)
        return library.get_peft_model(tiny.FAMILIES[family](), made).eval()


def load(library: Any, family: str, folder: Path, **more: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.PeftModel.from_pretrained(tiny.FAMILIES[family](), folder, **more).eval()


def save(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


def gradients(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Gradients of a fixed loss under the file's keys: written into the parameters and saved as an adapter."""
    tiny.logits(model).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return save(model, folder)


def batch(model: Any) -> dict[str, torch.Tensor]:
    """Four rows to learn: tokens again for language models, classes for BERT."""
    if isinstance(model.get_base_model(), BertForSequenceClassification):
        return {"input_ids": tiny.ids(4), "labels": torch.tensor([0, 1, 2, 1])}
    return {"input_ids": tiny.ids(4), "labels": tiny.ids(4)}


def train_steps(model: Any, steps: int, rate: float = 3e-3) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(**batch(model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def same_files_outputs_gradients(config: str, family: str, fields: Fields, tmp: Path, size: float = 0.1) -> None:
    theirs = tiny.shake(make(peft, config, family, fields), size)
    their_file = save(theirs, tmp / "theirs")
    ours = load(engine, family, tmp / "theirs", is_trainable=True)
    assert (tiny.logits(ours) - tiny.logits(theirs)).abs().max() < 1e-5
    our_file = save(ours, tmp / "ours")
    assert {k: v.shape for k, v in our_file.items()} == {k: v.shape for k, v in their_file.items()}
    assert all(torch.equal(our_file[key], their_file[key]) for key in their_file)
    again = load(peft, family, tmp / "ours")
    assert (tiny.logits(again) - tiny.logits(theirs)).abs().max() < 1e-5
    mine, other = gradients(ours, tmp / "g1"), gradients(theirs, tmp / "g2")
    assert mine.keys() == other.keys()
    for key in other:
        if not key.endswith("base_layer.weight"):
            assert torch.allclose(mine[key], other[key], atol=1e-5), key


def same_fresh_parameters(config: str, family: str, fields: Fields) -> None:
    ours, theirs = make(engine, config, family, fields), make(peft, config, family, fields)
    mine = {k: v.shape for k, v in engine.get_peft_model_state_dict(ours).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert mine == {k: v.shape for k, v in peft.get_peft_model_state_dict(theirs).items()}
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]


def same_merged_weights(config: str, family: str, fields: Fields, tmp: Path) -> None:
    theirs = tiny.shake(make(peft, config, family, fields))
    save(theirs, tmp)
    ours = load(engine, family, tmp)
    mine, other = ours.merge_and_unload().state_dict(), theirs.merge_and_unload().state_dict()
    assert mine.keys() == other.keys()
    for key in other:
        assert torch.allclose(mine[key], other[key], atol=1e-5), key


def same_training(config: str, family: str, fields: Fields, tmp: Path, steps: int = 20, rate: float = 3e-3) -> None:
    theirs = make(peft, config, family, fields)
    save(theirs, tmp)
    ours = load(engine, family, tmp, is_trainable=True)
    mine, other = train_steps(ours, steps, rate), train_steps(theirs, steps, rate)
    assert other[0] - other[-1] > 0.02
    assert max(abs(a - b) for a, b in zip(mine, other, strict=True)) < 1e-4


def same_generation(config: str, family: str, fields: Fields, tmp: Path, beams: int) -> None:
    theirs = tiny.shake(make(peft, config, family, fields), 0.3)
    save(theirs, tmp)
    ours = load(engine, family, tmp)
    settings = {"input_ids": tiny.ids(), "max_new_tokens": 10, "num_beams": beams, "pad_token_id": 0}
    assert torch.equal(ours.generate(**settings), theirs.generate(**settings))


def same_convolutions(config: str, fields: Fields, tmp: Path, wrong: tuple[str, ...] = ()) -> None:
    """Files, outputs, gradients and merged weights on strided, dilated and grouped convolutions.

    `wrong` are the endings of keys whose gradients PEFT gets wrong at convolutions.
    """
    theirs = tiny.shake(peft.get_peft_model(tiny.grouped(), getattr(peft, config)(**fields)))
    their_file = save(theirs, tmp / "theirs")
    ours = engine.PeftModel.from_pretrained(tiny.grouped(), tmp / "theirs", is_trainable=True)
    our_file = save(ours, tmp / "ours")
    assert {k: v.shape for k, v in our_file.items()} == {k: v.shape for k, v in their_file.items()}
    again = peft.PeftModel.from_pretrained(tiny.grouped(), tmp / "ours")
    before = pixels_of(theirs)
    for model in (ours, again):
        assert (pixels_of(model) - before).abs().max() < 1e-5
    merged = engine.PeftModel.from_pretrained(tiny.grouped(), tmp / "theirs").merge_and_unload()
    assert (pixels_of(merged) - before).abs().max() < 1e-5
    for model in (ours, theirs):
        pixels_of(model).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(parameter.grad)
    mine, other = save(ours, tmp / "g1"), save(theirs, tmp / "g2")
    for key in other:
        expected = "head" in key or not key.endswith(wrong)
        assert torch.allclose(mine[key], other[key], atol=1e-5) == expected, key


def pixels_of(model: Any) -> torch.Tensor:
    return model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)))


def ids_of(cases: list[tuple[str, Fields]]) -> list[str]:
    return [f"{family}-{'-'.join(map(str, fields)) or 'default'}" for family, fields in cases]
