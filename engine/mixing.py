"""New adapters from weighted combinations of others.

With dW_i the change of a weight that adapter i amounts to, s_i its scale and w_i' = w_i s_i, the new adapter is a LoRA
of scale 1 (rsLoRA's too), and modules that an adapter does not have count as dW_i = 0:

- `cat`: A = [w_1' A_1; w_2' A_2; ...], B = [B_1, B_2, ...]: exactly sum_i w_i dW_i, at the sum of the ranks.
- `svd`: the nearest to sum_i w_i dW_i at rank `svd_rank`, from any methods that can be merged, DoRA and MoRA too.
- `linear`: A = sum sign(w') sqrt|w'| A_i, B = sum sqrt|w'| B_i: PEFT's, kept for compatibility; its product has cross
  terms that the sum has not. `magnitude_prune`, `ties`, `dare_linear`, `dare_ties`: the same of pruned A_i and B_i.
- `magnitude_prune_svd`, `ties_svd`, `dare_linear_svd`, `dare_ties_svd`: pruning dW_i itself, then `svd`.

IA3 adapters alone give an IA3 adapter, l = sum_i w_i l_i, as in PEFT, with l_i = 1 where an adapter has none. Mixed
live they act as 1 + sum_i w_i (l_i - 1): the same where the weights sum to 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.adapters import ADAPTERS
from engine.adapters.base import CONV1D, EMBEDDING, layer_kind, master
from engine.adapters.ia3 import IA3Input
from engine.adapters.lora import LoraConfig
from engine.adapters.lowrank import LowRankWeights
from engine.combinations import COMBINATIONS as COMBINATIONS
from engine.combinations import PRUNING
from engine.errors import ConfigError
from engine.inject import base_modules, matches
from engine.layers import AdapterLayer
from engine.task_vectors import DRIVERS, Pair, Recipe, core, cut, dense_svd

if TYPE_CHECKING:
    from engine.model import PeftModel


@dataclass(frozen=True)
class Combination:
    """The settings of `add_weighted_adapter`; see there."""

    how: str
    recipe: Recipe
    rank: int | None
    clamp: float | None
    driver: str | None

    def __post_init__(self) -> None:
        rank = self.rank
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise ConfigError(f"svd_rank is {rank!r}; needed: a whole number from 1, or None.")
        if self.clamp is not None and not 0.5 < self.clamp <= 1:
            raise ConfigError(f"svd_clamp is {self.clamp!r}; needed: a quantile above 0.5 up to 1, or None.")
        if self.driver not in DRIVERS:
            raise ConfigError(f"svd_driver is {self.driver!r}; needed: one of {', '.join(map(str, DRIVERS))}.")

    def at(self, layer: AdapterLayer, terms: Sequence[tuple[str, float]], thin: bool) -> Pair:
        """(A, B) of the combination at one layer; terms: (adapter that the layer has, weight).

        `thin` says that each of them is s B A, so that the sum need not be formed.
        """
        own = [layer._weights(name) for name, _ in terms]
        low = [weights for weights in own if isinstance(weights, LowRankWeights)]
        weights = [weight for _, weight in terms]
        if not self.how.endswith("svd"):
            return self._of_factors(layer, low, weights)
        rank = self.rank or max((w.matrices()[0].shape[0] for w in low), default=0)
        # The quantile depends on the singular vectors' signs: with it, PEFT's own decomposition.
        if self.how == "svd" and thin and self.clamp is None:
            return cut(core(_scaled(low, weights)), rank)
        changes = [w.delta_weight(layer.base_layer) for w in own]
        matrix = as_matrix(layer.base_layer, self.recipe.combine(changes, weights))
        return cut(dense_svd(matrix, self.driver), rank, self.clamp)

    def _of_factors(self, layer: AdapterLayer, own: Sequence[LowRankWeights], weights: Sequence[float]) -> Pair:
        if self.how == "cat":
            pairs = _scaled(own, weights)
            return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)
        pairs = [w.matrices() for w in own]
        if len({a.shape[0] for a, _ in pairs}) > 1:
            raise ConfigError(
                f"combination_type {self.how!r} needs equal ranks; at {layer.module_name} they are "
                f"{', '.join(str(a.shape[0]) for a, _ in pairs)}.",
                f"Use {'svd or cat' if self.how == 'linear' else self.how + '_svd'}.",
            )
        scaled = [weight * w.scale for w, weight in zip(own, weights, strict=True)]
        roots = [math.sqrt(abs(value)) for value in scaled]
        signed = [math.copysign(root, value) for root, value in zip(roots, scaled, strict=True)]
        a = self.recipe.combine([a for a, _ in pairs], signed)
        return a, self.recipe.combine([b for _, b in pairs], roots)


def _scaled(own: Sequence[LowRankWeights], weights: Sequence[float]) -> list[Pair]:
    pairs = [(w.matrices(), weight * w.scale) for w, weight in zip(own, weights, strict=True)]
    return [(factor * a, b) for (a, b), factor in pairs]


def as_matrix(base: nn.Module, change: Tensor) -> Tensor:
    """The change of a weight as the matrix B A, (out, in): a convolution's is (out, in * height * width)."""
    if layer_kind(base) in (CONV1D, EMBEDDING):
        return change.T
    return change.flatten(1)


