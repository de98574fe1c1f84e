"""Two processes take the steps of one: the same losses, the same adapter, checkpoints that one process goes on from."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engine.errors import ConfigError
from engine.paths import REPOSITORY
from engine.train.events import Recorder
from engine.train.parallel import Group, blocks_of, start
from tests import small_llama

STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("parallel")
    small_llama.build(place / "base")
    chance = random.Random(0)
    rows = [{"text": " ".join(chance.choices(["hello", "world"], k=chance.randint(3, 20)))} for _ in range(45)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return place


def job(folder: Path, name: str, **more: Any) -> Path:
    """9 rows a step in batches of 2, the last step of an epoch short: shares are uneven."""
    training = {
        "max_steps": STEPS, "batch_size": 3, "gradient_accumulation": 3, "learning_rate": 0.02, "precision": "fp32",
        "eval_every": 10, "checkpoint_every": 10, "loss_on": "all", "max_length": 32, **more.pop("training", {}),
    }  # fmt: skip
    spec = {
        "task": "causal_lm",
        "model": str(folder / "base"),
        "data": {"path": str(folder / "rows.jsonl"), "eval_split": 0.1},
        "adapter": {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "training": training,
        **more,
    }
    if more.get("full"):
        spec["adapter"] = {}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


def command(path: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "engine", "train", str(path), "--out", str(out), "--json", "--threads", "1", *more]


def trained(path: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    """The events of a run in processes of its own."""
    answer = subprocess.run(command(path, out, *more), cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-3000:]
    return [json.loads(line) for line in answer.stdout.splitlines()]


def of(events: list[dict[str, Any]], kind: str, key: str = "loss") -> list[float]:
    return [event[key] for event in events if event["type"] == kind]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What one process does: an adapter's run, and full fine-tuning's."""
    runs = {"adapter": job(folder, "adapter"), "model": job(folder, "model", full=True)}
    return {kind: trained(path, folder / f"{kind}-alone") for kind, path in runs.items()}


@pytest.mark.parametrize("kind", ["adapter", "model"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_take_the_steps_of_one(
    folder: Path, alone: dict[str, list[dict[str, Any]]], strategy: str, kind: str
) -> None:
    out = folder / f"{kind}-{strategy}"
    events = trained(folder / f"{kind}.json", out, "--processes", "2", "--strategy", strategy)
    expected = alone[kind]
    assert len(of(events, "step")) == STEPS
    for what in (("step", "loss"), ("step", "grad_norm"), ("eval", "loss")):
        assert of(events, *what) == pytest.approx(of(expected, *what), abs=1e-4), what
    assert of(events, "step", "tokens") == of(expected, "step", "tokens")
    assert of(expected, "eval")[-1] < of(expected, "eval")[0] - 0.1, "the run must learn something"
    name = f"{kind}_model.safetensors" if kind == "adapter" else "model.safetensors"
    ours, theirs = (load_file(place / kind / name) for place in (out, folder / f"{kind}-alone"))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in ours)

    # One process goes on from what two have saved.
    last = out / "checkpoints" / "step-000020"
    assert not last.exists() and (out / "checkpoints" / "step-000010").is_dir()
    again = trained(folder / f"{kind}.json", _from_checkpoint(out, folder / f"{kind}-{strategy}-on"), "--resume")
    assert of(again, "step") == pytest.approx(of(expected, "step")[10:], abs=1e-4)


def _from_checkpoint(run: Path, folder: Path) -> Path:
    """A run's folder as it was when its process ended after the checkpoint."""
    (run / "checkpoints").rename((folder.mkdir() or folder) / "checkpoints")
    (run / "spec.yaml").rename(folder / "spec.yaml")
    return folder


def test_a_stop_is_obeyed_by_all_at_the_same_step(folder: Path) -> None:
    path, out = job(folder, "long", training={"max_steps": 100_000}), folder / "stopped"
    child = subprocess.Popen(
        command(path, out, "--processes", "2"),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if '"step"' in line:
            break
    child.send_signal(signal.SIGTERM)
    rest, words = child.communicate(timeout=120)
    events = [json.loads(line) for line in rest.splitlines()]
    assert child.returncode == 3 and events[-1]["type"] == "stopped", words[-2000:]
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


def test_a_process_that_dies_ends_the_run_with_a_named_error(folder: Path) -> None:
    path = job(folder, "dying", training={"max_steps": 100_000})
    child = subprocess.Popen(
        command(path, folder / "dying", "--processes", "2"), cwd=REPOSITORY, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    for line in child.stdout:
        if '"step"' in line:
            break
    (other,) = [int(pid) for pid in _children(child.pid)]
    os.kill(other, signal.SIGKILL)
    rest, _ = child.communicate(timeout=120)
    errors = [event for event in map(json.loads, rest.splitlines()) if event["type"] == "error"]
    assert child.returncode == 1 and "2 processes" in errors[0]["message"]


def _children(pid: int) -> list[str]:
    time.sleep(0.2)
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_shares_cover_every_row_once_and_are_equally_many() -> None:
    for rows, size, batch in ((5, 2, 2), (1, 3, 4), (9, 4, 1), (8, 2, 4), (7, 3, 2)):
        shares = [Group(rank, size).shares(list(range(rows)), batch) for rank in range(size)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(row for share in shares for part, counts in share if counts for row in part) == list(range(rows))
        assert all(part and len(part) <= batch for share in shares for part, _ in share)


def test_blocks_are_the_outermost_lists_and_faults_are_named() -> None:
    block = [nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])) for _ in range(3)]
    model = nn.ModuleDict({"layers": nn.ModuleList(block), "head": nn.Linear(2, 2)})
    assert blocks_of(model) == block
    for processes, strategy, said in ((1, "ddp", "--processes is 1"), (2, "zero", "--strategy is 'zero'")):
        with pytest.raises(ConfigError, match=said):
            start(processes, strategy, [], Recorder())
    with pytest.raises(ConfigError, match="no list of blocks"):
        Group(0, 2, "fsdp").spread(nn.Linear(2, 2), [])
