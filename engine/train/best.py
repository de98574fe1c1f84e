"""Early stopping: the best evaluation of a run, what was learned until then, and when to wait no longer."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from engine.checkpoint import write_safetensors
from engine.errors import CheckpointError
from engine.train.parallel import Group
from engine.train.trainee import Trainee


@dataclass
class Standing:
    """How a run stands with its evaluations; saved with each checkpoint.

    Attributes:
        step: of the evaluation with the lowest loss; None before the first.
        loss: that loss.
        waited: evaluations since then.
    """

    step: int | None = None
    loss: float | None = None
    waited: int = 0


class Best:
    """Keeps what a run had learned at its best evaluation, in `folder/step-000040.safetensors`.

    Args:
        folder: where it is kept until the run ends.
        patience: evaluations in a row without a lower loss that are waited for.
        trainee: what learns.
        group: of several processes one writes, and all read.
    """

    def __init__(self, folder: Path, patience: int, trainee: Trainee, group: Group) -> None:
        self.folder = folder
        self.patience = patience
        self.trainee = trainee
        self.group = group
        self.standing = Standing()

    @property
    def over(self) -> bool:
        """Whether the patience has run out."""
        return self.standing.waited >= self.patience

    def take(self, step: int, loss: float) -> None:
        """An evaluation; the one before the first step is not counted, for nothing was learned yet.

        Raises:
            CheckpointError: what was learned cannot be written.
        """
        standing = self.standing
        if step == 0:
            return
        if standing.loss is not None and not loss < standing.loss:
            standing.waited += 1
            return
        self.standing = Standing(step, loss)
        state = self.trainee.state()
        if self.group.speaks:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                write_safetensors(self._file(step), state)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"What was learned until step {step} cannot be written: {error}.",
                    "Free some space on the disk, then resume from the last checkpoint.",
                ) from error
        self.group.wait()

    def resume(self, standing: Standing) -> bool:
        """Go on as a checkpoint stood; False when the file it speaks of is gone, and counting begins anew."""
        kept = standing.step is None or self._file(standing.step).is_file()
        self.standing = standing if kept else Standing()
        return kept

    def prune(self) -> None:
        """Drop what newer checkpoints do not need; called when one has been written."""
        if self.group.speaks and self.standing.step is not None:
            for path in self.folder.glob("step-*.safetensors"):
                if path != self._file(self.standing.step):
                    path.unlink(missing_ok=True)

    def restore(self) -> None:
        """Put what was learned at the best evaluation back into the model; nothing where there was none.

        Raises:
            CheckpointError: its file is missing or damaged.
        """
        if self.standing.step is None:
            return
        try:
            state = load_file(self._file(self.standing.step))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"What was learned until step {self.standing.step}, the best evaluation, cannot be read: {error}.",
                "Resume from the last checkpoint with another early_stopping_patience, or start the run again.",
            ) from error
        self.trainee.restore(state)

    def clear(self) -> None:
        """Remove the files, once the result is saved."""
        if self.group.speaks:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.safetensors"
