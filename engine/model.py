"""`PeftModel`: a base model with named adapters, in the shape of PEFT's API.

Attach, switch, weigh, mix rows, disable, merge and delete. All of it except merging is a change of the shared
`Switchboard`; the maths is in `engine.adapters`, the wrapping in `engine.inject`, the files in `engine.checkpoint`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from engine import prompts
from engine.adapters import ADAPTERS
from engine.adapters.base import AdapterConfig, AdapterSpec, Switchboard, TaskType
from engine.errors import ConfigError, EngineError, TargetError
from engine.inject import (
    HEADS,
    AdapterLayer,
    SavedModule,
    Wrapper,
    base_modules,
    find_targets,
    matches,
    module_at,
    replace_module,
    unwrapped,
    wrap,
    wrap_saved,
    wrappers,
)

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


def spec_of(config: AdapterConfig) -> AdapterSpec:
    """The registry's record for a config.

    Raises:
        ConfigError: the config belongs to no method of the registry.
    """
    method = str(getattr(config, "method", None))
    if method in ADAPTERS:
        return ADAPTERS[method]
    raise ConfigError(f"{type(config).__name__} belongs to no adapter method that is registered here.")


class BaseModel(nn.Module):
    """Holds the model one level down, so that parameters carry PEFT's prefix `base_model.model.`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


