"""Fine-tuning end to end, ours against TRL and PEFT: wall time and peak resident memory of whole processes.

    python -m bench.sft [--pairs 3] [--chats 128] [--setting "bf16, padded"] [--json FILE]

Both sides learn the same chats in the same order and batches, with the same start of the adapter, learning rate and
schedule, on the same targets (the assistant's words), and save the adapter. Ours is `python -m engine train`, the peer
`bench/sft_trl.py`. The peer takes part with the fastest of its `SETTINGS`, found in a short trial before. What both
counted as tokens and targets is compared, and so are their losses: the numbers mean nothing unless both did the same.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.measuring import ROOT, Measured, command_line, in_turns, row, run_child
from engine.models import DEFAULT

CHATS = ROOT / "examples" / "lighthouse.jsonl"
BATCH, RATE, TRIAL = 8, 2e-4, 24
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}
_FLAT = {"padding_free": True, "max_length": None}
_PADDED = {"max_length": 512}
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32, padded": {"weights": "fp32", "trainer": {"bf16": False, **_PADDED}},
    "fp32, padding-free": {"weights": "fp32", "trainer": {"bf16": False, **_FLAT}},
    "bf16, padded": {"weights": "bf16", "trainer": {"bf16": True, **_PADDED}},
    "bf16, padding-free": {"weights": "bf16", "trainer": {"bf16": True, **_FLAT}},
    "bf16 without autocast, padded": {"weights": "bf16", "trainer": {"bf16": False, **_PADDED}},
    "bf16 without autocast, padding-free": {"weights": "bf16", "trainer": {"bf16": False, **_FLAT}},
}
"""What TRL is tried with. `packing=True` lays rows end to end as `padding_free` does, but into other batches."""


def job(chats: Path) -> dict[str, Any]:
    """Our job over a file of chats: no rows held back, no checkpoints, as in the peer."""
    return {
        "task": "causal_lm",
        "model": DEFAULT,
        "data": {"path": str(chats), "format": "messages", "eval_split": 0},
        "adapter": {"method": "lora", **LORA},
        "training": {
            "epochs": 1,
            "batch_size": BATCH,
            "learning_rate": RATE,
            "schedule": "linear",
            "warmup_ratio": 0,
            "max_length": 512,
            "loss_on": "answers",
            "eval_every": 1_000_000,
            "checkpoint_every": 1_000_000,
        },
    }


def prepare(folder: Path, count: int) -> None:
    """Into `folder`: our job, the peer's rows in our order, the adapter both start with, and what there is to learn.

    Runs in a process of its own (it loads the model), and makes the adapter as our worker does: from the job's seed,
    after the base is loaded. That it is the same shows in the first step's gradient norm.
    """
    from accelerate.utils import set_seed

    from engine.inspection import adapter_config
    from engine.model import get_peft_model
    from engine.models.fetch import ensure
    from engine.models.loading import load_causal_lm
    from engine.tasks.causal_lm import TASK, encode_example
    from engine.train.job import JobSpec
    from engine.train.loop import step_rows

    chats = folder / "chats.jsonl"
    lines = CHATS.read_text(encoding="utf-8").splitlines()[:count]
    chats.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    spec = JobSpec.from_dict(job(chats))
    spec.save(folder / "job.yaml")
    model, tokenizer = load_causal_lm(spec.model)
    set_seed(spec.training.seed)
    adapted = get_peft_model(model, adapter_config(spec.adapter, TASK.task_type, spec.model))
    adapted.save_pretrained(folder / "start")
    rows = [next(encode_example(json.loads(line), tokenizer, spec.training.loss_on)) for line in lines]
    order = step_rows(range(len(lines)), BATCH, spec.training.seed, 0, _length(TASK, rows))
    steps = [next(order) for _ in range(-(-len(lines) // BATCH))]
    ordered = "".join(lines[i] + "\n" for step in steps for i in step)
    (folder / "ordered.jsonl").write_text(ordered, encoding="utf-8")
    about = {
        "model": str(ensure(spec.model)),
        "template": marked(tokenizer.chat_template),
        "tokens": sum(len(one.ids) for one in rows),
        "targets": sum(one.targets for one in rows),
        "padded": sum(max(len(rows[i].ids) for i in step) * len(step) for step in steps),
    }
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _length(task: Any, rows: list[Any]) -> Any:
    """The worker's own sorting by length, on row numbers; None where the task has none."""
    own = getattr(task, "length", None)
    return None if own is None else lambda number: own(rows[number])


def marked(template: str) -> str:
    """The chat template with what the assistant says, and the token that ends it, marked for TRL's mask.

    The text that it makes is the same.

    Raises:
        SystemExit: the model's template is not the one that this knows.
    """
    whole = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    parts = (
        "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}"
    )
    if template.count(whole) != 1:
        raise SystemExit(f"The chat template of {DEFAULT} is not the one that bench/sft.py can mark: {template!r}")
    return template.replace(whole, parts)


def ours(folder: Path) -> Measured:
    """One run of our worker."""
    out = str(Path(tempfile.mkdtemp(dir=folder)) / "out")
    return run_child([sys.executable, "-m", "engine", "train", str(folder / "job.yaml"), "--out", out, "--json"])


