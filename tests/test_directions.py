"""The direction of imports: app -> studio -> engine, and in the engine neighbours that know nothing of each other."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at the top or inside a function, as an absolute name."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            name = f"{start}{node.module or ''}".strip(".")
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def starts(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("path", files("engine"), ids=lambda p: str(p.relative_to(ROOT)))
def test_engine_knows_no_page_and_no_database(path: Path) -> None:
    wrong = [n for n in imports(path) if starts(n, "gradio", "studio", "app", "sqlite3", "sqlite_utils", "peft")]
    assert not wrong


@pytest.mark.parametrize("path", files("studio"), ids=lambda p: str(p.relative_to(ROOT)))
def test_studio_knows_neither_the_app_nor_peft(path: Path) -> None:
    assert not [name for name in imports(path) if starts(name, "app", "peft")]


def test_neighbours_do_not_import_each_other() -> None:
    """An adapter method, a task and a tab are one file each, and know no other of their kind."""
    for folder, shared in (
        ("engine/adapters", {"base", "fields", "lowrank", "lycoris", "starts", "virtual"}),
        ("engine/tasks", {"base", "sequences", "tokenising"}),
        ("studio/tabs", set()),
    ):
        package = folder.replace("/", ".")
        mates = {path.stem for path in (ROOT / folder).glob("*.py")} - shared - {"__init__"}
        assert mates, folder
        for path in (ROOT / folder).glob("*.py"):
            if path.stem == "__init__":
                continue
            known = {
                name.split(".")[len(package.split("."))] for name in imports(path) if name.startswith(package + ".")
            }
            assert not known & (mates - {path.stem}), path


def loaded_by(code: str) -> set[str]:
    """The top-level packages in memory after running `code` in a process of its own."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{n.split('.')[0] for n in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_import_engine_takes_no_gradio_and_no_torch() -> None:
    assert not loaded_by("import engine, engine.data, engine.train.job, engine.models.catalogue") & {
        "gradio",
        "torch",
        "transformers",
        "studio",
        "sqlite3",
        "peft",
    }


def test_engine_at_work_takes_no_gradio_and_no_peft() -> None:
    names = loaded_by(
        "from engine import LoraConfig, get_peft_model, PeftModel\nimport engine.train.loop, engine.__main__"
    )
    assert "torch" in names
    assert not names & {"gradio", "studio", "sqlite3", "peft"}


def test_the_page_process_takes_no_torch() -> None:
    names = loaded_by(
        "import app\nfrom studio.context import Studio\nfrom studio.shell import create_app\ncreate_app(Studio.open())"
    )
    assert "gradio" in names
    assert not names & {"torch", "transformers", "accelerate", "peft"}


@pytest.mark.parametrize("process", ["worker", "adapter_worker", "inference_worker"])
def test_the_processes_of_the_studio_take_no_pandas(process: str) -> None:
    names = loaded_by(f"import studio.{process}")
    assert "sqlite_utils" in names or process == "inference_worker"
    assert not names & {"pandas", "pyarrow", "gradio"}


def test_the_rule_sees_a_breach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself: a lazy import inside a function counts."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "engine").mkdir()
    bad = tmp_path / "engine" / "bad.py"
    bad.write_text("def f():\n    from studio.store import Store\n")
    with pytest.raises(AssertionError):
        test_engine_knows_no_page_and_no_database(bad)
