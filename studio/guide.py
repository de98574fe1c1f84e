"""The guided path: what it asks, in which order, what it offers at each step, and the job that comes of the answers.

The path itself is five words in the address (goal, step, data, model, preset), so that a reload comes back to it. Every
step has an answer that works, so a path is whole from its goal on. Nothing here draws.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.models.catalogue import BUILTIN, BaseModel
from engine.models.fetch import is_ready
from engine.train.job import JobSpec
from studio import demo, forms, presets, recipes
from studio.datasets import usable
from studio.i18n import N_, t
from studio.samples import SAMPLES, Sample
from studio.store import Row

STEPS = ("goal", "data", "model", "preset", "check")
SAMPLE, TASTE = "sample", "taste"
"""As data: the goal's own rows. As preset: the sample's own recipe, and a run of a few steps."""

TASTE_STEPS = 12
_WORD = re.compile(r"[A-Za-z0-9_-]{0,64}")


@dataclass(frozen=True)
class Goal:
    """One thing to teach; title, meaning and verb are the keys of what `t` says.

    Attributes:
        name: a short stable name; it stands in the address.
        title: the card's head.
        meaning: one line for someone who never trained a model.
        verb: what the button of the last step begins with.
        task: the task that learns it.
        formats: the rows that it learns from; those of the task where empty.
        sample: the finished sample whose rows are offered.
        offered: the presets that are offered; those of the task where empty.
    """

    name: str
    title: str
    meaning: str
    task: str
    sample: str
    formats: tuple[str, ...] = ()
    offered: tuple[str, ...] = ()

    @property
    def form(self) -> presets.Task:
        """The task as the Train form shows it."""
        return recipes.task_of(self.task)

    def takes(self, row: Row) -> bool:
        """Whether it can learn from a kept data set."""
        return usable(row) and row["format"] in (self.formats or self.form.formats)


_CHATS = ("messages", "alpaca", "sharegpt", "oasst", "prompt_completion")
GOALS: Mapping[str, Goal] = {
    goal.name: goal
    for goal in (
        Goal(
            "chat",
            N_("A chat model"),
            N_("It answers in your voice, from questions and answers or conversations."),
            "causal_lm",
            "toy",
            _CHATS,
            ("quick-look", "chat-sft", "conservative", "aggressive", "low-memory"),
        ),
        Goal(
            "translator",
            N_("A translator"),
            N_("It turns one text into another: a language, a style, a summary."),
            "seq2seq",
            "old-english",
        ),
        Goal(
            "style",
            N_("An image style"),
            N_("It draws what you name in the style of your pictures."),
            "text_to_image",
            "pictures",
        ),
        Goal(
            "captions",
            N_("Captions"),
            N_("It says what a picture shows, in the words of your captions."),
            "captioning",
            "captions",
        ),
        Goal(
            "classifier",
            N_("A classifier"),
            N_("It sorts texts into the classes that you name."),
            "classification",
            "topics",
        ),
        Goal(
            "preferences",
            N_("A preference"),
            N_("It learns from pairs which of two answers is the better one."),
            "preference",
            "preferences",
        ),
        Goal(
            "code",
            N_("Code or plain text"),
            N_("It writes code from what is wanted, or goes on with a text."),
            "causal_lm",
            "functions",
            (*_CHATS, "text"),
            ("quick-look", "code", "completion", "low-memory"),
        ),
    )
}


@dataclass(frozen=True)
class Option:
    """One answer that a step offers.

    Attributes:
        value: what the path keeps.
        title: its name.
        meaning: one line about it.
        marks: short facts beside the name.
    """

    value: str
    title: str
    meaning: str
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Path:
    """Where somebody is on the way; without a goal, at its beginning."""

    goal: str = ""
    step: str = "goal"
    data: str = SAMPLE
    model: str = ""
    preset: str = ""

    def __str__(self) -> str:
        return ".".join((self.goal, self.step, self.data, self.model, self.preset)) if self.goal else ""

    @property
    def about(self) -> Goal:
        """What is taught; only where there is a goal."""
        return GOALS[self.goal]

    def back(self) -> Path:
        """The step before."""
        before = STEPS[max(0, STEPS.index(self.step) - 1)]
        return Path() if before == "goal" else replace(self, step=before)

    def on(self) -> Path:
        """The step after; the last stays."""
        return replace(self, step=STEPS[min(len(STEPS) - 1, STEPS.index(self.step) + 1)])


def read(text: str | None, rows: Iterable[Row]) -> Path:
    """A path from the address; whatever in it is unknown, or is no longer there, is at its default.

    Args:
        text: `str(path)`.
        rows: the data sets that are kept.
    """
    words = (text or "").split(".")
    if len(words) != 5 or words[0] not in GOALS or words[1] not in STEPS[1:]:
        return Path()
    if not all(_WORD.fullmatch(word) for word in words):
        return Path()
    return settled(Path(*words), rows)


def settled(path: Path, rows: Iterable[Row]) -> Path:
    """The path with an answer to every step, each of which fits those before it."""
    goal = path.about
    if path.data not in {SAMPLE, *(row["id"] for row in rows if goal.takes(row))}:
        path = replace(path, data=SAMPLE)
    if path.model not in {option.value for option in model_options(path)}:
        path = replace(path, model=first_model(path))
    offered = [option.value for option in preset_options(path)]
    return path if path.preset in offered else replace(path, preset=offered[0])


def begin(goal: str, rows: Iterable[Row], data: str = SAMPLE) -> Path:
    """The step after a goal was chosen."""
    return settled(Path(goal, "data", data), rows)


def sample_of(path: Path) -> Sample:
    """The sample that is offered for the goal: the one with the chosen base where there is one, else the goal's own."""
    own = SAMPLES[path.about.sample]
    spec = own.spec()
    for sample in SAMPLES.values():
        if sample.rows() == own.rows() and sample.spec().task == spec.task and sample.spec().model == path.model:
            return sample
    return own