def peers(folder: Path, setting: str, count: int | None = None) -> Measured:
    """One run of TRL's trainer; with `count`, on so many rows only."""
    out = Path(tempfile.mkdtemp(dir=folder))
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    rows = folder / "ordered.jsonl"
    if count is not None:
        first = rows.read_text(encoding="utf-8").splitlines()[:count]
        rows = out / "rows.jsonl"
        rows.write_text("".join(line + "\n" for line in first), encoding="utf-8")
    settings = {
        **SETTINGS[setting],
        "model": about["model"],
        "template": about["template"],
        "lora": {**LORA, "task_type": "CAUSAL_LM"},
        "start": str(folder / "start" / "adapter_model.safetensors"),
        "rows": str(rows),
        "out": str(out),
        "batch": BATCH,
        "rate": RATE,
    }
    path = out / "settings.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return run_child([sys.executable, "-m", "bench.sft_trl", str(path)], offline)


def trial(folder: Path) -> tuple[str, str]:
    """The peer's fastest setting on a few batches, and what all took; those that fail are left out.

    Fastest by CPU time: one run each is too little for wall time on a machine that others use.
    """
    found: dict[str, Measured] = {}
    for setting in SETTINGS:
        try:
            one = found[setting] = peers(folder, setting, TRIAL)
        except SystemExit as error:
            print(f"{setting}: does not run here: {str(error)[-300:]}", file=sys.stderr)
            continue
        print(f"trial, TRL {setting}: {one.seconds:.1f} s, of CPU {one.cpu:.1f} s", file=sys.stderr, flush=True)
    told = ", ".join(f"{setting} {one.cpu:.0f} s {one.peak / 1e9:.1f} GB" for setting, one in found.items())
    return min(found, key=lambda setting: found[setting].cpu), f"CPU time and peak on {TRIAL} chats: {told}"


def compared(mine: Measured, other: Measured, about: dict[str, Any]) -> dict[str, float]:
    """Both sides' last loss and first gradient norm.

    Raises:
        SystemExit: they did not do the same work.
    """
    steps = [event for event in map(json.loads, mine.output.splitlines()) if event["type"] == "step"]
    told = json.loads(other.output.splitlines()[-1])
    tokens = (sum(step["tokens"] for step in steps), told["tokens"])
    if not tokens[0] == tokens[1] == about["tokens"] or told["targets"] != about["targets"]:
        raise SystemExit(
            f"Not the same work: tokens ours {tokens[0]}, peer {tokens[1]}, in the rows {about['tokens']}; "
            f"targets peer {told['targets']}, in the rows {about['targets']}."
        )
    losses = (steps[-1]["loss"], told["losses"][-1])
    if abs(losses[0] / losses[1] - 1) > 0.01 or len(steps) != len(told["losses"]):
        raise SystemExit(f"Not the same training: the last loss is {losses[0]} here, {losses[1]} at the peer.")
    norms = (steps[0]["grad_norm"], told["norms"][0])
    return {"ours": losses[0], "peer": losses[1], "norm_ours": norms[0], "norm_peer": norms[1]}


def _said(one: Measured) -> Measured:
    print(f"{one.seconds:.1f} s, of CPU {one.cpu:.1f} s, {one.peak / 1e9:.2f} GB", file=sys.stderr, flush=True)
    return one


def _both(found: tuple[list[Measured], list[Measured]], figure: str) -> tuple[list[float], list[float]]:
    mine, other = ([getattr(one, figure) for one in side] for side in found)
    return mine, other


def rows(pairs: int = 3, chats: int = 128, setting: str | None = None) -> list[dict[str, Any]]:
    """Time and memory of whole runs, in turns; without a `setting` TRL takes part with its fastest."""
    with tempfile.TemporaryDirectory(prefix="bench-sft-") as name:
        folder = Path(name)
        run_child([sys.executable, "-m", "bench.sft", "--prepare", name, str(chats)])
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        chosen, tried = (setting, "") if setting else trial(folder)
        found = in_turns(lambda: _said(ours(folder)), lambda: _said(peers(folder, chosen)), pairs)
        same = [compared(mine, other, about) for mine, other in zip(*found, strict=True)][-1]
    cpu = [statistics.median(one.cpu for one in side) for side in found]
    note = (
        f"{about['tokens']:,} tokens, {about['targets']:,} targets on both sides; last loss {same['ours']:.4f} and "
        f"{same['peer']:.4f}, first gradient norm {same['norm_ours']:.3f} and {same['norm_peer']:.3f}; CPU time "
        f"{cpu[0]:.1f} s and {cpu[1]:.1f} s; TRL with {chosen}{tried and f', the fastest of its settings ({tried})'}"
    )
    title = f"SFT end to end, {chats} short chats"
    return [
        row(f"{title}: wall time", *_both(found, "seconds"), 0.45, "s", note),
        row(f"{title}: peak memory", *_both(found, "peak"), 0.33, "bytes", "the same runs"),
    ]


def main() -> None:
    """The pairs, or (`--prepare FOLDER CHATS`, for a process of its own) what they need."""
    if sys.argv[1:2] == ["--prepare"]:
        prepare(Path(sys.argv[2]), int(sys.argv[3]))
        return
    command_line(
        __doc__,
        rows,
        ("--pairs", {"type": int, "default": 3}),
        ("--chats", {"type": int, "default": 128}),
        ("--setting", {"choices": tuple(SETTINGS), "help": "TRL's, instead of a trial of all"}),
    )


if __name__ == "__main__":
    main()
