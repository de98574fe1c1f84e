"""QLoRA on the real 135M model: little loss for much memory (`STUDIO_MODELS_HOME` names a home that has it)."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from engine import bnb
from engine.models.loading import load_causal_lm
from engine.train.job import JobSpec
from tests.test_first_lora import ROOT, command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
STEPS = 36


def test_qlora_ends_where_full_precision_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = os.environ.get("STUDIO_MODELS_HOME") or str(tmp_path / "home")
    monkeypatch.setenv("STUDIO_HOME", home)
    from engine.models import fetch

    fetch.ensure("smollm2-135m-instruct")
    spec = JobSpec.from_file(ROOT / "examples" / "first_lora.yaml")
    training = dataclasses.replace(spec.training, max_steps=STEPS, eval_every=STEPS, sample_prompts=())
    done = {}
    for kind in ("none", "nf4"):
        dataclasses.replace(spec, training=training, quantization=kind).save(tmp_path / f"{kind}.yaml")
        done[kind] = command(home, "train", str(tmp_path / f"{kind}.yaml"), "--out", str(tmp_path / kind))[-1]
        print(kind, {key: done[kind][key] for key in ("first_eval_loss", "eval_loss", "seconds")})
    ends = {kind: float(event["eval_loss"]) for kind, event in done.items()}  # type: ignore[arg-type]
    assert ends["nf4"] < 0.9 * float(done["nf4"]["first_eval_loss"])  # type: ignore[arg-type]
    assert abs(ends["nf4"] / ends["none"] - 1) < 0.03

    model, _ = load_causal_lm("smollm2-135m-instruct", quantization="nf4")
    layers = [layer for _, layer in bnb.packed_layers(model)]
    share = sum(map(bnb.weight_bytes, layers)) / sum(2 * m.in_features * m.out_features for m in layers)  # type: ignore
    print(f"{len(layers)} linear layers take {share:.3f} of their bf16 bytes")
    assert len(layers) == 210 and share < 0.35
