"""What LoRA and its relatives share: the settings, and a change s B A of the weight at each kind of layer.

    A: (r, in), B: (out, r),   s = alpha / r, or alpha / sqrt(r) for rsLoRA (https://arxiv.org/abs/2312.03732)

PiSSA (https://arxiv.org/abs/2404.02948) starts A and B from the r largest singular values of W and trains
W_res = W - s B0 A0 plus s B A; here W stays untouched and the layer computes W x + s (B A - B0 A0) x, which is the
same function with the same gradients, so that switching the adapter off gives the base bit for bit and any number of
adapters share one base. OLoRA is served the same way; the starts are in `engine.adapters.starts`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 (the field's usual name)
from torch import Tensor, nn

from engine.adapters.base import (
    CONV1D,
    AdapterConfig,
    AdapterWeights,
    PeftType,
    by_pattern,
    compute_cast,
    features,
    fills_from_file,
    layer_kind,
    master,
    target_faults,
)
from engine.adapters.starts import NAMES, check_start, is_start, start_of, takes_from_base
from engine.errors import TargetError
from engine.kernels import linear
from engine.kernels.dropout import Dropout

# The methods that a LoRA config asks for by a field `use_<name>`, under their names in the registry.
VARIANTS = ("dora", "qalora", "lorafa")


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(AdapterConfig):
    """The settings of LoRA and DoRA, by PEFT's names.

    Attributes:
        r: rank; the adapter has r (in + out) parameters per linear layer.
        lora_alpha: the change is scaled by lora_alpha / r.
        lora_dropout: share of the adapter's input that training drops.
        target_modules: names or name endings, one regular expression for whole names, `"all-linear"`, or None for
            the architecture's usual attention projections.
        exclude_modules: names, endings or one regular expression to leave out.
        layers_to_transform: only these layer numbers. layers_pattern: the list's name before the number.
        rank_pattern, alpha_pattern: name ending or regular expression -> r or lora_alpha for those modules.
        bias: `none`; `lora_only` also trains the adapted layers' biases; `all` trains every bias of the model.
        lora_bias: gives B a bias of its own.
        use_rslora: scale by lora_alpha / sqrt(r).
        modules_to_save: further modules that are trained in full and saved with the adapter.
        init_lora_weights: True (A Kaiming-uniform, B zero), `"gaussian"` (A ~ N(0, 1/r^2), B zero), `"pissa"`,
            `"pissa_niter_N"` (randomised SVD with N iterations), `"olora"`, `"orthogonal"` (B A = 0 with neither zero),
            or False (A and B random: not the identity).
        use_dora: True trains DoRA: the rows' magnitudes apart from their directions (engine.adapters.dora).
        use_qalora: True is PEFT's form of QA-LoRA over groups of `qalora_group_size` inputs (engine.adapters.qalora).
        use_lorafa: True trains B alone (engine.adapters.lorafa). No field of PEFT's: written only where it is True.
        fan_in_fan_out: kept for PEFT's format; the engine reads it off the layer.
    """

    PEFT_TYPE: ClassVar[PeftType] = PeftType.LORA
    UNUSED: ClassVar[Mapping[str, Any]] = {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "auto_mapping": None,
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "kasa_config": None,
        "layer_replication": None,
        "loftq_config": {},
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "monteclora_config": None,
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "velora_config": None,
    }

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    lora_bias: bool = False
    use_dora: bool = False
    use_qalora: bool = False
    qalora_group_size: int = 16
    use_lorafa: bool = False

    @property
    def method(self) -> str:
        asked = [name for name in VARIANTS if getattr(self, f"use_{name}")]
        return asked[0] if asked else "lora"

    def faults(self) -> list[str]:
        found = []
        for label, value in (("r", self.r), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                found.append(f"{label} is {value!r}; needed: a whole number from 1")
        named = {f"alpha_pattern[{key!r}]": value for key, value in self.alpha_pattern.items()}
        for label, alpha in {"lora_alpha": self.lora_alpha, **named}.items():
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
                found.append(f"{label} is {alpha!r}; needed: a finite number above 0")
        if not isinstance(self.lora_dropout, int | float) or not 0 <= self.lora_dropout < 1:
            found.append(f"lora_dropout is {self.lora_dropout!r}; needed: 0 up to, but not including, 1")
        if self.bias not in ("none", "all", "lora_only"):
            found.append(f"bias is {self.bias!r}; needed: none, all or lora_only")
        init = self.init_lora_weights
        if not isinstance(init, bool) and init != "gaussian" and not is_start(init):
            found.append(f"init_lora_weights is {init!r}; needed: True, False, 'gaussian', {NAMES}")
        asked = [f"use_{name}" for name in VARIANTS if getattr(self, f"use_{name}")]
        if len(asked) > 1:
            found.append(f"{' and '.join(asked)} are True; needed: one of them, they are different methods")
        if self.use_qalora:
            if self.qalora_group_size < 1:
                found.append(f"qalora_group_size is {self.qalora_group_size}; needed: a whole number from 1")
            if is_start(init):
                found.append(f"init_lora_weights is {init!r} with use_qalora; needed: True, False or 'gaussian'")
        for name in ("dora", "qalora"):
            if getattr(self, f"use_{name}") and self.lora_bias:
                found.append(f"lora_bias is True with use_{name}; needed: False, for it has no bias of its own")
        return found + target_faults(self)

    def to_dict(self) -> dict[str, Any]:
        plain = super().to_dict()
        if not self.use_lorafa:
            # PEFT warns of fields that it does not know.
            del plain["use_lorafa"]
        return plain

    def exported(self) -> LowRankConfig:
        """PiSSA and OLoRA leave as a plain LoRA of rank 2r, [A; A0] and [B, -B0], with the same scale."""
        if not takes_from_base(self.init_lora_weights):
            return self
        grow = math.sqrt(2) if self.use_rslora else 2
        return dataclasses.replace(
            self,
            r=2 * self.r,
            lora_alpha=self.lora_alpha * grow,
            rank_pattern={key: 2 * value for key, value in self.rank_pattern.items()},
            alpha_pattern={key: value * grow for key, value in self.alpha_pattern.items()},
            init_lora_weights=True,
        )

    def rank_of(self, module: str) -> int:
        """The rank at `module`: the first rank_pattern that matches, else `r`."""
        return int(by_pattern(self.rank_pattern, module, self.r))

    def alpha_of(self, module: str) -> float:
        return float(by_pattern(self.alpha_pattern, module, self.lora_alpha))

    def scale(self, module: str) -> float:
        """s = alpha / r, or alpha / sqrt(r) for rsLoRA."""
        r = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(r) if self.use_rslora else r)


class LowRankWeights(AdapterWeights):
    """The part that the layer kinds share: rank, scale, dropout, initial values and PiSSA's frozen offset."""

    offset_A: Tensor | None
    offset_B: Tensor | None

    def __init__(self, config: LowRankConfig, module: str) -> None:
        super().__init__()
        self.r = config.rank_of(module)
        self.scale = config.scale(module)
        self.dropout = Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.register_buffer("offset_A", None)
        self.register_buffer("offset_B", None)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A as (r, in) and B as (out, r), float32, PiSSA's offset appended: s B A is the change of the weight.

        A convolution's weight counts as the matrix (out, in * height * width).
        """
        a, b = master(self._a()), master(self._b())
        if self.offset_A is not None and self.offset_B is not None:
            a, b = torch.cat([a, master(self.offset_A)]), torch.cat([b, -master(self.offset_B)], dim=1)
        return a, b

    def delta(self, x: Tensor, y: Tensor, base: nn.Module, weight: float) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not say what it adds to a layer's output")

    def _a(self) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no matrix A")

    def _b(self) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no matrix B")


class LowRankLinear(LowRankWeights):
    """LoRA at nn.Linear, W: (out, in), or at GPT-2's Conv1D, W: (in, out)."""

    def __init__(self, base: nn.Module, config: LowRankConfig, module: str) -> None:
        super().__init__(config, module)
        weight = base.weight
        assert isinstance(weight, Tensor)
        self.transposed = layer_kind(base) == CONV1D
        n_in, n_out = self.sides(base, config, module)
        place: dict[str, Any] = {"device": weight.device, "dtype": torch.float32}
        if fills_from_file() and not is_start(config.init_lora_weights):
            self.lora_A = _undrawn(n_in, self.r, False, place)
            self.lora_B = _undrawn(self.r, n_out, config.lora_bias, place)
            return
        self.lora_A = nn.Linear(n_in, self.r, bias=False, **place)
        self.lora_B = nn.Linear(self.r, n_out, bias=config.lora_bias, **place)
        self._initialise(config.init_lora_weights, weight, module)

    def sides(self, base: nn.Module, config: LowRankConfig, module: str) -> tuple[int, int]:
        """(what A reads, what B writes)."""
        return features(base)

    def _initialise(self, how: bool | str, weight: Tensor, module: str) -> None:
        a, b = self.lora_A.weight, self.lora_B.weight
        if a.is_meta:
            if isinstance(how, str) and is_start(how):
                check_start(how, weight, self.r, module)
            return
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if how == "gaussian":
            nn.init.normal_(a, std=1 / self.r)
        if how is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        else:
            nn.init.zeros_(b)
            if self.lora_B.bias is not None:
                nn.init.zeros_(self.lora_B.bias)
        if isinstance(how, str) and is_start(how):
            self._start(how, weight.T if self.transposed else weight, module)

    @torch.no_grad()
    def _start(self, how: str, weight: Tensor, module: str) -> None:
        shape = self.lora_B.weight.shape[0], self.lora_A.weight.shape[1]
        a, b = start_of(how, weight, shape, self.r, self.scale, module)
        self.lora_A.weight.copy_(a)
        self.lora_B.weight.copy_(b)
        if takes_from_base(how):
            self.offset_A = self.lora_A.weight.detach().clone()
            self.offset_B = self.lora_B.weight.detach().clone()

    def _a(self) -> Tensor:
        return self.lora_A.weight

    def _b(self) -> Tensor:
        return self.lora_B.weight

    def delta(self, x: Tensor, y: Tensor, base: nn.Module, weight: float) -> Tensor:
        factor = self.scale * weight
        h = F.linear(self.dropout(x), compute_cast(self.lora_A.weight, x))
        out = F.linear(h * factor, compute_cast(self.lora_B.weight, x))
        if self.lora_B.bias is not None:
            out = out + self.lora_B.bias.to(out.dtype) * factor
        if self.offset_A is not None and self.offset_B is not None:
            h0 = F.linear(x, compute_cast(self.offset_A, x))
            out = out - F.linear(h0 * factor, compute_cast(self.offset_B, x))
        return out

    def parts(self, x: Tensor, base: nn.Module, weight: float) -> linear.Parts | None:
        # A subclass with another formula is not this node.
        if type(self).delta is not LowRankLinear.delta or not linear.fits(base, x):
            return None
        return self._parts(base, weight)

    def _parts(
        self, base: nn.Module, weight: float, m: Tensor | None = None, norm: Tensor | None = None
    ) -> linear.Parts:
        offset = None
        if self.offset_A is not None and self.offset_B is not None:
            offset = (self.offset_A, self.offset_B)
        drop = self.dropout.p if isinstance(self.dropout, nn.Dropout) and self.dropout.training else 0.0
        product = linear.Product(base, self.scale * weight, drop, offset, norm)
        return linear.Parts(self.lora_A.weight, self.lora_B.weight, self.lora_B.bias, m, product)

    def factors(self, base: nn.Module) -> tuple[Tensor, Tensor] | None:
        if type(self).delta is not LowRankLinear.delta or self.lora_B.bias is not None:
            return None
        a, b = self.matrices()
        return (a.T, b.T * self.scale) if self.transposed else (b * self.scale, a)

    def delta_weight(self, base: nn.Module) -> Tensor:
        a, b = self.matrices()
        change = (b @ a) * self.scale
        return change.T if self.transposed else change

    def delta_bias(self, base: nn.Module) -> Tensor | None:
        return None if self.lora_B.bias is None else self.lora_B.bias.float() * self.scale

    def export(self) -> dict[str, Tensor]:
        a, b = self.matrices()
        tensors = {"lora_A.weight": a, "lora_B.weight": b}
        if self.lora_B.bias is not None:
            tensors["lora_B.bias"] = self.lora_B.bias
        return tensors


