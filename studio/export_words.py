"""The forms in which adapters leave the studio as the page names them, and why one is not to be had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine import llamacpp
from studio import mixing
from studio.adapter_words import method
from studio.i18n import N_, t
from studio.markup import esc

FORMS = {
    "peft": (N_("PEFT zip"), N_("The adapter alone, for PEFT, transformers and this studio.")),
    "merged": (
        N_("Merged model"),
        N_("The base with the adapter in its weights: a folder that needs neither PEFT nor us."),
    ),
    "gguf": (
        N_("GGUF model"),
        N_("The base with the adapter in its weights: one file for llama.cpp and what is built on it."),
    ),
    "gguf-adapter": (N_("GGUF adapter"), N_("The LoRA alone, which llama.cpp puts over its base (--lora).")),
    "kohya": (N_("kohya file"), N_("For A1111, Forge and ComfyUI.")),
    "diffusers": (N_("diffusers file"), N_("For diffusers' load_lora_weights.")),
}
FILE_METHODS = {
    "kohya": ("lora", "dora", "loha", "lokr"),
    "diffusers": ("lora", "dora", "lokr"),
    "gguf-adapter": llamacpp.ADAPTERS,
}
"""Methods that a form has a place for."""

PRECISIONS = {
    "f16": N_("f16 - 16 bits"),
    "bf16": N_("bf16 - 16 bits, larger numbers"),
    "f32": N_("f32 - 32 bits, exact"),
    "q8_0": N_("Q8_0 - 8 bits, half the size"),
}
_TEXTS = ("causal_lm", "preference")


def export_refusal(row: Mapping[str, Any], form: str) -> str:
    """Why an adapter cannot be exported so; "" where it can."""
    if form == "peft":
        return ""
    if form in ("merged", "gguf") and row["method"] in mixing.PROMPTS:
        return t("Virtual tokens change no weight that it could be merged into.")
    if form == "merged":
        return ""
    if form in ("gguf", "gguf-adapter"):
        why = _no_gguf(row)
    else:
        why = "" if row["task"] == "text_to_image" else t("Such files are for Stable Diffusion.")
    if why or form == "gguf":
        return why
    if row["method"] not in FILE_METHODS[form]:
        return t("The format has no place for {method}.", method=method(row["method"]))
    whole = row["details"].get("whole")
    return t("The format has no place for what it trains in full ({names}).", names=whole) if whole else ""


def _no_gguf(row: Mapping[str, Any]) -> str:
    """Why nothing of an adapter's base becomes GGUF."""
    if not llamacpp.installed():
        return t("The converter is not installed. It comes with: {command}", command=llamacpp.INSTALL)
    if row["task"] not in _TEXTS:
        return t("Such files are for models that write texts, of the Llama family.")
    family = llamacpp.base_config(row["base"]).get("model_type", llamacpp.FAMILIES[0])
    if family not in llamacpp.FAMILIES:
        return t("Only models of the Llama family are converted; {base} is {family}.", base=row["base"], family=family)
    return ""


def exports(row: Mapping[str, Any]) -> str:
    """What each form is for, and why some are not to be had."""
    parts = []
    for form, (title, meaning) in FORMS.items():
        why = export_refusal(row, form)
        not_here = f" <em>{esc(t('Not here: {why}', why=why))}</em>" if why else ""
        parts.append(f"<li><b>{esc(t(title))}</b> {esc(t(meaning))}{not_here}</li>")
    return f'<ul class="ad-forms">{"".join(parts)}</ul>'


def asked_to_push(row: Mapping[str, Any], place: str, private: bool, what: str, files: Sequence[str]) -> str:
    """What would be uploaded and where, for whoever has to say yes."""
    if what == "merged":
        told = t("the whole model: {base} with {name} in its weights", base=row["base"], name=row["name"])
    else:
        told = t("the adapter {name}: {files}", name=row["name"], files=", ".join(files))
    seen = t("Only you, and who you let, can see it.") if private else t("Everybody can see and download it.")
    asked = t("Upload {what}?", what=told)
    where = t("To {place}, a new repository, with a model card.", place=place)
    return f'<p class="st-count"><b>{esc(asked)}</b></p><p class="st-hint">{esc(where)} {esc(seen)}</p>'
