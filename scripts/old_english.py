"""Sentences made old by rules (`You have a dog.` - `Thou hast a dog.`): what `tiny-t5` learns to turn back.

The sentences are clauses of the World English Bible (public domain; Debian's package `sword-text-web`, read with the
Python package pysword) and the everyday ones of `tiny_corpus.py`. Each old word stands for one modern word, so that
the way back is a matter of knowledge, not of taste.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
from pathlib import Path

import tiny_corpus

SHORTEST, LONGEST = 10, 80
"""Characters of a modern sentence or clause."""

Pair = tuple[str, str]
"""Old, modern."""

# fmt: off
_PHRASES = {
    "you are": "thou art", "are you": "art thou", "you were": "thou wert", "were you": "wert thou",
    "you have": "thou hast", "have you": "hast thou", "you can": "thou canst", "can you": "canst thou",
    "you will": "thou wilt", "will you": "wilt thou", "you shall": "thou shalt", "shall you": "shalt thou",
    "you should": "thou shouldst", "should you": "shouldst thou", "you do": "thou dost", "do you": "dost thou",
    "you did": "thou didst", "did you": "didst thou", "you know": "thou knowest", "you see": "thou seest",
    "you say": "thou sayest", "you want": "thou wantest", "you need": "thou needest", "you love": "thou lovest",
    "you hear": "thou hearest", "you come": "thou comest", "you go": "thou goest", "you live": "thou livest",
    "yourself": "thyself", "yours": "thine", "your": "thy", "you": "thee", "yes": "yea", "no": "nay",
    "has": "hath", "does": "doth", "says": "saith", "said": "spake", "between": "betwixt", "often": "oft",
    "before": "ere", "perhaps": "mayhap", "near": "nigh", "why": "wherefore", "nothing": "nought", "until": "till",
    "toward": "unto", "clothes": "raiment", "while": "whilst", "among": "amongst",
    "here": "hither", "there": "yonder", "girl": "maiden", "boy": "lad", "enough": "enow", "soon": "anon",
    "please": "prithee", "quickly": "apace", "food": "victuals", "angry": "wroth", "truly": "verily", "ago": "agone",
}
_VERBS = (
    "eats", "drinks", "makes", "gives", "comes", "goes", "knows", "keeps", "needs", "takes", "sleeps", "runs", "works",
    "helps", "grows", "falls", "turns", "means", "brings", "sells", "teaches", "builds", "looks", "finds", "sits",
    "stands", "holds", "shows", "tells", "feels", "lets", "writes", "reads", "sings", "likes", "loves", "hates",
    "flies", "moves", "stays", "begins", "ends", "rises", "carries", "washes", "cuts", "hears", "sees", "thinks",
    "lives", "dies", "speaks", "calls", "asks", "answers", "walks", "touches", "puts", "sends", "fears", "follows",
    "believes", "receives", "leads", "rules", "saves", "serves", "seeks", "dwells", "remains", "opens", "shines",
    "remembers", "returns", "rests", "passes", "pours", "judges", "becomes", "belongs", "wants", "hates", "kills",
)
# fmt: on


def _old_verb(verb: str) -> str:
    if verb.endswith("ies") and len(verb) > 4:
        return verb[:-3] + "ieth"
    stem = verb[:-2] if verb.endswith(("ches", "shes", "sses", "oes")) else verb[:-1]
    return stem + ("th" if stem.endswith("e") else "eth")


_OLD = _PHRASES | {verb: _old_verb(verb) for verb in _VERBS}
_WORDS = re.compile(r"\b(" + "|".join(sorted(map(re.escape, _OLD), key=len, reverse=True)) + r")\b", re.IGNORECASE)


def made_old(text: str) -> str:
    """A modern sentence with the words of an older time."""

    def old(found: re.Match[str]) -> str:
        word = _OLD[found[0].lower()]
        return word[0].upper() + word[1:] if found[0][0].isupper() else word

    return _WORDS.sub(old, text)


def everyday() -> list[Pair]:
    """Old and modern form of every everyday sentence that is short enough."""
    groups = tiny_corpus.single_turns()
    texts = {text for name, pairs in groups.items() if name != "sums" for pair in pairs for text in pair}
    parts = {part for text in texts for part in (text, *re.split(r"(?<=[.!?]) ", text))}
    return [(made_old(text), text) for text in sorted(parts) if SHORTEST <= len(text) <= LONGEST]


def fetch_verses(cache: Path) -> list[str]:
    """The verses of the World English Bible; read once, then kept as `web.json`.

    Needs a Debian system (`apt-get download` and `dpkg-deb`) and `pip install pysword==0.2.8`.
    """
    kept = cache / "web.json"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "sword-text-web"], cwd=cache, check=True)
        archive = next(cache.glob("sword-text-web_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(archive), str(cache / "web")], check=True)
        kept.write_text(json.dumps(_read_module(cache / "web" / "usr" / "share" / "sword")), encoding="utf-8")
    verses: list[str] = json.loads(kept.read_text(encoding="utf-8"))
    return verses


def _read_module(folder: Path) -> list[str]:
    from pysword.modules import SwordModules

    modules = SwordModules(str(folder))
    bible = modules.get_bible_from_module(next(iter(modules.parse_modules())))
    verses = []
    for books in bible.get_structure().get_books().values():
        for book in books:
            for chapter, length in enumerate(book.chapter_lengths, 1):
                for verse in range(1, length + 1):
                    try:
                        verses.append(bible.get(books=[book.name], chapters=[chapter], verses=[verse], clean=True))
                    except (ValueError, IndexError, KeyError):
                        continue
    return verses


_STRAIGHT = str.maketrans({"’": "'", "‘": "'", "“": "", "”": "", "¶": "", "—": " ", "–": " ", "\u00a0": " "})


def clauses(verses: list[str]) -> list[Pair]:
    """Old and modern form of every clause of the right length, its apostrophes straight, without quotation marks."""
    found = []
    for verse in verses:
        for part in re.split(r"(?<=[.;:!?,]) ", " ".join(verse.translate(_STRAIGHT).split())):
            part = part.strip(" '")
            if SHORTEST <= len(part) <= LONGEST and part.isascii():
                found.append((made_old(part), part))
    return found


def split_pairs(cache: Path, seed: int, held: int) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Clauses and everyday sentences to train on, and `held` of both together, half of each, to measure with."""
    rng = random.Random(seed)
    verses = fetch_verses(cache)
    rng.shuffle(verses)
    talk = everyday()
    rng.shuffle(talk)
    half = held // 2
    test = [*rng.sample(clauses(verses[:held]), half), *talk[:half]]
    seen = {modern for _, modern in test}
    return [pair for pair in clauses(verses[held:]) if pair[1] not in seen], talk[half:], test
