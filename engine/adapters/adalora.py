"""AdaLoRA: adaptive budget allocation (Zhang et al., 2023, https://arxiv.org/abs/2303.10512).

    y = W x + s B (A * E) drop(x),   A: (r, in), E: (r, 1), B: (out, r),   s = alpha / (init_r + 1e-5)

A singular value decomposition in form: training adds `orth_reg_weight` times the mean over all A and B of
||A A^T - I||_F and ||B^T B - I||_F, which keeps them near orthogonal. A, B ~ N(0, 0.02^2), E = 0.

After each optimizer step t, every entry p has the sensitivity I = |p dL/dp|, smoothed to I' = b1 I' + (1 - b1) I, with
the uncertainty U = b2 U + (1 - b2) |I - I'|. A triplet (row of A, value of E, column of B) scores I' U of its value
plus the means of its row and of its column; the best b(t) triplets of all layers together are kept and the E of the
others is set to zero, every deltaT steps:

    b(t) = init_r n                                                           t <= tinit (n layers; nothing is cut)
           target_r n + (init_r - target_r) n (1 - (t - tinit) / (T - tfinal - tinit))^3     up to t = T - tfinal
           target_r n                                                         after that, with the choice fixed

What is cut at T - tfinal stays cut; before it, a value may grow again until the next cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 (the field's usual name)
from torch import Tensor, nn

from engine.adapters.base import (
    CONV1D,
    CONV2D,
    LINEAR,
    AdapterConfig,
    AdapterSpec,
    AdapterWeights,
    Attached,
    PeftType,
    applied,
    compute_cast,
    features,
    layer_kind,
    master,
    target_faults,
)
from engine.adapters.lowrank import LowRankConfig
from engine.errors import ConfigError, TargetError
from engine.inject import DEFAULT_RULES
from engine.kernels.dropout import Dropout


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(AdapterConfig):
    """AdaLoRA's settings, by PEFT's names.

    Attributes:
        target_r: the mean rank per layer at the end.
        init_r: each layer's rank at the start.
        tinit: steps before ranks are cut. tfinal: steps after the last cut. deltaT: steps between two cuts.
        beta1, beta2: how slowly sensitivity and uncertainty follow, between 0 and 1.
        orth_reg_weight: weight of the orthogonal term; 0 leaves it out.
        total_step: optimizer steps of the whole training; the engine's loop supplies it where it is None.
        rank_pattern: `<module>.lora_E` -> which of the init_r triplets are left, in a file.
        lora_alpha: the change is scaled by lora_alpha / init_r.
        lora_dropout: share of the adapter's input that training drops.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save, bias: as in `LoraConfig`.
        init_lora_weights: True starts as the identity; False with a random change.
        r, fan_in_fan_out: kept for PEFT's format, without effect.
    """

    PEFT_TYPE: ClassVar[PeftType] = PeftType.ADALORA
    UNUSED: ClassVar[Mapping[str, Any]] = {
        **LowRankConfig.UNUSED,
        "alpha_pattern": {},
        "lora_bias": False,
        "use_dora": False,
        "use_rslora": False,
        "use_qalora": False,
        "qalora_group_size": 16,
    }
    TARGET_RULES: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        ("q", "k", "v", "o", "wi", "wo"),
        ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
        *DEFAULT_RULES,
    )

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    init_lora_weights: bool = True
    r: int = 8
    fan_in_fan_out: bool = False

    def faults(self) -> list[str]:
        found = []
        for label, low in (("target_r", 1), ("init_r", 1), ("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
            value = getattr(self, label)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                found.append(f"{label} is {value!r}; needed: a whole number from {low}")
        for label in ("beta1", "beta2"):
            if not _number(getattr(self, label)) or not 0 < getattr(self, label) < 1:
                found.append(f"{label} is {getattr(self, label)!r}; needed: between 0 and 1")
        if not _number(self.orth_reg_weight) or not self.orth_reg_weight >= 0:
            found.append(f"orth_reg_weight is {self.orth_reg_weight!r}; needed: 0 or more")
        if not _number(self.lora_alpha) or not self.lora_alpha > 0:
            found.append(f"lora_alpha is {self.lora_alpha!r}; needed: a number above 0")
        if not _number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            found.append(f"lora_dropout is {self.lora_dropout!r}; needed: 0 up to, but not including, 1")
        if self.bias not in ("none", "all", "lora_only"):
            found.append(f"bias is {self.bias!r}; needed: none, all or lora_only")
        if not isinstance(self.init_lora_weights, bool):
            found.append(f"init_lora_weights is {self.init_lora_weights!r}; needed: True or False")
        found += self._pattern_faults() + target_faults(self)
        return found or self.schedule_faults()

    def _pattern_faults(self) -> list[str]:
        """Keys become `<module>.lora_E`, the form of PEFT's present files."""
        if self.rank_pattern is None:
            return []
        clean: dict[str, list[bool]] = {}
        for key, kept in self.rank_pattern.items():
            module = key.removeprefix("base_model.model.").rpartition(".lora_E")[0]
            if not module or not isinstance(kept, list) or not all(isinstance(one, bool) for one in kept):
                return [
                    f"rank_pattern has {key!r}: {str(kept)[:40]}; needed: '<module>.lora_E' with true or false each"
                ]
            clean[f"{module}.lora_E"] = kept
        object.__setattr__(self, "rank_pattern", clean)
        return []

    def schedule_faults(self) -> list[str]:
        """What would keep training from reaching the budget."""
        found = []
        if self.target_r > self.init_r and not self.inference_mode:
            found.append(f"target_r is {self.target_r} with init_r {self.init_r}; needed: at most init_r")
        if self.total_step is not None and not self.tinit + self.tfinal < self.total_step:
            found.append(
                f"total_step is {self.total_step} with tinit {self.tinit} and tfinal {self.tfinal}, which leaves no "
                "step to cut ranks in; needed: tinit + tfinal below total_step"
            )
        return found

    def check_steps(self, total: int) -> None:
        if self.total_step is None:
            if not self.tinit + self.tfinal < total:
                raise ConfigError(
                    f"AdaLoRA's tinit is {self.tinit} and its tfinal {self.tfinal}, and the training has {total} "
                    "steps, which leaves no step to cut ranks in; needed: tinit + tfinal below the steps.",
                    "Train longer (more steps or epochs, smaller batches), or lower tinit and tfinal.",
                )
        elif self.total_step - self.tfinal > total:
            raise ConfigError(
                f"AdaLoRA's total_step is {self.total_step} with tfinal {self.tfinal}, so the last ranks are cut at "
                f"step {self.total_step - self.tfinal}; the training ends at step {total}.",
                "Leave total_step out: the loop knows it.",
            )

    def pattern_of(self, module: str) -> list[bool] | None:
        return (self.rank_pattern or {}).get(f"{module}.lora_E")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class AdaLoraWeights(AdapterWeights):
    """The triplets at nn.Linear, GPT-2's Conv1D or nn.Conv2d, whose weight counts as (out, in * height * width).

    `kept` says which triplets the last allocation left. The averages of the importance are buffers, made when training
    begins, so that a checkpoint has them.
    """

    kept: Tensor

    def __init__(self, base: nn.Module, config: AdaLoraConfig, module: str) -> None:
        super().__init__()
        weight = base.weight
        assert isinstance(weight, Tensor)
        self.kind = layer_kind(base)
        self.shape = tuple(weight.shape[1:]) if isinstance(base, nn.Conv2d) else None
        pattern = config.pattern_of(module)
        self.r = config.init_r if pattern is None else sum(pattern)
        self.scale = config.lora_alpha / (config.init_r + 1e-5)
        self.dropout = Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        if isinstance(base, nn.Conv2d):
            if base.groups != 1:
                raise TargetError(
                    f"AdaLoraConfig cannot serve the grouped convolution {module} (groups={base.groups}).",
                    "Leave it out with exclude_modules.",
                )
            n_in, n_out = weight[0].numel(), base.out_channels
        else:
            n_in, n_out = features(base)
        place: dict[str, Any] = {"device": weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(self.r, n_in, **place))
        self.lora_E = nn.Parameter(torch.zeros(self.r, 1, **place))
        self.lora_B = nn.Parameter(torch.empty(n_out, self.r, **place))
        self.register_buffer("kept", torch.ones(self.r, dtype=torch.bool, device=weight.device))
        if not self.r:
            return
        spread = 0.02 if config.init_lora_weights else 1.0
        nn.init.normal_(self.lora_A, std=spread)
        nn.init.normal_(self.lora_B, std=spread)
        if not config.init_lora_weights:
            nn.init.normal_(self.lora_E)

    def delta(self, x: Tensor, y: Tensor, base: nn.Module, weight: float) -> Tensor | None:
        if not self.r:
            return None
        x, factor = self.dropout(x), self.scale * weight
        a, b = compute_cast(self.lora_A * self.lora_E, x), compute_cast(self.lora_B, x)
        if isinstance(base, nn.Conv2d):
            h = applied(a.view(self.r, *base.weight.shape[1:]), x, base)
            return F.conv2d(h * factor, b[:, :, None, None])
        return F.linear(F.linear(x, a) * factor, b)

    def delta_weight(self, base: nn.Module) -> Tensor:
        change = master(self.lora_B) @ (master(self.lora_A) * master(self.lora_E)) * self.scale
        if isinstance(base, nn.Conv2d):
            return change.view_as(base.weight)
        return change.T if self.kind == CONV1D else change

    def export(self) -> dict[str, Tensor]:
        if self.kept.is_meta:
            return dict(self.named_parameters())
        return {
            "lora_A": self.lora_A[self.kept],
            "lora_B": self.lora_B[:, self.kept],
            "lora_E": self.lora_E[self.kept],
        }

    # --- importance -------------------------------------------------------------------------------------------

    def track(self) -> None:
        """Makes room for the averages."""
        for name, parameter in self.named_parameters():
            for what in ("sensitivity", "uncertainty"):
                if f"{what}_{name}" not in self._buffers:
                    self.register_buffer(f"{what}_{name}", torch.zeros_like(parameter, requires_grad=False))

    @torch.no_grad()
    def weigh(self, beta1: float, beta2: float) -> None:
        """Take the present gradients into the averages; a parameter without one counts as having none to lose."""
        for name, parameter in self.named_parameters():
            smooth, unsure = self.get_buffer(f"sensitivity_{name}"), self.get_buffer(f"uncertainty_{name}")
            now = torch.zeros_like(parameter) if parameter.grad is None else (parameter * parameter.grad).abs()
            smooth.mul_(beta1).add_(now, alpha=1 - beta1)
            unsure.mul_(beta2).add_((now - smooth).abs(), alpha=1 - beta2)

    def scores(self) -> Tensor:
        """Each triplet's importance, (r,)."""
        a, b, e = (self.get_buffer(f"sensitivity_lora_{n}") * self.get_buffer(f"uncertainty_lora_{n}") for n in "ABE")
        return e[:, 0] + a.mean(1) + b.mean(0)

    @torch.no_grad()
    def cut(self, kept: Tensor | None = None) -> None:
        """Set E to zero where `kept` says so; without it, where the last allocation did."""
        if kept is not None:
            self.kept.copy_(kept)
        self.lora_E.masked_fill_(~self.kept[:, None], 0.0)


