"""One component's adapter between a file and the engine: factors by layer there, a config and PEFT's keys here."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.adapters.base import CONV2D, AdapterConfig, layer_kind
from engine.adapters.loha import LoHaConfig
from engine.adapters.lokr import LoKrConfig, factors
from engine.adapters.lora import LoraConfig
from engine.adapters.lowrank import LowRankConfig
from engine.adapters.lycoris import LycorisConfig
from engine.checkpoint import CONFIG, PREFIX, WEIGHTS, write_safetensors, write_text
from engine.errors import CheckpointError, ConfigError, UnsafeFileError
from engine.layers import AdapterLayer
from engine.model import PeftModel

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
METHODS = ("lora", "dora", "loha", "lokr")
_LOHA = frozenset(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))
_LOKR = frozenset(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))
# What has to be there; of LoKr's W1 and W2 each is whole or in two factors.
_NEEDED = {"lora": {"lora_A.weight", "lora_B.weight"}, "loha": {f"hada_w{i}_{s}" for i in "12" for s in "ab"}}
# Convolutions with 3x3 kernels, for files that are read without the model.
_WIDE = re.compile(r"conv_in|conv_out|.*\.(conv[12]|(down|up)samplers\.\d+\.conv)")


@dataclass(frozen=True)
class AdapterPart:
    """The adapter of one component, ready to be attached or saved in PEFT's format.

    Attributes:
        config: as `adapter_config.json` would hold it.
        tensors: under PEFT's keys.
    """

    config: AdapterConfig
    tensors: dict[str, Tensor]

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write PEFT's two files; `PeftModel.from_pretrained` and PEFT read them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        plain = self.config.replace(inference_mode=True).to_dict()
        write_safetensors(folder / WEIGHTS, {key: tensor.contiguous() for key, tensor in self.tensors.items()})
        write_text(folder / CONFIG, json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        return folder


@dataclass
class Factors:
    """One layer's tensors by PEFT's names, and the alpha that the file gives it."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None

    @property
    def kind(self) -> str:
        """lora, loha, lokr, or an empty text where there is none of them."""
        for kind, start in (("lora", "lora_"), ("loha", "hada_"), ("lokr", "lokr_")):
            if any(name.startswith(start) for name in self.tensors):
                return kind
        return ""


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(key -> tensor, metadata) of a safetensors file.

    Raises:
        UnsafeFileError: a pickle by its name; it is not opened.
        CheckpointError: the file is missing or is no safetensors file.
    """
    path = weights_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}", "Copy or download it again.") from error


def weights_file(path: str | Path) -> Path:
    """The safetensors file at `path`, which may be a folder that holds one."""
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        unsafe = [file.name for file in sorted(path.iterdir()) if file.suffix.lower() in PICKLES]
        if not found and unsafe:
            raise _pickled(path / unsafe[0])
        raise CheckpointError(
            f"{path} holds {len(found)} safetensors files; needed: one.", "Name the file instead of the folder."
        )
    if path.suffix.lower() in PICKLES:
        raise _pickled(path)
    if not path.is_file():
        raise CheckpointError(f"There is no adapter file {str(path)!r}.", "Give a safetensors file or its folder.")
    return path


def _pickled(path: Path) -> UnsafeFileError:
    return UnsafeFileError(
        f"{path.name} is a pickle, which could run code when opened; it was not opened.",
        "Get the adapter as safetensors, or convert it where you trust it.",
    )


def unknown_keys(path: str | Path, form: str, keys: Sequence[str], strange: Sequence[str]) -> CheckpointError:
    """The error for what a reader has no place for: nothing of a file is dropped silently.

    Args:
        keys: all of them, or the whole file's where it holds nothing else.
        strange: those of them that are of no method here; the others are of layers that the model does not have.
    """
    shown = ", ".join(keys[:12]) + (f" and {len(keys) - 12} more" if len(keys) > 12 else "")
    if strange:
        why = "Read here: LoRA, DoRA, LoHa and LoKr of a UNet and of CLIP text encoders; merge others into the base."
    else:
        why = "The model has no such layers: the adapter was made for another base (SD 1, SD 2 and SDXL differ)."
    return CheckpointError(f"{Path(path).name} has {len(keys)} keys that cannot be used as {form}: {shown}.", why)


# --- from a file --------------------------------------------------------------------------------------------------


def assemble(modules: Mapping[str, Factors], layers: Mapping[str, nn.Module], what: str) -> AdapterPart:
    """Config and tensors of one component.

    Args:
        modules: the layers' full names -> their factors; a missing alpha means alpha = rank.
        layers: the model's layers by name; empty without a model.
        what: the file and component, for messages.

    Raises:
        CheckpointError: several kinds of adapter in one component, missing factors, or shapes that do not belong
            together.
    """
    kinds = Counter(part.kind for part in modules.values())
    if len(kinds) != 1 or "" in kinds:
        counted = ", ".join(f"{kind or 'none'} at {count} layers" for kind, count in kinds.items())
        raise CheckpointError(
            f"{what} mixes kinds of adapter: {counted}; needed: one kind.", "Convert it, or merge it into the base."
        )
    kind = next(iter(kinds))
    for name, part in modules.items():
        _check(name, part, kind, what)
    fitted = {name: _fitted(part.tensors, layers.get(name)) for name, part in modules.items()}
    made = {"lora": _lora, "loha": _loha, "lokr": _lokr}[kind](modules, fitted, layers, what)
    tensors = {f"{PREFIX}{name}.{key}": tensor for name, own in fitted.items() for key, tensor in own.items()}
    return AdapterPart(made, tensors)


def _check(name: str, part: Factors, kind: str, what: str) -> None:
    have = set(part.tensors)
    lacking = _NEEDED.get(kind, set()) - have
    if kind == "lokr":
        for number in "12":
            whole, pair = f"lokr_w{number}", {f"lokr_w{number}_a", f"lokr_w{number}_b"}
            lacking |= set() if whole in have else pair - have
    if lacking:
        raise CheckpointError(
            f"{what} lacks {', '.join(sorted(lacking))} of the layer {name}.", "The file is damaged; get it again."
        )
    odd = [key for key in have if not (key.startswith("lora_") if kind == "lora" else key in _LOHA | _LOKR)]
    if odd:
        raise CheckpointError(
            f"{what} has {', '.join(sorted(odd))} at the {kind} layer {name}, which this version does not do.",
            "Merge it into the base where it was trained.",
        )


def _fitted(tensors: Mapping[str, Tensor], layer: nn.Module | None) -> dict[str, Tensor]:
    """Factors of a 1x1 convolution at a linear layer and the other way round: the same numbers, other dimensions."""
    if layer is None:
        return dict(tensors)
    wide = layer_kind(layer) == CONV2D
    fitted = dict(tensors)
    for key in ("lora_A.weight", "lora_B.weight", "lokr_w2"):
        tensor = fitted.get(key)
        if tensor is None:
            continue
        if wide and tensor.dim() == 2:
            fitted[key] = tensor[:, :, None, None]
        elif not wide and tensor.dim() == 4 and tensor.shape[2:] == (1, 1):
            fitted[key] = tensor.flatten(1)
    if "lora_magnitude_vector" in fitted:
        flat = fitted["lora_magnitude_vector"].flatten()
        fitted["lora_magnitude_vector"] = flat.view(1, -1, 1, 1) if wide else flat
    return fitted


def _patterns(values: Mapping[str, float]) -> tuple[Any, dict[str, Any]]:
    """(the most frequent value, module -> value for the others)."""
    usual = Counter(values.values()).most_common(1)[0][0]
    names = list(values)
    others = {}
    for name, value in values.items():
        if value != usual:
            # A pattern also matches the endings of longer names, unless it says where names begin.
            longer = any(other.endswith("." + name) for other in names)
            others["^" + name if longer else name] = value
    return usual, others


def _settings(modules: Mapping[str, Factors], ranks: Mapping[str, int]) -> dict[str, Any]:
    # kohya reads alpha 0 as "the rank", as it does a missing one.
    alphas = {name: float(part.alpha or ranks[name]) for name, part in modules.items()}
    rank, rank_pattern = _patterns(ranks)
    alpha, alpha_pattern = _patterns(alphas)
    return {
        "r": rank,
        "rank_pattern": rank_pattern,
        "alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "target_modules": sorted(modules),
    }


Tensors = Mapping[str, Mapping[str, Tensor]]


def _lora(modules: Mapping[str, Factors], fitted: Tensors, layers: Mapping[str, nn.Module], what: str) -> LoraConfig:
    ranks = {}
    for name, own in fitted.items():
        a, b = own["lora_A.weight"], own["lora_B.weight"]
        if a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"{what}: at {name} the factors have shapes {tuple(a.shape)} and {tuple(b.shape)}, whose ranks differ.",
                "The file is damaged; get it again.",
            )
        ranks[name] = int(a.shape[0])
    settings = _settings(modules, ranks)
    extra: dict[str, Any] = {}
    for key, flag in (("lora_magnitude_vector", "use_dora"), ("lora_B.bias", "lora_bias")):
        count = sum(key in own for own in fitted.values())
        if count not in (0, len(fitted)):
            raise CheckpointError(
                f"{what} has {key} at {count} of {len(fitted)} layers; needed: at all or none.",
                "Merge it into the base where it was trained.",
            )
        extra[flag] = bool(count)
    return LoraConfig(lora_alpha=settings.pop("alpha"), **settings, **extra)


def _loha(modules: Mapping[str, Factors], fitted: Tensors, layers: Mapping[str, nn.Module], what: str) -> LoHaConfig:
    ranks = {name: int(own["hada_w1_b"].shape[0]) for name, own in fitted.items()}
    by_modes = any("hada_t1" in own for own in fitted.values())
    return LoHaConfig(**_settings(modules, ranks), use_effective_conv2d=by_modes)


def _lokr(modules: Mapping[str, Factors], fitted: Tensors, layers: Mapping[str, nn.Module], what: str) -> LoKrConfig:
    """LoKr's rank and factors are not in the file; they are what its shapes follow from."""
    sides: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}
    ranks: dict[str, int] = {}
    whole = []
    for name, own in fitted.items():
        kernel = _kernel(name, layers.get(name))
        o1, i1 = own["lokr_w1"].shape if "lokr_w1" in own else (own["lokr_w1_a"].shape[0], own["lokr_w1_b"].shape[1])
        if "lokr_w2" in own:
            o2, i2 = own["lokr_w2"].shape[:2]
        elif "lokr_t2" in own:
            o2, i2 = own["lokr_w2_a"].shape[1], own["lokr_w2_b"].shape[1]
        else:
            o2, i2 = own["lokr_w2_a"].shape[0], own["lokr_w2_b"].shape[1] // kernel
        sides[name] = ((o1, o2), (i1, i2))
        inner = own.get("lokr_w2_b", own.get("lokr_w1_b"))
        if inner is None:
            whole.append(name)
        else:
            ranks[name] = int(inner.shape[0])
    # Where nothing is factored there is no rank, and LyCORIS reads the scale as 1 whatever alpha says.
    ranks |= dict.fromkeys(whole, max((side for name in whole for both in sides[name] for side in both), default=1))
    parts = {name: Factors(part.tensors, None if name in whole else part.alpha) for name, part in modules.items()}
    return LoKrConfig(
        **_settings(parts, ranks),
        decompose_both=any("lokr_w1_a" in own for own in fitted.values()),
        decompose_factor=_factor(sides, what),
        use_effective_conv2d=any("lokr_t2" in own for own in fitted.values()),
    )


