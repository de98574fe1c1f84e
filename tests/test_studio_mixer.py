"""Questions that overtake each other, and the mixer's arithmetic without a browser."""

from __future__ import annotations

import contextlib
from pathlib import Path

from studio import mixer
from studio.context import Studio
from studio.theme import css


def test_a_newer_question_ends_an_older_one_of_its_page_alone() -> None:
    newest = mixer.Newest(most=2)
    first, other = newest.claim("a"), newest.claim("b")
    assert newest.holds("a", first) and newest.holds("b", other)
    second = newest.claim("a")
    assert not newest.holds("a", first) and newest.holds("a", second) and newest.holds("b", other)
    newest.claim("c")
    assert not newest.holds("b", other) and newest.holds("a", second)


def test_every_colour_of_an_adapter_has_a_slider_in_it(tmp_path: Path) -> None:
    from studio.store import PALETTE

    with contextlib.closing(Studio.open(tmp_path)):
        for number, shade in enumerate(PALETTE):
            made = mixer.slider({"colour": shade, "name": "one"}, 0.5)
            assert f"mix-c{number}" in made.elem_classes and f".mix-c{number} {{ --slider-color: {shade}" in css()