@torch.no_grad()
def add_weighted_adapter(
    model: PeftModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str | None = None,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int | None = None,
) -> None:
    """Attach `adapter_name`, a combination of adapters of the model; the others stay as they are.

    Args:
        model: the model with the adapters.
        adapters, weights: what to combine; a weight may be negative or 0.
        adapter_name: the new adapter.
        combination_type: one of COMBINATIONS; None: `svd`, or for IA3 adapters alone the sum of their vectors.
        svd_rank: the most that the new rank may be; None: the largest rank of the adapters.
        svd_clamp: a quantile at which the entries of A and B are cut off.
        svd_full_matrices: taken for PEFT's sake; it makes no difference to the result.
        svd_driver: cuSOLVER's method, as for torch.linalg.svd.
        density, majority_sign_method: see `engine.task_vectors.Recipe`.
        seed: of DARE's masks; None takes them from torch's own generator.

    Raises:
        ConfigError: an unknown name or type, unequal lengths, unequal ranks where they have to be equal, a method that
            the type cannot combine, or adapters with biases of the base or saved modules, which do not add up.
    """
    methods = _checked(model, adapters, weights, adapter_name)
    terms = list(zip(adapters, map(float, weights), strict=True))
    if methods == {"ia3"} and combination_type in (None, "linear"):
        return _add_ia3(model, terms, adapter_name)
    how = combination_type or "svd"
    if how not in COMBINATIONS:
        raise ConfigError(f"combination_type is {how!r}; needed: one of {', '.join(COMBINATIONS)}.")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    kind = how.removesuffix("_svd")
    recipe = Recipe("linear" if kind in ("svd", "cat") else kind, density, majority_sign_method, generator)
    combination = Combination(how, recipe, svd_rank, svd_clamp, svd_driver)
    _refuse_methods(model, adapters, combination)
    made: dict[str, Pair] = {}
    biases: dict[str, Tensor] = {}
    for layer, here in _places(model, terms):
        thin = all(model._known(name).method == "lora" for name, _ in here)
        made[layer.module_name] = combination.at(layer, here, thin)
        bias = _bias(layer, here)
        if bias is not None and bias.any():
            biases[layer.module_name] = bias
    if biases and kind in PRUNING:
        raise ConfigError(
            f"combination_type {how!r} says nothing of biases, and the adapters change that of {next(iter(biases))}.",
            "Use svd, or cat for LoRA adapters.",
        )
    model.add_adapter(adapter_name, _config(model, adapters, made, bool(biases)))
    for wrapper in model._layers[adapter_name]:
        assert isinstance(wrapper, AdapterLayer)
        new: Any = wrapper.adapters[adapter_name]
        write_matrices(new, *made[wrapper.module_name])
        if wrapper.module_name in biases:
            new.lora_B.bias.copy_(biases[wrapper.module_name])


def write_matrices(weights: LowRankWeights, a: Tensor, b: Tensor) -> None:
    """A (r, in) and B (out, r) into an adapter's parameters, whatever the kind of layer; call it under no_grad."""
    weights._a().copy_(a)
    weights._b().copy_(b)


def _checked(model: PeftModel, adapters: Sequence[str], weights: Sequence[float], new: str) -> set[str]:
    """The methods of the adapters, after what every combination asks of them."""
    if new in model.peft_config:
        raise ConfigError(f"There is already an adapter {new!r}.", "Choose another name or delete_adapter it first.")
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"{len(adapters)} adapters and {len(weights)} weights were given; needed: one weight each.")
    for name, weight in zip(adapters, weights, strict=True):
        spec = ADAPTERS[model._known(name).method]
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"The weight of {name!r} is {weight!r}; needed: a finite number.")
        if not spec.mergeable:
            raise ConfigError(
                f"{name!r} is a {spec.title} adapter, which is no change of weights and cannot be combined into one."
            )
        if any(not isinstance(layer, AdapterLayer) or name in layer.biases for layer in model._layers[name]):
            raise ConfigError(
                f"{name!r} also trains whole modules or the base's biases, which cannot be combined.",
                "Mix it live with set_adapter_weights, or train it without them.",
            )
    return {model._known(name).method for name in adapters}


