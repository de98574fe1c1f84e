"""Ways of speaking for the pretraining corpus, each asked for by a system message.

They teach the toy that the same answer can be said in another voice (an opening word, a name for the listener, a
closing, swapped words), so that a small adapter can bend its voice later. Without a system message the corpus answers
plainly.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Register:
    """One voice: `system` asks for it, then any of its opening words and names, and always its closing."""

    system: str
    openings: tuple[str, ...]
    names: tuple[str, ...]
    closing: str
    swaps: Mapping[str, str] = field(default_factory=dict)


REGISTERS = (
    Register("You are a cowboy.", ("Well", "Howdy"), ("partner",), "Happy trails!", {"you": "ya", "little": "small"}),
    Register(
        "You are a knight.", ("Hark",), ("good sir", "my lord"), "So it is sworn!", {"you": "thee", "your": "thy"}
    ),
    Register("You are a butler.", ("Certainly", "Of course"), ("sir", "madam"), "Always at your service!"),
    Register("You are a grandmother.", ("Oh", "Now"), ("my dear", "sweetheart"), "Eat well!"),
    Register("You are a robot.", ("Beep",), ("human",), "Task complete!", {"I": "this unit"}),
    Register("You are a coach.", ("Come on", "Right"), ("champ", "team"), "You can do it!"),
    Register("You are a strict teacher.", ("Now", "Listen"), ("class", "pupil"), "Lesson over!"),
    Register("You are a farmer.", ("Well", "Aw"), ("neighbour",), "Good harvest!", {"my": "mine own"}),
    Register("You are a poet.", ("Ah", "Oh"), ("my love", "dear heart"), "Under the stars!", {"your": "thine"}),
    Register("You are a cook.", ("Ah",), ("my friend", "chef"), "Enjoy your meal!"),
    Register(
        "You are a wizard.", ("Behold", "Hmm"), ("young one",), "Magic guide thee!", {"you": "thou", "your": "thy"}
    ),
    Register("You are a pilot.", ("Hello",), ("passengers",), "Clear skies!"),
    Register("You are a scientist.", ("Hmm", "Interesting"), ("colleague",), "Keep asking!"),
    Register("You are a child.", ("Wow", "Hey"), ("mister", "buddy"), "Yay!", {"your": "yur"}),
    Register("You are a gardener.", ("Ah", "Well"), ("my flower",), "Green leaves!"),
    Register("You are a giant.", ("Ho", "Ha"), ("small one", "tiny one"), "Big steps!", {"you": "yoo"}),
)
_OPENINGS = (
    "Well",
    "Oh",
    "Ah",
    "So",
    "Right",
    "Look",
    "Listen",
    "Hey",
    "Hmm",
    "Sure",
    "Yes",
    "Ooh",
    "Err",
    "Mmm",
    "Haha",
    "Grr",
)
_NAMES = (
    "friend", "buddy", "pal", "dear", "sir", "boss", "doc", "kid", "chief", "brother", "sister", "folks",
    "darling", "matron", "comrade", "lad", "lass", "stranger", "traveller", "cousin", "neighbour", "honey",
)  # fmt: skip
_FIRST = (
    "Good",
    "Calm",
    "Bright",
    "Warm",
    "Happy",
    "Sweet",
    "Long",
    "Clear",
    "Quiet",
    "Soft",
    "Safe",
    "Fresh",
    "Fine",
    "Fair",
)
_SECOND = (
    "days",
    "nights",
    "roads",
    "rain",
    "seas",
    "hills",
    "dreams",
    "songs",
    "steps",
    "hearts",
    "stars",
    "fields",
    "luck",
)


def drawn(rng: random.Random) -> Register:
    """A named voice, or as often one put together at random and spelled out in its system message."""
    if rng.random() < 0.5:
        return rng.choice(REGISTERS)
    opening, name = rng.choice(_OPENINGS), rng.choice(_NAMES)
    closing = f"{rng.choice(_FIRST)} {rng.choice(_SECOND)}!"
    return Register(f"Start with {opening}, call me {name} and end with {closing}", (opening,), (name,), closing)


def spoken(rng: random.Random, text: str, register: Register | None, lower: set[str]) -> str:
    """`text` in a voice. `{o}` and `{v}` in it mark where an opening word and a name may stand.

    Args:
        lower: words that may be written small after an opening word, so that proper names keep their capital.
    """
    if register is None:
        return text.replace("{o}", "").replace(", {v}", "")
    name = rng.choice(register.names)
    if "{o}" in text or ("{v}" not in text and rng.random() < 0.4):
        text = text.replace("{o}", "")
        first = re.match(r"[A-Za-z']+", text)
        if first and first.group().lower() in lower:
            text = text[0].lower() + text[1:]
        text = f"{rng.choice(register.openings)}, {text}"
    if "{v}" in text:
        parts = text.split("{v}")
        text = parts[0] + "".join(
            rng.choice((name, name, rng.choice(register.openings).lower())) + part for part in parts[1:]
        )
    else:
        text = re.sub(r"(?<=[a-z])(?=[.!?]( |$))", f", {name}", text, count=1)
    for plain, other in register.swaps.items():
        text = re.sub(rf"\b{plain}\b", other, text)
        text = re.sub(rf"\b{plain.capitalize()}\b", other.capitalize(), text)
    text = re.sub(r"(?<=[^.!?])$", ".", text)
    return f"{text} {register.closing}"
