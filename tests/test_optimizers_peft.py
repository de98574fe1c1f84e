"""LoRA+ and LoRA-FA's projected gradient: against the PEFT library's optimizers, and in the training loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import engine
from engine.errors import ConfigError
from engine.train.job import JobSpec, TrainingSpec
from engine.train.optim import make_optimizer, set_rate
from tests import tiny
from tests.differential import load, make, peft, save

FIELDS: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}


def steps(model: Any, optimizer: torch.optim.Optimizer, count: int = 20) -> list[float]:
    model.train()
    losses = []
    for _ in range(count):
        loss = model(input_ids=tiny.ids(4), labels=tiny.ids(4)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def pair(folder: Path, family: str = "llama", **fields: Any) -> tuple[Any, Any]:
    theirs = make(peft, "LoraConfig", family, {**FIELDS, **fields})
    save(theirs, folder)
    return load(engine, family, folder, is_trainable=True), theirs


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_dora": True, "target_modules": ["q_proj"]},
        {"bias": "lora_only"},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"lora_bias": True, "target_modules": ["q_proj"]},
    ],
    ids=["plain", "dora", "biases", "embedding", "lora_bias"],
)
def test_loraplus_trains_as_pefts(fields: dict[str, Any], tmp_path: Path) -> None:
    from peft.optimizers import create_loraplus_optimizer

    rate = 1e-2 if "target_modules" in fields else 1e-3
    settings = {"lr": rate, "loraplus_lr_ratio": 8.0, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 5e-3}
    ours, theirs = pair(tmp_path, **fields)
    mine = engine.create_loraplus_optimizer(ours, torch.optim.AdamW, **settings)
    other = create_loraplus_optimizer(theirs, torch.optim.AdamW, **settings)
    groups = [
        sorted((g["lr"], g["weight_decay"], p.numel()) for g in o.param_groups for p in g["params"])
        for o in (mine, other)
    ]
    assert groups[0] == groups[1]
    a, b = steps(ours, mine), steps(theirs, other)
    assert b[0] - b[-1] > 0.02
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-4


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}], ids=str)
def test_lorafa_projects_as_pefts(fields: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    """PEFT multiplies in bf16 where it can; switched off here, for its rounding is no part of the method."""
    from peft.optimizers import create_lorafa_optimizer, lorafa

    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    ours, theirs = pair(tmp_path, **fields)
    call = {"r": 4, "lora_alpha": 6, "lr": 3e-3, "weight_decay": 0.01}
    mine, other = engine.create_lorafa_optimizer(ours, **call), create_lorafa_optimizer(theirs, **call)
    # PEFT adds eps before the correction of the second moment's bias, torch after: without eps they are one.
    for group in (*mine.param_groups, *other.param_groups):
        group["eps"] = 1e-12
    frozen = [p.clone() for n, p in ours.adapter_parameters().items() if "lora_A" in n]
    a, b = steps(ours, mine), steps(theirs, other)
    assert b[0] - b[-1] > 0.02
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-4
    after = [p for n, p in ours.adapter_parameters().items() if "lora_A" in n]
    assert all(torch.equal(x, y) and not y.requires_grad for x, y in zip(frozen, after, strict=True))


def test_the_projected_step_is_the_nearest_to_full_tuning() -> None:
    """Among all changes s dB A of the weight, the projected one is the least-squares fit of dL/dW."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 5).double()
    weight = layer.weight.detach().clone().requires_grad_(True)
    config = engine.LoRAFAConfig(r=3, lora_alpha=6, target_modules=["0"])
    model = engine.get_peft_model(nn.Sequential(layer), config).double()
    optimizer = engine.create_lorafa_optimizer(model, 3, 6, lr=1e-3)
    x, pull = torch.randn(7, 12).double(), torch.randn(7, 5).double()
    (model(x) * pull).sum().backward()
    (full,) = torch.autograd.grad((x @ weight.T * pull).sum(), weight)
    layer_weights: Any = model.base_model.model[0].adapters["default"]
    b, a, s = layer_weights.lora_B.weight, layer_weights.lora_A.weight, 6 / 3
    raw = b.grad.clone()
    optimizer.step()
    assert torch.equal(b.grad, raw)
    used = optimizer.state[b]["exp_avg"] / 0.1
    best = torch.linalg.lstsq((s * a).T, full.T).solution.T
    assert torch.allclose(used, best, atol=1e-8)