def _undrawn(n_in: int, n_out: int, bias: bool, place: Mapping[str, Any]) -> nn.Linear:
    """A linear layer of zeros: drawing one only for a file to replace it is most of what loading would cost."""
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.__dict__.update(in_features=n_in, out_features=n_out)
    linear._parameters["weight"] = nn.Parameter(torch.zeros(n_out, n_in, **place))
    linear._parameters["bias"] = nn.Parameter(torch.zeros(n_out, **place)) if bias else None
    return linear


class LowRankEmbedding(LowRankWeights):
    """LoRA at nn.Embedding, E: (V, d): E'[i] = E[i] + s (B A[:, i]), A: (r, V) zero, B: (d, r) ~ N(0, 1)."""

    def __init__(self, base: nn.Embedding, config: LowRankConfig, module: str) -> None:
        super().__init__(config, module)
        _plain_start_only(config, module, "an embedding")
        device = base.weight.device
        self.lora_embedding_A = nn.Parameter(torch.zeros(self.r, base.num_embeddings, device=device))
        self.lora_embedding_B = nn.Parameter(torch.randn(base.embedding_dim, self.r, device=device))
        if config.init_lora_weights is False and not self.lora_embedding_A.is_meta:
            nn.init.normal_(self.lora_embedding_A)

    def _a(self) -> Tensor:
        return self.lora_embedding_A

    def _b(self) -> Tensor:
        return self.lora_embedding_B

    def delta(self, x: Tensor, y: Tensor, base: nn.Module, weight: float) -> Tensor:
        # The padding row of the base gets no gradient and neither does ours.
        h = F.embedding(x, self.lora_embedding_A.T, padding_idx=base.padding_idx)  # type: ignore[arg-type]
        b = self.lora_embedding_B
        out = F.linear(h.to(y.dtype) * (self.scale * weight), b.to(y.dtype))
        # Gemma's embeddings scale their output; the change has to be scaled the same way.
        scale = getattr(base, "embed_scale", None)
        return out if scale is None else out * torch.as_tensor(scale, dtype=out.dtype, device=out.device)

    def delta_weight(self, base: nn.Module) -> Tensor:
        a, b = self.matrices()
        return (b @ a).T * self.scale

    def export(self) -> dict[str, Tensor]:
        return {"lora_embedding_A": self.lora_embedding_A, "lora_embedding_B": self.lora_embedding_B}


