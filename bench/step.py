"""One training step and one merge, ours against PEFT, for every method that both have; and ours over the frozen base.

    python -m bench.step [NAME ...] [--rounds 7] [--tokens 256] [--precision auto] [--json FILE]

A step is forward, backward, the optimizer and what the method does after it, on one fixed row of SmolLM2-135M, called
as a script calls either library: `model(input_ids=..., labels=...)`. Both start from copies of one base and take turns;
PEFT trains with torch's fused AdamW, ours with what our loop takes. `base` is the frozen base's own forward and
backward with embeddings whose gradient is wanted, and no optimizer.
"""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.measuring import Timing, command_line, in_turns, timed, timing_row, told
from engine import threads
from engine.models import DEFAULT

TEXT = (
    "A lighthouse keeper climbs the stairs each evening and trims the lamp, so that ships far out at sea may know "
    "where the rocks are. "
)
_LINEAR = {"target_modules": "all-linear"}
_LORA = {"r": 8, "lora_alpha": 16, **_LINEAR}
_TOKENS = {"num_virtual_tokens": 20}
_STEPS = 1000
"""Of the whole training, as AdaLoRA's schedule needs it."""


@dataclass(frozen=True)
class Method:
    """A row: the config's name in both libraries, its fields, the target, and whether it starts as the base."""

    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    target: float = 1.0
    same_start: bool = True
    optimizer: str = "adamw"


