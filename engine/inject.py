"""Finding a model's target modules, wrapping them, and taking the wrappers off again.

The wrappers themselves are in `engine.layers`.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from torch import nn

from engine.adapters.base import (
    CONV1D,
    LINEAR,
    Switchboard,
    TaskType,
    layer_kind,
)
from engine.errors import TargetError
from engine.kernels import gated
from engine.layers import AdapterLayer, SavedModule, Wrapper

# The attention projections that papers adapt, by the names that architectures give them. The first rule whose names
# are all linear layers of the model is taken: Llama, Mistral, Qwen, Gemma, OPT, CLIP, ViT / T5 / BERT, BLIP /
# DeBERTa-v2 / DistilBERT / GPT-2 / NeoX, BLOOM, Falcon / Phi-3, CodeGen / MPT / BLIP's images / diffusers / DeBERTa.
DEFAULT_RULES = (
    ("q_proj", "v_proj"),
    ("q", "v"),
    ("query", "value"),
    ("query_proj", "value_proj"),
    ("q_lin", "v_lin"),
    ("c_attn",),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
    ("qkv",),
    ("to_q", "to_v"),
    ("in_proj",),
)
# The freshly initialised head of each task, trained in full and saved with the adapter.
HEADS: dict[TaskType, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


def base_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the model as it was before any adapter: wrappers count as the module they wrap."""
    for name, child in model.named_children():
        path = f"{prefix}.{name}" if prefix else name
        yield path, child
        if isinstance(child, AdapterLayer):
            yield from base_modules(child.base_layer, path)
        elif isinstance(child, SavedModule):
            yield from base_modules(child.original_module, path)
        else:
            yield from base_modules(child, path)


def unwrapped(module: nn.Module) -> nn.Module:
    """The base's own module under a wrapper."""
    if isinstance(module, AdapterLayer):
        return module.base_layer
    if isinstance(module, SavedModule):
        return module.original_module
    return module


def matches(name: str, wanted: Sequence[str] | str | None) -> bool:
    """PEFT's rule: a list holds whole names or their last parts; a string is one regular expression for whole names."""
    if not wanted:
        return False
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == item or name.endswith("." + item) for item in wanted)


def linear_suffixes(model: nn.Module) -> list[str]:
    """The last parts of the names of the model's linear layers, most frequent first."""
    counts: dict[str, int] = {}
    for name, module in base_modules(model):
        if layer_kind(unwrapped(module)) in (LINEAR, CONV1D):
            suffix = name.rsplit(".", 1)[-1]
            counts[suffix] = counts.get(suffix, 0) + 1
    return sorted((s for s in counts if not s.isdigit()), key=lambda s: -counts[s])


def default_targets(model: nn.Module, rules: Sequence[Sequence[str]] = ()) -> list[str]:
    """The architecture's usual modules, by the first of the rules (DEFAULT_RULES unless given) that fits.

    Raises:
        TargetError: none fits; the message lists the linear layers that there are.
    """
    names = [name for name, module in base_modules(model) if layer_kind(unwrapped(module)) in (LINEAR, CONV1D)]
    for rule in rules or DEFAULT_RULES:
        if all(any(matches(name, [item]) for name in names) for item in rule):
            return list(rule)
    raise TargetError(
        f"{type(model).__name__} has no {'usual targets' if rules else 'attention projections'} that the engine knows "
        "by name.",
        f"Set target_modules; its linear layers are: {', '.join(sorted(linear_suffixes(model))) or 'none'}.",
    )


def _all_linear(model: nn.Module, task: TaskType | None) -> list[str]:
    """Every linear layer except the output embedding and, for classifiers, the head."""
    find: Any = getattr(model, "get_output_embeddings", None)
    output = find() if find else None
    head = unwrapped(output) if isinstance(output, nn.Module) else None
    # An output layer that the model does not name as such (BLIP's) shows by sharing the embedding's weight.
    embeddings = {id(m.weight) for _, m in base_modules(model) if isinstance(m, nn.Embedding)}
    names = []
    for name, module in base_modules(model):
        linear = unwrapped(module)
        if layer_kind(linear) not in (LINEAR, CONV1D) or linear is head or id(linear.weight) in embeddings:
            continue
        if task is not None and matches(name, HEADS.get(task, ())):
            continue
        names.append(name)
    return names


