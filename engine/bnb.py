"""bitsandbytes' quantised linear layers: making them, counting them, and changing their weight.

- nf4, fp4 (Dettmers et al., 2023, https://arxiv.org/abs/2305.14314): 4-bit codes with a scale for each 64 values, the
  scales themselves in 8 bits (double quantisation): 0.52 bytes a value.
- int8 (Dettmers et al., 2022, https://arxiv.org/abs/2208.07339): 8-bit codes with a scale for each row.

bitsandbytes and transformers are imported when a function is called.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.adapters.base import CONV1D, LINEAR, features, layer_kind
from engine.errors import ConfigError, ModelError, TargetError

KINDS = ("nf4", "fp4", "int8")
FOUR, EIGHT = "Linear4bit", "Linear8bitLt"
_BLOCK = 64  # values that share a scale
_THRESHOLD = 6.0  # LLM.int8()'s: activations above it are multiplied in 16 bits


class _KnownNotices(logging.Filter):
    """A missing fast kernel, and a conversion that happens in every layer of every step."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = str(record.msg)
        return "gemm_4bit_forward" not in text and "will be cast from" not in text


def silence() -> None:
    """Take two harmless notices of bitsandbytes out of the log; its warnings stay."""
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logger = logging.getLogger(name)
        if not any(isinstance(item, _KnownNotices) for item in logger.filters):
            logger.addFilter(_KnownNotices())


silence()


@dataclass(frozen=True)
class MergeError:
    """What rounding to the base's codes costs at one layer, in Frobenius norms.

    Attributes:
        weight: ||Q(W + dW) - (W + dW)|| / ||W + dW||.
        change: the same error over ||dW||; 1 and more means that rounding is larger than the adapter's change.
    """

    weight: float
    change: float


def unfit(model: nn.Module, kind: str, device: torch.device) -> list[str]:
    """The linear layers that cannot be held in 4 bits on this device; `model` may be on the meta device.

    On the CPU bitsandbytes 0.50.2 reads scales wrongly where a row is no whole number of 64-value blocks: the weight
    comes back 15 to 40 % off instead of 9 %.
    """
    if kind == "int8" or device.type != "cpu":
        return []
    return [
        name
        for name, module in model.named_modules()
        if layer_kind(module) in (LINEAR, CONV1D) and features(module)[0] % _BLOCK
    ]


def grouped_values(model: nn.Module) -> list[str]:
    """The value projections that several query heads share; `model` may be on the meta device.

    They are the smallest matrices and cost the most in 4 bits: on SmolLM2 3 % of the weights and a third of the loss
    that nf4 adds (docs/models.md has the figures), so 4-bit bases keep them in full precision.
    """
    layers = {name: module for name, module in model.named_modules() if layer_kind(module) == LINEAR}
    found = []
    for name, module in layers.items():
        parent, _, own = name.rpartition(".")
        queries = layers.get(f"{parent}.q_proj")
        if own == "v_proj" and queries is not None and features(module)[1] < features(queries)[1]:
            found.append(name)
    return found


def config(kind: str, compute: torch.dtype, skip: Sequence[str] | None = None) -> Any:
    """transformers' `BitsAndBytesConfig` for a kind; `skip` names the layers to leave alone (its own choice if None).

    Raises:
        ConfigError: an unknown kind.
        ModelError: bitsandbytes is not installed.
    """
    _library(kind)
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=_THRESHOLD, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=skip,
    )


def _library(kind: str) -> Any:
    if kind not in KINDS:
        raise ConfigError(f"quantization is {kind!r}; needed: one of {', '.join(KINDS)}.")
    try:
        import bitsandbytes
    except ImportError as error:
        raise ModelError(
            f"A base in {kind} needs bitsandbytes, which is not installed ({error}).",
            "Install requirements.txt, or load the base with quantization: none.",
        ) from error
    return bitsandbytes


