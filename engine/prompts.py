"""Virtual tokens before a model's input: what Prompt Tuning, P-Tuning and Prefix Tuning do to a forward pass.

Such an adapter changes no layer, so it lives on the model (`PeftModel.prompts`) and changes the call instead:

    batch row   [ prefix: keys and values | prompt: embeddings | the row's own tokens ]
    mask          1 ... 1                   1 ... 1              the caller's
    positions     0 ...                     ...                  the caller's + n of that row
    labels                                  -100 ... -100        the caller's

Rows may have different adapters, or none: shorter ones are padded on the left, masked, and do not count as positions.
Nothing is kept between calls: whether the virtual tokens are read already follows from the cache's length.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 (the field's usual name)
from torch import Tensor, nn

from engine.adapters.prefix_tuning import PrefixTokens
from engine.adapters.virtual import VirtualTokens
from engine.errors import ConfigError, EngineError
from engine.prefixes import compute_type, filled, kept_under_checkpointing
from engine.rows import Row, mix_of

if TYPE_CHECKING:
    from engine.model import PeftModel

Call = dict[str, Any]
_DECODED = ("decoder_input_ids", "decoder_inputs_embeds")
# Architectures that tell positions from the mask or from distances, and so need none from outside.
_RELATIVE = ("bloom", "mpt", "falcon", "opt")


class Rows:
    """Which virtual tokens stand before which rows of a batch.

    Args:
        model: its switchboard says which adapters are active, or which row has which.
        batch: rows of the batch; n times as many as there are names with n beams a row.
    """

    def __init__(self, model: PeftModel, batch: int, device: torch.device) -> None:
        board = model.switchboard
        self.batch, self.device = batch, device
        self.index: Tensor | None = None
        groups: list[tuple[VirtualTokens, ...]] = [()]
        if not board.disabled and board.rows is None:
            groups = [tuple(_tokens(model, name) for name in active_prompts(model))]
        elif not board.disabled and board.rows is not None:
            if batch % len(board.rows):
                raise EngineError(
                    f"adapter_names has {len(board.rows)} names and the batch {batch} rows; needed: one name a row."
                )
            mixes = list(dict.fromkeys(board.rows))
            groups = [tuple(_tokens(model, name) for name, _ in mix if name in model.prompts) for mix in mixes]
            places = torch.tensor([mixes.index(mix) for mix in board.rows], device=device)
            self.index = places.repeat_interleave(batch // len(board.rows))
        self.prompts = [[t for t in group if t.before_input] for group in groups]
        self.prefixes = [[t for t in group if isinstance(t, PrefixTokens)] for group in groups]
        self.n_prompt = max(sum(t.count for t in group) for group in self.prompts)
        self.n_prefix = max(sum(t.count for t in group) for group in self.prefixes)

    def __bool__(self) -> bool:
        return self.n_prompt + self.n_prefix > 0

    def uneven(self, prompts: bool = True, prefixes: bool = True) -> bool:
        """Whether some rows have fewer virtual tokens than others."""
        return any(
            len({sum(t.count for t in group) for group in groups}) > 1
            for groups, asked in ((self.prompts, prompts), (self.prefixes, prefixes))
            if asked
        )

    def _spread(self, table: Tensor) -> Tensor:
        """(groups, ...) -> (batch, ...)."""
        if self.index is None:
            return table.expand(self.batch, *table.shape[1:])
        return table.index_select(0, self.index)

    def mask(self, prompts: bool = True, prefixes: bool = True) -> Tensor:
        """1 for a virtual token, 0 for padding: (batch, n_prefix + n_prompt), or one of the two parts."""
        parts = []
        for groups, width, asked in (
            (self.prefixes, self.n_prefix, prefixes),
            (self.prompts, self.n_prompt, prompts),
        ):
            if asked:
                counts = torch.tensor([[sum(t.count for t in group)] for group in groups], device=self.device)
                parts.append(torch.arange(width, device=self.device) >= width - counts)
        return self._spread(torch.cat(parts, dim=1).long())

    def embeddings(self, like: Tensor) -> Tensor:
        """(batch, n_prompt, d) in the type of the input's embeddings."""
        rows = []
        for group in self.prompts:
            found = torch.cat([t()[: t.count].to(like.dtype) for t in group] or [like.new_zeros(0, like.shape[-1])])
            rows.append(F.pad(found, (0, 0, self.n_prompt - len(found), 0)))
        return self._spread(torch.stack(rows).to(like.device))

    def keys_values(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """For each layer, keys and values of (batch, heads, n_prefix, head width)."""
        made = [[t.keys_values() for t in group] for group in self.prefixes]
        some = next(layers for group in made for layers in group)
        found = []
        for layer in range(len(some)):
            pair = []
            for part in (0, 1):
                empty = some[layer][part][:, :0]
                rows = [torch.cat([layers[layer][part] for layers in group] or [empty], dim=1) for group in made]
                padded = [F.pad(row, (0, 0, self.n_prefix - row.shape[1], 0)) for row in rows]
                pair.append(self._spread(torch.stack(padded).to(self.device, dtype)))
            found.append((pair[0], pair[1]))
        return found


def _tokens(model: PeftModel, adapter: str) -> VirtualTokens:
    tokens = model.prompts[adapter]
    assert isinstance(tokens, VirtualTokens)
    return tokens


def active_prompts(model: PeftModel) -> list[str]:
    """The active adapters that have virtual tokens, in the order in which they stand."""
    return [name for name, weight in model.switchboard.weights.items() if weight and name in model.prompts]


def virtual_tokens(model: PeftModel, names: Sequence[Row] | None = None) -> int:
    """How many places virtual tokens take in the context: of the active adapters, or at most in one of the rows."""
    if names is None:
        return sum(_tokens(model, name).count for name in active_prompts(model))
    mixes = [mix_of(row) for row in names]
    return max((sum(_tokens(model, n).count for n, _ in mix if n in model.prompts) for mix in mixes), default=0)


def unshared(model: Any, row: Row) -> tuple[int, int] | None:
    """What of a row keeps others out of its batch: the numbers of its virtual tokens, (prompt, prefix), on a base that
    cannot tell positions behind padding; None where all rows can stand together.
    """
    if not getattr(model, "prompts", None) or _follows(model.get_base_model()):
        return None
    found = [_tokens(model, name) for name, _ in mix_of(row) if name in model.prompts]
    return (
        sum(tokens.count for tokens in found if tokens.before_input),
        sum(tokens.count for tokens in found if isinstance(tokens, PrefixTokens)),
    )


def check_weight(adapter: str, title: str, weight: float) -> None:
    """A virtual token is read or not: there is no half of one.

    Raises:
        ConfigError: the weight is neither 0 nor 1.
    """
    if weight not in (0, 1):
        raise ConfigError(
            f"{adapter!r} is a {title} adapter with a weight of {weight!r}; its virtual tokens are read whole or not "
            "at all, so they cannot be mixed.",
            "Give it a weight of 1 or 0; other adapters beside it can have any weight.",
        )


def by_name(base: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """A forward call with all its arguments by name."""
    if not args:
        return dict(kwargs)
    return {**dict(zip(inspect.signature(base.forward).parameters, args, strict=False)), **kwargs}


# --- the call ---------------------------------------------------------------------------------------------------------


def run(model: PeftModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The base's forward with the virtual tokens that the switchboard asks for."""
    base = model.get_base_model()
    call = by_name(base, args, kwargs)
    if call.get("encoder_outputs") is not None and any(_tokens(model, n).before_input for n in _wanted(model)):
        raise EngineError(
            "encoder_outputs is given, which the encoder made without the virtual tokens.", "Pass input_ids instead."
        )
    recomputed = [m for m in base.modules() if getattr(m, "gradient_checkpointing", False)] if base.training else []
    call, cache = extended(model, call, forgetful=bool(recomputed))
    if cache is None:
        return model.base_model(**call)
    before = cache.get_seq_length()
    with kept_under_checkpointing(recomputed):
        out = model.base_model(**call)
    if not (cache.get_seq_length() > before or getattr(cache, "was_read", False)):
        raise EngineError(
            f"{type(base).__name__} does not read keys and values from a cache, so a prefix has no effect on it"
            f"{' under gradient checkpointing' if recomputed else ''}.",
            "Turn gradient checkpointing off." if recomputed else "Use Prompt Tuning, P-Tuning or LoRA on this base.",
        )
    return out


def _wanted(model: PeftModel) -> list[str]:
    board = model.switchboard
    if board.disabled:
        return []
    if board.rows is None:
        return active_prompts(model)
    return list(dict.fromkeys(name for mix in board.rows for name, _ in mix if name in model.prompts))


def extended(model: PeftModel, call: Call, forgetful: bool = False) -> tuple[Call, Any]:
    """The call with virtual tokens, and the cache that was filled with a prefix for it, or None."""
    base = model.get_base_model()
    shown = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
    two = bool(getattr(base.config, "is_encoder_decoder", False))
    if two and shown is None:
        shown = next((call[k] for k in _DECODED if call.get(k) is not None), None)
    if shown is None:
        return call, None
    rows = Rows(model, shown.shape[0], shown.device)
    if not rows:
        return call, None
    if rows.uneven() and not _follows(base):
        raise EngineError(
            f"{type(base).__name__} takes no positions, so rows with unequal numbers of virtual tokens cannot share "
            "a batch.",
            "Run them separately, or use adapters with the same num_virtual_tokens.",
        )
    cache = call.get("past_key_values")
    if getattr(cache, "is_compileable", False):
        raise EngineError("A cache of fixed length has no room for virtual tokens.", "Leave cache_implementation out.")
    past = cache.get_seq_length() if cache is not None else 0
    call = dict(call)
    if two:
        _before_encoder(base, call, rows)
        decoded = next((call[k] for k in (*_DECODED, "labels") if call.get(k) is not None), None)
        length = None if decoded is None else decoded.shape[1]
        _mask(call, "decoder_attention_mask", rows.mask(prompts=False), rows.uneven(prompts=False), past, length)
    else:
        _around(base, call, rows, past)
    if past or not rows.n_prefix:
        return call, None
    call["past_key_values"] = filled(base, rows.keys_values(compute_type(base)), cache, forgetful)
    return call, call["past_key_values"]


def _follows(base: nn.Module) -> bool:
    """Whether tokens keep their positions behind masked padding."""
    config: Any = base.config
    relative = hasattr(config, "relative_attention_num_buckets") or config.model_type in _RELATIVE
    return relative or "position_ids" in inspect.signature(base.forward).parameters


def _mask(call: Call, name: str, virtual: Tensor, needed: bool, past: int, length: int | None) -> None:
    """The mask with the virtual tokens' part in front; one is made only where rows differ."""
    given = call.get(name)
    if given is None and needed and length is not None:
        own = max(past - virtual.shape[1], 0) + length
        given = virtual.new_ones(virtual.shape[0], own)
    if given is None or virtual.shape[1] == 0:
        return
    if not isinstance(given, Tensor) or given.dim() != 2:
        raise EngineError(
            f"{name} is not a mask of (rows, tokens); virtual tokens cannot be put before it.",
            "Pass a mask with two dimensions; when generating, leave cache_implementation out.",
        )
    call[name] = torch.cat([virtual.to(given.device, given.dtype), given], dim=1)


def _around(base: nn.Module, call: Call, rows: Rows, past: int) -> None:
    """Mask, positions, labels and embeddings of a model with one stack."""
    if rows.n_prompt and hasattr(base, "score") and type(base).__name__.endswith("ForSequenceClassification"):
        _padding_first(base, call)
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    batch, length = (ids if ids is not None else embeds).shape[:2]  # type: ignore[union-attr]
    mask = rows.mask()
    _mask(call, "attention_mask", mask, rows.uneven(), past, length)
    call.pop("cache_position", None)
    positions = call.get("position_ids")
    if positions is None and rows.uneven() and "position_ids" in inspect.signature(base.forward).parameters:
        start = max(past - mask.shape[1], 0)
        positions = torch.arange(start, start + length, device=rows.device).expand(batch, -1)
    if positions is not None:
        positions = positions + mask.sum(1, keepdim=True)
        if not past and rows.n_prompt:
            own = (mask.cumsum(1) - 1).clamp(min=0)[:, rows.n_prefix :]
            positions = torch.cat([own.expand(*positions.shape[:-1], -1), positions], dim=-1)
        call["position_ids"] = positions
    if past or not rows.n_prompt:
        return
    n = rows.n_prompt
    if isinstance(keep := call.get("logits_to_keep"), Tensor):
        call["logits_to_keep"] = torch.where(keep < 0, keep, keep + n)
    if (kinds := call.get("token_type_ids")) is not None:
        call["token_type_ids"] = F.pad(kinds, (n, 0))
    labels = call.get("labels")
    if labels is not None and labels.shape == (batch, length) and not labels.is_floating_point():
        call["labels"] = F.pad(labels, (n, 0), value=-100)
    for name in ("start_positions", "end_positions"):
        if call.get(name) is not None:
            call[name] = call[name] + n
    _embed(base, call, rows)


def _padding_first(base: nn.Module, call: Call) -> None:
    """Move right padding to the left.

    Such a classifier reads its last token, which it finds by the padded ids; embeddings do not show them, and it would
    read the padding. Behind the mask, and with the positions of before, the tokens see what they saw.
    """
    ids, mask, pad = call.get("input_ids"), call.get("attention_mask"), base.config.pad_token_id  # type: ignore[union-attr]
    if mask is None and ids is not None and isinstance(pad, int):
        mask = ids.ne(pad).long()
    if mask is None or mask.dim() != 2 or bool(mask[:, -1].all()):
        return
    positions = call.get("position_ids")
    if positions is None:
        positions = torch.arange(mask.shape[1], device=mask.device)
    call["attention_mask"], call["position_ids"] = mask, positions.expand_as(mask)
    order = mask.bool().long().argsort(dim=1, stable=True)
    for name in ("input_ids", "attention_mask", "position_ids", "token_type_ids"):
        if call.get(name) is not None:
            call[name] = call[name].gather(1, order)
    if call.get("inputs_embeds") is not None:
        call["inputs_embeds"] = call["inputs_embeds"].gather(1, order[..., None].expand_as(call["inputs_embeds"]))


def _embed(base: nn.Module, call: Call, rows: Rows) -> None:
    embeds = call.get("inputs_embeds")
    if embeds is None:
        embeds = base.get_input_embeddings()(call["input_ids"])  # type: ignore[operator]
    call["input_ids"] = None
    call["inputs_embeds"] = torch.cat([rows.embeddings(embeds), embeds], dim=1)


def _before_encoder(base: nn.Module, call: Call, rows: Rows) -> None:
    """Prompts go before the encoder's input; the decoder sees them through its cross-attention."""
    if not rows.n_prompt or call.get("encoder_outputs") is not None:
        return
    shown = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
    _mask(call, "attention_mask", rows.mask(prefixes=False), rows.uneven(prefixes=False), 0, shown.shape[1])
    _embed(base, call, rows)


# --- generation -------------------------------------------------------------------------------------------------------


def generate(model: PeftModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The base's generate; each of its forward passes gets the virtual tokens.

    Raises:
        EngineError: a cache of fixed length is asked for, or layers are being recomputed for training.
    """
    base: Any = model.get_base_model()
    if base.training and any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        raise EngineError(
            "The model is in training mode with gradient checkpointing, where transformers keeps no cache.",
            "Call model.eval() before generate().",
        )
    call = dict(kwargs)
    if args:
        call["inputs"] = args[0]
    two = bool(base.config.is_encoder_decoder)
    if two:
        ids = call.pop("input_ids", None)
        call["input_ids"] = ids if ids is not None else call.pop("inputs", None)
        if call.get("encoder_outputs") is not None and any(_tokens(model, n).before_input for n in _wanted(model)):
            raise EngineError(
                "encoder_outputs is given, which the encoder made without the virtual tokens.",
                "Pass input_ids instead.",
            )
        _own_mask(base, call)
        shown = call["input_ids"] if call["input_ids"] is not None else call.get("inputs_embeds")
        if shown is not None:
            _before_encoder(base, call, Rows(model, shown.shape[0], shown.device))
        call = {key: value for key, value in call.items() if key != "input_ids" or value is not None}

    def before(module: nn.Module, inside: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[()], Call]:
        return (), extended(model, by_name(module, inside, named))[0]

    hook = base.register_forward_pre_hook(before, with_kwargs=True)
    try:
        return base.generate(*args[1:], **call)
    finally:
        hook.remove()


def _own_mask(base: Any, call: Call) -> None:
    """The mask that generate would read off padded ids, before they become embeddings."""
    ids, pad = call.get("input_ids"), base.generation_config.pad_token_id
    if ids is not None and call.get("attention_mask") is None and pad is not None and bool((ids == pad).any()):
        call["attention_mask"] = ids.ne(pad).long()
