"""The model card (`README.md`) that goes with what leaves the studio, and the folder that is pushed to the hub.

A card is English and says what the adapter is and how to open it. Nothing of this machine stands in it: no path, no
name of a data set.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from engine.models.catalogue import BUILTIN, portable
from studio import adapter_files, presets, scores

CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PIPELINES = {
    "causal_lm": "text-generation",
    "preference": "text-generation",
    "seq2seq": "text2text-generation",
    "classification": "text-classification",
    "captioning": "image-to-text",
    "text_to_image": "text-to-image",
}
_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "preference": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "captioning": "AutoModelForImageTextToText",
}
_IN_PEFT = ("adalora", "dora", "ia3", "loha", "lokr", "lora", "lorafa", "p_tuning", "prefix_tuning", "prompt_tuning")
_LOCAL = "local"
"""What a base is called elsewhere that has no name but its folder's."""


def base_name(base: str) -> tuple[str, bool]:
    """(a base's name for others, whether the hub has it): a folder of this machine is its last part."""
    name = portable(base)
    if name in BUILTIN:
        return name, False
    if _HUB_ID.fullmatch(name) and not Path(name).exists():
        return name, True
    return Path(name).name or _LOCAL, False


def card(row: Mapping[str, Any], what: str, place: str = "") -> str:
    """The card of an adapter.

    Args:
        row: of the library.
        what: `adapter`, or `merged` for the base with it in its weights.
        place: the repository that it goes to, for the example; "" where it goes to none.
    """
    base, on_hub = base_name(row["base"])
    head: dict[str, Any] = {
        **({"base_model": base} if on_hub else {}),
        "library_name": _library(row, what),
        **({"pipeline_tag": _PIPELINES[row["task"]]} if row["task"] in _PIPELINES else {}),
        "tags": ["adapter-studio", row["method"], *(["merged"] if what == "merged" else [])],
    }
    form = presets.methods().get(row["method"])
    facts = [
        ("Base model", f"[{base}](https://huggingface.co/{base})" if on_hub else _plain(base)),
        ("Method", _plain(form.title if form else row["method"])),
        ("Rank", row["rank"]),
        ("Changes", _plain(row["targets"])),
        ("Parameters of the adapter", f"{row['parameters']:,}" if row["parameters"] else ""),
        ("Score", _plain(_score(row["score"]))),
    ]
    lines = "\n".join(f"- **{name}:** {value}" for name, value in facts if value)
    kind = "{} with an adapter in its weights" if what == "merged" else "An adapter for {}"
    notes = "" if on_hub or what == "merged" else "\nIts base is not on the hub under this name.\n"
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n# {_plain(row['name'])}\n\n"
        f"{kind.format(_plain(base))}, made with Adapter Studio.\n{notes}\n{lines}\n\n{_use(row, what, base, place)}"
    )


def _library(row: Mapping[str, Any], what: str) -> str:
    if row["task"] == "text_to_image":
        return "diffusers"
    return "transformers" if what == "merged" else "peft"


def _plain(value: Any) -> str:
    """A text on one line, with nothing that Markdown or HTML would read."""
    return (
        re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(str(value).split())) if "](" not in str(value) else str(value)
    )


def _score(score: Mapping[str, Any] | None) -> str:
    if not score:
        return ""
    told = f"{scores.metric(score['metric']).title} {score['value']:.4g}"
    return told if score["base"] is None else f"{told} (base {score['base']:.4g}), on rows held back"


def _use(row: Mapping[str, Any], what: str, base: str, place: str) -> str:
    """How to open it, where other libraries can."""
    where, made = json.dumps(place or "FOLDER"), _CLASSES.get(row["task"])
    if what == "merged" and made:
        code = f"from transformers import {made}\n\nmodel = {made}.from_pretrained({where})"
    elif what == "merged":
        code = f"from diffusers import DiffusionPipeline\n\npipeline = DiffusionPipeline.from_pretrained({where})"
    elif made and row["method"] in _IN_PEFT:
        code = (
            f"from peft import PeftModel\nfrom transformers import {made}\n\n"
            f"model = PeftModel.from_pretrained({made}.from_pretrained({json.dumps(base)}), {where})"
        )
    else:
        code = (
            f'from engine import PeftModel  # of Adapter Studio\n\nmodel = PeftModel.from_pretrained(base, "{where}")'
        )
    return f"## Use\n\n```python\n{code}\n```\n"


def adapter_names(folder: Path) -> list[str]:
    """The files of an adapter that are uploaded, as names below its folder: those of the format, and nothing else."""
    single = (adapter_files.CONFIG, adapter_files.WEIGHTS, adapter_files.ENCODER, *adapter_files.SIDECARS)
    beside = [
        f"{encoder}/{name}"
        for encoder in adapter_files.ENCODERS
        for name in (adapter_files.CONFIG, adapter_files.WEIGHTS)
    ]
    names = (*single, *beside, "pytorch_lora_weights.safetensors")
    return [name for name in names if (folder / name).is_file()]


def lay_out_adapter(row: Mapping[str, Any], source: Path, place: Path, repository: str) -> None:
    """Copy an adapter's files and its card into a folder to be uploaded; a path of this machine is taken out.

    Raises:
        CheckpointError: a file cannot be read.
    """
    for name in adapter_names(source):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        if Path(name).name == adapter_files.CONFIG:
            config = adapter_files.read_json(source / name)
            config["base_model_name_or_path"] = base_name(row["base"])[0]
            for key in ("tokenizer_name_or_path",):
                if config.get(key):
                    config[key] = base_name(config[key])[0]
            (place / name).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(source / name, place / name)
    (place / CARD).write_text(card(row, "adapter", repository), encoding="utf-8")


def finish_merged(row: Mapping[str, Any], place: Path, repository: str = "") -> None:
    """Give a merged model's folder its card, and take a path of this machine out of its config."""
    for path in place.rglob("config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (place / CARD).write_text(card(row, "merged", repository), encoding="utf-8")
