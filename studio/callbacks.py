"""What becomes of a callback's error: words for whoever asked. Only the page's process imports this."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import gradio as gr

from engine.errors import EngineError
from studio.faults import is_memory, memory_event, unexpected_event

logger = logging.getLogger("studio.callbacks")


def _changes(found: Any) -> Any:
    """A callback's answer; no changes at all, `{}`, would count as one value too few."""
    return gr.skip() if isinstance(found, dict) and not found else found


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """A callback whose errors reach the page in words: those raised on purpose as they are, others with a log entry.

    Without it a value that no widget sends (a raw request) or a run that went away meanwhile is an empty error box.
    """

    def said(fault: Exception) -> gr.Error:
        if isinstance(fault, EngineError):
            return gr.Error(str(fault), print_exception=False)
        logger.error("A callback of the page met an unexpected error.", exc_info=fault)
        event = memory_event(fault) if is_memory(fault) else unexpected_event(fault)
        return gr.Error(f"{event['message']} {event['hint']}", print_exception=False)

    @functools.wraps(function)
    def plain(*values, **named):  # type: ignore[no-untyped-def] # Gradio reads the hints of the function behind
        try:
            return _changes(function(*values, **named))
        except gr.Error:
            raise
        except Exception as fault:
            raise said(fault) from None

    @functools.wraps(function)
    def stream(*values, **named):  # type: ignore[no-untyped-def]
        try:
            yield from map(_changes, function(*values, **named))
        except gr.Error:
            raise
        except Exception as fault:
            raise said(fault) from None

    return stream if inspect.isgeneratorfunction(function) else plain


def tell_all(blocks: gr.Blocks) -> None:
    """Every callback of a page that was built, by `told`."""
    for function in blocks.fns.values():
        if function.fn is not None:
            function.fn = told(function.fn)