class PeftModel(nn.Module):
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
        self.base_model = BaseModel(model)
        self.peft_config: dict[str, AdapterConfig] = {}
        self.switchboard = Switchboard()
        self.shared = nn.ModuleDict()
        self.prompts = nn.ModuleDict()
        self._layers: dict[str, list[Wrapper]] = {}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            self.add_adapter(adapter_name, peft_config)
        except EngineError:
            for parameter in trained:
                parameter.requires_grad_(True)
            raise
        self.set_adapter(adapter_name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    # --- attaching and removing -------------------------------------------------------------------------------

    def add_adapter(self, adapter_name: str, peft_config: AdapterConfig) -> None:
        """Attach a fresh adapter; it contributes only after `set_adapter` or `set_adapter_weights`."""
        if not _ADAPTER_NAME.fullmatch(adapter_name):
            raise ConfigError(
                f"The adapter name {adapter_name!r} cannot be used.",
                "Use up to 64 letters, digits, dashes and underscores.",
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
        saved = self._saved_names(config)
        self._refuse_both(names, saved)
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
            weights.train(self.training)
            layer.attach(adapter_name, weights)
            layers.append(layer)
        for name in saved:
            module = wrap_saved(model, name, self.switchboard)
            module.copies[adapter_name] = copy.deepcopy(module.original_module)
            layers.append(module)
        layers += self._own_biases(adapter_name, config, names)
        if shared:
            self.shared[adapter_name] = shared[0]
        self.peft_config[adapter_name] = config
        self._layers[adapter_name] = layers
        self._trainable(adapter_name, False)

    def _refuse_both(self, targets: Sequence[str], saved: Sequence[str]) -> None:
        """A module is adapted or trained in full, not both, whichever adapter asks."""
        model = self.get_base_model()
        twice = [name for name in targets if name in saved or isinstance(module_at(model, name), SavedModule)]
        twice += [name for name in saved if isinstance(module_at(model, name), AdapterLayer)]
        if twice:
            raise TargetError(
                f"{', '.join(dict.fromkeys(twice))}: asked for both as a target and in modules_to_save.",
                "Take it out of one of the two.",
            )

    def _saved_names(self, config: Any) -> list[str]:
        """Modules trained in full: those asked for, and the head of a classifier, which starts at random."""
        asked = list(getattr(config, "modules_to_save", None) or ())
        heads = HEADS.get(config.task_type, ())
        wanted = [*asked, *heads]
        every = [name for name, _ in base_modules(self.get_base_model())]
        found = [name for name in every if matches(name, wanted)]
        for item in asked:
            # PEFT writes every name that a head can have into its files.
            if item not in heads and not any(matches(name, [item]) for name in found):
                raise TargetError(
                    f"modules_to_save names {item!r}, which {type(self.get_base_model()).__name__} does not have.",
                    f"Its direct parts are: {', '.join(n for n, _ in self.get_base_model().named_children())}.",
                )
        return found

    def _own_biases(self, adapter: str, config: Any, targets: Sequence[str]) -> list[Wrapper]:
        """A trainable copy of the base biases, so that training them leaves the base as it was."""
        mode = getattr(config, "bias", "none")
        if mode == "none":
            return []
        model = self.get_base_model()
        names = [name for name, _ in base_modules(model)] if mode == "all" else list(targets)
        added: list[Wrapper] = []
        for name in names:
            module = module_at(model, name)
            bias = unwrapped(module)._parameters.get("bias")
            if bias is None or isinstance(module, SavedModule):
                continue
            layer = wrap(model, name, self.switchboard)
            layer.biases[adapter] = nn.Parameter(bias.detach().float().clone())
            if name not in targets:
                added.append(layer)
        return added

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

    # --- switching and mixing ---------------------------------------------------------------------------------

    @property
    def active_adapters(self) -> list[str]:
        return list(self.switchboard.weights)

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_peft_config(self) -> AdapterConfig:
        return self.peft_config[self.active_adapters[0]]

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters, and no others, contribute with weight 1; they become the trainable ones."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self._known(name)
        self.switchboard.weights = dict.fromkeys(names, 1.0)
        for name, config in self.peft_config.items():
            self._trainable(name, name in names and not inference_mode and not config.inference_mode)

    def set_adapter_weights(self, weights: Mapping[str, float]) -> None:
        """Mix live: y = W x + sum_i w_i delta_i(x). Takes effect with the next forward pass; nothing is recomputed."""
        for name, value in weights.items():
            spec = spec_of(self._known(name))
            if spec.prompt is not None:
                prompts.check_weight(name, spec.title, value)
            elif not spec.mixable and len(weights) > 1:
                raise ConfigError(f"{name!r} is a {spec.title} adapter, which cannot be mixed with others.")
            if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
                raise ConfigError(f"The weight of {name!r} is {value!r}; needed: a number.")
        self.switchboard.weights = {name: float(value) for name, value in weights.items()}

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base alone inside the block, bit for bit."""
        before = self.switchboard.disabled
        merged = [
            (layer, dict(layer.merged))
            for _, layer in self.wrappers()
            if isinstance(layer, AdapterLayer) and layer.merged
        ]
        for layer, _ in merged:
            layer.unmerge()
        self.switchboard.disabled = True
        try:
            yield
        finally:
            self.switchboard.disabled = before
            for layer, weights in merged:
                layer.merge(weights)

    def _trainable(self, adapter: str, flag: bool) -> None:
        for parameter in self.adapter_parameters(adapter).values():
            parameter.requires_grad_(flag)

    def _known(self, name: str) -> AdapterConfig:
        if name not in self.peft_config:
            raise ConfigError(
                f"There is no adapter {name!r}.", f"This model has: {', '.join(self.peft_config) or 'none'}."
            )
        return self.peft_config[name]

    def wrappers(self) -> Iterator[tuple[str, Wrapper]]:
        return wrappers(self.get_base_model())

    def adapter_parameters(self, adapter: str = "default") -> dict[str, nn.Parameter]:
        """An adapter's own parameters by name: `<module>.lora_A.weight`, `<module>.bias`, `<saved module>.weight`."""
        found: dict[str, nn.Parameter] = {}
        for layer in self._layers[adapter]:
            if isinstance(layer, AdapterLayer):
                if adapter in layer.adapters:
                    for name, parameter in layer.adapters[adapter].named_parameters():
                        found[f"{layer.module_name}.{name}"] = parameter
                if adapter in layer.biases:
                    found[f"{layer.module_name}.bias"] = layer.biases[adapter]
            else:
                for name, parameter in layer.copies[adapter].named_parameters():
                    found[f"{layer.module_name}.{name}"] = parameter
        if adapter in self.prompts:
            found |= {f"prompt_encoder.{name}": p for name, p in self.prompts[adapter].named_parameters()}
        return found

    # --- running ----------------------------------------------------------------------------------------------

    def forward(self, *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """The base's forward. `adapter_names` gives each batch row its own adapter (None or `__base__`: the base)."""
        # Rows stay set until the next call: gradient checkpointing runs the layers again in the backward pass.
        self.switchboard.rows = self._rows(adapter_names)
        if self.prompts:
            return prompts.run(self, args, kwargs)
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """The base's generate, each batch row through its own adapter where `adapter_names` is given."""
        self.switchboard.rows = self._rows(adapter_names)
        try:
            if self.prompts:
                return prompts.generate(self, args, kwargs)
            return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]
        finally:
            self.switchboard.rows = None

    def virtual_tokens(self, adapter_names: Sequence[str | None] | None = None) -> int:
        """The places that virtual tokens take in the context, with the active adapters or with these of a batch."""
        return prompts.virtual_tokens(self, adapter_names)

    def _rows(self, names: Sequence[str | None] | None) -> list[str | None] | None:
        if names is None:
            return None
        rows = [None if name == "__base__" else name for name in names]
        for name in rows:
            if name is not None:
                self._known(name)
        return rows

    def get_base_model(self) -> nn.Module:
        model: nn.Module = self.base_model.model
        return model

    # --- merging ----------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: Sequence[str] | None = None) -> None:
        """Add the adapters' changes to the base weights, with their current mixing weights; again changes nothing.

        Raises:
            TargetError: a weight to change is shared with another module (a tied head), or is quantised.
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
        for layer in dict.fromkeys(layer for name in names for layer in self._layers[name]):
            if isinstance(layer, AdapterLayer):
                layer.merge(weights, keep)

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

    def unmerge_adapter(self) -> None:
        """Put the base weights back, bit for bit."""
        for _, layer in self.wrappers():
            if isinstance(layer, AdapterLayer):
                layer.unmerge()

    def merge_and_unload(self, adapter_names: Sequence[str] | None = None) -> nn.Module:
        """The plain base model with the active adapters' changes in its weights; the wrappers are gone."""
        self._merge(adapter_names, keep=False)
        weights = self.switchboard.weights
        names = list(adapter_names) if adapter_names is not None else list(weights)
        return self._strip(sorted(names, key=lambda name: -abs(weights.get(name, 1.0))))

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
            else:
                copies = [layer.copies[adapter] for adapter in keep if adapter in layer.copies]
                replace_module(model, name, copies[0] if copies else layer.original_module)
        self.peft_config, self._layers = {}, {}
        self.shared.clear()
        self.prompts.clear()
        self.switchboard.weights = {}
        return model

    # --- counting ---------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters; a packed 4-bit weight counts for the values it stands for."""
        trainable = total = 0
        for parameter in self.parameters():
            count = parameter.numel()
            if type(parameter).__name__ == "Params4bit":
                count *= 2 * parameter.element_size()
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # --- files ------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, selected_adapters: Sequence[str] | None = None) -> None:
        """Write the adapters in PEFT's format: `default` into the folder, any other into a folder of its name."""
        from engine.checkpoint import save_adapter

        for name in selected_adapters if selected_adapters is not None else list(self.peft_config):
            self._known(name)
            folder = Path(save_directory)
            save_adapter(self, folder if name == "default" else folder / name, name)

    def load_adapter(self, model_id: str | Path, adapter_name: str, is_trainable: bool = False) -> None:
        """Attach an adapter from a folder or a hub id; it contributes after `set_adapter`."""
        from engine.checkpoint import load_adapter

        load_adapter(self, model_id, adapter_name, is_trainable)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
    ) -> PeftModel:
        """The base with the adapter of a folder or hub id attached and active, frozen unless `is_trainable`."""
        from engine.checkpoint import read_config, read_weights, write_weights

        config, tensors = read_config(model_id).replace(inference_mode=True), read_weights(model_id)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        peft_model = model_class(config)(model, config, adapter_name)
        try:
            write_weights(peft_model, adapter_name, tensors)
            config = peft_model.peft_config[adapter_name]
            peft_model.peft_config[adapter_name] = config.replace(inference_mode=not is_trainable)
            peft_model.set_adapter(adapter_name)
        except EngineError:
            peft_model.unload()
            for parameter in trained:
                parameter.requires_grad_(True)
            raise
        if not is_trainable:
            peft_model.eval()
        return peft_model

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
    ) -> None:
        """A new adapter that combines others; see `engine.mixing` for the combination types."""
        from engine.mixing import add_weighted_adapter

        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, svd_rank)


class PeftModelForCausalLM(PeftModel):
    """A PeftModel for a language model."""


class PeftModelForSeq2SeqLM(PeftModel):
    """A PeftModel for an encoder-decoder model."""


class PeftModelForSequenceClassification(PeftModel):
    """A PeftModel for a classifier; its head is trained in full and saved with the adapter."""


class PeftModelForTokenClassification(PeftModel):
    """A PeftModel for a token classifier."""


class PeftModelForQuestionAnswering(PeftModel):
    """A PeftModel for extractive question answering."""


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


def get_peft_model(model: nn.Module, peft_config: AdapterConfig, adapter_name: str = "default") -> PeftModel:
    """Attach a fresh adapter to a model; the result trains only the adapter.

    Raises:
        TargetError, ConfigError: see `PeftModel`.
    """
    if not isinstance(model, nn.Module):
        raise EngineError(f"get_peft_model needs a torch module, not {type(model).__name__}.")
    return model_class(peft_config)(model, peft_config, adapter_name)
