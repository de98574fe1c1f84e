"""The Train form's cost card and the methods' costs: asked of the inference process, piece by piece, and kept."""

from __future__ import annotations

import itertools
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gradio as gr

from engine.errors import EngineError
from engine.memory.machine import available
from engine.memory.prediction import Prediction, fits
from engine.train.job import JobSpec
from studio import costs, forms, process, recipes
from studio.datasets import train_rows
from studio.i18n import t
from studio.inference import InferenceError, RefusedError
from studio.markup import error
from studio.page import HIDDEN, Page
from studio.train_marks import marked, read_form
from studio.train_parts import CHANGED, Parts

Updates = dict[Any, Any]
Stages = dict[str, dict[str, Any]]

PAUSE = 0.3
"""Seconds without another change before a job is worked out: nobody waits for the costs of half a number."""
_KEPT = 64


class Estimates:
    """What was found out about jobs, by everything of them that a cost depends on."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, Stages] = OrderedDict()

    @staticmethod
    def key(spec: JobSpec) -> str:
        """Equal for jobs that cost the same."""
        return json.dumps({**spec.to_dict(), "name": ""}, sort_keys=True)

    def get(self, spec: JobSpec) -> Stages | None:
        """All stages of a job, if they still hold with the memory that is free now."""
        found = self._found.get(self.key(spec))
        if found is None:
            return None
        machine, peak = found["machine"], found["peak"]
        if machine["device"] != "cpu" or "prediction" not in peak:
            return found
        budget = available()
        kept = {name: value for name, value in peak["prediction"].items() if name not in ("total", "peak")}
        verdict = fits(Prediction(**kept), budget)
        if "exceeds" in (verdict, peak["verdict"]) and verdict != peak["verdict"]:
            return None
        return {**found, "machine": {**machine, "budget": budget}, "peak": {**peak, "verdict": verdict}}

    def put(self, spec: JobSpec, found: Stages) -> None:
        """Keep a job's stages, if the last one is among them."""
        if "largest" in found or "unknown" in found.get("peak", {}):
            self._found[self.key(spec)] = found
            while len(self._found) > _KEPT:
                self._found.popitem(last=False)


