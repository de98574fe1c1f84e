"""DoRA: weight-decomposed low-rank adaptation (Liu et al., 2024, https://arxiv.org/abs/2402.09353).

    V = W + s B A,   n = the norms of V's rows,   W' = (m / n) V,   m: (out), at the start n itself

With g = m / n, y0 = W x + b the base's output and dropout on the low-rank part alone, the layer adds

    (g - 1) (y0 - b) + g s B A drop(x)

to y0. As in the paper's section 4.3, n carries no gradient. At an embedding the rows are the embedding's dimensions, at
a convolution the output channels. In files it is PEFT's LORA with use_dora true.

The norms come from thin products alone, in float32, with the sums of squares of W's rows kept between steps:

    n^2 = rowsum(W * W) + 2 s rowsum((W A^T) * B) + s^2 rowsum((B A A^T) * B)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.adapters.base import CONV1D, CONV2D, EMBEDDING, LINEAR, AdapterSpec, layer_kind
from engine.adapters.lowrank import LowRankConfig, LowRankConv2d, LowRankEmbedding, LowRankLinear, LowRankWeights
from engine.errors import TargetError
from engine.kernels import linear

# Rows of a half-precision weight that are brought to float32 at a time.
_BLOCK = 1024


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(LowRankConfig):
    """DoRA's settings; see `LowRankConfig`. The same as `LoraConfig(use_dora=True)`."""

    use_dora: bool = True

    def faults(self) -> list[str]:
        found = super().faults()
        if self.use_dora is not True:
            found.append(f"use_dora is {self.use_dora!r}; needed: True, or a LoraConfig")
        return found


class Kept:
    """A tensor computed from others, kept while those are the same objects with the same content.

    A tensor's version counts its changes in place; changes through `.data` escape it, hence `forget`.
    """

    def __init__(self) -> None:
        self._marks: list[tuple[Any, int, int]] = []
        self._value: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles of a model start empty: their tensors are others.
        return (Kept, ())

    def forget(self) -> None:
        self._value = None

    def get(self, sources: Sequence[Tensor], make: Callable[[], Tensor]) -> Tensor:
        if torch.compiler.is_compiling() or any(t.is_inference() for t in sources):
            return make()
        same = len(self._marks) == len(sources) and all(
            ref() is t and version == t._version and place == _place(t)
            for (ref, version, place), t in zip(self._marks, sources, strict=True)
        )
        if self._value is None or not same:
            self._value = make()
            self._marks = [(weakref.ref(t), t._version, _place(t)) for t in sources]
        return self._value


def _place(t: Tensor) -> int:
    """Where its numbers lie; shapes without numbers (engine.memory's) lie nowhere."""
    return 0 if type(t).__name__ == "FakeTensor" else t.data_ptr()


def _thin_product(w: Tensor, a: Tensor, training: bool) -> Tensor:
    """W A^T, (out, r), in the type of A.

    In training W in bfloat16 is not widened: A goes as the sum of two matrices in bfloat16, and the result is rounded.
    g - 1 is about -s (W A^T) B / n^2 + dm, so that it errs by no more than its own rounding.
    """
    if training and w.dtype == torch.bfloat16:
        first = a.to(w.dtype)
        both = torch.mm(w, torch.cat([first, (a - first.to(a.dtype)).to(w.dtype)]).T).to(a.dtype)
        return both[:, : a.shape[0]] + both[:, a.shape[0] :]
    blocks = w.split(_BLOCK) if w.dtype != a.dtype else [w]
    return torch.cat([block.to(a.dtype) @ a.T for block in blocks])


