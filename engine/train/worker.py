"""One run from its spec to its adapter: load, attach, encode, train. Runs in a process of its own."""

from __future__ import annotations

import dataclasses
import math
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import threads
from engine.errors import CheckpointError
from engine.train.events import Control, Sink
from engine.train.job import JobSpec

if TYPE_CHECKING:
    import torch

    from engine.tasks.base import Task


def run(spec: JobSpec, out: Path, sink: Sink, control: Control, resume: bool = False) -> str:
    """Run a job in `out`, which will hold `spec.yaml`, `checkpoints/` and `adapter/` (with `full`: `model/`).

    Args:
        spec: the job.
        out: the run's folder; made when missing.
        sink: takes the events.
        control: asked once a step.
        resume: go on from the last checkpoint in `out`.

    Of several processes (`engine.train.parallel`) each calls this with the same job; number 0 writes and emits.

    Returns:
        `done`, `stopped` or `paused`.

    Raises:
        ShortageError: memory ran out; it says what was predicted and what would fit.
        EngineError: the job cannot run or go on; nothing that was saved before is lost.
    """
    from engine.memory.shortage import is_memory, shortage

    try:
        return _run(spec, out, sink, control, resume)
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        from engine.models.loading import default_device

        # The frames hold the model.
        raise shortage(spec, error.with_traceback(None), default_device()) from None


def _run(spec: JobSpec, out: Path, sink: Sink, control: Control, resume: bool) -> str:
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from engine.inspection import adapter_config
    from engine.model import get_peft_model
    from engine.models.catalogue import portable
    from engine.tasks import get_task
    from engine.tasks.base import Fitting, Joining, Prompting
    from engine.train.loop import Run, encode_parts, fit
    from engine.train.optim import check_optimizer
    from engine.train.parallel import Group, Silent
    from engine.train.trainee import AdapterTrainee, FullTrainee, Trainee

    speaks = os.environ.get("RANK", "0") == "0"
    if speaks:
        out.mkdir(parents=True, exist_ok=True)
        _refuse_to_overwrite(spec, out, resume)
        if not (resume and (out / "spec.yaml").exists()):
            spec.save(out / "spec.yaml")
    else:
        sink = Silent()
    if spec.training.threads:
        torch.set_num_threads(spec.training.threads)

    def tell(phase: str, fraction: float | None, message: str) -> None:
        sink.emit({"type": "status", "phase": phase, "fraction": fraction, "message": message})

    task = get_task(spec.task, spec.options)
    if not getattr(task, "one_shape", False):
        threads.keep_few_products()
    # Faults of the adapter's fields and of the data come before minutes of loading.
    config = None if spec.full else adapter_config(spec.adapter, task.task_type, portable(spec.model))
    train, held = examples_of(spec, task, sink)
    if isinstance(task, Fitting):
        task = task.fitted(train)
    if config is not None:
        config.check_steps(_most_steps(spec, train))
    accelerator = Accelerator(mixed_precision="no")
    check_optimizer(spec.training, accelerator.device.type)
    group = Group.current(accelerator)
    tell("loading", None, f"Loading {spec.model}")
    loading, compute = _full_precision(spec, accelerator.device) if spec.full else (spec, None)
    loaded = task.load(loading, accelerator.device, tell)
    set_seed(spec.training.seed)
    if spec.training.gradient_checkpointing:
        checkpoint_activations(loaded.model)
    trainee: Trainee
    if config is None:
        trainee = FullTrainee(loaded, task)
    else:
        adapted = get_peft_model(loaded.model, config)
        trainee = AdapterTrainee(task.together(loaded, adapted) if isinstance(task, Joining) else adapted)
        loaded = dataclasses.replace(loaded, model=trainee.model)
    loaded = dataclasses.replace(loaded, cache=out / "cache")
    encoded, held_out = encode_parts(task, loaded, spec, train, held, sink)
    prompts = list(spec.training.sample_prompts)
    if not prompts and isinstance(task, Prompting):
        prompts = task.prompts(held)
    random.seed(spec.training.seed)
    if group.rank:
        # Equal adapters to begin with, and different masks of dropout.
        torch.manual_seed(spec.training.seed + 7919 * group.rank)
    tell("training", None, "Training")
    return fit(
        Run(
            spec=spec,
            out=out,
            task=task,
            loaded=loaded,
            trainee=trainee,
            accelerator=accelerator,
            train_rows=encoded.rows,
            eval_rows=held_out.rows,
            sink=sink,
            control=control,
            compute=compute,
            prompts=prompts,
            group=group,
        ),
        resume,
    )


def checkpoint_activations(model: Any) -> None:
    """Activations are worked out again in the backward pass; transformers and diffusers have a name each for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.enable_gradient_checkpointing()


def _most_steps(spec: JobSpec, train: Sequence[Mapping[str, Any]]) -> int:
    """How many steps the training has at the most: each answer of a conversation may become a row."""
    training = spec.training
    if training.max_steps:
        return training.max_steps
    answers: int = sum(max(1, sum(m["role"] == "assistant" for m in row.get("messages", ()))) for row in train)
    per_epoch = math.ceil(answers / (training.batch_size * training.gradient_accumulation))
    return max(1, round(training.epochs * per_epoch))


def _full_precision(spec: JobSpec, device: torch.device) -> tuple[JobSpec, torch.dtype | None]:
    """The job with the base loaded in float32, and the type of the products if it is another.

    A step of 1e-5 vanishes in bf16, whose numbers lie 1/256 apart; so the weights that are trained are float32 and
    cast for each product.
    """
    import torch

    from engine.models.loading import dtype_of

    compute = dtype_of(spec.training.precision, device)
    loading = dataclasses.replace(spec, training=dataclasses.replace(spec.training, precision="fp32"))
    return loading, None if compute is torch.float32 else compute


def _refuse_to_overwrite(spec: JobSpec, out: Path, resume: bool) -> None:
    if not resume and any((out / name).exists() for name in ("adapter", "model", "checkpoints")):
        raise CheckpointError(
            f"The folder {out} already holds a run.", "Choose another folder, or go on with it by --resume."
        )


def examples_of(
    spec: JobSpec, task: Task, sink: Sink
) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
    """The job's rows to train on and to evaluate on; rows that were left out become a warning."""
    from engine.data import NotTakenError, load, split
    from engine.tasks import tasks_for

    sink.emit({"type": "status", "phase": "reading", "message": f"Reading {Path(spec.data.path).name}"})
    try:
        columns, fixes = spec.data.columns or None, spec.data.fixes
        prepared = load(spec.data.path, spec.data.format, columns, formats=task.formats, fixes=fixes)
    except NotTakenError as error:
        others = ", ".join(tasks_for(error.found))
        instead = f"The format {error.found} is for: {others}. Choose that task, or give other data." if others else ""
        raise NotTakenError(f"The task {task.name}: {error.message}", instead or error.hint, error.found) from error
    if prepared.skipped:
        first = next(problem for problem in prepared.problems if problem.severity == "skip")
        message = f"{prepared.skipped} of {prepared.total} rows were left out; the first: {first}"
        sink.emit({"type": "warning", "message": message})
    return split(prepared.examples, spec.data.eval_split, spec.training.seed)
