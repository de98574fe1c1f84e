"""The run doctor: each diagnosis on curves made of numbers and on real short runs, and silence where all is well."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from courses import ERRORS, Event, events, flat, healthy, overfitting, rising
from test_train import data, job, train  # noqa: F401

from engine import remedies
from engine.adapters import ADAPTERS
from engine.diagnosis import Course, diagnose
from engine.errors import DivergedError
from engine.findings import BAD, GOOD, NOTE, WARN, Finding
from engine.paths import REPOSITORY
from engine.train.job import DataSpec, JobSpec, TrainingSpec, changed, value_of

SPEC = JobSpec(
    model="tiny-llama",
    data=DataSpec(path="rows.csv"),
    adapter={"method": "lora", "r": 32, "lora_alpha": 64, "lora_dropout": 0.05},
    training=TrainingSpec(max_steps=100),
)
SEEDS = range(4)


def found(course: list[Event], spec: JobSpec = SPEC, running: bool = False) -> list[Finding]:
    return diagnose(spec, Course.of(course, running))


def alarms(course: list[Event], spec: JobSpec = SPEC, running: bool = False) -> list[str]:
    return [finding.code for finding in found(course, spec, running) if finding.severity in (BAD, WARN)]


def at_every_moment(course: list[Event], spec: JobSpec = SPEC) -> set[str]:
    """The alarms that somebody who watches the run sees, from the first step to the last."""
    moments = [end for end, event in enumerate(course, 1) if event["type"] in ("step", "eval")]
    return {code for end in moments for code in alarms(course[:end], spec, running=True)}


def with_training(spec: JobSpec = SPEC, **values: Any) -> JobSpec:
    return changed(spec, {f"training.{key}": value for key, value in values.items()})


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("noise", [0.02, 0.15, 0.6])
def test_a_healthy_run_raises_no_alarm_at_any_moment(seed: int, noise: float) -> None:
    course = healthy(seed=seed, noise=noise)
    assert at_every_moment(course) == set()
    # Where checks jump about by a twentieth, the last one may be too far from the best to be praised.
    assert [finding.code for finding in found(course)] in (["healthy"], [] if noise > 0.5 else ["healthy"])
    without = [event for event in course if event["type"] != "eval"]
    assert at_every_moment(without) == set()


@pytest.mark.parametrize("seed", SEEDS)
def test_evaluations_that_rise_while_training_falls_are_overfitting(seed: int) -> None:
    course = overfitting(seed=seed)
    finding = found(course)[0]
    assert (finding.code, finding.severity) == ("overfitting", WARN)
    assert at_every_moment(course) == {"overfitting"}
    assert dict(finding.changes) == {
        "adapter.r": 8,
        "adapter.lora_alpha": 16,
        "adapter.lora_dropout": 0.2,
        "training.weight_decay": 0.01,
        "training.early_stopping_patience": 3,
    }
    best = min((e for e in course if e["type"] == "eval"), key=lambda e: e["loss"])
    assert finding.values["step"] == str(best["step"]) and finding.values["best"] == f"{best['loss']:.3g}"
    cured = changed(SPEC, finding.changes)
    again = remedies.overfitting(cured)
    assert again == {"training.learning_rate": SPEC.training.learning_rate / 2}


def test_a_few_worse_checks_are_not_overfitting() -> None:
    course = events(lambda x: 0.5 + 2 * math.exp(-6 * x), lambda x: 1.0 + math.exp(-8 * x) + (0.004 if x > 0.8 else 0))
    assert at_every_moment(course) == set()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("checked", [True, False])
def test_a_loss_that_stays_is_a_rate_too_low_or_no_learning(seed: int, checked: bool) -> None:
    course = [event for event in flat(seed=seed) if checked or event["type"] != "eval"]
    low = with_training(learning_rate=1e-6)
    assert alarms(course, low) == ["rate-low"]
    assert dict(found(course, low)[0].changes) == {"training.learning_rate": 2e-4}
    small = changed(SPEC, {"adapter.r": 4, "adapter.lora_alpha": 8, "adapter.lora_dropout": 0.1})
    assert alarms(course, small) == ["flat"]
    wanted = {"adapter.r": 16, "adapter.lora_alpha": 32, "adapter.lora_dropout": 0.05}
    assert dict(found(course, small)[0].changes) == wanted
    # With all that in place, only a higher rate is left.
    assert dict(found(course)[0].changes) == {"training.learning_rate": 6e-4}


def test_what_is_learned_already_and_what_is_drawn_anew_is_not_flat() -> None:
    assert alarms(flat(level=0.01)) == []
    pictures = JobSpec(model="tiny-sd", task="text_to_image", data=DataSpec(path="x.zip"))
    assert alarms(flat(level=0.2), pictures) == []


def test_it_waits_until_the_warm_up_is_over() -> None:
    course = flat(steps=100, total=1000)
    assert alarms(course, with_training(max_steps=1000), running=True) == []
    assert alarms(flat(steps=260, total=1000), with_training(max_steps=1000), running=True) == ["flat"]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("checked", [True, False])
def test_a_loss_that_rises_is_a_rate_too_high(seed: int, checked: bool) -> None:
    course = [event for event in rising(seed=seed) if checked or event["type"] != "eval"]
    high = with_training(learning_rate=0.1, warmup_ratio=0.0, max_grad_norm=0.0)
    finding = found(course, high)[0]
    assert (finding.code, finding.severity) == ("rate-high", BAD) and len(alarms(course, high)) == 1
    wanted = {"training.learning_rate": 2e-4, "training.max_grad_norm": 1.0, "training.warmup_ratio": 0.1}
    assert dict(finding.changes) == wanted
    assert remedies.rate_too_high(with_training(learning_rate=1.5e-4)) == {"training.learning_rate": 5e-5}


def test_single_high_steps_are_spikes_and_lone_ones_are_not() -> None:
    course = healthy(noise=0.1)
    steps = [event for event in course if event["type"] == "step"]
    for place in (50, 65):
        steps[place] |= {"loss": 9.0, "grad_norm": 30.0}
    assert alarms(course) == []
    steps[80] |= {"loss": 9.5, "grad_norm": 30.0}
    finding = found(course)[0]
    assert (finding.code, finding.values["step"], finding.values["count"]) == ("spikes", "81", "3")
    small = with_training(batch_size=2)
    assert remedies.spikes(small) == {"training.learning_rate": 1e-4, "training.gradient_accumulation": 4}


def test_rows_that_are_seen_again_and_again() -> None:
    plain = changed(SPEC, {"data.eval_split": 0.0})
    course = [event for event in healthy(rows=40) if event["type"] != "eval"]
    finding = found(course, plain)[0]
    assert (finding.code, finding.values) == ("repeated", {"rows": "40", "times": "20"})
    wanted = {"training.max_steps": 25, "data.eval_split": 0.1, "training.early_stopping_patience": 3}
    assert dict(finding.changes) == wanted
    # Where evaluations go on falling, it helps.
    assert alarms(healthy(rows=40)) == []


def test_few_rows_are_told_beside_what_else_there_is() -> None:
    assert [finding.code for finding in found(healthy(rows=12, steps=18, total=100))] == ["few-rows"]
    assert {finding.code for finding in found(overfitting(rows=12))} == {"overfitting", "few-rows"}


def test_a_run_that_ended_says_why_and_a_resumed_one_has_forgotten_it() -> None:
    for name, code in (("diverged", "diverged"), ("memory", "memory")):
        course = [*healthy(steps=40, total=100), {"type": "error", **ERRORS[name]}]
        assert alarms(course) == [code]
        assert alarms([*course, {"type": "start", "total_steps": 100, "train_rows": 270}]) == []
    assert dict(found(course)[0].changes) == ERRORS["memory"]["remedy"]
    del course[-1]["remedy"]
    wanted = {"training.batch_size": 1, "training.gradient_accumulation": 8}
    wanted |= {"training.gradient_checkpointing": True, "training.optimizer": "adafactor"}
    assert dict(found(course)[0].changes) == wanted


def test_a_lost_run_is_a_matter_of_memory_only_where_it_was_nearly_full() -> None:
    lost: Event = {"type": "error", **ERRORS["lost"]}
    assert alarms([*healthy(steps=40), lost]) == []
    finding = found([*healthy(steps=40, memory=7_500_000_000), lost])[0]
    assert (finding.code, finding.values["limit"]) == ("memory-likely", "8.00 GB")


def test_early_stopping_is_told() -> None:
    done = {"type": "done", "step": 60, "eval_loss": 0.9, "best_step": 30, "early": True}
    finding = next(it for it in found([*healthy(), done]) if it.code == "early")
    assert finding.severity == GOOD and "step 30" in finding.words() and "0.9" in finding.words()


@pytest.mark.parametrize("method", [*ADAPTERS, "full"])
def test_every_remedy_is_a_job_that_its_method_can_run(method: str) -> None:
    from engine.inspection import adapter_config

    plain = JobSpec(
        model="tiny-llama",
        data=DataSpec(path="x.csv"),
        adapter={} if method == "full" else {"method": method},
        full=method == "full",
        training=TrainingSpec(learning_rate=1e-7, batch_size=2),
    )
    cures = (
        remedies.not_learning(plain),
        remedies.rate_too_low(plain),
        remedies.rate_too_high(changed(plain, {"training.learning_rate": 1.0})),
        remedies.diverged(plain),
        remedies.spikes(plain),
        remedies.overfitting(plain),
        remedies.repeated(plain, 100),
        remedies.memory(plain),
    )
    for cure in cures:
        assert cure and all(value_of(plain, key) != value for key, value in cure.items())
        better = changed(plain, cure)
        if method != "full":
            adapter_config(better.adapter, None)


def test_the_usual_rates_are_those_of_the_presets() -> None:
    for path in (REPOSITORY / "presets" / "methods").glob("*.yaml"):
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        wanted = raw.get("training", {}).get("learning_rate", remedies.USUAL_RATE)
        assert remedies.USUAL_RATES.get(raw["method"], remedies.USUAL_RATE) == wanted, path.name


# Real runs of the toy


def real(spec: JobSpec, out: Path) -> list[Event]:
    from engine.train.events import Recorder
    from engine.train.worker import run

    recorder = Recorder()

    class Never:
        def poll(self) -> str | None:
            return None

    try:
        run(spec, out, recorder, Never())
    except DivergedError as error:
        recorder.emit(error.to_event())
    return recorder.events


def test_a_real_run_that_diverges(data: Path, tmp_path: Path) -> None:  # noqa: F811
    spec = job(data, max_steps=40, learning_rate=10.0)
    finding = found(real(spec, tmp_path / "run"), spec)[0]
    assert finding.code == "diverged" and finding.changes["training.learning_rate"] == 2e-4


def test_the_command_line_reads_a_runs_folder(data: Path, tmp_path: Path) -> None:  # noqa: F811
    job(data, max_steps=40, learning_rate=10.0).save(tmp_path / "job.yaml")
    called = [sys.executable, "-m", "engine"]
    out = tmp_path / "run"
    trained = subprocess.run([*called, "train", str(tmp_path / "job.yaml"), "--out", str(out)], cwd=REPOSITORY)
    assert trained.returncode == 1
    told = subprocess.run([*called, "doctor", "--run", str(out)], cwd=REPOSITORY, capture_output=True, text=True)
    assert told.returncode == 0 and "training.learning_rate: 10.0 -> 0.0002" in told.stdout
    as_json = [*called, "doctor", "--run", str(out), "--json"]
    event = json.loads(subprocess.run(as_json, cwd=REPOSITORY, capture_output=True, text=True).stdout.splitlines()[0])
    assert (event["type"], event["code"]) == ("finding", "diverged")
    missing = subprocess.run(
        [*called, "doctor", "--run", str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert missing.returncode == 1 and "cannot be read" in missing.stderr


def test_a_real_run_at_no_rate_at_all_and_its_remedy(data: Path, tmp_path: Path) -> None:  # noqa: F811
    spec = job(data, max_steps=40, eval_every=10, learning_rate=1e-8)
    sick = real(spec, tmp_path / "sick")
    assert alarms(sick, spec) == ["rate-low"]
    better = changed(spec, {**found(sick, spec)[0].changes, "training.max_steps": 40})
    cured = real(better, tmp_path / "cured")
    assert at_every_moment(cured, better) == set() and "healthy" in [it.code for it in found(cured, better)]


def test_a_real_run_that_learns_by_heart(data: Path, tmp_path: Path) -> None:  # noqa: F811
    rows = [{"instruction": f"Say {i}.", "output": f"{i * 7919 % 1009}, {i % 7}, matey {i * i}!"} for i in range(48)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = job(data, max_steps=80, eval_every=8, batch_size=8, learning_rate=1e-2, schedule="constant")
    spec = dataclasses.replace(spec, data=dataclasses.replace(spec.data, eval_split=0.25))
    assert alarms(real(spec, tmp_path / "run"), spec) == ["overfitting"]


def test_real_runs_of_the_shipped_presets_are_healthy() -> None:
    """Their losses, kept from whole runs of the toys on the samples (`python scripts/courses.py` makes them anew)."""
    kept = json.loads((Path(__file__).parent / "data" / "courses.json").read_text())
    assert len(kept) >= 12
    for name, raw in kept.items():
        spec, course = JobSpec.from_dict(raw["spec"]), raw["events"]
        assert at_every_moment(course, spec) == set(), name
        codes = [finding.code for finding in found(course, spec) if finding.severity != NOTE]
        # One pass in tiny steps moves the toy too little to be praised.
        assert codes == ([] if name == "dpo" else ["healthy"]), name