class Newest:
    """Which of a visitor's questions is the newest; older ones need no answer any more."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._of: OrderedDict[str, int] = OrderedDict()

    def begin(self, who: str) -> Callable[[], bool]:
        """A new question; what it answers says whether it is still the newest."""
        number = next(self._numbers)
        self._of[who] = number
        self._of.move_to_end(who)
        while len(self._of) > 1000:
            self._of.popitem(last=False)
        return lambda: self._of.get(who) == number


def wire(page: Page, parts: Parts) -> None:
    """Connect the card, its remedy, and the table of methods."""
    form = [*parts.head, *parts.values]
    estimates, newest, tables = Estimates(), Newest(), Newest()
    machine = process.machine()

    def times(spec: JobSpec, dataset_id: str | None) -> str:
        plain, store = spec.to_dict(), page.studio.store
        rows = train_rows(store.dataset(dataset_id), spec.data.eval_split) if dataset_id else 0
        if not rows and not spec.training.max_steps:
            return t("measured after the first steps")
        return costs.times(costs.pace(store, plain, machine), costs.steps(plain, rows))

    def shown(found: Stages, said: str, busy: bool) -> Updates:
        """The card and what follows from it: the remedy, the button to start, the number of processes."""
        exceeds = found.get("peak", {}).get("verdict") == "exceeds"
        changes = found.get("remedy", {}).get("changes") if exceeds else None
        gpus = found.get("machine", {}).get("gpus", 1)
        updates: Updates = {
            parts.cost: costs.card(found, said, busy),
            parts.changes: changes,
            parts.remedy: gr.Button(
                t("Take {changes}", changes=costs.changed(changes)) if changes else "", visible=bool(changes)
            ),
        }
        if not busy:
            updates[parts.start] = gr.Button(variant="secondary" if changes else "primary")
        if "machine" in found:
            updates[parts.processes] = gr.Number(visible=gpus > 1, maximum=max(1, gpus))
        return updates

    def refused(fault: EngineError, before: list[str], inputs: tuple[Any, ...]) -> Updates:
        """The reason in the card's place and beside the field."""
        task, method = inputs[1], inputs[7]
        named = recipes.faulty(fault, task, method)
        quantised = isinstance(fault, RefusedError) and fault.field == "quantization"
        if quantised:
            named = {**named, "quantization": fault.message}
        updates = marked(parts, named, before, task, method)
        stop = isinstance(fault, RefusedError)
        changes = {"quantization": "none"} if quantised else None
        return {
            parts.cost: costs.card({}, "", fault=error(fault, t("These settings do not fit this base"))),
            parts.refused: updates.pop(parts.marked),
            parts.changes: changes,
            parts.remedy: gr.Button(t("Take the base as it is (quantization none)"), visible=quantised),
            **({parts.start: gr.Button(interactive=False)} if stop else {}),
            **updates,
        }

    def cost(request: gr.Request, before: list[str], *inputs: Any) -> Iterator[Updates]:
        """The card of the form as it is, growing as more is known; earlier questions of this page are given up."""
        wanted = newest.begin(str(request.session_hash))
        time.sleep(PAUSE)
        if not wanted():
            yield {}
            return
        try:
            spec = read_form(page, *inputs, rows_needed=False)
        except EngineError:
            # What is wrong stands beside the field already.
            said = f'<p class="st-hint">{t("The costs stand here as soon as the marked settings are mended.")}</p>'
            yield {parts.cost: costs.card({}, "", fault=said), parts.remedy: gr.Button(visible=False)}
            return
        said = times(spec, inputs[0])
        cleared = marked(parts, {}, before, inputs[1], inputs[7])
        cleared[parts.refused] = cleared.pop(parts.marked)
        known = estimates.get(spec)
        if known is not None:
            yield {**shown(known, said, busy=False), **cleared}
            return
        found: Stages = {}
        yield {**cleared, parts.cost: costs.card(found, said, busy=True)}
        try:
            for stage in asked(page, spec, wanted):
                if not wanted():
                    return
                found[stage["stage"]] = stage
                if stage["stage"] != "machine":
                    yield shown(found, said, busy=True)
        except EngineError as fault:
            # A refusal of a form that has changed meanwhile would stand beside the newer one's card.
            if wanted():
                yield refused(fault, [], inputs)
            return
        if not wanted():
            return
        estimates.put(spec, found)
        yield shown(found, said, busy=False)

    def remedy(changes: Mapping[str, Any] | None) -> Updates:
        """Put the change that fits into the form."""
        found: Updates = {}
        for key, value in (changes or {}).items():
            section, _, name = key.rpartition(".")
            if key == "quantization":
                found[parts.quantization] = value
            elif section == "training":
                owned = next(o for o in recipes.fields() if not o.method and not o.task and o.field.name == name)
                found[parts.widgets[owned.key]] = forms.show(owned.field, value)
        return found

    def compare(request: gr.Request, opened: bool, *inputs: Any) -> Iterator[str]:
        """What each method costs with the fields that it has in the form."""
        wanted = tables.begin(str(request.session_hash))
        if not opened:
            yield gr.skip()
            return
        time.sleep(PAUSE)
        try:
            spec = read_form(page, *inputs, rows_needed=False)
        except EngineError as fault:
            yield error(fault, t("The methods cannot be compared yet"))
            return
        rows: list[dict[str, Any]] = []
        yield costs.methods(rows, inputs[7], busy=True)
        try:
            for row in page.studio.inference.method_costs(spec.to_dict(), recipes.adapters(inputs[8:]), wanted):
                if not wanted():
                    return
                rows.append(row)
                yield costs.methods(rows, inputs[7], busy=True)
        except EngineError as fault:
            if wanted():
                yield error(fault, t("The methods cannot be compared"))
            return
        if wanted():
            yield costs.methods(rows, inputs[7])

    card = [parts.cost, parts.changes, parts.remedy, parts.start, parts.processes, parts.refused, parts.advanced]
    parts.priced.click(
        cost,
        [parts.refused, *form],
        [*card, *parts.markable],
        trigger_mode="multiple",
        concurrency_limit=16,
        **HIDDEN,
    )
    own = [parts.quantization, *parts.values]
    parts.remedy.click(remedy, parts.changes, own, **HIDDEN).then(**CHANGED)
    table = {"fn": compare, "inputs": [parts.opened, *form], "outputs": parts.methods, "concurrency_limit": 4, **HIDDEN}
    for event, value in ((parts.costs.expand, True), (parts.costs.collapse, False)):
        event(lambda value=value: value, None, parts.opened, **HIDDEN)
    about = [parts.task, parts.base, parts.method, parts.quantization]
    gr.on([parts.opened.change, *(widget.change for widget in about)], trigger_mode="multiple", **table)


def asked(page: Page, spec: JobSpec, wanted: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """The stages of a job; asked once more where the process ended for another base's sake."""
    try:
        yield from page.studio.inference.estimate(spec.to_dict(), wanted)
    except RefusedError:
        raise
    except InferenceError as fault:
        if fault.code != InferenceError.code:
            raise
        yield from page.studio.inference.estimate(spec.to_dict(), wanted)
