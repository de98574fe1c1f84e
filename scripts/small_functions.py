"""Short Python functions with what they do, for the sample of code: `examples/small_functions.jsonl`.

Every function is run on examples of its own before it is written, so none of them is wrong.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

NUMBERS = {
    "the sum": "sum(numbers)",
    "the largest": "max(numbers)",
    "the smallest": "min(numbers)",
    "how many there are": "len(numbers)",
    "the difference between largest and smallest": "max(numbers) - min(numbers)",
    "the mean": "sum(numbers) / len(numbers)",
}
WHICH = {
    "": "",
    "even": "n % 2 == 0",
    "odd": "n % 2 == 1",
    "positive": "n > 0",
    "larger than ten": "n > 10",
    "divisible by three": "n % 3 == 0",
}
EACH = {
    "doubles": "2 * n",
    "squares": "n * n",
    "halves": "n / 2",
    "negates": "-n",
    "adds one to": "n + 1",
    "takes ten from": "n - 10",
    "cubes": "n ** 3",
}
WORDS = {
    "in capital letters": "word.upper()",
    "in small letters": "word.lower()",
    "backwards": "word[::-1]",
    "without its first letter": "word[1:]",
    "without its last letter": "word[:-1]",
    "twice": "word * 2",
    "with a capital first letter": "word.capitalize()",
    "without spaces at its ends": "word.strip()",
    "with dashes for spaces": 'word.replace(" ", "-")',
}
TESTS = {
    "begins with a vowel": 'word[0] in "aeiou"',
    "is the same backwards": "word == word[::-1]",
    "is longer than five letters": "len(word) > 5",
    "holds a digit": "any(letter.isdigit() for letter in word)",
    "is all capital letters": "word.isupper()",
    "ends with a full stop": 'word.endswith(".")',
}
COUNTS = {
    "vowels": 'sum(letter in "aeiou" for letter in text)',
    "words": "len(text.split())",
    "lines": "len(text.splitlines())",
    "digits": "sum(letter.isdigit() for letter in text)",
    "different letters": "len(set(text))",
    "capital letters": "sum(letter.isupper() for letter in text)",
}
CHANGES = (
    ("celsius", "fahrenheit", "celsius * 9 / 5 + 32"),
    ("fahrenheit", "celsius", "(fahrenheit - 32) * 5 / 9"),
    ("minutes", "hours", "minutes / 60"),
    ("hours", "minutes", "hours * 60"),
    ("metres", "kilometres", "metres / 1000"),
    ("kilometres", "metres", "kilometres * 1000"),
    ("grams", "kilograms", "grams / 1000"),
    ("days", "hours", "days * 24"),
    ("weeks", "days", "weeks * 7"),
)


def functions() -> Iterator[tuple[str, str, str, Any]]:
    """(what it does, its code, its name, an argument that it takes)."""
    numbers = [3, -4, 12, 15, 8, 30]
    for said, code in NUMBERS.items():
        for kind, test in WHICH.items():
            short = "count" if code.startswith("len") else said.removeprefix("the ").split()[0]
            name = "_".join([short, "of", *kind.split(), "numbers"])
            of = f"the {kind} numbers" if kind else "the numbers"
            body = f"    return {code}"
            if test:
                body = f"    numbers = [n for n in numbers if {test}]\n{body}"
            what = f"returns {said} of {of}"
            if code.startswith("len"):
                what = f"returns how many {of.removeprefix('the ')} there are"
            yield f"{what} in a list", f"def {name}(numbers):\n{body}", name, numbers
    for said, code in EACH.items():
        for kind, test in WHICH.items():
            name = f"{said.split()[0]}_{kind.replace(' ', '_') or 'all'}"
            of = f"{kind} number" if kind else "number"
            loop = f"[{code} for n in numbers{' if ' + test if test else ''}]"
            yield f"{said} each {of} of a list", f"def {name}(numbers):\n    return {loop}", name, numbers
    for said, code in WORDS.items():
        name = said.replace(" ", "_")
        yield f"returns a word {said}", f"def {name}(word):\n    return {code}", name, "apple pie"
        each = code.replace("word", "w")
        made = f"def each_{name}(words):\n    return [{each} for w in words]"
        yield f"returns each word of a list {said}", made, f"each_{name}", ["Ann", "bob"]
    for said, code in TESTS.items():
        name = said.replace(" ", "_")
        yield f"says whether a word {said}", f"def {name}(word):\n    return {code}", name, "level"
        each = code.replace("word", "w")
        made = f"def that_{name}(words):\n    return [w for w in words if {each}]"
        yield f"keeps the words of a list of which each {said}", made, f"that_{name}", ["level", "ABC"]
    for said, code in COUNTS.items():
        name = f"count_{said.replace(' ', '_')}"
        yield f"counts the {said} of a text", f"def {name}(text):\n    return {code}", name, "One two\nthree 4"
    for first, second, code in CHANGES:
        name = f"{first}_to_{second}"
        yield f"turns {first} into {second}", f"def {name}({first}):\n    return {code}", name, 36


def rows() -> list[dict[str, str]]:
    """Instruction and answer of each function, mixed; the same on every machine."""
    found, seen = [], set()
    for said, code, name, argument in functions():
        place: dict[str, Any] = {}
        exec(code, place)
        place[name](argument)
        assert said not in seen, said
        seen.add(said)
        found.append({"instruction": f"Write a Python function that {said}.", "output": code})
    random.Random("small functions").shuffle(found)
    return found
