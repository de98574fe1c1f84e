"""The one training loop: every task and every method runs through it.

    setup -> [ step -> maybe checkpoint, evaluate, obey ]* -> save

A step is one optimizer update over `batch_size * gradient_accumulation` rows; its loss is the mean over all their
targets, however they fall into batches. The order of rows is a permutation drawn from (seed, epoch).
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from engine.errors import CheckpointError, DataError, DivergedError, EngineError, TrainingError
from engine.kernels.together import unseen
from engine.memory.machine import held, memory_limit, peak
from engine.records import in_order
from engine.sheets import write_picture
from engine.tasks.base import (
    Batch,
    Encoded,
    Exporting,
    Extending,
    Keeping,
    Loaded,
    LossSum,
    Prompting,
    Task,
    metrics_of,
)
from engine.train.best import Best, Standing
from engine.train.checkpoints import list_checkpoints, read_state, restore_checkpoint, save_checkpoint
from engine.train.events import Control, Sink
from engine.train.job import JobSpec
from engine.train.offload import Offload
from engine.train.optim import check_optimizer, make_optimizer, rate_at, set_rate
from engine.train.order import length_of, step_rows
from engine.train.parallel import Group, Shared, is_spread
from engine.train.trainee import Trainee

_FREE = (
    "eval_every", "checkpoint_every", "sample_prompts", "threads", "max_grad_norm", "learning_rate",
    "activation_offload", "early_stopping_patience",
)  # fmt: skip
_NEWER = {"loraplus_ratio": None, "loraplus_embedding_rate": None, "optimizer": "adamw", "group_by_length": True}


@dataclass
class Counters:
    """What a run has done so far; saved with each checkpoint."""

    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    eval_loss: float | None = None
    first_eval_loss: float | None = None


@dataclass
class Run:
    """Everything that one run's steps need; `compute` is the type of the products where it is not the weights'.

    `prompts` are answered at each evaluation.
    """

    spec: JobSpec
    out: Path
    task: Task
    loaded: Loaded
    trainee: Trainee
    accelerator: Accelerator
    train_rows: Sequence[Any]
    eval_rows: Sequence[Any]
    sink: Sink
    control: Control
    compute: torch.dtype | None = None
    prompts: Sequence[str] = ()
    group: Group = field(default_factory=Group)
    counters: Counters = field(default_factory=Counters)
    step: int = 0

    def __post_init__(self) -> None:
        self.collate: Callable[[list[Any]], Batch] = self.task.collator(self.loaded)
        length = length_of(self.task, self.collate)
        if length is not None:
            self.eval_rows = in_order(self.eval_rows, length)
        self.length = length if self.spec.training.group_by_length else None
        self.trainee.prepare(self.total_steps)
        self.parameters = self.trainee.parameters()
        if not self.parameters:
            raise TrainingError(f"The {self.trainee.kind} has no parameters to train.", "Check target_modules.")
        if self.group.size > 1:
            self.control = Shared(self.control, self.group)
            adapter = [] if self.spec.full else [p for p in self.trainee.model.parameters() if p.requires_grad]
            self.group.spread(self.trainee.model, adapter)
            # Spreading replaces the parameters.
            self.parameters = self.trainee.parameters()
        spread = any(is_spread(parameter) for parameter in self.parameters.values())
        check_optimizer(self.spec.training, self.accelerator.device.type, spread)
        optimizer = make_optimizer(self.parameters, self.spec.training)
        if self.group.sharded:
            # Whole and spread weights do not go into one call of a fused step.
            for settings in optimizer.param_groups:
                settings["foreach"] = False
        self.wrapped: nn.Module
        # Several processes average their gradients in `Group.average`, so Accelerate wraps the model in nothing.
        self.wrapped = self.accelerator.prepare_model(self.trainee.model, evaluation_mode=self.group.size > 1)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.durations: deque[tuple[float, int]] = deque(maxlen=20)
        patience = self.spec.training.early_stopping_patience
        self.best = Best(self.out / "best", patience, self.trainee, self.group) if patience else None

    def loss(self, batch: Batch) -> LossSum:
        """The task's loss of a batch."""
        device = self.accelerator.device
        away = self.spec.training.activation_offload and torch.is_grad_enabled()
        offload = Offload(self.trainee.model, device) if away else nullcontext()
        with torch.autocast(device.type, self.compute, enabled=self.compute is not None), offload:
            return self.task.loss(self.wrapped, {key: value.to(device) for key, value in batch.items()})

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    @property
    def steps_per_epoch(self) -> int:
        training = self.spec.training
        return math.ceil(len(self.train_rows) / (training.batch_size * training.gradient_accumulation))

    @property
    def total_steps(self) -> int:
        training = self.spec.training
        return training.max_steps or max(1, round(training.epochs * self.steps_per_epoch))


