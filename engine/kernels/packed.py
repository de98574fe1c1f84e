"""Attention of rows that lie end to end in one batch row, each over its own tokens alone.

transformers gives such a batch a mask of (T, T) and multiplies everything; here each row goes through the causal kernel
by itself: the sum of t_i^2 instead of T^2. The rows' lengths travel in the place of the attention mask, as an integer
tensor (1, 1, 1, rows), which models hand through to their attention as they would a mask of four dimensions; so they
are there again when checkpointed activations are recomputed.

For processors only. torch's kernel for them is slow in half precision, backward above all, so it runs in float32; short
rows in half precision go by matrix products (engine.kernels.rows).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engine import kernels
from engine.kernels import rows

NAME = "sdpa_rows"
"""The attention's name at transformers."""
OWN = "sdpa_short"
"""Its name where a model takes no rows' lengths, only its own masks."""


class RowsAttention(torch.autograd.Function):
    """(1, H, T, d) from q (1, H, T, d), k and v (1, H or fewer, T, d), causal within each row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
        # In the layout of the projections, so that what follows needs no copy.
        out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        sums: list[Tensor] = []
        wide = [t.float() for t in (q, k, v)]
        for *row, into in zip(*(t.split(lengths, 2) for t in (*wide, out)), strict=True):
            one, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*row, 0.0, True, scale=scale)
            into.copy_(one)
            sums.append(total)
        ctx.save_for_backward(q, k, v, out, *sums)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *sums = ctx.saved_tensors
        found = [torch.empty_like(t) for t in (q, k, v)]
        wide = [t.float() for t in (grad, q, k, v, out)]
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        parts = zip(*(t.split(ctx.lengths, 2) for t in (*wide, *found)), sums, strict=True)
        for do, *row, into_q, into_k, into_v, total in parts:
            for into, one in zip(
                (into_q, into_k, into_v), run(do, *row, total, 0.0, True, scale=ctx.scale), strict=True
            ):
                into.copy_(one)
        return *found, None, None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' call: its own attention, unless the mask is a tensor of rows' lengths."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask, scale = attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling
    if not dropout and _short(module, query, key, mask, kwargs):
        sight = rows.sight_of(mask, _is_causal(module, query, mask, kwargs), query.shape[0], query.shape[2])
        lengths = [query.shape[2]] * query.shape[0]
        seen: Tensor = rows.ShortRows.apply(query, key, value, lengths, scale, sight)
        return seen.transpose(1, 2).contiguous(), None
    if mask is not None and not mask.is_floating_point() and mask.dtype is not torch.bool:
        lengths = mask.flatten().tolist()
        if not dropout and kernels.enabled() and kwargs.get("position_bias") is None:
            node: Any = rows.ShortRows if rows.fits(query, lengths) else RowsAttention
            out: Tensor = node.apply(query, key, value, lengths, scale)
            return out.transpose(1, 2).contiguous(), None
        mask = _blocks(lengths, query.device)
    plain: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return plain


def _short(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether a batch is to be learned from and short, and what its queries see known."""
    known = key.shape[2] == query.shape[2] or not _is_causal(module, query, mask, options)
    if mask is not None:
        known = mask.dtype is torch.bool and mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[3] == key.shape[2]
    return (
        known
        and torch.is_grad_enabled()
        and query.requires_grad
        and kernels.enabled()
        and options.get("position_bias") is None
        and rows.fits(query, (query.shape[2], key.shape[2]))
    )


