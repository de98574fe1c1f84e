"""Checkpoints of a run: everything that the next step depends on, so that a resumed run is the uninterrupted one.

`checkpoints/step-000020/` holds `adapter.safetensors` (parameters and frozen buffers as trained) or, of full
fine-tuning, `model.safetensors`; `optimizer.safetensors` (its state by parameter name, and torch's random state) and
`state.json` (counters and Python's random state). The data position is the step: the order of rows is a function of
seed and epoch.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.checkpoint import write_safetensors, write_text
from engine.errors import CheckpointError
from engine.train.parallel import alike, whole
from engine.train.trainee import Trainee

_NAME = re.compile(r"step-(\d{6,})")
KEPT = 2


def save_checkpoint(
    folder: Path,
    step: int,
    trainee: Trainee,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    counters: Mapping[str, Any],
    writes: bool = True,
) -> Path:
    """Write the checkpoint of `step` under a temporary name, rename it, and drop all but the last two.

    Of several processes one `writes`; where weights are spread over them, the others give their parts.
    """
    final = folder / f"step-{step:06d}"
    tensors, scalars = _optimizer_state(optimizer, parameters)
    weights = trainee.state()
    if not writes:
        return final
    draft = folder / f".step-{step:06d}.{os.getpid()}"
    for left_over in folder.glob(".step-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    draft.mkdir(parents=True)
    tensors["random.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    state = {"step": step, "optimizer": scalars, "random": random.getstate(), **counters}
    try:
        write_safetensors(draft / f"{trainee.kind}.safetensors", weights)
        write_safetensors(draft / "optimizer.safetensors", tensors)
        write_text(draft / "state.json", json.dumps(state))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(
            f"The checkpoint of step {step} cannot be written: {error}.",
            "Free some space on the disk, then resume: the checkpoint before it is whole.",
        ) from error
    if final.exists():
        shutil.rmtree(final)
    draft.rename(final)
    for old in list_checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match.group(1)), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def read_state(path: Path) -> dict[str, Any]:
    """The counters, scalars and the job of a checkpoint, without its tensors.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The checkpoint {path.name} cannot be read: {error}.", "Start the run again.") from error
    return state


def restore_checkpoint(
    path: Path, trainee: Trainee, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Any]:
    """Put weights, optimizer and random state back; returns the counters.

    Raises:
        CheckpointError: a file is missing or damaged, or belongs to another job.
    """
    state = read_state(path)
    try:
        tensors = load_file(path / "optimizer.safetensors")
        weights = load_file(path / f"{trainee.kind}.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"The checkpoint {path.name} cannot be read: {error}.", "Start the run again.") from error
    trainee.restore(weights)
    torch.set_rng_state(tensors.pop("random.torch"))
    cuda = tensors.pop("random.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    _restore_optimizer(optimizer, parameters, tensors, state["optimizer"])
    version, internal, gauss = state["random"]
    random.setstate((version, tuple(internal), gauss))
    return state


def _optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{key}:{name}"] = whole(value.detach()).to("cpu").clone().contiguous()
            else:
                scalars[f"{key}:{name}"] = value
    return tensors, scalars


def _restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
) -> None:
    # The optimizer numbers parameters group by group, which is not their order where it has several groups.
    order = {id(p): n for n, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    numbers = {name: order[id(parameter)] for name, parameter in parameters.items()}
    state: dict[int, dict[str, Any]] = {}
    for full, value in {**tensors, **scalars}.items():
        key, _, name = full.partition(":")
        if name not in numbers:
            raise CheckpointError(f"The checkpoint's optimizer knows {name!r}, which this job does not train.")
        spread = alike(value, parameters[name]) if isinstance(value, Tensor) else value
        state.setdefault(numbers[name], {})[key] = spread
    plain = optimizer.state_dict()
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})
    if getattr(optimizer, "is_paged", False):
        _into_pages(optimizer)


def _into_pages(optimizer: Any) -> None:
    """A paged optimizer's state is loaded as plain tensors; put it where it can leave the card again."""
    for parameter, entry in optimizer.state.items():
        for key in ("state1", "state2"):
            held = optimizer.get_state_buffer(parameter, dtype=entry[key].dtype)
            if getattr(held, "is_paged", False):
                held.copy_(entry[key])
                entry[key] = held
