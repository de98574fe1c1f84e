"""This machine in words for the first page. What takes torch to know is asked of a process of its own, once, later."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine import threads
from engine.memory.machine import memory_limit
from engine.paths import REPOSITORY
from studio.i18n import t
from studio.markup import esc, size

_ASK = (sys.executable, "-m", "engine", "doctor", "--json")
_LONGEST = 180.0
_BYTES_PER_WEIGHT = 3.0
"""Of graphics memory that LoRA in bf16 takes for each of the base's weights, by rule of thumb: two for the weight, one
for what a step keeps. `engine.memory` is exact, and needs the job."""


@dataclass(frozen=True)
class Card:
    """A graphics card: its name, and its bytes of memory where they are known."""

    name: str
    memory: int = 0


@dataclass
class Machine:
    """What this machine has.

    Attributes:
        cores: that may be used.
        memory: bytes.
        cards: graphics cards that training can use.
    """

    cores: int
    memory: int
    cards: Sequence[Card] = ()
    _asked: threading.Thread | None = field(default=None, repr=False)

    def ask(self, command: Sequence[str] = _ASK) -> threading.Thread | None:
        """Begin, once, to ask a process with torch about the cards, if there are any; it answers into `cards`.

        Returns the thread that waits for it.
        """
        if self.cards and self._asked is None:
            self._asked = threading.Thread(target=self._answer, args=(command,), daemon=True)
            self._asked.start()
        return self._asked

    def _answer(self, command: Sequence[str]) -> None:
        try:
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, timeout=_LONGEST, check=True)
            found = json.loads(done.stdout)
            self.cards = tuple(Card(str(gpu["name"]), int(gpu["memory"])) for gpu in found["gpus"])
        except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
            # A hint on the first page; `python -m engine doctor` says what is wrong.
            return


def look(root: Path = Path("/")) -> Machine:
    """What can be seen without torch: cores, memory, and the cards that the kernel's driver names."""
    cards = []
    for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        named = re.search(r"^Model:\s*(.+)$", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        cards.append(Card(named[1].strip() if named else "NVIDIA"))
    if not cards:
        cards = [Card("NVIDIA") for _ in (root / "dev").glob("nvidia[0-9]*")]
    return Machine(threads.available_cores(), memory_limit(root), tuple(cards))


def words(machine: Machine) -> str:
    """What it has, what is quick on it, what is slow, what would help."""
    facts = [
        t("{n} CPU cores", n=machine.cores) if machine.cores != 1 else t("1 CPU core"),
        t("{size} of memory", size=size(machine.memory)),
    ]
    if machine.cards:
        card = machine.cards[0]
        facts.append(f"{card.name} ({size(card.memory)})" if card.memory else card.name)
        facts += [t("and {n} more", n=len(machine.cards) - 1)] if len(machine.cards) > 1 else []
    else:
        facts.append(t("no graphics card"))
    head = t("This machine: {facts}.", facts=", ".join(facts))
    lines = "".join(f"<li>{esc(line)}</li>" for line in _advice(machine))
    return f'<section class="gd-machine"><p>{esc(head)}</p><ul>{lines}</ul></section>'


def _advice(machine: Machine) -> list[str]:
    if machine.cards:
        memory = machine.cards[0].memory
        if not memory:
            return [t("Quick here: every base that comes with the studio, and larger ones.")]
        billions = max(0.1, memory / 1e9 / _BYTES_PER_WEIGHT)
        return [
            t("Quick here: bases of up to about {n} billion parameters.", n=f"{billions:.2g}"),
            t("Larger ones: in 4 bits, about three times as large; Train says beforehand whether one fits."),
        ]
    found = [
        t("Quick here: the toys (about a minute), SmolLM2 135M and MiniLM (minutes)."),
        t("Slow here: bases of a billion parameters and more, and pictures larger than the toy's."),
        t("What would help: an NVIDIA card. Without one: short rows, few steps, a small base."),
    ]
    if machine.memory < 6e9:
        found.append(t("Memory is short: close other programs, and take 4 bits on Train under Advanced."))
    return found
