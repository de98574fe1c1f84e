"""The error tree. Every message says what happened, what was received, what was needed and what to do.

`code` is a stable short name: the page, the JSON output and the tests go by it, never by the sentence.
"""

from __future__ import annotations

from typing import Any


class EngineError(Exception):
    """Root of every error that the engine raises on purpose.

    Args:
        message: what happened, with the value received and what was needed.
        hint: what the person can do about it; one sentence.
    """

    code = "engine"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()

    def to_event(self) -> dict[str, Any]:
        """The error as an event of a run (`type` is `error`)."""
        return {"type": "error", "code": self.code, "message": self.message, "hint": self.hint}


class ConfigError(EngineError):
    """A configuration field has a value that cannot work, or several do: all faults are listed at once."""

    code = "config"


class TargetError(ConfigError):
    """The adapter's targets match no module of the model, or a module that the method cannot serve."""

    code = "target"


class CheckpointError(EngineError):
    """An adapter or checkpoint folder is missing, damaged, or made for another model."""

    code = "checkpoint"


class UnsafeFileError(EngineError):
    """A file that could run code when opened (pickle, .bin, .pt) or that leaves its folder (`../`)."""

    code = "unsafe-file"


class ModelError(EngineError):
    """A base model cannot be found, fetched or loaded."""

    code = "model"


class DataError(EngineError):
    """A data file cannot be used: empty, unreadable, unknown format, missing column, nothing left after checks."""

    code = "data"


class PromptError(EngineError):
    """A prompt cannot be answered, for example because it is longer than the model's context."""

    code = "prompt"


class TrainingError(EngineError):
    """A run cannot start or go on (nothing to train, resume without a checkpoint)."""

    code = "training"


class DivergedError(TrainingError):
    """The loss or the gradient of a step is not a finite number."""

    code = "diverged"
