"""The registry of adapter methods: one line a method.

The line names the module; it is imported when the method is first used, so the page can list methods without torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.adapters.base import AdapterSpec


class Registry(Mapping[str, "AdapterSpec"]):
    """Method name -> its frozen record, imported on first use."""

    def __init__(self, modules: dict[str, str]) -> None:
        self._modules = modules

    def __getitem__(self, name: str) -> AdapterSpec:
        if name not in self._modules:
            raise ConfigError(f"There is no adapter method {name!r}.", f"Known methods: {', '.join(self._modules)}.")
        spec: AdapterSpec = importlib.import_module(self._modules[name]).SPEC
        return spec

    def module_of(self, name: str) -> str:
        """The dotted name of the module that holds a method."""
        return self._modules[name]

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


ADAPTERS = Registry(
    {
        "lora": "engine.adapters.lora",
        "dora": "engine.adapters.dora",
        "adalora": "engine.adapters.adalora",
        "delta_lora": "engine.adapters.delta_lora",
        "lorafa": "engine.adapters.lorafa",
        "qalora": "engine.adapters.qalora",
        "ia3": "engine.adapters.ia3",
        "vera": "engine.adapters.vera",
        "mora": "engine.adapters.mora",
        "loha": "engine.adapters.loha",
        "lokr": "engine.adapters.lokr",
        "prompt_tuning": "engine.adapters.prompt_tuning",
        "p_tuning": "engine.adapters.p_tuning",
        "prefix_tuning": "engine.adapters.prefix_tuning",
    }
)
