"""sqlite_utils without pandas, which it only looks for, to know its types too.

Found, pandas and pyarrow are 65 MB and half a second in each process of the studio: training, scoring, answering.
"""

from __future__ import annotations

import importlib
import sys


def _load() -> None:
    if "pandas" in sys.modules:
        return
    # What stands there as None cannot be imported, for as long as it does.
    sys.modules["pandas"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("sqlite_utils.db")
    finally:
        del sys.modules["pandas"]


_load()

from sqlite_utils import Database as Database  # noqa: E402
from sqlite_utils.db import Table as Table  # noqa: E402
from sqlite_utils.migrations import Migrations as Migrations  # noqa: E402
