"""QLoRA on the real 135M model: little loss for much memory (`STUDIO_MODELS_HOME` names a home that has it)."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from engine import bnb
from engine.models.loading import load_causal_lm
from engine.train.job import JobSpec
from tests.test_first_lora import ROOT, command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
STEPS = 90


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = os.environ.get("STUDIO_MODELS_HOME") or str(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STUDIO_HOME", place)
        from engine.models import fetch

        fetch.ensure("smollm2-135m-instruct")
        yield place


@pytest.fixture(scope="module")
def ends(home: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Quantisation -> the `done` event of the same job with it."""
    folder: Path = tmp_path_factory.mktemp("runs")
    spec = JobSpec.from_file(ROOT / "examples" / "first_lora.yaml")
    training = dataclasses.replace(spec.training, max_steps=STEPS, eval_every=STEPS, sample_prompts=())
    done = {}
    for kind in ("none", "nf4"):
        dataclasses.replace(spec, training=training, quantization=kind).save(folder / f"{kind}.yaml")
        done[kind] = command(home, "train", str(folder / f"{kind}.yaml"), "--out", str(folder / kind))[-1]
        print(kind, {key: done[kind][key] for key in ("loss", "first_eval_loss", "eval_loss", "seconds")})
    return done


def test_qlora_learns_and_ends_near_full_precision(ends: dict[str, Any]) -> None:
    assert ends["nf4"]["eval_loss"] < 0.65 * ends["nf4"]["first_eval_loss"]
    # What the codes cost before any training is not more afterwards.
    cost = {key: ends["nf4"][key] / ends["none"][key] - 1 for key in ("first_eval_loss", "eval_loss")}
    assert 0 < cost["eval_loss"] < cost["first_eval_loss"] + 0.005


def test_qlora_ends_within_three_percent(ends: dict[str, Any]) -> None:
    assert abs(ends["nf4"]["eval_loss"] / ends["none"]["eval_loss"] - 1) < 0.03


def test_linear_layers_take_a_third_of_bf16(home: str) -> None:
    model, _ = load_causal_lm("smollm2-135m-instruct", quantization="nf4")
    found: Any = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    packed = dict(bnb.packed_layers(model))
    # Three query heads share a value head, so value projections stay as they are.
    assert len(found) == 210 and set(found) - set(packed) == {n for n in found if n.endswith("v_proj")}
    share = sum(map(bnb.weight_bytes, found.values())) / sum(2 * m.in_features * m.out_features for m in found.values())
    print(f"{len(found)} linear layers take {share:.3f} of their bf16 bytes")
    assert share < 0.35
