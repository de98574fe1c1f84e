"""The base's embeddings in an adapter's file: PEFT writes them for a resized vocabulary, or when the head is a target.

An adapter trained over a longer vocabulary is nothing without the new tokens' rows, which no published base has.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from engine.errors import CheckpointError
from engine.inject import SavedModule, base_modules, unwrapped


def embeddings_in(model: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Key in the file -> the weight of the base's input or output embedding that it is for.

    Args:
        model: the base.
        tensors: what the file holds.
        prefix: what stands before a module's name in the file.

    Raises:
        CheckpointError: the vocabulary of the file is of another size than the base's.
    """
    found: dict[str, Tensor] = {}
    ends = {id(unwrapped(module)) for module in _ends(model)}
    for name, module in base_modules(model):
        key = f"{prefix}{name}.weight"
        if key not in tensors or isinstance(module, SavedModule) or id(unwrapped(module)) not in ends:
            continue
        weight = unwrapped(module).weight
        assert isinstance(weight, Tensor)
        rows, width = weight.shape
        if tensors[key].shape != weight.shape:
            asked = tuple(tensors[key].shape)
            hint = "Load the base that the adapter was trained on."
            if len(asked) == 2 and asked[1] == width:
                hint = f"Call model.resize_token_embeddings({asked[0]}) on the base before loading the adapter."
            raise CheckpointError(f"{key} has shape {asked} in the file and {(rows, width)} in the base.", hint)
        if weight.is_floating_point():
            found[key] = weight
    return found


def _ends(model: nn.Module) -> list[nn.Module]:
    """The input and output embeddings, where the model says which they are."""
    ends = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        find = getattr(model, name, None)
        try:
            end = find() if find else None
        except NotImplementedError:  # transformers' answer for models without one (vision towers)
            end = None
        if isinstance(end, nn.Module):
            ends.append(end)
    return ends
