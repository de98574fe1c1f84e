"""The wrappers around a base's modules: a layer with its adapters, and a module that adapters train in full.

A target is wrapped once, by whichever adapter comes first; later adapters join the same wrapper. The wrapper asks the
model's one `Switchboard` which adapters contribute, so switching and mixing touch no tensor and visit no layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine import bnb, kernels, stacked
from engine.adapters.base import CONV2D, AdapterWeights, Switchboard, layer_kind, master
from engine.errors import EngineError, TargetError
from engine.kernels.together import Siblings

PEFT_NAMES = {"scaling": "scale", "lora_dropout": "dropout"} | {
    name: name
    for name in (
        "r", "lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "ia3_l",
        "vera_lambda_b", "vera_lambda_d", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lokr_w1", "lokr_w2",
    )
}  # fmt: skip
"""What PEFT's layers hold by adapter -> the attribute of one adapter's weights here."""


class AdapterLayer(nn.Module):
    """A base layer and the adapters on it.

    Attributes:
        base_layer: the layer as the model had it; never changed except by `merge`.
        adapters: adapter name -> its weights here.
        biases: adapter name -> its own copy of the base bias, where the adapter trains biases.
        merged: adapter name -> the weight it was merged with.
        merge_error: what the last merge into a quantised weight cost; None otherwise.
        shifting: the adapters that also change the base layer's input.
        stack: what a mixed batch's adapters amount to here, between two calls.
        siblings: the adapted layers of the same module, which may read the same input.
    """

    base_layer: nn.Module
    adapters: nn.ModuleDict
    biases: nn.ParameterDict
    switchboard: Switchboard
    module_name: str
    merged: dict[str, float]
    shifting: set[str]
    merge_error: bnb.MergeError | None
    stack: stacked.Stack
    siblings: Siblings
    _before: dict[str, Tensor]
    _codes_before: tuple[Tensor, Any] | None

    def __init__(self, base: nn.Module, switchboard: Switchboard, name: str) -> None:
        super().__init__()
        # Past torch's __setattr__, which costs more than the rest of a layer's making.
        self._modules.update(base_layer=base, adapters=nn.ModuleDict(), biases=nn.ParameterDict())
        self.__dict__.update(
            switchboard=switchboard,
            module_name=name,
            merged={},
            shifting=set(),
            merge_error=None,
            stack=stacked.Stack(),
            siblings=Siblings(),
            _before={},
            _codes_before=None,
        )

    def __getattr__(self, name: str) -> Any:
        """Whatever the model's own code reads off the layer (`weight`, `in_features`, ...) is the base layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
        if name in PEFT_NAMES:
            found = {adapter: getattr(w, PEFT_NAMES[name], None) for adapter, w in self.adapters.items()}
            held = {adapter: value for adapter, value in found.items() if value is not None}
            if held:
                return held
        return getattr(self.base_layer, name)

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters that are here."""
        return [adapter for adapter in self.switchboard.weights if self.holds(adapter)]

    @property
    def merged_adapters(self) -> list[str]:
        return list(self.merged)

    @property
    def disable_adapters(self) -> bool:
        return self.switchboard.disabled

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the base's weight (its shape) that an adapter amounts to, in float32."""
        weights = self.adapters[adapter]
        assert isinstance(weights, AdapterWeights)
        return weights.delta_weight(bnb.dense(self.base_layer) if bnb.is_packed(self.base_layer) else self.base_layer)

    def holds(self, adapter: str) -> bool:
        return adapter in self.adapters or adapter in self.biases

    def attach(self, adapter: str, weights: AdapterWeights) -> None:
        self.adapters[adapter] = weights
        if weights.shifts_input:
            self.shifting.add(adapter)
        self.stack.forget()

    def train(self, mode: bool = True) -> AdapterLayer:
        super().train(mode)
        self.stack.forget()
        self.siblings.release()
        return self

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        board = self.switchboard
        if board.disabled:
            return self.base_layer(x, *args, **kwargs)
        if not (args or kwargs):
            shared = self.siblings.output(self, x)
            if shared is not None:
                return shared
            parts = self.parts(x)
            if parts is not None:
                return parts.output(x)
        y = self.base_layer(self._shifted(x) if self.shifting else x, *args, **kwargs)
        out = y
        if self.shifting and self._reads_output():
            y = self.base_layer(x, *args, **kwargs)
        if board.rows is not None:
            return stacked.changed(self, x, y, out, board.rows)
        for adapter, weight in board.weights.items():
            if weight and adapter not in self.merged:
                change = self._change(adapter, x, y, weight)
                if change is not None:
                    out = out + change.to(y.dtype)
        return out

    def parts(self, x: Tensor) -> Any:
        """The layer and its adapter as one autograd node, where one adapter is active here and its method has that."""
        board = self.switchboard
        if torch.is_grad_enabled():
            # Not every optimizer tells a tensor that it was changed, bitsandbytes' do not.
            self.stack.forget()
        if board.disabled or board.rows is not None or self.shifting or not kernels.enabled():
            return None
        here = [(name, weight) for name, weight in board.weights.items() if weight and self.holds(name)]
        active = [(name, weight) for name, weight in here if name not in self.merged]
        if len(active) != 1 or active[0][0] in self.biases:
            return None
        adapter, weight = active[0]
        return self._weights(adapter).parts(x, self.base_layer, weight)

    def _shifted(self, x: Tensor) -> Tensor:
        """The base layer's input with what adapters add to it."""
        board, y = self.switchboard, x
        if board.rows is not None:
            for adapter, weight, index in stacked.parts(self, x, board.rows):
                if adapter in self.shifting:
                    y = y.index_add(0, index, self._shift_of(adapter, x.index_select(0, index), weight))
            return y
        for adapter, weight in board.weights.items():
            if weight and adapter in self.shifting and adapter not in self.merged:
                y = y + self._shift_of(adapter, x, weight)
        return y

    def _reads_output(self) -> bool:
        """Whether an input is shifted beside an adapter that reads the output for the input as it came."""
        board = self.switchboard
        for mix in [tuple(board.weights.items())] if board.rows is None else board.rows:
            active = [name for name, weight in mix if weight and name in self.adapters and name not in self.merged]
            weights = [self._weights(name) for name in active]
            if any(w.shifts_input for w in weights) and any(w.reads_base and not w.shifts_input for w in weights):
                return True
        return False

    def _weights(self, adapter: str) -> AdapterWeights:
        weights = self.adapters[adapter]
        assert isinstance(weights, AdapterWeights)
        if self.merged and weights.reads_base:
            raise EngineError(
                f"{adapter!r} builds on the base weight of {self.module_name}, which now holds "
                f"{', '.join(map(repr, self.merged))}.",
                "Merge both (merge_adapter), or unmerge_adapter() first.",
            )
        return weights

    def _shift_of(self, adapter: str, x: Tensor, weight: float) -> Tensor:
        return self._weights(adapter).shift_input(x, weight).to(x.dtype)

    def _change(self, adapter: str, x: Tensor, y: Tensor, weight: float) -> Tensor | None:
        change: Tensor | None = None
        if adapter in self.adapters:
            change = self._weights(adapter).delta(x, y, self.base_layer, weight)
        if adapter in self.biases:
            shift = self._shift(adapter) * weight
            if layer_kind(self.base_layer) == CONV2D:
                shift = shift[None, :, None, None]
            change = shift.to(y.dtype) if change is None else change + shift.to(change.dtype)
        return change

    def _shift(self, adapter: str) -> Tensor:
        # What the bias was before any merge: the difference to a merged one would count other adapters twice.
        base_bias = self._before.get("bias", self.base_layer.bias)
        assert isinstance(base_bias, Tensor)
        own: Tensor = self.biases[adapter]
        return own.float() - base_bias.float().to(own.device)

    @torch.no_grad()
    def merge(self, weights: Mapping[str, float], keep: bool = True) -> None:
        """W += sum of weight * dW over adapters (name -> weight); those already merged stay so, with their weights.

        Each dW is of the base's own weight, so all are taken before any is added. `keep` stores the former tensors on
        the CPU, so that `unmerge` is exact to the bit. A quantised weight is dequantised, changed and rounded to its
        codes again; `merge_error` then says what that cost.
        """
        new = {name: weight for name, weight in weights.items() if name not in self.merged and self.holds(name)}
        if not new:
            return
        former, every = dict(self.merged), {**self.merged, **new}
        self.unmerge()
        try:
            base, merged = self._planned(every)
        except BaseException:
            self.merge(former)
            raise
        for name, tensor in merged.items():
            if bnb.is_packed(self.base_layer) and name == "weight":
                self._requantize(tensor, base, keep)
                continue
            target = getattr(base, name)
            if keep and target.device.type == "cpu":
                # The two change places, and nothing is copied.
                self._before[name], target.data = target.data, tensor
                continue
            if keep:
                self._before[name] = target.detach().to("cpu", copy=True)
            target.copy_(tensor)
        self.merged = every

    @torch.no_grad()
    def check_merge(self, weights: Mapping[str, float]) -> None:
        """Raises what `merge` would, and changes nothing."""
        if self._surely_merges(weights):
            return
        former = dict(self.merged)
        self.unmerge()
        try:
            self._planned({**{name: weight for name, weight in weights.items() if self.holds(name)}, **former})
        finally:
            self.merge(former)

    def _surely_merges(self, weights: Mapping[str, float]) -> bool:
        """Whether a look at the thin matrices shows already that merging cannot fail."""
        here = [name for name in weights if self.holds(name)]
        if self.merged or len(here) != 1 or here[0] in self.biases:
            return False
        factors = self._factors(here[0])
        if factors is None:
            return False
        left, right = factors
        most = abs(weights[here[0]]) * left.shape[1] * left.abs().max() * right.abs().max()
        # Far below the largest number of any format; not true of what is not finite.
        return bool(most < 1e4)

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        """The adapter's change of a plain weight as two thin matrices, where that is all that it changes."""
        weight = self.base_layer.weight
        if adapter in self.biases or not isinstance(weight, Tensor) or not weight.is_floating_point():
            return None
        weights = self.adapters[adapter]
        assert isinstance(weights, AdapterWeights)
        return weights.factors(self.base_layer)

    def _planned(self, weights: Mapping[str, float]) -> tuple[nn.Module, dict[str, Tensor]]:
        """The base layer, dequantised if it is packed; by name, what its tensors become.

        Raises:
            TargetError: the base cannot take a change up.
            EngineError: the result is not finite.
        """
        base = bnb.dense(self.base_layer) if bnb.is_packed(self.base_layer) else self.base_layer
        sums: dict[str, Tensor] = {}
        for adapter, weight in weights.items():
            factors = self._factors(adapter)
            if factors is not None:
                own = sums.get("weight", master(base.weight))  # type: ignore[arg-type]
                sums["weight"] = torch.addmm(own, *(t.to(own) for t in factors), alpha=weight)
                continue
            for name, change in self._weight_changes(adapter, base).items():
                if getattr(base, name) is None:
                    if not change.any():
                        continue
                    raise TargetError(
                        f"{self.module_name} has no bias to merge {adapter!r}'s bias into.",
                        "Keep the adapter unmerged.",
                    )
                own = sums.get(name, master(getattr(base, name)))
                sums[name] = torch.add(own, change.to(own), alpha=weight)
        merged = {name: tensor.to(getattr(base, name).dtype) for name, tensor in sums.items()}
        self._check_finite(weights, merged)
        return base, merged

    def _check_finite(self, weights: Mapping[str, float], merged: Mapping[str, Tensor]) -> None:
        for tensor in merged.values():
            # A sum is finite only over finite values; it makes no second matrix, as looking at each value does.
            if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
                raise EngineError(
                    f"Merging {' and '.join(map(repr, weights))} into {self.module_name} gives values that are not "
                    "finite; nothing is merged.",
                    "The adapter is damaged or diverged; train it again or use an earlier checkpoint.",
                )

    def _requantize(self, weight: Tensor, former: nn.Module, keep: bool) -> None:
        assert isinstance(former.weight, Tensor)
        if keep:
            self._codes_before = bnb.snapshot(self.base_layer)
        bnb.requantize(self.base_layer, weight)
        self.merge_error = bnb.merge_error(weight, bnb.dequantized(self.base_layer), weight - former.weight)

    def _weight_changes(self, adapter: str, base: nn.Module) -> dict[str, Tensor]:
        """Name of a tensor of the base -> what the adapter adds to it at weight 1; `base` is not packed."""
        changes: dict[str, Tensor] = {}
        if adapter in self.adapters:
            weights = self.adapters[adapter]
            assert isinstance(weights, AdapterWeights)
            changes = weights.merge_changes(base, self.module_name)
        if adapter in self.biases:
            changes["bias"] = changes.get("bias", 0) + self._shift(adapter)
        return changes

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the former tensors back."""
        for name, tensor in self._before.items():
            target = getattr(self.base_layer, name)
            if target.device == tensor.device and target.dtype == tensor.dtype:
                target.data = tensor
            else:
                target.copy_(tensor)
        self._before.clear()
        if self._codes_before is not None:
            bnb.restore(self.base_layer, self._codes_before)
            self._codes_before = None
        self.merge_error = None
        self.merged.clear()

    def drop(self, adapter: str) -> None:
        for holder in (self.adapters, self.biases):
            if adapter in holder:
                del holder[adapter]
        self.shifting.discard(adapter)
        self.stack.forget()


class SavedModule(nn.Module):
    """A module that adapters train in full (`modules_to_save`): the original, and a copy for each adapter.

    With several active adapters the copy of the one with the largest weight answers; outputs of heads do not add up.
    """

    def __init__(self, original: nn.Module, switchboard: Switchboard, name: str) -> None:
        super().__init__()
        self.original_module = original
        self.copies = nn.ModuleDict()
        self.switchboard = switchboard
        self.module_name = name

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "copies"):
                raise
            return getattr(self.current(), name)

    def holds(self, adapter: str) -> bool:
        return adapter in self.copies

    def current(self) -> nn.Module:
        board = self.switchboard
        return self.original_module if board.disabled else self._answering(board.weights.items())

    def _answering(self, mix: Iterable[tuple[str, float]]) -> nn.Module:
        here = {name: weight for name, weight in mix if name in self.copies and weight}
        return self.copies[max(here, key=lambda name: abs(here[name]))] if here else self.original_module

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = self.switchboard.rows
        if rows is None or self.switchboard.disabled:
            return self.current()(x, *args, **kwargs)
        times = x.shape[0] // len(rows)
        parts, order = [], []
        answering = [self._answering(mix) for mix in rows]
        for module in dict.fromkeys(answering):
            index = [i * times + k for i, own in enumerate(answering) if own is module for k in range(times)]
            parts.append(module(x[index], *args, **kwargs))
            order += index
        return torch.cat(parts)[torch.argsort(torch.tensor(order, device=x.device))]

    def drop(self, adapter: str) -> None:
        if adapter in self.copies:
            del self.copies[adapter]


Wrapper = AdapterLayer | SavedModule
