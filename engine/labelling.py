"""Answers of classifiers: an adapter's labels for a text, beside the other adapters'."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.adapters.base import TaskType
from engine.errors import CheckpointError, ConfigError, EngineError, PromptError

if TYPE_CHECKING:
    from engine.generation import Piece, Sampling
    from engine.model import PeftModel
    from engine.tasks.classification import Classifier

UNTRAINED = "(the base has no labels of its own)"


def labels(base: str, adapters: Sequence[Path]) -> bool:
    """Whether these adapters, or without any the base, give labels rather than texts.

    Raises:
        ConfigError: some do and some do not.
        CheckpointError: a folder is no adapter.
    """
    if not adapters:
        return (Path(base).expanduser() / "labels.json").is_file()
    kinds = {_task_type(folder) == TaskType.SEQ_CLS.value for folder in adapters}
    if len(kinds) > 1:
        raise ConfigError("Some of these adapters write texts and some give labels.", "Compare those of one task.")
    return kinds.pop()


def _task_type(folder: Path) -> str | None:
    try:
        raw = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        found: str | None = raw.get("task_type")
        return found
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} is no adapter folder: {error}.", "Give the folder `adapter` of a run."
        ) from error


class Labeller:
    """A base and adapters of the task `classification`; adapters with the same labels share one base in memory.

    Args:
        base: built-in name, local folder or hub id.
        precision: auto, fp32 or bf16.
        on_progress: told what happens while the base is fetched and loaded.
    """

    def __init__(self, base: str, precision: str = "auto", on_progress: Any = None) -> None:
        self.base, self.precision, self.on_progress = base, precision, on_progress
        self._tasks: dict[str, Classifier] = {}
        self._models: dict[tuple[tuple[str, ...], bool], tuple[Any, Any]] = {}
        self._own: Classifier | None = None
        folder = Path(base).expanduser()
        if (folder / "labels.json").is_file():
            self._own = self._restored(folder)

    @property
    def attached(self) -> tuple[str, ...]:
        return tuple(self._tasks)

    @property
    def parts(self) -> dict[str, PeftModel]:
        """Label set -> its base with adapters."""
        from engine.model import PeftModel

        found = {", ".join(key[0]): model for key, (model, _) in self._models.items()}
        return {name: model for name, model in found.items() if isinstance(model, PeftModel)}

    def _restored(self, folder: Path) -> Classifier:
        from engine.tasks.classification import TASK

        return TASK.restored(folder)

    def _key(self, task: Classifier) -> tuple[tuple[str, ...], bool]:
        return task.labels, task.several

    def _load(self, task: Classifier) -> tuple[Any, Any]:
        from engine.inject import HEADS
        from engine.models.classifiers import load_classifier

        if self._key(task) not in self._models:
            self._models[self._key(task)] = load_classifier(
                self.base,
                task.labels,
                heads=HEADS[TaskType.SEQ_CLS],
                multi_label=task.several,
                precision=self.precision,
                on_progress=self.on_progress,
            )
        return self._models[self._key(task)]

    def attach(self, name: str, folder: str | Path) -> None:
        """Load an adapter under a name.

        Raises:
            EngineError: it cannot be used on this base.
        """
        from engine.model import PeftModel

        self.detach(name)
        task = self._restored(Path(folder))
        model, tokenizer = self._load(task)
        if isinstance(model, PeftModel):
            model.load_adapter(folder, name)
        else:
            try:
                model = PeftModel.from_pretrained(model, folder, name)
            except EngineError:
                del self._models[self._key(task)]
                raise
        self._models[self._key(task)] = (model, tokenizer)
        self._tasks[name] = task

    def detach(self, name: str) -> None:
        """Take an adapter off; a name that is not attached is no error."""
        task = self._tasks.pop(name, None)
        if task is None:
            return
        model, _ = self._models[self._key(task)]
        if any(self._key(other) == self._key(task) for other in self._tasks.values()):
            model.delete_adapter(name)
        else:
            del self._models[self._key(task)]

    def stream(
        self, messages: Sequence[Mapping[str, str]], who: Sequence[str | None], sampling: Sampling
    ) -> Generator[Piece, None, None]:
        """The label of each column with its probability; None is the base, which has labels only as a trained model.

        Raises:
            PromptError: there is no text.
            ConfigError: a name in `who` is not attached.
        """
        from engine.generation import Piece
        from engine.model import PeftModel
        from engine.tasks.base import Loaded

        text = str(messages[-1].get("content", "")) if messages else ""
        if not text.strip():
            raise PromptError("The text is empty.", "Write what should be labelled.")
        for number, name in enumerate(who):
            task = self._own if name is None else self._tasks.get(name)
            if task is None:
                if name is not None:
                    raise ConfigError(f"There is no adapter {name!r} here.", f"Attached: {', '.join(self._tasks)}.")
                yield Piece(number, UNTRAINED, True, "stop")
                continue
            model, tokenizer = self._load(task)
            if name is not None:
                model.set_adapter(name, inference_mode=True)
            # The base's own labels are those of the model before any adapter.
            off = name is None and isinstance(model, PeftModel)
            with model.disable_adapter() if off else nullcontext():
                yield Piece(number, task.sample(model, Loaded(model, tokenizer), text), True, "stop")
