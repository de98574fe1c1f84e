"""AdaLoRA against the PEFT library, both directions, pruned and whole; and its training in a loop of one's own."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import engine
from engine import hooks
from engine.adapters import adalora
from engine.checkpoint import raw_state, restore_raw_state
from engine.errors import ConfigError, TargetError
from tests import differential, tiny
from tests.differential import load, make, peft, save

START: dict[str, Any] = {"init_r": 5, "target_r": 2, "total_step": 20}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"target_modules": "all-linear", "lora_alpha": 32, "orth_reg_weight": 0.1}),
    ("llama", {"target_modules": ["q_proj", "k_proj"], "bias": "lora_only"}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": "all"}),
    ("llama", {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("gpt2", {}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    ("t5", {}),
    ("bert", {"target_modules": "all-linear"}),
]
EACH = pytest.mark.parametrize(("family", "extra"), CASES, ids=differential.ids_of(CASES))
EVERYWHERE = {**START, "target_modules": "all-linear", "lora_alpha": 32}


@EACH
def test_files_outputs_and_gradients(family: str, extra: dict[str, Any], tmp_path: Path) -> None:
    differential.same_files_outputs_gradients("AdaLoraConfig", family, {**START, **extra}, tmp_path)


@EACH
def test_fresh_adapters_have_the_same_parameters(family: str, extra: dict[str, Any]) -> None:
    differential.same_fresh_parameters("AdaLoraConfig", family, {**START, **extra})


@EACH
def test_merged_weights(family: str, extra: dict[str, Any], tmp_path: Path) -> None:
    differential.same_merged_weights("AdaLoraConfig", family, {**START, **extra}, tmp_path)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generation(family: str, beams: int, tmp_path: Path) -> None:
    differential.same_generation("AdaLoraConfig", family, EVERYWHERE, tmp_path, beams)


def steps(model: Any, count: int, rate: float = 3e-3, first: int = 1) -> list[float]:
    """Training as PEFT's documentation has it."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for step in range(first, first + count):
        loss = model(**differential.batch(model)).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_twenty_steps_with_ranks_cut_as_peft_cuts_them(family: str, tmp_path: Path) -> None:
    fields = {**EVERYWHERE, "tinit": 2, "tfinal": 5, "deltaT": 2}
    theirs = make(peft, "AdaLoraConfig", family, fields)
    save(theirs, tmp_path)
    ours = load(engine, family, tmp_path, is_trainable=True)
    mine, other = steps(ours, 20), steps(theirs, 20)
    assert other[0] - other[-1] > 0.02
    assert max(abs(a - b) for a, b in zip(mine, other, strict=True)) < 1e-4
    our_file, their_file = save(ours, tmp_path / "ours"), save(theirs, tmp_path / "theirs")
    assert {k: v.shape for k, v in our_file.items()} == {k: v.shape for k, v in their_file.items()}
    assert max((our_file[key] - their_file[key]).abs().max() for key in their_file if their_file[key].numel()) < 1e-4
    one, two = (
        json.loads((tmp_path / name / "adapter_config.json").read_text())["rank_pattern"] for name in ("ours", "theirs")
    )
    assert one == two
    left = [sum(kept) for kept in one.values()]
    assert sum(left) == 2 * len(left) and len(set(left)) > 1
    # Both libraries read both files.
    for model, folder in ((ours, "ours"), (theirs, "theirs")):
        for library in (engine, peft):
            again = load(library, family, tmp_path / folder)
            assert (tiny.logits(again) - tiny.logits(model.eval())).abs().max() < 1e-5


