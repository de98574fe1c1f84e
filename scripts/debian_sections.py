"""Writes a labelled data set of real text: one-line descriptions of Debian's packages and the section of each.

    python scripts/debian_sections.py FILE.csv [--sections 20] [--each 300] [--seed 0]

It asks `apt-cache dumpavail` for the packages that this machine's lists name (`apt-get update` fetches the lists).
Sections that say how a package is built rather than what it is for are left out (libraries, debugging symbols,
languages' bindings), as are packages that describe themselves as another one has. The texts stay here: each belongs
to its package's authors.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

BUILT = {"libs", "libdevel", "oldlibs", "debug", "devel", "introspection", "metapackages", "misc", "utils"}
BINDINGS = {"python", "perl", "ruby", "javascript", "php", "java", "haskell", "golang", "rust", "ocaml", "cli-mono"}


def packages(listing: str) -> dict[str, list[str]]:
    """Section -> descriptions, each once, in the order of the lists."""
    found: dict[str, list[str]] = defaultdict(list)
    seen = set()
    for record in listing.split("\n\n"):
        section = re.search(r"^Section: (?:[\w-]+/)?(\S+)$", record, re.M)
        text = re.search(r"^Description(?:-en)?: (.+)$", record, re.M)
        if section and text and text[1].strip().lower() not in seen:
            seen.add(text[1].strip().lower())
            found[section[1]].append(text[1].strip())
    return found


def choose(found: dict[str, list[str]], sections: int, each: int, seed: int) -> list[tuple[str, str]]:
    """(text, label) of the `sections` largest ones, at most `each` of one, mixed."""
    fit = {name: texts for name, texts in found.items() if name not in BUILT | BINDINGS}
    largest = sorted(fit, key=lambda name: (-len(fit[name]), name))[:sections]
    chance = random.Random(seed)
    rows = []
    for name in sorted(largest):
        texts = sorted(fit[name])
        rows += [(text, name) for text in chance.sample(texts, min(each, len(texts)))]
    chance.shuffle(rows)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--sections", type=int, default=20)
    parser.add_argument("--each", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if shutil.which("apt-cache") is None:
        print("There is no apt-cache here: this data set is made on Debian or Ubuntu.", file=sys.stderr)
        return 1
    listing = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    rows = choose(packages(listing), asked.sections, asked.each, asked.seed)
    labels = {label for _, label in rows}
    if len(labels) < 2:
        print("The lists name too few packages: run `apt-get update` first.", file=sys.stderr)
        return 1
    with open(asked.file, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("text", "label"))
        writer.writerows(rows)
    print(f"{asked.file}: {len(rows)} rows, {len(labels)} sections: {', '.join(sorted(labels))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
