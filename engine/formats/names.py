"""The names of Stable Diffusion's layers: kohya's underscores, the original block names, and the model's own.

kohya writes `down_blocks_0_attentions_0_proj_in` for `down_blocks.0.attentions.0.proj_in`. With the model at hand the
name is looked up among its layers; without it, the words that UNets and CLIP encoders are made of are known. Files for
SDXL count the blocks as the original code does: `input_blocks_4_1` is `down_blocks.1.attentions.0`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from engine.adapters.base import layer_kind
from engine.errors import CheckpointError
from engine.inject import base_modules, unwrapped
from engine.model import PeftModel

# Parts of dotted names that hold underscores themselves, and the others: together they split a name without its model.
_WORDS = (
    *("down_blocks", "mid_block", "up_blocks", "attentions", "resnets", "downsamplers", "upsamplers"),
    *("transformer_blocks", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "ff", "net", "proj", "proj_in"),
    *("proj_out", "conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "time_emb_proj", "time_embedding"),
    *("add_embedding", "linear_1", "linear_2", "cond_proj", "motion_modules"),
    *("text_model", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "mlp", "fc1", "fc2"),
    *("text_projection", "embeddings", "token_embedding", "position_embedding"),
)
_WORD = re.compile(rf"({'|'.join(sorted(_WORDS, key=len, reverse=True))}|\d+)(?:_|$)")
# (the original code's name, the diffusers name) of what stands outside the numbered blocks.
_OUTSIDE = (
    ("input_blocks_0_0", "conv_in"),
    ("out_2", "conv_out"),
    ("time_embed_0", "time_embedding_linear_1"),
    ("time_embed_2", "time_embedding_linear_2"),
    ("label_emb_0_0", "add_embedding_linear_1"),
    ("label_emb_0_2", "add_embedding_linear_2"),
)
_IN_RESNET = (
    ("in_layers_2", "conv1"),
    ("out_layers_3", "conv2"),
    ("emb_layers_1", "time_emb_proj"),
    ("skip_connection", "conv_shortcut"),
)
_BLOCK = re.compile(r"(input_blocks_(\d+)|middle_block|output_blocks_(\d+))_(\d+)_(.+)")
_DOTTED_BLOCK = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
CLIP_PREFIX = "text_model."


def layers_per_block(unet: nn.Module | None) -> int:
    """How many resnets a block of the UNet has; 2 for Stable Diffusion 1, 2 and XL."""
    value = getattr(getattr(unet, "config", None), "layers_per_block", 2)
    return value if isinstance(value, int) else 2


def from_original(name: str, per_block: int = 2) -> str | None:
    """A UNet layer's underscored original name in diffusers' terms, underscored too; None if it is not one.

    Example: `input_blocks_4_1_proj_in` -> `down_blocks_1_attentions_0_proj_in`.
    """
    for original, ours in _OUTSIDE:
        if name == original:
            return ours
    found = _BLOCK.fullmatch(name)
    if found is None:
        return None
    kind, part, rest = found.group(1), int(found.group(4)), found.group(5)
    if kind == "middle_block":
        if part > 2:
            return None
        where = f"mid_block_{'attentions' if part == 1 else 'resnets'}_{part // 2}"
        return f"{where}_{_inside(rest)}"
    if kind.startswith("input"):
        block, layer = divmod(int(found.group(2)) - 1, per_block + 1)
        if rest == "op":
            return f"down_blocks_{block}_downsamplers_0_conv"
        if layer == per_block:
            return None
        side = "down"
    else:
        block, layer = divmod(int(found.group(3)), per_block + 1)
        # Behind the attention, or in its place where the block has none.
        if rest == "conv":
            return f"up_blocks_{block}_upsamplers_0_conv"
        side = "up"
    if part > 1:
        return None
    return f"{side}_blocks_{block}_{'resnets' if part == 0 else 'attentions'}_{layer}_{_inside(rest)}"


def _inside(rest: str) -> str:
    return dict(_IN_RESNET).get(rest, rest)


def to_original(name: str, names: Iterable[str], per_block: int = 2) -> str:
    """The original, underscored name of a UNet's layer `name`; `names` are those of all the UNet's modules.

    Raises:
        CheckpointError: the layer has no counterpart in the original code.
    """
    flat = name.replace(".", "_")
    for original, ours in _OUTSIDE:
        if flat == ours:
            return original
    found = _DOTTED_BLOCK.fullmatch(name)
    if found is None:
        raise CheckpointError(
            f"The layer {name} has no name in the original Stable Diffusion code.",
            "Write the file with original_names=False, or in diffusers' format.",
        )
    side, block, kind, number, rest = found.groups()
    layer = int(number)
    inner = {ours: original for original, ours in _IN_RESNET}.get(rest, rest.replace(".", "_"))
    if side is None:
        return f"middle_block_{1 if kind == 'attentions' else 2 * layer}_{inner}"
    first = int(block) * (per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks_{first + per_block + 1}_0_op"
    if kind == "upsamplers":
        attends = any(other.startswith(f"up_blocks.{block}.attentions.") for other in names)
        return f"output_blocks_{first + per_block}_{2 if attends else 1}_conv"
    part = 1 if kind == "attentions" else 0
    return f"{'input_blocks' if side == 'down' else 'output_blocks'}_{first + layer + (side == 'down')}_{part}_{inner}"


def by_rule(flat: str) -> str | None:
    """The dotted name of an underscored one, by the words that UNets and CLIP encoders are made of; or None."""
    parts, at = [], 0
    while at < len(flat):
        found = _WORD.match(flat, at)
        if found is None:
            return None
        parts.append(found.group(1))
        at = found.end()
    return ".".join(parts) if parts and not flat.endswith("_") else None


class Names:
    """Finds a model's layers by the names that files give them.

    Args:
        model: the base (adapters on it do not matter), or None to go by rule.
        component: `unet`, `text_encoder` or `text_encoder_2`.
    """

    def __init__(self, model: nn.Module | None, component: str) -> None:
        if isinstance(model, PeftModel):
            model = model.get_base_model()
        self.component = component
        self.per_block = layers_per_block(model)
        self.model = model
        self.layers: dict[str, nn.Module] = {}
        self._flat: dict[str, list[str]] = {}
        if model is not None:
            every = [(name, unwrapped(module)) for name, module in base_modules(model)]
            self.layers = {name: module for name, module in every if layer_kind(module)}
            for name in self.layers:
                self._flat.setdefault(name.replace(".", "_"), []).append(name)

    def flat(self, name: str) -> str | None:
        """The layer that kohya's underscored `name` means, or None.

        Raises:
            CheckpointError: the model has several.
        """
        candidates: Sequence[str] = [name]
        if self.component == "unet":
            original = from_original(name, self.per_block)
            candidates = [original] if original is not None else candidates
        else:
            candidates = _with_and_without(name, CLIP_PREFIX.replace(".", "_"))
        if self.model is None:
            return by_rule(candidates[0])
        for candidate in candidates:
            found = self._flat.get(candidate, [])
            if len(found) > 1:
                raise CheckpointError(
                    f"{name!r} can mean {' or '.join(found)} in {type(self.model).__name__}.",
                    "Convert the adapter to PEFT's format, whose names are plain.",
                )
            if found:
                return found[0]
        return None

    def dotted(self, name: str) -> str | None:
        """The layer that the dotted `name` means, or None; CLIP's `text_model.` may be missing on either side."""
        if self.model is None:
            return name
        candidates = [name] if self.component == "unet" else _with_and_without(name, CLIP_PREFIX)
        return next((candidate for candidate in candidates if candidate in self.layers), None)


def _with_and_without(name: str, prefix: str) -> Sequence[str]:
    other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
    return [name, other]
