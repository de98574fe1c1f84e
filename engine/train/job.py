"""`JobSpec`: everything one run needs, frozen, checked, written and read as YAML.

This module imports no torch, so the page can build and check a job in its own process. The adapter's own fields
are checked where the method lives (`engine.adapters`), which the worker does before it loads a model.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engine.errors import ConfigError

TASKS = ("causal_lm", "preference", "seq2seq", "classification", "text_to_image", "captioning")
QUANTIZATIONS = ("none", "nf4", "fp4", "int8")
PRECISIONS = ("auto", "fp32", "bf16")
LOSS_ON = ("answers", "all")
SCHEDULES = ("linear", "cosine", "constant")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adafactor")


@dataclass(frozen=True)
class DataSpec:
    """What the run learns from.

    Attributes:
        path: a csv, json, jsonl, parquet or txt file; a folder or zip of pictures.
        format: of the rows, one that the task takes; recognised when left out.
        columns: role -> column name, where the columns carry other names (`{"instruction": "question"}`).
        eval_split: share of the rows (0 to 0.5) held back for evaluation; 0 turns evaluation off.
        fixes: what is done about problem rows, cause -> action (`{"duplicate": "skip"}`).
    """

    path: str
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    eval_split: float = 0.1
    fixes: Mapping[str, str] = field(default_factory=dict)

    def faults(self) -> list[str]:
        found = []
        if not self.path:
            found.append("data.path is empty; name a csv, json, jsonl, parquet or txt file, or a zip of pictures")
        if not 0 <= self.eval_split <= 0.5:
            found.append(f"data.eval_split is {self.eval_split}; needed: 0 to 0.5")
        from engine.data.errors import FixError
        from engine.data.fixes import checked

        try:
            checked(self.fixes)
        except FixError as error:
            found.append(f"data.fixes: {error}")
        return found


@dataclass(frozen=True)
class TrainingSpec:
    """How the run learns. Steps are optimizer steps: `batch_size * gradient_accumulation` rows each.

    Attributes:
        epochs: passes over the training rows; ignored when `max_steps` is given.
        max_steps: optimizer steps; left out: `epochs` decides.
        batch_size: rows in one forward pass.
        gradient_accumulation: forward passes per optimizer step; the loss is the mean over all their tokens.
        learning_rate: peak rate.
        schedule: `linear` (to 0), `cosine` (to 0) or `constant`, each after the warm-up.
        warmup_ratio: share of the steps (0 to 1) over which the rate rises from 0.
        optimizer: `adamw`; `adamw_8bit` (its state in 8 bits); `paged_adamw_8bit` and `paged_adamw_32bit` (an NVIDIA
            card's, whose state moves to the machine's memory when the card is full); or `adafactor` (rows' and columns'
            means instead of one number for each weight).
        weight_decay: the optimizer's decoupled decay.
        loraplus_ratio: LoRA+: the learning rate of LoRA's B is this multiple of A's; left out: the same for both.
        loraplus_embedding_rate: with it, the peak rate of LoRA at embeddings; left out: 1e-6, as in PEFT.
        max_grad_norm: gradients are scaled down to this total norm; 0 turns clipping off.
        max_length: tokens per row; longer rows are cut and counted.
        precision: `bf16` loads the base in bfloat16, `fp32` in float32; `auto` picks by the hardware.
        loss_on: `answers` (the assistant's words only) or `all`.
        seed: for initial weights, data order and dropout.
        eval_every: steps between evaluations (there is always one before the first and after the last step).
        early_stopping_patience: end the run after so many evaluations in a row without a lower loss, and keep what was
            learned at the best one; left out: to the end, and keep that. The evaluation before the first step is not
            counted.
        checkpoint_every: steps between checkpoints.
        sample_prompts: prompts answered at each evaluation.
        gradient_checkpointing: recompute activations in the backward pass; slower, less memory.
        activation_offload: keep what the backward pass needs in the machine's memory; only with an accelerator.
        group_by_length: where rows are padded, rows of like length make a batch. The order stays a function of seed and
            epoch.
        threads: CPU threads of the worker; left out: chosen for the machine.
    """

    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 2e-4
    schedule: str = "linear"
    optimizer: str = "adamw"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    loraplus_ratio: float | None = None
    loraplus_embedding_rate: float | None = None
    max_grad_norm: float = 1.0
    max_length: int = 512
    precision: str = "auto"
    loss_on: str = "answers"
    seed: int = 0
    eval_every: int = 20
    early_stopping_patience: int | None = None
    checkpoint_every: int = 20
    sample_prompts: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    activation_offload: bool = False
    group_by_length: bool = True
    threads: int | None = None

    def faults(self) -> list[str]:
        found = []
        positive = ("epochs", "batch_size", "gradient_accumulation", "learning_rate", "eval_every", "checkpoint_every")
        for name in positive:
            if not getattr(self, name) > 0:
                found.append(f"training.{name} is {getattr(self, name)}; needed: more than 0")
        for name in ("weight_decay", "max_grad_norm", "seed"):
            if getattr(self, name) < 0:
                found.append(f"training.{name} is {getattr(self, name)}; needed: 0 or more")
        for name in ("max_steps", "threads", "early_stopping_patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"training.{name} is {value}; needed: 1 or more, or nothing")
        for name in ("loraplus_ratio", "loraplus_embedding_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                found.append(f"training.{name} is {value}; needed: a finite number above 0, or nothing")
        if self.loraplus_embedding_rate is not None and self.loraplus_ratio is None:
            found.append("training.loraplus_embedding_rate is given without loraplus_ratio; needed: both, or neither")
        if self.seed >= 2**32:
            found.append(f"training.seed is {self.seed}; needed: less than {2**32}")
        if any(not prompt.strip() for prompt in self.sample_prompts):
            found.append("training.sample_prompts holds an empty prompt; leave it out")
        if self.max_length < 8:
            found.append(f"training.max_length is {self.max_length}; needed: 8 tokens or more")
        if not 0 <= self.warmup_ratio <= 1:
            found.append(f"training.warmup_ratio is {self.warmup_ratio}; needed: 0 to 1")
        choices = (("precision", PRECISIONS), ("loss_on", LOSS_ON), ("schedule", SCHEDULES), ("optimizer", OPTIMIZERS))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                found.append(f"training.{name} is {getattr(self, name)!r}; needed: one of {', '.join(allowed)}")
        return found


@dataclass(frozen=True)
class JobSpec:
    """One run.

    `JobSpec.from_dict(yaml.safe_load(text))` and `JobSpec.to_dict()` are inverse to each other.

    Attributes:
        model: the base: a built-in name, a local folder or a hub id.
        data: what is learned from.
        adapter: the method and its fields.
        training: how it is learned.
        task: `causal_lm`, `preference`, `seq2seq`, `classification`, `text_to_image` or `captioning`.
        quantization: the base's linear layers in 4 bits (`nf4`, `fp4`) or 8 (`int8`) beneath the adapter; `none`: as
            they are.
        full: train the base itself, without an adapter.
        name: what the run is called.
        options: the task's own settings.

    Raises:
        ConfigError: with every fault at once, each naming the field, the value and what was needed.
    """

    model: str
    data: DataSpec
    adapter: Mapping[str, Any] = field(default_factory=dict)
    training: TrainingSpec = field(default_factory=TrainingSpec)
    task: str = "causal_lm"
    quantization: str = "none"
    full: bool = False
    name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from engine.adapters import ADAPTERS

        if not self.adapter and not self.full:
            object.__setattr__(self, "adapter", {"method": "lora"})
        found = self.data.faults() + self.training.faults()
        if not self.model:
            found.append("model is empty; name a built-in model, a local folder or a hub id")
        if self.task not in TASKS:
            found.append(f"task is {self.task!r}; needed: one of {', '.join(TASKS)}")
        if self.quantization not in QUANTIZATIONS:
            found.append(f"quantization is {self.quantization!r}; needed: one of {', '.join(QUANTIZATIONS)}")
        patience = self.training.early_stopping_patience
        if patience is not None and not self.data.eval_split:
            found.append(
                f"training.early_stopping_patience is {patience} and data.eval_split is 0; needed: rows held back to "
                "evaluate on, or no patience"
            )
        method = self.adapter.get("method")
        if self.full:
            found += self._full_faults()
        elif method not in ADAPTERS:
            found.append(f"adapter.method is {method!r}; needed: one of {', '.join(ADAPTERS)}")
        _raise(found)

    def _full_faults(self) -> list[str]:
        found = []
        if self.adapter:
            found.append("full is true, which trains the base's own weights; leave out adapter, or full")
        if self.quantization != "none":
            found.append(
                f"full is true and quantization is {self.quantization!r}; codes of a few bits cannot take small steps, "
                "so needed: quantization none, or an adapter instead of full"
            )
        if self.training.loraplus_ratio is not None:
            found.append("training.loraplus_ratio is about LoRA's two halves; full has none, leave it out")
        return found

    @classmethod
    def from_dict(cls, raw: Any) -> JobSpec:
        """Build and check a job from plain data, as YAML or JSON gives it."""
        if not isinstance(raw, Mapping):
            raise ConfigError(f"A job must be a mapping of keys to values, not {type(raw).__name__}.")
        found: list[str] = []
        data = _section(DataSpec, "data", raw.get("data"), found, required=("path",))
        training = _section(TrainingSpec, "training", raw.get("training") or {}, found)
        adapter = raw.get("adapter", {} if raw.get("full") is True else {"method": "lora"})
        if not isinstance(adapter, Mapping):
            found.append(f"adapter is {adapter!r}; needed: a mapping with `method` and its fields")
        known = {f.name for f in dataclasses.fields(cls)}
        found += [f"{key} is not a key of a job; known: {', '.join(sorted(known))}" for key in raw if key not in known]
        if not isinstance(raw.get("model"), str):
            found.append(f"model is {raw.get('model')!r}; needed: a built-in name, a local folder or a hub id")
        if isinstance(adapter, Mapping) and not adapter and raw.get("full") is not True:
            found.append("adapter is empty; needed: a mapping with `method` and its fields, or full: true")
        if not isinstance(raw.get("full", False), bool):
            found.append(f"full is {raw['full']!r}; needed: true or false")
        _raise(found)
        assert data is not None and training is not None
        plain = {key: raw[key] for key in ("task", "quantization", "full", "name") if key in raw}
        options = raw.get("options") or {}
        if not isinstance(options, Mapping):
            _raise([f"options is {options!r}; needed: a mapping of the task's own settings"])
        plain["options"] = dict(options)
        return cls(model=raw["model"], data=data, adapter=dict(adapter), training=training, **plain)

    @classmethod
    def from_file(cls, path: str | Path) -> JobSpec:
        """Read a YAML or JSON job; a relative `data.path` is looked up from the current folder, then the file's."""
        path = Path(path)
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"The job {path} cannot be read: {error}", "Give a YAML or JSON file.") from error
        spec = cls.from_dict(raw)
        beside = path.resolve().parent / spec.data.path
        if not Path(spec.data.path).exists() and beside.exists():
            spec = dataclasses.replace(spec, data=dataclasses.replace(spec.data, path=str(beside)))
        return spec

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML and JSON; only strings, numbers, booleans, lists and mappings."""
        plain = dataclasses.asdict(self)
        plain["training"]["sample_prompts"] = list(self.training.sample_prompts)
        plain["adapter"] = dict(self.adapter)
        plain["options"] = dict(self.options)
        plain["data"]["columns"] = dict(self.data.columns)
        plain["data"]["fixes"] = dict(self.data.fixes)
        return plain

    def save(self, path: str | Path) -> None:
        """Write as YAML, through a temporary name, so that a reader never sees half a file."""
        path = Path(path)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
        draft.replace(path)


def changed(spec: JobSpec, changes: Mapping[str, Any]) -> JobSpec:
    """The job with other values.

    Args:
        spec: the job.
        changes: key -> new value, such as `{"training.batch_size": 2, "adapter.r": 16, "quantization": "nf4"}`.

    Raises:
        ConfigError: the changed job cannot run.
    """
    own: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        part, _, name = key.partition(".")
        if name:
            inner.setdefault(part, {})[name] = value
        else:
            own[key] = value
    for part, values in inner.items():
        before = getattr(spec, part)
        own[part] = {**before, **values} if isinstance(before, Mapping) else dataclasses.replace(before, **values)
    return dataclasses.replace(spec, **own)


def value_of(spec: JobSpec, key: str) -> Any:
    """What a job has under a key of `changed`; None where an adapter's field is left to its default."""
    part, _, name = key.partition(".")
    found = getattr(spec, part)
    if not name:
        return found
    return found.get(name) if isinstance(found, Mapping) else getattr(found, name)


