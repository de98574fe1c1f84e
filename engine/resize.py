"""Changing an adapter's rank between two stages of training."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.adapters import ADAPTERS
from engine.adapters.lora import LoraConfig
from engine.adapters.lowrank import LowRankWeights
from engine.errors import ConfigError
from engine.inject import find_targets
from engine.layers import AdapterLayer
from engine.mixing import exact, write_matrices
from engine.model import PeftModel, spec_of
from engine.task_vectors import core, cut


@torch.no_grad()
def expand_lora_rank(
    model: PeftModel,
    config: LoraConfig,
    adapter_name: str = "default",
    optimizer: torch.optim.Optimizer | None = None,
) -> PeftModel:
    """Raise a LoRA adapter's rank without changing what it computes.

    With scale s before and s' after: A' = [A; A_new] and B' = [B s/s', 0], so that s' B' A' = s B A. The new rows of A
    start Kaiming-uniform, the new columns of B at zero (both at zero would never get a gradient); at embeddings it is
    B that starts at random and A at zero, as with a fresh adapter.

    Args:
        model: the model with the adapter.
        config: gives the new `r`, `lora_alpha`, `use_rslora`, `rank_pattern` and `alpha_pattern`; all else stays.
            Its target_modules are left out, or mean the adapter's own modules.
        adapter_name: the adapter to expand.
        optimizer: its moments are carried over: zeros for the new entries, and B's scaled as its gradient is.

    Raises:
        ConfigError: the new rank is smaller, or the adapter is not LoRA, or is merged, or the config means other
            modules.
    """
    before, layers = _lora(model, adapter_name, "expand_lora_rank")
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"expand_lora_rank needs a LoraConfig for the new rank, not {type(config).__name__}.")
    _refuse_other_targets(model, before, config, layers)
    names = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    after = dataclasses.replace(before, **{name: getattr(config, name) for name in names})
    for layer in layers:
        if after.rank_of(layer.module_name) < before.rank_of(layer.module_name):
            raise ConfigError(
                f"r is {after.rank_of(layer.module_name)} at {layer.module_name}, where it was "
                f"{before.rank_of(layer.module_name)}; needed: at least as much.",
                "reduce_lora_rank lowers a rank.",
            )
    for layer in layers:
        _expand(layer, after, adapter_name, optimizer)
    model.peft_config[adapter_name] = after
    return model


def _refuse_other_targets(model: PeftModel, before: LoraConfig, config: LoraConfig, layers: list[AdapterLayer]) -> None:
    """The new rank is one of the same layers and method."""
    if config.method != "lora":
        raise ConfigError(
            f"expand_lora_rank was given a config with use_{config.method}; the adapter is a plain LoRA.",
            "Leave it out: the method cannot change with the rank.",
        )
    if config.target_modules is None:
        return
    asked, _ = find_targets(model.get_base_model(), config, ADAPTERS["lora"].layers)
    there = [layer.module_name for layer in layers]
    if set(asked) != set(there) and config.target_modules != before.target_modules:
        raise ConfigError(
            f"expand_lora_rank was given target_modules={config.target_modules!r}, which means other modules than the "
            f"adapter's {before.target_modules!r} (first that differs: {sorted(set(asked) ^ set(there))[0]}).",
            "Leave target_modules out, and add_adapter another adapter for other modules.",
        )


def _lora(model: PeftModel, adapter: str, asked: str) -> tuple[LoraConfig, list[AdapterLayer]]:
    """The config of a LoRA adapter, and its layers, none of them merged."""
    config = model._known(adapter)
    if not isinstance(config, LoraConfig) or config.method != "lora":
        raise ConfigError(f"{asked} serves LoRA adapters; {adapter!r} is {spec_of(config).title}.")
    layers = [
        layer for layer in model._layers[adapter] if isinstance(layer, AdapterLayer) and adapter in layer.adapters
    ]
    merged = [layer.module_name for layer in layers if adapter in layer.merged]
    if merged:
        raise ConfigError(
            f"{adapter!r} is merged into {merged[0]}; {asked} needs it apart.", "Call unmerge_adapter() first."
        )
    return config, layers


def _fresh(layer: AdapterLayer, config: LoraConfig, old: LowRankWeights) -> LowRankWeights:
    """Weights of the config's rank at the layer, trainable as the old ones are."""
    plain = dataclasses.replace(config, init_lora_weights=True)
    new: LowRankWeights = ADAPTERS["lora"].build(layer.base_layer, plain, layer.module_name)
    for parameter, former in zip(new.parameters(), old.parameters(), strict=True):
        parameter.requires_grad_(former.requires_grad)
    return new.train(old.training)


def _expand(layer: AdapterLayer, after: LoraConfig, adapter: str, optimizer: torch.optim.Optimizer | None) -> None:
    old: Any = layer.adapters[adapter]
    new = _fresh(layer, after, old)
    ratio = old.scale / new.scale
    if old.offset_A is not None:
        # Rows and columns of zeros change nothing, and make the exported rank 2 r, as the exported config says.
        more = new.r - old.offset_A.shape[0]
        new.offset_A = nn.functional.pad(old.offset_A, (0, 0, 0, more))
        new.offset_B = nn.functional.pad(old.offset_B * ratio, (0, more))
    for (name, before), now in zip(old.named_parameters(), new.parameters(), strict=True):
        factor = ratio if "_B" in name else 1.0
        now[tuple(slice(0, n) for n in before.shape)] = before * factor
        if optimizer is not None:
            _carry_over(optimizer, before, now, 1 / factor)
    layer.adapters[adapter] = new


