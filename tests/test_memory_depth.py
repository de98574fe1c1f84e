"""A step over a deep stack, worked out from four of its blocks: what running all of them says, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.memory import depth
from engine.memory.allocations import Span
from engine.memory.predicting import MOST_ROWS, Job
from engine.models.catalogue import BUILTIN_FOLDER
from engine.train.job import JobSpec

DEEP = 8
ALL = "all-linear"


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with more blocks and no weights: nothing here reads them."""
    return model_folder(tmp_path_factory.mktemp("models") / "deep", {"num_hidden_layers": DEEP})


def model_folder(folder: Path, changes: dict[str, Any], kept: bool = True) -> Path:
    """A model's folder with the toy's tokenizer, its config changed or replaced."""
    source = BUILTIN_FOLDER / "tiny-llama"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text()) if kept else {}
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file({"none": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def job(model: Path, adapter: Any, more: dict[str, Any] | None = None, **training: Any) -> JobSpec:
    return JobSpec.from_dict(
        {
            "model": str(model),
            "data": {"path": "none.jsonl"},
            "adapter": adapter or {},
            "full": not adapter,
            "training": {"max_steps": 2, "batch_size": 4, "precision": "fp32", "max_length": 96} | training,
            **(more or {}),
        }
    )


def compared(spec: JobSpec, shapes: Any, device: str = "cpu") -> Job:
    """The job, after its predictions were found equal to those of all blocks."""
    short, whole = Job(spec, device), Job(spec, device, whole=True)
    assert whole.simulation.stack is None
    assert short.simulation.state == whole.simulation.state
    assert short.simulation.updating == whole.simulation.updating
    for batch, length in shapes:
        assert short.predict(batch, length) == whole.predict(batch, length), (batch, length)
    return short


@pytest.mark.parametrize(
    ("adapter", "training", "more"),
    [
        ({"method": "lora", "r": 4}, {}, {}),
        ({"method": "lora", "r": 4, "lora_dropout": 0.1, "target_modules": ALL}, {"precision": "bf16"}, {}),
        ({"method": "lora", "r": 4, "target_modules": ALL}, {"gradient_checkpointing": True}, {}),
        ({"method": "lora", "r": 4, "bias": "all"}, {"gradient_accumulation": 2, "loraplus_ratio": 4.0}, {}),
        ({"method": "lora", "r": 4, "modules_to_save": ["lm_head"]}, {}, {}),
        ({"method": "lora", "r": 4, "target_modules": ALL}, {}, {"quantization": "nf4"}),
        ({"method": "lora", "r": 4}, {"gradient_checkpointing": True}, {"quantization": "int8"}),
        ({"method": "lora", "r": 4}, {}, {"task": "preference"}),
        ({"method": "lora", "r": 4}, {}, {"task": "classification"}),
        ({"method": "dora", "r": 4, "target_modules": ALL}, {"gradient_checkpointing": True}, {}),
        ({"method": "dora", "r": 4}, {"precision": "bf16"}, {}),
        ({"method": "ia3"}, {}, {}),
        ({"method": "adalora", "init_r": 6, "target_r": 4}, {}, {}),
        ({"method": "vera", "r": 16}, {"precision": "bf16"}, {}),
        ({"method": "prompt_tuning", "num_virtual_tokens": 8}, {}, {}),
        ({}, {}, {}),
        ({}, {"precision": "bf16", "gradient_checkpointing": True}, {}),
        ({}, {"optimizer": "adafactor", "max_grad_norm": 0.0}, {}),
        ({}, {"optimizer": "adamw_8bit"}, {}),
    ],
)
def test_four_blocks_say_what_all_say(deep: Path, adapter: Any, training: Any, more: Any) -> None:
    """The peak of full fine-tuning over one short row is at the end of the step, that of a large batch at its loss."""
    spec = job(deep, adapter, more, **training)
    found = compared(spec, [(1, 8), (16, 96)] if spec.full else [(16, 96)])
    assert found.simulation.stack is not None and found.simulation.stack.left_out == DEEP - depth.KEPT
    if spec.full and spec.training.optimizer == "adamw":
        short, long = found.predict(1, 8), found.predict(16, 96)
        assert short.gradients > 0.9 * found.simulation.trained > long.gradients


def test_on_a_card_too(deep: Path) -> None:
    lora = {"method": "lora", "r": 4}
    for optimizer, offload in (("paged_adamw_8bit", False), ("adamw", True)):
        found = compared(job(deep, lora, optimizer=optimizer, activation_offload=offload), [(16, 96)], "cuda")
        assert found.simulation.stack is not None


def test_another_architecture(tmp_path: Path) -> None:
    gpt2 = {"model_type": "gpt2", "n_layer": DEEP, "n_embd": 64, "n_head": 4, "vocab_size": 4096, "n_positions": 128}
    found = compared(job(model_folder(tmp_path / "gpt2", gpt2, kept=False), {"method": "lora", "r": 4}), [(4, 64)])
    assert found.simulation.stack is not None


@pytest.mark.parametrize(
    ("adapter", "config"),
    [
        ({"method": "prefix_tuning", "num_virtual_tokens": 8}, {}),
        ({"method": "lora", "r": 4, "layers_to_transform": [1, 2]}, {}),
        ({"method": "lora", "r": 4, "rank_pattern": {"layers.5.self_attn.q_proj": 8}}, {}),
        ({"method": "lora", "r": 4}, {"layer_types": ["full_attention"] * 5 + ["sliding_attention"] * 3}),
        ({"method": "lora", "r": 4}, {"num_hidden_layers": depth.KEPT}),
    ],
)
def test_blocks_that_differ_are_all_run(tmp_path: Path, adapter: Any, config: Any) -> None:
    model = model_folder(tmp_path / "model", {"num_hidden_layers": DEEP} | config)
    assert Job(job(model, adapter)).simulation.stack is None


def test_a_block_that_turns_out_to_do_something_else_is_noticed(deep: Path) -> None:
    """Nothing can be seen of it before: all blocks are run then, and the optimizer's state is theirs."""
    spec = job(deep, {"method": "lora", "r": 4})
    short, whole = Job(spec), Job(spec, whole=True)
    for one in (short, whole):
        stack = depth.find(one.model.loaded.model)
        assert stack is not None
        stack.blocks[2].register_forward_hook(lambda block, args, out: out * out)
    assert short.predict(4, 64) == whole.predict(4, 64)
    assert short.simulation.stack is None
    assert short.simulation.allocations.live["optimizer"] == short.simulation.state["optimizer"]


def spans(*told: tuple[str, int, int]) -> list[Span]:
    """Stretches that grow and rise by so many bytes, from 100 on."""
    found, live = [], 100
    for name, growth, rise in told:
        parts = [Counter({"activations": size}) for size in (live, live + growth, live + rise)]
        found.append(Span(name, parts[0], parts[1], live + rise, parts[2], defaultdict(Counter)))
        live += growth
    return found


STEP = (
    ("before", 0, 0), ("forward 0", 10, 15), ("forward 1", 10, 15), ("forward 2", 10, 15), ("forward 3", 10, 15),
    ("head", 0, 50), ("copies end", 0, 0), ("backward", -10, 4), ("backward 2", -7, 4), ("backward 1", -7, 4),
    ("backward 0", -7, 4), ("graph ends", 0, 0),
)  # fmt: skip


def test_what_is_repeated_is_the_blocks_between() -> None:
    """Six blocks: 100 + 6 x 10, and 50 for the head; of each block 3 stay."""
    peak, left = depth.lengthened(spans(*STEP), 2, {"weights": 7}, {"activations": 3})
    assert (peak, left) == ({"activations": 210, "weights": 7}, {"activations": 6, "weights": 7})
    # Where each backward pass leaves more than it ends, the end is the largest.
    rising = [(name, 30 if name.startswith("backward ") else grown, rise) for name, grown, rise in STEP]
    assert depth.lengthened(spans(*rising), 2, {}, {"activations": 40})[0] == {"activations": 100 + 60 - 10 + 5 * 30}
    with pytest.raises(depth.UnevenError, match="is more than what they keep"):
        depth.lengthened(spans(*STEP), 2, {}, {})
    with pytest.raises(depth.UnevenError, match="another order"):
        depth.lengthened(spans(*STEP[:3], *STEP[4:]), 2, {}, {"activations": 3})
    uneven = [(name, grown, rise + (name == "forward 2")) for name, grown, rise in STEP]
    with pytest.raises(depth.UnevenError, match="do not all do the same"):
        depth.lengthened(spans(*uneven), 2, {}, {"activations": 3})


def test_what_ends_of_all_blocks_at_once_ends_there() -> None:
    def told(where: str) -> list[Span]:
        found = spans(*STEP)
        place = next(i for i, span in enumerate(found) if span.name == where)
        found[place].ended["forward 1"]["activations"] = found[place].ended["backward 2"]["activations"] = 3
        return found

    for where in ("copies end", "graph ends"):
        assert depth.lengthened(told(where), 2, {}, {})[1] == {"activations": 0}
    # Nobody could say whether that was before or after the head's peak.
    with pytest.raises(depth.UnevenError, match="something else goes on"):
        depth.lengthened(told("head"), 2, {}, {})


@pytest.mark.parametrize("most", [20, MOST_ROWS])
def test_the_largest_batch_takes_few_simulations(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of straight, bent and irregular costs it is the last batch that fits; beside the first guesses two are asked."""
    costs: dict[str, Callable[[int], int]] = {
        "straight": lambda n: 1000 + 70 * n,
        "bent": lambda n: max(5000, 1000 + 70 * n, 90 * n - 3000),
        "steps": lambda n: 1000 + 500 * (n // 8) + n,
    }
    for name, cost in costs.items():
        for budget in (900, 1100, 3000, 5100, 20_000, 200_000, 10**7):
            for first in (1, 2, 8):
                asked: list[int] = []
                found = Job.__new__(Job)
                found.encoded = [None] * most
                found._found = {(first, None): SimpleNamespace(peak=cost(first))}  # type: ignore[dict-item]

                def predict(size: int, asked: list[int] = asked, cost: Any = cost) -> Any:
                    asked.append(size)
                    return SimpleNamespace(peak=cost(size))

                monkeypatch.setattr(found, "predict", predict)
                largest = found.largest_batch(budget)
                wanted = max((n for n in range(1, most + 1) if cost(n) <= budget), default=0)
                assert largest == wanted, (name, budget, first)
                assert first not in asked and len(asked) == len(set(asked))
                if name == "straight":
                    assert len(asked) <= 4, (budget, asked)
                assert len(asked) <= 20, (name, budget, asked)