@torch.no_grad()
def look(run: Run) -> None:
    """A short row goes through the model without gradients, unless one did when the model was asked what it does.

    Layers that read the same input find each other so (`engine.kernels.together`), and nothing else is left of it. It
    has to be before the first step of a run, begun or resumed, or a resumed one would not take the steps of one that
    was never interrupted.
    """
    if not unseen(run.trainee.model):
        return
    rows = run.train_rows
    row = min(rows[:64], key=run.length) if run.length else rows[0]
    run.wrapped.eval()
    devices = [run.accelerator.device] if run.accelerator.device.type == "cuda" else []
    state = random.getstate()
    with torch.random.fork_rng(devices):
        run.loss(run.collate([row]))
    random.setstate(state)


def fit(run: Run, resume: bool) -> str:
    """Train to the end, or until the control says stop or pause.

    Returns:
        `done`, `stopped` or `paused`.

    Raises:
        TrainingError: the loss or the gradient is not finite.
        CheckpointError: resuming from a checkpoint that does not belong to this job.
    """
    look(run)
    if resume:
        _resume(run)
    trainable, parameters = run.trainee.counts()
    run.sink.emit(
        {
            "type": "start",
            "total_steps": run.total_steps,
            "first_step": run.step,
            "trainable": trainable,
            "parameters": parameters,
            "train_rows": len(run.train_rows),
            "eval_rows": len(run.eval_rows),
            "device": str(run.accelerator.device),
            "precision": str(run.compute or next(run.loaded.model.parameters()).dtype).removeprefix("torch."),
            "quantization": run.spec.quantization,
            "full": run.spec.full,
            "threads": torch.get_num_threads(),
            "memory_limit": _memory_limit(run.accelerator.device),
        }
    )
    training = run.spec.training
    # A run that was paused in its last evaluation has that one to make up for.
    asked = evaluate(run) if run.step in (0, run.total_steps) else None
    per_step = training.batch_size * training.gradient_accumulation
    stream = step_rows(run.train_rows, per_step, training.seed, run.step, run.length)
    if run.best and not run.eval_rows:
        message = "No rows are left to evaluate on, so the run will not stop early."
        run.sink.emit({"type": "warning", "message": message})
    while run.step < run.total_steps and not (run.best and run.best.over):
        asked = asked or run.control.poll()
        if asked in ("stop", "pause"):
            return _leave(run, asked)
        if asked == "checkpoint":
            _checkpoint(run)
        elif asked == "sample":
            asked = sample(run)
            if asked:
                continue
        asked = None
        _step(run, next(stream))
        last = run.step == run.total_steps
        if run.step % training.eval_every == 0 or last:
            asked = evaluate(run)
        if run.step % training.checkpoint_every == 0 and not last:
            _checkpoint(run)
    if asked in ("stop", "pause"):
        return _leave(run, asked)
    return _finish(run)


def _step(run: Run, rows: list[Any]) -> None:
    """One optimizer update, and its event."""
    training, started = run.spec.training, time.perf_counter()
    rate = rate_at(run.step, run.total_steps, training)
    set_rate(run.optimizer, rate)
    run.wrapped.train()
    group, device = run.group, run.accelerator.device
    batches = [(run.collate(part), counts) for part, counts in group.shares(rows, training.batch_size)]
    counted = [batch for batch, counts in batches if counts]
    targets, tokens = group.summed(
        sum(run.task.targets(batch) for batch in counted),
        sum(run.task.tokens(batch) for batch in counted),
        device=device,
    )
    total, extra = 0.0, _extra_loss(run)
    for batch, counts in batches:
        part = run.loss(batch)
        # Gradients are averaged over the processes, and their sum is wanted.
        run.accelerator.backward(part.total * ((group.size if counts else 0) / targets))
        total += float(part.total.detach()) if counts else 0.0
    parameters = list(run.parameters.values())
    group.average(parameters)
    limit = training.max_grad_norm or math.inf
    clip = group.clip if group.sharded else run.accelerator.clip_grad_norm_
    norm = float(clip(parameters, limit))
    loss = group.summed(total, device=device)[0] / targets
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise DivergedError(
            f"Step {run.step + 1} gave a loss of {loss} and a gradient norm of {norm}: the run diverged. "
            "The last checkpoint is kept.",
            "Lower the learning rate or lengthen the warm-up; then start a new run or resume with them.",
        )
    run.optimizer.step()
    ranks = run.trainee.after_step(run.step + 1)
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    seconds = time.perf_counter() - started
    run.durations.append((seconds, int(tokens)))
    run.counters.tokens += int(tokens)
    run.counters.seconds += seconds
    run.counters.loss = loss
    recent = sum(s for s, _ in run.durations)
    run.sink.emit(
        {
            "type": "step",
            "step": run.step,
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "tokens": int(tokens),
            "tokens_per_s": sum(n for _, n in run.durations) / recent,
            "epoch": run.step / run.steps_per_epoch,
            "eta_s": recent / len(run.durations) * (run.total_steps - run.step),
            "memory": held(device.type),
            **({} if extra is None else {"extra_loss": extra}),
        }
    )
    if ranks:
        run.sink.emit({"type": "rank", "step": run.step, "ranks": ranks})


