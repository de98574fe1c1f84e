"""Which class answers for a task: each holds one base in memory with adapters that come and go."""

from __future__ import annotations

from typing import Any


def answerer_class(task: str) -> Any:
    """`Painter`, `Captioner`, `Labeller`, or `Answerer` for all that write texts; imported when asked for."""
    if task == "text_to_image":
        from engine.painting import Painter

        return Painter
    if task == "captioning":
        from engine.captioning import Captioner

        return Captioner
    if task == "classification":
        from engine.labelling import Labeller

        return Labeller
    from engine.generation import Answerer

    return Answerer
