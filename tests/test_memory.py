"""Predicted memory: exact where it can be counted, the real step's to the byte, and what the doctor says of it."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from engine import bnb
from engine.__main__ import main
from engine.errors import ConfigError
from engine.inspection import adapter_config
from engine.memory import PredictionError, fits, largest_batch, parse_size, predict, remedy, size
from engine.memory.allocations import Allocations
from engine.memory.predicting import Job
from engine.memory.prediction import Prediction
from engine.memory.rows import heaviest, stretched
from engine.memory.shapes import Shaped
from engine.memory.shortage import ShortageError, is_memory, shortage
from engine.memory.step import Simulation
from engine.model import get_peft_model
from engine.tasks.base import Loaded
from engine.tasks.sequences import Tokens
from engine.train.events import Recorder
from engine.train.job import JobSpec, changed
from engine.train.optim import make_optimizer
from engine.train.trainee import AdapterTrainee, FullTrainee, Trainee

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LORA = {"method": "lora", "r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}
BASES = {
    "causal_lm": ("tiny-llama", "lighthouse.jsonl"),
    "preference": ("tiny-llama", "captain_preferences.jsonl"),
    "seq2seq": ("tiny-t5", "captain_parallel.csv"),
}


def job(task: str = "causal_lm", *, adapter: Any = None, quantization: str = "none", **training: Any) -> JobSpec:
    model, data = BASES[task]
    full = adapter == {}
    return JobSpec.from_dict(
        {
            "model": model,
            "task": task,
            "data": {"path": str(EXAMPLES / data), "eval_split": 0.5},
            "adapter": (adapter or {"method": "lora", "r": 4}) if not full else {},
            "full": full,
            "quantization": quantization,
            "training": {"max_steps": 2, "batch_size": 4, "precision": "fp32", "max_length": 96} | training,
        }
    )


@cache
def plain() -> Job:
    """The predictions of LoRA on the toy, made once; simulations leave a job as it was."""
    return Job(job(adapter=LORA))


def real(spec: JobSpec, like: Job) -> Shaped:
    """The same job's model with data, as the worker makes it."""
    from engine.train.worker import checkpoint_activations

    task: Any = like.rows.task
    loading = changed(spec, {"training.precision": "fp32"}) if spec.full else spec
    loaded = task.load(loading, torch.device("cpu"), lambda *args: None)
    if spec.training.gradient_checkpointing:
        checkpoint_activations(loaded.model)
    base = (*loaded.model.parameters(), *loaded.model.buffers())
    trainee: Trainee
    if spec.full:
        trainee = FullTrainee(loaded, task)
    else:
        trainee = AdapterTrainee(get_peft_model(loaded.model, adapter_config(spec.adapter, task.task_type)))
    compute = torch.bfloat16 if spec.full and spec.training.precision == "bf16" else None
    task.collator(Loaded(trainee.model, loaded.processor))
    return Shaped(Loaded(trainee.model, loaded.processor), trainee, base, compute, 0, False)


@pytest.mark.parametrize(
    ("task", "adapter", "training"),
    [
        ("causal_lm", LORA, {}),
        ("causal_lm", LORA, {"precision": "bf16", "gradient_accumulation": 2}),
        ("causal_lm", {"method": "dora", "r": 4, "target_modules": "all-linear"}, {"gradient_checkpointing": True}),
        ("causal_lm", {"method": "prefix_tuning", "num_virtual_tokens": 8}, {}),
        ("causal_lm", {}, {"precision": "bf16"}),
        ("causal_lm", {}, {"optimizer": "adafactor"}),
        ("causal_lm", {}, {"optimizer": "adamw_8bit"}),
        ("preference", LORA, {}),
        ("seq2seq", LORA, {}),
    ],
)
def test_the_peak_of_a_step_is_the_real_ones(task: str, adapter: Any, training: Any) -> None:
    """The same counting, over a model with data: torch chooses the same operators with and without it."""
    spec = job(task, adapter=adapter, **training)
    predicted = Job(spec)
    batch = heaviest(predicted.rows.task, predicted.model.loaded, predicted.encoded, spec, None).batches[0]
    true = Simulation(spec, predicted.rows.task, real(spec, predicted))
    assert sum(predicted.simulation.state.values()) == pytest.approx(sum(true.state.values()), rel=1e-3)
    found, wanted = predicted.simulation.peak(batch), true.peak(batch)
    assert sum(found.values()) == pytest.approx(sum(wanted.values()), rel=0.005)
    assert found["activations"] == pytest.approx(wanted["activations"], rel=0.02)
    assert found["logits"] == pytest.approx(wanted["logits"], rel=0.02)


