"""Writes docs/benchmarks.md from bench/results/bench.json."""

from __future__ import annotations

from typing import Any

from bench.measuring import ROOT, amount, met

RESULTS = ROOT / "bench" / "results" / "bench.json"
PAGE = ROOT / "docs" / "benchmarks.md"
BENCHES = {
    "sft": (
        "Fine-tuning from start to end",
        "`python -m engine train` against a script with TRL's SFTTrainer and PEFT, whole processes in turns. Both "
        "learn the same chats in the same order and batches, from the same start of the adapter, with the same "
        "schedule; the numbers of tokens and targets and the losses are compared. TRL takes part with the fastest of "
        "its settings, found in a trial before, or with the one that the command names.",
    ),
    "activations": (
        "What a block keeps for its backward pass",
        "The peer here is the frozen base without an adapter: the ratio says what an adapter adds. What PEFT keeps is "
        "in the notes. *Linears* is a block without attention and with lean norms, *whole* the block of transformers.",
    ),
    "step": (
        "One training step, and merging",
        "Ours against PEFT on copies of one base, in turns; the row *over the frozen base* against the base's own "
        "forward and backward pass.",
    ),
    "instant": (
        "Attaching, loading, mixing, switching, merging, and many adapters at once",
        "CPU seconds. Where the name says *the base alone*, that is the peer, at the same batch; where it says "
        "*one after another*, the peer is ourselves.",
    ),
}
NOT_MEASURED = (
    "GPUs: all figures are of CPUs, and say nothing about others.",
    "PEFT's QA-LoRA: it pools at GPTQ layers alone, which need a GPU, and trains a plain LoRA elsewhere.",
    "MoRA and Delta-LoRA: PEFT has neither.",
    "TRL's `packing=True`: it lays rows end to end as `padding_free=True` does, but into other batches, so the losses "
    "could not be compared.",
)


def draw(results: dict[str, Any]) -> None:
    """Write the page; nothing without results."""
    if results:
        PAGE.write_text(page(results), encoding="utf-8")


def page(results: dict[str, Any]) -> str:
    """The text of docs/benchmarks.md."""
    rows = [row for name in BENCHES for row in results.get(name, {}).get("rows", ())]
    reached = sum(met(row) for row in rows)
    parts = [
        "# Benchmarks\n",
        "    make bench\n",
        f"Speed and memory against PEFT and TRL. {reached} of {len(rows)} targets are met; rows that miss theirs stay. "
        "The ratio is ours over the peer's, so smaller is better: the median of the pairs' ratios, with the lowest and "
        "the highest in brackets. Other programs on a machine move the seconds more than the ratios. Every benchmark "
        "also runs alone, `python -m bench.NAME`, and `python -m bench NAME` puts its rows into this page.\n",
    ]
    for name, (title, intro) in BENCHES.items():
        found = results.get(name, {})
        if found.get("rows"):
            parts += [f"## {title}\n", f"`{found['command']}`. {intro}".strip() + "\n"]
            parts += [_table(found["rows"]), _notes(found["rows"]), _measured_on(found)]
    missing = [
        f"{title} (`bench.{name}`): {results.get(name, {}).get('left_out', 'not run yet')}."
        for name, (title, _) in BENCHES.items()
        if not results.get(name, {}).get("rows")
    ]
    parts += ["## Not measured\n", "".join(f"- {line}\n" for line in (*missing, *NOT_MEASURED))]
    return "\n".join(part for part in parts if part)


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | ours | peer | ratio | target | met |", "|---|---:|---:|---:|---:|---|"]
    for row in rows:
        mine, other = (amount(row[side], row["unit"]) for side in ("ours", "peer"))
        ratio, target = f"{row['ratio']:.3f}{_spread(row)}", row["target"]
        limit = f"{target:.2f}" if target >= 0.1 else f"{target:.2g}"
        lines.append(f"| {row['name']} | {mine} | {other} | {ratio} | {limit} | {'yes' if met(row) else '**no**'} |")
    return "\n".join(lines) + "\n"


def _spread(row: dict[str, Any]) -> str:
    """The lowest and highest ratio, where they differ."""
    spread = row.get("spread")
    if not isinstance(spread, list) or len(spread) != 2 or f"{spread[0]:.3f}" == f"{spread[1]:.3f}":
        return ""
    return f" ({spread[0]:.3f} to {spread[1]:.3f})"


def _notes(rows: list[dict[str, Any]]) -> str:
    return "".join(f"- {row['name']}: {row['note']}.\n" for row in rows if row.get("note"))


def _measured_on(found: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in found["packages"].items())
    waiting = f", `OMP_WAIT_POLICY={found['waiting']}`" if found.get("waiting") else ""
    cores = f"{found['threads']} of {found['cores']} cores"
    return (
        f"Measured on {found['date']} with {cores} ({found['processor']}{waiting}), "
        f"{found['memory'] / 2**30:.0f} GiB, {found['system']}, Python {found['python']}, {packages}.\n"
    )
