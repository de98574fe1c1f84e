"""The first-run samples: a job of `examples/` each, its rows, and the words of its card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.models.catalogue import BUILTIN
from engine.paths import REPOSITORY
from engine.train.job import JobSpec
from studio.i18n import N_

FOLDER = REPOSITORY / "examples"


@dataclass(frozen=True)
class Sample:
    """One button of the first page; title, button and meaning are the keys of what `t` says.

    Attributes:
        name: a short stable name.
        title: the card's head.
        button: what the button says.
        meaning: what happens and what it costs.
        job: the job file in `examples/`.
    """

    name: str
    title: str
    button: str
    meaning: str
    job: str

    def spec(self) -> JobSpec:
        """The sample's job, its rows by absolute path."""
        return JobSpec.from_file(FOLDER / self.job)

    @property
    def toy(self) -> bool:
        """Whether its base is one of those that are for trying only."""
        base = BUILTIN.get(self.spec().model)
        return base is not None and base.toy

    def rows(self) -> Path:
        """The file it learns from."""
        return Path(self.spec().data.path).resolve()


SAMPLES = {
    sample.name: sample
    for sample in (
        Sample(
            "captain",
            N_("A voice of the sea"),
            N_("Teach SmolLM2 the captain's voice"),
            N_(
                "A real language model with 135 million parameters. Downloads 93 to 271 MB once, then trains in"
                " about two minutes on a laptop."
            ),
            "first_lora.yaml",
        ),
        Sample(
            "toy",
            N_("A first look in a minute"),
            N_("Try the toy model"),
            N_(
                "A toy that comes with the studio: no download, about a minute. Its answers are poor, its change"
                " is plain."
            ),
            "first_lora_tiny.yaml",
        ),
        Sample(
            "old-english",
            N_("Text into other text"),
            N_("Teach old English"),
            N_("A toy T5 that turns old English into modern learns the way back. About half a minute."),
            "translate_tiny.yaml",
        ),
        Sample(
            "captions",
            N_("What a picture shows"),
            N_("Teach longer captions"),
            N_("A toy BLIP that names emoji learns to say on what ground they stand. About a quarter of a minute."),
            "captions_tiny.yaml",
        ),
        Sample(
            "pictures",
            N_("A style of drawing"),
            N_("Teach blueprints"),
            N_("A toy Stable Diffusion that draws small emoji learns to draw them as blueprints. About two minutes."),
            "pictures_tiny.yaml",
        ),
        Sample(
            "topics",
            N_("Which topic a question is about"),
            N_("Teach eight topics"),
            N_(
                "A real text encoder (MiniLM) learns to sort questions. Downloads 83 to 91 MB once, then half a minute."
            ),
            "topics_minilm.yaml",
        ),
        Sample(
            "preferences",
            N_("The better of two answers"),
            N_("Teach a preference"),
            N_("The toy learns from pairs which answer is wanted (DPO): the captain's. About a minute."),
            "preference_tiny.yaml",
        ),
        Sample(
            "functions",
            N_("Code from what is wanted"),
            N_("Teach short functions"),
            N_("The toy learns to answer with a short Python function: the form, not to program. About a minute."),
            "functions_tiny.yaml",
        ),
    )
}