METHODS = {
    "lora": Method("LoraConfig", _LORA, 0.9),
    "lora + dropout": Method("LoraConfig", {**_LORA, "lora_dropout": 0.05}, 0.85),
    "dora": Method("LoraConfig", {**_LORA, "use_dora": True}, 0.6),
    "dora + dropout": Method("LoraConfig", {**_LORA, "use_dora": True, "lora_dropout": 0.05}, 0.6),
    "pissa": Method("LoraConfig", {**_LORA, "init_lora_weights": "pissa_niter_4"}),
    "lora-fa": Method("LoraConfig", _LORA, optimizer="lorafa"),
    "adalora": Method(
        "AdaLoraConfig", {"init_r": 12, "target_r": 8, "total_step": _STEPS, "lora_alpha": 16, **_LINEAR}
    ),
    "ia3": Method(
        "IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    ),
    "vera": Method("VeraConfig", {"r": 256, **_LINEAR}),
    "loha": Method("LoHaConfig", {"r": 8, "alpha": 16, **_LINEAR}),
    "lokr": Method("LoKrConfig", {"r": 8, "alpha": 16, **_LINEAR}),
    "prompt tuning": Method("PromptTuningConfig", _TOKENS, same_start=False),
    "p-tuning": Method("PromptEncoderConfig", {**_TOKENS, "encoder_hidden_size": 128}, same_start=False),
    "prefix tuning": Method("PrefixTuningConfig", _TOKENS, same_start=False),
}
NAMES = (*METHODS, "base", "merge")


class Bench:
    """The base, the row, and both sides' steps on copies of them."""

    def __init__(self, tokens: int, precision: str) -> None:
        threads.apply(None)
        import torch

        from engine.models.loading import load_causal_lm

        self.base, tokenizer = load_causal_lm(DEFAULT, precision=precision)
        ids = tokenizer(TEXT * (tokens // 20 + 1), add_special_tokens=False)["input_ids"][:tokens]
        self.ids = torch.tensor([ids], device=self.base.device)
        self.type = str(self.base.dtype).removeprefix("torch.")

    def attached(self, library: str, method: Method) -> Any:
        """A copy of the base with the method's adapter, in training mode."""
        import peft
        import torch

        import engine

        found: Any = engine if library == "ours" else peft
        torch.manual_seed(0)
        config = getattr(found, method.config)(task_type=found.TaskType.CAUSAL_LM, **method.fields)
        model = found.get_peft_model(copy.deepcopy(self.base), config)
        model.train()
        return model

    def stepper(self, library: str, method: Method) -> Callable[[], float]:
        """What takes one training step and returns its loss."""
        model = self.attached(library, method)
        optimizer = _optimizer(library, method, model)
        after = _after_step(library, method, model)
        done = 0

        def step() -> float:
            nonlocal done
            loss = model(input_ids=self.ids, labels=self.ids).loss
            loss.backward()
            optimizer.step()
            done += 1
            after(done)
            optimizer.zero_grad(set_to_none=True)
            return float(loss.detach())

        return step

    def frozen(self) -> Callable[[], float]:
        """The base's own forward and backward."""
        model = copy.deepcopy(self.base).requires_grad_(False).train()

        def step() -> float:
            embeddings = model.get_input_embeddings()(self.ids).requires_grad_(True)
            loss = model(inputs_embeds=embeddings, labels=self.ids).loss
            loss.backward()
            return float(loss.detach())

        return step


def _optimizer(library: str, method: Method, model: Any) -> Any:
    import torch

    if method.optimizer == "lorafa":
        if library == "ours":
            from engine import create_lorafa_optimizer
        else:
            from peft.optimizers import create_lorafa_optimizer
        return create_lorafa_optimizer(model=model, r=8, lora_alpha=16, lr=2e-4)
    if library == "ours":
        from engine.train.job import TrainingSpec
        from engine.train.optim import make_optimizer

        return make_optimizer(model.adapter_parameters(), TrainingSpec())
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0, fused=True)


def _after_step(library: str, method: Method, model: Any) -> Callable[[int], Any]:
    if library == "ours":
        from engine.hooks import after_step, prepare_training

        prepare_training(model, total_steps=_STEPS)
        return lambda step: after_step(model, "default", step)
    if method.config == "AdaLoraConfig":
        return lambda step: model.base_model.update_and_allocate(step)
    return lambda step: None


def step_row(bench: Bench, name: str, rounds: int) -> dict[str, Any]:
    """A method's step, ours over PEFT's."""
    method = METHODS[name]
    mine, other = bench.stepper("ours", method), bench.stepper("peft", method)
    # The first steps fill caches; there both have the base's loss if the method starts as the base.
    losses = mine(), other()
    if method.same_start and abs(losses[0] / losses[1] - 1) > 0.01:
        raise SystemExit(f"{name}: not the same model: the first loss is {losses[0]} here, {losses[1]} in PEFT.")
    note = f"first loss {losses[0]:.3f} and {losses[1]:.3f}"
    return timing_row(f"Train step: {name}", *_turns(mine, other, rounds), method.target, note)


def base_row(bench: Bench, rounds: int) -> dict[str, Any]:
    """LoRA's step over the frozen base's forward and backward."""
    mine, other, frozen = bench.stepper("ours", METHODS["lora"]), bench.stepper("peft", METHODS["lora"]), bench.frozen()
    for warm in (mine, other, frozen):
        warm()
    theirs, below = _turns(other, frozen, rounds)
    note = f"PEFT's step {timing_row('', theirs, below, 1.0)['ratio']:.3f} times the base's"
    return timing_row("Train step: lora over the frozen base", *_turns(mine, frozen, rounds), 1.12, note)


def merge_row(bench: Bench, rounds: int) -> dict[str, Any]:
    """`merge_and_unload` of a LoRA whose B is not zero."""
    import torch

    def merging(library: str) -> Callable[[], Timing]:
        def once() -> Timing:
            model = bench.attached(library, METHODS["lora"])
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    if "lora_B" in parameter_name:
                        parameter.fill_(0.001)
            return timed(model.merge_and_unload)

        return once

    sides = merging("ours"), merging("peft")
    for warm in sides:
        warm()
    return timing_row("Merge and unload: lora", *in_turns(*sides, rounds), 1.0)


def _turns(mine: Callable[[], Any], other: Callable[[], Any], rounds: int) -> tuple[list[Timing], list[Timing]]:
    return in_turns(lambda: timed(mine), lambda: timed(other), rounds)


def rows(
    names: Sequence[str] = (), rounds: int = 7, tokens: int = 256, precision: str = "auto"
) -> list[dict[str, Any]]:
    """The rows of these names, or all.

    Raises:
        SystemExit: an unknown name, or a first loss that differs from PEFT's.
    """
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise SystemExit(f"There is no row {', '.join(map(repr, unknown))}; there are: {', '.join(NAMES)}.")
    bench = Bench(tokens, precision)
    found = []
    for name in names or NAMES:
        special = {"base": base_row, "merge": merge_row}
        one = special[name](bench, rounds) if name in special else step_row(bench, name, rounds)
        one["note"] += f"; {bench.type}, {bench.ids.numel()} tokens"
        found.append(one)
        print(told(one), file=sys.stderr, flush=True)
        gc.collect()
    return found


if __name__ == "__main__":
    command_line(
        __doc__,
        rows,
        ("names", {"nargs": "*", "metavar": "NAME", "help": f"of: {', '.join(NAMES)}"}),
        ("--rounds", {"type": int, "default": 7}),
        ("--tokens", {"type": int, "default": 256}),
        ("--precision", {"default": "auto", "choices": ("auto", "fp32", "bf16")}),
    )