def prepare_training(adapter: Attached, total_steps: int | None) -> AdaLoraConfig:
    """The config with its schedule complete; `total_step` of the config comes before the argument."""
    config: AdaLoraConfig = adapter.config
    if total_steps is not None:
        config.check_steps(total_steps)
    ready = config if config.total_step else config.replace(total_step=total_steps)
    assert isinstance(ready, AdaLoraConfig)
    _total(ready)
    for weights in adapter.layers.values():
        weights.track()
    return ready


def _total(config: AdaLoraConfig) -> int:
    if config.total_step is None:
        raise ConfigError(
            "AdaLoRA does not know how many steps the training has: total_step is None.",
            "Set it in AdaLoraConfig, or call engine.prepare_training(model, total_steps=...) before the first step.",
        )
    return config.total_step


def extra_loss(adapter: Attached) -> Tensor | None:
    """orth_reg_weight * mean over all A and B of ||A A^T - I||_F, ||B^T B - I||_F."""
    if not adapter.config.orth_reg_weight:
        return None
    norms = []
    for weights in adapter.layers.values():
        for gram in (weights.lora_A @ weights.lora_A.T, weights.lora_B.T @ weights.lora_B):
            norms.append(torch.linalg.norm(gram - torch.eye(weights.r, dtype=gram.dtype, device=gram.device)))
    mean: Tensor = torch.stack([norm.to(norms[0].device) for norm in norms]).mean()
    return mean * float(adapter.config.orth_reg_weight)


