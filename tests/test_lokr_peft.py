"""LoKr against the PEFT library in both directions, and against its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import engine
from engine.adapters.lokr import factors
from engine.errors import ConfigError
from tests import differential, tiny
from tests.differential import peft

# 32 is 4 x 8 and 64 is 8 x 8: at r 8 both parts are whole, at 2 the second is thin, with decompose_both and 1 also the
# first. With the factor 2 the second part is applied through its two factors.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"r": 2, "alpha": 3, "target_modules": "all-linear"}),
    ("llama", {"r": 1, "decompose_both": True, "target_modules": "all-linear"}),
    ("llama", {"r": 2, "decompose_factor": 2, "target_modules": ["q_proj", "up_proj"]}),
    ("llama", {"r": 1, "decompose_factor": 16, "decompose_both": True, "target_modules": ["q_proj", "down_proj"]}),
    ("llama", {"init_weights": "lycoris", "target_modules": r".*\.1\.(self_attn\.[qk]_proj|mlp\.up_proj)"}),
    ("llama", {"r": 8, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2}}),
    ("llama", {"target_modules": ["q_proj"], "alpha_pattern": {"0.*q_proj": 5}, "modules_to_save": ["lm_head"]}),
    ("t5", {"r": 2}),
    ("t5", {"target_modules": ["q", "v", "wi", "wo"]}),
    ("bert", {"r": 2, "target_modules": "all-linear", "exclude_modules": ["key"]}),
]
each_case = pytest.mark.parametrize(("family", "fields"), CASES, ids=differential.ids_of(CASES))


@each_case
def test_files_outputs_and_gradients(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    differential.same_files_outputs_gradients("LoKrConfig", family, fields, tmp_path, 0.3)


@each_case
def test_fresh_adapters_have_the_same_parameters(family: str, fields: dict[str, Any]) -> None:
    differential.same_fresh_parameters("LoKrConfig", family, fields)


@each_case
def test_merged_weights(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    differential.same_merged_weights("LoKrConfig", family, fields, tmp_path)


@pytest.mark.parametrize("fields", [{"r": 2, "decompose_factor": 4}, {"r": 8}, {"r": 8, "init_weights": "lycoris"}])
# PEFT refuses GPT-2's Conv1D for this method.
@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_twenty_steps_from_the_same_weights(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    differential.same_training("LoKrConfig", family, {"target_modules": "all-linear", **fields}, tmp_path)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generation(family: str, beams: int, tmp_path: Path) -> None:
    differential.same_generation("LoKrConfig", family, {"target_modules": "all-linear"}, tmp_path, beams)


@pytest.mark.parametrize("by_modes", [False, True])
@pytest.mark.parametrize(("r", "factor"), [(1, -1), (3, -1), (3, 1)])
def test_convolutions(r: int, factor: int, by_modes: bool, tmp_path: Path) -> None:
    fields = {
        "r": r,
        "decompose_factor": factor,
        "target_modules": ["first", "second", "head"],
        "use_effective_conv2d": by_modes,
    }
    differential.same_convolutions("LoKrConfig", fields, tmp_path)


def test_the_same_factors_as_peft() -> None:
    from peft.tuners.lokr.layer import factorization

    for size in (*range(1, 200), 768, 1000, 3072, 4096, 11008):
        for limit in (-1, 1, 2, 3, 4, 7, 8, 12, 16, 64, 100, 300):
            assert factors(size, limit) == factorization(size, limit), (size, limit)


@pytest.mark.parametrize("fields", [{"r": 8}, {"r": 2}, {"r": 1, "decompose_both": True, "decompose_factor": 4}])
@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_against_the_formula(fields: dict[str, Any], conv1d: bool) -> None:
    """y = W x + s (W1 kron W2) x with the Kronecker product entry by entry, in float64."""
    layer = tiny.gpt2().transformer.h[0].mlp.c_fc if conv1d else nn.Linear(32, 40)
    n_out = 128 if conv1d else 40
    model = engine.get_peft_model(
        nn.Sequential(layer).double(), engine.LoKrConfig(alpha=5, target_modules=["0"], **fields)
    )
    tiny.shake(model.double(), 0.5)
    p = {name.removeprefix("0.lokr_"): value.detach() for name, value in model.adapter_parameters().items()}
    first = p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"]
    second = p["w2"] if "w2" in p else p["w2_a"] @ p["w2_b"]
    k, n = second.shape
    assert (first.shape[0] * k, first.shape[1] * n) == (n_out, 32)
    change = torch.tensor([[first[o // k, i // n] * second[o % k, i % n] for i in range(32)] for o in range(n_out)])
    w = (layer.weight.T if conv1d else layer.weight).detach()
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    expected = x @ (w + 5 / fields["r"] * change).T + layer.bias
    assert torch.allclose(model(x), expected, atol=1e-10)


def test_rank_dropout_scales_only_when_asked() -> None:
    for scaled in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(4, 400, bias=False)
        nn.init.zeros_(layer.weight)
        config = engine.LoKrConfig(r=40, alpha=40, target_modules=["0"], rank_dropout=0.4, rank_dropout_scale=scaled)
        model = engine.get_peft_model(nn.Sequential(layer), config)
        with torch.no_grad():
            for parameter in model.adapter_parameters().values():
                parameter.fill_(1)
        answer = model.train()(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
        share = (answer == 0).float().mean()
        assert 0.3 < share < 0.5
        assert abs(answer.max() - (1 / (1 - share) if scaled else 1)) < 1e-4


def test_what_it_refuses_and_what_peft_does() -> None:
    for wrong in (0, -2, 1.5, True):
        with pytest.raises(ConfigError, match="decompose_factor is"):
            engine.LoKrConfig(decompose_factor=wrong)
    with pytest.raises(ConfigError, match="init_weights is 'pissa'"):
        engine.LoKrConfig(init_weights="pissa")
    with pytest.raises(TypeError, match="not supported"):
        differential.make(peft, "LoKrConfig", "gpt2", {"target_modules": ["c_attn"]})
    base = tiny.logits(tiny.gpt2())
    assert not torch.equal(tiny.logits(differential.make(engine, "LoKrConfig", "gpt2", {"init_weights": False})), base)
    assert torch.equal(tiny.logits(differential.make(engine, "LoKrConfig", "gpt2", {"init_weights": "lycoris"})), base)
