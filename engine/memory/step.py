"""The loop's optimizer steps on a model without data, their allocations counted."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks

from engine.memory.allocations import HIDDEN, HIDDEN_ON_CPU, Allocations
from engine.memory.shapes import Shaped
from engine.tasks.base import Batch, Task
from engine.train.job import JobSpec
from engine.train.offload import SMALL

PAGED_FROM = 100_000
"""bitsandbytes pages the state of tensors of so many numbers."""


class Simulation:
    """What `engine.train.loop` allocates for steps of one job.

    The optimizer's step comes first, with gradients that are there: it makes the state, and its own peak is the same
    for every batch. Then `peak` runs the passes of one step each.

    Attributes:
        state: part -> bytes that stay from step to step.
        trained: bytes of what is trained.
    """

    def __init__(self, spec: JobSpec, task: Task, model: Shaped, device: str = "cpu") -> None:
        from engine.train.optim import check_optimizer, make_optimizer

        check_optimizer(spec.training, device)
        self.spec, self.task, self.model = spec, task, model
        trainee = model.trainee
        # AdaLoRA's schedule wants to know; the memory of a step does not depend on it.
        trainee.prepare(spec.training.max_steps or 10_000)
        parameters = trainee.parameters()
        self.parameters = list(parameters.values())
        self.trained = sum(p.numel() * p.element_size() for p in self.parameters)
        self.optimizer = make_optimizer(parameters, spec.training)
        self.allocations = Allocations(_vocabulary(trainee.model), HIDDEN_ON_CPU if device == "cpu" else HIDDEN)
        self.allocations.hold((*trainee.model.parameters(), *trainee.model.buffers()), "adapter")
        self.allocations.hold(model.base, "weights")
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._got_gradient)
        with _quiet(), self.allocations:
            self._update()
        if spec.training.optimizer.startswith("paged_"):
            self._leave_the_card()
        self.state = Counter(self.allocations.live)
        self._updating = Counter(self.allocations.at_peak), self.allocations.peak

    def peak(self, batch: Batch) -> Counter[str]:
        """Part -> bytes at the peak of a step over this batch.

        With gradient accumulation the second forward pass finds the first one's gradients there.
        """
        allocations, trainee, training = self.allocations, self.model.trainee, self.spec.training
        # Each batch begins with the peak of the optimizer's own step.
        allocations.at_peak, allocations.peak = self._updating
        trainee.model.train()
        with _quiet(), allocations:
            extra = trainee.extra_loss()
            if extra is not None:
                extra.backward()
            for _ in range(min(2, training.gradient_accumulation)):
                self._passes(batch)
            if training.max_grad_norm:
                nn.utils.clip_grad_norm_(self.parameters, training.max_grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        trainee.model.eval()
        return allocations.at_peak

    def _passes(self, batch: Batch) -> None:
        compute = self.model.compute
        casting = torch.autocast("cpu", compute) if compute is not None else nullcontext()
        with casting, self._away() if self.spec.training.activation_offload else nullcontext():
            part = self.task.loss(self.model.trainee.model, dict(batch))
        (part.total / max(1, part.count)).backward()

    def _update(self) -> None:
        """An optimizer step with gradients of zero."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.allocations.hold((p.grad for p in self.parameters if p.grad is not None), "gradients")
        with self.allocations.allocating("optimizer"):
            self.optimizer.step()
        entries = (value for entry in self.optimizer.state.values() for value in entry.values())
        self.allocations.hold((value for value in entries if isinstance(value, Tensor)), "optimizer")
        self.optimizer.zero_grad(set_to_none=True)

    def _leave_the_card(self) -> None:
        """Paged state goes to the machine's memory when the card is full, so that none of it has to fit there."""
        for parameter, entry in self.optimizer.state.items():
            for key in ("state1", "state2"):
                if parameter.numel() >= PAGED_FROM:
                    del entry[key]
        allocations = self.allocations
        allocations.at_peak, allocations.peak = Counter(allocations.live), allocations.total

    def _away(self) -> saved_tensors_hooks:
        """As `engine.train.offload`: what autograd saves ends, and is there again when it is asked for."""
        trainee = self.model.trainee.model
        own = {tensor.untyped_storage()._cdata for tensor in (*trainee.parameters(), *trainee.buffers())}

        def pack(tensor: Tensor) -> Any:
            stays = tensor.nbytes < SMALL or tensor.untyped_storage()._cdata in own
            if stays or not isinstance(tensor, FakeTensor):
                return tensor
            return tensor.fake_mode, tensor.size(), tensor.dtype

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            mode, shape, dtype = kept
            with mode:
                return torch.empty(shape, dtype=dtype)

        return saved_tensors_hooks(pack, unpack)

    def _got_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.allocations.hold([parameter.grad], "gradients")


@contextmanager
def _quiet() -> Iterator[None]:
    """DoRA asks where its tensors lie, to see whether they changed; tensors without data lie nowhere."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        yield


def _vocabulary(model: nn.Module) -> int:
    """Tokens of the output layer; 0 where there is none."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    weight = getattr(head, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.dim() == 2 else 0
