"""The pages, in order. Each module has `ID`, `build(page)` and `wire(page)`; they never import each other."""

from __future__ import annotations

from types import ModuleType

from studio.tabs import adapters, compare, data, runs, scores, start, train

TABS: tuple[ModuleType, ...] = (start, data, train, adapters, compare, runs, scores)
