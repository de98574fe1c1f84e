"""One run on several processes: each takes a part of every step's rows, and all take the same step.

The rows of a step, its loss and its gradient do not depend on how many processes share them: gradients are summed over
all targets of the step, wherever they were read. Two strategies:

- `ddp`: every process holds the whole base. An adapter's gradients are a few megabytes, so they go round in one message
  after the last backward pass instead of by hooks during it.
- `fsdp`: the transformer blocks' weights lie spread over the processes (torch's `fully_shard`, FSDP2) and are gathered
  block by block; an adapter on them is small and stays whole everywhere.

Process 0 speaks: it alone emits events, writes files and listens to commands.
"""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.errors import ConfigError, TrainingError
from engine.train.events import Control, Event, Sink

STRATEGIES = ("ddp", "fsdp")
STRATEGY = "ADAPTER_STUDIO_STRATEGY"
_BUCKET = 25_000_000  # bytes of gradients in one message
_GRACE = 20.0  # seconds in which process 0 may find out by itself that another has ended


class Silent:
    """The sink of the processes that do not speak."""

    def emit(self, event: Event) -> None:
        pass


@dataclass
class Group:
    """The processes of this run. One process alone is a group of size 1, for which nothing below does anything.

    Attributes:
        rank: this process's number; 0 speaks.
        size: how many there are.
        strategy: `ddp` or `fsdp`.
        blocks: with `fsdp`, the modules whose weights are spread.
    """

    rank: int = 0
    size: int = 1
    strategy: str = "ddp"
    blocks: list[nn.Module] = field(default_factory=list)

    @classmethod
    def current(cls, accelerator: Any) -> Group:
        """The group that the environment names (`start`, torchrun or `accelerate launch`).

        Raises:
            ConfigError: an unknown strategy.
        """
        strategy = os.environ.get(STRATEGY, "ddp")
        if strategy not in STRATEGIES:
            raise ConfigError(f"{STRATEGY} is {strategy!r}; needed: {' or '.join(STRATEGIES)}.")
        return cls(int(accelerator.process_index), int(accelerator.num_processes), strategy)

    @property
    def speaks(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return bool(self.blocks)

    def spread(self, model: nn.Module, whole: Sequence[nn.Parameter]) -> None:
        """With `fsdp`: spread the weights of the model's blocks; `whole` are parameters that stay with everyone.

        Raises:
            ConfigError: there are no blocks, or they are quantised.
        """
        if self.size == 1 or self.strategy != "fsdp":
            return
        from torch.distributed.fsdp import fully_shard

        stay = {id(p) for p in whole}
        found = [block for block in blocks_of(model) if any(id(p) not in stay for p in block.parameters())]
        if not found:
            raise ConfigError(
                f"{type(model).__name__} has no list of blocks whose weights could be spread.",
                "Use ddp instead of fsdp.",
            )
        codes = next((n for b in found for n, p in b.named_parameters() if not p.is_floating_point()), None)
        if codes:
            raise ConfigError(
                f"fsdp spreads weights, and {codes} is quantised.",
                "Use ddp, or quantization: none.",
            )
        for block in found:
            # Each block is the root of its own, which would keep its weights after the forward pass.
            fully_shard(
                block, reshard_after_forward=True, ignored_params={p for p in block.parameters() if id(p) in stay}
            )
        self.blocks = found

    def shares(self, rows: Sequence[Any], batch_size: int) -> list[tuple[list[Any], bool]]:
        """This process's batches of a step's rows, and whether each counts.

        All processes get as many batches, for with `fsdp` every forward pass is one of all; the batch of a process
        that has run out of rows does not count.

            5 rows, 2 processes, batches of 2:  0: [0, 2] [4]    1: [1, 3] [3, does not count]
        """
        own = list(rows[self.rank :: self.size])
        most = -(-len(rows) // self.size)
        parts = [(own[i : i + batch_size], True) for i in range(0, len(own), batch_size)]
        while len(parts) < -(-most // batch_size):
            parts.append(((own or list(rows))[-1:], False))
        return parts

    def summed(self, *values: float, device: torch.device | None = None) -> list[float]:
        """Each value summed over the processes."""
        if self.size == 1:
            return list(values)
        held = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(held)
        return [float(value) for value in held]

    def gathered(self, value: Any) -> list[Any]:
        """Every process's value, in the order of the processes."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def agreed(self, value: Any) -> Any:
        """Process 0's value, for all."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace the gradients by their mean over the processes; those of spread weights are that already."""
        if self.size == 1:
            return
        own = [p for p in parameters if not is_spread(p)]
        for bucket in _buckets(own):
            flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in bucket])
            dist.all_reduce(flat)
            flat /= self.size
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = part.view_as(parameter).clone()

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> float:
        """Scale the gradients of spread weights and whole ones down to a total norm; returns the norm before."""
        grads = [p.grad for p in parameters if p.grad is not None]
        parts: list[Any] = [g.to_local() if is_spread(g) else g for g in grads]  # type: ignore[attr-defined]
        squares = [0.0, 0.0]
        for grad, part in zip(grads, parts, strict=True):
            squares[is_spread(grad)] += float(part.float().square().sum())
        norm = math.sqrt(squares[0] + self.summed(squares[1], device=parts[0].device)[0])
        if norm > limit:
            for part in parts:
                part.mul_(limit / (norm + 1e-6))
        return norm

    def wait(self) -> None:
        """Return when every process is here."""
        if self.size > 1:
            dist.barrier()

    @torch.no_grad()
    def collect(self) -> None:
        """Put whole weights in the place of spread ones, to be saved: the model takes no further step."""
        for block in self.blocks:
            block.reshard()  # type: ignore[operator]
        for module in (module for block in self.blocks for module in block.modules()):
            for name, parameter in module._parameters.items():
                if parameter is not None and is_spread(parameter):
                    module._parameters[name] = nn.Parameter(whole(parameter.detach()), parameter.requires_grad)


class Shared:
    """A control that process 0 listens to and all obey, at the same step."""

    def __init__(self, control: Control, group: Group) -> None:
        self.control = control
        self.group = group

    def poll(self) -> str | None:
        found: str | None = self.group.agreed(self.control.poll() if self.group.speaks else None)
        return found


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The members of the model's outermost lists of modules of one kind: its transformer blocks."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or id(module) in inside or len(module) < 2:
            continue
        if len({type(member) for member in module}) == 1 and any(True for _ in module.parameters()):
            found += list(module)
            inside |= {id(m) for member in module for m in member.modules()}
    return found


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor's parts lie in several processes."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its parts; every process has to ask."""
    return tensor.full_tensor() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def alike(full: Tensor, model: Tensor) -> Tensor:
    """A whole tensor spread as `model` is."""
    if not is_spread(model) or full.dim() == 0:
        return full
    from torch.distributed.tensor import distribute_tensor

    held: Any = model
    return distribute_tensor(full.to(held.device), held.device_mesh, held.placements)


class Others:
    """The processes beside this one, number 0, which started them.

    Args:
        children: the processes.
        sink: told when one of them ends with an error while this one waits for it.
    """

    def __init__(self, children: Sequence[subprocess.Popen[bytes]], sink: Sink) -> None:
        self.children = tuple(children)
        self.sink = sink
        self._done = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def failure(self, patience: float = 0.0) -> TrainingError | None:
        """The error that another one's end is, if one has ended before its time or does within `patience` seconds."""
        until = time.monotonic() + patience
        codes = [child.poll() for child in self.children]
        while time.monotonic() < until and all(code is None for code in codes):
            time.sleep(0.1)
            codes = [child.poll() for child in self.children]
        failed = next((code for code in codes if code not in (None, 0, 3)), None)
        if failed is None:
            return None
        return TrainingError(
            f"One of the {len(codes) + 1} processes ended with status {failed}; the run cannot go on.",
            "Its last words stand in the log. Resume from the last checkpoint, with one process if need be.",
        )

    def finish(self) -> None:
        """Wait for the others at the end of a run, and end those that hang."""
        self._done.set()
        if dist.is_initialized():
            dist.destroy_process_group()
        for child in self.children:
            try:
                child.wait(_GRACE)
            except subprocess.TimeoutExpired:
                child.kill()

    def _watch(self) -> None:
        """End this process when another one failed and this one does not notice: it would wait for ever."""
        while not self._done.wait(0.5):
            error = self.failure()
            if error is None or self._done.wait(_GRACE):
                continue
            self.sink.emit(error.to_event())
            for child in self.children:
                child.kill()
            sys.stderr.write(f"Error: {error}\n")
            sys.stderr.flush()
            os._exit(1)


def start(processes: int, strategy: str, command: Sequence[str], sink: Sink) -> Others:
    """Make this process number 0 of `processes` and start the others; call it before the first `Accelerator`.

    Args:
        processes: how many in all; more than one.
        strategy: `ddp` or `fsdp`.
        command: what starts another one, as an argv list.
        sink: where this one's events go.

    Raises:
        ConfigError: fewer than two processes, more than there are GPUs, or an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"--strategy is {strategy!r}; needed: {' or '.join(STRATEGIES)}.")
    gpus = torch.cuda.device_count()
    if processes < 2 or (gpus and processes > gpus):
        most = f"2 to {gpus}, one a GPU" if gpus > 1 else "1 on one GPU" if gpus else "2 or more"
        raise ConfigError(f"--processes is {processes}; needed: {most}.")
    os.environ.update(
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(_free_port()),
        RANK="0",
        LOCAL_RANK="0",
        **{STRATEGY: strategy},
        **({} if gpus else {"ACCELERATE_USE_CPU": "true"}),
    )
    children = [
        subprocess.Popen(
            list(command),
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        for rank in range(1, processes)
    ]
    return Others(children, sink)


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one type and device, about `_BUCKET` bytes at a time, in their order."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        other = bucket and (bucket[0].dtype, bucket[0].device) != (parameter.dtype, parameter.device)
        if bucket and (other or size >= _BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel() * parameter.element_size()
    if bucket:
        yield bucket
