"""Writes docs/jobs.md from the dataclasses of a job and its tasks: `python scripts/jobs_page.py`.

`tests/test_jobs_page.py` holds the page to what this makes.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.adapters import ADAPTERS  # noqa: E402
from engine.tasks import TASKS, get_task  # noqa: E402
from engine.train.job import DataSpec, JobSpec, TrainingSpec  # noqa: E402

PAGE = ROOT / "docs" / "jobs.md"
EXAMPLE = ROOT / "examples" / "first_lora_tiny.yaml"
HEAD = """# Jobs

A job is everything one run needs, as YAML or JSON. The Train form shows its own as YAML, and takes one; a run's folder
keeps the one it ran with as `spec.yaml`; `/submit_run` ([api.md](api.md)) takes the same keys. This page is made from
the code by `python scripts/jobs_page.py`; do not edit it by hand.

```yaml
{example}
```

```bash
python -m engine train JOB.yaml --out out/mine            # --resume goes on, --processes N shares each step (scale.md)
python -m engine doctor --fit JOB.yaml                    # will it fit? (memory.md)
python -m engine eval JOB.yaml --adapter out/mine/adapter # scores on the rows held back
python -m engine doctor --run out/mine                    # what its curve says (live.md)
```

Every fault of a job is named at once, with the key, the value and what was needed. A key that is not known is a fault.
"""
FOOT = """## Answers without a job

`python -m engine generate --model MODEL [--adapter FOLDER ...]` answers once by the base and once by each adapter:
`--prompt` for words, `--image` for captions of a picture; with a Stable Diffusion base `--prompt` draws, into the
folder that `--out` names. `--temperature 0` takes the likeliest token; `--beams` is for T5-like models and captions,
`--steps` and `--guidance` for pictures. `--json` prints one result a line.
"""


def meanings(kind: type[Any]) -> dict[str, str]:
    """Field -> what its class's docstring says of it under `Attributes:`."""
    text = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if begun := re.match(r"    (\w+): (.*)", line):
            name = begun[1]
            found[name] = begun[2]
        elif name and line.startswith("        "):
            found[name] += " " + line.strip()
        elif line.strip():
            break
    return found


def table(kind: type[Any]) -> list[str]:
    """One row a field: its key in a job, its default and its meaning."""
    told = meanings(kind)
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(kind):
        key = field.metadata.get("option", field.name)
        text = re.sub(r"^\(`\w+` in a job\) ", "", told[field.name]).replace("|", "\\|")
        rows.append(f"| `{key}` | {_default(field)} | {text} |")
    return rows


def _default(field: dataclasses.Field[Any]) -> str:
    """As YAML writes it."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "needed"
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if dataclasses.is_dataclass(value) or value in (None, "", (), {}):
        return ""
    plain = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{plain}`"


def page() -> str:
    example = EXAMPLE.read_text(encoding="utf-8").partition("\n")[2].strip()
    methods = ", ".join(f"`{name}`" for name in ADAPTERS)
    lines = [HEAD.format(example=example), "## The job", "", *table(JobSpec), ""]
    lines += ["## data", "", *table(DataSpec), ""]
    lines += ["## adapter", "", f"`method` is one of {methods}.", ""]
    lines += ["The other keys are its fields ([methods.md](methods.md)). Left out: LoRA with its defaults.", ""]
    lines += ["## training", "", "A step is `batch_size * gradient_accumulation` rows.", "", *table(TrainingSpec), ""]
    lines += ["## options", "", "The task's own settings.", ""]
    for name in TASKS:
        task = get_task(name)
        formats = ", ".join(f"`{format}`" for format in task.formats)
        lines += [f"### {name}", "", f"Formats of rows: {formats} ([data.md](data.md)).", "", *table(type(task)), ""]
    return "\n".join([*lines, FOOT])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