def budget_at(step: int, config: AdaLoraConfig, start: int, layers: int) -> int:
    """How many triplets `layers` layers may have after step `step`, of `start` at first."""
    end, target = _total(config) - config.tfinal, config.target_r * layers
    if step <= config.tinit:
        return start
    if step >= end:
        return min(start, target)
    left = 1 - (step - config.tinit) / (end - config.tinit)
    return min(start, int((start - target) * left**3 + target))


def after_step(adapter: Attached, step: int) -> dict[str, int] | None:
    """Weigh the triplets, and divide the budget anew when it is time to."""
    config: AdaLoraConfig = adapter.config
    end, layers = _total(config) - config.tfinal, list(adapter.layers.values())
    if step > end:
        for weights in layers:
            weights.cut()
        return None
    for weights in layers:
        weights.track()
        # At the last cut the averages stand; a training of one step has no others.
        if step < end or step == 1:
            weights.weigh(config.beta1, config.beta2)
    if step != end and (step <= config.tinit or step % config.deltaT):
        return None
    return allocate(adapter, budget_at(step, config, sum(weights.r for weights in layers), len(layers)))


def allocate(adapter: Attached, budget: int) -> dict[str, int] | None:
    """Keep the `budget` best triplets of all layers; the ranks, if any changed."""
    before = ranks(adapter)
    layers = list(adapter.layers.values())
    scores = [weights.scores() for weights in layers]
    # Exactly the budget, also where scores are equal; a threshold would cut all equal ones.
    together = torch.cat([score.to(scores[0].device) for score in scores])
    kept = torch.zeros_like(together, dtype=torch.bool)
    kept[torch.argsort(together, descending=True, stable=True)[:budget]] = True
    for weights, part in zip(layers, kept.split([weights.r for weights in layers]), strict=True):
        weights.cut(part)
    after = ranks(adapter)
    return after if after != before else None


