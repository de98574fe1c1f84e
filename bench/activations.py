"""What one decoder block keeps for its backward pass: with adapters of ours and of PEFT's, over the frozen base.

    python -m bench.activations [--json FILE]

A Llama block of transformers (d 1024, ff 2816, 16 heads, 4 of keys and values) with random bf16 weights reads 1,024
tokens whose gradient is wanted; the adapters have r 16 at all seven linear layers. Counted is what
`torch.autograd.graph.saved_tensors_hooks` shows, and what else the forward pass leaves alive (tensors that a node keeps
by other means), each storage once; not the weights, nor the rotary tables, which all blocks share.

`linears`: the block's linear layers and activation alone, its norms lean and its attention left out, so that nothing
else dilutes the ratio (the frozen base keeps 20.5 MiB). `whole`: the block as transformers has it, with sdpa.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.measuring import command_line, row
from engine import threads

WIDTH, INNER, TOKENS, RANK, DROPOUT = 1024, 2816, 1024, 16, 0.05
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "LoRA": ({}, 1.1),
    "LoRA + dropout": ({"lora_dropout": DROPOUT}, 1.15),
    "DoRA": ({"use_dora": True}, 1.2),
    "DoRA + dropout": ({"use_dora": True, "lora_dropout": DROPOUT}, 1.25),
}


def block(whole: bool) -> Any:
    """A module of one decoder block, (1, T, d) -> (1, T, d), in bf16 and frozen; the same weights at every call."""
    import torch
    from torch import Tensor, nn
    from transformers import AttentionInterface, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

    def left_out(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Sums instead of attention: gradients reach all three projections, and nothing is kept for them."""
        groups = module.num_key_value_groups
        summed = query + key.repeat_interleave(groups, 1) + value.repeat_interleave(groups, 1)
        return summed.transpose(1, 2), None

    class LeanNorm(LlamaRMSNorm):
        """The same without float32 copies: keeps its input alone."""

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = LlamaConfig(
                hidden_size=WIDTH,
                intermediate_size=INNER,
                num_attention_heads=16,
                num_key_value_heads=4,
                num_hidden_layers=1,
                vocab_size=8,
                attn_implementation="sdpa" if whole else "left_out",
            )
            self.layer = LlamaDecoderLayer(config, 0)
            if not whole:
                self.layer.input_layernorm.__class__ = LeanNorm
                self.layer.post_attention_layernorm.__class__ = LeanNorm
            self.places = torch.arange(TOKENS)[None]
            self.tables = LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=torch.bfloat16), self.places)

        def forward(self, x: Tensor) -> Any:
            return self.layer(x, position_embeddings=self.tables, attention_mask=None, position_ids=self.places)

    AttentionInterface.register("left_out", left_out)
    torch.manual_seed(0)
    return Block().to(torch.bfloat16).requires_grad_(False)


def kept(model: Any, dropped_too: bool = False) -> int:
    """Bytes that a forward pass leaves for the backward pass, each storage once.

    Args:
        model: maps (1, T, d) to the same shape.
        dropped_too: count also what was saved for a part of the graph that is no longer there after the pass.
    """
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return tensor

    class Watch(TorchDispatchMode):
        """Notes every storage that an operation makes, without keeping it."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for value in tree_leaves(result):
                if isinstance(value, torch.Tensor):
                    note(value)
            return result

    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    x.requires_grad_(True)
    # Once for what is computed on first use and kept from step to step.
    model(x).sum().backward()
    shared = [*model.parameters(), *model.buffers(), *_tables(model)]
    apart = {tensor.untyped_storage().data_ptr() for tensor in shared}
    saved: set[int] = set()
    held: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.add(tensor.untyped_storage().data_ptr())
        if dropped_too:
            held.append(tensor)
        return note(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Watch():
        result = model(x)
    # The result is the next block's to count, unless this one keeps it too.
    apart |= {result.untyped_storage().data_ptr()} - saved
    return sum(size for place, (ref, size) in seen.items() if not ref.expired() and place not in apart)


def _tables(model: Any) -> list[Any]:
    return [table for module in model.modules() for table in getattr(module, "tables", ())]


def rows() -> list[dict[str, Any]]:
    """For each variant the bytes kept over the frozen base's, ours; what PEFT keeps is in the note."""
    threads.apply(None)
    import peft

    import engine

    found = []
    for title, whole in (("linears", False), ("whole", True)):
        base = kept(block(whole))
        for name, (fields, target) in VARIANTS.items():
            settings = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(TARGETS), **fields}
            mine = kept(_trained(engine.get_peft_model, block(whole), engine.LoraConfig(**settings)))
            theirs = _trained(peft.get_peft_model, block(whole), peft.LoraConfig(**settings))
            other, passing = kept(theirs), kept(theirs, dropped_too=True)
            note = f"PEFT keeps {other / 2**20:.1f} MiB, {other / base:.2f} times the base's"
            if passing > other:
                note += f" ({passing / 2**20:.1f} with what it saves and drops before the pass ends)"
            found.append(
                row(f"Kept for backward, {title}: {name} over the base", [mine], [base], target, "bytes", note)
            )
    return found


def _trained(attach: Callable[..., Any], model: Any, config: Any) -> Any:
    """The model with an adapter, in training mode, B other than zero as after some steps."""
    import torch

    adapted = attach(model, config)
    adapted.train()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return adapted


if __name__ == "__main__":
    command_line(__doc__, rows)
