"""docs/methods.md says what the registry says."""

from __future__ import annotations

import re

from engine.adapters import ADAPTERS
from scripts import methods_page


def test_the_page_is_what_the_registry_makes() -> None:
    assert methods_page.PAGE.read_text(encoding="utf-8") == methods_page.page(), "run python scripts/methods_page.py"


def test_every_method_has_its_formula_paper_and_use() -> None:
    text = methods_page.page()
    for name, spec in ADAPTERS.items():
        assert "=" in methods_page.formula(spec), name
        assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", spec.paper), name
        assert f"## {spec.title}\n" in text
