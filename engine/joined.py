"""Several models that learn together, each with an adapter of one method: a UNet and its text encoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import nn

from engine.model import PeftModel


class Joined(nn.Module):
    """Adapted models as one module, so that one call, one optimizer and one process group serve them all.

    The adapter of the first lies in the adapter's folder itself, that of each other in a folder of its name there; so
    readers that know of one model find it where it always is.

    Args:
        parts: name -> model, the main one first.
    """

    def __init__(self, parts: Mapping[str, PeftModel]) -> None:
        super().__init__()
        self.models = nn.ModuleDict(parts)

    @property
    def parts(self) -> dict[str, PeftModel]:
        """Name -> model, the main one first."""
        return {name: model for name, model in self.models.items() if isinstance(model, PeftModel)}

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Every base as it was, inside a `with`."""
        with ExitStack() as stack:
            for model in self.parts.values():
                stack.enter_context(model.disable_adapter())
            yield


def parts_of(model: nn.Module) -> dict[str, PeftModel]:
    """Where the parts' names begin (the main part: nothing) -> model; of one model, itself."""
    if isinstance(model, PeftModel):
        return {"": model}
    assert isinstance(model, Joined)
    return {f"{name}." if number else "": part for number, (name, part) in enumerate(model.parts.items())}
