"""The public endpoints of adapters: list, import, rename, delete, mix, save, export, push, resize. See `studio.api`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from engine.errors import ConfigError
from studio import adapting, demo, exporting, mixing, states
from studio.context import Studio
from studio.pictures import inlined
from studio.store import Row

Answer = dict[str, Any]
Guard = Callable[[Callable[..., Answer]], Callable[..., Answer]]

_FIELDS = ("id", "name", "origin", "base", "task", "method", "rank", "targets", "parameters", "bytes", "colour")

ENDPOINTS = (
    "list_adapters",
    "rename_adapter",
    "delete_adapter",
    "restore_adapter",
    "empty_adapter_bin",
    "mix",
    "save_mix_as_adapter",
    "save_mix",
    "list_mixes",
    "delete_mix",
    "export_adapter",
    "push_adapter",
    "rank_errors",
    "resize_adapter",
    "adapter_work",
    "stop_adapter_work",
)
"""The methods that are served as they are; a file is sent to `import_adapter` and by `download_export`."""

NOT_IN_DEMO = ("push_adapter",)
"""Endpoints that a public server for strangers does not have."""


class AdapterEndpoints:
    """The functions behind the endpoints, callable without a server."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def list_adapters(self, search: str = "", base: str = "", deleted: bool = False) -> Answer:
        """Adapters, newest first: of finished runs, imported, or made of others; those in the bin when `deleted`.

        Every word of `search` has to be in the name, base, method, targets or data set's name.
        """
        rows = self.studio.library.rows(_text(search, "search"), _text(base, "base"), deleted is True)
        return {"adapters": [_adapter(row) for row in rows]}

    def import_adapter(self, paths: list[str] | None, name: str = "", base: str = "") -> Answer:
        """Import an adapter: a zip, PEFT's two files, or one of kohya's or diffusers'; safetensors only.

        `base` may be left out where the adapter's config names one that is known here. Goes on in a process of its own;
        ask `adapter_work` for what came of it.
        """
        files = [Path(path) for path in paths or []]
        return {"work": adapting.bring_in(self.studio, files, _text(name, "name"), _text(base, "base"))}

    def rename_adapter(self, adapter: str, name: str) -> Answer:
        """Give an adapter another name."""
        self.studio.library.rename(adapter, name)
        return {"adapter": _adapter(self.studio.library.get(adapter))}

    def delete_adapter(self, adapter: str) -> Answer:
        """Put an adapter into the bin; `restore_adapter` takes it out again until the bin is emptied."""
        self.studio.library.bin(adapter)
        return {"adapter": adapter, "deleted": True}

    def restore_adapter(self, adapter: str) -> Answer:
        """Take an adapter out of the bin."""
        self.studio.library.restore(adapter)
        return {"adapter": adapter, "deleted": False}

    def empty_adapter_bin(self) -> Answer:
        """Remove the adapters in the bin with their files, for good; answers how many."""
        return {"removed": self.studio.library.empty_bin()}

    def mix(
        self,
        adapters: list[list[Any]],
        prompt: str,
        how: str = "live",
        rank: int = 0,
        density: float = 0.5,
        seed: int = 0,
        temperature: float = 0.3,
        max_new_tokens: int = 80,
    ) -> Iterator[Answer]:
        """Answer a prompt with 1 to 4 adapters together; streams, the last message is complete.

        `adapters` is a list of [id, weight], weights from -1 to 2; `how` is `live` or a combination type; `rank` is for
        types by singular values (0: the largest of the adapters'), `density` for those that prune.
        """
        from studio.api import refusal, sampling

        try:
            how_much = sampling(seed, temperature, max_new_tokens)
            mixture = mixing.check(self.studio, _parts(adapters), how, rank, density)
            for state in mixing.answer(self.studio, mixture, prompt, how_much):
                base, mixed = state.columns
                yield {
                    "base": {"text": base.text, "picture": inlined(base.picture)},
                    "mix": {"text": mixed.text, "picture": inlined(mixed.picture), "reason": mixed.reason},
                    "status": state.status,
                    "finished": state.finished,
                }
        except Exception as fault:
            yield refusal(fault)

    def save_mix_as_adapter(
        self, adapters: list[list[Any]], name: str, how: str = "live", rank: int = 0, density: float = 0.5
    ) -> Answer:
        """Save a mix as a new adapter; goes on in a process of its own, see `adapter_work`."""
        mixture = mixing.check(self.studio, _parts(adapters), how, rank, density)
        return {"work": mixing.kept(self.studio, mixture, name)}

    def save_mix(
        self, name: str, adapters: list[list[Any]], how: str = "live", rank: int = 0, density: float = 0.5
    ) -> Answer:
        """Keep adapters, weights and type under a name; a mix of that name is replaced."""
        mixture = mixing.check(self.studio, _parts(adapters), how, rank, density)
        return {"mix": self.studio.library.save_mix(name, mixture.base, mixture.parts, mixture.settings)}

    def list_mixes(self) -> Answer:
        """The mixes that were kept, by name."""
        kept = ("id", "name", "base", "parts", "settings")
        return {"mixes": [{key: row[key] for key in kept} for row in self.studio.library.mixes()]}

    def delete_mix(self, mix: int) -> Answer:
        """Remove a mix; its adapters stay."""
        self.studio.library.forget_mix(mix)
        return {"mix": mix}

    def export_adapter(self, adapter: str, form: str = "peft", precision: str = "f16") -> Answer:
        """Write an adapter as `peft` (a zip), `merged` (a folder), `gguf`, `gguf-adapter`, `kohya` or `diffusers`.

        Goes on in a process of its own, see `adapter_work`. `precision` is that of `gguf`: f16, bf16, f32 or q8_0.
        """
        return {"work": exporting.export(self.studio, adapter, form, precision)}

    def push_adapter(self, adapter: str, repository: str, what: str = "peft", private: bool = True) -> Answer:
        """Upload an adapter (`peft`), or its base with it (`merged`), to a new repository `owner/name` of the hub.

        Needs a token in the server's environment; none is taken from here. Goes on in a process of its own, see
        `adapter_work`, whose result has the `url`.
        """
        return {"work": exporting.push(self.studio, adapter, repository, what, private)}

    def rank_errors(self, adapter: str) -> Answer:
        """What lowering a LoRA's rank would cost: entry r - 1 of `errors` is the relative error at rank r."""
        return {"errors": adapting.rank_errors(self.studio, adapter)}

    def resize_adapter(self, adapter: str, rank: int, name: str = "") -> Answer:
        """Save a LoRA at another rank as a new adapter; goes on in a process of its own, see `adapter_work`."""
        return {"work": adapting.resize(self.studio, adapter, rank, _text(name, "name"))}

    def adapter_work(self, work: str) -> Answer:
        """What became of an import, an export, a push, a saved mix or a resize: state, progress, then result or error.

        `result` has the new adapter's id, the error against what it was made from, `bytes` of an export, whose file
        `download_export` sends, or the `url` of what was pushed.
        """
        self.studio.works.present()
        row = self.studio.works.get(work)
        result = {key: value for key, value in (row["result"] or {}).items() if key != "path"}
        kept = ("id", "kind", "state", "message", "fraction", "error")
        live = row["state"] in (states.STARTING, states.RUNNING)
        return {**{key: row[key] for key in kept}, "live": live, "result": result or None}

    def stop_adapter_work(self) -> Answer:
        """End the work on adapters that is under way; nothing of it is kept."""
        self.studio.works.stop()
        return {"stopped": True}


