"""The job's optimizers: resumed exactly, with LoRA+'s rates, refused where the device cannot; activations offloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import engine
from engine.errors import ConfigError
from engine.memory.allocations import HIDDEN_ON_CPU, Allocations
from engine.tasks.causal_lm import TASK, Tokens, pad_rows
from engine.train.checkpoints import _into_pages
from engine.train.events import Recorder
from engine.train.job import OPTIMIZERS, JobSpec, TrainingSpec
from engine.train.offload import SMALL, Offload
from engine.train.optim import check_optimizer, make_optimizer, set_rate
from engine.train.worker import checkpoint_activations, run
from tests import tiny

ON_CPU = ("adamw", "adamw_8bit", "adafactor")
LARGE = {"method": "lora", "r": 32, "target_modules": "all-linear", "lora_dropout": 0.1}
"""Enough numbers in each matrix for bitsandbytes to keep them in 8 bits."""


class Pause:
    """Asks for a pause at one poll."""

    def __init__(self, at: int = 0) -> None:
        self.left = at

    def poll(self) -> str | None:
        self.left -= 1
        return "pause" if self.left == 0 else None


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"Say {i}.", "completion": f"Number {i}."}) + "\n" for i in range(20))
    )
    return path


def job(rows: Path, *, adapter: dict[str, Any] | None = None, **training: Any) -> JobSpec:
    settings = {"max_steps": 7, "batch_size": 4, "learning_rate": 2e-3, "precision": "fp32", "max_length": 48}
    return JobSpec.from_dict(
        {
            "model": "tiny-llama",
            "data": {"path": str(rows), "eval_split": 0},
            "adapter": adapter or {},
            "full": not adapter,
            "training": settings | {"warmup_ratio": 0, "checkpoint_every": 3} | training,
        }
    )


def losses(*recorders: Recorder) -> dict[int, float]:
    return {event["step"]: event["loss"] for recorder in recorders for event in recorder.of("step")}


@pytest.mark.parametrize("kind", ["loraplus", "full"])
@pytest.mark.parametrize("optimizer", ON_CPU)
def test_a_run_goes_on_as_if_it_had_never_paused(optimizer: str, kind: str, rows: Path, tmp_path: Path) -> None:
    more = {"loraplus_ratio": 4.0} if kind == "loraplus" else {"learning_rate": 1e-3}
    spec = job(rows, adapter=LARGE if kind == "loraplus" else None, optimizer=optimizer, **more)
    assert JobSpec.from_dict(spec.to_dict()) == spec
    whole, first, second = Recorder(), Recorder(), Recorder()
    assert run(spec, tmp_path / "whole", whole, Pause(), False) == "done"
    assert run(spec, tmp_path / "parts", first, Pause(6), False) == "paused"
    assert run(spec, tmp_path / "parts", second, Pause(), True) == "done"
    expected, got = losses(whole), losses(first, second)
    assert first.of("step") and second.of("step") and got.keys() == expected.keys()
    assert got == pytest.approx(expected, abs=1e-6)
    assert expected[7] < expected[1] - 0.05, "the run must learn something"


def test_the_names_are_different_optimizers(rows: Path, tmp_path: Path) -> None:
    curves = []
    for name in ON_CPU:
        recorder = Recorder()
        run(job(rows, adapter=LARGE, optimizer=name, max_steps=3), tmp_path / name, recorder, Pause(), False)
        curves.append(losses(recorder))
    assert len({curve[3] for curve in curves}) == 3
    # 8 bits of state change little.
    assert curves[1] == pytest.approx(curves[0], rel=0.02)


@pytest.mark.parametrize("optimizer", ON_CPU)
def test_each_group_takes_its_ratio_of_the_rate(optimizer: str) -> None:
    """A first step is the rate in length for each number, of AdamW and of Adafactor's vectors alike."""
    model = engine.get_peft_model(tiny.llama(), engine.LoraConfig(r=2, target_modules=["q_proj"]))
    parameters = model.adapter_parameters()
    made = make_optimizer(parameters, TrainingSpec(optimizer=optimizer, learning_rate=1e-2, loraplus_ratio=16))
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    set_rate(made, 1e-3)
    made.step()
    for name, p in parameters.items():
        ratio = 16 if "lora_B" in name else 1
        assert (p - before[name]).abs().flatten().tolist() == pytest.approx([1e-3 * ratio] * p.numel(), rel=1e-2), name


