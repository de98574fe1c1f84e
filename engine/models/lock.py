"""A lock file between processes: one fetches, the others wait for it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_RETRY_SECONDS = 0.2


@contextmanager
def held(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Hold the lock file `path` (made when missing, never removed: a removed one could be locked twice).

    The system frees the lock when the process ends, however it ends.

    Args:
        path: the lock file.
        on_wait: called once when another process holds it.

    Yields:
        The file descriptor; a child that inherits it keeps the lock until it ends as well.
    """
    with path.open("a+b") as file:
        waiting = False
        while not _taken(file.fileno()):
            if not waiting:
                waiting = True
                on_wait()
            time.sleep(_RETRY_SECONDS)
        yield file.fileno()


if sys.platform == "win32":
    import msvcrt

    def _taken(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _taken(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
