"""The Train form: what it is laid out with, and what it offers."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.errors import ConfigError, TargetError
from engine.memory.prediction import Prediction
from engine.train.job import JobSpec
from studio import costs, forms, job_text, recipes, train_cost, train_form
from studio.context import Studio
from studio.own_presets import OwnPresets
from studio.shell import create_app
from studio.store import Store, UnknownError


def test_the_form_is_laid_out_with_the_first_preset(tmp_path: Path) -> None:
    studio = Studio.open(tmp_path)
    try:
        blocks = create_app(studio)
    finally:
        studio.close()
    by_id = {block.elem_id: block for block in blocks.blocks.values() if getattr(block, "elem_id", None)}
    task = recipes.task_of(train_form.TASK)
    preset = task.presets[train_form.START_PRESET]
    recipe = recipes.of_preset(task, preset)
    shown = recipes.shown_values(recipe)
    assert by_id["train-task"].value == task.name
    for owned in recipes.fields():
        widget = by_id["-".join(filter(None, ("field", owned.method or owned.task, owned.field.name)))]
        if owned.key in shown:
            assert widget.value == shown[owned.key] and widget.visible, owned
        elif not owned.method and not owned.task:
            assert not widget.visible, owned
    assert by_id["field-quantization"].value == recipe["quantization"]


def test_rows_that_are_taken_a_second_time_are_taken_again(tmp_path: Path) -> None:
    studio = Studio.open(tmp_path)
    try:
        blocks = create_app(studio)
    finally:
        studio.close()
    use = next(key for key, block in blocks.blocks.items() if getattr(block, "elem_id", None) == "data-use")
    pressed = next(it for it in blocks.fns.values() if it.targets == [(use, "click")] and it.fn)
    (first, run, _), (second, *_) = pressed.fn("rows-1"), pressed.fn("rows-1")
    # Equal values would be no change, and Train would keep what it has.
    assert first != second and first["dataset"] == second["dataset"] == "rows-1" and run == ""
    chosen = next(it for it in blocks.fns.values() if it.targets == [(pressed.outputs[0]._id, "change")] and it.fn)
    form = {part.elem_id: value for part, value in chosen.fn(second, "causal_lm").items() if part.elem_id}
    assert form["train-dataset"].value == "rows-1" and chosen.fn(None, "causal_lm").keys() <= {"__type__"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    store.close()


def plain(**more: Any) -> dict[str, Any]:
    """A job as the form writes it, with all its keys."""
    task = recipes.task_of("causal_lm")
    recipe = recipes.of_preset(task, task.presets["quick-look"])
    shown = recipes.shown_values(recipe)
    values = [shown.get(o.key, forms.show(o.field, o.field.default)) for o in recipes.fields()]
    spec = recipes.job(
        {"name": "rows", "path": "/home/somebody/rows.jsonl", "format": "messages", "columns": {}},
        task="causal_lm", base="tiny-llama", preset="quick-look", eval_split=0.1, name="mine", quantization="none",
        method="lora", values=values,
    ).to_dict()  # fmt: skip
    return {**spec, **more}


def known(base: str) -> str:
    return "" if base.startswith("/") else base


def test_a_job_comes_back_from_its_own_yaml_without_its_rows() -> None:
    spec = plain()
    found = job_text.read(forms.as_yaml(spec), known)
    assert found.pop("data") == {"path": "", "eval_split": 0.1}
    assert found == {key: value for key, value in spec.items() if key != "data"}
    assert job_text.read(json.dumps(spec), known)["training"] == spec["training"]


@pytest.mark.parametrize("name", [task.name for task in recipes.tasks()])
def test_every_presets_yaml_is_taken_over(name: str) -> None:
    task = recipes.task_of(name)
    for preset in task.presets.values():
        recipe = recipes.of_preset(task, preset)
        spec = JobSpec.from_dict(
            {
                "task": name,
                "model": task.base,
                "data": {"path": "rows.jsonl", "eval_split": preset.eval_split},
                "adapter": {key: value for key, value in recipe["adapter"].items() if value is not None},
                "training": recipe["training"],
                "options": preset.options,
                "quantization": preset.quantization,
            }
        )
        found = job_text.read(forms.as_yaml(spec), known)
        assert {**found, "data": None} == {**spec.to_dict(), "data": None}, preset.name


def test_the_data_path_of_a_job_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*args: Any, **more: Any) -> None:
        raise AssertionError(args)

    text = forms.as_yaml(plain(data={"path": "/etc/shadow", "columns": {"a": "b"}, "format": "text"}))
    for name in ("open", "exists", "is_file", "resolve", "stat", "read_text"):
        monkeypatch.setattr(Path, name, opened)
    assert job_text.read(text, known)["data"] == {"path": "", "eval_split": 0.1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "/etc/models/x"}, "model is '/etc/models/x'"),
        ({"training": {"learning_rate": 0.1, "hooks": "os.system"}}, "training.hooks is not known"),
        ({"training": {"batch_size": 100000}}, "training.batch_size is 100000"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate is 'fast'"),
        ({"adapter": {"method": "lora", "rank_pattern": {"q": 2}}}, "adapter.rank_pattern has no field"),
        ({"adapter": {"method": "lora", "r": 0}}, "adapter.r is 0"),
        ({"adapter": {"method": "lora", "r": [1]}}, "adapter.r has a value of a wrong kind"),
        ({"adapter": {"method": "magic"}}, "adapter.method is 'magic'"),
        ({"options": {"teacher": "x"}}, "options.teacher has no field"),
        ({"task": "magic"}, "task is 'magic'"),
        ({"shell": "rm"}, "shell is not a key of a job"),
        ({"full": True, "quantization": "nf4", "adapter": {}}, "full is true and quantization is 'nf4'"),
    ],
)
def test_a_job_that_the_form_cannot_hold_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        job_text.read(yaml.safe_dump({**plain(), **change}), known)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &x [1, 1]\nb: [*x, *x]\n", "YAML reference"),
        ("[" * 40 + "]" * 40, "nested too deeply"),
        ("a: !!python/object/apply:os.system ['true']\n", "no YAML"),
        ("a: [", "no YAML"),
        ("\x00", "no YAML"),
        ("x" * 100_001, "100,001 characters"),
        ("- 1\n", "must be a mapping"),
        ("", "must be a mapping"),
    ],
)
def test_text_that_is_no_job_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        job_text.read(text, known)


def test_the_command_says_how_many_processes() -> None:
    assert job_text.command() == "python -m engine train job.yaml --out my-run"
    assert job_text.command(4).endswith("--processes 4")


def test_what_differs_from_an_earlier_run_is_named_old_and_new() -> None:
    old = plain()
    assert job_text.differences(old, plain(name="other", data={**old["data"], "path": "elsewhere"})) == []
    new = {**old, "quantization": "nf4", "training": {**old["training"], "learning_rate": 0.01, "max_steps": None}}
    new["adapter"] = {**old["adapter"], "r": 16}
    assert set(job_text.differences(old, new)) == {
        ("quantization", "none", "nf4"),
        ("training.learning_rate", "0.001", "0.01"),
        ("training.max_steps", "36", "–"),
        ("adapter.r", "8", "16"),
    }
    # A run from before a setting was there had its default.
    older = {**old, "training": {k: v for k, v in old["training"].items() if k not in ("seed", "optimizer")}}
    assert job_text.differences(older, old) == []
    # As a file writes it: what is left out is as usual.
    sparse = {**old, "adapter": {"method": "lora", "r": 4}, "options": {}}
    whole = {**sparse, "adapter": {"lora_alpha": 16, "lora_dropout": 0.05, "bias": "none", **sparse["adapter"]}}
    assert job_text.differences(sparse, whole) == []
    whole["adapter"]["lora_alpha"] = 8
    assert job_text.differences(sparse, whole) == [("adapter.lora_alpha", "16", "8")]


def test_presets_of_ones_own_are_kept_replaced_deleted_and_brought_back(store: Store) -> None:
    own = OwnPresets(store)
    first = own.save("  mine ", plain())
    assert [(row["id"], row["name"], row["task"]) for row in own.rows()] == [(first, "mine", "causal_lm")]
    kept = own.spec(first)
    assert kept["name"] == "mine" and kept["data"] == {"path": "", "eval_split": 0.1}
    assert "/home/somebody" not in json.dumps(kept), "rows are not part of a preset"
    assert recipes.of_spec(kept)["training"] == plain()["training"]
    second = own.save("mine", plain(quantization="nf4"))
    assert [row["id"] for row in own.rows()] == [second] and own.spec(second)["quantization"] == "nf4"
    own.save("mine", plain(task="preference"))
    assert len(own.rows()) == 2, "another task's may have the name"
    assert own.delete(second) == "mine"
    assert second not in [row["id"] for row in own.rows()]
    own.restore(second)
    assert second in [row["id"] for row in own.rows()]
    own.restore(first)
    assert first not in [row["id"] for row in own.rows()], "its name is taken"
    for unknown in (first, 99, "1", None, True, 2**70, "' OR 1=1"):
        with pytest.raises(UnknownError):
            own.spec(unknown)
    for name in ("", "a\nb", "x" * 200, None):
        with pytest.raises(ConfigError):
            own.save(name, plain())  # type: ignore[arg-type]


def test_a_fault_is_said_at_its_field() -> None:
    fault = ConfigError("The job cannot run:\n- training.batch_size is 0; needed: more\n- data.eval_split is 2; needed")
    assert recipes.faulty(fault, "causal_lm", "lora") == {
        "batch_size": "training.batch_size is 0; needed: more",
        "eval_split": "data.eval_split is 2; needed",
    }
    with pytest.raises(ConfigError) as refused:
        JobSpec.from_dict({"model": "m", "data": {"path": "x"}, "full": True, "quantization": "nf4"})
    assert "codes of a few bits" in recipes.faulty(refused.value, "causal_lm", "full")["method"]
    start = TargetError("init_lora_weights='pissa' factors the base weight, and x is quantised.")
    assert list(recipes.faulty(start, "causal_lm", "lora")) == ["init_lora_weights"]
    nowhere = TargetError("No module of this model is called to_k.")
    assert list(recipes.faulty(nowhere, "causal_lm", "lora")) == ["target_modules"]
    assert recipes.faulty(nowhere, "causal_lm", "prompt_tuning") == {}
    assert recipes.faulty(ConfigError("loss_on is 'x'"), "captioning", "lora") == {}, "not in this form"


def earlier(store: Store, seconds: float, machine: str = "here", **training: Any) -> str:
    """A run on a machine, whose steps took so long, with a check of ten times that between two of them."""
    spec = plain(name=f"run of {seconds}")
    run = store.add_run(JobSpec.from_dict({**spec, "training": {**spec["training"], **training}}))
    moment = 1000.0
    for step in range(1, 9):
        moment += 10 * seconds if step == 5 else seconds
        store.add_event(run, {"type": "step", "step": step, "loss": 1.0})
        store.db.execute("UPDATE events SET time = ? WHERE run_id = ? AND step = ?", [moment, run, step])
    store.update_run(run, machine=machine, step=8)
    return run


def test_the_pace_is_that_of_a_like_run_on_this_machine(store: Store) -> None:
    assert costs.pace(store, plain(), "here") is None
    earlier(store, 0.25, machine="elsewhere")
    earlier(store, 0.25, max_length=512)
    earlier(store, 0.25, gradient_checkpointing=True)
    assert costs.pace(store, plain(), "here") is None
    earlier(store, 1.0, batch_size=4)
    found = costs.pace(store, plain(), "here")
    assert found is not None and found.scaled and found.seconds == pytest.approx(2.0)
    earlier(store, 0.5)
    earlier(store, 3.0, batch_size=4)
    found = costs.pace(store, plain(), "here")
    assert found == costs.Pace(pytest.approx(0.5), "run of 0.5", scaled=False)
    assert costs.pace(store, plain(), "here", processes=2) is None
    words = costs.times(found, 36)
    assert "500 ms a step" in words and "18 s for 36 steps" in words and "run of 0.5" in words


def test_steps_of_a_run() -> None:
    spec = plain()
    assert costs.steps(spec, 1000) == 36
    spec["training"] |= {"max_steps": None, "epochs": 2.0, "batch_size": 8, "gradient_accumulation": 2}
    assert costs.steps(spec, 100) == 14 and costs.steps(spec, 1) == 2


PEAK = dict.fromkeys(("activations", "logits", "slack", "overhead"), 10**8) | {
    "weights": 3 * 10**8, "adapter": 10**6, "gradients": 10**6, "optimizer": 2 * 10**6,
    "total": 704 * 10**6, "peak": 900 * 10**6,
}  # fmt: skip


def stages(verdict: str, **more: Any) -> dict[str, dict[str, Any]]:
    budget = {"fits": 2 * 10**9, "tight": 10**9, "exceeds": 5 * 10**8}[verdict]
    return {
        "machine": {"budget": budget, "memory": 4 * 10**9},
        "count": {"full": False, "trainable": 1234, "parameters": 5678, "share": 0.25, "adapter_bytes": 4936},
        "peak": {"prediction": PEAK, "verdict": verdict},
        **more,
    }


@pytest.mark.parametrize(("verdict", "badge"), [("fits", "fits"), ("tight", "tight"), ("exceeds", "won&#x27;t fit")])
def test_the_card_says_whether_it_fits_and_what_takes_the_memory(verdict: str, badge: str) -> None:
    page = costs.card(stages(verdict), "soon")
    assert f'data-verdict="{verdict}">{badge}<' in page and "<b>1,234</b>" in page and "4.9 kB" in page
    widths = [float(width) for width in re.findall(r'class="tc-p\d" style="width:([\d.]+)%"', page)]
    whole = max(PEAK["peak"], stages(verdict)["machine"]["budget"])
    # All parts and what loading needs beyond them: the peak's share of the bar.
    assert sum(widths) == pytest.approx(100 * PEAK["peak"] / whole, abs=0.1)
    assert len(widths) == 6 and "while loading or saving" in page


def test_the_card_names_the_remedy_or_that_there_is_none() -> None:
    changes = {"training.batch_size": 2, "training.gradient_checkpointing": True, "quantization": "nf4"}
    page = costs.card(stages("exceeds", remedy={"changes": changes, "peak": 4 * 10**8}, largest={"batch": 2}), "")
    assert (
        "batch_size 2, gradient_checkpointing true, quantization nf4" in page and "largest batch that fits: 2" in page
    )
    page = costs.card(stages("exceeds", remedy={"changes": None, "peak": None}, largest={"batch": 0}), "")
    assert "smaller base" in page and "Not even a batch of 1" in page
    page = costs.card({**stages("fits"), "peak": {"unknown": "captioning"}}, "")
    assert "Not predicted" in page and "tc-bar" not in page


def test_the_table_of_methods_greys_out_what_cannot_stand_there_with_the_reason() -> None:
    rows = [
        {"method": "lora", "trainable": 10, "share": 0.1, "adapter_bytes": 40, "base": 100},
        {"method": "dora", "refused": "DoRA needs <the> norms.\nmore", "hint": ""},
    ]
    page = costs.methods(rows, "lora")
    assert "DoRA needs &lt;the&gt; norms." in page and "more<" not in page
    lines = re.findall(r"<tr>.*?</tr>", page)[1:]
    assert len(lines) == len(recipes.methods())
    assert "chosen" in lines[0] and "tc-off" not in lines[0] and "tc-off" in lines[1]
    assert "100" in lines[-1], "full fine-tuning trains the base"


def test_what_was_found_out_is_kept_until_the_machine_has_another_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = JobSpec.from_dict(plain())
    kept = train_cost.Estimates()
    prediction = {**dict.fromkeys((item.name for item in dataclasses.fields(Prediction)), 0), **PEAK}
    found = stages("fits")
    found["machine"]["device"] = "cpu"
    found["peak"]["prediction"] = prediction
    kept.put(spec, found)
    assert kept.get(spec) is None, "the last stage is missing"
    kept.put(spec, {**found, "largest": {"batch": 9}})
    monkeypatch.setattr(train_cost, "available", lambda: 10**9)
    again = kept.get(JobSpec.from_dict(plain(name="other name")))
    assert again is not None and again["machine"]["budget"] == 10**9
    monkeypatch.setattr(train_cost, "available", lambda: 10**6)
    assert kept.get(spec) is None, "it would not fit any more"
    other = JobSpec.from_dict(plain(quantization="nf4"))
    assert kept.get(other) is None


def test_only_the_newest_question_of_a_visitor_is_wanted() -> None:
    newest = train_cost.Newest()
    first, other = newest.begin("a"), newest.begin("b")
    assert first() and other()
    second = newest.begin("a")
    assert not first() and second() and other()
