"""What a run trains, behind one interface: an adapter on a base, or the base itself."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine import hooks
from engine.checkpoint import raw_state, restore_raw_state, save_adapter
from engine.errors import CheckpointError, TrainingError
from engine.joined import parts_of
from engine.tasks.base import Loaded
from engine.train.parallel import alike, whole


class Trainee(Protocol):
    """What the loop and its checkpoints ask for.

    Attributes:
        kind: `adapter` or `model`: the key of the result in the events and the name of its folder.
        model: what runs.
    """

    kind: str

    @property
    def model(self) -> nn.Module: ...

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""

    def counts(self) -> tuple[int, int]:
        """(trainable, all) parameters."""

    def prepare(self, total_steps: int) -> None:
        """Called once, before the first step or before resuming."""

    def extra_loss(self) -> Tensor | None:
        """A term of the loss of its own, once per step."""

    def after_step(self, step: int) -> dict[str, int] | None:
        """Called after each optimizer step (from 1), with the gradients still there; changed ranks, if any."""

    def state(self) -> dict[str, Tensor]:
        """Copies of every tensor that resuming needs, the optimizer's apart."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`.

        Raises:
            CheckpointError: the tensors are another job's.
        """

    def save(self, folder: Path) -> Path:
        """Write the result as other libraries read it."""


class AdapterTrainee:
    """The adapter `default` of a PeftModel, or of each model of a `Joined`."""

    kind = "adapter"

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module = model
        self._parts = parts_of(model)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            start + name: parameter
            for start, part in self._parts.items()
            for name, parameter in part.adapter_parameters("default").items()
        }

    def counts(self) -> tuple[int, int]:
        trained, every = zip(*(part.get_nb_trainable_parameters() for part in self._parts.values()), strict=True)
        return sum(trained), sum(every)

    def prepare(self, total_steps: int) -> None:
        for part in self._parts.values():
            hooks.prepare_training(part, "default", total_steps)
            part.adds_extra_loss = False

    def extra_loss(self) -> Tensor | None:
        found = [hooks.extra_loss(part, "default") for part in self._parts.values()]
        terms = [term for term in found if term is not None]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else None

    def after_step(self, step: int) -> dict[str, int] | None:
        ranks: dict[str, int] = {}
        for start, part in self._parts.items():
            ranks |= {start + name: rank for name, rank in (hooks.after_step(part, "default", step) or {}).items()}
        return ranks or None

    def state(self) -> dict[str, Tensor]:
        return {
            start + name: tensor
            for start, part in self._parts.items()
            for name, tensor in raw_state(part, "default").items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        others = [start for start in self._parts if start]
        for start, part in self._parts.items():
            own = {
                name.removeprefix(start): tensor
                for name, tensor in state.items()
                if (name.startswith(start) if start else not name.startswith(tuple(others)))
            }
            restore_raw_state(part, "default", own)

    def save(self, folder: Path) -> Path:
        for start, part in self._parts.items():
            save_adapter(part, folder / start.rstrip("."))
        return folder


class FullTrainee:
    """Every weight of the base that its task left trainable.

    A task whose model is more than `save_pretrained` writes (a pipeline) has `save_model(loaded, folder)`.
    """

    kind = "model"

    def __init__(self, loaded: Loaded, task: Any) -> None:
        self.model: nn.Module = loaded.model
        self.loaded = loaded
        self.task = task
        packed = [name for name, p in self.parameters().items() if not p.is_floating_point()]
        if packed:
            raise TrainingError(f"{packed[0]} is quantised and cannot be trained.", "Load the base unquantised.")

    def parameters(self) -> dict[str, nn.Parameter]:
        # A tied weight is listed once, under its first name.
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def counts(self) -> tuple[int, int]:
        trained = sum(p.numel() for p in self.parameters().values())
        return trained, sum(p.numel() for p in self.model.parameters())

    def prepare(self, total_steps: int) -> None:
        pass

    def extra_loss(self) -> Tensor | None:
        return None

    def after_step(self, step: int) -> dict[str, int] | None:
        return None

    def _tensors(self) -> dict[str, Tensor]:
        """What training changes: parameters, and buffers that belong to the model (running means)."""
        kept = self.model.state_dict().keys()
        buffers = {name: buffer for name, buffer in self.model.named_buffers() if name in kept}
        return {**self.parameters(), **buffers}

    def state(self) -> dict[str, Tensor]:
        return {name: whole(t.detach()).to("cpu", copy=True).contiguous() for name, t in self._tensors().items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        own = self._tensors()
        odd = sorted(own.keys() ^ state.keys()) or sorted(n for n in own if own[n].shape != state[n].shape)
        if odd:
            raise CheckpointError(
                f"The checkpoint does not belong to this base: {len(odd)} tensors differ (first: {odd[0]}).",
                "Resume with the job that wrote it.",
            )
        for name, tensor in own.items():
            tensor.copy_(alike(state[name], tensor))

    def save(self, folder: Path) -> Path:
        """A normal model folder, written beside its place and then moved there whole."""
        draft, former = folder.with_name(f".{folder.name}.draft"), folder.with_name(f".{folder.name}.former")
        for left_over in (draft, former):
            shutil.rmtree(left_over, ignore_errors=True)
        try:
            own = getattr(self.task, "save_model", None)
            if own is not None:
                own(self.loaded, draft)
            else:
                model: Any = self.model
                model.save_pretrained(draft)
                self.loaded.processor.save_pretrained(draft)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise CheckpointError(
                f"The model cannot be written to {folder}: {error}.",
                "Free some space on the disk, then resume from the last checkpoint.",
            ) from error
        if folder.exists():
            folder.rename(former)
        draft.rename(folder)
        shutil.rmtree(former, ignore_errors=True)
        return folder
