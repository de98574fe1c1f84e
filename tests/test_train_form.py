"""The Train form: what it is laid out with, and what it offers."""

from __future__ import annotations

from pathlib import Path

from studio import recipes, train_form
from studio.context import Studio
from studio.shell import create_app


def test_the_form_is_laid_out_with_the_first_preset(tmp_path: Path) -> None:
    studio = Studio.open(tmp_path)
    try:
        blocks = create_app(studio)
    finally:
        studio.close()
    by_id = {block.elem_id: block for block in blocks.blocks.values() if getattr(block, "elem_id", None)}
    task = recipes.task_of(train_form.TASK)
    preset = task.presets[train_form.START_PRESET]
    recipe = recipes.of_preset(task, preset)
    shown = recipes.shown_values(recipe)
    assert by_id["train-task"].value == task.name
    for owned in recipes.fields():
        widget = by_id["-".join(filter(None, ("field", owned.method or owned.task, owned.field.name)))]
        if owned.key in shown:
            assert widget.value == shown[owned.key] and widget.visible, owned
        elif not owned.method and not owned.task:
            assert not widget.visible, owned
    assert by_id["field-quantization"].value == recipe["quantization"]