def ranks(adapter: Attached) -> dict[str, int]:
    """Module name -> how many triplets are left there."""
    return {module: int(weights.kept.sum()) for module, weights in adapter.layers.items()}


def saved_config(adapter: Attached) -> AdaLoraConfig:
    """With the ranks as they are, by PEFT's rule: over the triplets that the adapter began with, in a file before too.

    PEFT opens no file without a total_step; an adapter that was never trained gets the smallest that fits.
    """
    config: AdaLoraConfig = adapter.config
    pattern: dict[str, list[bool]] = {}
    for module, weights in adapter.layers.items():
        if weights.kept.is_meta:
            return config
        left = iter(weights.kept.tolist())
        first = config.pattern_of(module) or [True] * config.init_r
        pattern[f"{module}.lora_E"] = [one and next(left) for one in first]
    whole = config.rank_pattern is None and all(all(kept) for kept in pattern.values())
    ready = config.replace(
        rank_pattern=None if whole else pattern,
        total_step=config.total_step or config.tinit + config.tfinal + 1,
    )
    assert isinstance(ready, AdaLoraConfig)
    return ready


def as_lora(adapter: Attached) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Each layer's triplets that are left as a LoRA of that rank, s A * E and B, with scale 1.

    A layer with none left gets a row and a column of zeros: LoRA knows no rank 0.
    """
    tensors = {}
    for module, weights in adapter.layers.items():
        parts = {name: master(tensor) for name, tensor in weights.export().items()}
        a, b = parts["lora_A"] * parts["lora_E"] * weights.scale, parts["lora_B"]
        if not a.shape[0]:
            a, b = a.new_zeros(1, a.shape[1]), b.new_zeros(b.shape[0], 1)
        if weights.shape is not None:
            a, b = a.view(-1, *weights.shape), b[:, :, None, None]
        tensors[module] = {"lora_A.weight": a, "lora_B.weight": b}
    left = {module: one["lora_A.weight"].shape[0] for module, one in tensors.items()}
    r = max(left.values())
    fewer = {module: rank for module, rank in left.items() if rank != r}
    alphas = {module: float(rank) for module, rank in fewer.items()}
    return {"r": r, "lora_alpha": r, "rank_pattern": fewer, "alpha_pattern": alphas}, tensors


def build(base: nn.Module, config: AdaLoraConfig, module: str) -> AdaLoraWeights:
    """AdaLoRA's triplets for one base layer, on its device, in float32."""
    return AdaLoraWeights(base, config, module)


SPEC = AdapterSpec(
    name="adalora",
    title="AdaLoRA",
    paper="https://arxiv.org/abs/2303.10512",
    config=AdaLoraConfig,
    build=build,
    layers=(LINEAR, CONV1D, CONV2D),
    mergeable=True,
    mixable=True,
    identity_at_start=True,
    prepare_training=prepare_training,
    extra_loss=extra_loss,
    after_step=after_step,
    saved_config=saved_config,
    as_lora=as_lora,
)
