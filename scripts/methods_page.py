"""Writes docs/methods.md from the registry and presets/methods: `python scripts/methods_page.py`.

`tests/test_methods_page.py` holds the page to what this makes.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.adapters import ADAPTERS  # noqa: E402
from engine.adapters.base import AdapterSpec  # noqa: E402
from engine.inspection import count  # noqa: E402
from studio import forms, presets  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
REFERENCE = "smollm2-135m-instruct"
HEAD = """# Methods

One section a method, made from the registry (`engine.adapters.ADAPTERS`) and `presets/methods` by
`python scripts/methods_page.py`; do not edit it by hand. Parameters and file sizes are counted on the shapes of
SmolLM2-135M (134,515,008 parameters) with the defaults of the form.

Short advice: **LoRA** on all linear layers is the right start for nearly everything. **DoRA** where its rank must stay
small; **LoHa** and **LoKr** for Stable Diffusion styles; **IA3** and **VeRA** where many adapters must be kept; the
prompt methods where the base may not be touched at all; **QA-LoRA** where the merged model must stay quantised.

LoRA's variants that are settings, not methods of their own:

| setting | what it is |
|---|---|
| `use_rslora: true` | scale alpha / sqrt(r), for high ranks ([paper](https://arxiv.org/abs/2312.03732)) |
| `init_lora_weights: pissa` | starts from the largest singular values ([paper](https://arxiv.org/abs/2404.02948)) |
| `init_lora_weights: pissa_niter_N` | the same, fast: a randomised SVD with N iterations |
| `init_lora_weights: olora` | starts from a QR decomposition ([paper](https://arxiv.org/abs/2406.01775)) |
| `init_lora_weights: orthogonal`, `gaussian` | other starts of A and B |
| `training.loraplus_ratio: 16` | LoRA+: B learns faster than A ([paper](https://arxiv.org/abs/2402.12354)) |
"""


def defaults(name: str) -> dict[str, object]:
    """The adapter section of a job as the form starts it."""
    form = presets.methods()[name]
    plain = {field.name: forms.read_default(field) for field in form.fields}
    return {"method": name, **{key: value for key, value in plain.items() if value is not None}}


def formula(spec: AdapterSpec) -> str:
    """The first indented block of the text at the head of the method's module."""
    text = importlib.import_module(ADAPTERS.module_of(spec.name)).__doc__ or ""
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("    "):
            lines.append(line[4:].rstrip())
        elif lines and line.strip():
            break
    return "\n".join(lines).strip("\n")


def table() -> list[str]:
    rows = [
        "| method | learns | share of the base | file | merges | mixes | layers |",
        "|---|---:|---:|---:|---|---|---|",
    ]
    for name, spec in ADAPTERS.items():
        found = count(REFERENCE, defaults(name))
        kinds = ", ".join(spec.layers) or "whole model"
        rows.append(
            f"| [{spec.title}](#{anchor(spec.title)}) | {found['trainable']:,} | {found['share'] * 100:.3f} % "
            f"| {found['adapter_bytes'] / 1e6:.2f} MB | {yes(spec.mergeable)} | {yes(spec.mixable)} | {kinds} |"
        )
    return rows


def anchor(title: str) -> str:
    kept = "".join(ch for ch in title.lower() if ch.isalnum() or ch in " -")
    return kept.replace(" ", "-")


def yes(flag: bool) -> str:
    return "yes" if flag else "no"


def section(name: str, spec: AdapterSpec) -> list[str]:
    form = presets.methods()[name]
    fields = [item.name for item in dataclasses.fields(spec.config)]
    return [
        f"## {spec.title}",
        "",
        f"{form.meaning} [Paper]({spec.paper}).",
        "",
        f"**When:** {form.when}",
        "",
        "```",
        formula(spec),
        "```",
        "",
        f"- In a job: `adapter: {{method: {name}, ...}}`; in a script: `{spec.config.__name__}`.",
        f"- Fields: {', '.join(f'`{field}`' for field in fields)}.",
        f"- Presets: {'; '.join(f'**{key}** {settings(value)}' for key, value in form.presets.items())}.",
        f"- Formats: {', '.join(spec.formats)}.",
        "",
    ]


def settings(values: object) -> str:
    assert isinstance(values, dict)
    return ", ".join(f"`{key}: {value}`" for key, value in values.items())


def page() -> str:
    lines = [HEAD, *table(), ""]
    for name, spec in ADAPTERS.items():
        lines += section(name, spec)
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