@dataclass(frozen=True)
class Reduction:
    """What `reduce_lora_rank` did at one module.

    Attributes:
        before, after: the rank.
        error: ||dW' - dW|| / ||dW|| in the Frobenius norm; 0 where there was no change yet.
    """

    before: int
    after: int
    error: float


@torch.no_grad()
def reduce_lora_rank(
    model: PeftModel, r: int | None = None, energy: float | None = None, adapter_name: str = "default"
) -> dict[str, Reduction]:
    """Lower a LoRA adapter's rank to the nearest change of weights of the new one.

    The singular value decomposition of each s B A, from its thin factors, gives the best approximation in the Frobenius
    norm. The scale s of each module stays. A PiSSA adapter becomes a plain LoRA, whose start is no longer apart.
    An optimizer's moments belong to directions that are gone: make a new one for further training.

    Args:
        model: the model with the adapter.
        r: the most that the rank may be at any module.
        energy: from 0 to 1: each module keeps the fewest singular values whose squares have that share of the sum;
            ranks that differ are written into `rank_pattern`.
        adapter_name: the adapter to reduce.

    Returns:
        Module -> the ranks and the error there.

    Raises:
        ConfigError: neither r nor energy is given, or one that cannot be; the adapter is not LoRA, or is merged.
    """
    if r is None and energy is None:
        raise ConfigError("reduce_lora_rank needs a rank r, an energy share, or both.", "Give energy=0.99, say.")
    if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
        raise ConfigError(f"r is {r!r}; needed: a whole number from 1.")
    if energy is not None and (not isinstance(energy, int | float) or not 0 < energy <= 1):
        raise ConfigError(f"energy is {energy!r}; needed: a share above 0 up to 1.")
    before, layers = _lora(model, adapter_name, "reduce_lora_rank")
    parts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    report: dict[str, Reduction] = {}
    for layer in layers:
        old: Any = layer.adapters[adapter_name]
        a, b = old.matrices()
        parts[layer.module_name] = core([(old.scale * a, b)])
        squares = parts[layer.module_name][1].double().square()
        kept = min(_enough(squares, energy), r or a.shape[0])
        total = float(squares.sum())
        error = math.sqrt(float(squares[kept:].sum()) / total) if total else 0.0
        report[layer.module_name] = Reduction(a.shape[0], kept, error)
    after = _reduced(before, report)
    for layer in layers:
        old = layer.adapters[adapter_name]
        new = _fresh(layer, after, old)
        # A change that is still zero stays a fresh adapter's, with one of the matrices at random.
        if parts[layer.module_name][1].any():
            a, b = cut(parts[layer.module_name], new.r)
            root = math.sqrt(new.scale)
            write_matrices(new, a / root, b / root)
        if before.lora_bias and hasattr(old, "lora_B"):
            new.lora_B.bias.copy_(old.lora_B.bias * (old.scale / new.scale))  # type: ignore[operator, union-attr]
        layer.adapters[adapter_name] = new
    model.peft_config[adapter_name] = after
    return report


@torch.no_grad()
def rank_errors(model: PeftModel, adapter_name: str = "default") -> list[float]:
    """What lowering the rank would cost: entry r - 1 is ||dW' - dW|| / ||dW|| over all modules after
    `reduce_lora_rank(r=r)`, up to the largest rank there is, where it is 0.

    Raises:
        ConfigError: the adapter is not LoRA, or is merged.
    """
    _, layers = _lora(model, adapter_name, "rank_errors")
    squares = []
    for layer in layers:
        weights: Any = layer.adapters[adapter_name]
        a, b = weights.matrices()
        squares.append(core([(weights.scale * a, b)])[1].double().square())
    total = sum(float(values.sum()) for values in squares)
    largest = max(len(values) for values in squares)
    return [
        math.sqrt(sum(float(values[r:].sum()) for values in squares) / total) if total else 0.0
        for r in range(1, largest + 1)
    ]


def _enough(squares: Tensor, energy: float | None) -> int:
    """How many of the sorted values reach the share of their sum; at least 1."""
    if energy is None:
        return len(squares)
    sums = squares.cumsum(0)
    return min(int((sums < energy * sums[-1]).sum()) + 1, len(squares))


def _reduced(before: LoraConfig, report: dict[str, Reduction]) -> LoraConfig:
    """The config of the new ranks, with each module's scale as it was."""
    ranks = {module: item.after for module, item in report.items()}
    power = 0.5 if before.use_rslora else 1.0
    alphas = {module: before.scale(module) * rank**power for module, rank in ranks.items()}
    largest = max(ranks.values())
    alpha = next(alphas[module] for module, rank in ranks.items() if rank == largest)
    return dataclasses.replace(
        before,
        r=largest,
        lora_alpha=alpha,
        rank_pattern={exact(m, ranks): rank for m, rank in ranks.items() if rank != largest},
        alpha_pattern={exact(m, ranks): value for m, value in alphas.items() if value != alpha},
        init_lora_weights=True,
    )


def _carry_over(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, gradient: float) -> None:
    """Put `new` in the place of `old`; a first moment scales with the gradient, a second one with its square."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if not state:
        return
    moved: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == old.shape:
            grown = torch.zeros_like(new, dtype=value.dtype)
            grown[tuple(slice(0, n) for n in value.shape)] = value * (gradient**2 if "sq" in name else gradient)
            value = grown
        moved[name] = value
    optimizer.state[new] = moved
