"""Merging adapters into the base's weights, and taking the wrappers off."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from engine.errors import ConfigError, TargetError
from engine.inject import base_modules, module_at, replace_module, unwrapped
from engine.kernels import gated, norm, packed
from engine.layers import AdapterLayer
from engine.model_state import ModelState, spec_of

logger = logging.getLogger("engine.merging")


class Merging(ModelState):
    """The part of `PeftModel` that changes base weights."""

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = True) -> None:
        """Add the adapters' changes to the base weights, with their current mixing weights; again changes nothing.

        A weight that bitsandbytes quantised is dequantised, changed and quantised again: `merge_errors` has the error
        at each such layer, and the log a sentence. Unmerging is exact all the same.

        `safe_merge` is PEFT's: here a result that is not finite is refused in any case.

        Raises:
            TargetError: a weight to change is shared with another module (a tied head), or is quantised in groups.
            EngineError: the result is not finite.
        """
        self._merge(adapter_names, keep=True)

    def _merge(self, adapter_names: Sequence[str] | None, keep: bool) -> None:
        names = list(adapter_names) if adapter_names is not None else self.active_adapters
        for name in names:
            spec = spec_of(self._known(name))
            if not spec.mergeable:
                why = " It is virtual tokens, and changes no weight." if spec.prompt is not None else ""
                raise ConfigError(f"{name!r} is a {spec.title} adapter, which cannot be merged into a weight.{why}")
        self._refuse_tied(names)
        weights = {name: self.switchboard.weights.get(name, 1.0) for name in names}
        found = dict.fromkeys(layer for name in names for layer in self._layers[name])
        layers = [layer for layer in found if isinstance(layer, AdapterLayer)]
        former = [(layer, dict(layer.merged)) for layer in layers]
        if not keep:
            # What is not kept cannot be put back, so every layer is tried before one is changed.
            for layer in layers:
                layer.check_merge(weights)
        try:
            for layer in layers:
                layer.merge(weights, keep)
        except BaseException:
            for layer, before in former if keep else ():
                layer.unmerge()
                layer.merge(before)
            raise
        self._tell_errors()

    def _tell_errors(self) -> None:
        found = {
            name: layer.merge_error
            for name, layer in self.wrappers()
            if isinstance(layer, AdapterLayer) and layer.merge_error is not None
        }
        self.merge_errors = found
        if not found:
            return
        weight, change = ([getattr(error, part) for error in found.values()] for part in ("weight", "change"))
        logger.warning(
            "Merged into %d quantised layers. Rounding leaves a relative error of %.2g (worst %.2g) in their weights, "
            "which is %.2g times the adapter's change (worst %.2g). merge_into_full merges into the base in full "
            "precision instead.",
            len(found),
            sum(weight) / len(weight),
            max(weight),
            sum(change) / len(change),
            max(change),
        )

    def _refuse_tied(self, names: Sequence[str]) -> None:
        users: dict[int, list[str]] = {}
        for path, module in base_modules(self.get_base_model()):
            weight = unwrapped(module)._parameters.get("weight")
            if weight is not None:
                users.setdefault(id(weight), []).append(path)
        for name in names:
            for layer in self._layers[name]:
                if not isinstance(layer, AdapterLayer) or name not in layer.adapters:
                    continue
                shared = users.get(id(layer.base_layer._parameters.get("weight")), [])
                if len(shared) > 1:
                    raise TargetError(
                        f"{name!r} changes {layer.module_name}, whose weight is shared by {' and '.join(shared)}; "
                        "merging would change them all.",
                        "Keep the adapter unmerged, or untie the weights (tie_word_embeddings=False) before attaching.",
                    )

    def merged_layers(self) -> list[AdapterLayer]:
        return [layer for _, layer in self.wrappers() if isinstance(layer, AdapterLayer) and layer.merged]

    @contextmanager
    def unmerged(self) -> Iterator[None]:
        """The base's own weights inside the block; afterwards what was merged is merged again, with its weights."""
        before = [(layer, dict(layer.merged)) for layer in self.merged_layers()]
        for layer, _ in before:
            layer.unmerge()
        try:
            yield
        finally:
            for layer, weights in before:
                layer.merge({name: weight for name, weight in weights.items() if layer.holds(name)})

    def _unmerge_to_switch(self) -> None:
        """As in PEFT: other adapters, or other weights, take effect on the base's own weights alone."""
        merged = list(dict.fromkeys(name for layer in self.merged_layers() for name in layer.merged))
        if merged:
            warnings.warn(
                f"{', '.join(map(repr, merged))} was merged into the base; it is unmerged, so that the adapters that "
                "are switched on now answer alone.",
                stacklevel=3,
            )
            self.unmerge_adapter()

    def unmerge_adapter(self) -> None:
        """Put the base weights back, bit for bit."""
        for _, layer in self.wrappers():
            if isinstance(layer, AdapterLayer):
                layer.unmerge()
        self.merge_errors = {}

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = True, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The plain base model with the active adapters' changes in its weights; the wrappers are gone.

        `progressbar` and `safe_merge` are PEFT's: merging is short, and always checked.
        """
        self._merge(adapter_names, keep=False)
        weights = self.switchboard.weights
        names = list(adapter_names) if adapter_names is not None else list(weights)
        return self._strip(sorted(names, key=lambda name: -abs(weights.get(name, 1.0))))

    def merge_into_full(self, base: nn.Module | None = None, adapter_names: Sequence[str] | None = None) -> nn.Module:
        """The active adapters merged, with their mixing weights, into the base in full precision.

        For a quantised base: no error of requantising, and the merged model starts from the base's own weights. This
        model stays as it is.

        Args:
            base: the base in full precision, which is changed; loaded by the name of this one when left out.
            adapter_names: the adapters; the active ones when left out.

        Raises:
            ModelError: `base` is left out and the base cannot be loaded again.
            TargetError, ConfigError: `base` is quantised itself, or an adapter cannot be merged.
        """
        from engine.full import full_base, transplanted

        names = list(adapter_names) if adapter_names is not None else self.active_adapters
        twin: Any = transplanted(self, full_base(self.get_base_model()) if base is None else base, names)
        merged: nn.Module = twin.merge_and_unload(adapter_names=names)
        return merged

    def unload(self) -> nn.Module:
        """The plain base model as it was before the first adapter."""
        self.unmerge_adapter()
        return self._strip(())

    def _strip(self, keep: Sequence[str]) -> nn.Module:
        """The model without wrappers; a saved module is the copy of the first of `keep` that has one."""
        model = self.get_base_model()
        for name, layer in list(self.wrappers()):
            if isinstance(layer, AdapterLayer):
                replace_module(model, name, layer.base_layer)
                gated.remove(unwrapped(module_at(model, name.rpartition(".")[0])))
            else:
                copies = [layer.copies[adapter] for adapter in keep if adapter in layer.copies]
                replace_module(model, name, copies[0] if copies else layer.original_module)
        norm.remove(model)
        packed.remove(model)
        self.peft_config.clear()
        self._layers.clear()
        self.shared.clear()
        self.prompts.clear()
        self.switchboard.weights = {}
        return model
