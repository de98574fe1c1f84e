"""Activations kept in the machine's memory between the forward and the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALL = 1 << 16
"""Tensors of fewer bytes stay: their copies would cost more time than they free memory."""

Kept = Tensor | tuple[torch.device, Tensor]


class Offload(saved_tensors_hooks):
    """Within it, what autograd saves on `device` is copied to the machine's memory, and back when it is needed.

    As torch's `save_on_cpu`, but the model's own weights stay where they are: autograd saves those too, and a frozen
    base would go over the bus with every pass. Values and gradients are those of the plain pass.

    Args:
        model: whose parameters and buffers stay.
        device: where it runs.

    Attributes:
        moved: bytes that were copied away so far.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self.moved = 0

        def pack(tensor: Tensor) -> Kept:
            if tensor.device.type != device.type or tensor.nbytes < SMALL or tensor.untyped_storage().data_ptr() in own:
                return tensor
            held = torch.empty(tensor.size(), dtype=tensor.dtype, pin_memory=device.type == "cuda")
            held.copy_(tensor)
            self.moved += held.nbytes
            return tensor.device, held

        def unpack(kept: Kept) -> Any:
            if isinstance(kept, Tensor):
                return kept
            where, held = kept
            return held.to(where, non_blocking=held.is_pinned())

        super().__init__(pack, unpack)