def quantize_model(
    model: nn.Module, kind: str, compute: torch.dtype | None = None, skip: Sequence[str] = ()
) -> nn.Module:
    """Replace a model's linear layers by quantised ones, in place: for models whose own loader cannot (a UNet).

    Embeddings, convolutions, norms, output embeddings, linear layers whose weight is shared, and those that `unfit`
    and in 4 bits `grouped_values` name stay as they are.

    Args:
        model: a model without adapters, in full precision.
        kind: nf4, fp4 or int8.
        compute: the type that 4-bit layers multiply in; the weight's own when left out.
        skip: names, or endings of names, of layers to leave alone.

    Raises:
        TargetError: the model carries adapters, or has no linear layer to quantise.
        ConfigError, ModelError: see `config`.
    """
    from engine.inject import base_modules, matches, replace_module, wrappers

    library = _library(kind)
    if next(wrappers(model), None) is not None:
        raise TargetError("The model carries adapters, which were made for its weights.", "Call unload() first.")
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    modules = list(base_modules(model))
    left = {*unfit(model, kind, next(model.parameters()).device), *(grouped_values(model) if kind != "int8" else ())}
    users: dict[int, int] = {}
    for _, module in modules:
        weight = module._parameters.get("weight")
        if weight is not None:
            users[id(weight)] = users.get(id(weight), 0) + 1
    found = [
        (name, module)
        for name, module in modules
        if type(module) is nn.Linear
        and module is not head
        and users[id(module.weight)] == 1
        and name not in left
        and not matches(name, list(skip))
    ]
    if not found:
        raise TargetError(
            f"{type(model).__name__} has no linear layer that could be held in {kind}.",
            f"On a CPU 4-bit layers need a multiple of {_BLOCK} inputs; int8 takes any.",
        )
    for name, module in found:
        # One at a time, so that both forms of the whole model are never in memory.
        replace_module(model, name, _quantised(library, module, kind, compute or module.weight.dtype))
    return steady(model)


def _quantised(library: Any, linear: nn.Linear, kind: str, compute: torch.dtype) -> nn.Module:
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    place = linear.weight.device
    weight = linear.weight.detach()
    with torch.device("meta"):
        if kind == "int8":
            made = library.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=_THRESHOLD)
        else:
            made = library.nn.Linear4bit(*sizes, compute_dtype=compute, compress_statistics=True, quant_type=kind)
    if kind == "int8":
        codes, scales, _ = library.functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        made.weight = library.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    else:
        made.weight = library.nn.Params4bit(weight, requires_grad=False, quant_type=kind, module=made).to(place)
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    fresh: nn.Module = made.train(linear.training)
    return fresh


def is_packed(layer: nn.Module) -> bool:
    """Whether `layer` is one of bitsandbytes' quantised linear layers."""
    return type(layer).__name__ in (FOUR, EIGHT)


def packed_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of each of bitsandbytes' layers in a model."""
    return ((name, module) for name, module in model.named_modules() if is_packed(module))


def steady(model: nn.Module) -> nn.Module:
    """Keep bitsandbytes from repacking 4-bit weights for its inference kernel on processors with avx512_bf16.

    It does so at the first forward pass in evaluation mode, for good: scales are rounded to bf16, and no gradient
    passes such a layer any more, so that training after an evaluation would be wrong without a word.
    """
    layer: Any
    for _, layer in packed_layers(model):
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
            weight: Any = layer.weight
            if getattr(weight.quant_state, "packing_format_for_cpu", False):
                from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

                weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(
                    weight.data, weight.quant_state
                )
                layer.quant_state = weight.quant_state
    return model