def _text(value: Any, what: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{what} is {repr(value)[:40]}; needed: text, or nothing.")
    return value or ""


def _parts(adapters: Any) -> list[tuple[str, float]]:
    good = isinstance(adapters, list) and all(isinstance(it, list | tuple) and len(it) == 2 for it in adapters)
    if not good:
        raise ConfigError("`adapters` must be a list of [id, weight].", 'For example [["ad-12345678", 0.7]].')
    return [(adapter, weight) for adapter, weight in adapters]


def _adapter(row: Row) -> Answer:
    return {
        **{key: row[key] for key in _FIELDS},
        "run": row["run_id"],
        "data": row["data_name"],
        "score": row["score"],
        "created": row["created"],
        "deleted": row["deleted_at"] is not None,
    }


def build(studio: Studio, guarded: Guard) -> None:
    """Register the endpoints on the page that is being built."""
    ends = AdapterEndpoints(studio)
    with gr.Row(visible=False):
        files, called, base, found = gr.File(file_count="multiple"), gr.Textbox(), gr.Textbox(), gr.JSON()
        # A File input accepts only what was uploaded to this server, never a path of its disk.
        gr.Button().click(guarded(ends.import_adapter), [files, called, base], found, api_name="import_adapter")
        work, sent, told = gr.Textbox(), gr.File(), gr.JSON()

        def download_export(work: str) -> tuple[Any, Any]:
            """The file that an export wrote, and a refusal where there is none."""
            answered = guarded(lambda: {"path": str(exporting.exported(studio, work))})()
            return (served(sent, Path(answered["path"])), None) if "path" in answered else (None, answered)

        gr.Button().click(download_export, work, [sent, told], api_name="download_export")

    for name in ENDPOINTS:
        if name in NOT_IN_DEMO and demo.active() is not None:
            continue
        # Gradio reads the parameters' names, types and defaults of the method behind.
        function = getattr(ends, name) if name == "mix" else guarded(getattr(ends, name))
        gr.events.api(function, api_name=name, concurrency_limit=8)


def served(component: Any, path: Path) -> str:
    """A copy of a file of the home folder in the component's own cache, from where the server may send it."""
    from gradio.processing_utils import save_file_to_cache

    return str(save_file_to_cache(path, component.GRADIO_CACHE))
