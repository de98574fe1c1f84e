"""The texts that pages show and their translations, found by reading the sources."""

from __future__ import annotations

import ast
import json
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engine.paths import REPOSITORY
from studio.i18n import REPORTS
from studio.languages import script_texts

SAYING = ("t", "N_", "strong")
"""Functions whose first argument is a text."""
LOCALES = REPOSITORY / "studio" / "locales"
SHOWN = ("title", "meaning", "when", "label", "help")
"""Keys of a preset's file whose texts the form shows."""


@dataclass
class Found:
    """The keys of sources.

    Attributes:
        keys: text -> where it stands.
        marked: names of constants that hold texts marked by `N_`.
        faults: calls of `t` or `N_` whose text cannot be known.
    """

    keys: dict[str, str] = field(default_factory=dict)
    marked: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)


def calls(tree: ast.AST, *names: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            yield node


def constant(node: ast.AST) -> str | None:
    """The name of the constant behind an expression: `NAME`, `module.NAME`, `NAME[key]`; None for anything else."""
    while isinstance(node, ast.Subscript):
        node = node.value
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name if name.isupper() else None


def sources(root: Path = REPOSITORY / "studio") -> Found:
    """Every literal of `t(...)`, `strong(...)` and `N_(...)` below a folder.

    What stands first in `t` is a literal, a choice of literals, or a name: of a constant marked by `N_`, or of
    something that holds one of its texts. Put together at run time (f-strings, sums, calls) it could not be looked up.
    """
    found = Found()
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(root.rglob("*.py"))}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value and any(calls(node.value, "N_")):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.marked |= {name for name in map(constant, targets) if name}
    for path, tree in trees.items():
        for call in calls(tree, *SAYING):
            where = f"{path.relative_to(root.parent)}:{call.lineno}"
            for text in texts(call.args[0] if call.args else call):
                if isinstance(text, str):
                    found.keys.setdefault(text, where)
                elif not isinstance(text, ast.Name | ast.Attribute | ast.Subscript):
                    found.faults.append(f"{where}: {ast.unparse(call)[:80]}")
                elif (name := constant(text)) and name not in found.marked:
                    found.faults.append(f"{where}: {name} holds no text that is marked by N_")
    return found


def texts(node: ast.AST) -> Iterator[Any]:
    """The literals that an expression may give, and the expressions in it that are none."""
    if isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)
    else:
        yield node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else node


def presets() -> dict[str, str]:
    """Every text of a preset's file that a form shows; where it stands."""
    found: dict[str, str] = {}

    def walk(item: Any, where: str) -> None:
        if isinstance(item, dict):
            found.update({item[key]: where for key in SHOWN if isinstance(item.get(key), str)})
        for part in item.values() if isinstance(item, dict) else item if isinstance(item, list) else ():
            walk(part, where)

    for path in sorted((REPOSITORY / "presets").rglob("*.yaml")):
        walk(yaml.safe_load(path.read_text(encoding="utf-8")), str(path.relative_to(REPOSITORY)))
    return found


def registries() -> dict[str, str]:
    """Texts of the engine's registries that a page shows; where they stand."""
    from engine import data
    from engine.models.catalogue import BUILTIN

    return {
        **{base.meaning: "engine/models/catalogue.py" for base in BUILTIN.values()},
        **{kind.about: "engine/data/formats.py" for kind in data.FORMATS.values()},
    }


def findings() -> dict[str, str]:
    """What the run doctor may say; where it stands."""
    from engine.findings import TEXTS

    return {text: "engine/findings.py" for pair in TEXTS.values() for text in pair}


def wanted() -> dict[str, str]:
    """Every text that needs a translation; where it stands."""
    scripts = dict.fromkeys(script_texts(), "studio/assets/scripts")
    found = {**scripts, **presets(), **findings(), **registries(), **sources().keys}
    return {key: where for key, where in found.items() if key.strip()}


def untold(source: str) -> list[str]:
    """The words of a script that `studioText` does not say: two of them in one literal, which is no selector."""
    plain = re.sub(r"^\s*//.*$|\s//\s.*$", "", source, flags=re.MULTILINE)
    plain = re.sub(r'studioText\(\s*"(?:[^"\\]|\\.)*"', "", plain)
    literals = re.findall(r'"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\'|`(?:[^`\\]|\\.)*`', plain)
    words = (re.sub(r"\$\{(?:[^{}]|\{[^{}]*\})*\}", "", literal) for literal in literals)
    return [
        text
        for text in words
        if re.search(r"[A-Za-z]{2,} [a-z]{2,}", text) and not re.search(r"[#\[\]>=<:]\w|\)\s*$", text)
    ]


def template(node: ast.AST) -> str | None:
    """A literal, or an f-string with `{0}`, `{1}` ... for what is filled in; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if not isinstance(node, ast.JoinedStr):
        return None
    gaps = iter(range(len(node.values)))
    return "".join(str(part.value) if isinstance(part, ast.Constant) else f"{{{next(gaps)}}}" for part in node.values)


def spoken() -> set[str]:
    """Every literal and f-string of the engine and the studio: whatever a process may say is one of them."""
    found = set()
    for folder in ("engine", "studio"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (text := template(node)) is not None:
                    # A text that goes on after it, on the next line or behind a space, is told apart from it.
                    found |= {text, text.strip()}
    return found


def faults(folder: str = "studio") -> dict[str, str]:
    """What the errors of a folder say, message and hint, and what it says of rows; where that is said."""
    found = {}
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and says(node):
                values = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "reason")]
                for text in (text for argument in values for text in choices(argument)):
                    if " " in (text or "").strip():
                        found[str(text).strip()] = f"{path.relative_to(REPOSITORY)}:{node.lineno}"
    return found


def says(call: ast.Call) -> bool:
    """Whether a call makes an error, a fault or a reading of rows, or writes a problem of a row down."""
    name = getattr(call.func, "id", "")
    written = getattr(call.func, "attr", "") in ("skip", "fix", "note") and len(call.args) >= 4
    return name.endswith(("Error", "Fault")) or name in ("_error", "Format") or written


def choices(node: ast.AST) -> Iterator[str | None]:
    """The templates that an expression may give."""
    if isinstance(node, ast.IfExp):
        yield from choices(node.body)
        yield from choices(node.orelse)
    elif isinstance(node, ast.BinOp):
        yield from choices(node.left)
    else:
        yield template(node)


def reports(language: str) -> dict[str, str]:
    """What processes say -> the same in a language."""
    path = LOCALES / language / REPORTS
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def translated(language: str) -> dict[str, list[tuple[str, str]]]:
    """English text -> its translations, each with the file it stands in, as often as they stand there."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(set((LOCALES / language).glob("*.json")) - {LOCALES / language / REPORTS}):
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
        for key, text in pairs:
            found.setdefault(key, []).append((path.name, text))
    return found


def names(text: str) -> list[str]:
    """The names in braces that `str.format` would fill in, in order of the alphabet; each as often as it stands."""
    return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name is not None)


def fills(key: str) -> bool:
    """Whether a text is filled in: not one that shows braces as they are, as examples of prompts do."""
    try:
        return all(re.fullmatch(r"\w+", name) for name in names(key))
    except ValueError:
        return False