@pytest.mark.parametrize("layer", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
def test_a_layer_with_no_rank_left_travels_both_ways(layer: str, tmp_path: Path) -> None:
    fields = {**START, "target_modules": ["q_proj", "down_proj"]}
    model = tiny.shake(make(engine, "AdaLoraConfig", "llama", fields))
    weights = hooks.attached(model, "default").layers
    weights[layer].cut(torch.zeros(5, dtype=torch.bool))
    other = next(name for name in weights if name != layer)
    weights[other].cut(torch.tensor([True, False, True, True, False]))
    before = tiny.logits(model)
    file = save(model, tmp_path / "ours")
    assert file[f"base_model.model.{layer}.lora_A"].shape[0] == 0
    assert file[f"base_model.model.{other}.lora_B"].shape[1] == 3
    theirs = load(peft, "llama", tmp_path / "ours")
    assert (tiny.logits(theirs) - before).abs().max() < 1e-5
    save(theirs, tmp_path / "theirs")
    again = load(engine, "llama", tmp_path / "theirs", is_trainable=True)
    assert (tiny.logits(again) - before).abs().max() < 1e-5
    # What was cut once stays cut when the ranks that are left are trained and cut again.
    steps(again, 3)
    parts = hooks.attached(again, "default").layers
    parts[other].cut(torch.tensor([False, True, True]))
    save(again, tmp_path / "third")
    pattern = json.loads((tmp_path / "third" / "adapter_config.json").read_text())["rank_pattern"]
    assert pattern[f"{other}.lora_E"] == [False, False, True, True, False]
    for library in (engine, peft):
        assert (tiny.logits(load(library, "llama", tmp_path / "third")) - tiny.logits(again.eval())).abs().max() < 1e-5
    assert (
        tiny.logits(again.merge_and_unload()) - tiny.logits(load(engine, "llama", tmp_path / "third"))
    ).abs().max() < 1e-5


def test_convolutions(tmp_path: Path) -> None:
    fields = {**START, "target_modules": ["first", "head"]}
    theirs = tiny.shake(peft.get_peft_model(tiny.grouped(), peft.AdaLoraConfig(**fields)))
    save(theirs, tmp_path)
    ours = engine.PeftModel.from_pretrained(tiny.grouped(), tmp_path)
    before = differential.pixels_of(theirs)
    assert (differential.pixels_of(ours) - before).abs().max() < 1e-5
    assert (differential.pixels_of(ours.merge_and_unload()) - before).abs().max() < 1e-5
    with pytest.raises(TargetError, match=r"grouped convolution second \(groups=2\)"):
        engine.get_peft_model(tiny.grouped(), engine.AdaLoraConfig(target_modules=["second"]))


def test_against_the_formula() -> None:
    layers = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 8)).double()
    dense = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in layers]
    config = engine.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, target_modules=["0", "1"])
    model = tiny.shake(engine.get_peft_model(layers, config).double(), 0.5)
    parts = model.adapter_parameters()
    x = expected = torch.randn(7, 5).double()
    term = []
    for number, (weight, bias) in enumerate(dense):
        a, b, e = (parts[f"{number}.lora_{name}"] for name in "ABE")
        expected = expected @ (weight + 6 / (4 + 1e-5) * b @ torch.diag(e[:, 0]) @ a).T + bias
        eye = torch.eye(4).double()
        term += [(a @ a.T - eye).square().sum().sqrt(), (b.T @ b - eye).square().sum().sqrt()]
    assert torch.allclose(model(x), expected, atol=1e-12)
    assert torch.allclose(hooks.extra_loss(model), 0.5 * sum(term) / 4, atol=1e-12)


def test_the_budget_over_time() -> None:
    """The cubic schedule of the paper's appendix, in whole triplets."""
    config = engine.AdaLoraConfig(init_r=12, target_r=4, tinit=10, tfinal=20, total_step=100)
    curve = [adalora.budget_at(step, config, 36, 3) for step in range(1, 101)]
    assert curve[:10] == [36] * 10 and curve[79:] == [12] * 21
    assert curve[44] == int(12 + 24 * 0.5**3)
    assert all(a >= b for a, b in pairwise(curve)) and curve[78] >= 12


