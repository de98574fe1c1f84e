"""docs/benchmarks.md says what the benchmarks measured, and what they share measures what it says."""

from __future__ import annotations

import json
import math
import random
import sys
from typing import Any

import pytest

from bench import activations, bench_page, live_cost, measuring, sft
from studio import live_stream


def _results(**rows: Any) -> dict[str, Any]:
    about = {"date": "2026-01-02", "threads": 1, "cores": 2, "processor": "a processor", "memory": 2**34}
    about |= {"system": "Linux", "python": "3.11", "packages": {"peft": "0.21.2"}, "command": "python -m bench.x"}
    return {name: {**about, **found} for name, found in rows.items()}


def test_the_page_is_what_the_results_make() -> None:
    results = json.loads(bench_page.RESULTS.read_text(encoding="utf-8"))
    assert bench_page.PAGE.read_text(encoding="utf-8") == bench_page.page(results), "run python -m bench --draw"


def test_rows_that_miss_their_target_stay_and_what_is_missing_is_named() -> None:
    lost = measuring.row("slow", [3.0, 4.0, 5.0], [2.0, 2.0, 2.0], 1.0, "s")
    won = measuring.row("fast", [2**20], [2**21], 0.5, "bytes", "a note")
    text = bench_page.page(_results(step={"rows": [lost, won]}, sft={"left_out": "it ended with status 1"}))
    assert "1 of 2 targets are met" in text
    assert "| slow | 4.00 s | 2.00 s | 2.000 (1.500 to 2.500) | 1.00 | **no** |" in text
    assert "| fast | 1.0 MiB | 2.0 MiB | 0.500 | 0.50 | yes |" in text and "- fast: a note." in text
    missing = text.split("## Not measured")[1]
    assert "(`bench.sft`): it ended with status 1." in missing and "(`bench.instant`): not run yet." in missing


def test_both_sides_take_turns() -> None:
    order: list[str] = []

    def side(name: str) -> str:
        order.append(name)
        return name

    found = measuring.in_turns(lambda: side("a"), lambda: side("b"), 3)
    assert "".join(order) == "abbaab" and found == (["a"] * 3, ["b"] * 3)


def test_a_process_is_measured_and_a_failed_one_is_told() -> None:
    # Measured from a small process, since a large one's memory would count.
    inner = "[sys.executable, '-c', 'held = bytearray(300_000_000)']"
    script = f"import sys; from bench.measuring import run_child; print(run_child({inner}).peak)"
    assert 0.3e9 < int(measuring.run_child([sys.executable, "-c", script]).output) < 0.35e9
    with pytest.raises(SystemExit, match="the reason"):
        measuring.run_child([sys.executable, "-c", "raise SystemExit('the reason')"])


def test_the_frozen_block_keeps_what_its_formula_says_and_nothing_hides() -> None:
    import torch

    class Hiding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.hidden = x * 2
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad

    base = activations.block(whole=False)
    wide, inner = (activations.TOKENS * width * 2 for width in (activations.WIDTH, activations.INNER))
    # Two norms' inputs; gate, its activation and up.
    plain = activations.kept(base)
    assert plain == pytest.approx(2 * wide + 3 * inner, rel=0.01)

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = base

        def forward(self, x: torch.Tensor) -> Any:
            return self.inner(Hiding.apply(x))

    # What the node hides; the first norm's input is then a tensor of the pass as before.
    assert activations.kept(Wrapped()) == pytest.approx(plain + wide, rel=0.01)


def test_the_marked_template_makes_the_same_text() -> None:
    from jinja2 import Environment
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
        "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    texts, spans = render_jinja_template([chat], chat_template=sft.marked(template), return_assistant_tokens_mask=True)
    assert texts[0] == Environment().from_string(template).render(messages=chat)
    assert [texts[0][start:end] for start, end in spans[0]] == ["So.<|im_end|>"]
    with pytest.raises(SystemExit, match="chat template"):
        sft.marked("{{ messages }}")


@pytest.mark.parametrize("cost", [0.0, 0.012, 0.024])
def test_what_a_told_costs_the_training_is_found_below_its_noise(cost: float) -> None:
    drawn, now, told, moments, news = random.Random(1), 0.0, 1.0, [], []
    while now < 1800:
        # Steps of 80 ms, of which a seventh is noise, in a machine whose speed goes up and down by a fifth in a minute.
        step = max(0.03, drawn.gauss(0.08, 0.012)) * (1 + 0.1 * math.sin(now / 10))
        while told < now + step:
            step += cost
            news.append(told)
            told += live_stream.EVERY
        now += step
        moments.append(now)
    span = live_cost.Span("here", 0.0, 1800.0, news=news)
    found = live_cost._mean([loss / live_stream.EVERY for loss in live_cost.lost(moments, span)])
    low, high = found["interval"]
    assert abs(found["mean"] - cost / live_stream.EVERY) < 0.004 and low < cost / live_stream.EVERY < high < low + 0.01
