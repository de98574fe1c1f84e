"""What every adapter method is made of: a config, the weights at one layer, and one frozen record.

A method supplies its maths in a subclass of `AdapterWeights`; wrapping, switching, mixing, merging and saving are
written once, in `engine.inject`, `engine.model` and `engine.checkpoint`.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from engine.adapters.fields import finite_faults, type_faults
from engine.errors import ConfigError, TargetError


class TaskType(enum.StrEnum):
    """What the model is trained for, by PEFT's names."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(enum.StrEnum):
    """The method's name in `adapter_config.json`."""

    ADALORA = "ADALORA"
    DELTA_LORA = "DELTA_LORA"
    IA3 = "IA3"
    LOHA = "LOHA"
    LOKR = "LOKR"
    LORA = "LORA"
    MORA = "MORA"
    QALORA = "QALORA"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    VERA = "VERA"


LINEAR, CONV1D, EMBEDDING, CONV2D = "linear", "conv1d", "embedding", "conv2d"
# Not a layer: methods that put virtual tokens before the model's input (engine.prompts).
PROMPT = "prompt"


def layer_kind(module: nn.Module) -> str | None:
    """Which of the kinds that methods can serve `module` is: linear, conv1d (GPT-2's), embedding, conv2d; or None.

    Conv1D is recognised by name and shape, so that the engine's core does not import transformers.
    """
    if isinstance(module, nn.Linear):
        return LINEAR
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return CONV1D
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if isinstance(module, nn.Conv2d):
        return CONV2D
    return None