def test_what_a_device_cannot_run_is_refused_with_what_it_can(rows: Path, tmp_path: Path) -> None:
    cases = {
        "paged_adamw_8bit": "Use adamw_8bit",
        "paged_adamw_32bit": "Use adamw, ",
    }
    for name, instead in cases.items():
        with pytest.raises(ConfigError, match=f"'{name}', which moves its state") as error:
            run(job(rows, adapter=LARGE, optimizer=name), tmp_path / name, Recorder(), Pause(), False)
        assert instead in str(error.value)
        check_optimizer(TrainingSpec(optimizer=name), "cuda")
    with pytest.raises(ConfigError, match="'adamw_8bit', which bitsandbytes has not for 'mps'"):
        check_optimizer(TrainingSpec(optimizer="adamw_8bit"), "mps")
    for name in OPTIMIZERS[1:]:
        with pytest.raises(ConfigError, match="fsdp has spread"):
            check_optimizer(TrainingSpec(optimizer=name), "cuda", spread=True)
    with pytest.raises(ConfigError, match=r"activation_offload .* 'cpu'"):
        run(job(rows, adapter=LARGE, activation_offload=True), tmp_path / "off", Recorder(), Pause(), False)
    with pytest.raises(ConfigError, match=r"training\.optimizer is 'sgdm'"):
        job(rows, optimizer="sgdm")


def test_paged_state_is_loaded_into_pages() -> None:
    class Paged(torch.optim.Optimizer):
        is_paged = True

        def get_state_buffer(self, p: Tensor, dtype: torch.dtype) -> Tensor:
            made = torch.zeros_like(p, dtype=dtype)
            made.is_paged = p.numel() > 4  # type: ignore[attr-defined]
            return made

    large, small = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(2))
    made = Paged([large, small], {})
    loaded = {p: {"step": 3, "state1": torch.full_like(p, 5), "state2": torch.full_like(p, 6)} for p in (large, small)}
    made.state.update({p: dict(entry) for p, entry in loaded.items()})
    _into_pages(made)
    assert all(getattr(made.state[large][key], "is_paged", False) for key in ("state1", "state2"))
    assert made.state[large]["state2"].tolist() == [6] * 8 and made.state[large]["step"] == 3
    assert made.state[small]["state1"] is loaded[small]["state1"]


def test_the_8_bit_steps_own_buffers_are_counted() -> None:
    """bitsandbytes' step on a CPU, called as the Python that it is, against the bytes that are written down."""
    from bitsandbytes.backends.cpu.ops import _optimizer_update_8bit_blockwise_cpu as update

    p = nn.Parameter(torch.randn(512, 256))
    made = make_optimizer({"p": p}, TrainingSpec(optimizer="adamw_8bit"))
    p.grad = torch.randn_like(p)
    made.step()
    s, g = made.state[p], p.grad
    counted = Allocations()
    counted.hold([p, g, *(value for value in s.values() if isinstance(value, Tensor))], "there before")
    before = counted.total
    with counted:
        update(
            "adam", g, p.detach(), s["state1"], s["state2"], 0.9, 0.999, 0.0, 0.0, 1e-8, 2, 1e-3,
            s["qmap1"], s["qmap2"], s["absmax1"], s["absmax2"], 0.0, 1.0,
        )  # fmt: skip
    written = HIDDEN_ON_CPU["bitsandbytes::optimizer_update_8bit_blockwise"](["adam", g, p])
    assert counted.peak - before == pytest.approx(written, rel=0.02)


@pytest.mark.parametrize("recompute", [False, True])
def test_offloaded_activations_give_the_same_gradients(recompute: bool) -> None:
    """The copies are made on a CPU too, where they save nothing: values, gradients and what is moved can be seen."""
    torch.manual_seed(0)
    model = engine.get_peft_model(
        tiny.llama(), engine.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ).train()
    if recompute:
        checkpoint_activations(model.get_base_model())
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = [tuple(torch.randint(vocabulary, (64,)).tolist()) for _ in range(8)]
    batch = pad_rows([Tokens(row, (True,) * 64) for row in ids], 0)

    def step(context: Any = None) -> tuple[float, dict[str, Tensor]]:
        model.zero_grad()
        if context is None:
            part = TASK.loss(model, batch)
        else:
            with context:
                part = TASK.loss(model, batch)
        part.total.backward()
        return float(part.total.detach()), {n: p.grad.clone() for n, p in model.adapter_parameters().items()}

    plain, offload = step(), Offload(model, torch.device("cpu"))
    away = step(offload)
    assert away[0] == plain[0] and away[1].keys() == plain[1].keys()
    assert all(torch.equal(away[1][name], plain[1][name]) for name in plain[1])
    # Inputs of two blocks at the least, 8 x 64 rows of 32 numbers each, and none of the weights.
    assert offload.moved >= 2 * 8 * 64 * 32 * 4


def test_weights_are_not_offloaded() -> None:
    layer, x = nn.Linear(256, 256, bias=False), torch.randn(128, 256, requires_grad=True)
    layer.weight.requires_grad_(False)
    offload = Offload(layer, torch.device("cpu"))
    with offload:
        y = functional.silu(layer(x))
    y.sum().backward()
    # A frozen layer saves its weight alone, and silu its input, which is no weight.
    assert layer.weight.nbytes > SMALL and offload.moved == y.nbytes
