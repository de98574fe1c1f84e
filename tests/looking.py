"""What a browser can say about how a page looks: contrast of its texts, its controls by the keyboard, its width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

STILL = "*, *::before, *::after { transition: none !important; animation: none !important; }"
"""Nothing moves while it is looked at."""

SCRIPT = Path(__file__).with_name("looking.js")


def contrast(page: Any) -> list[str]:
    """The visible texts whose contrast is below AA: 4.5, or 3 where they are large."""
    page.add_script_tag(path=SCRIPT)
    found = page.evaluate("looking.contrast()")
    assert found["count"] > 5, "there is hardly any text on the page"
    return list(found["faults"])


def keyboard(page: Any, most: int = 250) -> dict[str, list[str]]:
    """What is wrong for someone without a mouse: controls without a name, without a visible focus, out of reach."""
    page.add_script_tag(path=SCRIPT)
    page.evaluate("document.activeElement?.blur(); window.scrollTo(0, 0);")
    controls = page.evaluate("looking.controls()")
    assert controls["count"] > 5, "there is hardly anything to press on the page"
    unseen, lost = [], False
    for _ in range(most):
        page.keyboard.press("Tab")
        focus = page.evaluate("looking.focused()")
        if focus["end"] and not (focus.get("lost") and not lost):
            break
        # The list of a dropdown that is left takes the focus with it as it closes; the next press goes on behind it.
        lost = focus["end"]
        if lost:
            continue
        if not focus["seen"]:
            unseen.append(focus["words"])
    return {"nameless": controls["nameless"], "unseen": unseen, "missed": page.evaluate("looking.missed()")}
