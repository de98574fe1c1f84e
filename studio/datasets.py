"""Data sets of the home folder: kept by content, checked by `engine.data`, described for the page and for a job.

A data set is a file and what was decided about its rows (`fixes`). The file is never changed: a fix makes a new
version, with a fingerprint of its own, that stands for the earlier one; taking the fix back brings that one back.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import data
from engine.data.fixes import while_reading
from engine.errors import DataError, UnsafeFileError
from engine.paths import inside
from studio import dataset_shelf as shelf
from studio import demo, visitors
from studio.store import Row, StateError, Store

_CACHED_BYTES = 20 * 2**20


@dataclass(frozen=True)
class Checked:
    """A data set as it stands: what it is, and what of it can be used.

    Attributes:
        id: fingerprint of the file's content and the fixes.
        name: what the page calls it.
        format: what it is read as; None while nobody has said.
        columns: role -> column.
        reason: why that format.
        available: every column of the file.
        prepared: the rows, or None while the format is open or nothing could be used.
        fault: why nothing could be used.
        guessed: nobody named the columns and their names say nothing; a person should look.
        file: fingerprint of the file alone.
        fixes: what was decided about problem rows, cause -> action.
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
    file: str = ""
    fixes: Mapping[str, str] = field(default_factory=dict)


class Datasets:
    """The data sets of one home folder."""

    def __init__(self, store: Store, home: Path) -> None:
        self.store = store
        self.folder = home / "datasets"

    def bring_in(self, path: Path, name: str | None = None) -> Checked:
        """Copy a file into the home folder under its content hash, recognise and check it.

        One that is here already is opened as it was last used, with its fixes, also out of the bin.

        Args:
            path: the file; it is copied, never moved.
            name: what the page calls it; the file's own name by default.

        Raises:
            DataError: the file cannot be used at all.
            UnsafeFileError: the name would lead out of the folder.
            DemoError: it is larger than the demo takes.
        """
        given, name = name, name or path.name
        if any(mark in name for mark in ("/", "\\", "\0")) or name in (".", ".."):
            raise UnsafeFileError(
                f"The name {name[:80]!r} cannot be used as a file name here.", "Give a plain name without folders."
            )
        demo.check_upload(path, len(self.store.datasets()))
        table = data.read(path)
        demo.check_rows(len(table.rows))
        file = visitors.own(data.fingerprint(path))
        home = inside(self.folder, file)
        kept = home / f"rows{path.suffix.lower()}"
        if not kept.exists():
            home.mkdir(parents=True, exist_ok=True)
            draft = home / f".draft{path.suffix.lower()}"
            shutil.copyfile(path, draft)
            draft.replace(kept)
        known = shelf.current(self.store, file)
        if known is not None:
            shelf.take_out(self.store, file)
            shelf.tell(self.store, known, "again", name=path.name)
            if given and given != known["name"]:
                shelf.rename(self.store, known["id"], given)
            if known["format"]:
                return self.open(known["id"])
        found = data.recognise(table)
        guess = found.suggestions[0] if found.name is None and found.suggestions else None
        reason = found.reason
        if guess:
            reason = " ".join((found.reason.split(" Say which")[0], f"This is a guess: {guess.reason}"))
        row: Row = {"id": file, "file": file, "file_name": path.name, "path": str(kept), "fixes": {}, "created": 0.0}
        row |= {"name": known["name"] if known else name}
        best = guess or found
        checked = self._checked(row, best.name, best.columns, reason, guessed=guess is not None)
        if known is None:
            shelf.tell(self.store, row, "brought", name=path.name, bytes=kept.stat().st_size)
        return checked

    def check(self, dataset_id: str, format: str | None, columns: Mapping[str, str]) -> Checked:
        """Read a known data set as the person says.

        Raises:
            UnknownError: there is no such data set.
        """
        row = self.store.dataset(dataset_id)
        found = self._checked(row, format or None, columns, "")
        if (found.format or "", dict(found.columns)) != (row["format"], row["columns"]):
            shelf.tell(self.store, row, "read", format=found.format or "", columns=dict(found.columns))
        return found

    def open(self, dataset_id: str) -> Checked:
        """A known data set as it was last used."""
        row = self.store.dataset(dataset_id)
        said = row["profile"]
        guessed = bool(said.get("guessed"))
        return self._checked(row, row["format"] or None, row["columns"], said.get("reason", ""), False, guessed)

    def fix(self, dataset_id: str, cause: str, action: str) -> Checked:
        """The data set with one more decision about problem rows, or (no action) one less; the file stays as it is.

        Args:
            dataset_id: the version that is shown.
            cause: a key of `engine.data.REMEDIES`.
            action: one of its remedies, `fill:WORDS` for words; "" takes an earlier decision back.

        Raises:
            UnknownError: there is no such data set.
            FixError: no such remedy.
            DataError: nothing could be used then; all stays as it was.
            StateError: its format is still open.
        """
        row = self.store.dataset(dataset_id)
        if not row["format"]:
            raise StateError("It is not said yet what the columns are.", "Choose the format and the columns first.")
        fixes = {code: fix for code, fix in row["fixes"].items() if code != cause}
        if action:
            fixes = data.checked_fixes({**fixes, cause: action})
        reason, guessed = row["profile"].get("reason", ""), bool(row["profile"].get("guessed"))
        new = {**row, "id": data.version(row["file"], fixes), "fixes": fixes}
        found = self._checked(new, row["format"], row["columns"], reason, keep=False)
        if found.fault is not None:
            raise found.fault
        self._keep(found, new, guessed)
        shelf.stand_in(self.store, row["file"], new["id"])
        kept = found.prepared.kept if found.prepared else 0
        told = {"cause": cause, "action": action, "before": row["rows"], "after": kept}
        shelf.tell(self.store, new, "fixed" if action else "unfixed", **told)
        return found

    def _checked(
        self,
        row: Row,
        format: str | None,
        columns: Mapping[str, str],
        reason: str,
        keep: bool = True,
        guessed: bool = False,
    ) -> Checked:
        path, fixes = Path(row["path"]), row["fixes"]
        prepared, fault = None, None
        if format is None:
            available = tuple(read(path, fixes).columns)
        else:
            try:
                available, prepared = _prepared(path, format, columns, fixes)
                columns = prepared.columns
            except DataError as error:
                fault, available = error, tuple(read(path, fixes).columns)
        found = Checked(
            row["id"],
            row["name"],
            format,
            dict(columns),
            reason,
            available,
            prepared,
            fault,
            guessed,
            row["file"],
            dict(fixes),
        )
        if keep:
            self._keep(found, row, guessed)
        return found

    def _keep(self, found: Checked, row: Row, guessed: bool = False) -> None:
        profile: dict[str, Any] = {"reason": found.reason, "guessed": guessed}
        if found.prepared is not None:
            profile |= data.profile(found.prepared)
        self.store.save_dataset(
            {
                "id": found.id,
                "file": row["file"],
                "file_name": row["file_name"],
                "name": found.name,
                "format": found.format or "",
                "columns": dict(found.columns),
                "fixes": dict(found.fixes),
                "rows": found.prepared.kept if found.prepared else 0,
                "path": row["path"],
                "profile": profile,
                "created": time.time(),
            }
        )


