"""Blind votes: the interval against known values, what is hidden until the vote, and that each pair counts once."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_adapters import finished_run, lora

from engine.errors import ConfigError
from studio import blind
from studio.blind import LEFT, RIGHT, TIE, wilson
from studio.comparisons import Comparisons
from studio.context import Studio
from studio.store import StateError, UnknownError
from studio.voices import voices

QUESTION = "What colour is grass?"
HOW = {"max_new_tokens": 12, "temperature": 0.0, "seed": 5}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with contextlib.closing(Studio.open(tmp_path_factory.mktemp("home"))) as studio:
        finished_run(studio, "parrot", lora(), 1)
        finished_run(studio, "captain", lora(r=6), 2)
        yield studio


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Studio]:
    with contextlib.closing(Studio.open(tmp_path)) as studio:
        yield studio


# As Newcombe prints them (Statistics in Medicine 17, 1998, 857-872, table I, method 3).
@pytest.mark.parametrize(
    ("wins", "votes", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_at_published_values(wins: int, votes: int, low: float, high: float) -> None:
    assert wilson(wins, votes) == pytest.approx((low, high), abs=5e-5)
    assert wilson(votes - wins, votes) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilsons_interval_is_where_the_score_test_turns() -> None:
    """Its ends are those p at which |p' - p| = z sqrt(p (1 - p) / n), the definition."""
    for wins, votes in ((3.5, 7), (0.5, 4), (12, 40), (39.5, 40)):
        for end in wilson(wins, votes):
            assert abs(wins / votes - end) == pytest.approx(blind.Z95 * (end * (1 - end) / votes) ** 0.5, rel=1e-9)
    with pytest.raises(ValueError):
        wilson(0, 0)
    with pytest.raises(ValueError):
        wilson(3, 2)


def test_nothing_says_who_answers_until_the_vote_which_counts_once(studio: Studio) -> None:
    keys = [row["id"] for row in studio.library.rows()]
    seen = [json.dumps([vars(column) for column in found.state.columns]) for found in _duel(studio, keys)]
    for word in ("parrot", "captain", '"base"', *keys, *(row["colour"] for row in studio.library.rows())):
        assert not any(word in told for told in seen), word
    found = _last(studio, keys)
    assert found.duel and [column.title for column in found.state.columns] == [LEFT, RIGHT]
    row = blind.vote(studio, found.duel, LEFT)
    sides = row["sides"]
    assert {side["title"] for side in sides} <= {"parrot", "captain", "base"} and sides[0]["title"] != sides[1]["title"]
    assert [side["text"] for side in sides] == [column.text for column in found.state.columns]
    with pytest.raises(StateError):
        blind.vote(studio, found.duel, RIGHT)
    with pytest.raises(UnknownError):
        blind.vote(studio, "0123456789abcdef", LEFT)
    with pytest.raises(ConfigError):
        blind.vote(studio, found.duel, "both")
    assert blind.vote(studio, _last(studio, keys).duel, TIE)["choice"] == TIE


def _duel(studio: Studio, keys: list[str]) -> Iterator[blind.Duel]:
    return blind.duel(studio, "tiny-llama", keys, QUESTION, HOW)


def _last(studio: Studio, keys: list[str]) -> blind.Duel:
    return list(_duel(studio, keys))[-1]


def test_sides_and_pairs_are_drawn_and_the_pair_with_fewest_votes_comes_first(studio: Studio) -> None:
    who = voices(studio, "tiny-llama", [row["id"] for row in studio.library.rows()])
    drawn = [blind.drawn_pair(studio, who[:2]) for _ in range(60)]
    assert {pair[0].key for pair in drawn} == {"base", who[1].key}
    studio.store.db.execute("DELETE FROM votes")
    _voted(studio, who[0].version, who[1].version, LEFT)
    _voted(studio, who[2].version, who[0].version, TIE)
    assert {frozenset(voice.key for voice in blind.drawn_pair(studio, who)) for _ in range(20)} == {
        frozenset((who[1].key, who[2].key))
    }
    with pytest.raises(ConfigError):
        blind.drawn_pair(studio, who[:1])


def _voted(studio: Studio, left: str, right: str, choice: str | None, base: str = "tiny-llama") -> None:
    sides: list[dict[str, Any]] = [{"title": name.upper(), "colour": "#123456"} for name in (left, right)]
    values = [str(time.monotonic_ns()), base, left, right, json.dumps(sides), choice, time.time(), time.time()]
    studio.store.db.execute(
        "INSERT INTO votes (id, base, prompt, settings, left_version, right_version, sides, choice, created, voted)"
        " VALUES (?, ?, 'p', '{}', ?, ?, ?, ?, ?, ?)",
        values,
    )


def test_rates_count_wins_losses_and_half_of_the_ties_by_side_and_base(fresh: Studio) -> None:
    for left, right, choice in (
        ("a", "b", LEFT),
        ("b", "a", RIGHT),
        ("a", "b", TIE),
        ("b", "a", LEFT),
        ("c", "a", TIE),
    ):
        _voted(fresh, left, right, choice)
    _voted(fresh, "a", "b", None)
    _voted(fresh, "a", "b", RIGHT, base="tiny-t5")
    rates = {rate.version: rate for rate in blind.rates(fresh, "tiny-llama")}
    assert [(r.wins, r.ties, r.losses) for r in (rates["a"], rates["b"], rates["c"])] == [
        (2, 2, 1),
        (1, 1, 2),
        (0, 1, 0),
    ]
    assert rates["a"].rate == pytest.approx(3 / 5) and rates["a"].interval == wilson(3, 5)
    assert [rate.version for rate in blind.rates(fresh, "tiny-llama")] == ["a", "c", "b"]
    against = {(one.version, other.version): one for one, other in blind.pairs(fresh, "tiny-llama")}
    one = against["a", "b"]
    assert (one.wins, one.ties, one.losses) == (2, 1, 1) and rates["a"].title == "A"


def test_a_pair_that_nobody_votes_on_is_forgotten_after_a_day_with_its_pictures(fresh: Studio) -> None:
    folder = fresh.home / "pictures"
    folder.mkdir()
    names = ("old", "shared", "new", "voted")
    for name in names:
        (folder / f"{name}.png").write_bytes(b"x")
    day, now = 86_400.0, time.time()
    for number, (picture, choice, age) in enumerate(
        [("old", None, day + 60), ("shared", None, day + 60), ("new", None, day - 60), ("voted", LEFT, 9 * day)]
    ):
        row = {"id": f"{number:016x}", "base": "tiny-blip", "prompt": "", "picture": "", "settings": "{}", "owner": "x"}
        sides = json.dumps([{"picture": str(folder / f"{picture}.png")}, {}])
        more = {"left_version": "base", "right_version": "ad", "sides": sides, "created": now - age, "choice": choice}
        fresh.store.db["votes"].insert({**row, **more})
    kept = Comparisons(fresh.store, fresh.home)
    kept.add("answers", "tiny-blip", "", {}, [{"picture": str(folder / "shared.png")}])
    assert kept.forget_pairs() == 2
    assert [row["id"][-1] for row in fresh.store.db.query("SELECT id FROM votes ORDER BY id")] == ["2", "3"]
    assert {path.stem for path in folder.iterdir()} == {*names} - {"old"}
    assert kept.forget_pairs() == 0
