"""The loop's optimizer steps on a model without data, their allocations counted."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.autograd.graph import saved_tensors_hooks

from engine.kernels.loss import output_layer
from engine.kernels.together import unseen
from engine.layers import AdapterLayer
from engine.memory import depth
from engine.memory.allocations import HIDDEN, HIDDEN_ON_CPU, Allocations
from engine.memory.shapes import Shaped
from engine.tasks.base import Batch, Task
from engine.train.job import JobSpec
from engine.train.offload import SMALL

logger = logging.getLogger(__name__)

PAGED_FROM = 100_000
"""bitsandbytes pages the state of tensors of so many numbers."""


class Simulation:
    """What `engine.train.loop` allocates for steps of one job.

    The optimizer's step comes first, with gradients that are there: it makes the state, and its own peak is the same
    for every batch. Then `peak` runs the passes of one step each. Of a stack of equal blocks four are run, where that
    tells what all would do (`engine.memory.depth`).

    Args:
        whole: run all blocks in any case.

    Attributes:
        stack: the blocks of which four are run; None where all are.
        state: part -> bytes that stay from step to step.
        updating: part -> bytes at the peak of the optimizer's own step.
        trained: bytes of what is trained.
        adapted: whether a layer of the model carries an adapter.
    """

    def __init__(self, spec: JobSpec, task: Task, model: Shaped, device: str = "cpu", whole: bool = False) -> None:
        from engine.train.optim import check_optimizer

        check_optimizer(spec.training, device)
        self.spec, self.task, self.model = spec, task, model
        trainee = model.trainee
        # AdaLoRA's schedule wants to know; the memory of a step does not depend on it.
        trainee.prepare(spec.training.max_steps or 10_000)
        self.parameters = trainee.parameters()
        self.adapted = any(isinstance(module, AdapterLayer) for module in trainee.model.modules())
        self.trained = sum(p.numel() * p.element_size() for p in self.parameters.values())
        self.allocations = Allocations(_vocabulary(trainee.model), HIDDEN_ON_CPU if device == "cpu" else HIDDEN)
        self.allocations.hold((*trainee.model.parameters(), *trainee.model.buffers()), "adapter")
        self.allocations.hold(model.base, "weights")
        for parameter in self.parameters.values():
            parameter.register_post_accumulate_grad_hook(self._got_gradient)
        self.stack = None if whole else depth.find(trainee.model)
        self._optimizer_state: Any = {}
        # What the blocks that are left out keep from step to step, beside their weights.
        self._missing: Counter[str] = Counter()
        self._make_state()

    @contextmanager
    def shortened(self) -> Iterator[None]:
        """The model as its passes are run."""
        with self.stack.shortened() if self.stack else nullcontext():
            yield

    def peak(self, batch: Batch) -> Counter[str]:
        """Part -> bytes at the peak of a step over this batch.

        With gradient accumulation the second forward pass finds the first one's gradients there.
        """
        self._look(batch)
        if self.stack is not None:
            try:
                found = self._shortened_step(batch, self.stack)
            except (depth.UnevenError, LookupError, ValueError) as error:
                # Blocks that differ, or a model that wants all its blocks.
                logger.info("A step is run over all blocks: %s", error or "they do not all do the same")
                self.stack, self._missing = None, Counter()
                self._update(self.parameters)
                self._look(batch)
        if self.stack is None:
            found = self._whole_step(batch)
        return max(self.updating, found, key=Counter.total)

    def _look(self, batch: Batch) -> None:
        """What the loop does before its first step, which is not a part of any.

        The model is asked how it makes its logits, and its layers who reads the same input (`engine.train.loop.look`).
        """
        model = self.model.trainee.model
        # A model that wants all its blocks says so in the step itself; what is said of an evaluation has no numbers.
        faults = (LookupError, ValueError, DataDependentOutputException, DynamicOutputShapeException)
        with self.shortened(), _quiet(), suppress(*faults):
            output_layer(model)
            with torch.no_grad():
                if unseen(model):
                    self.task.loss(model, dict(batch))

    def _whole_step(self, batch: Batch) -> Counter[str]:
        with self._training():
            self.allocations.restart()
            self._run(batch)
            self._clip(self.parameters)
        return self.allocations.at_peak

    def _shortened_step(self, batch: Batch, stack: depth.Stack) -> Counter[str]:
        """As `_whole_step`, worked out from four blocks."""
        allocations, left_out = self.allocations, stack.left_out
        clipped = []
        with stack.shortened(), stack.marked(allocations.mark), self._training():
            allocations.mark("before")
            self._run(batch, allocations.mark)
            spans = allocations.spans()
            for count in (depth.KEPT - 1, depth.KEPT):
                allocations.restart()
                self._clip(stack.parameters(self.parameters, count))
                clipped.append(allocations.at_peak)
            kept = allocations.begun_in("forward 1", "backward 1")
        found, added = depth.lengthened(spans, left_out, self._missing, kept)
        fewer, run = clipped
        clipping = depth.extended(fewer, run, left_out)
        return max(found, depth.summed(clipping, added), key=Counter.total)

    @contextmanager
    def _training(self) -> Iterator[None]:
        """A step's allocations are counted; nothing of it stays."""
        model = self.model.trainee.model.train()
        try:
            with _quiet(), self.allocations:
                yield
        finally:
            self.allocations.spans()
            for parameter in self.parameters.values():
                parameter.grad = None
            model.eval()

    def _run(self, batch: Batch, mark: Callable[[str], None] = lambda name: None) -> None:
        extra = self.model.trainee.extra_loss()
        if extra is not None:
            extra.backward()
        for _ in range(min(2, self.spec.training.gradient_accumulation)):
            self._passes(batch, mark)

    def _clip(self, parameters: Mapping[str, nn.Parameter]) -> None:
        if self.spec.training.max_grad_norm:
            nn.utils.clip_grad_norm_(parameters.values(), self.spec.training.max_grad_norm)

    def _passes(self, batch: Batch, mark: Callable[[str], None]) -> None:
        compute = self.model.compute
        casting = torch.autocast("cpu", compute) if compute is not None else nullcontext()
        with casting, self._away() if self.spec.training.activation_offload else nullcontext():
            part = self.task.loss(self.model.trainee.model, dict(batch))
            mark("copies end")
        mark("backward")
        (part.total / max(1, part.count)).backward()
        mark("graph ends")

    def _make_state(self) -> None:
        """The optimizer's state and the peak of the step that makes it, of four blocks where that tells all."""
        stack, self._missing = self.stack, Counter()
        if stack is not None:
            counts = (depth.KEPT - 1, depth.KEPT)
            (less, low), (more, high) = (self._update(stack.parameters(self.parameters, n)) for n in counts)
            block = depth.difference(more, less)
            of_block = {id(p) for p in stack.blocks[0].parameters()}
            gradients = sum(p.nbytes for p in self.parameters.values() if id(p) in of_block)
            # No moment of the step grows by more with a block than the last ones: if the largest does, it stays so.
            if depth.difference(high, low) in (block, depth.summed(block, {"gradients": gradients})):
                self._missing = depth.times(block, stack.left_out)
                self.state = depth.summed(more, self._missing)
                self.updating = depth.extended(low, high, stack.left_out)
                return
        self.state, self.updating = self._update(self.parameters)

    def _update(self, parameters: Mapping[str, nn.Parameter]) -> tuple[Counter[str], Counter[str]]:
        """An optimizer step with gradients of zero: part -> bytes that stay, and at its peak."""
        from engine.train.optim import make_optimizer

        allocations = self.allocations
        # What another step made ends.
        self._optimizer_state.clear()
        optimizer = make_optimizer(parameters, self.spec.training)
        self._optimizer_state = optimizer.state
        allocations.restart()
        with _quiet(), allocations:
            for parameter in parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            allocations.hold((p.grad for p in parameters.values() if p.grad is not None), "gradients")
            with allocations.allocating("optimizer"):
                optimizer.step()
            entries = (value for entry in optimizer.state.values() for value in entry.values())
            allocations.hold((value for value in entries if isinstance(value, Tensor)), "optimizer")
            optimizer.zero_grad(set_to_none=True)
        if self.spec.training.optimizer.startswith("paged_"):
            _leave_the_card(optimizer)
            allocations.restart()
        return Counter(allocations.live), allocations.at_peak

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


def _leave_the_card(optimizer: torch.optim.Optimizer) -> None:
    """Paged state goes to the machine's memory when the card is full, so that none of it has to fit there."""
    for parameter, entry in optimizer.state.items():
        for key in ("state1", "state2"):
            if parameter.numel() >= PAGED_FROM:
                del entry[key]


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
