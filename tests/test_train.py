"""The training loop: against PEFT, resumed after a kill, stopped, paused, and the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import CheckpointError, ConfigError, DataError, TrainingError
from engine.models.loading import load_causal_lm
from engine.tasks.base import Loaded
from engine.tasks.causal_lm import TASK, encode_example, keeps_rows_apart, pack, pad_rows
from engine.train.events import Recorder
from engine.train.job import JobSpec
from engine.train.loop import encode_parts
from engine.train.optim import rate_at
from engine.train.order import step_rows
from engine.train.worker import run

ROOT = Path(__file__).resolve().parent.parent
ROWS = [
    {"instruction": f"Say the word number {i} of the list.", "output": f"Arr, number {i} it be, matey!"}
    for i in range(40)
]


class Never:
    def poll(self) -> str | None:
        return None


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def job(data: Path, **training: Any) -> JobSpec:
    settings = {"max_steps": 6, "batch_size": 4, "learning_rate": 3e-3, "precision": "fp32", "max_length": 96}
    return JobSpec.from_dict(
        {
            "model": "tiny-llama",
            "data": {"path": str(data), "eval_split": 0.1},
            "adapter": {"method": "lora", "r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"},
            "training": settings | training,
        }
    )


def train(spec: JobSpec, out: Path, control: Any = None, resume: bool = False) -> tuple[str, Recorder]:
    recorder = Recorder()
    return run(spec, out, recorder, control or Never(), resume), recorder


def losses(recorder: Recorder) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in recorder.of("step")}


def test_a_run_from_rows_to_adapter(data: Path, tmp_path: Path) -> None:
    spec = job(data, max_steps=12, eval_every=6, sample_prompts=["Say a word."])
    state, recorder = train(spec, tmp_path / "run")
    assert state == "done"
    start, done = recorder.of("start")[0], recorder.of("done")[0]
    assert (start["total_steps"], start["train_rows"], start["eval_rows"]) == (12, 36, 4)
    assert [event["step"] for event in recorder.of("eval")] == [0, 6, 12]
    assert done["eval_loss"] < 0.8 * done["first_eval_loss"]
    assert len(recorder.of("sample")) == 3
    assert all(event["grad_norm"] > 0 and event["tokens_per_s"] > 0 for event in recorder.of("step"))
    assert JobSpec.from_file(tmp_path / "run" / "spec.yaml") == spec
    assert {p.name for p in (tmp_path / "run" / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="already holds a run"):
        train(spec, tmp_path / "run")


def test_without_a_learning_rate_nothing_is_learned(data: Path, tmp_path: Path) -> None:
    """The counterpart of the test above: its threshold is not reached by accident."""
    _, recorder = train(job(data, max_steps=12, eval_every=6, learning_rate=1e-12), tmp_path / "run")
    done = recorder.of("done")[0]
    assert done["eval_loss"] == pytest.approx(done["first_eval_loss"], rel=1e-3)


def test_thirty_steps_as_peft_takes_them(data: Path, tmp_path: Path) -> None:
    """The loop (packed rows, targets only) against a plain padded loop over the PEFT library's LoRA."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
    spec = job(data, max_steps=30, gradient_accumulation=2, weight_decay=0.01, warmup_ratio=0.2)
    spec = JobSpec.from_dict(spec.to_dict() | {"adapter": dict(spec.adapter) | {"lora_dropout": 0.0}})
    from engine import get_peft_model
    from engine.data import load, split
    from engine.inspection import adapter_config

    torch.manual_seed(spec.training.seed)
    base, tokenizer = load_causal_lm("tiny-llama", precision="fp32")
    # The same random start: drawn here as the worker draws it, and handed to PEFT as a file.
    from accelerate.utils import set_seed

    set_seed(spec.training.seed)
    get_peft_model(base, adapter_config(spec.adapter, None)).save_pretrained(tmp_path / "start")
    _, recorder = train(spec, tmp_path / "run")

    base, _ = load_causal_lm("tiny-llama", precision="fp32")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True).train()
    rows, _ = split(load(data).examples, 0.1, spec.training.seed)
    encoded = [next(encode_example(row, tokenizer, "answers")) for row in rows]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.01)
    stream = step_rows(encoded, 8, spec.training.seed, 0)
    theirs = {}
    for step in range(30):
        optimizer.param_groups[0]["lr"] = rate_at(step, 30, spec.training)
        batch = pad_rows(next(stream), tokenizer.pad_token_id)
        labels = torch.full_like(batch["input_ids"], -100).flatten()
        labels[batch["sources"] + 1] = batch["targets"]
        loss = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=labels.view_as(batch["input_ids"]),
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        theirs[step + 1] = float(loss.detach())
    ours = losses(recorder)
    assert ours.keys() == theirs.keys() and ours[30] < 0.8 * ours[1]
    assert max(abs(ours[step] - theirs[step]) for step in ours) < 1e-4
    fresh, _ = load_causal_lm("tiny-llama", precision="fp32")
    final = peft.PeftModel.from_pretrained(fresh, tmp_path / "run" / "adapter")
    x = batch["input_ids"]
    with torch.no_grad():
        assert (final.eval()(x).logits - model.eval()(x).logits).abs().max() < 1e-3


