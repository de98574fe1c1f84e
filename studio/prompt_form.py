"""What is asked, as every page offers it that asks a base: a prompt or a picture, and the buttons to start and stop."""

from __future__ import annotations

from typing import NamedTuple

import gradio as gr

from studio.i18n import t


class Asking(NamedTuple):
    """The widgets; of prompt and picture the one is shown that the base reads."""

    prompt: gr.Textbox
    picture: gr.Image
    ask: gr.Button
    stop: gr.Button


def build(page: str, placeholder: str, name: str, ask: str) -> Asking:
    """Lay them out: what is asked, then the buttons.

    Args:
        page: what their ids begin with.
        placeholder: stands in the empty prompt.
        name: the end of the button's id.
        ask: the words on the button.
    """
    return Asking(*question(page, placeholder), *buttons(page, name, ask))


def question(page: str, placeholder: str) -> tuple[gr.Textbox, gr.Image]:
    """The prompt, and the picture that is hidden until a base reads pictures. `page` is what their ids begin with."""
    prompt = gr.Textbox(label=t("Prompt"), lines=2, max_lines=8, placeholder=placeholder, elem_id=f"{page}-prompt")
    picture = gr.Image(
        label=t("Picture to describe"),
        type="filepath",
        sources=["upload", "clipboard"],
        height=220,
        visible=False,
        elem_id=f"{page}-picture",
    )
    return prompt, picture


def buttons(page: str, name: str, ask: str) -> tuple[gr.Button, gr.Button]:
    """Start and stop, their ids `page-name` and `page-stop`; `ask` are the words that start."""
    with gr.Row():
        asking = gr.Button(ask, variant="primary", elem_id=f"{page}-{name}", scale=2)
        stop = gr.Button(t("Stop"), interactive=False, elem_id=f"{page}-stop", scale=1)
    return asking, stop