def features(base: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer or Conv1D; a packed 4-bit weight's shape does not tell them."""
    if layer_kind(base) == CONV1D:
        n_in, n_out = base.weight.shape  # type: ignore[misc]
        return int(n_in), int(n_out)
    assert isinstance(base, nn.Linear)
    return base.in_features, base.out_features


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What every method's config holds. Fields and JSON names are PEFT's, so files travel both ways.

    Attributes:
        base_model_name_or_path: the base that the adapter was made for.
        revision: its revision on the hub.
        inference_mode: True freezes the adapter's parameters.
        task_type: a `TaskType` or its name; None for a plain module.
    """

    PEFT_TYPE: ClassVar[PeftType]
    # Fields that PEFT writes and this method has no use for, with the only value that means "not used".
    UNUSED: ClassVar[Mapping[str, Any]] = {}
    # Default target modules, the first fitting line taken; empty for the attention projections of `engine.inject`.
    TARGET_RULES: ClassVar[tuple[tuple[str, ...], ...]] = ()

    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    task_type: TaskType | str | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Fields are given by their names; a name that is no field is an error that says the nearest.

        Raises:
            ConfigError: an unknown name, or a value without one.
        """
        known = [item.name for item in dataclasses.fields(cls)]
        found = [f"{value!r} has no name; needed: {known[-1]}=... or another of its fields" for value in args]
        for name in kwargs:
            if name not in known:
                found.append(f"{name} is not one of its fields{_nearest(name, known)}")
        if found:
            fields = ", ".join(sorted(known))
            raise ConfigError(
                f"{cls.__name__} cannot be used:\n" + "\n".join(f"- {fault}" for fault in found),
                f"Its fields are: {fields}.",
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.task_type is not None:
            try:
                object.__setattr__(self, "task_type", TaskType(self.task_type))
            except ValueError:
                known = ", ".join(item.value for item in TaskType)
                raise ConfigError(f"task_type is {self.task_type!r}; needed: one of {known}, or None.") from None
        # The values are looked at only when all types are right: they could not be compared otherwise.
        found = type_faults(self) or finite_faults(self, self.faults())
        if found:
            name = type(self).__name__
            raise ConfigError(f"{name} cannot be used:\n" + "\n".join(f"- {fault}" for fault in found))

    @property
    def peft_type(self) -> PeftType:
        return self.PEFT_TYPE

    @property
    def method(self) -> str:
        """The registry's name of the method that serves this config; the peft_type in lower case by default."""
        return self.PEFT_TYPE.value.lower()

    def faults(self) -> list[str]:
        """Every fault of the fields, each with the value received and what was needed."""
        return []

    def replace(self, **changes: Any) -> AdapterConfig:
        return dataclasses.replace(self, **changes)

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method puts virtual tokens before the input."""
        return hasattr(self, "num_virtual_tokens")

    @classmethod
    def from_pretrained(cls, model_id: str | Path, subfolder: str | None = None) -> AdapterConfig:
        """The config in an adapter's folder or at its hub id.

        Raises:
            CheckpointError: there is none.
            ConfigError: it is another method's.
        """
        from engine.checkpoint import read_config
        from engine.compat import subfolder_of

        found = read_config(subfolder_of(model_id, subfolder))
        if cls is not AdapterConfig and not isinstance(found, cls) and found.peft_type is not cls.PEFT_TYPE:
            raise ConfigError(
                f"{model_id} holds a {type(found).__name__}, not a {cls.__name__}.", "Use PeftConfig.from_pretrained."
            )
        return found

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `adapter_config.json` alone."""
        from engine.checkpoint import CONFIG, write_text

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        plain = json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False)
        write_text(folder / CONFIG, plain + "\n")

    def check_steps(self, total: int) -> None:
        """Raises ConfigError if a training of so many steps is too short for the method's schedule."""

    def settled(self, modules: Sequence[str]) -> AdapterConfig:
        """The config with what depends on the model made explicit, so that its file says all.

        Args:
            modules: the full names of the modules that `target_modules` selects.
        """
        return self

    def exported(self) -> AdapterConfig:
        """The config that goes with `AdapterWeights.export`, where the file's form differs from the trained one."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the unused fields that PEFT expects, and sets as sorted lists."""
        plain: dict[str, Any] = {**self.UNUSED, "peft_type": self.PEFT_TYPE.value}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, enum.Enum):
                value = value.value
            elif isinstance(value, set | frozenset):
                value = sorted(value)
            elif isinstance(value, tuple):
                value = list(value)
            plain[item.name] = value
        return plain

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> AdapterConfig:
        """The config of `adapter_config.json`.

        Raises:
            ConfigError: a key that this method does not know, or one that asks for something it does not do.
        """
        known = {item.name for item in dataclasses.fields(cls)}
        found = []
        for key, value in raw.items():
            if key in known or key in ("peft_type", "peft_version", "auto_mapping"):
                continue
            if key not in cls.UNUSED:
                found.append(f"{key} is not a field of {cls.__name__}{_nearest(key, known)}")
            elif value and value != cls.UNUSED[key]:
                found.append(f"{key} is {value!r}, which this version does not do; needed: {cls.UNUSED[key]!r}")
        if found:
            raise ConfigError(
                f"The adapter's config cannot be used as {cls.__name__}:\n" + "\n".join(f"- {item}" for item in found),
                "Take these keys out if the adapter does without them; else use the version that wrote it.",
            )
        return cls(**{key: value for key, value in raw.items() if key in known})


def target_faults(config: Any, *more: str) -> list[str]:
    """The faults of the fields that say where an adapter sits; sets of names become sorted lists.

    `more` names further fields that hold module names or one regular expression.
    """
    found = []
    if getattr(config, "layers_pattern", None) and config.layers_to_transform is None:
        found.append("layers_pattern is given without layers_to_transform; needed: the layer numbers too")
    for label in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, label, None) or ():
            try:
                re.compile(key)
            except re.error as error:
                found.append(f"{label} has the key {key!r}, which is not a regular expression ({error})")
    for label in ("target_modules", "exclude_modules", *more):
        value = getattr(config, label, None)
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                found.append(f"{label} is {value!r}, which is not a regular expression ({error})")
        elif value is not None:
            names = sorted(set(value)) if isinstance(value, set | frozenset) else list(value)
            object.__setattr__(config, label, names)
    return found


def _nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name that is not known."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first key (a name's ending or a regular expression) that `module` ends with."""
    for key, value in patterns.items():
        if _ending(key).match(module):
            return value
    return default


@lru_cache(maxsize=1 << 14)
def _ending(key: str) -> re.Pattern[str]:
    # Adapters resized layer by layer bring a pattern for each of a UNet's hundreds of layers; re keeps 512.
    return re.compile(rf"(.*\.)?({key})$")


