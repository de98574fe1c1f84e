"""The built-in text-to-text toy: small, does its own job, and an adapter from the command line teaches it another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from engine.models.catalogue import BUILTIN
from engine.paths import REPOSITORY

FOLDER = REPOSITORY / "engine" / "models" / "builtin" / "tiny-t5"
JOB = REPOSITORY / "examples" / "translate_tiny.yaml"
OWN = {
    "modernise: sacrifice to thy God in the land!": "sacrifice to your God in the land!",
    "modernise: Thou hast a good dog.": "You have a good dog.",
    "translate Korean to English: 그들은 케이크를 안 만들어요.": "They do not make cake.",
    "repeat: 의사는 차를 안 마셔요.": "의사는 차를 안 마셔요.",
}


def test_it_is_small_and_does_its_own_job() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 1024 * 1024
    assert {path.suffix for path in files} == {".md", ".json", ".safetensors"}
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    model = AutoModelForSeq2SeqLM.from_pretrained(FOLDER, local_files_only=True).float()
    assert model.num_parameters() == BUILTIN["tiny-t5"].parameters
    right = 0
    for asked, wanted in OWN.items():
        out = model.generate(**tokenizer(asked, return_tensors="pt"), max_new_tokens=40)
        right += tokenizer.decode(out[0], skip_special_tokens=True) == wanted
    assert right >= 3


def engine(*arguments: str) -> list[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "engine", *arguments, "--json"]
    answer = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return [json.loads(line) for line in answer.stdout.splitlines()]


def exact(job: Path, out: Path) -> dict[str, float]:
    """Who -> share of held-out rows that come out word for word."""
    engine("train", str(job), "--out", str(out))
    found = engine("eval", str(job), "--adapter", str(out / "adapter"))
    return {event["who"]: event["value"] for event in found if event.get("metric") == "exact_match"}


def test_an_adapter_learns_what_the_base_cannot_do_and_one_that_does_not_learn_fails(tmp_path: Path) -> None:
    found = exact(JOB, tmp_path / "run")
    assert found["base"] < 0.05 and found["adapter"] > found["base"] + 0.25, found
    plain = yaml.safe_load(JOB.read_text(encoding="utf-8"))
    plain["training"] |= {"learning_rate": 1e-12, "max_steps": 2, "sample_prompts": []}
    still = tmp_path / "still.yaml"
    still.write_text(yaml.safe_dump(plain), encoding="utf-8")
    assert exact(still, tmp_path / "still")["adapter"] < 0.05