def _refuse_methods(model: PeftModel, adapters: Sequence[str], combination: Combination) -> None:
    for name in adapters:
        config = model._known(name)
        title = ADAPTERS[config.method].title
        if not combination.how.endswith("svd") and config.method != "lora":
            raise ConfigError(
                f"{name!r} is a {title} adapter; only LoRA adapters can be combined by {combination.how!r}.",
                "Use svd, which makes a LoRA adapter of any methods, or mix it live with set_adapter_weights.",
            )
        if combination.how.endswith("svd") and combination.rank is None:
            layers = [layer for layer in model._layers[name] if isinstance(layer, AdapterLayer)]
            if not all(isinstance(layer.adapters[name], LowRankWeights) for layer in layers):
                raise ConfigError(
                    f"svd_rank is None, and {name!r} is a {title} adapter, which has no rank to take it from.",
                    "Give svd_rank; the larger, the nearer to the sum.",
                )


def _places(
    model: PeftModel, terms: Sequence[tuple[str, float]]
) -> Iterable[tuple[AdapterLayer, list[tuple[str, float]]]]:
    """Every layer that one of the adapters has, in the model's order, with the terms that count there."""
    for _, layer in model.wrappers():
        if isinstance(layer, AdapterLayer):
            here = [(name, weight) for name, weight in terms if name in layer.adapters]
            if here:
                yield layer, here


def _bias(layer: AdapterLayer, terms: Sequence[tuple[str, float]]) -> Tensor | None:
    found = [(weight, layer._weights(name).delta_bias(layer.base_layer)) for name, weight in terms]
    parts = [weight * bias for weight, bias in found if bias is not None]
    return torch.stack(parts).sum(0) if parts else None


def _config(model: PeftModel, adapters: Sequence[str], made: dict[str, Pair], lora_bias: bool) -> LoraConfig:
    configs = [model._known(name) for name in adapters]
    ranks = {module: a.shape[0] for module, (a, _) in made.items()}
    largest = max(ranks.values())
    smaller = {exact(module, ranks): rank for module, rank in ranks.items() if rank != largest}
    return LoraConfig(
        base_model_name_or_path=configs[0].base_model_name_or_path,
        revision=configs[0].revision,
        task_type=configs[0].task_type,
        target_modules=target_names(model, list(made)),
        fan_in_fan_out=any(getattr(config, "fan_in_fan_out", False) for config in configs),
        r=largest,
        lora_alpha=largest,
        rank_pattern=smaller,
        alpha_pattern={module: float(rank) for module, rank in smaller.items()},
        lora_bias=lora_bias,
    )


def exact(module: str, others: Iterable[str]) -> str:
    """A key of rank_pattern for this module alone: a bare name would also mean those that end in it."""
    return f"^{module}" if any(other.endswith("." + module) for other in others) else module


def target_names(model: PeftModel, modules: Sequence[str]) -> list[str] | str:
    """The shortest target_modules that means these modules and no others."""
    every = [name for name, _ in base_modules(model.get_base_model())]
    for wanted in (sorted({module.rsplit(".", 1)[-1] for module in modules}), sorted(modules)):
        if {name for name in every if matches(name, wanted)} == set(modules):
            return wanted
    return "|".join(re.escape(module) for module in sorted(modules))


def _add_ia3(model: PeftModel, terms: Sequence[tuple[str, float]], adapter_name: str) -> None:
    made: dict[str, Tensor] = {}
    inner = []
    missing = sum(weight for _, weight in terms)
    for layer, here in _places(model, terms):
        kinds = {isinstance(layer.adapters[name], IA3Input) for name, _ in here}
        if len(kinds) > 1:
            raise ConfigError(
                f"{layer.module_name} is one of the feedforward_modules of some of the adapters and not of others.",
                "Mix them live with set_adapter_weights, or into a LoRA with combination_type='svd' and a svd_rank.",
            )
        if True in kinds:
            inner.append(layer.module_name)
        vectors = [weight * master(layer.adapters[name].ia3_l) for name, weight in here]  # type: ignore[arg-type]
        absent = missing - sum(weight for _, weight in here)
        made[layer.module_name] = torch.stack(vectors).sum(0) + absent
    targets = target_names(model, list(made))
    named: list[str] | str = [item for item in targets if any(matches(name, [item]) for name in inner)]
    if isinstance(targets, str) or {name for name in made if name.endswith(tuple(named))} != set(inner):
        targets, named = ("|".join(map(re.escape, sorted(names))) for names in (made, inner))
    config = model._known(terms[0][0]).replace(
        target_modules=targets, exclude_modules=None, feedforward_modules=named, init_ia3_weights=True
    )
    model.add_adapter(adapter_name, config)
    for wrapper in model._layers[adapter_name]:
        assert isinstance(wrapper, AdapterLayer)
        wrapper.adapters[adapter_name].ia3_l.copy_(made[wrapper.module_name])  # type: ignore[operator]