Mix = tuple[tuple[str, float], ...]
"""((adapter, weight), ...) of one batch row; () is the base alone."""


@dataclass
class Switchboard:
    """Which adapters contribute, with which weight, to which rows; one object shared by all layers of a model.

    Attributes:
        weights: active adapter -> weight; a dictionary lookup is all that switching and mixing cost.
        rows: the adapters of each batch row with their weights, or None when all rows use `weights`.
        disabled: True leaves the base alone.
    """

    weights: dict[str, float] = field(default_factory=dict)
    rows: list[Mix] | None = None
    disabled: bool = False


class AdapterWeights(nn.Module):
    """One adapter's parameters at one layer; a method's subclass holds the maths.

    The parameter names are those of the file: `lora_A.weight` here is `<module>.lora_A.weight` there. `frozen_names`
    are buffers that training needs and the exported file does not hold (see `export`).

    `frozen`: names of parameters that the file holds and that are never trained (LoRA-FA's A).
    `reads_base`: whether `delta` depends on the base's weight or output, and so cannot stand beside a merged adapter.
    `shifts_input`: whether `shift_input` gives anything; layers ask only those that say so.
    """

    frozen: ClassVar[tuple[str, ...]] = ()
    reads_base: ClassVar[bool] = False
    shifts_input: ClassVar[bool] = False

    def shift_input(self, x: Tensor, weight: float) -> Tensor:
        """What the adapter adds to the base layer's input, times `weight`; called where `shifts_input` is True.

        With a linear base layer, y = W (x + sum_i w_i shift_i(x)): shifts add up as outputs do.
        """
        raise TypeError(f"{type(self).__name__} does not say what it adds to a layer's input")

    def delta(self, x: Tensor, y: Tensor, base: nn.Module, weight: float) -> Tensor | None:
        """What the adapter adds to the layer's output, times `weight`.

        Args:
            x: the layer's input; (..., in) for linear layers, token ids for embeddings, (N, C, H, W) for Conv2d.
            y: the base layer's own output, without any adapter's `delta`.
            base: the base layer.
            weight: the mixing weight.

        Returns:
            A tensor of `y`'s shape, or None for nothing.
        """
        raise TypeError(f"{type(self).__name__} does not say what it adds to a layer's output")

    def parts(self, x: Tensor, base: nn.Module, weight: float) -> Any:
        """What makes base and adapter one autograd node (`engine.kernels.linear.Parts`), or None where `delta` serves.

        The node's output must be that of the base plus `delta`.
        """
        return None

    def delta_weight(self, base: nn.Module) -> Tensor:
        """The change of the unmerged `base.weight` (its shape) that `delta` amounts to at weight 1, in float32."""
        raise TargetError(f"{type(self).__name__} cannot be merged into a weight.")

    def factors(self, base: nn.Module) -> tuple[Tensor, Tensor] | None:
        """Two thin float32 matrices whose product is `delta_weight`, where that is all the adapter changes; or None."""
        return None

    def delta_bias(self, base: nn.Module) -> Tensor | None:
        """The change of `base.bias` at weight 1, or None."""
        return None

    def merge_changes(self, base: nn.Module, module: str) -> dict[str, Tensor]:
        """Name of a tensor of `base` -> what merging at weight 1 adds to it: `weight`, and `bias` where it changes.

        A method that a quantised layer can take up (QA-LoRA in its zeros) names other tensors.

        Raises:
            TargetError: the base is quantised and cannot take the change up.
        """
        if not isinstance(base.weight, Tensor) or not base.weight.is_floating_point():
            raise TargetError(
                f"{module} is quantised; adapters cannot be merged into it exactly.",
                "Load the base in full precision and merge there.",
            )
        bias = self.delta_bias(base)
        return {"weight": self.delta_weight(base), **({} if bias is None else {"bias": bias})}

    def export(self) -> dict[str, Tensor]:
        """Name -> tensor as the file holds it."""
        return dict(self.named_parameters())

    def slots(self) -> dict[str, Tensor]:
        """Name in the file -> the tensor here that it is read into."""
        return dict(self.named_parameters())

    def restored(self) -> None:
        """Called after tensors were read into these weights, from a file or a checkpoint."""


