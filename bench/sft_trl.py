"""The peer of bench/sft.py: the same fine-tuning by TRL's SFTTrainer and PEFT, as a script of its own.

    python -m bench.sft_trl SETTINGS.json

Nothing of this project is imported. Prints one JSON object: the loss of each step, tokens and targets.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Train as the settings say, and save the adapter."""
    settings: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    dtype = torch.bfloat16 if settings["weights"] == "bf16" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    # The template in the model's folder, with the answer and its end marked as what is learned.
    tokenizer.chat_template = settings["template"]
    base = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype)
    model = get_peft_model(base, LoraConfig(**settings["lora"]))
    set_peft_model_state_dict(model, load_file(settings["start"]))
    lines = Path(settings["rows"]).read_text(encoding="utf-8").splitlines()
    config = SFTConfig(
        output_dir=settings["out"],
        num_train_epochs=1,
        per_device_train_batch_size=settings["batch"],
        learning_rate=settings["rate"],
        lr_scheduler_type="linear",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        assistant_only_loss=True,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
        **settings["trainer"],
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(settings["out"])
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    # The trainer counts a row's padding never, and a packed row's tokens all.
    labels = trainer.train_dataset["labels"]
    print(
        json.dumps(
            {
                "losses": [entry["loss"] for entry in logs],
                "norms": [float(entry["grad_norm"]) for entry in logs],
                "tokens": sum(len(row) for row in labels),
                "targets": sum(label != -100 for row in labels for label in row[1:]),
            }
        )
    )


if __name__ == "__main__":
    main()
