"""The base models that a user can name without an owner: what each is, how large, under which licence.

Torch-free, so the page can list them. Fetching is `engine.models.fetch`, loading `engine.models.loading`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from engine.errors import ModelError
from engine.paths import REPOSITORY

BUILTIN_FOLDER = REPOSITORY / "engine" / "models" / "builtin"
CONFIG_FOLDER = REPOSITORY / "engine" / "models" / "configs"

DEFAULT = "smollm2-135m-instruct"
TOY = "tiny-llama"


@dataclass(frozen=True)
class BaseModel:
    """One built-in base model.

    Attributes:
        name: what the user types and a job holds.
        title: what a list shows.
        meaning: one line for someone who never trained a model.
        tasks: the tasks it can be the base of.
        parameters: number of weights, tied ones counted once; a classifier's with a head for two labels;
            of a pipeline its UNet's.
        size: bytes on disk when ready.
        licence: SPDX name.
        origin: where it comes from, in words.
        toy: made for trying the road quickly, not for answers worth reading.
        hub_id: its name on the Hugging Face hub, which adapters carry so that other libraries find their base.
        bundled: its weights lie in this repository; otherwise they are fetched on first use.
    """

    name: str
    title: str
    meaning: str
    tasks: tuple[str, ...]
    parameters: int
    size: int
    licence: str
    origin: str
    toy: bool = False
    hub_id: str = ""
    bundled: bool = False

    @property
    def config_folder(self) -> Path:
        """The folder whose `config.json` tells the model's shape without its weights."""
        return (BUILTIN_FOLDER if self.bundled else CONFIG_FOLDER) / self.name


_MODELS = (
    BaseModel(
        name=DEFAULT,
        title="SmolLM2 135M Instruct",
        meaning="A small chat model that answers in English; trains in minutes on a laptop.",
        tasks=("causal_lm", "preference"),
        parameters=134_515_008,
        size=272_600_000,
        licence="Apache-2.0",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct, by Hugging Face; fetched on first use (93 to 271 MB)",
    ),
    BaseModel(
        name="minilm",
        title="MiniLM L6",
        meaning="A small English text encoder; sorts texts into labels, trains in a minute or two on a laptop.",
        tasks=("classification",),
        parameters=22_713_986,
        size=91_335_697,
        licence="Apache-2.0",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        origin="sentence-transformers/all-MiniLM-L6-v2; fetched on first use (83 to 91 MB)",
    ),
    BaseModel(
        name=TOY,
        title="Tiny Llama (toy)",
        meaning="A toy that learns in seconds and works offline; its answers are not worth reading.",
        tasks=("causal_lm", "preference", "classification"),
        parameters=2_885_888,
        size=5_900_000,
        licence="Apache-2.0",
        origin="pretrained from nothing by scripts/pretrain_tiny_llama.py, on text written for this project",
        toy=True,
        bundled=True,
    ),
    BaseModel(
        name="tiny-t5",
        title="Tiny T5 (toy)",
        meaning="A toy that modernises old English and translates short Korean sentences; learns in seconds, offline.",
        tasks=("seq2seq",),
        parameters=2_165_376,
        size=4_460_000,
        licence="Apache-2.0",
        origin="pretrained from nothing by scripts/pretrain_tiny_t5.py, on public-domain and generated sentences",
        toy=True,
        bundled=True,
    ),
    BaseModel(
        name="tiny-blip",
        title="Tiny BLIP (toy)",
        meaning="A toy that names emoji on pictures of 64 pixels; learns in seconds, offline.",
        tasks=("captioning",),
        parameters=2_103_516,
        size=4_280_000,
        licence="Apache-2.0",
        origin="pretrained from nothing by scripts/pretrain_tiny_blip.py, on Noto's emoji with their Unicode names",
        toy=True,
        bundled=True,
    ),
    BaseModel(
        name="tiny-sd",
        title="Tiny Stable Diffusion (toy)",
        meaning="A toy that draws emoji of 64 pixels from their names; learns a style in a minute or two, offline.",
        tasks=("text_to_image",),
        parameters=2_398_572,
        size=7_860_000,
        licence="Apache-2.0",
        origin="pretrained from nothing by scripts/pretrain_tiny_sd.py, on Noto's emoji with their Unicode names",
        toy=True,
        bundled=True,
    ),
)

BUILTIN: Mapping[str, BaseModel] = MappingProxyType({model.name: model for model in _MODELS})


def describe(name: str) -> BaseModel:
    """The record of a built-in model.

    Raises:
        ModelError: no built-in model has this name; the nearest names are given.
    """
    if name not in BUILTIN:
        near = difflib.get_close_matches(name, BUILTIN, n=2, cutoff=0.5) or list(BUILTIN)
        raise ModelError(
            f"There is no built-in model {name!r}.",
            f"Nearest names: {', '.join(near)}. A model of the Hugging Face hub is named owner/name, "
            "a local folder by its full path.",
        )
    return BUILTIN[name]


def canonical(name: str) -> str:
    """A built-in model's name for its name on the hub; any other name as it is."""
    return next((model.name for model in BUILTIN.values() if name and model.hub_id == name), name)


def portable(name: str) -> str:
    """The name that other libraries know a model by; the inverse of `canonical`."""
    return BUILTIN[name].hub_id or name if name in BUILTIN else name