def data_options(path: Path, rows: Iterable[Row]) -> list[Option]:
    """The sample, then the data sets that the goal can learn from, newest first."""
    sample = SAMPLES[path.about.sample]
    found = [Option(SAMPLE, t("The sample"), t(sample.title) + f" ({sample.rows().name})", (t("a good start"),))]
    for row in rows:
        if path.about.takes(row):
            found.append(
                Option(row["id"], row["name"], t("Brought in earlier."), (t("{n} rows", n=f"{row['rows']:,}"),))
            )
    return found


def model_options(path: Path) -> list[Option]:
    """The built-in bases of the goal's task that may be used here."""
    offered = [BUILTIN[name] for _, name in recipes.bases(path.about.form)]
    return [Option(model.name, model.title, t(model.meaning), _marks(model)) for model in offered]


def _marks(model: BaseModel) -> tuple[str, ...]:
    count = t("{n} million parameters", n=f"{model.parameters / 1e6:.0f}")
    if model.bundled:
        return count, t("comes with the studio")
    return count, t("is on this machine") if is_ready(model.name) else t("is fetched once, from the internet")


def first_model(path: Path) -> str:
    """The task's usual base where it is on this machine and may be used; else the toy, which always is."""
    usual = path.about.form.base
    if demo.offers(usual) and is_ready(usual):
        return usual
    return next(m.name for m in BUILTIN.values() if m.bundled and path.about.task in m.tasks)


def preset_options(path: Path) -> list[Option]:
    """The recipes; the sample's own first where its rows and its base were chosen."""
    found = []
    if path.data == SAMPLE:
        sample = sample_of(path)
        if sample.spec().model == path.model:
            found.append(Option(SAMPLE, t("As the sample was made"), t(sample.meaning), (t("a good start"),)))
    names = path.about.offered or tuple(path.about.form.presets)
    for name in names:
        preset = path.about.form.presets[name]
        first = (t("a good start"),) if not found else ()
        found.append(Option(name, t(preset.title), t(preset.meaning), first))
    few = t("{n} steps: too few to be any good, enough to see the whole road.", n=TASTE_STEPS)
    return [*found, Option(TASTE, t("Only a taste"), few, (t("seconds"),))]


def chosen(options: Iterable[Option], value: str) -> Option:
    """The option of this value; the first where there is none."""
    offered = list(options)
    return next((option for option in offered if option.value == value), offered[0])


def job(path: Path, dataset: Row) -> JobSpec:
    """The job that the answers make.

    Args:
        path: a settled path.
        dataset: the kept data set that it names; the sample's, brought in, where it names the sample.

    Raises:
        EngineError: the recipe does not fit.
    """
    task = path.about.form
    asked = _recipe(path)
    training = dict(asked["training"])
    if path.preset == TASTE:
        few = TASTE_STEPS // 2
        training |= {"max_steps": TASTE_STEPS, "eval_every": few, "checkpoint_every": TASTE_STEPS}
    adapter = dict(asked["adapter"])
    method = adapter.pop("method")
    title = chosen(preset_options(path), path.preset).title.lower()
    return forms.job(
        name=" · ".join((dataset["name"].rsplit(".", 1)[0], path.model, title))[:80],
        task=task.name,
        model=path.model,
        dataset=dataset,
        eval_split=asked["eval_split"],
        method=method,
        adapter=adapter,
        training=training,
        options=asked["options"],
        quantization=asked["quantization"],
    )


def _recipe(path: Path) -> dict[str, Any]:
    """The keys of a job that the chosen preset sets."""
    task = path.about.form
    own = path.data != SAMPLE
    if path.preset == SAMPLE or (path.preset == TASTE and not own and sample_of(path).spec().model == path.model):
        return recipes.of_spec(sample_of(path).spec().to_dict())
    names = path.about.offered or tuple(task.presets)
    found = recipes.of_preset(task, task.presets[names[0] if path.preset == TASTE else path.preset])
    if own and "prefix" in found["options"] and path.preset in (names[0], TASTE):
        # Its words name the sample's languages.
        found["options"] |= dict.fromkeys(("prefix", "source", "target"))
    return found
