"""The optimizers and the learning rate as a function of the step.

- LoRA+ (Hayou et al., 2024, https://arxiv.org/abs/2402.12354): lr(B) = ratio lr(A).
- AdamW with its state in 8 bits (Dettmers et al., 2022, https://arxiv.org/abs/2110.02861) and paged: bitsandbytes'.
- Adafactor (Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235): transformers', with the run's own rate (no
  relative steps, no scaling by the weights: LoRA's B begins at zero and would hardly move) and no first moment.
- LoRA-FA's later form (https://arxiv.org/abs/2308.03303): A stays, and B's gradient G becomes G (A A^T)^-1 / s^2, whose
  change of the weight is the nearest to full fine-tuning's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.adapters.base import AdapterWeights, master
from engine.adapters.lowrank import LowRankConv2d, LowRankLinear
from engine.errors import ConfigError
from engine.layers import AdapterLayer
from engine.model import PeftModel
from engine.train.job import TrainingSpec

EMBEDDING_RATE = 1e-6  # PEFT's, for LoRA+ at embeddings


def check_optimizer(training: TrainingSpec, device: str, spread: bool = False) -> None:
    """Refuse an optimizer that this kind of device cannot run, and activation offload where it has no use.

    Args:
        training: the run's. device: `cpu`, `cuda`, ... spread: what is trained lies in parts on several processes.

    Raises:
        ConfigError: what cannot run, and what to take instead.
    """
    name = training.optimizer
    if name.startswith("paged_") and device != "cuda":
        instead = "adamw_8bit" if name.endswith("8bit") else "adamw"
        raise ConfigError(
            f"training.optimizer is {name!r}, which moves its state between an NVIDIA card and the machine's memory; "
            f"this run is on {device!r}.",
            f"Use {instead}, which keeps the same numbers, or adafactor, which keeps the fewest.",
        )
    if name == "adamw_8bit" and device not in ("cpu", "cuda", "xpu"):
        raise ConfigError(
            f"training.optimizer is {name!r}, which bitsandbytes has not for {device!r}.", "Use adafactor, or adamw."
        )
    if spread and name != "adamw":
        raise ConfigError(
            f"training.optimizer is {name!r}, which cannot work on weights that fsdp has spread over processes.",
            "Use adamw, whose state is spread too, or ddp.",
        )
    if training.activation_offload and device == "cpu":
        raise ConfigError(
            "training.activation_offload moves activations from an accelerator to the machine's memory; "
            "this run is on 'cpu', where they are already.",
            "Use gradient_checkpointing, which needs less memory on a CPU too.",
        )


def make_optimizer(parameters: Mapping[str, nn.Parameter], training: TrainingSpec) -> torch.optim.Optimizer:
    """The job's optimizer over the adapter's parameters, in their order.

    AdamW is Loshchilov and Hutter's (https://arxiv.org/abs/1711.05101), with betas 0.9 and 0.999.

    With `loraplus_ratio` the groups of LoRA+. Every group holds `rate`: its learning rate's ratio to the run's.
    """
    ratio = training.loraplus_ratio
    groups: list[dict[str, Any]] = [{"params": list(parameters.values()), "weight_decay": training.weight_decay}]
    if ratio is not None:
        embedding = training.loraplus_embedding_rate
        groups = loraplus_groups(parameters, training.learning_rate, ratio, embedding, training.weight_decay)
    for group in groups:
        group["rate"] = group.get("lr", training.learning_rate) / training.learning_rate
    return _of_name(training.optimizer, groups, training.learning_rate)


def _of_name(name: str, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    made: Any
    if name == "adamw":
        # One pass over a parameter's numbers; parts of one, and shapes without numbers, have no such kernel.
        whole = all(type(p) is nn.Parameter and p.device.type in ("cpu", "cuda") for g in groups for p in g["params"])
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=whole)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        made = Adafactor(groups, lr=lr, scale_parameter=False, relative_step=False)
    else:
        from bitsandbytes.optim.adamw import AdamW

        bits, paged = 8 if name.endswith("8bit") else 32, name.startswith("paged_")
        made = AdamW(groups, lr=lr, betas=(0.9, 0.999), weight_decay=0.0, optim_bits=bits, is_paged=paged)
    found: torch.optim.Optimizer = made
    return found


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set a step's learning rate, each group's ratio to it kept."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate", 1.0)


def loraplus_groups(
    parameters: Mapping[str, nn.Parameter], lr: float, ratio: float, embedding_lr: float | None, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups of LoRA+, as PEFT forms them.

    A and whatever else is a matrix learn at lr, an embedding's A and B at `embedding_lr` (None: 1e-6), every B and all
    vectors (biases, DoRA's magnitudes) at ratio lr; biases do not decay.

    Raises:
        ConfigError: there is no B, so that the ratio would have nothing to act on.
    """
    parts: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "plain": []}
    found = False
    for name, parameter in parameters.items():
        found = found or "lora_B" in name or "lora_embedding_B" in name
        if "lora_embedding_" in name:
            parts["embedding"].append(parameter)
        elif "lora_B" in name or parameter.ndim == 1:
            parts["plain" if {"bias", "biases"} & set(name.split(".")[-2:]) else "B"].append(parameter)
        else:
            parts["A"].append(parameter)
    if not found:
        raise ConfigError(
            "LoRA+ sets the learning rate of LoRA's matrix B, which this adapter does not train.",
            "Leave out loraplus_ratio, or use LoRA, DoRA, QA-LoRA or LoRA-FA.",
        )
    rates = {"A": lr, "embedding": EMBEDDING_RATE if embedding_lr is None else embedding_lr}
    return [
        {
            "params": members,
            "lr": rates.get(part, lr * ratio),
            "weight_decay": 0.0 if part == "plain" else weight_decay,
        }
        for part, members in parts.items()
        if members
    ]