_FROM_FILE: ContextVar[bool] = ContextVar("from_file", default=False)


@contextmanager
def filled_from_file() -> Iterator[None]:
    """Inside the block adapters are built only to be filled from a file, so that methods may leave out their start."""
    before = _FROM_FILE.set(True)
    try:
        yield
    finally:
        _FROM_FILE.reset(before)


def fills_from_file() -> bool:
    return _FROM_FILE.get()


class SharedState(nn.Module):
    """What all layers of one adapter use together, such as VeRA's projections: buffers, kept once beside the model.

    It moves and is copied with the model. A layer's weights refer to it without owning it (in a tuple, say, so that
    torch does not register it there again).
    """

    def export(self) -> dict[str, Tensor]:
        """Name -> tensor, in the file `base_model.<name>`; what is left out must follow from the config."""
        return dict(self.named_buffers())


@dataclass(frozen=True)
class Attached:
    """One adapter on a model, as the hooks of `AdapterSpec` see it.

    Attributes:
        config: its config.
        layers: module name -> its weights there.
    """

    config: Any
    layers: Mapping[str, Any]


@dataclass(frozen=True)
class AdapterSpec:
    """The record of one method in the registry.

    Attributes:
        name: the method's name in a job.
        title: its name for people.
        paper: link to the paper.
        config: its config class.
        build: makes the weights for one layer: (base layer, config, module name) -> AdapterWeights.
        layers: the kinds of layer that it serves.
        mergeable: whether its change can be merged into the base weight.
        mixable: whether several can be added up with weights.
        identity_at_start: whether a fresh adapter leaves the base's outputs as they are.
        share: makes what the adapter's layers share: (module name -> base layer, config) -> SharedState. `build` then
            takes it as a fourth argument. None: each layer stands alone.
        formats: the file formats that it travels in; `Adapter Studio` where PEFT does not know the method.
        prepare_training: (Attached, total steps) -> the config to train with; called once before the first step.
        extra_loss: Attached -> a term that training adds to the task's loss once per optimizer step, or None.
        after_step: (Attached, steps taken) -> module name -> rank if one of them changed, else None. Called after each
            `optimizer.step()`, while the gradients are still there.
        saved_config: Attached -> the config for the file, where it depends on the weights; else `exported` decides.
        as_lora: Attached -> (LoraConfig's fields for ranks and scales, module name -> LoRA's tensors): the same change
            as a plain LoRA.
        prompt: for a method that puts virtual tokens before the input instead of changing layers:
            (input embedding, config) -> `engine.adapters.virtual.VirtualTokens`. `build` is None then.
    """

    name: str
    title: str
    paper: str
    config: type[AdapterConfig]
    build: Any
    layers: tuple[str, ...]
    mergeable: bool
    mixable: bool
    identity_at_start: bool
    share: Any = None
    formats: tuple[str, ...] = ("PEFT",)
    prepare_training: Any = None
    extra_loss: Any = None
    after_step: Any = None
    saved_config: Any = None
    as_lora: Any = None
    prompt: Any = None


def master(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or in float64 if it is that already: the type of sums that must not lose digits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def compute_cast(weight: Tensor, x: Tensor) -> Tensor:
    """`weight` in the type the products run in: float32 masters over a bf16 base compute in bf16.

    Casting the thin matrices instead of the activations is what keeps a bf16 step fast. Under autocast the operators
    cast by themselves.
    """
    return weight if torch.is_autocast_enabled(x.device.type) else weight.to(x.dtype)


def applied(matrix: Tensor, x: Tensor, base: nn.Module) -> Tensor:
    """`matrix` in the place of `base`'s weight, without its bias: (out, in), or a kernel with a convolution's settings.

    For a convolution the kernel may have another number of output channels than the base.
    """
    if not isinstance(base, nn.Conv2d):
        return nn.functional.linear(x, matrix)
    padding: Any = base.padding
    if base.padding_mode != "zeros":
        x = nn.functional.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
        padding = 0
    return nn.functional.conv2d(x, matrix, None, base.stride, padding, base.dilation, base.groups)
