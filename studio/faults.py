"""Faults that nobody raised on purpose, in words that a person can act on. Tracebacks stay in the log."""

from __future__ import annotations

from typing import Any

from engine.memory.shortage import is_memory as is_memory

Message = dict[str, Any]


def memory_event(error: BaseException) -> Message:
    """The error that a person sees when memory ran out."""
    first_line = (str(error).splitlines() or [""])[0]
    return {
        "type": "error",
        "code": "memory",
        "message": f"The machine ran out of memory. {first_line}".strip(),
        "hint": "Use a smaller batch or max length, turn gradient checkpointing on, or choose a smaller base.",
    }


def unexpected_event(error: BaseException) -> Message:
    """The error that a person sees for a fault that nobody foresaw; the traceback is in the log."""
    return {
        "type": "error",
        "code": "unexpected",
        "message": f"Something went wrong that we did not foresee: {type(error).__name__}: {str(error)[:300]}",
        "hint": "The log has the details.",
    }
