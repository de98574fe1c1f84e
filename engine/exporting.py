"""Adapters and merged models as files for other programs. torch is imported when something is written.

`export` does it by names and folders, as `python -m engine export` does; the rest writes from models in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import llamacpp
from engine.errors import ConfigError

FORMS = ("merged", "gguf", "gguf-adapter", "kohya", "diffusers")
"""`merged`: the base with the adapter in its weights, a folder; `gguf`: the same for llama.cpp, one file;
`gguf-adapter`: a LoRA alone for llama.cpp; `kohya`, `diffusers`: an adapter of Stable Diffusion, one file."""

NAME = "adapter"
"""What an adapter is called while it is alone on its base."""

SIDECARS = ("labels.json", "prefix.json", "caption.json")
"""What an adapter's own task keeps beside it: a classifier's labels, words before a text."""

Tell = Callable[[str, float | None], None]


def _silent(message: str, fraction: float | None) -> None:
    pass


def export(
    base: str,
    adapter: Path | None,
    form: str,
    out: Path,
    *,
    precision: str = "f16",
    task: str = "",
    tell: Tell = _silent,
) -> Path:
    """Write an adapter, or its base with it, in a form of `FORMS`.

    Args:
        base: built-in name, local folder or hub id.
        adapter: the adapter's folder; None writes the base itself, which `gguf` alone does.
        form: of `FORMS`.
        out: the folder (`merged`) or the file to write.
        precision: of a GGUF model, see `engine.llamacpp.PRECISIONS`.
        task: what the adapter is for; found out when left out, but for captions.
        tell: told what is done, and the share of it where that is known.

    Raises:
        ConfigError: an unknown form, or one that has no place for this adapter.
        ConverterError: GGUF without the package that writes it.
        ModelError, CheckpointError, TargetError, UnsafeFileError: base or adapter cannot be opened.
    """
    if form not in FORMS:
        raise ConfigError(f"There is no form {form[:40]!r}.", f"Known: {', '.join(FORMS)}.")
    if adapter is None and form != "gguf":
        raise ConfigError(f"The form {form} is an adapter's, and none is given.", "Name it: --adapter FOLDER.")
    if form.startswith("gguf"):
        llamacpp.check_installed()
        llamacpp.check_precision(precision)
    if form == "gguf-adapter":
        assert adapter is not None
        return write_gguf_adapter(base, adapter, out, adapter.name)
    answerer = _opened(base, adapter, form, task, tell)
    if form == "gguf":
        title = adapter.name if adapter else Path(base).name
        return write_gguf(answerer, None if adapter is None else NAME, out, precision, title, tell)
    assert adapter is not None
    if form == "merged":
        return write_merged(answerer, base, adapter, out, tell)
    from engine.formats import write_diffusers, write_kohya

    tell("Writing the file", None)
    return (write_kohya if form == "kohya" else write_diffusers)(answerer.parts, out, NAME)


def _opened(base: str, adapter: Path | None, form: str, task: str, tell: Tell) -> Any:
    """The base in memory with the adapter on it."""
    from engine.answerers import answerer_class
    from engine.labelling import labels
    from engine.models.pipelines import named_pipeline

    if not task:
        found = "classification" if labels(base, [adapter] if adapter else []) else "causal_lm"
        task = "text_to_image" if named_pipeline(base) else found
    answerer = answerer_class(task)(
        base, merging_precision(form), on_progress=lambda phase, fraction, message: tell(message, fraction)
    )
    if adapter is not None:
        tell(f"Reading {adapter.name}", None)
        answerer.attach(NAME, adapter)
    return answerer


def merging_precision(form: str) -> str:
    """In which precision a base is opened for a form: for GGUF in float32, so that what is merged is rounded once."""
    return "fp32" if form == "gguf" else "auto"


def write_merged(answerer: Any, base: str, adapter: Path, place: Path, tell: Tell = _silent) -> Path:
    """The base with the adapter `NAME` in its weights, as a folder that transformers or diffusers opens.

    Args:
        answerer: of `engine.answerers`, with the adapter attached; its model is changed.
        base: the base's name.
        adapter: the adapter's folder; what its task keeps beside it is copied.
        place: the folder to write.
        tell: as `export`.

    Raises:
        ConfigError, TargetError, EngineError: the adapter cannot be merged.
    """
    tell("Merging", None)
    if hasattr(answerer, "pipeline"):
        for model in dict(answerer.parts).values():
            model.merge_and_unload(adapter_names=[NAME])
        tell("Writing the model", None)
        answerer.pipeline.diffusers().save_pretrained(place, safe_serialization=True)
        return place
    (model,) = answerer.parts.values()
    merged = model.merge_and_unload(adapter_names=[NAME])
    tell("Writing the model", None)
    merged.save_pretrained(place, safe_serialization=True)
    helper = getattr(answerer, "processor", None) or getattr(answerer, "tokenizer", None)
    if helper is None:
        from engine.models.loading import load_tokenizer

        helper = load_tokenizer(base)
    helper.save_pretrained(place)
    for name in SIDECARS:
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, place / name)
    return place


def write_gguf(
    answerer: Any, adapter_name: str | None, place: Path, precision: str, title: str, tell: Tell = _silent
) -> Path:
    """A chat model as one GGUF file, with an adapter in its weights unless `adapter_name` is None.

    Raises:
        ConverterError: the package that writes it is not installed.
        ConfigError, TargetError, EngineError: the adapter cannot be merged, or the model is none that is converted.
    """
    llamacpp.check_installed()
    from engine.llamacpp.files import check_family
    from engine.llamacpp.model import write_model

    model, tokenizer = getattr(answerer, "model", None), getattr(answerer, "tokenizer", None)
    if model is None or tokenizer is None:
        raise ConfigError("GGUF files here are of models that write texts.", "Save the merged model instead.")
    check_family(model.config)
    if adapter_name is not None:
        tell("Merging", None)
        model = model.merge_and_unload(adapter_names=[adapter_name])
    tell("Writing the file", 0.0)
    return write_model(model, tokenizer, place, precision, title, lambda share: tell("Writing the file", share))


def write_gguf_adapter(base: str, adapter: Path, place: Path, title: str) -> Path:
    """A LoRA alone as a GGUF file; of its base the configuration is enough.

    Raises:
        ConverterError: the package that writes it is not installed.
        ConfigError: the base is no Llama, or the adapter no plain LoRA.
        ModelError, CheckpointError, UnsafeFileError: base or adapter cannot be opened.
    """
    llamacpp.check_installed()
    from engine.llamacpp.adapter import write_adapter
    from engine.models.loading import load_config

    return write_adapter(adapter, load_config(base), place, title)