class Two(nn.Module):
    """Two layers side by side: what each has to learn does not depend on the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.easy, self.hard = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.easy(x), self.hard(x)], dim=-1)


def learned_ranks(total: int = 150) -> tuple[dict[str, int], list[dict[str, int]], float]:
    """Learn a target that is 1 rank away in one layer and 5 in the other; final ranks, changes, and the error left."""
    goal = Two()
    with torch.no_grad():
        for layer, rank in ((goal.easy, 1), (goal.hard, 5)):
            layer.weight += torch.linalg.qr(torch.randn(16, rank))[0] @ torch.linalg.qr(torch.randn(16, rank))[0].T
    config = engine.AdaLoraConfig(
        init_r=6, target_r=3, lora_alpha=6, tinit=20, tfinal=60, deltaT=5, target_modules=["easy", "hard"]
    )
    torch.manual_seed(3)
    model = engine.get_peft_model(Two(), config).train()
    engine.prepare_training(model, total_steps=total)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    changes = []
    for step in range(1, total + 1):
        x = torch.randn(64, 16)
        error = (model(x) - goal(x)).square().mean()
        (error + 0.1 * hooks.extra_loss(model)).backward()
        optimizer.step()
        changed = model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        if changed:
            changes.append(changed)
    return adalora.ranks(hooks.attached(model, "default")), changes, float(error.detach())


def test_ranks_go_where_they_are_needed() -> None:
    ranks, changes, error = learned_ranks()
    assert sum(ranks.values()) == 6
    assert (ranks["easy"], ranks["hard"]) == (1, 5)
    assert error < 1e-2
    assert changes[-1] == ranks
    assert len(changes) > 3 and all(a != b for a, b in pairwise(changes))
    assert all(set(change) == {"easy", "hard"} for change in changes)


def test_equal_scores_are_cut_to_the_budget_all_the_same() -> None:
    """PEFT's threshold cuts every triplet at it: with equal scores it leaves nothing."""
    model = make(engine, "AdaLoraConfig", "llama", EVERYWHERE)
    adapter = hooks.attached(model, "default")
    for weights in adapter.layers.values():
        weights.track()
    adalora.allocate(adapter, 30)
    assert sum(adalora.ranks(adapter).values()) == 30


def test_the_state_of_the_allocation_is_in_a_checkpoint() -> None:
    """Six steps, copied over, and the rest: as without the interruption."""
    fields = {**EVERYWHERE, "tinit": 1, "tfinal": 2, "deltaT": 2, "total_step": 12}
    whole = make(engine, "AdaLoraConfig", "llama", fields)
    start = raw_state(whole, "default")
    steps(whole, 6, rate=1e-2)
    again = make(engine, "AdaLoraConfig", "llama", fields)
    engine.prepare_training(again)
    with pytest.raises(engine.errors.CheckpointError, match="sensitivity"):
        restore_raw_state(again, "default", start)
    restore_raw_state(again, "default", raw_state(whole, "default"))
    for model in (whole, again):
        steps(model, 6, rate=1e-2, first=7)
    one, two = raw_state(whole, "default"), raw_state(again, "default")
    assert one.keys() == two.keys() and any("uncertainty_lora_B" in key for key in one)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert sum(adalora.ranks(hooks.attached(again, "default")).values()) == 2 * len(
        hooks.attached(again, "default").layers
    )


def test_the_orthogonal_term_is_in_the_loss_of_training_alone() -> None:
    model = make(engine, "AdaLoraConfig", "llama", EVERYWHERE)
    with torch.no_grad():
        plain = model(input_ids=tiny.ids(), labels=tiny.ids()).loss
        model.train()
        assert torch.allclose(model(input_ids=tiny.ids(), labels=tiny.ids()).loss, plain + hooks.extra_loss(model))
        assert hooks.extra_loss(model) > 0.1
        model.adds_extra_loss = False
        assert torch.equal(model(input_ids=tiny.ids(), labels=tiny.ids()).loss, plain)


def test_what_adalora_refuses() -> None:
    with pytest.raises(ConfigError) as error:
        engine.AdaLoraConfig(target_r=0, tinit=-1, deltaT=0, beta1=1, orth_reg_weight=-1, lora_alpha=0, bias="some")
    for field in (
        "target_r is 0",
        "tinit is -1",
        "deltaT is 0",
        "beta1 is 1",
        "orth_reg_weight is -1",
        "lora_alpha is 0",
    ):
        assert field in str(error.value)
    with pytest.raises(ConfigError, match="target_r is 8 with init_r 4"):
        engine.AdaLoraConfig(init_r=4)
    with pytest.raises(ConfigError, match="leaves no step"):
        engine.AdaLoraConfig(tinit=5, tfinal=5, total_step=10)
    with pytest.raises(ConfigError, match="rank_pattern has 'x'"):
        engine.AdaLoraConfig(rank_pattern={"x": [True]})
    model = engine.get_peft_model(tiny.llama(), engine.AdaLoraConfig(tinit=3, tfinal=3))
    with pytest.raises(ConfigError, match="total_step is None"):
        model.base_model.update_and_allocate(1)
    with pytest.raises(ConfigError, match="leaves no step"):
        engine.prepare_training(model, total_steps=6)
    late = engine.get_peft_model(tiny.llama(), engine.AdaLoraConfig(total_step=50))
    with pytest.raises(ConfigError, match=r"cut at step 50; the training ends at step 20"):
        engine.prepare_training(late, total_steps=20)
