"""Calls of PEFT's API that scripts make beside the main ones: states, layers on and off, the hub, helpers."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from engine.adapters.base import AdapterConfig
from engine.errors import ConfigError, UnsafeFileError
from engine.layers import AdapterLayer, SavedModule, Wrapper
from engine.merging import Merging

LOADING = frozenset(
    {
        "torch_device",
        "device_map",
        "max_memory",
        "offload_folder",
        "offload_dir",
        "low_cpu_mem_usage",
        "ephemeral_gpu_offload",
        "torch_dtype",
        "dtype",
    }
)
"""Arguments by which PEFT's callers say where tensors go. Here they always go to where the base's are, in float32."""


def check_loading(given: Mapping[str, Any]) -> None:
    """Takes the arguments that change nothing here, and refuses the others by name.

    Raises:
        TypeError: an argument that nothing here knows, as Python does.
        ConfigError: a revision, which only `AutoPeftModel` and the hub's own client can fetch.
    """
    if given.get("revision") not in (None, "main"):
        raise ConfigError(
            f"revision is {given['revision']!r}; adapters are loaded as they stand on the hub's main branch.",
            "Fetch that revision with huggingface_hub.snapshot_download and give its folder.",
        )
    unknown = sorted(set(given) - LOADING - {"revision"})
    if unknown:
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}; known: {', '.join(sorted(LOADING))}")


def subfolder_of(model_id: str | Path, subfolder: str | None) -> str | Path:
    """The folder of an adapter that lies below another one, here or on the hub."""
    if not subfolder:
        return model_id
    from engine.checkpoint import adapter_folder
    from engine.paths import inside

    return inside(adapter_folder(model_id, every=True), subfolder)


@dataclass(frozen=True)
class TunerLayerStatus:
    """One wrapped module, by PEFT's field names."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]


@dataclass(frozen=True)
class TunerModelStatus:
    """A whole model, by PEFT's field names; `irregular` where layers differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str] | str
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]


def _own(layer: Wrapper, adapter: str) -> list[nn.Parameter]:
    if isinstance(layer, SavedModule):
        return list(layer.copies[adapter].parameters())
    found = list(layer.adapters[adapter].parameters()) if adapter in layer.adapters else []
    return [*found, *([layer.biases[adapter]] if adapter in layer.biases else [])]


def _trained(parameters: list[nn.Parameter]) -> bool | str:
    flags = {parameter.requires_grad for parameter in parameters}
    return flags.pop() if len(flags) == 1 else "irregular"


class PeftCalls(Merging):
    """The part of `PeftModel` that other libraries and scripts look for by PEFT's names."""

    def enable_adapter_layers(self) -> None:
        """The active adapters contribute again."""
        self.switchboard.disabled = False

    def disable_adapter_layers(self) -> None:
        """The base alone answers, until `enable_adapter_layers`; `disable_adapter` does the same for a block."""
        self.unmerge_adapter()
        self.switchboard.disabled = True

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names of modules that adapters train in full; None where there are none."""
        names = {layer.module_name for _, layer in self.wrappers() if isinstance(layer, SavedModule)}
        return names or None

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The state of every wrapped module."""
        board = self.switchboard
        found = []
        for name, layer in self.wrappers():
            here = [adapter for adapter in self.peft_config if layer.holds(adapter)]
            found.append(
                TunerLayerStatus(
                    name=name,
                    module_type=type(layer).__name__,
                    enabled=not board.disabled,
                    active_adapters=[adapter for adapter in board.weights if adapter in here],
                    merged_adapters=list(layer.merged) if isinstance(layer, AdapterLayer) else [],
                    requires_grad={adapter: _trained(_own(layer, adapter)) for adapter in here},
                    available_adapters=here,
                    devices={adapter: sorted({str(p.device) for p in _own(layer, adapter)}) for adapter in here},
                )
            )
        return found

    def get_model_status(self) -> TunerModelStatus:
        """The state of the model as a whole."""
        layers = self.get_layer_status()
        trainable, total = self.get_nb_trainable_parameters()
        merged = {tuple(layer.merged_adapters) for layer in layers if layer.module_type == "AdapterLayer"}
        owned = {name: list(self.adapter_parameters(name).values()) for name in self.peft_config}
        return TunerModelStatus(
            base_model_type=type(self.get_base_model()).__name__,
            adapter_model_type=type(self).__name__,
            peft_types={name: config.peft_type.value for name, config in self.peft_config.items()},
            trainable_params=trainable,
            total_params=total,
            num_adapter_layers=len(layers),
            enabled=not self.switchboard.disabled,
            active_adapters=self.active_adapters,
            merged_adapters=list(merged.pop()) if len(merged) == 1 else "irregular" if merged else [],
            requires_grad={name: _trained(parameters) for name, parameters in owned.items()},
            available_adapters=list(self.peft_config),
            devices={name: sorted({str(p.device) for p in parameters}) for name, parameters in owned.items()},
        )

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        is_main_process: bool = True,
        state_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the adapters in PEFT's format: `default` into the folder, any other into a folder of its name.

        Args:
            safe_serialization: False would be a pickle, which is refused.
            selected_adapters: their names; all when left out.
            is_main_process: False writes nothing, for the other processes of one job.
            state_dict: PEFT's; what the model holds is written in any case.
        """
        from engine.checkpoint import save_adapter

        if not safe_serialization:
            raise UnsafeFileError(
                "safe_serialization is False, which asks for a pickle; adapters are written as safetensors only.",
                "Leave the argument out.",
            )
        if not is_main_process:
            return
        model: Any = self
        for name in selected_adapters if selected_adapters is not None else list(self.peft_config):
            self._known(name)
            folder = Path(save_directory)
            save_adapter(model, folder if name == "default" else folder / name, name)

    def push_to_hub(self, repo_id: str, *, token: str | None = None, private: bool | None = None, **kwargs: Any) -> str:
        """Upload the adapters (never the base) to the hub; returns the commit's address.

        Args:
            repo_id: owner/name; made if it is not there.
            token: a hub token; by default the environment's.
            private: for a repository that is made.
            kwargs: `commit_message`, `revision`, `create_pr`, as the hub's client takes them.
        """
        from huggingface_hub import HfApi

        known = {"commit_message", "commit_description", "revision", "create_pr"}
        if set(kwargs) - known:
            raise TypeError(f"unexpected keyword argument {sorted(set(kwargs) - known)[0]!r}; known: {sorted(known)}")
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            place = api.create_repo(repo_id, private=private, exist_ok=True)
            kwargs = {"commit_message": "Upload adapter", **kwargs}
            return str(api.upload_folder(repo_id=place.repo_id, folder_path=folder, **kwargs))


class BaseSignature:
    """A `forward` that shows the signature of the base's own.

    transformers' Trainer drops the columns that `forward` does not name, and finds a task's labels in the class's.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __get__(self, model: Any, owner: type) -> Any:
        if model is None:
            shown = partial(self.function)
            names = ("self", "input_ids", "attention_mask", "inputs_embeds", *getattr(owner, "LABELS", ()))
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
            signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        else:
            shown = partial(self.function, model)
            signature = _signature(type(model.get_base_model()))
        shown.__signature__ = signature  # type: ignore[attr-defined]
        return shown


