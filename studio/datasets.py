"""Data sets of the home folder: kept by content, checked by `engine.data`, described for the page and for a job."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import data
from engine.errors import DataError, UnsafeFileError
from engine.paths import inside
from studio import demo, visitors
from studio.store import Row, Store

_CACHED_BYTES = 20 * 2**20


@dataclass(frozen=True)
class Checked:
    """A data set as it stands: what it is, and what of it can be used.

    Attributes:
        id: content hash.
        name: the file's name.
        format: what it is read as; None while nobody has said.
        columns: role -> column.
        reason: why that format.
        available: every column of the file.
        prepared: the rows, or None while the format is open or nothing could be used.
        fault: why nothing could be used.
        guessed: nobody named the columns and their names say nothing; a person should look.
    """

    id: str
    name: str
    format: str | None
    columns: Mapping[str, str]
    reason: str
    available: tuple[str, ...]
    prepared: data.Prepared | None
    fault: DataError | None = None
    guessed: bool = False


class Datasets:
    """The data sets of one home folder."""

    def __init__(self, store: Store, home: Path) -> None:
        self.store = store
        self.folder = home / "datasets"

    def bring_in(self, path: Path, name: str | None = None) -> Checked:
        """Copy a file into the home folder under its content hash, recognise and check it.

        Args:
            path: the file; it is copied, never moved.
            name: what the page calls it; the file's own name by default.

        Raises:
            DataError: the file cannot be used at all.
            UnsafeFileError: the name would lead out of the folder.
            DemoError: it is larger than the demo takes.
        """
        name = name or path.name
        if any(mark in name for mark in ("/", "\\", "\0")) or name in (".", ".."):
            raise UnsafeFileError(
                f"The name {name[:80]!r} cannot be used as a file name here.", "Give a plain name without folders."
            )
        demo.check_upload(path, len(self.store.datasets()))
        table = data.read(path)
        demo.check_rows(len(table.rows))
        dataset_id = visitors.own(data.fingerprint(path))
        home = inside(self.folder, dataset_id)
        kept = home / f"rows{path.suffix.lower()}"
        if not kept.exists():
            home.mkdir(parents=True, exist_ok=True)
            draft = home / f".draft{path.suffix.lower()}"
            shutil.copyfile(path, draft)
            draft.replace(kept)
        found = data.recognise(table)
        if found.name is None and found.suggestions:
            guess = found.suggestions[0]
            reason = f"{found.reason.split(' Say which')[0]} This is a guess: {guess.reason}"
            return self._checked(dataset_id, name, kept, table, guess.name, guess.columns, reason, guessed=True)
        return self._checked(dataset_id, name, kept, table, found.name, found.columns, found.reason)

    def check(self, dataset_id: str, format: str | None, columns: Mapping[str, str]) -> Checked:
        """Read a known data set as the person says.

        Raises:
            UnknownError: there is no such data set.
        """
        row = self.store.dataset(dataset_id)
        path = Path(row["path"])
        return self._checked(dataset_id, row["name"], path, read(path), format or None, columns, "")

    def open(self, dataset_id: str) -> Checked:
        """A known data set as it was last used."""
        row = self.store.dataset(dataset_id)
        path = Path(row["path"])
        reason = row["profile"].get("reason", "")
        return self._checked(
            dataset_id, row["name"], path, read(path), row["format"] or None, row["columns"], reason, keep=False
        )

    def _checked(
        self,
        dataset_id: str,
        name: str,
        path: Path,
        table: data.Table,
        format: str | None,
        columns: Mapping[str, str],
        reason: str,
        keep: bool = True,
        guessed: bool = False,
    ) -> Checked:
        prepared, fault = None, None
        if format is not None:
            wanted = {role: column for role, column in columns.items() if column in table.columns}
            try:
                prepared = data.prepare(table, format, wanted)
                columns = prepared.columns
            except DataError as error:
                fault = error
        available = tuple(table.columns)
        found = Checked(dataset_id, name, format, dict(columns), reason, available, prepared, fault, guessed)
        if keep:
            self._keep(found, path, table)
        return found

    def _keep(self, found: Checked, path: Path, table: data.Table) -> None:
        profile: dict[str, Any] = {"reason": found.reason}
        if found.prepared is not None:
            profile |= data.profile(found.prepared)
        self.store.save_dataset(
            {
                "id": found.id,
                "name": found.name,
                "format": found.format or "",
                "columns": dict(found.columns),
                "rows": found.prepared.kept if found.prepared else 0,
                "path": str(path),
                "profile": profile,
                "created": time.time(),
            }
        )


def read(path: Path) -> data.Table:
    """The file's table; small files are kept in memory between two looks."""
    if path.stat().st_size > _CACHED_BYTES:
        return data.read(path)
    return _read_cached(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _read_cached(path: Path, changed: int) -> data.Table:
    return data.read(path)


def usable(row: Row) -> bool:
    """Whether a kept data set has rows to train on."""
    return bool(row["format"]) and row["rows"] > 0


def train_rows(row: Row, eval_split: float) -> int:
    """About how many rows are trained on when `eval_split` of them are held back."""
    held = max(1, round(row["rows"] * eval_split)) if eval_split > 0 and row["rows"] > 1 else 0
    return int(row["rows"]) - held


def first_prompt(row: Row) -> str:
    """The first question of a data set, to try an adapter with."""
    for example in row["profile"].get("examples", []):
        said = example.get("messages", example.get("prompt", []))
        if isinstance(said, str):
            return said
        for message in reversed(said) if "chosen" in example else said:
            if message["role"] == "user":
                return str(message["content"])
        if "source" in example:
            return str(example["source"])
        if "text" in example:
            return str(example["text"])[:60]
    return ""