def test_what_a_forward_pass_keeps_is_what_autograd_saves() -> None:
    """Against the tensors that a real forward pass hands to autograd, each storage once, parameters left out."""
    predicted, spec = plain(), plain().spec
    batch = heaviest(predicted.rows.task, predicted.model.loaded, predicted.encoded, spec, None).batches[0]
    allocations, model = predicted.simulation.allocations, predicted.model.loaded.model
    model.train()
    with allocations:
        part = predicted.rows.task.loss(model, dict(batch))
    kept = allocations.total - sum(predicted.simulation.state.values())
    del part
    true = real(spec, predicted).loaded.model.train()
    own = {p.untyped_storage().data_ptr() for p in (*true.parameters(), *true.buffers())}
    saved: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        predicted.rows.task.loss(true, dict(batch))
    assert kept == pytest.approx(sum(saved.values()), rel=0.02)


def test_weights_adapter_and_optimizer_are_exact() -> None:
    spec = job(adapter=LORA, checkpoint_every=1)
    predicted = predict(spec)
    base = real(spec, plain()).trainee
    parameters = base.parameters()
    optimizer = make_optimizer(parameters, spec.training)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = sum(t.numel() * t.element_size() for entry in optimizer.state.values() for t in entry.values())
    adapter = sum(p.numel() * p.element_size() for p in parameters.values())
    assert predicted.adapter == adapter
    assert predicted.optimizer == state
    assert predicted.weights == bnb.memory_footprint(base.model) - adapter
    # A checkpoint copies what is trained and the optimizer's state; a run that ends before one has none.
    assert plain().predict().peak_checkpoint == predicted.peak_checkpoint - adapter - state
    assert predicted.peak_checkpoint == predicted.overhead + predicted.weights + 2 * (adapter + state)


def test_a_quantised_base_is_its_codes_and_scales() -> None:
    for kind in ("nf4", "int8"):
        spec = job(adapter={"method": "lora", "r": 4}, quantization=kind)
        found = Job(spec)
        base = real(spec, found).base
        wanted = sum(t.numel() * t.element_size() for t in base)
        wanted += sum(map(bnb.statistics_bytes, found_layers(spec)))
        # Each 4-bit layer also keeps its table of codes, 1 KB.
        assert found.simulation.state["weights"] == pytest.approx(wanted, rel=0.015)


def found_layers(spec: JobSpec) -> list[nn.Module]:
    from engine.models.loading import load_causal_lm

    model, _ = load_causal_lm(spec.model, precision="fp32", quantization=spec.quantization, device="cpu")
    return [layer for _, layer in bnb.packed_layers(model)]


def test_more_rows_and_longer_rows_take_more() -> None:
    found = plain()
    by_batch = [found.predict(size, 64).total for size in (1, 2, 4, 8)]
    by_length = [found.predict(4, length).total for length in (16, 32, 64, 128)]
    assert by_batch == sorted(set(by_batch))
    assert by_length == sorted(set(by_length))
    assert found.predict(8, 64).tokens == 512


def test_what_saves_memory_is_seen_to() -> None:
    dear = plain().predict(length=96)
    cheaper = {
        "checkpointing": predict(job(adapter=LORA, gradient_checkpointing=True), length=96),
        "bf16": predict(job(adapter=LORA, precision="bf16"), length=96),
    }
    assert all(one.activations < 0.75 * dear.activations for one in cheaper.values())
    quantised = predict(job(adapter={"method": "lora", "r": 4}, quantization="nf4"), length=96)
    assert quantised.weights < 0.5 * dear.weights
    everything = Job(job(adapter={}))
    full = everything.predict(length=96)
    assert full.adapter == 0
    assert full.optimizer > 1.9 * full.weights
    # The peak of so short a batch is the optimizer's step; of long ones the backward pass.
    short = everything.predict(batch_size=1, length=8)
    assert short.gradients > 0.8 * short.weights
    assert short.total < full.total


