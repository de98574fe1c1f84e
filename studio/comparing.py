"""One prompt, answered by the base and by others side by side: what can be asked, and the answers while they stream."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from engine.data import open_picture
from engine.errors import EngineError, PromptError
from studio.answers import Answers, Column
from studio.comparisons import ANSWERS, Comparisons
from studio.context import Studio
from studio.datasets import first_prompt
from studio.i18n import t
from studio.voices import Voice, task_of, voices

_EVERY = 0.1


def fitting(studio: Studio, run_id: str) -> str:
    """A prompt that fits what the run learned from; "" where nothing says one."""
    row = studio.store.run(run_id)
    samples = row["spec"]["training"].get("sample_prompts") or []
    if samples:
        return str(samples[0])
    try:
        return first_prompt(studio.store.dataset(row["dataset"]))
    except EngineError:
        return ""


def check_prompt(task: str, prompt: Any, picture: str | None = None) -> None:
    """Whether there is something to answer.

    Raises:
        PromptError: there is not.
    """
    if task == "captioning":
        if not picture:
            raise PromptError(t("There is no picture."), t("Choose the picture that should be described."))
    elif not isinstance(prompt, str) or not prompt.strip():
        raise PromptError(t("The prompt is empty."), t("Write what the base and the adapters should answer."))


def column_of(voice: Voice) -> Column:
    """An empty column for somebody."""
    return Column(voice.run, voice.title, voice.colour)


def stream(
    studio: Studio,
    base: str,
    who: Sequence[Voice],
    prompt: str,
    sampling: Mapping[str, Any],
    picture: str | None,
    state: Answers,
) -> Iterator[Answers]:
    """Ask everybody in one batch; yields `state` while its columns, one for each of `who`, grow.

    Args:
        picture: the file of a picture, for a base that describes pictures.

    Raises:
        InferenceError: the inference process reported something.
    """
    task = task_of(studio, base, who)
    folders = {name: folder for voice in who for name, folder in voice.folders(studio).items()}
    blends = {name: fields for voice in who for name, fields in voice.blends().items()}
    messages = [{"role": "user", "content": prompt or "", **({"image": picture} if picture else {})}]
    rows = [voice.row() for voice in who]
    last = 0.0
    with closing(studio.inference.generate(base, folders, messages, rows, sampling, task, blends)) as news:
        for message in news:
            if message["type"] == "progress":
                state.status, state.fraction = message["message"], message.get("fraction")
            else:
                column = state.columns[message["index"]]
                column.text += message["text"]
                column.picture = message.get("picture", "")
                column.done, column.reason = message["done"], message.get("reason") or ""
                state.status, state.fraction = "", None
            if time.monotonic() - last >= _EVERY:
                last = time.monotonic()
                yield state
    state.took, state.status, state.fraction = time.monotonic() - state.began, "", None
    for column in state.columns:
        column.done = True


def answer(
    studio: Studio,
    base: str,
    keys: Sequence[str],
    prompt: str,
    sampling: Mapping[str, Any],
    picture: str | None = None,
) -> Iterator[Answers]:
    """Ask the base and others; yields the growing answers, at most ten times a second, and keeps the last.

    Args:
        base: the base model.
        keys: who else: ids of runs, of adapters, or `mix-` and a mix's number.
        prompt: the words.
        sampling: fields of `engine.generation.Sampling`.
        picture: the file of a picture that was brought in, for a base that describes pictures.

    Raises:
        EngineError: see `studio.voices.voices` and `check_prompt`; or the inference process reported something.
    """
    who = voices(studio, base, keys)
    task = task_of(studio, base, who)
    check_prompt(task, prompt, picture)
    asked = kept_picture(studio.home, picture) if task == "captioning" and picture else ""
    state = Answers([column_of(voice) for voice in who], status=t("Waking the base"))
    yield state
    yield from stream(studio, base, who, prompt, sampling, asked or None, state)
    state.finished = True
    results = [plain(column, voice) for column, voice in zip(state.columns, who, strict=True)]
    words = "" if asked else prompt
    state.kept = Comparisons(studio.store, studio.home).add(ANSWERS, base, words, sampling, results, asked)
    yield state


def plain(column: Column, voice: Voice) -> dict[str, Any]:
    """A column as it is kept, with what its adapters and weights were."""
    names = ("run", "title", "colour", "text", "reason", "picture")
    return {**{name: getattr(column, name) for name in names}, **described(voice)}


def described(voice: Voice) -> dict[str, Any]:
    """What exactly somebody was: the version, and of a mix adapters, weights and type."""
    found: dict[str, Any] = {"version": voice.version}
    if voice.blend is not None:
        parts = zip(voice.rows, voice.blend.weights.values(), strict=True)
        found["mix"] = {"how": voice.blend.how, "parts": [[row["name"], weight] for row, weight in parts]}
    return found


def column_from(kept: Mapping[str, Any]) -> Column:
    """A column that was kept."""
    words = {name: str(kept.get(name) or "") for name in ("title", "colour", "text", "reason", "picture")}
    return Column(kept.get("run"), **words, done=True)


def answers_from(row: Mapping[str, Any]) -> Answers:
    """The answers of a comparison that was kept."""
    return Answers([column_from(it) for it in row["results"]], finished=True, kept=row["id"])


def kept_picture(home: Path, path: str) -> str:
    """A copy of a picture in the home folder, by its content: what was uploaded is deleted after a day.

    Raises:
        PictureError: it cannot be opened.
    """
    open_picture(path)
    name = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:24]
    place = home / "pictures" / f"asked-{name}{Path(path).suffix.lower()[:5]}"
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = place.with_name(f".{place.name}.draft")
        shutil.copyfile(path, draft)
        draft.replace(place)
    return str(place)
