"""Two answers word by word: what one says that the other does not."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from difflib import SequenceMatcher

SAME, NEW, GONE = "same", "new", "gone"
_JOINERS = "_'’\u200c\u200d"
# Kana and ideographs are written without spaces: each is a word of its own. Hangul has spaces.
_SINGLE = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
# Above so many words in both, words that stand everywhere anchor nothing: exact matching takes time by their squares.
_MANY = 4000


@dataclass(frozen=True)
class Part:
    """A stretch of text: `same` in both, `new` in the second, or `gone` from the first.

    `same` and `new` together, in order, are the second text.
    """

    kind: str
    text: str


def words(text: str) -> list[tuple[int, int]]:
    """Where each word or sign of punctuation begins and ends; accents and joined signs stay with their letter."""
    found: list[tuple[int, int]] = []
    open_word = False
    for place, letter in enumerate(text):
        if letter.isspace():
            open_word = False
            continue
        joins = unicodedata.category(letter)[0] == "M" or letter in _JOINERS
        single = any(low <= ord(letter) <= high for low, high in _SINGLE)
        inside = joins or (letter.isalnum() and not single)
        if found and found[-1][1] == place and (joins or (open_word and inside)):
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place, place + 1))
        open_word = inside
    return found


def compared(first: str, second: str) -> list[Part]:
    """The second text in stretches, with what of the first is missing in it where it would stand.

    Composed and decomposed forms of a letter (of Hangul too) are the same.
    """
    before, after = words(first), words(second)
    matcher = SequenceMatcher(
        None, _keys(first, before), _keys(second, after), autojunk=len(before) + len(after) > _MANY
    )
    parts: list[Part] = []
    at = 0
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():
        if kind == "equal":
            at = _said(parts, SAME, second, at, after[j2 - 1][1])
            continue
        if i2 > i1:
            if j2 > j1:
                at = _said(parts, SAME, second, at, after[j1][0])
            parts.append(Part(GONE, first[before[i1][0] : before[i2 - 1][1]]))
        if j2 > j1:
            at = _said(parts, SAME, second, at, after[j1][0])
            at = _said(parts, NEW, second, at, after[j2 - 1][1])
    _said(parts, SAME, second, at, len(second))
    return parts


def share_new(first: str, second: str) -> float:
    """Which part of the second text's words the first does not have, 0 to 1; punctuation is not counted."""
    total = _count(second)
    new = sum(_count(part.text) for part in compared(first, second) if part.kind == NEW)
    return new / total if total else 0.0


def _count(text: str) -> int:
    return sum(any(letter.isalnum() for letter in text[start:end]) for start, end in words(text))


def _keys(text: str, places: list[tuple[int, int]]) -> list[str]:
    return [unicodedata.normalize("NFC", text[start:end]) for start, end in places]


def _said(parts: list[Part], kind: str, text: str, start: int, end: int) -> int:
    if end > start:
        if parts and parts[-1].kind == kind:
            parts[-1] = Part(kind, parts[-1].text + text[start:end])
        else:
            parts.append(Part(kind, text[start:end]))
    return max(start, end)
