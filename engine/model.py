"""`PeftModel`: a base model with named adapters, in the shape of PEFT's API.

Attach, switch, weigh, mix rows, disable and delete. All of it is a change of the shared `Switchboard`; the maths is in
`engine.adapters`, the wrapping in `engine.inject`, merging in `engine.merging`, the files in `engine.checkpoint`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import bnb, hooks, kernels, prompts, rows
from engine.adapters.base import AdapterConfig, Switchboard, TaskType, filled_from_file
from engine.attaching import check_row, check_weights, oriented, own_biases, refuse_both, saved_names
from engine.compat import BaseSignature, PeftCalls, check_loading, subfolder_of
from engine.errors import ConfigError, EngineError
from engine.inject import find_targets, module_at, unwrapped, wrap, wrap_saved, wrappers
from engine.kernels import norm, packed
from engine.layers import AdapterLayer, Wrapper
from engine.model_state import BaseModel
from engine.model_state import spec_of as spec_of
from engine.rows import Row

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
# torch's containers keep their entries as attributes, so these names are taken: "half", "train", "update" and others.
_TAKEN = frozenset([*dir(nn.ModuleDict()), *dir(nn.ParameterDict())])


class PeftModel(PeftCalls):
    """A base model with adapters.

    Args:
        model: any torch module; it is wrapped in place and frozen.
        peft_config: the first adapter's config.
        adapter_name: its name: letters, digits, dashes and underscores.

    Raises:
        TargetError: the config's targets are not in the model.
        ConfigError: the model already carries adapters, or the name cannot be used.
    """

    def __init__(self, model: nn.Module, peft_config: AdapterConfig, adapter_name: str = "default") -> None:
        super().__init__()
        if isinstance(model, PeftModel) or next(wrappers(model), None) is not None:
            raise ConfigError(
                "The model already carries adapters.", "Call add_adapter on it, or unload() to take them off first."
            )
        self.peft_config: dict[str, AdapterConfig] = {}
        self.switchboard = Switchboard()
        self.shared = nn.ModuleDict()
        self.prompts = nn.ModuleDict()
        self._layers: dict[str, list[Wrapper]] = {}
        self.base_model = BaseModel(bnb.steady(model), self)
        self.merge_errors: dict[str, bnb.MergeError] = {}
        self.shared = nn.ModuleDict()
        # A loop that adds the methods' extra loss by itself (engine.train.loop) says False.
        self.adds_extra_loss = True
        self._unasked = True
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        # Before the wrappers come, which are most of the modules then.
        norm.install(model)
        try:
            self.add_adapter(adapter_name, peft_config)
        except EngineError:
            norm.remove(model)
            for parameter in trained:
                parameter.requires_grad_(True)
            raise
        self.set_adapter(adapter_name)

    # --- attaching and removing -------------------------------------------------------------------------------

    def add_adapter(self, adapter_name: str, peft_config: AdapterConfig) -> None:
        """Attach a fresh adapter; it contributes only after `set_adapter` or `set_adapter_weights`."""
        if not _ADAPTER_NAME.fullmatch(adapter_name):
            raise ConfigError(
                f"The adapter name {adapter_name!r} cannot be used.",
                "Use up to 64 letters, digits, dashes and underscores.",
            )
        if adapter_name in _TAKEN:
            raise ConfigError(
                f"The adapter name {adapter_name!r} cannot be used: torch's modules have an attribute of that name.",
                f"Choose another name, such as {adapter_name + '_adapter'!r}.",
            )
        if adapter_name in self.peft_config:
            raise ConfigError(
                f"There is already an adapter {adapter_name!r}.", "Choose another name or delete_adapter it first."
            )
        model, spec = self.get_base_model(), spec_of(peft_config)
        origin = peft_config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
        config = peft_config.replace(base_model_name_or_path=origin)
        names: list[str] = []
        if spec.prompt is None:
            names, wanted = find_targets(model, config, spec.layers)
            config = config.replace(target_modules=wanted).settled(names)
        saved = saved_names(model, config)
        refuse_both(model, names, saved)
        # A start, a norm or a bias is taken from the base's own weights, not from those of a merged adapter.
        with self.unmerged():
            config, layers, shared = self._attach(adapter_name, config, names, saved)
        if shared:
            self.shared[adapter_name] = shared[0]
        self.peft_config[adapter_name] = config
        self._layers[adapter_name] = layers
        self._trainable(adapter_name, False)

    def _attach(
        self, adapter_name: str, config: AdapterConfig, names: list[str], saved: list[str]
    ) -> tuple[AdapterConfig, list[Wrapper], tuple[Any, ...]]:
        """Its weights on the modules `names` and copies of `saved`: (config, wrappers, shared state)."""
        model, spec = self.get_base_model(), spec_of(config)
        config = oriented(model, config, names)
        # Everything that can fail comes before the first wrapper, so a refused adapter leaves the model as it was.
        bases = {name: unwrapped(module_at(model, name)) for name in names}
        shared = (spec.share(bases, config),) if spec.share else ()
        built = [(name, spec.build(base, config, name, *shared)) for name, base in bases.items()]
        if spec.prompt is not None:
            config = config.fitted(model)  # type: ignore[attr-defined]
            prompt = spec.prompt(model.get_input_embeddings(), config)  # type: ignore[operator]
            self.prompts[adapter_name] = prompt.train(self.training)
        layers: list[Wrapper] = []
        for name, weights in built:
            layer = wrap(model, name, self.switchboard)
            if not self.training:
                weights.eval()
            layer.attach(adapter_name, weights)
            layers.append(layer)
        for name in saved:
            module = wrap_saved(model, name, self.switchboard)
            module.copies[adapter_name] = copy.deepcopy(module.original_module)
            layers.append(module)
        layers += own_biases(model, self.switchboard, adapter_name, config, names)
        return config, layers, shared

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the only active one, the first that is left becomes active."""
        self._known(adapter_name)
        for layer in self._layers.pop(adapter_name):
            if isinstance(layer, AdapterLayer) and adapter_name in layer.merged:
                layer.unmerge()
            layer.drop(adapter_name)
        for holder in (self.shared, self.prompts):
            if adapter_name in holder:
                del holder[adapter_name]
        del self.peft_config[adapter_name]
        self.switchboard.weights.pop(adapter_name, None)
        if not self.switchboard.weights and self.peft_config:
            self.set_adapter(next(iter(self.peft_config)))

    def match_base_dtype(self, adapter_name: str) -> None:
        """An adapter's parameters in the number format of their base layers, where that is a floating-point one."""
        for layer in self._layers[adapter_name]:
            weight = getattr(layer.base_layer, "weight", None) if isinstance(layer, AdapterLayer) else None
            if weight is not None and weight.is_floating_point() and adapter_name in layer.adapters:
                layer.adapters[adapter_name].to(weight.dtype)

    # --- switching and mixing ---------------------------------------------------------------------------------

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_peft_config(self) -> AdapterConfig:
        if not self.active_adapters:
            there = ", ".join(self.peft_config)
            raise ConfigError(
                "No adapter is active, so there is no active config.",
                f"Call set_adapter with one of: {there}." if there else "Attach one with add_adapter or load_adapter.",
            )
        return self.peft_config[self.active_adapters[0]]

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters, and no others, contribute with weight 1; they become the trainable ones, as in PEFT.

        Also one that was loaded frozen: `inference_mode` keeps it so.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self._known(name)
        self._unmerge_to_switch()
        self.switchboard.weights = dict.fromkeys(names, 1.0)
        for name, config in list(self.peft_config.items()):
            trained = name in names and not inference_mode
            if name in names:
                self.peft_config[name] = config.replace(inference_mode=inference_mode)
            self._trainable(name, trained)

    def set_adapter_weights(self, weights: Mapping[str, float]) -> None:
        """Mix live: y = W x + sum_i w_i delta_i(x). Takes effect with the next forward pass; nothing is recomputed."""
        check_weights(self, weights)
        self._unmerge_to_switch()
        self.switchboard.weights = {name: float(value) for name, value in weights.items()}

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base alone inside the block, bit for bit."""
        before = self.switchboard.disabled
        with self.unmerged():
            self.switchboard.disabled = True
            try:
                yield
            finally:
                self.switchboard.disabled = before

    def _trainable(self, adapter: str, flag: bool) -> None:
        for parameter in self.adapter_parameters(adapter).values():
            parameter.requires_grad_(flag)

    # --- running ----------------------------------------------------------------------------------------------

    @BaseSignature
    def forward(self, *args: Any, adapter_names: Sequence[Row] | None = None, **kwargs: Any) -> Any:
        """The base's forward. `adapter_names` gives each batch row its own adapter, or a mix as name -> weight (None or
        `__base__`: the base).

        In training, the loss of a method that has a term of its own (AdaLoRA) contains it.
        """
        if self._unasked and self.training and torch.is_grad_enabled() and kernels.enabled():
            self._unasked = False
            packed.speed_up(self.get_base_model())
        with self._mixed(adapter_names, args, kwargs):
            outputs = prompts.run(self, args, kwargs) if self.prompts else self.base_model(*args, **kwargs)
        if self.training and self.adds_extra_loss and getattr(outputs, "loss", None) is not None:
            for name in self.switchboard.weights:
                extra = None if self.peft_config[name].inference_mode else hooks.extra_loss(self, name)
                if extra is not None:
                    outputs.loss = outputs.loss + extra
        return outputs

    def generate(self, *args: Any, adapter_names: Sequence[Row] | None = None, **kwargs: Any) -> Any:
        """The base's generate, each batch row through its own adapter or mix where `adapter_names` is given."""
        with self._mixed(adapter_names, args, kwargs):
            if self.prompts:
                return prompts.generate(self, args, kwargs)
            return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    def virtual_tokens(self, adapter_names: Sequence[Row] | None = None) -> int:
        """The places that virtual tokens take in the context, with the active adapters or with these of a batch."""
        return prompts.virtual_tokens(self, adapter_names)

    def _mixed(self, names: Sequence[Row] | None, args: Any, kwargs: Any) -> AbstractContextManager[None]:
        """The rows' adapters for the time of a call."""
        if names is None:
            return nullcontext()
        answering = self.answering(names)
        rows.check_count(names, args, kwargs)
        return answering

    def answering(self, adapter_names: Sequence[Row]) -> AbstractContextManager[None]:
        """Each batch row through its own adapter or mix inside the block, whoever calls the base or a part of it.

        A batch n times as long has n rows a name, in order. Virtual tokens are left to `forward` and `generate`.

        Raises:
            ConfigError: an adapter is not attached or cannot be mixed so.
        """
        for row in adapter_names:
            check_row(self, row)
        chosen = [rows.mix_of(row) for row in adapter_names]
        return rows.mixed(self.switchboard, self.get_base_model(), chosen)

    # --- files ------------------------------------------------------------------------------------------------

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Attach an adapter from a folder or a hub id; it contributes, and trains, after `set_adapter`.

        `kwargs` are PEFT's arguments for where tensors go (`torch_device` and others), which change nothing here.
        """
        from engine.checkpoint import load_adapter

        check_loading(kwargs)
        load_adapter(self, subfolder_of(model_id, subfolder), adapter_name, is_trainable)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: AdapterConfig | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The base with the adapter of a folder or hub id attached and active, frozen unless `is_trainable`.

        `config` takes the place of the folder's; `kwargs` are PEFT's arguments for where tensors go, which change
        nothing here.
        """
        from engine.checkpoint import as_trained, read_config, read_weights, write_weights

        check_loading(kwargs)
        model_id = subfolder_of(model_id, subfolder)
        config = config or read_config(model_id)
        tensors = read_weights(model_id)
        config = as_trained(model, config, tensors).replace(inference_mode=True)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with filled_from_file():
            peft_model = model_class(config)(model, config, adapter_name)
        try:
            write_weights(peft_model, adapter_name, tensors)
            config = peft_model.peft_config[adapter_name]
            peft_model.peft_config[adapter_name] = config.replace(inference_mode=not is_trainable)
            peft_model.set_adapter(adapter_name, inference_mode=not is_trainable)
        except EngineError:
            peft_model.unload()
            for parameter in trained:
                parameter.requires_grad_(True)
            raise
        if not is_trainable:
            peft_model.eval()
        return peft_model

    def load_adapters(self, model_id: str | Path, is_trainable: bool = False) -> list[str]:
        """Attach every adapter that `save_pretrained` wrote into a folder, and return their names.

        Those that were active stay so. The one in the folder itself is `default`, the others have their folders' names.
        """
        from engine.checkpoint import load_adapters, saved_adapters

        found = saved_adapters(model_id, self.get_base_model())
        load_adapters(self, found, is_trainable)
        return list(found)

    @classmethod
    def from_pretrained_all(cls, model: nn.Module, model_id: str | Path, is_trainable: bool = False) -> PeftModel:
        """The base with every adapter of a folder or hub id attached; the first is active (see `load_adapters`)."""
        from engine.checkpoint import load_adapters, saved_adapters

        found = saved_adapters(model_id, model)
        first = next(iter(found))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        peft_model = cls.from_pretrained(model, found.pop(first), first, is_trainable)
        try:
            load_adapters(peft_model, found, is_trainable)
        except EngineError:
            peft_model.unload()
            for parameter in trained:
                parameter.requires_grad_(True)
            raise
        return peft_model

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str | None = None,
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        seed: int | None = None,
    ) -> None:
        """A new adapter that combines others; see `engine.mixing.add_weighted_adapter`."""
        from engine.mixing import add_weighted_adapter

        svd = (svd_rank, svd_clamp, svd_full_matrices, svd_driver)
        add_weighted_adapter(
            self, adapters, weights, adapter_name, combination_type, *svd, density, majority_sign_method, seed
        )


