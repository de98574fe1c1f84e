"""Draws docs/leaderboard.md and its picture from bench/results/leaderboard.json."""

from __future__ import annotations

import math
import statistics
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "leaderboard.md"
PICTURE = ROOT / "docs" / "pictures" / "leaderboard.svg"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 640, 70, 40, 30, 60


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a contender: means over the seeds, the spread of the accuracy, the best accuracy first."""
    from bench.leaderboard import CONTENDERS

    found = []
    for name, contender in CONTENDERS.items():
        runs = [run for run in results["runs"] if run["contender"] == name]
        if not runs:
            continue
        mean = {key: statistics.fmean(run[key] for run in runs) for key in ("accuracy", "macro_f1", "cpu_seconds")}
        found.append(
            {
                "name": name,
                "title": contender.title,
                "runs": len(runs),
                "of_full": _of_full(runs, results["runs"]),
                "low": min(run["accuracy"] for run in runs),
                "high": max(run["accuracy"] for run in runs),
                "trainable": runs[0]["trainable"],
                "bytes": runs[0]["bytes"],
                "peak": max(run["peak_bytes"] for run in runs),
                "rate": runs[0]["learning_rate"],
                **mean,
            }
        )
    return sorted(found, key=lambda row: -row["accuracy"])


def _of_full(runs: list[dict[str, Any]], every: list[dict[str, Any]]) -> float:
    """The accuracy as a share of full fine-tuning's on the same seeds; 0 where those are not there."""
    whole = {run["seed"]: run["accuracy"] for run in every if run["contender"] == "full"}
    if any(run["seed"] not in whole for run in runs):
        return 0.0
    return sum(run["accuracy"] for run in runs) / sum(whole[run["seed"]] for run in runs)


def pareto(rows: list[dict[str, Any]]) -> set[str]:
    """The names that no other beats in both accuracy and size of the result."""
    best = set()
    for row in rows:
        beaten = any(
            other["accuracy"] >= row["accuracy"] and other["bytes"] <= row["bytes"] and other is not row
            for other in rows
        )
        if not beaten:
            best.add(row["name"])
    return best


def draw(results: dict[str, Any]) -> None:
    """Write the page and the picture; nothing without results."""
    rows = rows_of(results)
    if not rows:
        return
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(picture(rows), encoding="utf-8")
    PAGE.write_text(page(results, rows), encoding="utf-8")


