"""Stable Diffusion's adapter files, both directions: kohya's and diffusers', for LoRA, DoRA, LoHa and LoKr.

`sniff` says what a file is, `load_adapter_file` attaches it, `write_kohya` and `write_diffusers` write one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from engine.checkpoint import CONFIG, PREFIX, write_weights
from engine.errors import CheckpointError, ConfigError, EngineError
from engine.formats.diffusers import read_diffusers, split_key, write_diffusers
from engine.formats.kohya import PREFIXES, read_kohya, write_kohya
from engine.formats.parts import COMPONENTS, AdapterPart, weights_file
from engine.model import PeftModel, get_peft_model

__all__ = [
    "AdapterPart",
    "load_adapter_file",
    "read_diffusers",
    "read_kohya",
    "sniff",
    "write_diffusers",
    "write_kohya",
]


def sniff(path: str | Path) -> str | None:
    """`peft`, `kohya` or `diffusers`, by the names in the file's header; None for anything else.

    Raises:
        UnsafeFileError: the file is a pickle; it is not opened.
        CheckpointError: there is no such file, or the folder holds several.
    """
    path = Path(path)
    if path.is_dir() and ((path / CONFIG).is_file() or _folders(path)):
        return "peft"
    path = weights_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    except (SafetensorError, OSError):
        return None
    if keys and all(key.startswith(PREFIX) for key in keys):
        return "peft"
    if any(key.startswith(tuple(PREFIXES)) for key in keys):
        return "kohya"
    return "diffusers" if any(split_key(key) for key in keys) else None


def _folders(path: Path) -> dict[str, Path]:
    """Component -> its adapter in PEFT's format, where a folder holds them by component."""
    return {name: path / name for name in COMPONENTS if (path / name / CONFIG).is_file()}


def load_adapter_file(
    models: Mapping[str, nn.Module | None],
    path: str | Path,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> dict[str, PeftModel]:
    """Attach a file's adapter to the models that it is for, and make it the active one.

    Args:
        models: component (`unet`, `text_encoder`, `text_encoder_2`) -> a plain model, wrapped in place, or a PeftModel
            that gets one adapter more. None leaves a component of the file out on purpose.
        path: a kohya or diffusers file, or a folder in PEFT's format (for one model, or a folder for each component).
        adapter_name: the name under which it is attached.
        is_trainable: False freezes it.

    Returns:
        Component -> model, for the components that the file is for.

    Raises:
        UnsafeFileError: the file is a pickle; it is not opened.
        CheckpointError: it is no adapter file, does not fit, or adapts a component that `models` does not name.
        On any error the models are as before.
    """
    kind = sniff(path)
    if kind == "kohya":
        parts = read_kohya(path, models)
    elif kind == "diffusers":
        parts = read_diffusers(path, models)
    elif kind == "peft":
        parts = _read_peft(Path(path), models)
    else:
        raise CheckpointError(
            f"{path} is no adapter file that is known here.", "Needed: kohya's or diffusers' safetensors, or PEFT's."
        )
    left = [name for name in parts if name not in models]
    if left:
        raise CheckpointError(
            f"{Path(path).name} also adapts {', '.join(left)}, and models names {', '.join(models)} only.",
            "Give those models too, or None in their place to leave that part of the file out.",
        )
    done: dict[str, PeftModel] = {}
    undo: list[Callable[[], None]] = []
    try:
        for name, part in parts.items():
            model = models[name]
            if model is not None:
                done[name] = _attach(model, part, adapter_name, is_trainable, undo)
    except EngineError:
        for step in reversed(undo):
            step()
        raise
    for attached in done.values():
        attached.set_adapter(adapter_name)
    return done


def _read_peft(path: Path, models: Mapping[str, nn.Module | None]) -> dict[str, AdapterPart]:
    from engine.checkpoint import read_config, read_weights

    folder = path if path.is_dir() else path.parent
    folders = _folders(folder)
    if (folder / CONFIG).is_file() and folders:
        # As training leaves it: the UNet's adapter in the folder itself, the encoders' beside it.
        folders = {"unet": folder, **folders}
    elif (folder / CONFIG).is_file():
        if len(models) != 1:
            raise ConfigError(
                f"{folder} holds the adapter of one model, and models names {', '.join(models)}.", "Name the one."
            )
        folders = {next(iter(models)): folder}
    if not folders:
        raise CheckpointError(f"{folder} holds no {CONFIG}.", "Give the folder that save_pretrained wrote.")
    return {name: AdapterPart(read_config(place), read_weights(place)) for name, place in folders.items()}


def _attach(
    model: nn.Module, part: AdapterPart, adapter_name: str, is_trainable: bool, undo: list[Callable[[], None]]
) -> PeftModel:
    """Attach and fill; what takes it off again is put on `undo` before anything can fail."""
    config = part.config.replace(inference_mode=not is_trainable)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if isinstance(model, PeftModel):
        attached, weights = model, dict(model.switchboard.weights)
        model.add_adapter(adapter_name, config)
    else:
        attached, weights = get_peft_model(model, config, adapter_name), {}

    def back() -> None:
        if attached is model:
            attached.delete_adapter(adapter_name)
            attached.switchboard.weights = weights
        else:
            attached.unload()
        for parameter in trained:
            parameter.requires_grad_(True)

    undo.append(back)
    write_weights(attached, adapter_name, part.tensors)
    return attached
