"""`recognise`: which of the formats we know a table has, which column plays which role, and why we think so."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.data.errors import ColumnError, FormatError, NotTakenError
from engine.data.roles import COLUMN_NAMES, SPEAKER_KEYS, WORDS_KEYS, normal
from engine.data.table import Table

_SAMPLE = 200
OF_PICTURES = ("images", "pictures")
"""The formats that a folder or zip of pictures has, and no other table."""
_FEW = 20
"""Rows below which labels need not come again to be labels."""
_BY_NAME = 0.8
"""The confidence of a reading by usual names."""


@dataclass(frozen=True)
class FormatInfo:
    """What a format needs.

    Attributes:
        name: as in a job's `data.format`.
        required: roles that must have a column.
        optional: roles that may have one.
        about: one line for a person.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    about: str

    @property
    def roles(self) -> tuple[str, ...]:
        return self.required + self.optional


FORMATS: dict[str, FormatInfo] = {
    info.name: info
    for info in (
        FormatInfo("messages", ("messages",), (), "whole conversations: a list of turns with role and content"),
        FormatInfo("sharegpt", ("conversations",), (), "whole conversations: a list of turns with from and value"),
        FormatInfo(
            "oasst", ("message_id", "parent_id", "text", "role"), ("rank",), "trees of replies, one message a row"
        ),
        FormatInfo("alpaca", ("instruction", "output"), ("input", "system"), "an instruction, its input, its answer"),
        FormatInfo("prompt_completion", ("prompt", "completion"), (), "a question and its answer"),
        FormatInfo("parallel", ("source", "target"), (), "a text and what it becomes: a translation, a summary"),
        FormatInfo("labels", ("text", "label"), (), "a text and its class, or its classes"),
        FormatInfo("preferences", ("chosen", "rejected"), ("prompt",), "a prompt with a better and a worse answer"),
        FormatInfo("text", ("text",), (), "plain text to continue"),
        FormatInfo("images", ("image", "text"), (), "pictures and what is said of each"),
        FormatInfo("pictures", ("image",), (), "pictures of one thing, of which nothing is said"),
    )
}


@dataclass(frozen=True)
class Format:
    """What `recognise` found.

    Attributes:
        name: a key of `FORMATS`, or None where nothing fits.
        columns: role -> column name.
        reason: one or two sentences for a person.
        confidence: 1.0 by the format's own column names, 0.8 by other usual names, 0.5 by the content alone, 0 none.
        suggestions: other readings that are possible, best first; each is a `Format` with its own confidence.
    """

    name: str | None
    columns: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    confidence: float = 0.0
    suggestions: tuple[Format, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "name": self.name,
            "columns": dict(self.columns),
            "reason": self.reason,
            "confidence": self.confidence,
            "suggestions": [other.to_dict() for other in self.suggestions],
        }


def recognise(table: Table, formats: Sequence[str] | None = None) -> Format:
    """The format of a table by its column names and the first 200 rows. Never raises; `name` None means: ask.

    Names count without regard to case, spaces and dashes, and usual other names are understood, in English and
    Korean: `Question`, `Answer` is `prompt_completion` with confidence 0.8.

    Args:
        table: the data.
        formats: what will be taken. Of the readings that the names allow, the best of these comes first; a table that
            only fits others is said to be what it is.
    """
    found = [candidate for candidate in _candidates(table) if candidate is not None]
    found.sort(key=lambda candidate: -candidate.confidence)
    if found and formats and found[0].name not in formats:
        # Stable: the others keep their order. A reading by the content alone is no reason to take a table for another.
        found.sort(key=lambda candidate: not (candidate.name in formats and candidate.confidence >= _BY_NAME))
    if found:
        best = found[0]
        return Format(best.name, best.columns, best.reason, best.confidence, tuple(found[1:]))
    names = ", ".join(table.columns[:20]) + (", ..." if len(table.columns) > 20 else "")
    guesses = tuple(guess for guess in _guesses(table) if not formats or guess.name in formats)
    unnamed = ("oasst", *OF_PICTURES)
    wanted = [info for info in FORMATS.values() if info.name not in unnamed and (not formats or info.name in formats)]
    known = "; ".join(f"{', '.join(info.required)} ({info.about})" for info in wanted)
    said = (f"No known format fits the columns {names}.", f"Say which column is which: {known}.")
    return Format(None, reason=" ".join(said), suggestions=guesses)


