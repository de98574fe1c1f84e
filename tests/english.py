"""What the engine says in English only, on purpose: to programs and at the command line, never on a page."""

from __future__ import annotations

MODULES = {
    f"engine/{name}.py"
    for name in (
        "__init__",
        "__main__",
        "auto",
        "compat",
        "inspection",
        "memory/depth",
        "metrics",
        "model",
        "model_state",
        "models/convert",
        "prefixes",
        "records",
        "resize",
        "rows",
        "stacked",
        "trainer",
    )
}
"""Nothing of what these say is met by somebody before a page: they are called wrongly by a program, or by hand."""

TEXTS = {
    # A method that was written wrongly.
    "{0} does not say what it adds to a layer's input",
    "{0} does not say what it adds to a layer's output",
    "{0} does not say what it changes",
    "{0} has no matrix A",
    "{0} has no matrix B",
    # Calls in the wrong order, or with something else.
    "Set it in AdaLoraConfig, or call engine.prepare_training(model, total_steps=...) before the first step.",
    "The weights are {0}; needed: a mapping of adapters' names to numbers.",
    "Write set_adapter_weights({'one': 0.7, 'two': 0.3}), or set_adapter([...]) for weights of 1.",
    "The rows have been read; no more can be added.",
    "Name the --out folder of `python -m engine train`; a run of the studio is told on its own page.",
    "{0} holds the adapter of one model, and models names {1}.",
    "Name the one.",
    "models names {0}; needed: some of {1}.",
    "{0} would be a pickle.",
    "Name it .safetensors.",
    "Name the file to write.",
    "Load the base in full precision and hand it over: merge_into_full(base).",
    "No adapter is active, so there is nothing to merge.",
    "Call set_adapter first.",
    "Hand the base over.",
    "{0} cannot answer: the model carries no adapters.",
    "Attach them with PeftModel.from_pretrained or load_adapter first.",
    "The model carries adapters, which were made for its weights.",
    "Call unload() first.",
    "No linear layer of {0} matches target_modules={1}.",
    "Linear layers that can be named: {0}.",
    "encoder_outputs is given, which the encoder made without the virtual tokens.",
    "Pass input_ids instead.",
    "A cache of fixed length has no room for virtual tokens.",
    "Leave cache_implementation out.",
    "{0} is not a mask of (rows, tokens); virtual tokens cannot be put before it.",
    "Pass a mask with two dimensions; when generating, leave cache_implementation out.",
    "The model is in training mode with gradient checkpointing, where transformers keeps no cache.",
    "Call model.eval() before generate().",
}
"""What modules say of which other texts are met on a page."""
