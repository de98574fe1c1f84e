"""What people read on the pages, in their language. English text is its own key."""

from __future__ import annotations

from typing import Any


def t(text: str, **values: Any) -> str:
    """A text in the language of whoever asks, with `{name}` filled in from `values`.

    Args:
        text: the English text, a literal, so that a missing translation can be found.
        values: what stands in for each name in braces.
    """
    return text.format(**values) if values else text


def N_(text: str) -> str:  # noqa: N802 - gettext's name for it
    """Marks a text that `t` is called with later, so that its translation is asked for."""
    return text
