"""Rows into tokens: many at a time, kept as records, and kept for the next run with the same rows and settings.

What is kept lies in `STUDIO_HOME/cache/tokens`, a file for each combination of rows, tokenizer and settings, named by
their SHA-256. A file appears whole, and those that were not used for the longest time go when all together are larger
than `MOST_BYTES`.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from engine.paths import studio_home
from engine.records import Codec, Records, Rows, Writer, json_bytes, open_records
from engine.tasks.base import Loaded, Progress

Example = Mapping[str, Any]
T = TypeVar("T")
CHUNK = 1000
"""Rows that are given to the tokenizer at once, or fewer of long ones."""
CHARACTERS = 1_000_000
IN_MEMORY = 1 << 24
"""Bytes of tokens up to which they are held in memory; more stay in the file."""
MOST_BYTES = 2 << 30
_VERSION = 1
_DRAFT_SECONDS = 86_400.0


def tokenised(
    examples: Sequence[Example],
    loaded: Loaded,
    codec: Codec[T],
    encode: Callable[[Sequence[Example], Counter[str]], Iterator[T]],
    settings: Mapping[str, Any],
    on_progress: Progress,
) -> tuple[Records[T], Counter[str]]:
    """All examples as rows, and what the encoding counted; from an earlier run where that did the same.

    Args:
        examples: rows of `engine.data`.
        loaded: its processor is the tokenizer. Rows are kept for other runs where it has a folder of its own (`cache`).
        codec: how a row is kept.
        encode: gives the rows of some examples, and counts what was cut or left out, with whatever else has to be told.
        settings: everything else that the rows depend on, of JSON's types; it names the task.
        on_progress: told of each part.
    """
    key = _key(examples, loaded.processor, settings) if loaded.cache is not None else None
    path = studio_home() / "cache" / "tokens" / f"{key}.records" if key else None
    if path is not None and (found := open_records(path, codec, IN_MEMORY)) is not None:
        on_progress("tokenising", 1.0, f"{len(examples)} rows were tokenised before")
        os.utime(path)
        return found, Counter(found.info)
    try:
        made, counts = _made(examples, codec, encode, on_progress, path)
    except OSError:
        # A full or forbidden disk is no reason not to train.
        made, counts = _made(examples, codec, encode, on_progress, None)
        path = None
    if path is not None:
        sweep(path.parent)
        made = open_records(path, codec, IN_MEMORY) or made
    return made, counts


def _made(
    examples: Sequence[Example],
    codec: Codec[T],
    encode: Callable[[Sequence[Example], Counter[str]], Iterator[T]],
    on_progress: Progress,
    path: Path | None,
) -> tuple[Records[T], Counter[str]]:
    counts: Counter[str] = Counter()
    writer = Writer(codec, path)
    try:
        done = 0
        for part in parts(examples):
            on_progress("tokenising", done / len(examples), f"Tokenising row {done + 1} of {len(examples)}")
            for row in encode(part, counts):
                writer.append(row)
            done += len(part)
        return writer.close(dict(counts)), counts
    except BaseException:
        writer.drop()
        raise


def parts(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """The examples in their order, up to `CHUNK` rows or about `CHARACTERS` characters at a time."""
    part: list[Example] = []
    size = 0
    for example in examples:
        part.append(example)
        size += _characters(example)
        if len(part) == CHUNK or size >= CHARACTERS:
            yield part
            part, size = [], 0
    if part:
        yield part


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list | tuple) else 1


def _key(examples: Sequence[Example], tokenizer: Any, settings: Mapping[str, Any]) -> str | None:
    """A name for these rows under this tokenizer; None where it cannot say what it does (it is no fast one)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    # Both change with the calls, which name them each time.
    plain = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
    found = hashlib.sha256()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    versions = [_VERSION, *map(version, ("transformers", "tokenizers"))]
    template = getattr(tokenizer, "chat_template", None)
    said = [versions, type(tokenizer).__name__, plain, template, special, dict(settings)]
    found.update(json.dumps(said, sort_keys=True, default=str).encode())
    raw = examples.raws() if isinstance(examples, Rows) else None
    for number in range(len(examples)):
        row = raw(number) if raw else json_bytes(examples[number])
        found.update(len(row).to_bytes(8, "little") + row)
    return found.hexdigest()[:32]


def sweep(folder: Path, most: int = MOST_BYTES) -> None:
    """Delete the files that were not used for the longest time until the rest has at most `most` bytes."""
    files = []
    for path in folder.iterdir():
        try:
            state = path.stat()
        except OSError:
            continue
        if path.name.startswith(".draft-") and time.time() - state.st_mtime > _DRAFT_SECONDS:
            path.unlink(missing_ok=True)
        elif path.suffix == ".records":
            files.append((state.st_mtime, state.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files)[:-1]:
        if total <= most:
            return
        path.unlink(missing_ok=True)
        total -= size


def ids_of(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    """The token ids of texts, as the tokenizer gives them one by one, in one call."""
    found: list[list[int]] = tokenizer(list(texts), **options)["input_ids"] if texts else []
    return found
