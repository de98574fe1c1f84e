"""One owner a home: a file lock that ends with its process, however that ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO


class OwnerLock:
    """`acquire()` is True in one process at a time. The system lets go when the process ends, even by KILL."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def acquire(self) -> bool:
        """Try once, without waiting."""
        if self._file is not None:
            return True
        file = self.path.open("ab")
        try:
            if sys.platform == "win32":
                import msvcrt

                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return False
        self._file = file
        return True

    def release(self) -> None:
        """Let go; harmless when not held."""
        if self._file is not None:
            self._file.close()
            self._file = None