def _in_chosen_layers(name: str, config: Any) -> bool:
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None:
        return True
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf".*\.{pattern}\.(\d+)\.", name)
        if found:
            return int(found.group(1)) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def find_targets(model: nn.Module, config: Any, layers: tuple[str, ...]) -> tuple[list[str], list[str] | str]:
    """The names of the modules that `config` asks for, and its target_modules made explicit.

    Raises:
        TargetError: nothing matches (with the nearest names), or a match is of a kind that the method cannot serve.
    """
    task, excluded = config.task_type, getattr(config, "exclude_modules", None)
    wanted = config.target_modules
    if wanted is None:
        wanted = default_targets(model, config.TARGET_RULES)
    if wanted == "all-linear":
        names = _all_linear(model, task)
        wanted = sorted({name.rsplit(".", 1)[-1] for name in names})
        # A suffix may also name a layer that all-linear leaves out (a head called like a projection).
        if len([n for n, _ in base_modules(model) if matches(n, wanted)]) != len(names):
            wanted = names
    else:
        names = [name for name, _ in base_modules(model) if matches(name, wanted)]
    names = [n for n in names if _in_chosen_layers(n, config) and not matches(n, excluded)]
    if not names:
        raise _nothing_matches(model, wanted, config)
    _warn_of_unmatched(model, wanted)
    wrong = []
    for name in names:
        module = unwrapped(module_at(model, name))
        if layer_kind(module) not in layers:
            wrong.append(f"{name} ({type(module).__name__})")
    if wrong:
        raise TargetError(
            f"target_modules={config.target_modules!r} matches modules that {type(config).__name__} cannot serve: "
            f"{', '.join(wrong[:3])}{' and others' if len(wrong) > 3 else ''}.",
            f"It serves: {', '.join(layers)}. Name the layers inside them, or leave them out with exclude_modules.",
        )
    return names, wanted


def _warn_of_unmatched(model: nn.Module, wanted: Sequence[str] | str) -> None:
    """Names of a list that mean no module: a slip, or a list made for several architectures."""
    if isinstance(wanted, str):
        return
    every = [name for name, _ in base_modules(model)]
    missed = [item for item in wanted if not any(matches(name, [item]) for name in every)]
    if missed:
        suffixes = sorted({name.rsplit(".", 1)[-1] for name in every if not name.rsplit(".", 1)[-1].isdigit()})
        close = [difflib.get_close_matches(item.rsplit(".", 1)[-1], suffixes, n=1, cutoff=0.0) for item in missed]
        near = ", ".join(dict.fromkeys(name for row in close for name in row))
        warnings.warn(
            f"target_modules names {', '.join(map(repr, missed))}, which {type(model).__name__} does not have; the "
            f"other names are adapted. Nearest: {near}.",
            stacklevel=4,
        )


def _nothing_matches(model: nn.Module, wanted: Sequence[str] | str, config: Any) -> TargetError:
    everything = [name for name, _ in base_modules(model)]
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in everything if not name.rsplit(".", 1)[-1].isdigit()})
    asked = [wanted] if isinstance(wanted, str) else wanted
    close = [difflib.get_close_matches(item.rsplit(".", 1)[-1], suffixes, n=3, cutoff=0.0) for item in asked]
    # The best of each name before the second best of any.
    near = [name for row in zip_longest(*close) for name in row if name]
    nearest = ", ".join(list(dict.fromkeys(near))[:3]) or "none, it has no parts"
    limits = [
        f"{label}={getattr(config, label)!r}"
        for label in ("exclude_modules", "layers_to_transform", "layers_pattern")
        if getattr(config, label, None) is not None
    ]
    within = f" within {', '.join(limits)}" if limits else ""
    return TargetError(
        f"No module of {type(model).__name__} matches target_modules={wanted!r}{within}. Nearest names: {nearest}.",
        f"Linear layers that can be named: {', '.join(linear_suffixes(model)) or 'none'}; or use 'all-linear'.",
    )


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` at the dotted `name`; the parent may sit under a wrapper."""
    parent_name, _, attribute = name.rpartition(".")
    setattr(module_at(model, parent_name), attribute, module)


def module_at(model: nn.Module, name: str) -> nn.Module:
    """The module at a dotted name of the base, looking through wrappers on the way."""
    module = model
    for part in name.split(".") if name else ():
        module = unwrapped(module)
        # Past torch's __getattr__, which costs more than all else of an adapter's way into a large model.
        module = module._modules.get(part) or getattr(module, part)
    return module


def wrap(model: nn.Module, name: str, switchboard: Switchboard) -> AdapterLayer:
    """The adapter layer at `name`, made on first use."""
    parent, _, own = name.rpartition(".")
    holder = unwrapped(module_at(model, parent))
    module = holder._modules.get(own) or getattr(holder, own)
    if isinstance(module, AdapterLayer):
        return module
    layer = AdapterLayer(module, switchboard, name)
    # The layer's own parts alone: what it wraps has its modes already.
    layer.training = layer.adapters.training = layer.biases.training = module.training
    other = next((one for one in holder._modules.values() if isinstance(one, AdapterLayer)), None)
    if other is not None:
        layer.siblings = other.siblings
        layer.siblings.forget()
    setattr(holder, own, layer)
    if own == gated.DOWN:
        gated.install(holder)
    return layer


def wrap_saved(model: nn.Module, name: str, switchboard: Switchboard) -> SavedModule:
    module = module_at(model, name)
    if isinstance(module, SavedModule):
        return module
    if isinstance(module, AdapterLayer):
        raise TargetError(
            f"{name} is asked for both in target_modules and in modules_to_save.", "Take it out of one of the two."
        )
    saved = SavedModule(module, switchboard, name)
    saved.train(module.training)
    replace_module(model, name, saved)
    return saved


def wrappers(model: nn.Module) -> Iterator[tuple[str, Wrapper]]:
    """(name, wrapper) of every wrapped module."""
    for name, module in base_modules(model):
        if isinstance(module, AdapterLayer | SavedModule):
            yield name, module
