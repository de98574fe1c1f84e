"""One optimizer step of the loop on a model without data, its allocations counted."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from engine.memory.allocations import Allocations
from engine.memory.shapes import Shaped
from engine.tasks.base import Batch, Task
from engine.train.job import JobSpec

_STEPS = 2  # In the first the optimizer has no state yet.


def simulate(spec: JobSpec, task: Task, model: Shaped, batch: Batch) -> Allocations:
    """What `engine.train.loop` allocates for steps over this batch.

    With gradient accumulation the second forward pass finds the first one's gradients there.
    """
    from engine.train.optim import make_optimizer

    training, trainee = spec.training, model.trainee
    allocations = Allocations(_vocabulary(model.loaded.model))
    allocations.hold(model.base, "weights")
    allocations.hold((*trainee.model.parameters(), *trainee.model.buffers()), "adapter")
    allocations.hold(model.base, "weights")
    parameters = trainee.parameters()
    optimizer = make_optimizer(parameters, training)
    handles = [
        parameter.register_post_accumulate_grad_hook(lambda p: allocations.hold([p.grad], "gradients"))
        for parameter in parameters.values()
    ]
    trainee.model.train()
    try:
        with allocations:
            for _ in range(_STEPS):
                _step(spec, task, model, batch, list(parameters.values()), optimizer, allocations)
    finally:
        for handle in handles:
            handle.remove()
        trainee.model.eval()
    return allocations


def _step(
    spec: JobSpec,
    task: Task,
    model: Shaped,
    batch: Batch,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    allocations: Allocations,
) -> None:
    extra = model.trainee.extra_loss()
    if extra is not None:
        extra.backward()
    for _ in range(min(2, spec.training.gradient_accumulation)):
        with torch.autocast("cpu", model.compute) if model.compute is not None else nullcontext():
            part = task.loss(model.trainee.model, dict(batch))
        (part.total / max(1, part.count)).backward()
        del part
    if spec.training.max_grad_norm:
        nn.utils.clip_grad_norm_(parameters, spec.training.max_grad_norm)
    with allocations.allocating("optimizer"):
        optimizer.step()
    state = (value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, torch.Tensor))
    allocations.hold(state, "optimizer")
    optimizer.zero_grad(set_to_none=True)


def _vocabulary(model: nn.Module) -> int:
    config: Any = model.config
    inner = getattr(config, "text_config", None) or config
    return int(getattr(inner, "vocab_size", 0) or 0) if hasattr(model, "get_output_embeddings") else 0