class PeftMixedModel(PeftModel):
    """A PeftModel by the name that PEFT gives it with adapters of several methods; every PeftModel takes them."""


class PeftModelForCausalLM(PeftModel):
    """A PeftModel for a language model."""

    LABELS = ("labels",)


class PeftModelForSeq2SeqLM(PeftModel):
    """A PeftModel for an encoder-decoder model."""

    LABELS = ("labels",)


class PeftModelForSequenceClassification(PeftModel):
    """A PeftModel for a classifier; its head is trained in full and saved with the adapter."""

    LABELS = ("labels",)


class PeftModelForTokenClassification(PeftModel):
    """A PeftModel for a token classifier."""

    LABELS = ("labels",)


class PeftModelForQuestionAnswering(PeftModel):
    """A PeftModel for extractive question answering."""

    LABELS = ("start_positions", "end_positions")


class PeftModelForFeatureExtraction(PeftModel):
    """A PeftModel for an encoder."""


_BY_TASK: dict[TaskType, type[PeftModel]] = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def model_class(config: AdapterConfig) -> type[PeftModel]:
    return _BY_TASK.get(config.task_type, PeftModel) if isinstance(config.task_type, TaskType) else PeftModel


def get_peft_model(
    model: nn.Module,
    peft_config: AdapterConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
) -> PeftModel:
    """Attach a fresh adapter to a model; the result trains only the adapter.

    Args:
        mixed: PEFT's switch for adapters of several methods; only the class's name differs.
        autocast_adapter_dtype: False keeps the adapter in the number format of the layer that it is on, where that is
            one of floating-point numbers; otherwise it is float32, which small steps need.

    Raises:
        TargetError, ConfigError: see `PeftModel`.
    """
    if not isinstance(model, nn.Module):
        raise EngineError(f"get_peft_model needs a torch module, not {type(model).__name__}.")
    found = (PeftMixedModel if mixed else model_class(peft_config))(model, peft_config, adapter_name)
    if not autocast_adapter_dtype:
        found.match_base_dtype(adapter_name)
    return found
