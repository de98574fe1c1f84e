"""`python -m studio.adapter_worker WORK_ID`: one piece of long work on adapters, in a process of its own."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, EngineError, ModelError
from engine.exporting import NAME
from engine.paths import studio_home
from studio import adapter_files, export_work, exporting, process, states, visitors
from studio.context import Studio
from studio.faults import is_memory, memory_event, unexpected_event
from studio.library import IMPORTED, MIXED, RESIZED
from studio.store import Row

logger = logging.getLogger("studio.adapter_worker")


@dataclass(frozen=True)
class Work:
    """One work, claimed.

    Attributes:
        studio: the home folder.
        row: its row.
        folder: where its drafts and what it makes lie.
    """

    studio: Studio
    row: Row
    folder: Path

    @property
    def asked(self) -> Row:
        return dict(self.row["asked"])

    @property
    def draft(self) -> Path:
        """A folder for what becomes an adapter; it is moved into the library when it is whole."""
        return self.folder / "draft"

    def tell(self, message: str, fraction: float | None = None) -> None:
        self.studio.works.tell(self.row["id"], message, fraction)

    def opened(self, rows: list[Row], names: list[str] | None = None, precision: str = "auto") -> Any:
        """The base of adapters in memory, with them on it under `names` (by default `NAME`)."""
        from engine.answerers import answerer_class

        def progress(phase: str, fraction: float | None, message: str) -> None:
            self.tell(message, fraction)

        answerer = answerer_class(rows[0]["task"])(rows[0]["base"], precision, on_progress=progress)
        for row, name in zip(rows, names or [NAME], strict=True):
            self.tell(f"Reading {row['name']}")
            answerer.attach(name, self.studio.library.folder(row))
        return answerer


# --- making adapters ------------------------------------------------------------------------------------------------


def _import(work: Work) -> Row:
    """A draft that was taken apart already: convert it if need be, see whether it fits its base, keep it."""
    asked, draft = work.asked, work.draft
    work.tell("Reading the adapter")
    if asked["form"] == "foreign":
        _convert(draft, asked["base"])
    found = adapter_files.facts(draft)
    note = ""
    work.tell(f"Does it fit {asked['base']}?")
    if found.task == "classification":
        note = "Whether it fits its base shows when it is used: its head is its own."
    else:
        try:
            _fits(draft, asked["base"], asked["task"])
        except ModelError as error:
            note = f"Whether it fits shows when it is used: {error.message}"
    details = {"file": asked["file"], **({"note": note} if note else {})}
    adapter = work.studio.library.add(draft, asked["name"], IMPORTED, asked["base"], asked["task"], details)
    return {"adapter": adapter, "message": f"Imported {asked['name']}.", "note": note}


def _convert(draft: Path, base: str) -> None:
    from engine.formats import read_diffusers, read_kohya, sniff
    from engine.models.catalogue import portable
    from engine.models.pipelines import meta_unet

    path = draft / adapter_files.FOREIGN
    read = {"kohya": read_kohya, "diffusers": read_diffusers}.get(sniff(path) or "")
    if read is None:
        raise CheckpointError("The file is no adapter that is known here.", "Known: PEFT's, kohya's and diffusers'.")
    parts = read(path, {"unet": meta_unet(base)})
    if "unet" not in parts:
        raise CheckpointError(
            f"The file adapts {', '.join(parts)} alone; needed: the UNet.", "Use it where it was made."
        )
    for name, part in parts.items():
        folder = draft if name == "unet" else draft / name
        config = part.config.replace(base_model_name_or_path=portable(base))
        type(part)(config, part.tensors).save_pretrained(folder)
    path.unlink()


def _fits(folder: Path, base: str, task: str) -> None:
    """Attach it to the base's shapes, without weights.

    Raises:
        TargetError, CheckpointError, ConfigError: it does not fit.
        ModelError: the base's shapes are not to be had.
    """
    from engine.model import PeftModel
    from engine.models.loading import meta_model

    PeftModel.from_pretrained(meta_model(base, task=task), folder)


def _save_mix(work: Work) -> Row:
    """A mix as an adapter of its own."""
    from engine.blending import save_blend
    from engine.combinations import Blend

    asked, library = work.asked, work.studio.library
    rows = [library.usable(adapter) for adapter, _ in asked["parts"]]
    answerer = work.opened(rows, [row["id"] for row in rows])
    work.tell(f"Combining {len(rows)} adapters" if len(rows) > 1 else "Weighing the adapter")
    blend = Blend(dict(asked["parts"]), asked["how"], asked["rank"], asked["density"])
    error = save_blend(answerer.parts, blend, work.draft)
    _sidecars(library.folder(rows[0]), work.draft)
    named = [[row["name"], weight] for row, (_, weight) in zip(rows, asked["parts"], strict=True)]
    details = {"parts": named, "how": asked["how"], "error": error}
    adapter = library.add(work.draft, asked["name"], MIXED, rows[0]["base"], rows[0]["task"], details)
    return {"adapter": adapter, "message": f"Saved {asked['name']}.", "error": error}


def _resize(work: Work) -> Row:
    """An adapter at another rank, as one of its own; what lowering it costs is measured first."""
    from engine.adapters.lora import LoraConfig
    from engine.checkpoint import save_adapter
    from engine.resize import expand_lora_rank, rank_errors, reduce_lora_rank

    asked, library = work.asked, work.studio.library
    row, rank, error = library.usable(asked["adapter"]), int(asked["rank"]), 0.0
    answerer = work.opened([row])
    work.tell(f"Changing the rank from {row['rank']} to {rank}")
    for part, model in answerer.parts.items():
        config = model.peft_config[NAME]
        errors = rank_errors(model, NAME)
        if rank >= len(errors):
            # The scale stays, so that training goes on at the pace that it had.
            factor = (rank / config.r) ** (0.5 if config.use_rslora else 1.0)
            wider = LoraConfig(r=rank, lora_alpha=config.lora_alpha * factor, use_rslora=config.use_rslora)
            expand_lora_rank(model, wider, NAME)
        else:
            error = max(error, errors[rank - 1])
            reduce_lora_rank(model, rank, adapter_name=NAME)
        save_adapter(model, work.draft if part in ("unet", "model") else work.draft / part, NAME)
    _sidecars(library.folder(row), work.draft)
    details = {"from": row["name"], "before": row["rank"], "error": error}
    adapter = library.add(work.draft, asked["name"], RESIZED, row["base"], row["task"], details)
    return {"adapter": adapter, "message": f"Saved {asked['name']} with rank {rank}.", "error": error}


def _sidecars(source: Path, draft: Path) -> None:
    for name in adapter_files.SIDECARS:
        if (source / name).is_file():
            shutil.copyfile(source / name, draft / name)


KINDS: dict[str, Callable[[Work], Row]] = {
    "import": _import,
    "save_mix": _save_mix,
    "resize": _resize,
    "export": export_work.export,
    "push": export_work.push,
}


def run(work: Work) -> int:
    """Do it and keep what came of it; returns the exit status."""
    works, work_id = work.studio.works, work.row["id"]
    try:
        result = KINDS[work.row["kind"]](work)
        if works.close_work(work_id, states.DONE, result=result) and work.row["kind"] == "export":
            exporting.drop_former(work.studio, work_id)
        return 0
    except EngineError as error:
        logger.exception("The work failed.")
        event: Row = dict(error.to_event())
    except Exception as error:
        logger.exception("The work failed.")
        event = memory_event(error) if is_memory(error) else unexpected_event(error)
    finally:
        shutil.rmtree(work.draft, ignore_errors=True)
    works.close_work(work_id, states.FAILED, {key: event[key] for key in ("code", "message", "hint")})
    return 1


def main(argv: list[str] | None = None) -> int:
    """Entry point; the one argument is the work's id."""
    arguments = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    if len(arguments) != 1:
        print("usage: python -m studio.adapter_worker WORK_ID", file=sys.stderr)
        return 2
    studio = Studio.open(studio_home())
    row = studio.works.get(arguments[0])
    if not studio.works.claim(row["id"], os.getpid(), process.started_at(os.getpid())):
        logger.warning("Work %s is not waiting for a process; nothing to do.", row["id"])
        return 3
    with visitors.acting(row["owner"]):
        return run(Work(studio, row, studio.works.folder(row["id"])))


if __name__ == "__main__":
    raise SystemExit(main())
