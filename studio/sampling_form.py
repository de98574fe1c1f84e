"""Seed and sampling, as every page offers them that asks a base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio.i18n import t


@dataclass
class Sampling:
    """The widgets: `words` is shown for bases that write, `drawing` for those that draw."""

    seed: gr.Number
    temperature: gr.Slider
    tokens: gr.Slider
    steps: gr.Slider
    guidance: gr.Slider
    words: gr.Row
    drawing: gr.Row

    @property
    def inputs(self) -> list[Any]:
        """In the order of `values`."""
        return [self.seed, self.temperature, self.tokens, self.steps, self.guidance]


def build(seed_info: str) -> Sampling:
    """Lay them out, closed; `seed_info` is said of the seed."""
    with gr.Accordion(t("Seed and sampling"), open=False):
        seed = gr.Number(0, precision=0, label=t("Seed"), info=seed_info)
        with gr.Row() as words:
            temperature = gr.Slider(
                0, 2, value=0.3, step=0.05, label=t("Temperature"), info=t("0 always takes the likeliest word.")
            )
            tokens = gr.Slider(8, 512, value=80, step=8, label=t("Most tokens"), info=t("Length of an answer."))
        with gr.Row(visible=False) as drawing:
            steps = gr.Slider(1, 100, value=20, step=1, label=t("Steps"), info=t("How often noise is taken away."))
            guidance = gr.Slider(0, 20, value=4, step=0.5, label=t("Guidance"), info=t("How much the words count."))
    return Sampling(seed, temperature, tokens, steps, guidance, words, drawing)


def values(seed: float | None, temperature: float, tokens: float, steps: float, guidance: float) -> dict[str, Any]:
    """The widgets' values as `engine.generation.Sampling` takes them."""
    return {
        "seed": abs(int(seed or 0)) % 2**31,
        "temperature": float(temperature),
        "max_new_tokens": int(tokens),
        "steps": int(steps),
        "guidance": float(guidance),
    }