def _extra_loss(run: Run) -> float | None:
    """The gradient of the method's own term, once per step; its value is reported apart from the task's loss."""
    extra = run.trainee.extra_loss()
    if extra is None:
        return None
    run.accelerator.backward(extra)
    return float(extra.detach())


@torch.no_grad()
def evaluate(run: Run) -> str | None:
    """Mean loss over the evaluation rows, and the samples.

    Returns:
        What the control asked for meanwhile. `stop` and `pause` end the evaluation at once, without its event: with
        many rows it may last longer than a person's patience.
    """
    asked: str | None = None
    if run.eval_rows:
        run.wrapped.eval()
        scored: list[tuple[float, int, Any]] = []
        size, group = run.spec.training.batch_size, run.group
        batches = [(start, start + size) for start in range(0, len(run.eval_rows), size)]
        for start in range(0, len(batches), group.size):
            asked = asked or run.control.poll()
            if asked in ("stop", "pause"):
                return asked
            # Each process takes one batch; where none is left it reads the last one again, and that is not counted.
            first, last = batches[min(start + group.rank, len(batches) - 1)]
            part = run.loss(run.collate(list(run.eval_rows[first:last])))
            scored += group.gathered((float(part.total), part.count, part.outcome))
        del scored[len(batches) :]
        count = sum(part[1] for part in scored)
        loss, outcomes = sum(part[0] for part in scored) / count, [part[2] for part in scored]
        run.counters.eval_loss = loss
        if run.counters.first_eval_loss is None:
            run.counters.first_eval_loss = loss
        found = metrics_of(run.task, outcomes)
        metrics = {"metrics": found} if found else {}
        run.sink.emit({"type": "eval", "step": run.step, "loss": loss, "tokens": count, **metrics})
        if run.best:
            run.best.take(run.step, loss)
    return asked or sample(run)


def sample(run: Run) -> str | None:
    """Answer the fixed prompts with the adapter as it is now; returns what the control asked for meanwhile."""
    for number, prompt in enumerate(run.prompts):
        asked = run.control.poll()
        if asked:
            return asked
        if not (run.group.speaks or run.group.sharded):
            continue
        try:
            answer = run.task.sample(run.trainee.model, run.loaded, prompt)
        except EngineError as error:
            # A prompt that cannot be answered is no reason to lose the run.
            run.sink.emit({"type": "warning", "message": f"The sample {prompt[:60]!r} was left out: {error}"})
            continue
        if not run.group.speaks:
            continue
        shown: dict[str, str] = {"image": prompt} if isinstance(run.task, Prompting) else {}
        if not isinstance(answer, str):
            shown["file"] = str(write_picture(answer, run.out / "samples" / f"step-{run.step:06}-{number}.png"))
        text = answer if isinstance(answer, str) else ""
        run.sink.emit({"type": "sample", "step": run.step, "prompt": prompt, "text": text, **shown})
    return None


def _checkpoint(run: Run) -> Path:
    path = save_checkpoint(
        run.checkpoints,
        run.step,
        run.trainee,
        run.optimizer.optimizer,
        run.parameters,
        {
            "counters": vars(run.counters),
            "job": _identity(run.spec),
            **({"best": vars(run.best.standing)} if run.best else {}),
        },
        writes=run.group.speaks,
    )
    if run.best:
        run.best.prune()
    run.group.wait()
    run.sink.emit({"type": "checkpoint", "step": run.step, "path": str(path)})
    return path


def _identity(spec: JobSpec) -> dict[str, Any]:
    """What must not change between a run and its resumption."""
    plain = spec.to_dict()
    training = {key: value for key, value in plain["training"].items() if key not in _FREE}
    # Checkpoints from before these keys have none of them, and mean the same.
    training = {key: value for key, value in training.items() if key not in _NEWER or value != _NEWER[key]}
    # Nor of these, where they are what they always were.
    newer = {key: plain[key] for key, usual in (("quantization", "none"), ("full", False)) if plain[key] != usual}
    return {
        **newer,
        "model": plain["model"],
        "adapter": plain["adapter"],
        "options": plain["options"],
        "training": training,
        "data": _rows_of(spec),
    }


