"""What is asked, as every page offers it that asks a base: a prompt or a picture, and the buttons to start and stop."""

from __future__ import annotations

from typing import NamedTuple

import gradio as gr


class Asking(NamedTuple):
    """The widgets; of prompt and picture the one is shown that the base reads."""

    prompt: gr.Textbox
    picture: gr.Image
    ask: gr.Button
    stop: gr.Button


def build(page: str, placeholder: str, ask: str, key: str = "") -> Asking:
    """Lay them out.

    Args:
        page: what their ids begin with.
        placeholder: stands in the empty prompt.
        ask: the words on the button.
        key: the end of the button's id, the same in every language; by default the words in lower case.
    """
    prompt = gr.Textbox(label="Prompt", lines=2, max_lines=8, placeholder=placeholder, elem_id=f"{page}-prompt")
    picture = gr.Image(
        label="Picture to describe",
        type="filepath",
        sources=["upload", "clipboard"],
        height=220,
        visible=False,
        elem_id=f"{page}-picture",
    )
    with gr.Row():
        asking = gr.Button(ask, variant="primary", elem_id=f"{page}-{key or ask.lower()}", scale=2)
        stop = gr.Button("Stop", interactive=False, elem_id=f"{page}-stop", scale=1)
    return Asking(prompt, picture, asking, stop)