def test_each_optimizers_state_is_its_own() -> None:
    """Bytes a number: AdamW's two moments 8, in 8 bits 2 and a scale a block; Adafactor one for each row and column."""
    state = {
        name: Job(job(adapter={}, optimizer=name), device).simulation.state["optimizer"]
        for name, device in (
            ("adamw", "cpu"),
            ("adamw_8bit", "cpu"),
            ("adafactor", "cpu"),
            ("paged_adamw_8bit", "cuda"),
        )
    }
    assert 0.24 < state["adamw_8bit"] / state["adamw"] < 0.28
    assert state["adafactor"] < 0.02 * state["adamw"]
    # What is paged may leave the card; bitsandbytes keeps the small matrices' state there.
    assert state["paged_adamw_8bit"] < 0.5 * state["adamw_8bit"]
    with pytest.raises(ConfigError, match="moves its state between"):
        predict(job(adapter=LORA, optimizer="paged_adamw_8bit"))


def test_offloaded_activations_are_not_on_the_card() -> None:
    kept, away = (
        predict(job(adapter=LORA, activation_offload=on), device="cuda", batch_size=16, length=96)
        for on in (False, True)
    )
    assert away.activations < 0.6 * kept.activations and away.weights == kept.weights


def test_adafactor_is_a_remedy_where_the_optimizer_is_what_does_not_fit() -> None:
    """One short row: nothing is left to save but the state, and a base in 4 bits cannot be trained whole."""
    spec = job(adapter={}, batch_size=1, max_length=16)
    budget = Job(spec).predict().peak - 8 * 10**6
    cure = remedy(spec, budget)
    assert cure is not None and cure.changes == {"training.optimizer": "adafactor"}


def test_the_largest_batch_is_the_last_that_fits() -> None:
    found = plain()
    budget = found.predict(9).peak + 1000
    most = found.largest_batch(budget)
    assert most >= 9
    assert found.predict(most).peak <= budget < found.predict(most + 1).peak
    assert found.largest_batch(found.predict(1).peak - 1) == 0
    assert largest_batch(found.spec, 10**6) == 0
    # No batch holds more rows than there are.
    assert found.largest_batch(10**12) == len(found.encoded)


def test_a_remedy_keeps_the_rows_of_a_step_and_fits() -> None:
    spec = job(adapter=LORA, batch_size=8)
    budget = (plain().predict(8).peak + plain().predict(4).peak) // 2
    cure = remedy(spec, budget)
    assert cure is not None
    assert cure.changes == {"training.batch_size": 4, "training.gradient_accumulation": 2}
    assert cure.prediction.peak <= budget
    assert "batch_size: 4" in cure.words()
    assert remedy(job(adapter=LORA, batch_size=1, gradient_checkpointing=True), 10**6) is None


def test_data_that_cannot_be_read_means_rows_of_the_full_length(tmp_path: Path) -> None:
    spec = job(adapter=LORA)
    missing = dataclasses.replace(spec, data=dataclasses.replace(spec.data, path=str(tmp_path / "none.jsonl")))
    found = predict(missing)
    assert not found.measured_rows
    assert (found.length, found.tokens) == (96, 4 * 96)
    assert found.total > plain().predict().total


def test_what_a_base_costs_that_is_not_here_yet_is_told_without_fetching_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDIO_HOME", str(tmp_path))
    found = predict(
        JobSpec.from_dict(
            {
                "model": "minilm",
                "task": "classification",
                "data": {"path": "examples/question_topics.csv", "format": "labels"},
                "training": {"max_length": 64, "batch_size": 3},
            }
        )
    )
    assert (found.batch_size, found.length, found.measured_rows) == (3, 64, False)
    assert found.weights > 2 * 20_000_000 and not [*tmp_path.iterdir()]


