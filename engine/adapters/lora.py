"""LoRA: low-rank adaptation (Hu et al., 2021, https://arxiv.org/abs/2106.09685).

    y = W x + s B A drop(x),   A: (r, in), B: (out, r),   s = alpha / r

The two matrices, their starts (PiSSA among them) and rsLoRA's scale are in `engine.adapters.lowrank`, which other
methods build on too. With `use_dora=True` the config asks for DoRA, with `use_qalora=True` for QA-LoRA, as in PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from engine.adapters.base import CONV1D, CONV2D, EMBEDDING, LINEAR, AdapterSpec, layer_kind
from engine.adapters.lowrank import LowRankConfig, LowRankConv2d, LowRankEmbedding, LowRankLinear, LowRankWeights


@dataclass(frozen=True, kw_only=True)
class LoraConfig(LowRankConfig):
    """LoRA's settings; see `LowRankConfig`."""


def build(base: nn.Module, config: LoraConfig, module: str) -> LowRankWeights:
    """LoRA's weights for one base layer, on its device, in float32."""
    kind = layer_kind(base)
    if kind == EMBEDDING:
        assert isinstance(base, nn.Embedding)
        return LowRankEmbedding(base, config, module)
    if kind == CONV2D:
        assert isinstance(base, nn.Conv2d)
        return LowRankConv2d(base, config, module)
    return LowRankLinear(base, config, module)


SPEC = AdapterSpec(
    name="lora",
    title="LoRA",
    paper="https://arxiv.org/abs/2106.09685",
    config=LoraConfig,
    build=build,
    layers=(LINEAR, CONV1D, EMBEDDING, CONV2D),
    mergeable=True,
    mixable=True,
    identity_at_start=True,
    formats=("PEFT", "kohya", "diffusers"),
)
