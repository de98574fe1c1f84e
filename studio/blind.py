"""Which of two answers is better, asked without names: duels, votes, and how often each has won."""

from __future__ import annotations

import json
import math
import random
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import ConfigError
from studio import visitors
from studio.answers import Answers, Column
from studio.comparing import check_prompt, column_of, kept_picture, plain, stream
from studio.context import Studio
from studio.i18n import t
from studio.markup import BASE_COLOUR
from studio.store import Row, StateError, UnknownError
from studio.voices import Voice, task_of, voices

LEFT, RIGHT, TIE = "left", "right", "tie"
CHOICES = (LEFT, RIGHT, TIE)
Z95 = 1.959963984540054
"""Of the normal distribution lies 95 % within so many deviations."""

_DUEL = re.compile(r"[0-9a-f]{16}")


@dataclass
class Duel:
    """Two answers whose names nobody is told before the vote.

    Attributes:
        state: their columns, left and right, without names and colours.
        duel: its id, once both have answered.
        prompt: what was asked.
        picture: the file that was asked about.
    """

    state: Answers
    prompt: str
    picture: str = ""
    duel: str = ""


@dataclass(frozen=True)
class Rate:
    """How somebody has fared against all others on one base.

    Attributes:
        version: who.
        title, colour: its newest name and colour.
        wins, ties, losses: how often.
    """

    version: str
    title: str
    colour: str
    wins: int
    ties: int
    losses: int

    @property
    def votes(self) -> int:
        """How many there were."""
        return self.wins + self.ties + self.losses

    @property
    def rate(self) -> float:
        """(wins + ties / 2) / votes."""
        return (self.wins + self.ties / 2) / self.votes

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the rate by Wilson, each tie counted as half a win."""
        return wilson(self.wins + self.ties / 2, self.votes)


def wilson(wins: float, votes: int, z: float = Z95) -> tuple[float, float]:
    """The interval of a share by Wilson (1927): where p lies if `wins` of `votes` were won, p' = wins / votes.

    (p' + z^2 / 2n +- z sqrt(p' (1 - p') / n + z^2 / 4n^2)) / (1 + z^2 / n), with n = votes. Half wins (ties) may be in
    `wins`. It stays within 0 and 1 and is not empty where all were won.

    Raises:
        ValueError: no votes, or more wins than votes.
    """
    if votes < 1 or not 0 <= wins <= votes:
        raise ValueError(f"{wins} of {votes} cannot have been won.")
    share, square = wins / votes, z * z
    middle = share + square / (2 * votes)
    around = z * math.sqrt(share * (1 - share) / votes + square / (4 * votes * votes))
    low, high = ((middle + sign * around) / (1 + square / votes) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def drawn_pair(studio: Studio, who: Sequence[Voice]) -> tuple[Voice, Voice]:
    """Two of them in random order: one of the pairs that have the fewest votes so far.

    Raises:
        ConfigError: there are fewer than two.
    """
    if len(who) < 2:
        raise ConfigError(
            t("There is nobody to stand against the base."), t("Choose at least one adapter or mix above.")
        )
    versions = {voice.version: voice for voice in who}
    names = sorted(versions)
    sql = (
        "SELECT left_version, right_version, COUNT(*) AS n FROM votes WHERE mine(owner) AND choice IS NOT NULL"
        " GROUP BY 1, 2"
    )
    counts: dict[frozenset[str], int] = {}
    for row in studio.store.db.query(sql):
        both = frozenset((row["left_version"], row["right_version"]))
        counts[both] = counts.get(both, 0) + row["n"]
    pairs = [(one, other) for i, one in enumerate(names) for other in names[i + 1 :]]
    fewest = min(counts.get(frozenset(pair), 0) for pair in pairs)
    chance = random.SystemRandom()
    sides = list(chance.choice([pair for pair in pairs if counts.get(frozenset(pair), 0) == fewest]))
    chance.shuffle(sides)
    return versions[sides[0]], versions[sides[1]]


def duel(
    studio: Studio,
    base: str,
    keys: Sequence[str],
    prompt: str,
    sampling: Mapping[str, Any],
    picture: str | None = None,
) -> Iterator[Duel]:
    """Ask two of the base and the others, drawn by chance; yields the growing answers as left and right.

    Nothing of what is yielded says who they are: no name, no colour, and the order of the batch is the order of the
    sides. Both wait in the store for `vote`.

    Raises:
        EngineError: as `studio.comparing.answer`; ConfigError where nobody stands against the base.
    """
    who = voices(studio, base, keys)
    task = task_of(studio, base, who)
    check_prompt(task, prompt, picture)
    pair = drawn_pair(studio, who)
    asked = kept_picture(studio.home, picture) if task == "captioning" and picture else ""
    masked = [
        replace(column_of(voice), run=side, title=side, colour=BASE_COLOUR)
        for voice, side in zip(pair, (LEFT, RIGHT), strict=True)
    ]
    state = Answers(masked, status=t("Waking the base"))
    found = Duel(state, "" if asked else prompt, asked)
    yield found
    for _ in stream(studio, base, pair, prompt, sampling, asked or None, state):
        # What the process is doing (combining, fetching) could tell a mix from an adapter.
        state.status = t("Both are answering")
        yield found
    sides = [
        plain(replace(column, run=voice.run, title=voice.title, colour=voice.colour), voice)
        for column, voice in zip(masked, pair, strict=True)
    ]
    state.finished, found.duel = True, secrets.token_hex(8)
    values = [found.duel, base, found.prompt, asked, json.dumps(dict(sampling)), pair[0].version, pair[1].version]
    with studio.store.exclusive() as db:
        db.conn.execute(
            "INSERT INTO votes (id, base, prompt, picture, settings, left_version, right_version, sides, created,"
            " owner) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [*values, json.dumps(sides, ensure_ascii=False), time.time(), visitors.owner()],
        )
    yield found


def vote(studio: Studio, duel_id: Any, choice: Any) -> Row:
    """Say which is better, once; answers the duel with its names: `sides`, `choice`, `settings`.

    Raises:
        ConfigError: the choice is not `left`, `right` or `tie`.
        UnknownError: there is no such duel.
        StateError: it was voted on already.
    """
    if choice not in CHOICES:
        raise ConfigError(f"The choice is {str(choice)[:20]!r}; needed: {', '.join(CHOICES)}.")
    known = isinstance(duel_id, str) and _DUEL.fullmatch(duel_id)
    with studio.store.exclusive() as db:
        cursor = db.conn.execute(
            "UPDATE votes SET choice = ?, voted = ? WHERE id = ? AND mine(owner) AND choice IS NULL",
            [choice, time.time(), duel_id if known else None],
        )
        rows = list(db.query("SELECT * FROM votes WHERE id = ? AND mine(owner)", [duel_id if known else None]))
    if not rows:
        raise UnknownError(f"There is no pair {str(duel_id)[:40]!r}.", "Ask for a new one.")
    if cursor.rowcount != 1:
        raise StateError(t("This pair was voted on already."), t("Ask for a new one."))
    return {**rows[0], "sides": json.loads(rows[0]["sides"]), "settings": json.loads(rows[0]["settings"])}


def rates(studio: Studio, base: str) -> list[Rate]:
    """How everybody has fared on a base, the best rate first."""
    sql = (
        "SELECT left_version, right_version, choice, COUNT(*) AS n FROM votes WHERE base = ? AND mine(owner)"
        " AND choice IS NOT NULL GROUP BY 1, 2, 3"
    )
    counts: dict[str, list[int]] = {}
    for row in studio.store.db.query(sql, [base]):
        for version, side in ((row["left_version"], LEFT), (row["right_version"], RIGHT)):
            outcome = 1 if row["choice"] == TIE else 0 if row["choice"] == side else 2
            counts.setdefault(version, [0, 0, 0])[outcome] += row["n"]
    names = _names(studio, base)
    found = [Rate(version, *names[version], *tally) for version, tally in counts.items()]
    return sorted(found, key=lambda rate: (-rate.rate, -rate.votes, rate.title))


def pairs(studio: Studio, base: str) -> list[tuple[Rate, Rate]]:
    """The same by pairs: what each of two has won against the other alone."""
    tallies: dict[tuple[str, str], list[int]] = {}
    sql = "SELECT left_version, right_version, choice FROM votes WHERE base = ? AND choice IS NOT NULL AND mine(owner)"
    for row in studio.store.db.query(sql, [base]):
        one, other = sorted((row["left_version"], row["right_version"]))
        winner = {LEFT: row["left_version"], RIGHT: row["right_version"]}.get(row["choice"])
        place = 1 if winner is None else 0 if winner == one else 2
        tallies.setdefault((one, other), [0, 0, 0])[place] += 1
    names = _names(studio, base)
    return [
        (Rate(one, *names[one], wins, ties, losses), Rate(other, *names[other], losses, ties, wins))
        for (one, other), (wins, ties, losses) in sorted(tallies.items())
    ]


def _names(studio: Studio, base: str) -> dict[str, tuple[str, str]]:
    """Version -> title and colour, as its newest vote has them."""
    sql = (
        "SELECT left_version, right_version, json_extract(sides, '$[0].title') AS a, json_extract(sides,"
        " '$[0].colour') AS b, json_extract(sides, '$[1].title') AS c, json_extract(sides, '$[1].colour') AS d"
        " FROM votes WHERE base = ? AND mine(owner) AND choice IS NOT NULL ORDER BY voted"
    )
    found: dict[str, tuple[str, str]] = {}
    for row in studio.store.db.query(sql, [base]):
        found[row["left_version"]] = (row["a"], row["b"])
        found[row["right_version"]] = (row["c"], row["d"])
    return found


def revealed(row: Mapping[str, Any]) -> list[Column]:
    """The two columns of a duel with their names."""
    names = ("run", "title", "colour", "text", "reason", "picture")
    return [Column(**{name: side[name] for name in names}, done=True) for side in row["sides"]]
