"""New adapters from weighted combinations of others.

With w_i' = w_i s_i (mixing weight times the adapter's own scale) and dW = sum_i w_i' B_i A_i, the new adapter has
scale 1:

- `cat`: A = [w_1' A_1; w_2' A_2; ...], B = [B_1, B_2, ...]: exactly dW, at the sum of the ranks.
- `svd`: the best approximation of dW at rank `svd_rank` (default: the largest of the ranks).
- `linear`: A = sum sign(w') sqrt|w'| A_i, B = sum sqrt|w'| B_i: PEFT's, kept for compatibility; its product has cross
  terms that dW has not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.adapters import ADAPTERS
from engine.adapters.base import CONV2D, EMBEDDING, layer_kind
from engine.errors import ConfigError
from engine.inject import AdapterLayer

if TYPE_CHECKING:
    from engine.model import PeftModel

Pair = tuple[Tensor, Tensor]
COMBINATIONS = ("svd", "cat", "linear")


def thin_svd(pairs: Sequence[Pair], rank: int) -> Pair:
    """(A, B) of the given rank nearest to sum_i B_i A_i, without forming the product.

    Two QR decompositions of the stacked thin matrices and an SVD of their small core: for B (out, k), A (k, in)
    the cost is O((in + out) k^2 + k^3) instead of O(in out min(in, out)). The singular values are shared evenly.
    """
    a, b = torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs], dim=1)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = torch.sqrt(s[:rank])
    return root[:, None] * (vt[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root


def add_weighted_adapter(
    model: PeftModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
) -> None:
    """Attach `adapter_name`, the combination of LoRA adapters of the model; the others stay as they are.

    Raises:
        ConfigError: an unknown name or combination type, unequal lengths, `linear` over unequal ranks, adapters over
            different modules, or adapters with biases or saved modules, which do not add up.
    """
    if combination_type not in COMBINATIONS:
        raise ConfigError(
            f"combination_type is {combination_type!r}; needed: one of {', '.join(COMBINATIONS)}.",
        )
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"{len(adapters)} adapters and {len(weights)} weights were given; needed: one weight each.")
    configs: list[Any] = [model._known(name) for name in adapters]
    for name, config in zip(adapters, configs, strict=True):
        if config.method != "lora":
            raise ConfigError(
                f"{name!r} is a {ADAPTERS[config.method].title} adapter; only LoRA adapters can be combined into one.",
                "Mix it live with set_adapter_weights.",
            )
        whole = any(not isinstance(layer, AdapterLayer) or name in layer.biases for layer in model._layers[name])
        if whole or config.lora_bias:
            raise ConfigError(
                f"{name!r} also trains whole modules or biases, which cannot be combined.",
                "Mix it live with set_adapter_weights, or train it without them.",
            )
    places = [{layer.module_name for layer in model._layers[name]} for name in adapters]
    if any(place != places[0] for place in places):
        raise ConfigError(
            f"The adapters {', '.join(adapters)} sit on different modules.", "Mix them live with set_adapter_weights."
        )
    made: dict[str, Pair] = {}
    for layer in model._layers[adapters[0]]:
        assert isinstance(layer, AdapterLayer)
        if layer_kind(layer.base_layer) == CONV2D:
            raise ConfigError(f"{layer.module_name} is a convolution, which cannot be combined in this version.")
        pairs = []
        for name, weight in zip(adapters, weights, strict=True):
            own: Any = layer.adapters[name]
            a, b = own.matrices()
            pairs.append((weight * own.scale, a.detach(), b.detach()))
        made[layer.module_name] = _combine(pairs, combination_type, svd_rank, layer.module_name)
    ranks = {module: a.shape[0] for module, (a, _) in made.items()}
    config = (
        configs[0]
        .exported()
        .replace(
            r=max(ranks.values()),
            lora_alpha=max(ranks.values()),
            rank_pattern={module: r for module, r in ranks.items() if r != max(ranks.values())},
            alpha_pattern={module: float(r) for module, r in ranks.items() if r != max(ranks.values())},
            use_rslora=False,
            lora_dropout=0.0,
        )
    )
    model.add_adapter(adapter_name, config)
    with torch.no_grad():
        for layer in model._layers[adapter_name]:
            assert isinstance(layer, AdapterLayer)
            new: Any = layer.adapters[adapter_name]
            a, b = made[layer.module_name]
            embedding = layer_kind(layer.base_layer) == EMBEDDING
            (new.lora_embedding_A if embedding else new.lora_A.weight).copy_(a)
            (new.lora_embedding_B if embedding else new.lora_B.weight).copy_(b)


def _combine(pairs: Sequence[tuple[float, Tensor, Tensor]], how: str, svd_rank: int | None, module: str) -> Pair:
    if how == "linear":
        if len({a.shape[0] for _, a, _ in pairs}) > 1:
            raise ConfigError(
                f"combination_type 'linear' needs equal ranks; at {module} they are "
                f"{', '.join(str(a.shape[0]) for _, a, _ in pairs)}.",
                "Use 'svd' or 'cat'.",
            )
        roots = [math.sqrt(abs(w)) for w, _, _ in pairs]
        a = torch.stack([math.copysign(root, w) * a for root, (w, a, _) in zip(roots, pairs, strict=True)]).sum(0)
        return a, torch.stack([root * b for root, (_, _, b) in zip(roots, pairs, strict=True)]).sum(0)
    scaled = [(w * a, b) for w, a, b in pairs]
    if how == "cat":
        return torch.cat([a for a, _ in scaled]), torch.cat([b for _, b in scaled], dim=1)
    largest = max(a.shape[0] for a, _ in scaled)
    n_out, n_in = scaled[0][1].shape[0], scaled[0][0].shape[1]
    return thin_svd(scaled, min(svd_rank or largest, n_in, n_out))