def create_loraplus_optimizer(
    model: PeftModel,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = EMBEDDING_RATE,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """An optimizer of any class with LoRA+'s groups over the model's trainable parameters.

    Args:
        model: the model with its adapters.
        optimizer_cls: such as `torch.optim.AdamW`.
        lr: A's learning rate. loraplus_lr_ratio: B's, as a multiple of it; the paper recommends 16.
        loraplus_weight_decay: of all groups but the biases'.
        loraplus_lr_embedding: the learning rate of LoRA at embeddings.
        kwargs: for `optimizer_cls`.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = loraplus_groups(parameters, lr, loraplus_lr_ratio, loraplus_lr_embedding, loraplus_weight_decay)
    return optimizer_cls(groups, **{"lr": lr, **kwargs})


class LoRAFAOptimizer(torch.optim.AdamW):
    """AdamW over B with projected gradients: G (A A^T)^-1 / s^2, computed in float32.

    Args:
        pairs: each trained B -> its frozen A and scale s.
        others: further parameters, trained as they are.
        settings: AdamW's.
    """

    def __init__(
        self, pairs: Mapping[nn.Parameter, tuple[nn.Parameter, float]], others: list[nn.Parameter], **settings: Any
    ) -> None:
        self._pairs = dict(pairs)
        super().__init__([*pairs, *others], **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        kept: list[tuple[nn.Parameter, Tensor]] = []
        for b, (a, scale) in self._pairs.items():
            if b.grad is not None:
                kept.append((b, b.grad))
                b.grad = _projected(b.grad, a, scale)
        super().step()
        for b, gradient in kept:
            b.grad = gradient
        return loss


def _projected(gradient: Tensor, a: Tensor, scale: float) -> Tensor:
    rows = master(a.flatten(1))
    # The pseudo-inverse: rows of A may depend on each other where r is large.
    inverse = torch.linalg.pinv(rows @ rows.T, hermitian=True)
    projected: Tensor = gradient.flatten(1).to(rows.dtype) @ inverse / scale**2
    return projected.view(gradient.shape).to(gradient.dtype)


def create_lorafa_optimizer(
    model: PeftModel, r: int, lora_alpha: float, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> LoRAFAOptimizer:
    """Freeze A in the active LoRA adapters and make the optimizer with B's projected gradients.

    Args:
        model: the model with its adapters, LoRA or LoRA-FA.
        r, lora_alpha, use_rslora: part of PEFT's call; not used, for each layer knows its own scale.
        lr, weight_decay: AdamW's.

    Raises:
        ConfigError: an adapter without A and B, or at an embedding, whose A starts at zero and cannot stay there.
    """
    pairs: dict[nn.Parameter, tuple[nn.Parameter, float]] = {}
    for name in model.active_adapters:
        for layer in model._layers[name]:
            if not isinstance(layer, AdapterLayer) or name not in layer.adapters:
                continue
            weights = layer.adapters[name]
            assert isinstance(weights, AdapterWeights)
            if not isinstance(weights, LowRankLinear | LowRankConv2d) or weights.offset_A is not None:
                raise ConfigError(
                    f"LoRA-FA trains B over a random A that stays; {name!r} has none such at {layer.module_name}.",
                    "Use LoRA at linear layers or convolutions, with init_lora_weights True or 'gaussian'.",
                )
            a: Any = weights.lora_A.weight.requires_grad_(False)
            b: Any = weights.lora_B.weight
            pairs[b] = (a, weights.scale)
    others = [p for p in model.parameters() if p.requires_grad and p not in pairs]
    return LoRAFAOptimizer(pairs, others, lr=lr, weight_decay=weight_decay, eps=1e-6)


def rate_at(step: int, total: int, training: TrainingSpec) -> float:
    """The learning rate of optimizer step `step` (from 0) of `total`: no state, so a resumed run needs none restored.

    It rises linearly over the first w = ceil(warmup_ratio * total) steps, by peak / w each, then with
    p = (step - w) / (total - w): linear (1 - p), cosine (1 + cos(pi p)) / 2, or constant.
    """
    warmup = math.ceil(training.warmup_ratio * total)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    p = (step - warmup) / max(1, total - warmup)
    if training.schedule == "linear":
        return training.learning_rate * max(0.0, 1 - p)
    if training.schedule == "cosine":
        return training.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, p)))
    return training.learning_rate
