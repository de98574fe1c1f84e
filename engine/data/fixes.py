"""What a person decided about problem rows: cause -> what is done. Kept beside the file, which is never changed.

fixes = {"duplicate": "skip", "empty-field": "fill:(none)", "outer-spaces": "trim"}
data = load("answers.csv", fixes=fixes)  # still: data.kept + data.skipped == data.total
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from types import MappingProxyType

from engine.data.errors import FixError

REMEDIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "duplicate": ("skip",),
        "other-answer": ("skip", "skip-all"),
        "outer-spaces": ("trim", "skip"),
        "null-field": ("fill",),
        "empty-field": ("fill",),
        "no-caption": ("fill",),
        "ragged": ("trim",),
        "joined-turns": ("skip",),
        "cut-ending": ("skip",),
        "changed-label": ("skip",),
        "repeated-label": ("skip",),
        "rare-label": ("skip",),
        "similar-labels": ("join",),
    }
)
"""Cause -> the actions that there are for it, the one that loses the least first.

`skip` leaves the rows out (of rows that repeat one another all but the first; `skip-all`: all of them), `trim` takes
away what is too much, `fill` puts words where there are none, `join` makes one class of several spellings.
"""
WHILE_READING = ("ragged", "no-caption")
"""Causes that are met while the file is read; the others while its rows are prepared."""
MOST_WORDS = 1_000


def checked(fixes: Mapping[str, str] | None) -> dict[str, str]:
    """The fixes in the order of their causes.

    Raises:
        FixError: a cause that has no remedy, another action than those, or `fill:` without words.
    """
    found = dict(fixes or {})
    for code, fix in found.items():
        known = REMEDIES.get(code)
        if known is None:
            raise FixError(f"There is nothing to fix about {code!r}.", f"Known causes: {', '.join(REMEDIES)}.")
        action, mark, words = str(fix).partition(":")
        if action not in known or (action == "fill") != bool(mark and words.strip()) or len(words) > MOST_WORDS:
            ways = ", ".join("fill:WORDS" if way == "fill" else way for way in known)
            raise FixError(f"{code} cannot be fixed by {str(fix)[:60]!r}.", f"Needed: {ways}.")
    return {code: str(found[code]) for code in sorted(found)}


def way(fixes: Mapping[str, str], code: str) -> str:
    """The action for a cause, "" where there is none."""
    return fixes.get(code, "").partition(":")[0]


def words(fixes: Mapping[str, str], code: str) -> str:
    """What is filled in for a cause."""
    return fixes.get(code, "").partition(":")[2]


def while_reading(fixes: Mapping[str, str]) -> dict[str, str]:
    """Those that change how a file is read."""
    return {code: fix for code, fix in fixes.items() if code in WHILE_READING}


def version(file: str, fixes: Mapping[str, str]) -> str:
    """The fingerprint of a file (its own: `engine.data.fingerprint`) with fixes; without any, the file's."""
    if not fixes:
        return file
    said = json.dumps([file, checked(fixes)], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]
