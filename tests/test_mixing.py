"""Combinations of adapters: against PEFT where it is right, against the dense sum in float64 where it is not."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import engine
from engine import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, MoRAConfig, VeraConfig, get_peft_model
from engine.errors import ConfigError, EngineError, TargetError
from engine.layers import AdapterLayer
from engine.mixing import COMBINATIONS
from tests import tiny
from tests.differential import peft

Terms = dict[str, float]
PRUNING = {"density": 0.4}


def adapters(model: Any, configs: dict[str, Any]) -> Any:
    """Further adapters with random values; every name of `configs` but the one that the model has."""
    for number, (name, config) in enumerate(configs.items()):
        if name not in model.peft_config:
            model.add_adapter(name, config)
        model.set_adapter(name)
        tiny.shake(model, 0.2 + 0.1 * number)
    return model


def model_with(build: Callable[[], nn.Module], configs: dict[str, Any]) -> Any:
    first = next(iter(configs))
    return adapters(get_peft_model(build(), configs[first], first), configs)


def changes(model: Any, name: str) -> dict[str, torch.Tensor]:
    """Module -> the change of its weight, float64."""
    layers = [layer for layer in model._layers[name] if isinstance(layer, AdapterLayer)]
    return {x.module_name: x.adapters[name].delta_weight(x.base_layer).detach().double() for x in layers}


def dense(model: Any, terms: Terms) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for name, weight in terms.items():
        for module, change in changes(model, name).items():
            total[module] = total.get(module, 0) + weight * change
    return total


def nearest(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vt = torch.linalg.svd(matrix.flatten(1), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vt[:rank]).view(matrix.shape)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (tiny.llama, ["q_proj", "down_proj", "embed_tokens"]),
    "gpt2": (tiny.gpt2, ["c_attn"]),
    "pixels": (tiny.grouped, ["first", "head"]),
}


def both_libraries(family: str, tmp: Path) -> tuple[Any, Any]:
    build, targets = FAMILIES[family]
    one, two = (LoraConfig(r=4, lora_alpha=alpha, target_modules=targets) for alpha in (6, 2))
    ours = model_with(build, {"one": one, "two": two})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.save_pretrained(tmp)
        theirs = peft.PeftModel.from_pretrained(build(), tmp / "one", adapter_name="one")
        theirs.load_adapter(tmp / "two", adapter_name="two")
    return ours, theirs


CASES: list[tuple[str, dict[str, Any]]] = [
    ("svd", {"svd_rank": 3}),
    ("svd", {"svd_rank": 3, "svd_clamp": 0.8}),
    ("linear", {}),
    ("cat", {}),
    *((how, PRUNING) for how in COMBINATIONS if how not in ("svd", "cat", "linear")),
    ("ties", {**PRUNING, "majority_sign_method": "frequency"}),
    ("dare_ties_svd", {**PRUNING, "majority_sign_method": "frequency"}),
]


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize(("how", "more"), CASES, ids=[f"{how}-{len(more)}" for how, more in CASES])
def test_every_type_is_pefts(
    how: str, more: dict[str, Any], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = both_libraries(family, tmp_path)
    generator = torch.Generator().manual_seed(11)

    def drop(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
        """PEFT's, with masks from a seed of its own."""
        return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density

    monkeypatch.setattr("peft.utils.merge_utils.random_pruning", drop)
    weights = [0.7, -0.4]
    theirs.add_weighted_adapter(["one", "two"], weights, "mix", how, **more)
    ours.add_weighted_adapter(["one", "two"], weights, "mix", how, **more, seed=11)
    with torch.no_grad():
        for name, change in changes(ours, "mix").items():
            other = theirs.get_base_model().get_submodule(name).get_delta_weight("mix")
            assert change.abs().max() > 1e-3
            assert torch.allclose(change, other.double(), atol=1e-5), name
    ours.set_adapter("mix")
    theirs.set_adapter("mix")
    if family != "pixels":
        assert (tiny.logits(ours) - tiny.logits(theirs.eval())).abs().max() < 1e-4
    # The file of the mix is a plain LoRA that both libraries open.
    ours.save_pretrained(tmp_path / "out")
    again = engine.PeftModel.from_pretrained(FAMILIES[family][0](), tmp_path / "out" / "mix", adapter_name="mix")
    for name, change in changes(again, "mix").items():
        assert torch.equal(change, changes(ours, "mix")[name])


