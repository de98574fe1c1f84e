"""What is worth knowing of a job before it starts, the cheapest first; and what every method would cost instead of its.

Both answer plain data, piece by piece, so that a page can show the first before the last is known. Nothing is loaded:
models are built without data, as in the rest of this package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from engine.errors import EngineError
from engine.memory.machine import available, memory_limit
from engine.memory.predicting import TASKS, Job
from engine.memory.prediction import fits
from engine.train.job import JobSpec

Stage = dict[str, Any]
_LIKE_FULL = {"method": "lora"}
"""What is attached to count the base that full fine-tuning trains: any method shows its size."""


class _AbandonedError(BaseException):
    """Nobody waits for the prediction any more."""


def _interruptible(going: Callable[[], bool]) -> Any:
    """A context in which every operation of torch first asks whether somebody still waits for its result."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Asking(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not going():
                raise _AbandonedError
            return func(*args, **(kwargs or {}))

    return Asking()


def stages(spec: JobSpec, going: Callable[[], bool] = lambda: True) -> Iterator[Stage]:
    """A job's costs, each as `{"stage": NAME, ...}`; the run's own checks of optimizer, targets and base come along.

    - `machine`: `device`, `gpus` (how many), `memory` and `budget` (what is free now) in bytes.
    - `count`: as `engine.inspection.count`, and `full`.
    - `peak`: `prediction` (a dict) and `verdict`; or `unknown`, a sentence, of a task that it does not follow.
    - `remedy`, of a job that does not fit: `changes` and `peak`, or None in both.
    - `largest`: the largest batch that fits.

    Args:
        spec: the job.
        going: asked all the time; False ends the stages at once.

    Raises:
        EngineError: the job cannot run: what training would say of it.
    """
    from engine.models.loading import default_device
    from engine.train.optim import check_optimizer

    device = default_device()
    place = "cuda" if device == "cuda" else "cpu"
    budget = available(place)
    yield {"stage": "machine", "device": device, "gpus": _gpus(), "memory": _memory(place), "budget": budget}
    check_optimizer(spec.training, device)
    yield {"stage": "count", "full": spec.full, **_counted(spec, _LIKE_FULL if spec.full else spec.adapter)}
    if spec.task not in TASKS:
        _attach(spec)
        yield {"stage": "peak", "unknown": f"The memory of the task {spec.task} cannot be predicted yet."}
        return
    yield from _predicted(spec, place, budget, going)


def _predicted(spec: JobSpec, place: str, budget: int, going: Callable[[], bool]) -> Iterator[Stage]:
    """The stages that take simulations; none any more when nobody waits."""
    try:
        with _interruptible(going):
            job = Job(spec, place)
            prediction = job.predict()
        verdict = fits(prediction, budget)
        yield {"stage": "peak", "prediction": prediction.to_dict(), "verdict": verdict}
        if verdict == "exceeds":
            with _interruptible(going):
                found = job.remedy(budget)
            peak = found.prediction.peak if found else None
            yield {"stage": "remedy", "changes": dict(found.changes) if found else None, "peak": peak}
        with _interruptible(going):
            largest = job.largest_batch(budget)
        yield {"stage": "largest", "batch": largest}
    except _AbandonedError:
        return


def methods(
    spec: JobSpec, adapters: Sequence[Mapping[str, Any]], going: Callable[[], bool] = lambda: True
) -> Iterator[Stage]:
    """What each of these adapters would cost in place of the job's, as `{"method": NAME, ...}`.

    With `trainable`, `share` and `adapter_bytes` of `engine.inspection.count`; or with `refused`, the reason why it
    cannot stand on this base, task and quantization.
    """
    for adapter in adapters:
        if not going():
            return
        instead = dataclasses.replace(spec, adapter=adapter, full=False)
        try:
            found = _counted(instead, adapter)
            _attach(instead)
        except EngineError as error:
            yield {"method": adapter["method"], "refused": error.message, "hint": error.hint}
            continue
        kept = ("trainable", "share", "adapter_bytes", "base")
        yield {"method": adapter["method"], **{name: found[name] for name in kept}}


def culprit(spec: JobSpec, error: EngineError) -> str:
    """The setting to blame for a job's error where its words do not begin with one, or "".

    `quantization`, if the same job could run over the base as it is; nothing is guessed from sentences.
    """
    if spec.full or spec.quantization == "none":
        return ""
    try:
        _attach(spec)
    except EngineError as same:
        if same.message != error.message:
            return ""
        try:
            _attach(dataclasses.replace(spec, quantization="none"))
            return "quantization"
        except EngineError:
            return ""
    return ""


def _counted(spec: JobSpec, adapter: Mapping[str, Any]) -> dict[str, Any]:
    from engine.inspection import count

    return count(spec.model, adapter, spec.task, None if spec.full else spec.options)


def _attach(spec: JobSpec) -> None:
    """The job's adapter on its base in the bits that the job names, without data.

    Raises:
        EngineError: it cannot stand there.
    """
    import torch

    from engine.inspection import adapter_config
    from engine.memory.shapes import quantise
    from engine.model import get_peft_model
    from engine.models.loading import meta_model
    from engine.tasks import get_task

    if spec.full:
        return
    task = get_task(spec.task, spec.options)
    base: Any = meta_model(spec.model, task=spec.task)
    if spec.quantization != "none":
        quantise(base, spec, torch.float32)
    get_peft_model(base, adapter_config(spec.adapter, task.task_type, spec.model))


def _gpus() -> int:
    import torch

    return int(torch.cuda.device_count())


def _memory(place: str) -> int:
    if place == "cpu":
        return memory_limit()
    import torch

    return int(torch.cuda.mem_get_info()[1])