_SIGNATURES: dict[type, inspect.Signature] = {}


def _signature(base: type) -> inspect.Signature:
    if base not in _SIGNATURES:
        found = inspect.signature(base.forward)  # type: ignore[attr-defined]
        own = [p for name, p in found.parameters.items() if name != "self"]
        extra = inspect.Parameter("adapter_names", inspect.Parameter.KEYWORD_ONLY, default=None)
        rest = [p for p in own if p.kind is p.VAR_KEYWORD]
        _SIGNATURES[base] = inspect.Signature([*(p for p in own if p.kind is not p.VAR_KEYWORD), extra, *rest])
    return _SIGNATURES[base]


def inject_adapter_in_model(
    peft_config: AdapterConfig, model: nn.Module, adapter_name: str = "default", low_cpu_mem_usage: bool = False
) -> nn.Module:
    """The model itself with an adapter in its layers, without a `PeftModel` around it.

    Args:
        low_cpu_mem_usage: PEFT's; nothing is allocated twice here either way.

    Raises:
        ConfigError: the method puts virtual tokens before the model's input, which takes a `PeftModel`.
    """
    from engine.model import get_peft_model, spec_of

    if spec_of(peft_config).prompt is not None:
        raise ConfigError(
            f"{spec_of(peft_config).title} changes the model's input, not its layers.", "Use get_peft_model."
        )
    return get_peft_model(model, peft_config, adapter_name).get_base_model()


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A quantised base made ready: frozen, its input embeddings giving gradients, checkpointing on.

    Unlike PEFT's, it leaves the number formats as they are: norms and heads in float32 would make each layer's
    activations float32 too, which costs memory and time; adapters are float32 anyway.
    """
    any_model: Any = model
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if use_gradient_checkpointing:
        if hasattr(any_model, "enable_input_require_grads"):
            any_model.enable_input_require_grads()
        settings = dict(gradient_checkpointing_kwargs or {"use_reentrant": False})
        enable = getattr(any_model, "activation_checkpointing_enable", None)
        if enable is not None:
            enable(activation_checkpointing_kwargs=settings)
        else:
            any_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    return model


def load_peft_weights(model_id: str | Path, device: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
    """An adapter's tensors as its file holds them, on `device`.

    Raises:
        CheckpointError, UnsafeFileError: there are none, or they are a pickle.
    """
    from engine.checkpoint import read_weights

    check_loading(kwargs)
    return {name: tensor.to(device or "cpu") for name, tensor in read_weights(model_id).items()}


def get_layer_status(model: Any) -> list[TunerLayerStatus]:
    """As `model.get_layer_status()`."""
    found: list[TunerLayerStatus] = model.get_layer_status()
    return found


def get_model_status(model: Any) -> TunerModelStatus:
    """As `model.get_model_status()`."""
    found: TunerModelStatus = model.get_model_status()
    return found
