"""Several methods on one model at once: they add up in any order, are saved, loaded, merged and trained together."""

from __future__ import annotations

import itertools
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import LoraConfig, PeftModel, get_peft_model
from engine.adapters import ADAPTERS
from engine.errors import CheckpointError, ConfigError, EngineError
from engine.layers import AdapterLayer
from tests import tiny
from tests.test_contract import config

# Methods that change weights; IA3 scales down_proj's input and q_proj's output.
METHODS = [name for name in ADAPTERS if ADAPTERS[name].layers and ADAPTERS[name].mergeable and ADAPTERS[name].mixable]
TARGETS = ["q_proj", "down_proj"]


def attach(names: list[str], targets: list[str] = TARGETS) -> Any:
    """A model with these methods' adapters, each with the same values whatever the order."""
    model: Any = None
    for name in names:
        torch.manual_seed(zlib.crc32(name.encode()))
        if model is None:
            base = tiny.llama()
            torch.manual_seed(zlib.crc32(name.encode()))
            model = get_peft_model(base, config(name, targets), name)
        else:
            model.add_adapter(name, config(name, targets))
        model.set_adapter(name)
        tiny.shake(model, 0.15)
    model.set_adapter(names)
    return model


def near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() < tolerance)


@pytest.mark.parametrize("pair", list(itertools.combinations(METHODS, 2)), ids="-".join)
def test_every_pair_adds_up_in_any_order(pair: tuple[str, str]) -> None:
    one, two = pair
    weights = {one: 0.8, two: -0.6}
    model, other = attach([one, two]), attach([two, one])
    base = tiny.logits(tiny.llama())
    model.set_adapter_weights(weights)
    other.set_adapter_weights(dict(reversed(weights.items())))
    live = tiny.logits(model)
    assert not near(live, base, 1e-3) and near(tiny.logits(other), live)
    for name in pair:
        model.set_adapter_weights({**weights, name: 0.0})
        assert not near(tiny.logits(model), live, 1e-4), name
    model.set_adapter_weights(weights)
    # Merging at once, and one after the other in both orders, then back bit for bit.
    for steps in ([pair], [[one], [one, two]], [[two], [one, two]]):
        for step in steps:
            model.merge_adapter(list(step))
        assert near(tiny.logits(model), live), steps
        model.unmerge_adapter()
        assert torch.equal(tiny.logits(model), live)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), base)
    rows = model(tiny.ids(3), adapter_names=[two, None, one]).logits
    for row, name in enumerate((two, None, one)):
        model.set_adapter_weights({name: 1.0} if name else {})
        assert near(model(tiny.ids(3)[row : row + 1]).logits[0], rows[row]), name
    # Deleting either leaves the other as if it had been alone.
    for model_, gone, left in ((model, one, two), (other, two, one)):
        model_.delete_adapter(gone)
        model_.set_adapter(left)
        assert near(tiny.logits(model_), tiny.logits(attach([left])))


