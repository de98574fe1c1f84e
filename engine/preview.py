"""Rows as the tokens that a run would see, before it starts: by the tasks' own code, with no weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from engine.errors import ConfigError, DataError
from engine.models.progress import Progress
from engine.tasks import get_task
from engine.tasks.base import Loaded, Sequenced, Showing
from engine.train.job import LOSS_ON, TrainingSpec

MOST_PIECES = 600
"""Tokens of one sequence that are given with their text."""
LEARNED, SPECIAL, LOST, PART = 1, 2, 4, 8
"""Marks of a token: the loss counts it; it stands for no text; it is cut; its characters began in the token before."""

Example = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Reader:
    """A task with a base's tokenizer, ready to show rows.

    Attributes:
        task: with its options.
        loaded: its processor is the tokenizer, its model has only a config.
        training: `max_length` and `loss_on`.
    """

    task: Showing
    loaded: Loaded
    training: TrainingSpec

    def rows(self, examples: Sequence[Example]) -> Iterator[tuple[list[Sequenced], str]]:
        """The sequences of each example; or none, and why the base cannot take it."""
        try:
            # All at once is many times faster, and fails as a whole.
            yield from [(found, "") for found in self.task.shown(examples, self.loaded, self.training)]
            return
        except DataError as error:
            if len(examples) == 1:
                yield [], str(error)
                return
        for example in examples:
            yield from self.rows([example])


def reader(
    base: str,
    task: str,
    options: Mapping[str, Any] | None = None,
    max_length: int = 512,
    loss_on: str = "answers",
    on_progress: Progress | None = None,
) -> Reader:
    """What shows rows for a base and a task, as a job with these settings would see them.

    Methods with virtual tokens leave a row so many tokens less than the model's context; that is not counted here.

    Raises:
        ConfigError: an option, the length or `loss_on` cannot be used.
        ModelError, UnsafeFileError: the base cannot be found.
    """
    chosen = get_task(task, options)
    if not isinstance(chosen, Showing):
        raise ConfigError(f"The task {task} does not show its tokens.")
    if loss_on not in LOSS_ON or isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 8:
        raise ConfigError(
            f"max_length is {max_length!r} and loss_on {loss_on!r}; needed: 8 tokens or more, and one of "
            f"{', '.join(LOSS_ON)}."
        )
    return Reader(chosen, _light(base, task, on_progress), TrainingSpec(max_length=max_length, loss_on=loss_on))


def _light(base: str, task: str, on_progress: Progress | None) -> Loaded:
    from engine.models.fetch import resolve

    resolve(base, on_progress)
    processor, config = _tokenizer_and_config(base, task == "text_to_image")
    if task == "captioning":
        processor = SimpleNamespace(tokenizer=processor)
    model: Any = SimpleNamespace(config=config)
    return Loaded(model, processor)


@functools.lru_cache(maxsize=4)
def _tokenizer_and_config(base: str, pipeline: bool) -> tuple[Any, Any]:
    from engine.models.loading import load_config, load_tokenizer

    if pipeline:
        from engine.models.pipelines import tokenizers_of

        return SimpleNamespace(tokenizers=tokenizers_of(base)), None
    return load_tokenizer(base), load_config(base)


def shown(reader: Reader, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Rows for a page, of JSON's types.

    Of each: `line`, `error` (why the base cannot take it, or ""), and `parts`: of each sequence `part`, `tokens`
    (before the cut), `learned` (after it), `lost` (tokens cut), `limit` (the most that are kept) and `pieces`:
    [text, marks] of the first `MOST_PIECES` tokens, and of the ten around the cut where that comes later, with
    [None, n] for n tokens between.
    """
    found = []
    for example, (sequences, error) in zip(examples, reader.rows(examples), strict=True):
        parts = [_part(sequence) for sequence in sequences]
        found.append({"line": example.get("line", 0), "error": error, "parts": parts})
    return found


def lengths(reader: Reader, examples: Sequence[Example]) -> list[list[int]]:
    """Of each row: tokens of its longest sequence, how many of all are cut, how many the loss counts, the limit."""
    return [
        [
            max((len(one.ids) for one in sequences), default=0),
            sum(one.lost[1] - one.lost[0] for one in sequences),
            sum(one.targets for one in sequences),
            min((one.limit for one in sequences), default=0),
        ]
        for sequences, _ in reader.rows(examples)
    ]


def _part(sequence: Sequenced) -> dict[str, Any]:
    start, stop = sequence.lost
    shown, count = list(range(min(len(sequence.ids), MOST_PIECES))), len(sequence.ids)
    if start < stop and start > MOST_PIECES:
        shown += range(max(MOST_PIECES, start - 5), min(count, start + 5))
    texts = pieces(sequence.tokenizer, sequence.ids)
    special = set(sequence.tokenizer.all_special_ids) | set(getattr(sequence.tokenizer, "added_tokens_decoder", ()))
    listed: list[list[Any]] = []
    before = -1
    for place in shown:
        if place != before + 1:
            listed.append([None, place - before - 1])
        before = place
        text, inside = texts[place]
        lost = start <= place < stop
        marks = LEARNED * (sequence.learned[place] and not lost) + SPECIAL * (sequence.ids[place] in special)
        listed.append([text, marks + LOST * lost + PART * inside])
    if before + 1 < count:
        listed.append([None, count - before - 1])
    return {
        "part": sequence.part,
        "tokens": count,
        "learned": sequence.targets,
        "lost": stop - start,
        "limit": sequence.limit,
        "pieces": listed,
    }


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, bool]]:
    """The text of each token, and whether it only goes on with characters that began in the token before.

    A tokenizer of bytes may cut a character (of Korean, an emoji) in several tokens: the first gets all of it.
    """
    names = tokenizer.convert_ids_to_tokens(list(ids))
    found: list[tuple[str, bool]] = []
    open_at: int | None = None
    for place, (token, name) in enumerate(zip(ids, names, strict=True)):
        if open_at is None:
            text = _text(tokenizer, [token], str(name))
            found.append((text, False))
            open_at = place if "\ufffd" in text else None
            continue
        text = _text(tokenizer, list(ids[open_at : place + 1]), str(names[open_at]))
        found.append(("", True))
        if "\ufffd" not in text:
            found[open_at], open_at = (text, False), None
        elif place - open_at == 3:
            # No character has more than four bytes: the text itself is broken here.
            open_at = None
    return found


def _text(tokenizer: Any, ids: list[int], name: str) -> str:
    text = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if name.startswith("\u2581") and not text.startswith(" "):
        # Decoders of whole texts take the space before the first word away.
        return " " + text
    if name.startswith("##"):
        return text.removeprefix("##").lstrip()
    return text.removesuffix("</w>")
