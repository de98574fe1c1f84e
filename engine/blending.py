"""Several adapters answering as one, and the same blend kept as an adapter of its own.

`live` changes the shared `Switchboard` and nothing else: y = W x + sum_i w_i delta_i(x). The other types are
`add_weighted_adapter`'s; a combination is made once for its settings and then switched on like any adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.checkpoint import save_adapter
from engine.combinations import LIVE, Blend
from engine.errors import ConfigError
from engine.layers import AdapterLayer
from engine.mixing import add_weighted_adapter, as_matrix
from engine.model import PeftModel

BLEND, KEPT = "blended_adapter", "kept_blend"
"""The names of a combination while it is attached: to be heard, and to be written."""


class Blender:
    """Switches blends on the parts of one base, and remembers what it has attached for them.

    Call `clear` before adapters are attached or taken off.
    """

    def __init__(self) -> None:
        self._made: list[tuple[PeftModel, Blend]] = []

    @contextmanager
    def applied(self, parts: Mapping[str, PeftModel], blend: Blend) -> Iterator[None]:
        """The blend, and nothing else, answers inside the block.

        Args:
            parts: component -> model; one without any of the adapters answers as the base.
            blend: what to switch on.

        Raises:
            ConfigError: an adapter or type that cannot be combined; see `add_weighted_adapter`.
        """
        before = [(model, dict(model.switchboard.weights), model.switchboard.disabled) for model in parts.values()]
        try:
            for model in parts.values():
                self._switch(model, blend)
            yield
        finally:
            for model, weights, disabled in before:
                known = {name: value for name, value in weights.items() if name in model.peft_config}
                model.switchboard.weights, model.switchboard.disabled = known, disabled

    def _switch(self, model: PeftModel, blend: Blend) -> None:
        here = _here(model, blend)
        model.switchboard.disabled = not here
        if not here:
            return
        if blend.how == LIVE:
            model.set_adapter_weights(here)
            return
        if not any(made is model and kept == blend for made, kept in self._made):
            self._forget(model)
            combine(model, blend, BLEND)
            self._made.append((model, blend))
        model.set_adapter(BLEND, inference_mode=True)

    def _forget(self, model: PeftModel) -> None:
        if BLEND in model.peft_config:
            model.delete_adapter(BLEND)
        self._made = [(made, blend) for made, blend in self._made if made is not model]

    def clear(self) -> None:
        """Take off the combinations that were attached."""
        for model, _ in list(self._made):
            self._forget(model)


def _here(model: PeftModel, blend: Blend) -> dict[str, float]:
    return {name: float(weight) for name, weight in blend.weights.items() if name in model.peft_config}


def combine(model: PeftModel, blend: Blend, name: str) -> None:
    """Attach the blend to one model as an adapter of its own.

    `live` becomes what answers the same: of LoRA adapters `cat` and of IA3 adapters their vectors, both exact, of other
    methods the nearest LoRA of `blend.rank`.

    Raises:
        ConfigError: see `add_weighted_adapter`; or none of the adapters is on the model.
    """
    here = _here(model, blend)
    if not here:
        raise ConfigError(f"None of {', '.join(map(repr, blend.weights))} is attached here.")
    methods = {model.peft_config[adapter].method for adapter in here}
    names, weights = list(here), list(here.values())
    if blend.how == LIVE and methods == {"ia3"}:
        add_weighted_adapter(model, names, weights, name)
        # Their sum weakens what no adapter changes unless the weights sum to 1; live, l = 1 + sum_i w_i (l_i - 1).
        with torch.no_grad():
            for layer in model._layers[name]:
                assert isinstance(layer, AdapterLayer)
                layer.adapters[name].ia3_l.add_(1 - sum(weights))  # type: ignore[operator]
        return
    how = blend.how
    if how == LIVE:
        how = "cat" if methods == {"lora"} else "svd"
    density = blend.density if how not in ("svd", "cat", "linear") else None
    add_weighted_adapter(
        model,
        names,
        weights,
        name,
        combination_type=how,
        svd_rank=blend.rank if how.endswith("svd") else None,
        density=density,
        seed=blend.seed,
    )


def attach_blend(answerer: Any, blend: Blend, name: str) -> None:
    """Attach the blend to all parts of an answerer (`engine.answerers`) as an adapter of its own, a row like any other.

    It reads and goes on from the words that its first adapter was trained with.

    Raises:
        ConfigError: see `combine`; nothing is attached then.
    """
    able = [model for model in answerer.parts.values() if _here(model, blend)]
    if not able:
        raise ConfigError(f"None of {', '.join(map(repr, blend.weights))} is attached here.")
    made: list[PeftModel] = []
    try:
        for model in able:
            combine(model, blend, name)
            made.append(model)
    except BaseException:
        for model in made:
            model.delete_adapter(name)
        raise
    answerer._attached[name] = answerer._attached[next(iter(blend.weights))]


@torch.no_grad()
def blend_error(model: PeftModel, blend: Blend, name: str) -> float:
    """||dW - sum_i w_i dW_i|| / ||sum_i w_i dW_i|| over all layers, dW being the attached combination's change.

    0 where the adapters change nothing. Forms one layer's changes at a time.
    """
    here, off, whole = _here(model, blend), 0.0, 0.0
    for layer in model._layers[name]:
        if not isinstance(layer, AdapterLayer):
            continue
        base: nn.Module = layer.base_layer
        wanted = [w * layer._weights(n).delta_weight(base).double() for n, w in here.items() if n in layer.adapters]
        total = as_matrix(base, torch.stack(wanted).sum(0))
        made = as_matrix(base, layer._weights(name).delta_weight(base).double())
        off += float((made - total).square().sum())
        whole += float(total.square().sum())
    return (off / whole) ** 0.5 if whole else 0.0


def save_blend(parts: Mapping[str, PeftModel], blend: Blend, folder: str | Path) -> float:
    """Write the blend in PEFT's format, a pipeline's text encoders in folders of their names; gives its `blend_error`.

    Args:
        parts: component -> model; `unet`, or the only one, lies in the folder itself.
        blend: what to keep; none of its adapters is changed.
        folder: where to.

    Raises:
        ConfigError: see `combine`.
    """
    folder, errors = Path(folder), []
    able = {part: model for part, model in parts.items() if _here(model, blend)}
    if not able:
        raise ConfigError(f"None of {', '.join(map(repr, blend.weights))} is attached here.")
    for part, model in able.items():
        before = dict(model.switchboard.weights)
        combine(model, blend, KEPT)
        try:
            errors.append(blend_error(model, blend, KEPT))
            save_adapter(model, folder if part == "unet" or len(parts) == 1 else folder / part, KEPT)
        finally:
            model.delete_adapter(KEPT)
            model.switchboard.weights = before
    return max(errors)