def columns_for(
    table: Table,
    name: str | None,
    asked: Mapping[str, str] | None = None,
    formats: Sequence[str] | None = None,
) -> Format:
    """The mapping for a format that a person named, or for roles that a person mapped.

    Args:
        table: the data.
        name: a key of `FORMATS`; None lets the roles in `asked`, or the columns, decide.
        asked: role -> column; roles left out are filled by the columns' names.
        formats: what will be taken; all when left out.

    Raises:
        NotTakenError: the format is clear, and not one of `formats`.
        FormatError: there is no such format, or none fits.
        ColumnError: a column that was asked for, or a role that is required, is not there.
    """
    asked = dict(asked or {})
    if name is None and not asked:
        found = recognise(table, formats)
        if found.name is None:
            raise FormatError(f"The format of {table.name or 'the data'} is not clear. {found.reason}", _suggest(found))
        _refuse_others(table, found.name, found.reason, formats)
        return found
    if name is None:
        fitting = [info.name for info in FORMATS.values() if set(asked) <= set(info.roles)]
        fitting = [one for one in fitting if one in (formats or FORMATS)] or fitting
        if not fitting:
            known = "; ".join(f"{info.name}: {', '.join(info.roles)}" for info in FORMATS.values())
            raise ColumnError(f"No format has the roles {', '.join(asked)}.", f"Roles by format: {known}.")
        complete = [one for one in fitting if set(FORMATS[one].required) <= set(asked)]
        name = (complete or [one for one in fitting if _match(table, one, asked)[0] is not None] or fitting)[0]
    if name not in FORMATS:
        close = difflib.get_close_matches(name, FORMATS, 1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise FormatError(f"There is no format {name!r}.", f"{hint}Known: {', '.join(FORMATS)}.")
    _refuse_others(table, name, f"Asked for as {name}.", formats)
    if (name in OF_PICTURES) != (table.kind == "pictures"):
        found = recognise(table)
        raise FormatError(
            f"{table.name or 'The data'} cannot be read as {name}: that is for "
            f"{'a folder or a zip of pictures' if name in OF_PICTURES else 'tables of texts'}.",
            f"Read it as {found.name}." if found.name else "Give other data.",
        )
    info = FORMATS[name]
    unknown = [role for role in asked if role not in info.roles]
    if unknown:
        raise ColumnError(f"The format {name} has no role {unknown[0]!r}.", f"Its roles: {', '.join(info.roles)}.")
    exact = {role: _column(table, role, column) for role, column in asked.items() if column}
    mapping, confidence = _match(table, name, exact)
    if mapping is None:
        role = next(role for role in info.required if role not in exact and _named(table, role, exact)[0] is None)
        raise ColumnError(
            f"The format {name} needs a column for {role!r}, and {table.name or 'the data'} has only: "
            f"{', '.join(table.columns)[:500]}.",
            f"{_nearest(role, table.columns)}Say which column is the {role}, or choose another format.",
        )
    return Format(name, mapping, f"Asked for as {name}.", 1.0 if asked else confidence)


def _refuse_others(table: Table, name: str, reason: str, formats: Sequence[str] | None) -> None:
    if formats and name not in formats:
        known = "; ".join(f"{one} ({', '.join(FORMATS[one].required)})" for one in formats if one in FORMATS)
        raise NotTakenError(
            f"{table.name or 'The data'} has the format {name}, which this run cannot learn from. {reason} "
            f"It takes: {known or ', '.join(formats)}.",
            "Give data of one of these formats, or say by format and columns how to read this one.",
            name,
        )


def _column(table: Table, role: str, column: str) -> str:
    """The column that a person named; case and spaces are forgiven where only one fits."""
    if column in table.columns:
        return column
    alike = [other for other in table.columns if normal(other) == normal(column)]
    if len(alike) == 1:
        return alike[0]
    raise ColumnError(
        f"There is no column {column!r} (asked for as {role}) in {table.name or 'the data'}; there are: "
        f"{', '.join(table.columns)[:500]}.",
        f"{_nearest(column, table.columns)}Choose one of the columns there are.",
    )


def _nearest(name: str, columns: Iterable[str]) -> str:
    plain = {normal(column): column for column in columns}
    close = difflib.get_close_matches(normal(name), plain, 1, cutoff=0.5)
    return f"The nearest name is {plain[close[0]]!r}. " if close else ""


def _suggest(found: Format) -> str:
    if not found.suggestions:
        return ""
    best = found.suggestions[0]
    return f"A guess: {best.name} with " + ", ".join(f"{role} = {name}" for role, name in best.columns.items()) + "."


# --- by names ------------------------------------------------------------------------------------------------------


def _named(table: Table, role: str, taken: Mapping[str, str]) -> tuple[str | None, bool]:
    """(column, by its own name) for a role among the columns that no other role has."""
    free = [column for column in table.columns if column not in taken.values()]
    plain: dict[str, str] = {}
    for column in free:
        plain.setdefault(normal(column), column)
    if role in free:
        return role, True
    if role in plain:
        return plain[role], True
    for other in COLUMN_NAMES[role]:
        if other in plain:
            return plain[other], False
    return None, False


def _match(table: Table, name: str, asked: Mapping[str, str]) -> tuple[dict[str, str] | None, float]:
    """(role -> column, confidence) for a format; None where a required role finds no column.

    Roles whose own name is a column choose first, so that `prompt` in `question,prompt` is the prompt.
    """
    info = FORMATS[name]
    mapping = {role: column for role, column in asked.items() if column}
    own = [role for role in info.roles if role not in mapping and _named(table, role, mapping)[1]]
    exact = True
    for role in own + [role for role in info.roles if role not in own]:
        if role in mapping:
            continue
        column, by_name = _named(table, role, mapping)
        if column is None:
            if role in info.required:
                return None, 0.0
            continue
        exact = exact and by_name
        mapping[role] = column
    return {role: mapping[role] for role in info.roles if role in mapping}, 1.0 if exact else 0.8


# --- by content ----------------------------------------------------------------------------------------------------


def turns_of(value: Any) -> list[Any] | None:
    """The list of turns in a cell: a list, or its JSON text (as a csv holds it); None where it is neither."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list) else None


def _speech(table: Table, column: str) -> str | None:
    """`messages` or `sharegpt` where most cells of the column are lists of turns; else None."""
    votes = {"messages": 0, "sharegpt": 0}
    filled = 0
    for row in table.rows[:_SAMPLE]:
        value = row.cells.get(column)
        if value in (None, "", []):
            continue
        filled += 1
        turns = turns_of(value)
        if turns and isinstance(turns[0], dict):
            speaker = next((key for key in SPEAKER_KEYS if key in turns[0]), None)
            if speaker and any(key in turns[0] for key in WORDS_KEYS):
                votes["sharegpt" if speaker == "from" else "messages"] += 1
    best = max(votes, key=lambda name: votes[name])
    return best if votes[best] * 2 > filled else None


def _is_text(table: Table, column: str) -> bool:
    """Whether most filled cells are text or numbers, which can be read as text."""
    values = [row.cells.get(column) for row in table.rows[:_SAMPLE]]
    filled = [value for value in values if value is not None]
    return sum(isinstance(value, str | int | float) for value in filled) * 2 >= len(filled)


def _fits(table: Table, name: str, mapping: Mapping[str, str]) -> bool:
    """Whether what stands in the columns can be the format."""
    if name == "labels" and not _looks_like_labels(table, mapping["label"]):
        return False
    if name == "preferences":
        return all(_is_text(table, column) or _speech(table, column) for column in mapping.values())
    return all(_is_text(table, mapping[role]) for role in FORMATS[name].required if role != "label")


def _looks_like_labels(table: Table, column: str) -> bool:
    """Whether most cells are short, and, in a table of some size, come again."""
    values = [row.cells.get(column) for row in table.rows[:_SAMPLE]]
    filled = [str(value) for value in values if value is not None]
    short = sum(len(value) <= 80 and "\n" not in value for value in filled)
    return short * 2 > len(filled) and (len(filled) < _FEW or len(set(filled)) * 2 <= len(filled))


def _candidates(table: Table) -> Iterable[Format | None]:
    """Every reading that the names and the content allow, in the order in which equals are preferred."""
    if table.kind == "pictures":
        sure = 0.5 if "text" in table.columns else 1.0
        if "text" in table.columns:
            yield Format("images", {"image": "image", "text": "text"}, "Pictures, each with its words.", 1.0)
        yield Format("pictures", {"image": "image"}, "Pictures; nothing is said of them.", sure)
        return
    pairs, sure = _match(table, "preferences", {})
    if pairs is not None and _fits(table, "preferences", pairs):
        named = ", ".join(f"{part} = {column!r}" for part, column in pairs.items())
        yield Format("preferences", pairs, f"A better and a worse answer to a prompt: {named}.", sure)
        # The better answers alone can be learned from as well, by a person's word.
        spoken, chosen = _speech(table, pairs["chosen"]), pairs["chosen"]
        if spoken:
            yield Format(spoken, {FORMATS[spoken].required[0]: chosen}, "The better answers alone.", 0.5)
        elif "prompt" in pairs:
            alone = {"prompt": pairs["prompt"], "completion": chosen}
            yield Format("prompt_completion", alone, "The better answers alone.", 0.5)
        return
    for column in table.columns:
        spoken = _speech(table, column)
        if spoken:
            role = FORMATS[spoken].required[0]
            own = normal(column) == role
            key = "from and value" if spoken == "sharegpt" else "role and content"
            yield Format(
                spoken, {role: column}, f"Column {column!r} holds lists of turns with {key}.", 1.0 if own else 0.9
            )
    if any(_is_tree(row.cells) for row in table.rows[:_SAMPLE]):
        column = next(name for name in table.columns if normal(name) == "prompt")
        yield Format("oasst", {"message_id": column}, f"Column {column!r} holds trees of replies.", 1.0)
        return
    for name in ("oasst", "alpaca", "prompt_completion", "labels", "parallel", "text"):
        mapping, confidence = _match(table, name, {})
        if mapping is None or not _fits(table, name, mapping):
            continue
        # "question, answer" alone is a pair; it takes a third column, or the word instruction, to be alpaca's.
        if name == "alpaca" and "input" not in mapping and normal(mapping["instruction"]) != "instruction":
            continue
        by = "their names" if confidence == 1 else "usual names for them"
        named = ", ".join(f"{role} = {column!r}" for role, column in mapping.items())
        yield Format(name, mapping, f"By {by}, {FORMATS[name].about}: {named}.", confidence)
    if len(table.columns) == 1 and normal(table.columns[0]) not in COLUMN_NAMES["text"] + ("text",):
        column = table.columns[0]
        if _is_text(table, column) and not _speech(table, column):
            yield Format("text", {"text": column}, f"{column!r} is the only column, and holds text.", 0.5)


def _is_tree(cells: Mapping[str, Any]) -> bool:
    """Whether a row is a whole conversation tree: `prompt` with `text` and `replies`."""
    prompt = next((value for name, value in cells.items() if normal(name) == "prompt"), None)
    return isinstance(prompt, dict) and "text" in prompt and "replies" in prompt


def _guesses(table: Table) -> Iterable[Format]:
    """Where nothing is known by name: the wordiest columns, the two of them in the file's order, then one alone."""
    lengths: dict[str, float] = {}
    for column in table.columns:
        values = [row.cells.get(column) for row in table.rows[:_SAMPLE]]
        words = [value for value in values if isinstance(value, str) and value.strip()]
        if len(words) * 2 > len(values):
            lengths[column] = sum(map(len, words)) / len(words)
    wordy = sorted(lengths, key=lambda column: -lengths[column])[:2]
    if len(wordy) == 2:
        first, second = sorted(wordy, key=table.columns.index)
        yield Format("prompt_completion", {"prompt": first, "completion": second}, "The two longest texts.", 0.3)
    if wordy:
        yield Format("text", {"text": wordy[0]}, "The longest text.", 0.2)