def _is_causal(module: nn.Module, query: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """As transformers decides it."""
    asked = options.get("is_causal")
    return mask is None and query.shape[2] > 1 and bool(getattr(module, "is_causal", True) if asked is None else asked)


def _blocks(lengths: list[int], device: torch.device) -> Tensor:
    """(1, 1, T, T): which tokens see which."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    return ((row[:, None] == row) & torch.ones(len(row), len(row), device=device).tril().bool())[None, None]


def as_mask(lengths: Tensor) -> Tensor:
    """Rows' lengths (rows,) as a model takes them."""
    return lengths.view(1, 1, 1, -1)


def longest(model: nn.Module) -> int | None:
    """The longest row whose tokens all see each other; None where there is no limit."""
    config: Any = getattr(model, "config", None)
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def installed(model: Any) -> bool:
    """Whether a model's attention takes rows' lengths."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return getattr(getattr(base, "config", None), "_attn_implementation", None) == NAME


def install(model: Any) -> bool:
    """Let a model's attention take rows' lengths, if it then computes what it computed before.

    Args:
        model: a decoder that keeps packed rows apart, with adapters or without.

    Returns:
        Whether it does; if not, the model is as it was.
    """
    if installed(model):
        return True
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    return _registered(base) and _kept_if(base, NAME, _with_lengths)


def speed_up(model: nn.Module) -> None:
    """Let a model in half precision attend by matrix products where rows are short, if it computes the same then.

    The model is asked with twelve tokens, so this is for the first training pass, not for attaching an adapter.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None or parameter.dtype != torch.bfloat16 or hasattr(parameter, "placements"):
        return
    if _registered(model) and not _kept_if(model, NAME, _with_lengths):
        _kept_if(model, OWN, _with_masks)


def remove(model: Any) -> None:
    """The model's own attention again."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) in (NAME, OWN):
        config._attn_implementation = "sdpa"


def _registered(base: Any) -> bool:
    """Whether `attention` can stand for a model's own; transformers knows it then."""
    config: Any = getattr(base, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa" or next(base.parameters()).device.type != "cpu":
        return False
    _register()
    return True


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for name in (NAME, OWN):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, sdpa_mask)


def arrived(model: nn.Module) -> None:
    """A model that another process has written: transformers has to know its attention here too."""
    if getattr(getattr(model, "config", None), "_attn_implementation", None) in (NAME, OWN):
        _register()


def _kept_if(base: Any, name: str, ask: Callable[[Any], tuple[Tensor, Tensor]]) -> bool:
    """Gives the model the attention `name`, and takes it away again unless two answers then agree."""
    base.config._attn_implementation = name
    modes = [(module, module.training) for module in base.modules()]
    base.eval()
    try:
        one, other = (answer.detach() for answer in ask(base))
    except Exception:
        # A model whose own code reads its mask, or that takes other inputs.
        base.config._attn_implementation = "sdpa"
        return False
    finally:
        for module, mode in modes:
            module.training = mode
    if type(one).__name__ == "FakeTensor":
        return True
    scale = float(other.float().abs().max()) or 1.0
    limit = 0.05 if one.dtype != torch.float32 else 1e-4
    same = float((one - other).float().abs().max()) <= limit * scale
    if not same:
        base.config._attn_implementation = "sdpa"
    return same


def _ids(base: Any, *shape: int) -> Tensor:
    count = base.get_input_embeddings().num_embeddings
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _with_lengths(base: Any) -> tuple[Tensor, Tensor]:
    """Two rows end to end by their lengths, and by transformers' own mask."""
    ids, positions = _ids(base, 1, 12), torch.tensor([[*range(5), *range(7)]])
    one, other = (
        base(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
        for mask in (as_mask(torch.tensor([5, 7])), None)
    )
    return one, other


@torch.enable_grad()
def _with_masks(base: Any) -> tuple[Tensor, Tensor]:
    """Two rows, one of them filled up, as in training and by the model's own attention."""
    ids, mask = _ids(base, 2, 6), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    one = base(input_ids=ids, attention_mask=mask)[0]
    name, base.config._attn_implementation = base.config._attn_implementation, "sdpa"
    other = base(input_ids=ids, attention_mask=mask)[0]
    base.config._attn_implementation = name
    # A model of one answer a row has it first as well.
    return (one[mask.bool()], other[mask.bool()]) if one.shape[:2] == mask.shape else (one, other)