def page(results: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The text of docs/leaderboard.md."""
    whole = next((row for row in rows if row["name"] == "full"), None)
    front, machine, runs = pareto(rows), results["machine"], results["runs"]
    head = [
        "Method",
        "Accuracy",
        "of full",
        "Macro F1",
        "Trained",
        "File",
        "of full",
        "Peak memory",
        "CPU time",
        "Seeds",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        share = [f"{row['of_full']:.1%}", f"{row['bytes'] / whole['bytes']:.2%}"] if whole else []
        kept, small = share or ["", ""]
        cells = [
            f"**{row['title']}**" if row["name"] in front else row["title"],
            f"{row['accuracy']:.3f} ({row['low']:.3f} to {row['high']:.3f})",
            kept,
            f"{row['macro_f1']:.3f}",
            f"{row['trainable']:,}",
            _size(row["bytes"]),
            small,
            _size(row["peak"]),
            f"{row['cpu_seconds']:.0f} s",
            str(row["runs"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    seeds = sorted({run["seed"] for run in runs})
    told = f"""# Leaderboard

Every method and full fine-tuning on one task: say from a one-line description which section of Debian a package is in
({results["data"]["rows"]:,} rows, 20 sections, a quarter held back). The base is MiniLM (`minilm`, 22.7 million
parameters) with a new head, trained with the adapter. Means over the seeds; each draws the rows that are held back, the
head and the order anew (seeds {", ".join(map(str, seeds))}). In brackets the lowest and the highest seed; the
share of full fine-tuning is that on the same seeds.

![Accuracy over the size of the result](pictures/leaderboard.svg)

{chr(10).join(lines)}

In bold: no other is both better and smaller. *File* is what is kept of a run; *Trained* counts the head too, which is
the same in every row. CPU time and peak memory are those of the whole process ({machine["processor"]}).

    python scripts/debian_sections.py sections.csv
    python -m bench.leaderboard --data sections.csv

The data are of the day (their SHA-256: `{results["data"]["sha256"][:16]}`); every run, with its learning rate, is in
`bench/results/leaderboard.json`, and so is the sweep on another seed that chose the rates (`--sweep`).
"""
    return told


def _size(count: float) -> str:
    return (
        f"{count / 1e6:,.0f} MB"
        if count >= 1e7
        else f"{count / 1e6:.2f} MB"
        if count >= 1e6
        else f"{count / 1e3:,.0f} kB"
    )


def picture(rows: list[dict[str, Any]]) -> str:
    """An SVG: accuracy over bytes (logarithmic), a dot a contender, the Pareto front as a line."""
    front = pareto(rows)
    logs = [math.log10(row["bytes"]) for row in rows]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    bottom = math.floor(min(row["low"] for row in rows) * 50) / 50
    top = math.ceil(max(row["high"] for row in rows) * 50) / 50

    def across(count: float) -> float:
        return LEFT + (math.log10(count) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (value - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="13" role="img" aria-label="Accuracy over the size of the result">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for exponent in range(low, high + 1):
        x = across(10**exponent)
        parts.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#e5e7eb"/>')
        label = f"{10**exponent / 1e6:g} MB" if exponent >= 6 else f"{10**exponent / 1e3:g} kB"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle" fill="#4b5563">{label}</text>')
    for step in range(round((top - bottom) * 50) + 1):
        value = bottom + step / 50
        parts.append(f'<path d="M{LEFT} {up(value):.1f}H{WIDTH - RIGHT}" stroke="#e5e7eb"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{up(value) + 4:.1f}" text-anchor="end" fill="#4b5563">{value:.2f}</text>'
        )
    line = sorted((row for row in rows if row["name"] in front), key=lambda row: row["bytes"])
    points = " ".join(f"{across(row['bytes']):.1f},{up(row['accuracy']):.1f}" for row in line)
    parts.append(
        f'<polyline points="{points}" fill="none" stroke="#0f766e" stroke-width="1.5" stroke-dasharray="4 3"/>'
    )
    taken: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: row["name"] not in front):
        x, y = across(row["bytes"]), up(row["accuracy"])
        colour = "#0f766e" if row["name"] in front else "#6b7280"
        parts.append(f'<path d="M{x:.1f} {up(row["low"]):.1f}V{up(row["high"]):.1f}" stroke="{colour}" opacity="0.5"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
        place = _free(taken, x, y)
        side = "end" if x > WIDTH - 200 else "start"
        at = x - 9 if side == "end" else x + 9
        if abs(place - y) > 8:
            parts.append(f'<path d="M{x:.1f} {y:.1f}L{at - 2:.1f} {place:.1f}" stroke="{colour}" opacity="0.6"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{place + 4:.1f}" text-anchor="{side}" fill="#111827">{escape(row["title"])}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 14}" text-anchor="middle" fill="#111827">'
        "Size of the file that is kept</text>"
    )
    parts.append(f'<text x="{LEFT}" y="{TOP - 12}" fill="#111827">Accuracy on held-out rows</text></svg>')
    return "\n".join(parts) + "\n"


def _free(taken: list[tuple[float, float]], x: float, y: float) -> float:
    """A height for a label near y that hides no label written before."""
    for shift in (0, 15, -15, 30, -30, 45, -45, 60, -60, 75, -75):
        if all(abs(x - other) > 190 or abs(y + shift - height) > 13 for other, height in taken):
            break
    taken.append((x, y + shift))
    return y + shift
