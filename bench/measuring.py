"""What the benchmarks share: rows of the table, processes with their time and memory, turns, and the machine.

A row says what one figure of ours and a peer's are. `ratio` is ours over the peer's, so smaller is better, and the
row's target is met where the ratio is at most the target.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")


@dataclass(frozen=True)
class Measured:
    """A process that ended well: its wall and CPU seconds, the bytes it held at the most, and its output."""

    seconds: float
    cpu: float
    peak: int
    output: str


def run_child(command: Sequence[str], extra: dict[str, str] | None = None) -> Measured:
    """Run a command from the repository's root and measure it.

    The calling process should stay small, since Linux counts what the parent held when it started the command.

    Raises:
        SystemExit: the command failed; its last lines say why.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **(extra or {})}, stdout=output, stderr=errors)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="replace")
        if child.returncode:
            errors.seek(0)
            told = errors.read().decode(errors="replace")
            raise SystemExit(f"{' '.join(command)} ended with {child.returncode}: {text[-1000:]}\n{told[-3000:]}")
    # Kilobytes on Linux, bytes on a Mac.
    peak = int(usage.ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
    return Measured(seconds, usage.ru_utime + usage.ru_stime, peak, text)


def in_turns(ours: Callable[[], T], peer: Callable[[], T], rounds: int) -> tuple[list[T], list[T]]:
    """What both give, in turns, A B, B A, A B, ..., so that a machine that grows slower or faster favours neither."""
    found: tuple[list[T], list[T]] = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            found[which].append((ours, peer)[which]())
    return found


class Timing(NamedTuple):
    """Wall and CPU seconds of a call in this process; the second says more on a machine that others use."""

    wall: float
    cpu: float


def timed(call: Callable[[], Any]) -> Timing:
    """How long a call takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def timing_row(
    name: str, ours: Sequence[Timing], peer: Sequence[Timing], target: float, note: str = ""
) -> dict[str, Any]:
    """A row of wall seconds; its note gives the ratio of the CPU seconds too."""
    cpu = statistics.median(mine.cpu / other.cpu for mine, other in zip(ours, peer, strict=True))
    notes = [part for part in (f"of CPU time {cpu:.3f}", note) if part]
    return row(name, [one.wall for one in ours], [one.wall for one in peer], target, "s", "; ".join(notes))


def row(
    name: str,
    ours: Sequence[float],
    peer: Sequence[float],
    target: float,
    unit: str,
    note: str = "",
) -> dict[str, Any]:
    """A row of the table from pairs measured in turns.

    `ours` and `peer` are medians; `ratio` is the median of the pairs' ratios, which a machine's changes of speed touch
    least, and `spread` the lowest and the highest of them.
    """
    ratios = [mine / other for mine, other in zip(ours, peer, strict=True)]
    return {
        "name": name,
        "ours": statistics.median(ours),
        "peer": statistics.median(peer),
        "ratio": statistics.median(ratios),
        "target": target,
        "unit": unit,
        "spread": [min(ratios), max(ratios)],
        "note": note,
    }


def met(found: dict[str, Any]) -> bool:
    """Whether a row's target is met."""
    return bool(found["ratio"] <= found["target"])


def machine() -> dict[str, Any]:
    """What the figures are measured on, as `engine doctor` tells it, with the peers' versions."""
    told = json.loads(run_child([sys.executable, "-m", "engine", "doctor", "--json"]).output)
    kept = {key: told[key] for key in ("system", "python", "processor", "cores", "threads", "memory")}
    return {**kept, "waiting": os.environ.get("OMP_WAIT_POLICY", ""), "packages": {p: version(p) for p in PACKAGES}}


def command_line(
    doc: str | None, rows: Callable[..., list[dict[str, Any]]], *arguments: tuple[str, dict[str, Any]]
) -> None:
    """`python -m bench.X [--json FILE]`: measure, print a line a row, keep them.

    Args:
        doc: the help.
        rows: called with `arguments` by their names.
        arguments: further arguments of the command, each a name or flag and argparse's settings of it.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, settings in arguments:
        parser.add_argument(flag, **settings)
    parser.add_argument("--json", type=Path, help="keep the rows there")
    options = vars(parser.parse_args())
    path: Path | None = options.pop("json")
    found = rows(**options)
    for one in found:
        print(told(one))
    if path:
        write(path, {"rows": found})


def told(found: dict[str, Any]) -> str:
    """A row as a line for a person."""
    low, high = found["spread"]
    mine, other = (amount(found[side], found["unit"]) for side in ("ours", "peer"))
    return (
        f"{found['name']:50} ours {mine:>10}  peer {other:>10}"
        f"  ratio {found['ratio']:.3f} ({low:.3f} to {high:.3f})  target {found['target']:.2f}"
        f"  {'met' if met(found) else 'MISSED'}"
    )


def amount(value: float, unit: str) -> str:
    """A figure with its unit, in three digits or so."""
    if unit == "bytes":
        return f"{value / 2**20:,.1f} MiB"
    if unit == "s" and value < 1:
        return f"{value * 1e3:.3g} ms"
    return f"{value:,.2f} {unit}" if value < 100 else f"{value:,.0f} {unit}"


def write(path: Path, found: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