def dequantized(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight that a quantised layer stands for, (out, in)."""
    if type(layer).__name__ == FOUR:
        return decoded(codes_of(layer), dtype)
    codes, scales = _int8_parts(layer)
    return (codes.float() * (scales.float() / 127).unsqueeze(1)).to(dtype)


def codes_of(layer: nn.Module) -> tuple[Tensor, Any]:
    """A 4-bit layer's codes and scales as they are now; a merge gives the layer others."""
    weight: Any = layer.weight
    # Shapes without numbers (engine.memory) have the scales at the layer alone.
    return weight.data, getattr(weight, "quant_state", None) or layer.quant_state


def decoded(codes: tuple[Tensor, Any], dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight that the codes of a 4-bit layer stand for, (out, in)."""
    from bitsandbytes import functional

    full: Tensor = functional.dequantize_4bit(*codes)
    return full.to(dtype)


def dense(layer: nn.Module) -> nn.Linear:
    """A plain layer with a quantised one's weight, dequantised, and its own bias."""
    assert isinstance(layer, nn.Linear)
    made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    made.weight = nn.Parameter(dequantized(layer), requires_grad=False)
    made.bias = layer.bias
    return made


@torch.no_grad()
def requantize(layer: nn.Module, weight: Tensor) -> None:
    """Give a quantised layer another weight, (out, in), rounded to its codes."""
    from bitsandbytes import functional

    own: Any = layer.weight
    if type(layer).__name__ == FOUR:
        codes, state = functional.quantize_4bit(
            weight.to(own.device, own.quant_state.dtype).contiguous(),
            blocksize=own.blocksize,
            compress_statistics=own.compress_statistics,
            quant_type=own.quant_type,
            quant_storage=own.quant_storage,
        )
        _put(layer, (codes, state))
    else:
        codes, scales, _ = functional.int8_vectorwise_quant(weight.to(own.device, torch.float16).contiguous())
        _put(layer, (codes, scales))


def snapshot(layer: nn.Module) -> tuple[Tensor, Any]:
    """A quantised layer's codes and scales, copied to the CPU."""
    if type(layer).__name__ == FOUR:
        weight: Any = layer.weight
        state = copy.deepcopy(weight.quant_state)
        state.to("cpu")
        return weight.data.to("cpu", copy=True), state
    codes, scales = _int8_parts(layer)
    return codes.to("cpu", copy=True), scales.to("cpu", copy=True)


def restore(layer: nn.Module, saved: tuple[Tensor, Any]) -> None:
    """The inverse of `snapshot`, to the bit."""
    weight: Any = layer.weight
    codes, scales = saved[0].to(weight.device), copy.deepcopy(saved[1])
    moved = scales.to(weight.device)
    # A QuantState moves in place, a tensor is copied.
    _put(layer, (codes, scales if moved is None else moved))


def _put(layer: Any, parts: tuple[Tensor, Any]) -> None:
    codes, scales = parts
    weight = layer.weight
    weight.data = codes
    if type(layer).__name__ == FOUR:
        weight.quant_state = layer.quant_state = scales
    else:
        # Either place; the first forward pass moves them from the weight to the state.
        holder = weight if weight.CB is not None else layer.state
        holder.CB, holder.SCB = codes, scales


def _int8_parts(layer: Any) -> tuple[Tensor, Tensor]:
    holder = layer.weight if layer.weight.CB is not None else layer.state
    return layer.weight.data, holder.SCB


def merge_error(wanted: Tensor, got: Tensor, change: Tensor) -> MergeError:
    """The relative errors of a requantised weight."""
    lost = float((got - wanted).norm())
    whole, part = float(wanted.norm()), float(change.norm())
    return MergeError(lost / whole if whole else 0.0, lost / part if part else 0.0)


def weight_bytes(layer: nn.Module) -> int:
    """Bytes of a linear layer's weight with all that its codes need."""
    weight: Any = layer.weight
    return int(weight.numel() * weight.element_size()) + statistics_bytes(layer)


def statistics_bytes(layer: nn.Module) -> int:
    """Bytes of a quantised layer's scales, which are no parameters; 0 for other modules."""
    if type(layer).__name__ == FOUR:
        weight: Any = layer.weight
        state = weight.quant_state
        return 0 if state is None else _state_bytes(state)
    if type(layer).__name__ == EIGHT:
        _, scales = _int8_parts(layer)
        return 0 if scales is None else int(scales.numel() * scales.element_size())
    return 0


def _state_bytes(state: Any) -> int:
    parts = [state.absmax] + ([state.state2.absmax, state.offset] if state.nested else [])
    return int(sum(part.numel() * part.element_size() for part in parts))


def memory_footprint(model: nn.Module, buffers: bool = True) -> int:
    """Bytes of a model's parameters, buffers, and the scales of quantised layers."""
    tensors = [*model.parameters(), *(model.buffers() if buffers else ())]
    return int(sum(t.numel() * t.element_size() for t in tensors)) + sum(map(statistics_bytes, model.modules()))