def start_worker(spec_path: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "engine", "train", str(spec_path), "--out", str(out), "--json", *more]
    return subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def events_until(worker: subprocess.Popen[str], wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    assert worker.stdout is not None
    seen = []
    for line in worker.stdout:
        seen.append(json.loads(line))
        if wanted(seen[-1]):
            break
    return seen


@pytest.mark.parametrize("kill_at", [1, 5, 7])
def test_kill_9_then_resume_ends_like_the_uninterrupted_run(kill_at: int, data: Path, tmp_path: Path) -> None:
    spec = job(data, max_steps=9, checkpoint_every=3, gradient_accumulation=2)
    spec.save(tmp_path / "job.yaml")
    _, whole = train(JobSpec.from_file(tmp_path / "job.yaml"), tmp_path / "whole")

    worker = start_worker(tmp_path / "job.yaml", tmp_path / "run")
    before = events_until(worker, lambda e: e["type"] == "step" and e["step"] == kill_at)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert not (tmp_path / "run" / "adapter").exists()
    state, after = train(spec, tmp_path / "run", resume=True)
    assert state == "done"
    assert after.of("start")[0]["first_step"] == (kill_at // 3) * 3
    curve = {e["step"]: e["loss"] for e in before if e["type"] == "step"} | losses(after)
    expected = losses(whole)
    assert curve.keys() == expected.keys()
    assert max(abs(curve[step] - expected[step]) for step in expected) < 1e-4
    assert after.of("done")[0]["eval_loss"] == pytest.approx(whole.of("done")[0]["eval_loss"], abs=1e-4)
    assert after.of("done")[0]["tokens"] == whole.of("done")[0]["tokens"]


class At:
    """Asks for one thing once, at the given poll."""

    def __init__(self, poll: int, what: str) -> None:
        self.left, self.what = poll, what

    def poll(self) -> str | None:
        self.left -= 1
        return self.what if self.left == 0 else None


def test_pause_and_resume_are_exact(data: Path, tmp_path: Path) -> None:
    spec = job(data, max_steps=8)
    _, whole = train(spec, tmp_path / "whole")
    state, first = train(spec, tmp_path / "run", At(5, "pause"))
    assert (state, first.events[-1]["type"], first.events[-1]["step"]) == ("paused", "paused", 3)
    state, second = train(spec, tmp_path / "run", resume=True)
    assert state == "done"
    curve = losses(first) | losses(second)
    assert max(abs(curve[s] - loss) for s, loss in losses(whole).items()) < 1e-6


def test_every_step_takes_the_same_form_and_the_look_before_it_no_random_numbers(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.kernels.together import TogetherLinears
    from engine.train import loop

    calls, drawn = 0, []
    real, look = TogetherLinears.apply, loop.look

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(*args)

    def watched(run: Any) -> None:
        before = torch.get_rng_state(), random.getstate()
        look(run)
        drawn.append(not torch.equal(before[0], torch.get_rng_state()) or before[1] != random.getstate())

    monkeypatch.setattr(TogetherLinears, "apply", counted)
    monkeypatch.setattr(loop, "look", watched)
    spec = job(data, max_steps=4, eval_every=100, checkpoint_every=100)
    spec = dataclasses.replace(spec, adapter={**spec.adapter, "lora_dropout": 0.0})
    train(spec, tmp_path / "whole")
    every, calls = calls, 0
    assert every and every % 4 == 0 and drawn == [False]
    train(spec, tmp_path / "run", At(4, "pause"))
    first, calls = calls, 0
    train(spec, tmp_path / "run", resume=True)
    assert first > 0 and first + calls == every


def test_stop_keeps_a_usable_adapter(data: Path, tmp_path: Path) -> None:
    state, recorder = train(job(data), tmp_path / "run", At(4, "stop"))
    assert state == "stopped" and recorder.events[-1]["step"] == 2
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    state, _ = train(job(data), tmp_path / "run", resume=True)
    assert state == "done"


def test_checkpoint_and_sample_on_demand(data: Path, tmp_path: Path) -> None:
    _, recorder = train(job(data), tmp_path / "a", At(4, "checkpoint"))
    assert [e["step"] for e in recorder.of("checkpoint")] == [2]
    _, recorder = train(job(data, sample_prompts=["Hello."]), tmp_path / "b", At(5, "sample"))
    assert [e["step"] for e in recorder.of("sample")] == [0, 2, 6]


def test_resume_refuses_another_job(data: Path, tmp_path: Path) -> None:
    train(job(data), tmp_path / "run", At(3, "pause"))
    with pytest.raises(CheckpointError, match="other settings"):
        train(job(data, seed=1), tmp_path / "run", resume=True)


def test_a_run_that_diverges_says_so(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="diverged"):
        train(job(data, learning_rate=1e30, max_grad_norm=0, warmup_ratio=0), tmp_path / "run")


def test_rows_that_are_too_long(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="within 8 tokens"):
        train(job(data, max_length=8), tmp_path / "run")


def test_accumulation_is_the_larger_batch(data: Path, tmp_path: Path) -> None:
    curves = []
    for number, (size, times) in enumerate(((8, 1), (2, 4))):
        spec = job(data, batch_size=size, gradient_accumulation=times)
        spec = JobSpec.from_dict(spec.to_dict() | {"adapter": dict(spec.adapter) | {"lora_dropout": 0.0}})
        curves.append(losses(train(spec, tmp_path / str(number))[1]))
    assert max(abs(curves[0][s] - curves[1][s]) for s in curves[0]) < 1e-5


def test_order_is_a_function_of_seed_and_step() -> None:
    rows = list(range(10))
    whole = step_rows(rows, 4, 5, 0)
    steps = [next(whole) for _ in range(7)]
    assert sorted(chain(*steps[:3])) == rows == sorted(chain(*steps[3:6]))
    assert steps[:3] != steps[3:6]
    for first in range(7):
        assert next(step_rows(rows, 4, 5, first)) == steps[first]
    assert next(step_rows(rows, 4, 6, 0)) != steps[0]


def test_learning_rates() -> None:
    training = JobSpec.from_dict({"model": "m", "data": {"path": "d"}, "training": {"warmup_ratio": 0.2}}).training
    rates = [rate_at(step, 10, training) / training.learning_rate for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[6] == pytest.approx(0.5) and rates[10] == 0
    cosine = JobSpec.from_dict(
        {"model": "m", "data": {"path": "d"}, "training": {"schedule": "cosine", "warmup_ratio": 0}}
    ).training
    assert rate_at(5, 10, cosine) == pytest.approx(cosine.learning_rate / 2)


def test_packed_rows_are_the_padded_rows(data: Path) -> None:
    from engine.data import load

    model, tokenizer = load_causal_lm("tiny-llama", precision="fp32")
    assert keeps_rows_apart(model)
    rows = [next(encode_example(e, tokenizer, "answers")) for e in load(data).examples[:5]]
    with torch.no_grad():
        packed, padded = TASK.loss(model, pack(rows)), TASK.loss(model, pad_rows(rows, tokenizer.pad_token_id))
    assert packed.count == padded.count
    assert abs(float(packed.total - padded.total)) / packed.count < 1e-5


def test_a_model_that_mixes_packed_rows_is_found_out() -> None:
    model, _ = load_causal_lm("tiny-llama", precision="fp32")
    plain = model.forward

    def forgetful(input_ids: Any, position_ids: Any = None, logits_to_keep: Any = 0, **more: Any) -> Any:
        return plain(input_ids=input_ids, **more)

    model.forward = forgetful
    assert not keeps_rows_apart(model)


def test_only_answers_are_learned() -> None:
    _, tokenizer = load_causal_lm("tiny-llama", precision="fp32")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A toy."},
        {"role": "user", "content": "Really?"},
        {"role": "assistant", "content": "Yes."},
    ]
    tokens = next(encode_example({"messages": messages}, tokenizer, "answers"))
    learned = tokenizer.decode([i for i, keep in zip(tokens.ids, tokens.learned, strict=True) if keep])
    assert "A toy." in learned and "Yes." in learned
    assert not any(word in learned for word in ("brief", "Who", "Really"))
    assert tokenizer.eos_token in learned or "<|end|>" in learned
    everything = next(encode_example({"messages": messages}, tokenizer, "all"))
    assert all(everything.learned)
    text = next(encode_example({"text": "Plain words."}, tokenizer, "answers"))
    assert all(text.learned) and text.ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training": {"batch_size": 0, "schedule": "x", "nonsense": 1}}, "nonsense"),
        ({"data": {}}, "data.path is missing"),
        ({"adapter": {"method": "magic"}}, "magic"),
        ({"task": "poetry"}, "poetry"),
        ({"full": True, "adapter": {"method": "lora"}}, "leave out adapter"),
        ({"full": True, "quantization": "nf4"}, "cannot take small steps"),
        ({"full": True, "training": {"loraplus_ratio": 16}}, "loraplus_ratio"),
        ({"full": "yes"}, "full is 'yes'"),
        ({"adapter": {}}, "adapter is empty"),
        ({"quantization": "nf5"}, "nf5"),
        ({"extra": 1}, "extra is not a key"),
        ({"training": {"learning_rate": "fast"}}, "fast"),
        ({"model": 5}, "model is 5"),
    ],
)
def test_job_faults(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        JobSpec.from_dict({"model": "tiny-llama", "data": {"path": "x"}} | change)


def test_job_values_as_yaml_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("model: tiny-llama\ndata: {path: rows.csv}\ntraining: {learning_rate: 2e-4, epochs: 2}\n")
    (tmp_path / "rows.csv").write_text("a")
    spec = JobSpec.from_file(path)
    assert spec.training.learning_rate == 2e-4 and spec.training.epochs == 2.0
    assert spec.data.path == str(tmp_path / "rows.csv")
    assert JobSpec.from_dict(spec.to_dict()) == spec
    path.write_text("!!python/object/apply:os.system ['echo']")
    with pytest.raises(ConfigError, match="cannot be read"):
        JobSpec.from_file(path)


def engine_command(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "engine", *argv], cwd=ROOT, capture_output=True, text=True)


def test_command_line_train_stop_and_generate(data: Path, tmp_path: Path) -> None:
    job(data, max_steps=400, eval_every=400, checkpoint_every=400).save(tmp_path / "job.yaml")
    worker = start_worker(tmp_path / "job.yaml", tmp_path / "run")
    events_until(worker, lambda e: e["type"] == "step" and e["step"] == 12)
    worker.send_signal(signal.SIGTERM)
    started = time.monotonic()
    rest = events_until(worker, lambda e: e["type"] == "stopped")
    assert worker.wait() == 3 and rest[-1]["type"] == "stopped" and time.monotonic() - started < 30
    folder = str(tmp_path / "run" / "adapter")
    argv = ["--model", "tiny-llama", "--prompt", "Say the word number 3 of the list.", "--max-new-tokens", "20"]
    result = engine_command("generate", *argv, "--adapter", folder, "--out", str(tmp_path / "out"), "--json")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["who"] for line in lines] == ["base", "adapter"] and lines[1]["adapter"] == folder
    assert lines[0]["text"] != lines[1]["text"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == lines


def test_command_line_errors_are_events_and_words(data: Path, tmp_path: Path) -> None:
    spec = job(data).to_dict()
    (tmp_path / "job.yaml").write_text(json.dumps(spec | {"adapter": {"method": "lora", "rank": 3}}))
    result = engine_command("train", str(tmp_path / "job.yaml"), "--out", str(tmp_path / "run"), "--json")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    error = json.loads(result.stdout.splitlines()[-1])
    assert (error["type"], error["code"]) == ("error", "config") and "rank" in error["message"]
    assert "Error:" in result.stderr
    (tmp_path / "job.yaml").write_text(json.dumps(spec | {"data": {"path": "nowhere.csv"}}))
    result = engine_command("train", str(tmp_path / "job.yaml"), "--out", str(tmp_path / "run"))
    assert result.returncode == 1 and "nowhere.csv" in result.stderr and "Traceback" not in result.stderr


def test_gradient_checkpointing_changes_no_loss(data: Path, tmp_path: Path) -> None:
    curves = [losses(train(job(data, gradient_checkpointing=on), tmp_path / str(on))[1]) for on in (False, True)]
    assert max(abs(curves[0][s] - curves[1][s]) for s in curves[0]) < 1e-5


class Afterwards:
    """Asks from the given poll on, as a person's stop stays asked for."""

    def __init__(self, poll: int, what: str) -> None:
        self.left, self.what, self.polls = poll, what, 0

    def poll(self) -> str | None:
        self.polls += 1
        return self.what if self.polls >= self.left else None


def test_a_stop_is_heard_during_an_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {i}.", "completion": f"{i}."}) + "\n" for i in range(200)))
    spec = job(path, sample_prompts=["Hello."])
    spec = JobSpec.from_dict(spec.to_dict() | {"data": {"path": str(path), "eval_split": 0.5}})
    control = Afterwards(5, "stop")
    state, recorder = train(spec, tmp_path / "run", control)
    assert state == "stopped" and control.polls == 5
    assert not recorder.of("eval") and not recorder.of("step")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_run_paused_in_its_last_evaluation_makes_up_for_it(data: Path, tmp_path: Path) -> None:
    _, whole = train(job(data), tmp_path / "whole")
    # One poll in the first evaluation, one before each of the six steps, then one in the last evaluation.
    state, _ = train(job(data), tmp_path / "run", Afterwards(8, "pause"))
    assert state == "paused"
    state, rest = train(job(data), tmp_path / "run", resume=True)
    assert state == "done" and not rest.of("step")
    assert rest.of("done")[0]["eval_loss"] == pytest.approx(whole.of("done")[0]["eval_loss"], abs=1e-6)


def test_a_refused_resume_leaves_the_runs_own_job(data: Path, tmp_path: Path) -> None:
    train(job(data), tmp_path / "run", At(3, "pause"))
    before = (tmp_path / "run" / "spec.yaml").read_text()
    with pytest.raises(CheckpointError):
        train(job(data, seed=1), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "spec.yaml").read_text() == before
    data.write_text(data.read_text() + json.dumps({"instruction": "One more.", "output": "Arr."}) + "\n")
    with pytest.raises(CheckpointError, match="other rows"):
        train(job(data), tmp_path / "run", resume=True)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(data: Path, tmp_path: Path) -> None:
    spec = job(data, max_steps=9, checkpoint_every=2)
    _, whole = train(spec, tmp_path / "whole")
    train(spec, tmp_path / "run", Afterwards(8, "pause"))
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert newest.name == "step-000006"
    (newest / "optimizer.safetensors").write_bytes(b"short")
    state, rest = train(spec, tmp_path / "run", resume=True)
    assert state == "done" and rest.of("start")[0]["first_step"] == 4
    assert "step-000006" in rest.of("warning")[0]["message"]
    assert max(abs(losses(whole)[s] - loss) for s, loss in losses(rest).items()) < 1e-6


def test_a_sample_that_cannot_be_answered_is_a_warning(data: Path, tmp_path: Path) -> None:
    state, recorder = train(job(data, max_steps=1, sample_prompts=["word " * 3000]), tmp_path / "run")
    assert state == "done" and "left out" in recorder.of("warning")[0]["message"]


def test_held_back_rows_without_an_answer_in_reach_are_a_warning(data: Path) -> None:
    loaded = Loaded(*load_causal_lm("tiny-llama", precision="fp32"))
    near, far = {"prompt": "Say it.", "completion": "It."}, {"prompt": "word " * 300, "completion": "It."}
    recorder = Recorder()
    train_part, held = encode_parts(TASK, loaded, job(data), [near], [far], recorder)
    assert len(train_part.rows) == 1 and held.rows == []
    assert any("without evaluation" in event["message"] for event in recorder.of("warning"))
    with pytest.raises(DataError):
        encode_parts(TASK, loaded, job(data), [far], [near], recorder)


def test_rows_are_cut_at_the_models_context(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": f"Tell {i}.", "completion": "word " * 2000} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    state, recorder = train(job(path, max_steps=1, batch_size=1, max_length=100_000), tmp_path / "run")
    assert state == "done" and "longer than 512 tokens" in recorder.of("warning")[0]["message"]


def test_a_model_without_a_chat_template_learns_to_stop() -> None:
    from engine.generation import encode_prompt
    from engine.models.loading import DEFAULT_CHAT_TEMPLATE

    _, tokenizer = load_causal_lm("tiny-llama", precision="fp32")
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    question = {"role": "user", "content": "Hi?"}
    for row in (
        {"messages": [question, {"role": "assistant", "content": "Hello."}]},
        {"prompt": "Hi?", "completion": "Hello."},
    ):
        tokens = next(encode_example(row, tokenizer, "answers"))
        learned = [i for i, keep in zip(tokens.ids, tokens.learned, strict=True) if keep]
        assert learned[-1] == tokenizer.eos_token_id and "Hello." in tokenizer.decode(learned)
        asked = encode_prompt(tokenizer, [question])[0].tolist()
        assert list(tokens.ids[: len(asked)]) == asked


@pytest.mark.parametrize(
    "values",
    [{"seed": 5_000_000_000}, {"epochs": float("inf")}, {"weight_decay": float("nan")}, {"sample_prompts": [""]}],
)
def test_values_that_would_break_a_run_later(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        JobSpec.from_dict({"model": "m", "data": {"path": "d"}, "training": values})
