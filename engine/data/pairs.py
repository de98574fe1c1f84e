"""Rows with two parts: a source and its target, a better and a worse answer, a picture and its caption."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engine.data.conversations import Fixes, Messages, RowFault, as_text, read_turns, text_of
from engine.data.formats import turns_of
from engine.data.table import Cells

_SAID = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


def parallel_of(cells: Cells, columns: Mapping[str, str]) -> tuple[dict[str, Any], Fixes]:
    """`{"source", "target"}`.

    Raises:
        RowFault: one of them is missing or empty.
    """
    return {role: text_of(cells, columns[role]) for role in ("source", "target")}, []


def image_of(cells: Cells, columns: Mapping[str, str]) -> tuple[dict[str, Any], Fixes]:
    """`{"image", "text"}`: a picture's reference and what is said of it."""
    return {
        "image": str(cells[columns["image"]]),
        "text": text_of(cells, columns["text"]) if "text" in columns else "",
    }, []


def preference_of(cells: Cells, columns: Mapping[str, str]) -> tuple[dict[str, Any], Fixes]:
    """`{"prompt": [{"role", "content"}, ...], "chosen", "rejected"}`; the prompt ends with the user.

    The prompt is text or turns. An answer is text, the assistant's turn, or the whole conversation; then what both
    answers have in common before their last turn is the prompt. Dialogues as one text ("Human: ... Assistant: ...")
    are taken apart.

    Raises:
        RowFault: a part is missing or broken, the conversations part early, or the answers are the same.
    """
    prompt, fixes = _prompt(cells, columns)
    answers: dict[str, str] = {}
    before: dict[str, Messages] = {}
    for role in ("chosen", "rejected"):
        turns, more = _answer(cells.get(columns[role]), columns[role])
        fixes += more
        if turns[-1]["role"] != "assistant":
            raise RowFault("no-assistant", "The conversation does not end with an answer.", columns[role])
        answers[role], before[role] = turns[-1]["content"], turns[:-1]
    if before["chosen"] != before["rejected"]:
        message = "The chosen and the rejected conversation differ before their last answer."
        raise RowFault("no-shared-start", message, columns["rejected"])
    shared = before["chosen"]
    if shared and prompt and not _continues(shared, prompt):
        message = "The conversations do not begin with the prompt."
        raise RowFault("prompt-differs", message, columns["prompt"])
    # Where both are there, the conversation's start may have more (a system turn), or the prompt may.
    turns = max(shared, prompt, key=len)
    if not turns:
        message = "There is neither a prompt nor a conversation before the answers."
        raise RowFault("no-prompt", message, columns.get("prompt", columns["chosen"]))
    if turns[-1]["role"] != "user":
        raise RowFault("no-question", "The prompt does not end with the user's turn.", columns.get("prompt", ""))
    if answers["chosen"].strip() == answers["rejected"].strip():
        raise RowFault("same-answers", "The chosen and the rejected answer are the same.", columns["rejected"])
    return {"prompt": turns, **answers}, fixes


def _prompt(cells: Cells, columns: Mapping[str, str]) -> tuple[Messages, Fixes]:
    if "prompt" not in columns:
        return [], []
    value = cells.get(columns["prompt"])
    if turns_of(value) is not None:
        return read_turns(value, columns["prompt"])
    said = _dialogue(value, columns["prompt"])
    if said:
        return said, []
    text = text_of(cells, columns["prompt"], required=False)
    return ([{"role": "user", "content": text}] if text else []), []


def _answer(value: Any, column: str) -> tuple[Messages, Fixes]:
    """The turns up to and with the answer; text is one turn of the assistant."""
    if turns_of(value) is not None:
        return read_turns(value, column)
    said = _dialogue(value, column)
    if said:
        return said, []
    return [{"role": "assistant", "content": as_text(value, f"The cell {column!r}", column)}], []


def _dialogue(value: Any, column: str) -> Messages:
    """A dialogue in one text as its turns; nothing where the text is none."""
    if not isinstance(value, str) or not value.lstrip().startswith("Human:"):
        return []
    parts = _SAID.split(value.strip())
    speakers = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    turns = [{"role": speakers[who], "content": text.strip()} for who, text in pairs]
    if turns and not turns[-1]["content"]:
        # A prompt that ends with "Assistant:" asks for the answer.
        turns.pop()
    if not all(turn["content"] for turn in turns):
        raise RowFault("empty-field", "A turn of the dialogue is empty.", column)
    return turns


def _continues(shared: Messages, prompt: Messages) -> bool:
    """Whether the prompt is the conversation's start, a system turn aside; a text may also be its question alone."""
    first = [(turn["role"], turn["content"].strip()) for turn in shared if turn["role"] != "system"]
    asked = [(turn["role"], turn["content"].strip()) for turn in prompt if turn["role"] != "system"]
    return first == asked or (len(asked) == 1 and asked[0] in (*first[:1], *first[-1:]))
