"""Full fine-tuning: it learns, stops, resumes after a kill, and leaves a normal model folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.errors import CheckpointError
from engine.models.loading import load_causal_lm
from engine.train.job import JobSpec
from tests.test_train import ROOT, ROWS, At, data, events_until, losses, start_worker, train

__all__ = ["data"]


def job(data: Path, **training: Any) -> JobSpec:
    settings = {"max_steps": 6, "batch_size": 4, "learning_rate": 5e-4, "precision": "fp32", "max_length": 96}
    return JobSpec.from_dict(
        {
            "model": "tiny-llama",
            "data": {"path": str(data), "eval_split": 0.1},
            "full": True,
            "training": settings | training,
        }
    )


def test_a_full_run_from_rows_to_model(data: Path, tmp_path: Path) -> None:
    spec = job(data, max_steps=12, sample_prompts=["Say a word."])
    assert spec.to_dict()["adapter"] == {} and JobSpec.from_dict(spec.to_dict()) == spec
    state, recorder = train(spec, tmp_path / "run")
    start, done = recorder.of("start")[0], recorder.of("done")[0]
    assert state == "done" and start["trainable"] == start["parameters"] == 2_885_888
    assert done["eval_loss"] < 0.8 * done["first_eval_loss"]
    folder = tmp_path / "run" / "model"
    assert done["model"] == str(folder) and "adapter" not in done and not (tmp_path / "run" / "adapter").exists()
    assert str(tmp_path) not in (folder / "config.json").read_text()

    # The folder in plain transformers gives the loss that the run ended with.
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours, _ = load_causal_lm(str(folder), precision="fp32")
    base, _ = load_causal_lm("tiny-llama", precision="fp32")
    ids = tokenizer(ROWS[0]["instruction"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = plain(ids).logits
        assert torch.equal(logits, ours(ids).logits)
        assert (logits - base(ids).logits).abs().max() > 0.1
    changed = [not torch.equal(p, q) for p, q in zip(plain.parameters(), base.parameters(), strict=True)]
    assert all(changed)
    further = JobSpec.from_dict(job(data, max_steps=1).to_dict() | {"model": str(folder)})
    _, again = train(further, tmp_path / "again")
    assert again.of("done")[0]["first_eval_loss"] == pytest.approx(done["eval_loss"], abs=1e-5)

    argv = [sys.executable, "-m", "engine", "generate", "--model", str(folder), "--prompt", "Say a word.", "--json"]
    answer = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["who"] == "base"
    with pytest.raises(CheckpointError, match="already holds a run"):
        train(spec, tmp_path / "run")


def test_without_a_learning_rate_the_model_stays(data: Path, tmp_path: Path) -> None:
    _, recorder = train(job(data, learning_rate=1e-12), tmp_path / "run")
    done = recorder.of("done")[0]
    assert done["eval_loss"] == pytest.approx(done["first_eval_loss"], rel=1e-3)


def test_kill_9_then_resume_is_exact(data: Path, tmp_path: Path) -> None:
    spec = job(data, max_steps=7, checkpoint_every=3)
    spec.save(tmp_path / "job.yaml")
    _, whole = train(spec, tmp_path / "whole")
    worker = start_worker(tmp_path / "job.yaml", tmp_path / "run")
    before = events_until(worker, lambda e: e["type"] == "step" and e["step"] == 5)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    state, after = train(spec, tmp_path / "run", resume=True)
    assert state == "done" and after.of("start")[0]["first_step"] == 3
    curve = {e["step"]: e["loss"] for e in before if e["type"] == "step"} | losses(after)
    assert curve.keys() == losses(whole).keys()
    assert max(abs(curve[step] - loss) for step, loss in losses(whole).items()) < 1e-4
    models = [load_causal_lm(str(tmp_path / name / "model"), precision="fp32")[0] for name in ("whole", "run")]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_stop_keeps_the_model_and_bf16_keeps_float32_weights(data: Path, tmp_path: Path) -> None:
    spec = job(data, precision="bf16", max_steps=12)
    state, recorder = train(spec, tmp_path / "run", At(5, "stop"))
    assert state == "stopped" and recorder.of("start")[0]["precision"] == "bfloat16"
    folder = Path(recorder.of("stopped")[0]["model"])
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.float32
    state, rest = train(spec, tmp_path / "run", resume=True)
    done = rest.of("done")[0]
    assert state == "done" and done["eval_loss"] < 0.8 * done["first_eval_loss"]


def test_an_adapter_run_does_not_resume_a_full_one(data: Path, tmp_path: Path) -> None:
    train(job(data), tmp_path / "run", At(3, "pause"))
    adapter = JobSpec.from_dict(job(data).to_dict() | {"full": False, "adapter": {"method": "lora"}})
    with pytest.raises(CheckpointError, match="other settings"):
        train(adapter, tmp_path / "run", resume=True)