def _rows_of(spec: JobSpec) -> dict[str, Any]:
    """The rows by their content: the order of rows and the rows held back follow from them."""
    from engine.data import fingerprint

    fixes = {"fixes": dict(spec.data.fixes)} if spec.data.fixes else {}
    return {"fingerprint": fingerprint(spec.data.path), "eval_split": spec.data.eval_split, **fixes}


def _resume(run: Run) -> None:
    found = list_checkpoints(run.checkpoints)
    if not found:
        message = "There was no checkpoint yet; the run starts from its first step."
        run.sink.emit({"type": "warning", "message": message})
        return
    state: dict[str, Any] | None = None
    for path in reversed(found):
        try:
            foreign = read_state(path).get("job") != _identity(run.spec)
            if not foreign:
                state = restore_checkpoint(path, run.trainee, run.optimizer.optimizer, run.parameters)
                break
        except CheckpointError as error:
            if path == found[0]:
                raise
            run.sink.emit({"type": "warning", "message": f"{error.message} The one before it is used."})
            continue
        raise CheckpointError(
            f"The checkpoint {path.name} was written by a job with other settings or other rows.",
            "Resume with the run's own spec.yaml and data, or start a new run.",
        )
    assert state is not None
    if run.group.rank:
        # The random state was process 0's; masks of dropout are to differ.
        torch.manual_seed(torch.initial_seed() + 7919 * run.group.rank + int(state["step"]))
    run.step = int(state["step"])
    run.counters = Counters(**state["counters"])
    if run.best and not run.best.resume(Standing(**state.get("best", {}))):
        message = "What was kept of the best evaluation is gone; early stopping counts from here on."
        run.sink.emit({"type": "warning", "message": message})


def _save(run: Run) -> Path:
    folder = run.out / run.trainee.kind
    run.group.collect()
    if run.group.speaks:
        run.trainee.save(folder)
        if isinstance(run.task, Keeping):
            run.task.save(folder)
        if isinstance(run.task, Exporting) and run.trainee.kind == "adapter":
            run.task.export(run.trainee.model, folder)
    run.group.wait()
    return folder


def _leave(run: Run, asked: str) -> str:
    path = _checkpoint(run)
    if asked == "pause":
        run.sink.emit({"type": "paused", "step": run.step, "checkpoint": str(path)})
        return "paused"
    folder = _save(run)
    run.sink.emit({"type": "stopped", "step": run.step, run.trainee.kind: str(folder)})
    return "stopped"


def _finish(run: Run) -> str:
    run.sink.emit({"type": "status", "phase": "saving", "message": f"Saving the {run.trainee.kind}"})
    kept: dict[str, Any] = {}
    if run.best and run.best.standing.step is not None:
        run.best.restore()
        kept = {"best_step": run.best.standing.step, "early": run.step < run.total_steps}
        run.counters.eval_loss = run.best.standing.loss
    folder = _save(run)
    if run.best:
        run.best.clear()
    counters = run.counters
    run.sink.emit(
        {
            "type": "done",
            "step": run.step,
            "loss": counters.loss,
            "eval_loss": counters.eval_loss,
            "first_eval_loss": counters.first_eval_loss,
            "tokens": counters.tokens,
            "seconds": counters.seconds,
            "peak_bytes": peak(run.accelerator.device.type),
            run.trainee.kind: str(folder),
            **kept,
        }
    )
    return "done"


def _memory_limit(device: torch.device) -> int:
    """Bytes of memory where the run trains."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else memory_limit()


def encode_parts(
    task: Task, loaded: Loaded, spec: JobSpec, train: Sequence[Any], held: Sequence[Any], sink: Sink
) -> tuple[Encoded, Encoded]:
    """Training and evaluation rows as the model takes them; what was cut or left out becomes a warning."""

    def tell(phase: str, fraction: float | None, message: str) -> None:
        sink.emit({"type": "status", "phase": phase, "fraction": fraction, "message": message})

    first, second = task.encode(train, loaded, spec.training, tell), Encoded([])
    if isinstance(task, Extending):
        first = Encoded([*first.rows, *task.extra(loaded, tell)], first.notes)
    if held:
        try:
            second = task.encode(held, loaded, spec.training, tell)
        except DataError as error:
            second = Encoded([], (f"{error.message} The run goes on without evaluation.",))
    parts = (first, second)
    for label, part in zip(("Training", "Evaluation"), parts, strict=True):
        for note in part.notes:
            sink.emit({"type": "warning", "message": f"{label}: {note}"})
    return parts