def _kernel(name: str, layer: nn.Module | None) -> int:
    if isinstance(layer, nn.Conv2d):
        return math.prod(layer.kernel_size)
    return 9 if layer is None and _WIDE.fullmatch(name) else 1


def _factor(sides: Mapping[str, tuple[tuple[int, int], tuple[int, int]]], what: str) -> int:
    """The decompose_factor from which all the sides follow: W1 is (o1, i1), W2 (o2, i2), for ((o1, o2), (i1, i2))."""
    every = {side for both in sides.values() for side in both}
    for factor in (-1, *sorted({first for first, _ in every})):
        if all(factors(first * second, factor) == (first, second) for first, second in every):
            return factor
    name, (outer, inner) = next(iter(sides.items()))
    raise CheckpointError(
        f"{what}: no decompose_factor gives all its shapes (first: {name}, outputs {outer[0]} x {outer[1]}, inputs "
        f"{inner[0]} x {inner[1]}).",
        "The layers were factored by different rules; merge the adapter into the base where it was trained.",
    )


# --- to a file ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One adapted layer on its way into a file: its tensors by PEFT's names, its scale, its rank."""

    name: str
    base: nn.Module
    tensors: dict[str, Tensor]
    scale: float
    rank: int


def layers_of(model: PeftModel, adapter_name: str, form: str) -> tuple[AdapterConfig, list[Layer]]:
    """(config as exported, the layers) of an adapter.

    Raises:
        ConfigError: a method, or a part of the adapter, that Stable Diffusion's formats have no place for.
    """
    config = model._known(adapter_name).exported()
    if config.method not in METHODS or not isinstance(config, LowRankConfig | LycorisConfig):
        raise ConfigError(
            f"{adapter_name!r} is a {config.method} adapter, which {form} has no place for; needed: one of "
            f"{', '.join(METHODS)}.",
            "Save it in PEFT's format (save_pretrained).",
        )
    found = []
    for layer in model._layers[adapter_name]:
        if not isinstance(layer, AdapterLayer) or adapter_name in layer.biases:
            what = "its own bias" if isinstance(layer, AdapterLayer) else "a module trained in full"
            raise ConfigError(
                f"{adapter_name!r} has {what} at {layer.module_name}, which {form} has no place for.",
                "Save it in PEFT's format (save_pretrained), or train it without.",
            )
        weights: Any = layer.adapters[adapter_name]
        tensors = {key: value.detach().to("cpu", torch.float32).clone() for key, value in weights.export().items()}
        if any(key.startswith("lora_embedding") for key in tensors):
            raise ConfigError(
                f"{adapter_name!r} adapts the embedding {layer.module_name}, which {form} has no place for.",
                "Save it in PEFT's format (save_pretrained).",
            )
        rank = (
            int(tensors["lora_A.weight"].shape[0]) if "lora_A.weight" in tensors else config.rank_of(layer.module_name)
        )
        found.append(Layer(layer.module_name, layer.base_layer, tensors, config.scale(layer.module_name), rank))
    return config, found


def checked_target(models: Mapping[str, PeftModel], path: str | Path) -> Path:
    """`path` as a safetensors file to write, its folder made.

    Raises:
        ConfigError: no model, or a component that the formats do not know.
        UnsafeFileError, CheckpointError: another kind of file.
    """
    strange = [name for name in models if name not in COMPONENTS]
    if strange or not models:
        raise ConfigError(
            f"models names {', '.join(map(repr, strange)) or 'nothing'}; needed: some of {', '.join(COMPONENTS)}.",
        )
    path = Path(path)
    if path.suffix.lower() in PICKLES:
        raise UnsafeFileError(f"{path.name} would be a pickle.", "Name it .safetensors.")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path.name} does not end in .safetensors.", "Name the file to write.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
