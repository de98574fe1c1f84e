"""One row's cells to texts and turns, and trees of replies to conversations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.data.formats import turns_of
from engine.data.roles import SPEAKER_KEYS, SPEAKERS, WORDS_KEYS, normal
from engine.data.table import Cells, ProblemLog, Row, safe_text

Messages = list[dict[str, str]]
Fixes = list[tuple[str, str]]


class RowFault(Exception):
    """Why one row cannot be used; caught where rows are counted."""

    def __init__(self, code: str, message: str, column: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.column = code, message, column


def text_of(cells: Cells, column: str, required: bool = True) -> str:
    """A cell as text; numbers become text. A cell that is null or blank is a fault, or "" if it may be left out."""
    return as_text(cells.get(column), f"The cell {column!r}", column, required)


def as_text(value: Any, subject: str, column: str, required: bool = True) -> str:
    if isinstance(value, bool):
        value = "true" if value else "false"
    if isinstance(value, float) and value - value != 0:
        value = None
    if isinstance(value, int | float):
        return str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        if not required:
            return ""
        if value is None:
            raise RowFault("null-field", f"{subject} is null.", column)
        raise RowFault("empty-field", f"{subject} is empty.", column)
    if not isinstance(value, str):
        raise RowFault("not-text", f"{subject} is a {type(value).__name__}, and text is needed.", column)
    return value


def to_messages(value: Any, column: str) -> tuple[Messages, Fixes]:
    """A cell with turns as `[{"role", "content"}, ...]`: optional system turn, then user and assistant in turn.

    Neighbouring turns of one speaker are joined, and turns after the last answer are cut; both are reported.

    Raises:
        RowFault: the cell is no list of turns, a turn is broken, or nothing is there to learn from.
    """
    messages, fixes = read_turns(value, column)
    speakers = [message["role"] for message in messages if message["role"] != "system"]
    if "assistant" not in speakers:
        raise RowFault("no-assistant", "No turn is the assistant's, so there is no answer to learn.", column)
    if speakers[0] == "assistant":
        raise RowFault("assistant-first", "The first turn is the assistant's, so its question is missing.", column)
    if speakers[-1] != "assistant":
        messages.pop()
        fixes.append(("cut-ending", "The last turn has no answer and was cut."))
    return messages, fixes


def read_turns(value: Any, column: str) -> tuple[Messages, Fixes]:
    """A cell's turns, whoever begins and ends; neighbouring turns of one speaker are joined.

    Raises:
        RowFault: the cell is no list of turns, or a turn is broken.
    """
    if value is None:
        raise RowFault("null-field", "The conversation is null.", column)
    turns = turns_of(value)
    if turns is None:
        raise RowFault("not-turns", "This is not a list of turns with role and content.", column)
    if not turns:
        raise RowFault("empty-conversation", "The conversation is empty.", column)
    messages: Messages = []
    fixes: Fixes = []
    for number, turn in enumerate(turns, 1):
        role, content = _turn(turn, number, column)
        # JSON inside a csv cell brings its own escapes, which reading the file could not see.
        if safe_text(content) != content:
            content = safe_text(content)
            fixes.append(("bad-characters", f"Null or half characters were taken out of turn {number}."))
        if role == "system" and number > 1:
            raise RowFault("system-not-first", f"Turn {number} is a system turn; only the first can be.", column)
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + content
            fixes.append(("joined-turns", f"Turns {number - 1} and {number} have one speaker and were joined."))
        else:
            messages.append({"role": role, "content": content})
    return messages, fixes


def _turn(turn: Any, number: int, column: str) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise RowFault("not-turns", f"Turn {number} is not an object with role and content.", column)
    speaker = next((turn[key] for key in SPEAKER_KEYS if turn.get(key) is not None), None)
    role = SPEAKERS.get(normal(speaker)) if isinstance(speaker, str) else None
    if role is None:
        known = "user, assistant or system"
        raise RowFault("unknown-role", f"Turn {number} has the role {str(speaker)[:40]!r}; needed: {known}.", column)
    words = next((turn[key] for key in WORDS_KEYS if turn.get(key) is not None), None)
    if (
        isinstance(words, list)
        and words
        and all(isinstance(part, dict) and part.get("type") == "text" for part in words)
    ):
        words = "".join(part["text"] for part in words if isinstance(part.get("text"), str))
    return role, as_text(words, f"Turn {number} ({role})", column)


# --- trees of replies ----------------------------------------------------------------------------------------------


def flatten_tree(prompt: Any) -> list[dict[str, Any]]:
    """The best path through one nested tree (`text`, `role`, `replies`) as turns."""
    turns: list[dict[str, Any]] = []
    while isinstance(prompt, dict):
        turns.append({"role": prompt.get("role"), "content": prompt.get("text")})
        replies = prompt.get("replies")
        alive = [reply for reply in replies if isinstance(reply, dict)] if isinstance(replies, list) else []
        alive = [reply for reply in alive if not reply.get("deleted")]
        prompt = min(alive, key=lambda reply: _rank(reply.get("rank")), default=None)
    return turns


def flatten_trees(
    rows: Sequence[Row], columns: Mapping[str, str], log: ProblemLog
) -> list[tuple[int, list[dict[str, Any]]]]:
    """(line of the first message, turns) of the best path of each tree, where each row is one message.

    Messages on other branches are counted in a note; a message that no first message leads to is skipped.
    """
    identity, parent = columns["message_id"], columns["parent_id"]
    nodes: dict[Any, Row] = {}
    children: dict[Any, list[Row]] = {}
    roots: list[Row] = []
    for row in rows:
        name, above = row.cells.get(identity), row.cells.get(parent)
        if not isinstance(name, str | int) or name == "":
            log.skip(row.line, identity, "null-field", "The message has no id.")
        elif name in nodes:
            log.skip(row.line, identity, "duplicate-id", f"Another message has the id {str(name)[:60]!r}.")
        else:
            nodes[name] = row
            if above in (None, ""):
                roots.append(row)
            elif isinstance(above, str | int):
                children.setdefault(above, []).append(row)
    reached: set[Any] = set()
    paths: list[tuple[int, list[dict[str, Any]]]] = []
    on_path = 0
    for root in roots:
        path = list(_best_path(root, columns, children))
        on_path += len(path)
        pile = [root]
        while pile:
            name = pile.pop().cells[identity]
            reached.add(name)
            pile += children.get(name, ())
        turns = [{"role": row.cells.get(columns["role"]), "content": row.cells.get(columns["text"])} for row in path]
        paths.append((root.line, turns))
    for name, row in nodes.items():
        if name not in reached:
            log.skip(row.line, parent, "orphan", "The message that this one answers is not in the file.")
    if len(reached) > on_path:
        message = (
            f"{len(reached) - on_path:,} replies lie on other branches; the best-ranked branch of each tree is used."
        )
        log.note(paths[0][0], "", "other-branches", message)
    return paths


def _best_path(root: Row, columns: Mapping[str, str], children: Mapping[Any, list[Row]]) -> Iterator[Row]:
    row: Row | None = root
    rank = columns.get("rank", "")
    while row is not None:
        yield row
        replies = [reply for reply in children.get(row.cells[columns["message_id"]], []) if not _deleted(reply)]
        row = min(replies, key=lambda reply: _rank(reply.cells.get(rank)), default=None)


def _deleted(row: Row) -> bool:
    return str(row.cells.get("deleted", "")).lower() in ("true", "1")


def _rank(value: Any) -> float:
    """0 is the best; a reply without a rank comes after those that have one."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("inf")