def test_all_at_once_saved_and_loaded_together(tmp_path: Path) -> None:
    model = attach([*METHODS])
    model.add_adapter("default", LoraConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter("default")
    tiny.shake(model, 0.2)
    weights = {name: (-1) ** number * 0.5 for number, name in enumerate([*METHODS, "default"])}
    model.set_adapter_weights(weights)
    live = tiny.logits(model)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set(METHODS)
    assert (tmp_path / "adapter_config.json").is_file()

    again = PeftModel.from_pretrained_all(tiny.llama(), tmp_path)
    assert set(again.peft_config) == set(weights) and again.active_adapters == ["default"]
    assert again.get_nb_trainable_parameters()[0] == 0 and not again.training
    again.set_adapter_weights(weights)
    assert near(tiny.logits(again), live)

    single = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    for name in METHODS:
        single.load_adapter(tmp_path / name, name)
    single.set_adapter_weights(weights)
    assert near(tiny.logits(single), live)

    merged = again.merge_and_unload()
    assert not any(isinstance(module, AdapterLayer) for module in merged.modules())
    assert near(tiny.logits(merged), live)

    more = get_peft_model(tiny.llama(), LoraConfig(target_modules=["up_proj"]), "own")
    (tmp_path / "notes").mkdir()
    assert more.load_adapters(tmp_path, is_trainable=True) == ["default", *sorted(METHODS)]
    assert more.active_adapters == ["own"]
    more.set_adapter_weights(weights)
    assert near(tiny.logits(more), live)


def test_a_folder_with_a_broken_adapter_loads_nothing(tmp_path: Path) -> None:
    attach(["lora", "loha", "vera"]).save_pretrained(tmp_path)
    path = tmp_path / "vera" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 3}))
    base = tiny.llama()
    with pytest.raises(EngineError):
        PeftModel.from_pretrained_all(base, tmp_path)
    assert not any(isinstance(module, AdapterLayer) for module in base.modules())
    assert all(parameter.requires_grad for parameter in base.parameters())
    model = get_peft_model(base, LoraConfig(target_modules=["v_proj"]), "own")
    with pytest.raises(EngineError):
        model.load_adapters(tmp_path)
    assert list(model.peft_config) == model.active_adapters == ["own"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no adapter to load"):
        model.load_adapters(tmp_path / "empty")
    model.load_adapter(tmp_path / "lora", "lora")
    with pytest.raises(ConfigError, match="already an adapter 'lora'"):
        model.load_adapters(tmp_path)
    assert list(model.peft_config) == ["own", "lora"]


def test_all_train_at_once() -> None:
    model = attach(METHODS)
    model.add_adapter("still", LoraConfig(target_modules=["q_proj"]))
    assert {name for name in model.peft_config if trainable(model, name)} == set(METHODS)
    before = {name: {k: p.detach().clone() for k, p in model.adapter_parameters(name).items()} for name in METHODS}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(10):
        loss = model(input_ids=tiny.ids(4), labels=tiny.ids(4)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    for name in METHODS:
        for key, parameter in model.adapter_parameters(name).items():
            assert not torch.equal(parameter, before[name][key]), (name, key)


def trainable(model: Any, name: str) -> bool:
    return all(parameter.requires_grad for parameter in model.adapter_parameters(name).values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_mixed_batches_train_each_row_into_its_adapter(checkpointing: bool) -> None:
    """Rows of several adapters in one batch: the gradients of separate batches, and none elsewhere."""
    model = attach([*METHODS]).train()
    model.adds_extra_loss = False  # AdaLoRA's own term does not belong to any row
    model.add_adapter("idle", LoraConfig(target_modules=["q_proj"]))
    model.set_adapter([*METHODS, "idle"])
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    rows = [*METHODS, None, *reversed(METHODS)]
    x = torch.randint(3, tiny.VOCABULARY, (len(rows), 7), generator=torch.Generator().manual_seed(5))
    model(input_ids=x, labels=x, adapter_names=rows, use_cache=False).loss.backward()
    together = {name: gradients(model, name) for name in METHODS}
    assert all(gradient is None for gradient in gradients(model, "idle").values())
    model.zero_grad()
    for name in METHODS:
        own = [row for row, item in enumerate(rows) if item == name]
        model.set_adapter(name)
        # The mean over the whole batch counts each row by its share.
        loss = model(input_ids=x[own], labels=x[own], use_cache=False).loss * (len(own) / len(rows))
        loss.backward()
        for key, gradient in gradients(model, name).items():
            assert gradient is not None and torch.allclose(together[name][key], gradient, atol=1e-6), (name, key)
        model.zero_grad()


def gradients(model: Any, name: str) -> dict[str, torch.Tensor | None]:
    found = model.adapter_parameters(name).items()
    return {key: None if p.grad is None else p.grad.clone() for key, p in found}