@pytest.mark.parametrize("how", ["cat", "svd", "linear", "magnitude_prune_svd"])
def test_rslora_has_scale_one_like_any_other(how: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj"])
    model = model_with(tiny.llama, {"one": config, "two": config})
    terms = {"one": 0.7, "two": 0.5}
    model.add_weighted_adapter(list(terms), list(terms.values()), "mix", how, svd_rank=8, density=1.0)
    a, b = (model._layers["mix"][0].adapters[n].lora_A.weight for n in ("one", "two"))
    total = dense(model, terms)
    for module, change in changes(model, "mix").items():
        if how != "linear":
            assert torch.allclose(change, total[module], atol=1e-6)
    if how == "linear":
        own = model._layers["mix"][0].adapters["mix"]
        roots = [(w * 3 / 4**0.5) ** 0.5 for w in terms.values()]
        assert own.scale == 1
        assert torch.allclose(own.lora_A.weight, roots[0] * a + roots[1] * b, atol=1e-6)
    model.set_adapter("mix")
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "mix").eval()
    assert (tiny.logits(theirs) - tiny.logits(model)).abs().max() < 1e-5


def test_different_modules_ranks_and_weights() -> None:
    configs = {
        "one": LoraConfig(r=2, target_modules=["q_proj", "up_proj"], exclude_modules=["layers.1.self_attn.q_proj"]),
        "two": LoraConfig(r=4, use_rslora=True, target_modules=["q_proj", "embed_tokens"], layers_to_transform=None),
        "three": LoraConfig(r=3, target_modules=["v_proj"], init_lora_weights="pissa", layers_to_transform=[1]),
    }
    model = model_with(tiny.llama, configs)
    terms = {"one": 1.3, "two": -0.4, "three": 0.5}
    total = dense(model, terms)
    for how, more in (("cat", {}), ("svd", {"svd_rank": 12})):
        model.add_weighted_adapter(list(terms), list(terms.values()), how, how, **more)
        mixed = changes(model, how)
        assert mixed.keys() == total.keys()
        for module, change in mixed.items():
            assert torch.allclose(change, total[module], atol=1e-5), (how, module)
    assert model.peft_config["cat"].rank_of("model.layers.0.self_attn.q_proj") == 6
    assert model.peft_config["cat"].rank_of("model.layers.1.self_attn.q_proj") == 4
    model.set_adapter_weights(terms)
    live = tiny.logits(model)
    model.set_adapter("cat")
    assert (tiny.logits(model) - live).abs().max() < 1e-5
    model.add_weighted_adapter(["one", "two"], [0.0, 1.0], "zero")
    for module, change in changes(model, "zero").items():
        expected = changes(model, "two").get(module, torch.zeros_like(change))
        assert torch.allclose(change, expected, atol=1e-5)
    model.add_weighted_adapter(["two"], [-1.0], "alone", "cat")
    for module, change in changes(model, "alone").items():
        assert torch.allclose(change, -changes(model, "two")[module], atol=1e-6)


