"""Short sentences in English and Korean, made from small tables: words, tenses, times, places and particles.

The tables are this project's own. `sentences` gives every sentence once, in an order of its own for each seed; one in
four (`held_back`) never enters the pretraining of `tiny-t5`: the sample data set and the tests are made of those.
"""

# Hangul counts as two columns each, and a table is easier to read in one line than in two.
# ruff: noqa: E501

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

Pair = tuple[str, str]
"""English, Korean."""


@dataclass(frozen=True)
class Verb:
    """English base, third person and past; Korean present, past and future; the names of its objects."""

    plain: str
    third: str
    past: str
    ko: tuple[str, str, str]
    objects: tuple[str, ...]


# fmt: off
SUBJECTS = {
    "I": "저", "we": "우리", "they": "그들", "my friend": "제 친구", "my mother": "어머니", "my father": "아버지",
    "the child": "아이", "the teacher": "선생님", "the student": "학생", "the doctor": "의사", "the farmer": "농부",
    "the boy": "소년", "the girl": "소녀",
}
PLURAL = ("I", "we", "they")
THINGS = {
    "an apple": "사과", "bread": "빵", "rice": "밥", "fish": "생선", "an egg": "계란", "noodles": "국수",
    "cake": "케이크", "soup": "수프", "strawberries": "딸기", "meat": "고기", "water": "물", "milk": "우유",
    "coffee": "커피", "tea": "차", "juice": "주스", "a book": "책", "a letter": "편지", "a newspaper": "신문",
    "a poem": "시", "a diary": "일기", "a hat": "모자", "shoes": "신발", "flowers": "꽃", "a bag": "가방",
    "a ticket": "표", "clothes": "옷", "a film": "영화", "the sea": "바다", "the moon": "달", "the stars": "별",
    "a picture": "그림", "the mountain": "산", "music": "음악", "a song": "노래", "the radio": "라디오",
    "a chair": "의자", "a table": "식탁", "a kite": "연", "a key": "열쇠", "a clock": "시계", "a cup": "컵",
    "English": "영어", "history": "역사", "Korean": "한국어", "a pencil": "연필", "an umbrella": "우산",
}
PLACES = {
    "school": "학교", "the market": "시장", "the hospital": "병원", "the library": "도서관", "the park": "공원",
    "the station": "역", "the office": "사무실", "the restaurant": "식당", "the shop": "가게", "the river": "강",
}
PRESENT = {"today": "오늘", "every day": "매일", "now": "지금", "in the morning": "아침에", "in the evening": "저녁에"}
PAST = {"yesterday": "어제", "last week": "지난주에", "last night": "어젯밤에"}
FUTURE = {"tomorrow": "내일", "next week": "다음 주에", "on Sunday": "일요일에"}
_FOOD = ("an apple", "bread", "rice", "fish", "an egg", "noodles", "cake", "soup", "strawberries", "meat")
_DRINK = ("water", "milk", "coffee", "tea", "juice")
_GOODS = ("a hat", "shoes", "flowers", "a bag", "a ticket", "clothes", "a chair", "a clock", "a cup", "an umbrella",
          "a pencil", "a book", "bread", "milk", "a key")
VERBS = (
    Verb("eat", "eats", "ate", ("먹어요", "먹었어요", "먹을 거예요"), _FOOD),
    Verb("drink", "drinks", "drank", ("마셔요", "마셨어요", "마실 거예요"), _DRINK),
    Verb("buy", "buys", "bought", ("사요", "샀어요", "살 거예요"), (*_GOODS, "an apple", "fish", "strawberries")),
    Verb("sell", "sells", "sold", ("팔아요", "팔았어요", "팔 거예요"), (*_GOODS, "an apple", "fish", "a table")),
    Verb("look for", "looks for", "looked for", ("찾아요", "찾았어요", "찾을 거예요"), _GOODS),
    Verb("read", "reads", "read", ("읽어요", "읽었어요", "읽을 거예요"), ("a book", "a letter", "a newspaper", "a poem")),
    Verb("write", "writes", "wrote", ("써요", "썼어요", "쓸 거예요"), ("a letter", "a poem", "a diary", "a book")),
    Verb("watch", "watches", "watched", ("봐요", "봤어요", "볼 거예요"),
         ("a film", "the sea", "the moon", "the stars", "a picture", "the mountain")),
    Verb("listen to", "listens to", "listened to", ("들어요", "들었어요", "들을 거예요"), ("music", "a song", "the radio")),
    Verb("make", "makes", "made", ("만들어요", "만들었어요", "만들 거예요"),
         ("bread", "cake", "soup", "noodles", "a chair", "a table", "a kite", "tea", "clothes")),
    Verb("learn", "learns", "learned", ("배워요", "배웠어요", "배울 거예요"), ("English", "history", "Korean", "a song")),
    Verb("teach", "teaches", "taught", ("가르쳐요", "가르쳤어요", "가르칠 거예요"), ("English", "history", "Korean")),
    Verb("draw", "draws", "drew", ("그려요", "그렸어요", "그릴 거예요"),
         ("a picture", "flowers", "the sea", "the mountain", "the moon")),
    Verb("wash", "washes", "washed", ("씻어요", "씻었어요", "씻을 거예요"), ("an apple", "a cup", "strawberries")),
)
QUALITIES = {
    "big": "커요", "small": "작아요", "good": "좋아요", "expensive": "비싸요", "cheap": "싸요", "pretty": "예뻐요",
    "old": "오래됐어요", "clean": "깨끗해요", "heavy": "무거워요", "light": "가벼워요", "white": "하얘요", "red": "빨개요",
}
SEEN = {
    "apple": "사과", "book": "책", "hat": "모자", "bag": "가방", "chair": "의자", "table": "식탁", "kite": "연",
    "key": "열쇠", "clock": "시계", "cup": "컵", "pencil": "연필", "umbrella": "우산", "picture": "그림", "letter": "편지",
    "house": "집", "car": "차", "cat": "고양이", "dog": "개", "tree": "나무", "ball": "공",
}
STANDS = {"on": "위에", "under": "아래에", "next to": "옆에", "behind": "뒤에", "in front of": "앞에"}
GROUNDS = {"chair": "의자", "table": "식탁", "house": "집", "car": "차", "tree": "나무", "bag": "가방", "desk": "책상"}
# fmt: on


