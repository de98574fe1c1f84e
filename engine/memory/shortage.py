"""When memory ran out after all: by how much, and what would fit. Torch-free."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from engine.errors import EngineError
from engine.memory.machine import memory_limit
from engine.memory.predicting import Job, Remedy
from engine.memory.prediction import size
from engine.train.job import JobSpec

logger = logging.getLogger(__name__)

_WORDS = ("out of memory", "outofmemory", "can't allocate memory", "cannot allocate memory")
_CUDA = re.compile(r"Tried to allocate ([\d.]+ \wi?B).*?of which ([\d.]+ \w+) is free", re.DOTALL)
_ELSE = "Use a smaller batch or max length, turn gradient checkpointing on, or choose a smaller base."


class ShortageError(EngineError):
    """A run ended because memory ran out, on the machine or on its accelerator.

    `remedy` are the changes of the job (as `Remedy.changes`) that are predicted to fit; empty where none is known.
    """

    code = "memory"

    def __init__(self, message: str, hint: str = "", remedy: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, hint)
        self.remedy = dict(remedy or {})

    def to_event(self) -> dict[str, Any]:
        """As every error, with the remedy."""
        return {**super().to_event(), "remedy": self.remedy}


def is_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the machine or on its accelerator."""
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or any(words in text for words in _WORDS)


def shortage(spec: JobSpec, error: BaseException, device: str) -> ShortageError:
    """What to say of a job that ran out of memory: what was missing, what was predicted, and the remedy that fits.

    Args:
        spec: the job. error: what torch or Python raised. device: `cpu` or `cuda`, where it trained.
    """
    said = _missing(error)
    predicted, found = _remedied(spec, device)
    if predicted:
        said += f" Predicted for this job: {size(predicted)}; this machine has {size(_limit(device))}."
    hint = f"This fits: {found.words()} (predicted {size(found.prediction.peak)})." if found else _ELSE
    return ShortageError(f"The machine ran out of memory. {said}".strip(), hint, found.changes if found else None)


def _missing(error: BaseException) -> str:
    asked = _CUDA.search(str(error))
    if asked:
        return f"{asked[1]} more were asked for, and {asked[2]} were free."
    return (str(error).splitlines() or [""])[0]


def _limit(device: str) -> int:
    if device == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory)
    return memory_limit()


def _remedied(spec: JobSpec, device: str) -> tuple[int, Remedy | None]:
    """The job's predicted peak (0: none) and a remedy; a fault in them must not hide the shortage."""
    try:
        job = Job(spec, device)
        peak = job.predict().peak
        # It did not fit, whatever was predicted: the remedy has to need less than it did.
        return peak, job.remedy(min(_limit(device), int(0.9 * peak)))
    except Exception:
        logger.warning("No remedy could be worked out.", exc_info=True)
        return 0, None