def test_a_stretched_row_keeps_the_share_of_its_targets() -> None:
    row = stretched(Tokens((5, 6, 7, 8), (False, False, False, True)), 8)
    assert row.ids == (5, 6, 7, 8, 5, 6, 7, 8)
    assert sum(row.learned) == 2


def test_allocations_count_each_storage_once_until_it_ends() -> None:
    allocations = Allocations(vocabulary=7)
    with allocations:
        first = torch.ones(10, 10)
        view = first[2:].view(-1)
        second = first + 1
        assert allocations.live == {"activations": 800}
        del first
        assert allocations.total == 800
        del view
        assert allocations.total == 400
        scores = torch.ones(3, 7)
        assert allocations.live["logits"] == 84
        allocations.hold([second], "gradients")
    assert allocations.live["gradients"] == 400
    assert allocations.peak == 800
    del second, scores
    assert allocations.total == 0


def test_verdicts_and_sizes() -> None:
    parts = dict.fromkeys(
        ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "slack", "overhead"), 10
    )
    found = Prediction(
        **parts, peak_loading=50, peak_checkpoint=60, batch_size=1, tokens=1, length=1, measured_rows=True
    )
    assert [fits(found, budget) for budget in (79, 80, 94, 95)] == ["exceeds", "tight", "tight", "fits"]
    assert fits(dataclasses.replace(found, peak_loading=90), 85) == "exceeds"
    assert [parse_size(text) for text in ("8GB", "7.5 GiB", "512m", "1000")] == [
        8 * 10**9,
        int(7.5 * 2**30),
        512 * 10**6,
        1000,
    ]
    for text in ("", "many", "-1GB", "0"):
        with pytest.raises(ConfigError, match="needed: a size"):
            parse_size(text)


def test_a_task_that_is_not_followed_is_named() -> None:
    with pytest.raises(PredictionError, match="text_to_image"):
        predict(bad_job())


def test_the_doctor_speaks_of_the_machine_and_of_a_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job(adapter=LORA).to_dict()))
    assert main(["doctor", "--json"]) == 0
    machine = json.loads(capsys.readouterr().out)
    assert machine["cores"] >= 1
    assert machine["memory"] >= machine["available"] > 0
    assert main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out
    assert main(["doctor", "--fit", str(path), "--budget", "64GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "fits"
    assert found["remedy"] is None
    assert found["prediction"]["total"] == sum(
        found["prediction"][name]
        for name in ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "slack", "overhead")
    )
    assert main(["doctor", "--fit", str(path), "--budget", f"{found['prediction']['peak'] - 1000}"]) == 0
    said = capsys.readouterr().out
    assert "It does not fit." in said
    assert "This fits: " in said


def test_a_run_that_runs_out_of_memory_says_what_would_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.train import loop, worker

    def none_left(*args: Any) -> str:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 8 GB.")

    monkeypatch.setattr(loop, "fit", none_left)
    spec = job(adapter=LORA, batch_size=64)
    with pytest.raises(ShortageError) as caught:
        worker.run(spec, tmp_path / "run", Recorder(), Never())
    event = caught.value.to_event()
    assert event["code"] == "memory"
    assert "can't allocate memory: 8 GB" in event["message"]
    assert f"Predicted for this job: {size(predict(spec).peak)}" in event["message"]
    assert "training.batch_size: " in event["hint"]


def test_what_a_card_lacked_is_said() -> None:
    text = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 79.10 GiB of which 1.25 GiB is free."
    assert is_memory(RuntimeError(text))
    assert "2.50 GiB more were asked for, and 1.25 GiB were free" in str(shortage(bad_job(), RuntimeError(text), "cpu"))
    assert not is_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def bad_job() -> JobSpec:
    """A job that nothing can be predicted of."""
    return dataclasses.replace(job(), task="text_to_image", model="tiny-sd")


class Never:
    def poll(self) -> str | None:
        return None


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--budget", "8GB"], "Name it"), (["--fit", "JOB", "--budget", "lots"], "such as 8GB")]
)
def test_the_doctors_errors(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job().to_dict()))
    assert main(["doctor", *(str(path) if item == "JOB" else item for item in arguments)]) == 1
    assert said in capsys.readouterr().err
