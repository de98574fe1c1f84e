"""Checks that every config's fields get by their annotations alone, before a method looks at their values."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text", type(None): "None"}


def type_faults(config: Any) -> list[str]:
    """Fields whose values are not of the annotated type. None in place of a mapping that may not be None is empty.

    PEFT's files hold null where a mapping has no entries.
    """
    found = []
    kind: Any = type(config)
    hints = _hints(kind)
    for item in dataclasses.fields(config):
        value, hint = getattr(config, item.name), hints[item.name]
        if value is None and get_origin(hint) is dict:
            object.__setattr__(config, item.name, {})
        elif not _is_of(value, hint):
            found.append(f"{item.name} is {value!r}; needed: {_in_words(hint)}")
    return found


def finite_faults(config: Any, faults: list[str]) -> list[str]:
    """`faults`, and one for each number that is NaN or infinite and that they do not name."""
    found = list(faults)
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        named = any(fault.startswith(f"{item.name} ") for fault in faults)
        if isinstance(value, float) and not math.isfinite(value) and not named:
            found.append(f"{item.name} is {value!r}; needed: a finite number")
    return found


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _is_of(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint`; True for types that this does not know."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is_of(value, part) for part in inner)
    if origin is list:
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
            return False
        return all(_is_of(element, inner[0]) for element in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(_is_of(k, inner[0]) and _is_of(v, inner[1]) for k, v in value.items())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) and hint is not Any else True


def _in_words(hint: Any) -> str:
    """A type as a person would say it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return ", or ".join(_in_words(part) for part in inner)
    if origin is list:
        return f"a list, each {_in_words(inner[0])}"
    if origin is dict:
        return f"a mapping of names to values, each {_in_words(inner[1])}"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))