def read(path: Path, fixes: Mapping[str, str] | None = None) -> data.Table:
    """The file's table; small files are kept in memory between two looks."""
    reading = while_reading(fixes or {})
    state = path.stat()
    if state.st_size > _CACHED_BYTES:
        return data.read(path, fixes=reading)
    return _read_cached(path, state.st_mtime_ns, tuple(reading.items()))


@functools.lru_cache(maxsize=2)
def _read_cached(path: Path, changed: int, fixes: tuple[tuple[str, str], ...]) -> data.Table:
    return data.read(path, fixes=dict(fixes))


def _prepared(
    path: Path, format: str, columns: Mapping[str, str], fixes: Mapping[str, str]
) -> tuple[tuple[str, ...], data.Prepared]:
    asked = tuple(sorted(columns.items()))
    return _prepared_cached(path, path.stat().st_mtime_ns, format, asked, tuple(sorted(fixes.items())))


@functools.lru_cache(maxsize=3)
def _prepared_cached(
    path: Path, changed: int, format: str, columns: tuple[tuple[str, str], ...], fixes: tuple[tuple[str, str], ...]
) -> tuple[tuple[str, ...], data.Prepared]:
    """A file's columns and rows. Few rows are in memory, many in a temporary file (`engine.data.held`)."""
    table = read(path, dict(fixes))
    wanted = {role: column for role, column in columns if column in table.columns}
    return tuple(table.columns), data.prepare(table, format, wanted, fixes=dict(fixes))


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