def _raise(found: list[str]) -> None:
    if found:
        raise ConfigError("The job cannot run:\n" + "\n".join(f"- {fault}" for fault in found))


def _section(kind: type[Any], name: str, raw: Any, found: list[str], required: tuple[str, ...] = ()) -> Any:
    """One nested section as its dataclass; faults go to `found` and None comes back."""
    if not isinstance(raw, Mapping):
        found.append(f"{name} is {raw!r}; needed: a mapping")
        return None
    fields = {f.name: f for f in dataclasses.fields(kind)}
    before = len(found)
    found += [f"{name}.{key} is not known; known: {', '.join(fields)}" for key in raw if key not in fields]
    found += [f"{name}.{key} is missing" for key in required if key not in raw]
    values = {}
    for key, value in raw.items():
        if key in fields:
            values[key] = _convert(f"{name}.{key}", str(fields[key].type), value, found)
    return None if len(found) > before else kind(**values)


def _convert(label: str, kind: str, value: Any, found: list[str]) -> Any:
    """`value` as the annotated type; YAML writes 2e-4 as a string and 3 where 3.0 is meant, both are accepted."""
    if value is None and "None" in kind:
        return None
    try:
        if kind.startswith("bool"):
            if isinstance(value, bool):
                return value
        elif kind.startswith("int"):
            if not isinstance(value, bool) and float(value) == int(float(value)):
                return int(float(value))
        elif kind.startswith("float"):
            if not isinstance(value, bool) and math.isfinite(float(value)):
                return float(value)
        elif kind.startswith("str"):
            if isinstance(value, str):
                return value
        elif kind.startswith("tuple"):
            if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
                return tuple(value)
        elif (
            kind.startswith("Mapping")
            and isinstance(value, Mapping)
            and all(isinstance(item, str) for item in value.values())
        ):
            return dict(value)
    except (TypeError, ValueError, OverflowError):
        pass
    found.append(f"{label} is {value!r}; needed: {kind}")
    return value