class LowRankConv2d(LowRankWeights):
    """LoRA at nn.Conv2d: A is a convolution of the base's kernel, stride, padding and dilation to r channels, B 1x1."""

    def __init__(self, base: nn.Conv2d, config: LowRankConfig, module: str) -> None:
        super().__init__(config, module)
        _plain_start_only(config, module, "a convolution")
        if base.groups != 1:
            raise TargetError(
                f"{type(config).__name__} cannot serve the grouped convolution {module} (groups={base.groups}).",
                "Leave it out with exclude_modules.",
            )
        place: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        shape: dict[str, Any] = {
            "kernel_size": base.kernel_size,
            "stride": base.stride,
            "padding": base.padding,
            "dilation": base.dilation,
            "padding_mode": base.padding_mode,
        }
        self.lora_A = nn.Conv2d(base.in_channels, self.r, bias=False, **shape, **place)
        self.lora_B = nn.Conv2d(self.r, base.out_channels, 1, bias=config.lora_bias, **place)
        if self.lora_A.weight.is_meta:
            return
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A.weight, std=1 / self.r)
        if config.init_lora_weights is not False:
            nn.init.zeros_(self.lora_B.weight)
            if self.lora_B.bias is not None:
                nn.init.zeros_(self.lora_B.bias)

    def _a(self) -> Tensor:
        return self.lora_A.weight.flatten(1)

    def _b(self) -> Tensor:
        return self.lora_B.weight.flatten(1)

    def delta(self, x: Tensor, y: Tensor, base: nn.Module, weight: float) -> Tensor:
        a, x = self.lora_A, self.dropout(x)
        if a.padding_mode != "zeros":
            x = F.pad(x, a._reversed_padding_repeated_twice, mode=a.padding_mode)
        padding = a.padding if a.padding_mode == "zeros" else 0
        h = F.conv2d(x, compute_cast(a.weight, x), None, a.stride, padding, a.dilation)
        factor = self.scale * weight
        out = F.conv2d(h * factor, compute_cast(self.lora_B.weight, x))
        if self.lora_B.bias is not None:
            out = out + (self.lora_B.bias * factor).to(out.dtype)[None, :, None, None]
        return out

    def delta_weight(self, base: nn.Module) -> Tensor:
        a, b = self.matrices()
        return (b @ a).view(-1, *self.lora_A.weight.shape[1:]) * self.scale

    def delta_bias(self, base: nn.Module) -> Tensor | None:
        return None if self.lora_B.bias is None else self.lora_B.bias.float() * self.scale


def _plain_start_only(config: LowRankConfig, module: str, what: str) -> None:
    if is_start(config.init_lora_weights):
        raise TargetError(
            f"init_lora_weights={config.init_lora_weights!r} starts from a linear layer's matrix (its singular "
            f"values, its shape), and {module} is {what}.",
            "Leave it out with exclude_modules, or set init_lora_weights=True.",
        )
