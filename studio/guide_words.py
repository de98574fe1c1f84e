"""The guided path as HTML: goals, the options of a step, what it comes to. Buttons say by `data-` what they are."""

from __future__ import annotations

from collections.abc import Iterable

from engine.train.job import JobSpec
from studio import demo
from studio.guide import GOALS, STEPS, Goal, Option, Path
from studio.i18n import N_, t
from studio.markup import esc
from studio.samples import SAMPLES

LIVE = """element.addEventListener('click', (event) => {
  const pressed = event.target.closest('[data-goal], [data-choice], [data-step], [data-sample], [data-page]');
  if (pressed && element.contains(pressed)) trigger('click', {...pressed.dataset});
});
element.dataset.live = 'yes';"""
"""For the HTML of the path: a press on a card says which. `data-live` tells the first page's script that it listens."""

TITLES = {
    "goal": N_("Goal"),
    "data": N_("Data"),
    "model": N_("Model"),
    "preset": N_("Recipe"),
    "check": N_("Check"),
    "train": N_("Train"),
    "compare": N_("Compare"),
}
"""What the row of steps says; the last two are pages of their own."""

QUESTIONS = {
    "data": (
        N_("What should it learn from?"),
        N_("Take the sample for a first look, or bring in rows of your own."),
    ),
    "model": (
        N_("Which model should learn it?"),
        N_("The base stays as it is; a small adapter beside it learns. Toys are for trying the road."),
    ),
    "preset": (
        N_("How should it learn?"),
        N_("A recipe is a whole set of settings that go together. You can change each one later."),
    ),
    "check": (
        N_("Ready to train"),
        N_("This is what will happen. Nothing leaves this machine, and the base is not changed."),
    ),
}

# Drawn for this page: lines on a grid of 24 by 24.
_ICONS = {
    "chat": '<path d="M4 5h16v11H10l-4 4v-4H4z"/><path d="M8 9h8M8 12h5"/>',
    "translator": '<path d="M4 6h8M8 4v2M10 6c-1 4-3 6-6 8M6 9c1 3 3 4 5 5"/><path d="M13 20l4-9 4 9M14.4 17h5.2"/>',
    "style": '<path d="M4 20l1-5L15 5l4 4L9 19z"/><path d="M13 7l4 4"/><path d="M14 20h6"/>',
    "captions": '<path d="M4 4h16v11H4z"/><path d="M7 13l4-5 3 3 2-2 2 4"/><path d="M6 19h12"/>',
    "classifier": '<path d="M4 6h6v5H4zM14 4h6v5h-6zM14 13h6v5h-6z"/><path d="M10 8.5h2v-2h2M12 8.5v7h2"/>',
    "preferences": '<path d="M12 4v15M7 19h10M5 8h14"/><path d="M5 8l-2 6h5zM19 8l-3 6h5z"/>',
    "code": '<path d="M8 7l-5 5 5 5M16 7l5 5-5 5M13.5 5l-3 14"/>',
    "else": '<path d="M5 7h8M17 7h2M5 12h2M11 12h8M5 17h6M15 17h4"/><path d="M15 5v4M9 10v4M13 15v4"/>',
}


def _icon(name: str) -> str:
    return (
        '<svg class="gd-icon" viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="1.6"'
        f' stroke-linecap="round" stroke-linejoin="round" aria-hidden="true">{_ICONS[name]}</svg>'
    )


