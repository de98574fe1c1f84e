"""Delta-LoRA against the paper's update written out on dense matrices, its files, and its way out as a plain LoRA."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import engine
from engine import hooks
from engine.errors import ConfigError, TargetError
from engine.train.job import JobSpec
from tests import tiny
from tests.differential import load, make, peft, train_steps
from tests.test_train import ROWS, At, losses, train

ALPHA, R, LAMBDA = 6.0, 3, 2.0
SCALE = ALPHA / R


def net() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 4)).double()


def rows(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 7, generator=generator, dtype=torch.float64)
    return x, torch.randn(16, 4, generator=generator, dtype=torch.float64)


def as_in_the_paper(a: list[Tensor], b: list[Tensor], start: int, steps: int) -> tuple[list[float], list[Tensor]]:
    """W moves with each step after `start`; the losses, and at the end W + s B A of each layer."""
    layers = [layer for layer in net() if isinstance(layer, nn.Linear)]
    w = [layer.weight.detach().clone() for layer in layers]
    a, b = ([t.detach().double().clone().requires_grad_() for t in ts] for ts in (a, b))
    optimizer = torch.optim.AdamW([p for pair in zip(a, b, strict=True) for p in pair], lr=2e-2)
    losses = []
    for step in range(1, steps + 1):
        x, y = rows(step)
        h = torch.tanh(x @ (w[0] + SCALE * b[0] @ a[0]).T + layers[0].bias)
        loss = (h @ (w[1] + SCALE * b[1] @ a[1]).T + layers[1].bias - y).square().mean()
        before = [(b_i @ a_i).detach() for a_i, b_i in zip(a, b, strict=True)]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step > start:
            w = [w[i] + LAMBDA * SCALE * ((b[i] @ a[i]).detach() - before[i]) for i in range(2)]
        losses.append(loss.item())
    return losses, [(w[i] + SCALE * b[i] @ a[i]).detach() for i in range(2)]


@pytest.mark.parametrize("start", [0, 1, 6, 30])
def test_twenty_steps_are_those_of_the_paper(start: int) -> None:
    config = engine.DeltaLoraConfig(
        r=R, lora_alpha=ALPHA, delta_lambda=LAMBDA, start_step=start, target_modules=["0", "2"]
    )
    model = engine.get_peft_model(net(), config).double()
    parts = {name: parameter.detach().clone() for name, parameter in model.adapter_parameters().items()}
    a, b = ([parts[f"{layer}.lora_{name}.weight"] for layer in "02"] for name in "AB")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    ours = []
    for step in range(1, 21):
        x, y = rows(step)
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        assert model.base_model.update_and_allocate(step) is None
        optimizer.zero_grad()
        ours.append(loss.item())
    theirs, weights = as_in_the_paper(a, b, start, 20)
    assert ours == pytest.approx(theirs, abs=1e-11)
    merged = model.merge_and_unload()
    assert all(torch.allclose(merged[2 * i].weight, weights[i], atol=1e-11) for i in range(2))
    plain, _ = as_in_the_paper(a, b, 99, 20)
    # After the start it is no longer LoRA; with 30 it never starts.
    assert (max(abs(one - two) for one, two in zip(ours, plain, strict=True)) > 1e-4) == (start < 20)


def trained(family: str, **more: Any) -> Any:
    """An adapter whose base moves: a few steps of LoRA, the snapshot, and a few more."""
    fields = {"r": 4, "lora_alpha": 8, "start_step": 3, "target_modules": "all-linear", **more}
    model = make(engine, "DeltaLoraConfig", family, fields)
    train_steps(model, 3, 1e-2)
    assert not any(weights.begun for weights in hooks.attached(model, "default").layers.values())
    model.base_model.update_and_allocate(3)
    train_steps(model, 3, 1e-2)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_exported_as_a_plain_lora_of_rank_2r(family: str, tmp_path: Path) -> None:
    model = trained(family)
    engine.save_as_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 16)
    before = tiny.logits(model)
    with model.disable_adapter():
        assert (tiny.logits(model) - before).abs().max() > 1e-2
    for library in (engine, peft):
        assert (tiny.logits(load(library, family, tmp_path)) - before).abs().max() < 1e-5


def test_before_the_start_it_is_a_lora_of_rank_r(tmp_path: Path) -> None:
    model = tiny.shake(make(engine, "DeltaLoraConfig", "llama", {"r": 4, "modules_to_save": ["lm_head"]}))
    engine.save_as_lora(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "adapter_model.safetensors")
    for library in (engine, peft):
        assert (tiny.logits(load(library, "llama", tmp_path)) - tiny.logits(model)).abs().max() < 1e-5


def test_other_methods_as_a_plain_lora(tmp_path: Path) -> None:
    fields = {"init_r": 5, "target_r": 2, "target_modules": ["q_proj", "k_proj", "down_proj"], "bias": "lora_only"}
    model = tiny.shake(make(engine, "AdaLoraConfig", "llama", fields))
    layers = list(hooks.attached(model, "default").layers.values())
    layers[0].cut(torch.zeros(5, dtype=torch.bool))
    layers[1].cut(torch.tensor([True, False, True, False, False]))
    engine.save_as_lora(model, tmp_path / "adalora")
    pissa = tiny.shake(make(engine, "LoraConfig", "llama", {"r": 3, "init_lora_weights": "pissa"}))
    engine.save_as_lora(pissa, tmp_path / "pissa")
    for made, folder in ((model, "adalora"), (pissa, "pissa")):
        again = load(peft, "llama", tmp_path / folder)
        assert (tiny.logits(again) - tiny.logits(made)).abs().max() < 1e-5
    pixels = tiny.shake(engine.get_peft_model(tiny.pixels(), engine.AdaLoraConfig(target_modules=["first", "head"])))
    engine.save_as_lora(pixels, tmp_path / "pixels")
    again = engine.PeftModel.from_pretrained(tiny.pixels(), tmp_path / "pixels")
    assert (tiny.logits(again) - tiny.logits(pixels)).abs().max() < 1e-5
    other = make(engine, "IA3Config", "llama", {})
    with pytest.raises(ConfigError, match="not written as a plain LoRA"):
        engine.save_as_lora(other, tmp_path / "ia3")


def test_its_own_file_goes_on_training_where_it_was(tmp_path: Path) -> None:
    model = trained("llama")
    model.save_pretrained(tmp_path)
    again = load(engine, "llama", tmp_path, is_trainable=True)
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    twin = copy.deepcopy(model)
    other = make(engine, "DeltaLoraConfig", "llama", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"})
    other.load_state_dict(model.state_dict())
    for one in (again, twin, other):
        # The snapshot is kept, whatever step the new training counts.
        one.base_model.update_and_allocate(500)
        train_steps(one, 2, 1e-2)
    for one in (again, other):
        assert torch.equal(tiny.logits(one.eval()), tiny.logits(twin.eval()))
    with pytest.raises((KeyError, ValueError)):
        load(peft, "llama", tmp_path)


@pytest.mark.parametrize("start", [2, 6])
def test_pause_and_resume_are_exact(start: int, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    spec = JobSpec.from_dict(
        {
            "model": "tiny-llama",
            "data": {"path": str(tmp_path / "rows.jsonl")},
            "adapter": {"method": "delta_lora", "r": 4, "lora_alpha": 16, "start_step": start},
            "training": {"max_steps": 8, "batch_size": 4, "learning_rate": 3e-3, "precision": "fp32", "max_length": 96},
        }
    )
    _, whole = train(spec, tmp_path / "whole")
    state, first = train(spec, tmp_path / "run", At(5, "pause"))
    assert state == "paused" and first.events[-1]["step"] in (3, 4)
    _, second = train(spec, tmp_path / "run", resume=True)
    curve = losses(first) | losses(second)
    assert max(abs(curve[step] - loss) for step, loss in losses(whole).items()) < 1e-6
    one, two = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "run"))
    assert all(torch.allclose(one[key].float(), two[key].float(), atol=1e-6) for key in one)
    assert all(bool(one[key]) for key in one if key.endswith(".begun"))


def test_what_delta_lora_refuses() -> None:
    with pytest.raises(ConfigError) as error:
        engine.DeltaLoraConfig(r=0, lora_alpha=0, delta_lambda=-1, start_step=-1)
    for field in ("r is 0", "lora_alpha is 0", "delta_lambda is -1", "start_step is -1"):
        assert field in str(error.value)
    with pytest.raises(ConfigError, match="lora_dropout is not a field"):
        engine.DeltaLoraConfig.from_dict({"lora_dropout": 0.1})
    with pytest.raises(TargetError, match=r"embed_tokens \(Embedding\)"):
        engine.get_peft_model(tiny.llama(), engine.DeltaLoraConfig(target_modules=["embed_tokens"]))
