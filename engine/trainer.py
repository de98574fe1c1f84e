"""transformers' Trainer for our models: its checkpoints hold the adapters alone, and resuming reads them.

Trainer asks the installed `peft` whether a model is one of adapters; ours is not of that class, so it would save every
weight of the base. `AdapterTrainer` is Trainer with that one answer changed; for a trainer of another library, put the
mixin first: `class MyTrainer(AdapterTrainerMixin, SFTTrainer)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.checkpoint import CONFIG, read_weights, write_weights
from engine.errors import CheckpointError
from engine.model import PeftModel


class AdapterTrainerMixin:
    """What changes in a Trainer; models without adapters are saved as before."""

    model: Any
    args: Any
    accelerator: Any
    state: Any

    def _adapted(self) -> PeftModel | None:
        found = self.accelerator.unwrap_model(self.model)
        return found if isinstance(found, PeftModel) else None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        model = self._adapted()
        if model is None:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        processing: Any = getattr(self, "processing_class", None)
        if processing is not None:
            processing.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._adapted() is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        else:
            self._restore(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self._adapted() is None:
            super()._load_best_model()  # type: ignore[misc]
        else:
            self._restore(Path(self.state.best_model_checkpoint))

    def _restore(self, folder: Path) -> None:
        """Every adapter of the model from a checkpoint.

        Raises:
            CheckpointError: the checkpoint lacks one of them.
        """
        model = self._adapted()
        assert model is not None
        for name in model.peft_config:
            place = folder if name == "default" else folder / name
            if not (place / CONFIG).is_file():
                raise CheckpointError(
                    f"The checkpoint {folder} holds no adapter {name!r}.", "Resume with the model that wrote it."
                )
            write_weights(model, name, read_weights(place))


def __getattr__(name: str) -> Any:
    """`AdapterTrainer`, made when it is first asked for: importing Trainer takes seconds."""
    if name != "AdapterTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transformers import Trainer

    made = type(name, (AdapterTrainerMixin, Trainer), {"__doc__": "transformers' Trainer, saving adapters alone."})
    globals()[name] = made
    return made