def goals(ids: bool = True) -> str:
    """The first page: what can be taught, and the finished samples.

    Args:
        ids: with the ids that the page's buttons have; without where it stands beside the page itself.
    """
    cards = [_goal(goal) for goal in GOALS.values()]
    other = (
        f'<button type="button" class="gd-card" data-page="train">{_icon("else")}<b>{esc(t("Something else"))}</b>'
        f"<span>{esc(t('Every task, base and setting, on one form.'))}</span></button>"
    )
    named = ""
    for sample in (sample for sample in SAMPLES.values() if demo.offers(sample.spec().model)):
        own = f' id="start-{esc(sample.name)}"' if ids else ""
        toy = f'<small class="st-badge">{esc(t("toy"))}</small>' if sample.toy else ""
        named += (
            f'<button type="button" class="gd-sample"{own} data-sample="{esc(sample.name)}"'
            f' title="{esc(t(sample.meaning))}"><span>{esc(t(sample.button))}</span>{toy}</button>'
        )
    lead = t("Choose one. Three short questions and a check follow, each with an answer that works.")
    return (
        f'<h2 class="page-title">{esc(t("What do you want to teach?"))}</h2>'
        f'<p class="st-lead">{esc(lead)}</p>'
        f'<div class="gd-cards">{"".join([*cards, other])}</div>'
        f'<h3 class="gd-next">{esc(t("Or open a finished sample"))}</h3>'
        f'<p class="st-lead">{esc(t("Its rows, base and recipe are filled in: train, compare, done."))}</p>'
        f'<div class="gd-samples">{named}</div>'
    )


def _goal(goal: Goal) -> str:
    first = " first" if goal.name == next(iter(GOALS)) else ""
    return (
        f'<button type="button" class="gd-card{first}" data-goal="{esc(goal.name)}">{_icon(goal.name)}'
        f"<b>{esc(t(goal.title))}</b><span>{esc(t(goal.meaning))}</span></button>"
    )


def head(path: Path) -> str:
    """Where somebody is: the row of steps, the question, a line about it."""
    now = STEPS.index(path.step)
    items = []
    for number, (name, title) in enumerate(TITLES.items()):
        said = f"<i>{number + 1}</i>{esc(t(title))}"
        if number < now:
            items.append(f'<li class="done"><button type="button" data-step="{name}">{said}</button></li>')
        else:
            mark = ' class="now" aria-current="step"' if number == now else ""
            items.append(f"<li{mark}><span>{said}</span></li>")
    question, about = QUESTIONS[path.step]
    return (
        f'<ol class="gd-steps" aria-label="{esc(t("Steps"))}">{"".join(items)}</ol>'
        f'<p class="gd-goal">{_icon(path.goal)}{esc(t(path.about.title))}</p>'
        f'<h2 class="page-title">{esc(t(question))}</h2><p class="st-lead">{esc(t(about))}</p>'
    )


def options(offered: Iterable[Option], value: str) -> str:
    """The answers of a step as cards, one of them pressed."""
    cards = ""
    for option in offered:
        marks = "".join(f'<small class="st-badge">{esc(mark)}</small>' for mark in option.marks)
        cards += (
            f'<button type="button" class="gd-option" data-choice="{esc(option.value)}"'
            f' aria-pressed="{"true" if option.value == value else "false"}">'
            f'<b title="{esc(option.title)}">{esc(option.title)}</b>'
            f'<span>{esc(option.meaning)}</span><span class="gd-marks">{marks}</span></button>'
        )
    return f'<div class="gd-options" role="group">{cards}</div>'


def summary(path: Path, spec: JobSpec, rows: int, held: int, model: Option, preset: Option, data: str) -> str:
    """What will happen, line by line; `rows` are trained on, `held` are kept for checking."""
    training = spec.training
    long = (
        t("{n} steps of {rows} rows", n=training.max_steps, rows=training.batch_size * training.gradient_accumulation)
        if training.max_steps
        else t("{n} passes over the rows", n=f"{training.epochs:g}")
    )
    lines = (
        (t("Data"), f"{data}: " + t("{n} rows to learn from, {held} held back for checking", n=f"{rows:,}", held=held)),
        (t("Model"), f"{model.title} · " + " · ".join(model.marks)),
        (t("Recipe"), preset.title),
        (t("Length"), long),
        (t("Result"), t("an adapter of its own, compared with the base side by side")),
    )
    body = "".join(f"<div><dt>{esc(name)}</dt><dd>{esc(text)}</dd></div>" for name, text in lines)
    return f'<dl class="gd-summary">{body}</dl>'
