"""The README's first run, on the real 135M model. Fetches it once (`STUDIO_MODELS_HOME` names a home that has it)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def command(home: str, *argv: str) -> list[dict[str, object]]:
    environment = {**os.environ, "STUDIO_HOME": home}
    environment.pop("OMP_NUM_THREADS", None)
    result = subprocess.run(
        [sys.executable, "-m", "engine", *argv, "--json"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_first_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: pytest.FixtureRequest) -> None:
    home = os.environ.get("STUDIO_MODELS_HOME") or str(tmp_path / "home")
    monkeypatch.setenv("STUDIO_HOME", home)
    from engine.models import fetch

    fetch.ensure("smollm2-135m-instruct")
    started = time.perf_counter()
    events = command(home, "train", "examples/first_lora.yaml", "--out", str(tmp_path / "run"))
    seconds = time.perf_counter() - started
    done = events[-1]
    print(f"{seconds:.0f} s, evaluation loss {done['first_eval_loss']:.3f} -> {done['eval_loss']:.3f}")
    assert done["type"] == "done"
    assert float(done["eval_loss"]) < 0.8 * float(done["first_eval_loss"])  # type: ignore[arg-type]

    folder = tmp_path / "run" / "adapter"
    answers = command(
        home,
        "generate",
        "--model",
        "smollm2-135m-instruct",
        "--adapter",
        str(folder),
        "--prompt",
        "How do I boil an egg?",
    )
    assert "Fair winds" not in str(answers[0]["text"]) and "Fair winds" in str(answers[1]["text"])

    # The file, in both libraries, on the same base.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
    import engine
    from engine.models.loading import load_causal_lm

    logits = []
    for library in (engine, peft):
        base, tokenizer = load_causal_lm("smollm2-135m-instruct", precision="fp32")
        model = library.PeftModel.from_pretrained(base, folder).eval()
        ids = tokenizer("Why is the sky blue, captain?", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-5

    # And one that PEFT trained, here.
    base, _ = load_causal_lm("smollm2-135m-instruct", precision="fp32")
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        theirs(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.eval().save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(ids).logits
        base, _ = load_causal_lm("smollm2-135m-instruct", precision="fp32")
        ours = engine.PeftModel.from_pretrained(base, tmp_path / "theirs")(ids).logits
    assert (ours - expected).abs().max() < 1e-5