def closed(word: str) -> bool:
    """Whether a Korean word ends in a consonant, which decides its particles."""
    return (ord(word[-1]) - 0xAC00) % 28 != 0


def topic(word: str) -> str:
    return word + ("은" if closed(word) else "는")


def subject(word: str) -> str:
    return word + ("이" if closed(word) else "가")


def thing(word: str) -> str:
    return word + ("을" if closed(word) else "를")


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def _acts() -> Iterator[Pair]:
    """`The child ate bread at the park yesterday.` - `아이는 어제 공원에서 빵을 먹었어요.`"""
    tenses = ((0, PRESENT), (1, PAST), (2, FUTURE))
    places: list[tuple[str, str] | None] = [None, *PLACES.items()]
    for (who, wer), verb, (tense, times) in itertools.product(SUBJECTS.items(), VERBS, tenses):
        form = (verb.plain if who in PLURAL else verb.third, verb.past, f"will {verb.plain}")[tense]
        for what, (when, wann), where in itertools.product(verb.objects, [*times.items()], places):
            at = f" at {where[0]}" if where else ""
            there = f"{where[1]}에서 " if where else ""
            english = f"{_upper(who)} {form} {what}{at} {when}."
            yield english, f"{topic(wer)} {wann} {there}{thing(THINGS[what])} {verb.ko[tense]}."


def _refusals() -> Iterator[Pair]:
    """`We do not drink coffee.` - `우리는 커피를 안 마셔요.`"""
    for (who, wer), verb in itertools.product(SUBJECTS.items(), VERBS):
        for what in verb.objects:
            name = thing(THINGS[what])
            do = "do" if who in PLURAL else "does"
            yield f"{_upper(who)} {do} not {verb.plain} {what}.", f"{topic(wer)} {name} 안 {verb.ko[0]}."
            yield f"{_upper(who)} did not {verb.plain} {what}.", f"{topic(wer)} {name} 안 {verb.ko[1]}."
            yield f"{_upper(do)} {who} {verb.plain} {what}?", f"{topic(wer)} {name} {verb.ko[0]}?"


def _journeys() -> Iterator[Pair]:
    """`My father went to the market yesterday.` - `아버지는 어제 시장에 갔어요.`"""
    for (who, wer), (where, ort) in itertools.product(SUBJECTS.items(), PLACES.items()):
        for times, form, ko in (
            (PRESENT, "go" if who in PLURAL else "goes", "가요"),
            (PAST, "went", "갔어요"),
            (FUTURE, "will go", "갈 거예요"),
        ):
            for when, wann in times.items():
                yield f"{_upper(who)} {form} to {where} {when}.", f"{topic(wer)} {wann} {ort}에 {ko}."


def _looks() -> Iterator[Pair]:
    """`The hat is red.` - `모자가 빨개요.`, and where things are."""
    for (name, ko), (quality, how) in itertools.product(SEEN.items(), QUALITIES.items()):
        yield f"The {name} is {quality}.", f"{subject(ko)} {how}."
        yield f"Is the {name} {quality}?", f"{subject(ko)} {how}?"
    for (name, ko), (stands, wo), (ground, grund) in itertools.product(SEEN.items(), STANDS.items(), GROUNDS.items()):
        if name != ground:
            yield f"The {name} is {stands} the {ground}.", f"{subject(ko)} {grund} {wo} 있어요."


def held_back(english: str) -> bool:
    """Whether a sentence is kept from pretraining: one in four, by its own text."""
    return hashlib.sha256(english.encode()).digest()[0] % 4 == 0


def sentences(seed: int, acts: int = 6000) -> list[Pair]:
    """Sentences of every kind, shuffled; of the acts, which are by far the most, `acts` drawn ones."""
    rng = random.Random(seed)
    every = [*rng.sample([*_acts()], acts), *_refusals(), *_journeys(), *_looks()]
    rng.shuffle(every)
    return every