def test_lorafa_refuses_what_has_no_fixed_a() -> None:
    for fields in ({"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj"], "init_lora_weights": "olora"}):
        model = engine.get_peft_model(tiny.llama(), engine.LoraConfig(r=2, **fields))
        with pytest.raises(ConfigError, match=r"'default' has none such at model\."):
            engine.create_lorafa_optimizer(model, 2, 8, 1e-3)


def test_the_loops_groups_keep_their_ratios() -> None:
    model = engine.get_peft_model(tiny.llama(), engine.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    parameters = model.adapter_parameters()
    training = TrainingSpec(learning_rate=2e-3, loraplus_ratio=16, loraplus_embedding_rate=1e-4)
    optimizer = make_optimizer(parameters, training)
    for rate in (2e-3, 5e-4):
        set_rate(optimizer, rate)
        rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        assert len(rates) == len(parameters)
        for name, p in parameters.items():
            ratio = 0.05 if "embedding" in name else 16 if "lora_B" in name else 1
            assert rates[id(p)] == pytest.approx(rate * ratio), name
    plain = make_optimizer(parameters, TrainingSpec(learning_rate=2e-3))
    set_rate(plain, 1e-3)
    assert [g["lr"] for g in plain.param_groups] == [1e-3]
    vera = engine.get_peft_model(tiny.llama(), engine.VeraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="matrix B, which this adapter does not train"):
        make_optimizer(vera.adapter_parameters(), training)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"loraplus_ratio": 0.0}, "loraplus_ratio is 0.0"),
        ({"loraplus_ratio": float("inf")}, "loraplus_ratio is inf"),
        ({"loraplus_embedding_rate": 1e-4}, "without loraplus_ratio"),
    ],
)
def test_job_faults(fields: dict[str, Any], words: str) -> None:
    assert any(words in fault for fault in TrainingSpec(**fields).faults())


def test_a_run_with_loraplus_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    """Several groups: the optimizer's own numbering of parameters is not the adapter's order."""
    from engine.train.events import Recorder
    from engine.train.worker import run

    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"instruction": f"Say {i}.", "output": f"Number {i}."}) + "\n" for i in range(20))
    )
    spec = JobSpec.from_dict(
        {
            "model": "tiny-llama",
            "data": {"path": str(rows), "eval_split": 0},
            "adapter": {"method": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
            "training": {
                "max_steps": 6, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32", "max_length": 64,
                "loraplus_ratio": 16, "checkpoint_every": 3,
            },
        }
    )  # fmt: skip
    assert JobSpec.from_dict(spec.to_dict()) == spec

    class Pause:
        polls = 0

        def poll(self) -> str | None:
            self.polls += 1
            return "pause" if self.polls == 5 else None

    class Never:
        def poll(self) -> None:
            return None

    whole, first, second = Recorder(), Recorder(), Recorder()
    assert run(spec, tmp_path / "whole", whole, Never(), False) == "done"
    assert run(spec, tmp_path / "parts", first, Pause(), False) == "paused"
    assert run(spec, tmp_path / "parts", second, Never(), True) == "done"
    expected = {e["step"]: e["loss"] for e in whole.of("step")}
    got = {e["step"]: e["loss"] for e in [*first.of("step"), *second.of("step")]}
    assert got.keys() == expected.keys() and first.of("step") and second.of("step")
    assert max(abs(got[k] - expected[k]) for k in expected) < 1e-6
    assert expected[1] != expected[6]