class DoRAWeights(LowRankWeights):
    """The magnitudes, over any of the low-rank kinds."""

    reads_base = True
    lora_magnitude_vector: nn.Parameter

    def start(self, base: nn.Module, module: str) -> None:
        """m = n. Called once, when A and B have their first values."""
        weight = base.weight
        assert isinstance(weight, Tensor)
        if not weight.is_floating_point():
            raise TargetError(
                f"DoRA needs the norms of the base weight's rows, and {module} is quantised.",
                "Load the base in full or half precision, or use LoRA.",
            )
        self._squares, self._norms = Kept(), Kept()
        shape = self.shaped(self._rows(weight)[:, 0]).shape
        first = torch.empty(shape, device="meta") if weight.is_meta else self._norm(weight).view(shape)
        self.lora_magnitude_vector = nn.Parameter(first)

    def train(self, mode: bool = True) -> DoRAWeights:
        super().train(mode)
        self._squares.forget()
        self._norms.forget()
        return self

    def _rows(self, weight: Tensor) -> Tensor:
        """The base's weight as the matrix (out, in) that s B A is added to."""
        return weight

    def shaped(self, vector: Tensor) -> Tensor:
        """A vector (out) in the shape in which it multiplies the layer's output."""
        return vector

    def norm(self, base: nn.Module) -> Tensor:
        """n of V = W + s B A: (out), float32, without gradient. Between training steps it is not computed again."""
        weight = base.weight
        assert isinstance(weight, Tensor)
        sources = [weight, *(p for name, p in self.named_parameters() if name != "lora_magnitude_vector")]
        if self.training or (torch.is_grad_enabled() and any(p.requires_grad for p in sources)):
            # Not every optimizer tells a tensor that it was changed, bitsandbytes' do not.
            self._norms.forget()
            return self._norm(weight)
        return self._norms.get(sources, lambda: self._norm(weight))

    def _norm(self, weight: Tensor) -> Tensor:
        # Outside inference mode, so that what is kept may serve a backward pass later.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            w = self._rows(weight)
            wide = torch.promote_types(w.dtype, torch.float32)
            a, b = (matrix.to(wide) for matrix in self.matrices())
            squares = self._squares.get([weight], lambda: torch.linalg.vector_norm(w, dim=1, dtype=wide).square())
            wa = _thin_product(w, a, self.training)
            n2 = squares + (2 * self.scale) * (wa * b).sum(1) + self.scale**2 * ((b @ (a @ a.T)) * b).sum(1)
            # Rounding may leave a little below zero; a row of zeros has gain 0 and stays zero.
            return n2.clamp_min(torch.finfo(n2.dtype).tiny).sqrt()

    def gain(self, base: nn.Module) -> Tensor:
        """g = m / n in the shape that multiplies the output; gradient through m alone."""
        return self.lora_magnitude_vector / self.shaped(self.norm(base))

    def delta(self, x: Tensor, y: Tensor, base: nn.Module, weight: float) -> Tensor:
        change = super().delta(x, y, base, weight)
        gain = self.gain(base)
        bias = getattr(base, "bias", None)
        plain = y if bias is None else y - self.shaped(bias).to(y.dtype)
        # g - 1 before the cast: in bf16 a gain near 1 would lose its difference from 1.
        return ((gain - 1) * weight).to(y.dtype) * plain + gain.to(change.dtype) * change

    def delta_weight(self, base: nn.Module) -> Tensor:
        weight = base.weight
        assert isinstance(weight, Tensor)
        w, (a, b) = self._rows(weight), self.matrices()
        gain = self.gain(base).reshape(-1, 1)
        change = (gain - 1) * w.to(a.dtype) + gain * self.scale * (b @ a)
        return self._rows(change) if w.dim() == weight.dim() else change.view(weight.shape)

    def export(self) -> dict[str, Tensor]:
        return {**super().export(), "lora_magnitude_vector": self.lora_magnitude_vector}


class DoRALinear(DoRAWeights, LowRankLinear):
    """DoRA at nn.Linear, W: (out, in), or at GPT-2's Conv1D, W: (in, out)."""

    def _rows(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed else weight

    def parts(self, x: Tensor, base: nn.Module, weight: float) -> linear.Parts | None:
        # At another weight the gain's part and the product's are scaled apart.
        if weight != 1 or not linear.fits(base, x):
            return None
        return self._parts(base, weight, self.lora_magnitude_vector, self.norm(base))


class DoRAEmbedding(DoRAWeights, LowRankEmbedding):
    """DoRA at nn.Embedding, E: (V, d); one magnitude for each of the d dimensions."""

    def _rows(self, weight: Tensor) -> Tensor:
        return weight.T


class DoRAConv2d(DoRAWeights, LowRankConv2d):
    """DoRA at nn.Conv2d; one magnitude for each output channel, shaped (1, out, 1, 1) as in PEFT's files."""

    def _rows(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def shaped(self, vector: Tensor) -> Tensor:
        return vector.view(1, -1, 1, 1)


_KINDS: dict[str, Any] = {
    LINEAR: DoRALinear,
    CONV1D: DoRALinear,
    EMBEDDING: DoRAEmbedding,
    CONV2D: DoRAConv2d,
}


def build(base: nn.Module, config: LowRankConfig, module: str) -> DoRAWeights:
    """DoRA's weights for one base layer, on its device, in float32."""
    weights: DoRAWeights = _KINDS[str(layer_kind(base))](base, config, module)
    weights.start(base, module)
    return weights


SPEC = AdapterSpec(
    name="dora",
    title="DoRA",
    paper="https://arxiv.org/abs/2402.09353",
    config=DoRAConfig,
    build=build,
    layers=tuple(_KINDS),
    mergeable=True,
    mixable=True,
    identity_at_start=True,
    formats=("PEFT", "kohya", "diffusers"),
)