class Nested(nn.Module):
    """A module whose full name is another one's ending."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"head": nn.Linear(8, 8), "other": nn.Linear(8, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner["other"](self.inner["head"](x)))


def test_names_that_end_in_another_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Nested(), LoraConfig(r=2, target_modules="head"), "one")
    model.add_adapter("two", LoraConfig(r=3, target_modules=r"inner\.head"))
    model.add_adapter("three", LoraConfig(r=3, target_modules="head"))
    model.set_adapter(["one", "two", "three"])
    tiny.shake(model, 0.3)
    model.add_weighted_adapter(["one", "two"], [1, 1], "apart", "cat")
    model.add_weighted_adapter(["one", "three"], [1, 1], "top", "cat")
    assert set(changes(model, "top")) == {"head"}
    assert {m: model.peft_config["apart"].rank_of(m) for m in ("head", "inner.head")} == {"head": 2, "inner.head": 3}
    model.set_adapter("apart")
    x = torch.randn(2, 8)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = Nested()
    for library in (engine, peft):
        again = library.PeftModel.from_pretrained(base, tmp_path / "apart", adapter_name="apart")
        assert (again(x) - model(x)).abs().max() < 1e-5
        base = again.unload()


METHODS: dict[str, Any] = {
    "lora": LoraConfig(r=2, lora_bias=True, target_modules=["q_proj", "down_proj"]),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]),
    "mora": MoRAConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "vera": VeraConfig(r=8, target_modules=["q_proj", "k_proj"]),
    "loha": LoHaConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "lokr": LoKrConfig(r=2, target_modules=["q_proj"]),
    "ia3": IA3Config(target_modules=["q_proj", "k_proj", "down_proj"]),
}


def test_svd_makes_a_lora_of_any_methods(tmp_path: Path) -> None:
    model = model_with(tiny.llama, METHODS)
    weights = [0.5, 1.0, -0.6, 0.7, 0.4, 0.8, -0.3]
    terms = dict(zip(METHODS, weights, strict=True))
    total = dense(model, terms)
    model.add_weighted_adapter(list(terms), weights, "exact", svd_rank=64)
    model.add_weighted_adapter(list(terms), weights, "small", svd_rank=5)
    exact, small = changes(model, "exact"), changes(model, "small")
    assert exact.keys() == small.keys() == total.keys()
    for module, change in total.items():
        assert torch.allclose(exact[module], change, atol=1e-5), module
        assert torch.allclose(small[module], nearest(change, 5), atol=1e-5), module
    model.set_adapter_weights({name: weight for name, weight in terms.items() if name not in ("ia3",)})
    live = tiny.logits(model)
    rest = [name for name in terms if name != "ia3"]
    model.add_weighted_adapter(rest, [terms[name] for name in rest], "linear_ones", "svd", svd_rank=64)
    model.set_adapter("linear_ones")
    assert (tiny.logits(model) - live).abs().max() < 2e-5
    # Biases too: LoRA's own and IA3's change of the base's.
    assert model.peft_config["exact"].lora_bias
    layer = next(x for x in model._layers["exact"] if x.module_name.endswith("0.self_attn.q_proj"))
    bias = 0.5 * layer.adapters["lora"].delta_bias(layer) - 0.3 * layer.adapters["ia3"].delta_bias(layer.base_layer)
    assert torch.allclose(layer.adapters["exact"].delta_bias(layer), bias, atol=1e-6)
    # q_proj has a bias and down_proj none: LoRA's own bias there cannot be merged, and that is said.
    with pytest.raises(TargetError, match="no bias"):
        model.merge_adapter(["exact"])
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "small").eval()
    model.set_adapter("small")
    assert (tiny.logits(theirs) - tiny.logits(model)).abs().max() < 1e-5


def test_a_mix_without_biases_of_its_own_where_the_base_has_none_merges() -> None:
    model = model_with(tiny.llama, {"ia3": IA3Config(target_modules=["q_proj", "up_proj"])})
    model.add_weighted_adapter(["ia3"], [0.5], "mix", "svd", svd_rank=64)
    model.set_adapter("mix")
    live = tiny.logits(model)
    model.merge_adapter()
    assert (tiny.logits(model) - live).abs().max() < 1e-5


def test_convolutions_of_any_methods() -> None:
    targets = ["first", "second"]
    configs = {
        "lora": LoraConfig(r=2, target_modules=targets),
        "loha": LoHaConfig(r=2, target_modules=targets, use_effective_conv2d=True),
        "dora": LoraConfig(r=3, use_dora=True, target_modules=targets),
    }
    model = model_with(tiny.pixels, configs)
    terms = {"lora": 0.5, "loha": -0.8, "dora": 0.6}
    model.add_weighted_adapter(list(terms), list(terms.values()), "mix", svd_rank=5)
    for module, change in dense(model, terms).items():
        assert torch.allclose(changes(model, "mix")[module], nearest(change, 5), atol=1e-5)


def ia3_vector(model: Any, module: str, name: str) -> torch.Tensor:
    return model.get_base_model().get_submodule(module).adapters[name].ia3_l.detach()


@pytest.mark.parametrize("targets", [["c_attn", "mlp.c_proj"], ["c_attn", "c_proj"]])
def test_ia3_is_the_sum_of_the_vectors(targets: list[str], tmp_path: Path) -> None:
    config = IA3Config(target_modules=targets, feedforward_modules=r".*mlp\.c_proj")
    ours = model_with(tiny.gpt2, {"one": config, "two": config})
    ours.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(tiny.gpt2(), tmp_path / "one", adapter_name="one")
        theirs.load_adapter(tmp_path / "two", adapter_name="two")
        theirs.base_model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "mix")
    ours.add_weighted_adapter(["one", "two"], [0.7, -0.4], "mix")
    ours.set_adapter("mix")
    theirs.set_adapter("mix")
    assert (tiny.logits(ours) - tiny.logits(theirs.eval())).abs().max() < 1e-5
    ours.save_pretrained(tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(tiny.gpt2(), tmp_path / "again" / "mix").eval()
    assert (tiny.logits(ours) - tiny.logits(again)).abs().max() < 1e-5
    # Weights that sum to 1 are the live mix.
    ours.add_weighted_adapter(["one", "two"], [0.3, 0.7], "halves")
    ours.set_adapter_weights({"one": 0.3, "two": 0.7})
    live = tiny.logits(ours)
    ours.set_adapter("halves")
    assert (tiny.logits(ours) - live).abs().max() < 1e-5


def test_ia3_where_only_one_adapter_is() -> None:
    configs = {"one": IA3Config(target_modules=["k_proj", "down_proj"]), "two": IA3Config(target_modules=["v_proj"])}
    model = model_with(tiny.llama, configs)
    model.add_weighted_adapter(["one", "two"], [0.3, 0.7], "mix")
    module = "model.layers.1.mlp.down_proj"
    assert torch.allclose(ia3_vector(model, module, "mix"), 0.3 * ia3_vector(model, module, "one") + 0.7)
    model.set_adapter_weights({"one": 0.3, "two": 0.7})
    live = tiny.logits(model)
    model.set_adapter("mix")
    assert (tiny.logits(model) - live).abs().max() < 1e-5
    model.add_adapter("odd", IA3Config(target_modules=["down_proj"], feedforward_modules=[]))
    with pytest.raises(ConfigError, match="feedforward_modules of some"):
        model.add_weighted_adapter(["one", "odd"], [1, 1], "both")


def test_dare_repeats_by_its_seed() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    model = model_with(tiny.llama, {"one": config, "two": config})
    for how in ("dare_linear", "dare_ties_svd"):
        made = []
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            model.add_weighted_adapter(["one", "two"], [1, 1], name, how, density=0.5, seed=seed)
            made.append(changes(model, name)["model.layers.0.self_attn.q_proj"])
            model.delete_adapter(name)
        assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"combination_type": "average"}, "'average'; needed: one of svd, cat"),
    ({"combination_type": "ties"}, "density is None; ties needs"),
    ({"combination_type": "dare_linear", "density": 0}, "density is 0; dare_linear needs"),
    ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "loudest"}, "'loudest'; needed: total or"),
    ({"combination_type": "linear"}, "equal ranks; .*4, 2.*"),
    ({"combination_type": "magnitude_prune", "density": 0.5}, "equal ranks"),
    ({"svd_rank": 0}, "svd_rank is 0"),
    ({"svd_clamp": 1.5}, "svd_clamp is 1.5"),
    ({"svd_driver": "fast"}, "svd_driver is 'fast'"),
    ({"weights": [1.0]}, "2 adapters and 1 weights"),
    ({"weights": [1.0, float("nan")]}, "weight of 'two' is nan"),
    ({"adapters": ["one", "nobody"]}, "no adapter 'nobody'"),
    ({"adapter_name": "one"}, "already an adapter 'one'"),
    ({"adapters": ["one", "ia3"]}, "svd_rank is None, and 'ia3' is a IA3 adapter"),
    ({"adapters": ["one", "ia3"], "combination_type": "cat"}, "only LoRA adapters can be combined by 'cat'"),
    ({"adapters": ["one", "biased"]}, "whole modules or the base's biases"),
    ({"adapters": ["own", "own"], "combination_type": "ties", "density": 0.5}, "says nothing of biases"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_is_refused_leaves_the_model_as_it_was(change: dict[str, Any], words: str) -> None:
    configs = {
        "one": LoraConfig(r=4, target_modules=["q_proj"]),
        "two": LoraConfig(r=2, target_modules=["q_proj"]),
        "ia3": IA3Config(target_modules=["q_proj"]),
        "biased": LoraConfig(r=4, target_modules=["q_proj"], bias="lora_only"),
        "own": LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True),
    }
    model = model_with(tiny.llama, configs)
    model.set_adapter("own")
    tiny.shake(model)
    call = {"adapters": ["one", "two"], "weights": [1.0, 0.5], "adapter_name": "mix", **change}
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        model.add_weighted_adapter(**call)
    assert list(model.peft_config) == list(configs)


def test_a_method_that_reads_the_base_is_refused_while_another_is_merged() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    model = model_with(tiny.llama, {"one": config, "two": LoraConfig(r=2, use_dora=True, target_modules=["q_proj"])})
    model.merge_adapter(["one"])
    with pytest.raises(EngineError, match=re.escape("builds on the base weight")):
        model.add_weighted_adapter(["one", "two"], [1, 1], "mix")
    model.unmerge_adapter()
    model.add_weighted_adapter(["one", "two"], [1, 1], "mix")


def test_names_that_torch_has_taken_are_refused() -> None:
    model = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]), "one")
    for name in ("half", "train", "update", "keys"):
        with pytest.raises(ConfigError, match=f"'{name}' cannot be used"):
            model.add_weighted_adapter(["one"], [1.0], name)
    assert list(model.peft_config) == ["one"]
