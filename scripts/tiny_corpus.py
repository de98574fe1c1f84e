"""The pretraining corpus of `tiny-llama`: plain question and answer dialogues, generated from small tables.

`single_turns` holds every question and answer that the tables give; `dialogues` joins them into conversations with
system messages, several turns and other voices (`tiny_registers.py`). The same seed gives the same corpus. The tables
lie in `tiny_data/`: one row a line, cells divided by `|`, alternatives within a cell by `;`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import tiny_registers

DATA = Path(__file__).resolve().parent / "tiny_data"

Pair = tuple[str, str]
Message = dict[str, str]
Row = list[str]

# fmt: off
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
]
# fmt: on
TENS = {30: "thirty", 40: "forty", 50: "fifty", 60: "sixty", 70: "seventy", 80: "eighty", 90: "ninety"}
SEASONS = ["winter"] * 2 + ["spring"] * 3 + ["summer"] * 3 + ["autumn"] * 3 + ["winter"]
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly assistant who gives short answers.",
    "Answer in plain English.",
    "Answer the question in one or two sentences.",
    "You are a kind teacher.",
    "Be brief.",
)
OPENERS = (
    "Please tell me: ",
    "Can you tell me: ",
    "Quick question: ",
    "Hi! ",
    "Hello, ",
    "I have a question: ",
    "Hey, ",
)
MIXES = {
    ("red", "yellow"): "orange",
    ("blue", "yellow"): "green",
    ("red", "blue"): "purple",
    ("red", "white"): "pink",
    ("black", "white"): "grey",
}
COLOURED = {
    "blue": "the sky, the sea and a clear lake",
    "green": "grass, leaves and frogs",
    "red": "a tomato, a rose and a fire engine",
    "yellow": "a lemon, the sun and a banana",
    "white": "snow, milk and paper",
    "black": "coal, the night sky and ink",
    "brown": "wood, soil and chocolate",
    "orange": "a carrot, a pumpkin and a sunset",
}
TIME = (
    ("seconds", "minute", "sixty"),
    ("minutes", "hour", "sixty"),
    ("hours", "day", "twenty-four"),
    ("days", "week", "seven"),
    ("months", "year", "twelve"),
    ("weeks", "year", "fifty-two"),
    ("days", "year", "three hundred and sixty-five"),
    ("years", "century", "one hundred"),
    ("years", "decade", "ten"),
    ("metres", "kilometre", "one thousand"),
    ("centimetres", "metre", "one hundred"),
    ("grams", "kilogram", "one thousand"),
)


def table(data: Path, name: str) -> list[Row]:
    """The rows of `data/name.txt`, each a list of stripped cells; `#` lines and empty lines are left out."""
    lines = (data / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.split("|")] for line in lines if line.strip() and line[0] != "#"]


def in_words(number: int) -> str:
    """An English number word, 0 to 199: 42 -> `forty-two`."""
    if number <= 20:
        return NUMBERS[number]
    if number < 30:
        return f"twenty-{NUMBERS[number - 20]}"
    if number < 100:
        return TENS[number // 10 * 10] + (f"-{NUMBERS[number % 10]}" if number % 10 else "")
    return "one hundred" + (f" and {in_words(number - 100)}" if number > 100 else "")


def a(word: str) -> str:
    """The word with its indefinite article."""
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def listed(items: list[str]) -> str:
    return f"{', '.join(items[:-1])} and {items[-1]}"


def animals(rows: list[Row]) -> Iterator[Pair]:
    for name, plural, kind, sound, food, home, legs, young, fact in rows:
        many = capital(plural)
        yield f"What kind of animal is {a(name)}?", f"{capital(a(name))} is {a(kind)}."
        yield f"Is {a(name)} an animal or a plant?", f"{capital(a(name))} is an animal."
        yield f"Tell me a fact about {plural}.", f"{many} {fact}."
        yield f"Tell me about {plural}.", f"{capital(a(name))} is {a(kind)}. {many} live {home} and {fact}."
        yield f"What is {a(name)}?", f"{capital(a(name))} is {a(kind)} that lives {home}."
        yield f"Where do {plural} live?", f"{many} live {home}."
        yield f"How many legs does {a(name)} have?", f"{capital(a(name))} has {legs} legs."
        yield f"What is a baby {name} called?", f"A baby {name} is called {a(young)}."
        if food:
            yield f"What do {plural} eat?", f"{many} eat {food}."
            yield f"What does {a(name)} eat?", f"{capital(a(name))} eats {food}."
        if sound:
            yield f"What sound does {a(name)} make?", f"The sound of {a(name)} is called {a(sound)}."
        for other in ("mammal", "bird", "insect", "fish", "reptile"):
            answer = f"Yes, {a(name)} is {a(kind)}." if other == kind else f"No, {a(name)} is {a(kind)}."
            yield f"Is {a(name)} {a(other)}?", answer


def foods(rows: list[Row]) -> Iterator[Pair]:
    for name, kind, colour, taste, use in rows:
        it = capital(name)
        yield f"What colour is {name}?", f"{it} is usually {colour}."
        yield f"What does {name} taste like?", f"{it} tastes {taste}."
        yield f"How can I use {name}?", f"{it} is good for {use}."
        yield f"What can I make with {name}?", f"You can use {name} for {use}."
        yield f"Is {name} a fruit or a vegetable?", f"{it} is a {kind}."
        yield f"Tell me about {name}.", f"{it} is a {kind}. It is {colour}, tastes {taste} and is good for {use}."
        yield f"Do you like {name}?", f"I can't eat, but many people like {name} because it tastes {taste}."


def countries(rows: list[Row]) -> Iterator[Pair]:
    for name, city, continent, language, money in rows:
        it = capital(name)
        yield f"What is the capital of {name}?", f"The capital of {name} is {city}."
        yield f"Where is {name}?", f"{it} is in {continent}."
        yield f"Where is {city}?", f"{city} is in {name}."
        yield f"What language do people speak in {name}?", f"People in {name} speak {language}."
        yield f"What money do they use in {name}?", f"People in {name} pay with the {money}."
        yield f"Tell me about {name}.", f"{it} is in {continent}. Its capital is {city} and people speak {language}."
        yield f"Which country is {city} the capital of?", f"{city} is the capital of {name}."


def jobs(rows: list[Row]) -> Iterator[Pair]:
    for name, does, where in rows:
        yield f"What does {a(name)} do?", f"{capital(a(name))} {does}."
        yield f"Where does {a(name)} work?", f"{capital(a(name))} works {where}."
        yield f"What is {a(name)}?", f"{capital(a(name))} is a person who {does}."
        yield f"Who {does}?", f"{capital(a(name))} {does}."
        yield f"I want to be {a(name)}.", f"That is a good goal. {capital(a(name))} {does}."


def things(rows: list[Row]) -> Iterator[Pair]:
    for name, use, material in rows:
        one = name if name == "scissors" else a(name)
        use_verb, made_verb = ("are", "are") if name == "scissors" else ("is", "is")
        yield f"What {use_verb} {one} used for?", f"{capital(one)} {use_verb} used to {use}."
        yield f"What {use_verb} {one} for?", f"{capital(one)} {use_verb} used to {use}."
        yield f"What {made_verb} {one} made of?", f"{capital(one)} {made_verb} made of {material}."
        yield f"What do I need to {use}?", f"You need {one} to {use}."
        yield f"Tell me about {one}.", f"{capital(one)} {made_verb} made of {material} and used to {use}."


def words(rows: list[Row]) -> Iterator[Pair]:
    for word, opposite, similar in rows:
        yield f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}."
        yield f"What is the opposite of {opposite}?", f"The opposite of {opposite} is {word}."
        yield f"What is another word for {word}?", f"Another word for {word} is {similar}."
        yield f"How do you spell {word}?", f"{capital(word)} is spelled {'-'.join(word)}."
        yield f"What letter does {word} start with?", f"{capital(word)} starts with the letter {word[0]}."


def sums() -> Iterator[Pair]:
    for x in range(0, 21):
        for y in range(0, 21):
            word, other = in_words(x), in_words(y)
            if x <= 12 and y <= 12:
                yield f"What is {x} plus {y}?", f"{x} plus {y} is {x + y}."
                yield f"What is {word} plus {other}?", f"{capital(word)} plus {other} is {in_words(x + y)}."
                if y <= x:
                    yield f"What is {word} minus {other}?", f"{capital(word)} minus {other} is {in_words(x - y)}."
                    yield f"What is {x} - {y}?", f"{x} - {y} = {x - y}"
                if x >= 2 and 2 <= y <= 12:
                    yield f"What is {word} times {other}?", f"{capital(word)} times {other} is {in_words(x * y)}."
            if x < y:
                yield f"Which is bigger, {x} or {y}?", f"{y} is bigger than {x}."
                yield f"Which number is smaller, {other} or {word}?", f"{capital(word)} is smaller than {other}."
    for x in range(1, 51):
        yield f"What comes after {x}?", f"After {x} comes {x + 1}."
        yield f"What is double {x}?", f"Double {x} is {2 * x}."
        yield f"What is half of {2 * x}?", f"Half of {2 * x} is {x}."
        yield f"Is {x} even or odd?", f"{x} is {'odd' if x % 2 else 'even'}."


def calendar() -> Iterator[Pair]:
    for names, what in ((DAYS, "day"), (MONTHS, "month")):
        for i, name in enumerate(names):
            after, before = names[(i + 1) % len(names)], names[i - 1]
            yield f"What {what} comes after {name}?", f"The {what} after {name} is {after}."
            yield f"What {what} comes before {name}?", f"The {what} before {name} is {before}."
            yield f"If today is {name}, what is next?", f"After {name} comes {after}."
    for month, season in zip(MONTHS, SEASONS, strict=True):
        yield f"What season is {month} in?", f"In the northern half of the world, {month} is in {season}."
    for small, large, count in TIME:
        yield (
            f"How many {small} are in {a(large) if large != 'hour' else 'an hour'}?",
            f"There are {count} {small} in {'an hour' if large == 'hour' else a(large)}.",
        )
    for (x, y), mixed in MIXES.items():
        for left, right in ((x, y), (y, x)):
            yield (
                f"What do you get when you mix {left} and {right}?",
                f"When you mix {left} and {right}, you get {mixed}.",
            )
    for colour, examples in COLOURED.items():
        yield f"What things are {colour}?", f"Some {colour} things are {examples}."


def explanations(rows: list[Row]) -> Iterator[Pair]:
    for topic, answer in rows:
        bare = topic.split(" ", 1)[1] if topic.startswith(("a ", "an ")) else topic
        yield f"What is {topic}?", answer
        yield f"Explain {topic}.", answer
        yield f"Can you explain what {topic} is?", answer
        yield f"What does {bare} mean?", answer
        yield f"Define {bare}.", answer


def guides(rows: list[Row]) -> Iterator[Pair]:
    for task, answer in rows:
        for ask in (
            "How do I {}?",
            "How can I {}?",
            "How do you {}?",
            "What is the best way to {}?",
            "Tell me how to {}.",
        ):
            yield ask.format(task), answer
        yield f"I want to {task}.", answer


def feelings(rows: list[Row]) -> Iterator[Pair]:
    for feeling, answer in rows:
        for say in (
            "I feel {}.",
            "I am {}.",
            "I am so {} today.",
            "What should I do when I am {}?",
            "My friend is {}.",
        ):
            if say.startswith("My friend"):
                yield (
                    say.format(feeling),
                    f"Ask your friend what would help, and listen well when someone is {feeling}.",
                )
            else:
                yield say.format(feeling), answer


def talk(rows: list[Row]) -> Iterator[Pair]:
    for questions, answers in rows:
        for question in questions.split(";"):
            for answer in answers.split(";"):
                yield question.strip(), answer.strip()


def everyday(rows: list[Row]) -> Iterator[Pair]:
    """The everyday questions: the row's own words and, where the form allows it, other ways of asking."""
    forms = {
        "How do I ": ("How can I ", "How do you ", "What is the best way to ", "Tell me how to "),
        "How can I ": ("How do I ", "What is a good way to ", "Tell me how to "),
        "What is ": ("What's ", "Do you know what is ", "Tell me, what is "),
        "Why ": ("Do you know why ", "Can you explain why ", "Explain: why "),
        "Should I ": ("Do you think I should ", "Is it a good idea to "),
    }
    for question, answer in rows:
        yield question, answer
        for start, others in forms.items():
            if question.startswith(start):
                for other in others:
                    yield other + question.removeprefix(start), answer


STORY = {
    "who": ("dog", "cat", "fox", "sailor", "girl", "boy", "farmer", "mouse", "bird", "old man", "teacher", "bear"),
    "trait": ("small", "kind", "brave", "clever", "quiet", "hungry", "happy", "young", "careful"),
    "place": (
        "in a forest",
        "by the sea",
        "on a farm",
        "in a small town",
        "near a river",
        "on an island",
        "in a big city",
    ),
    "find": ("a key", "a map", "a lost friend", "a red ball", "an old book", "a bright light", "a boat", "a warm coat"),
    "end": (
        "They went home together.",
        "It was a good day.",
        "Everyone was happy.",
        "Then it was time to sleep.",
        "From then on, they were friends.",
    ),
}


def story(rng: random.Random) -> Pair:
    """A three sentence story about someone who finds something."""
    who, trait, place, find, end = (rng.choice(STORY[key]) for key in ("who", "trait", "place", "find", "end"))
    ask = rng.choice(("Tell me a story about {}.", "Write a short story about {}.", "Tell me a short story about {}."))
    text = (
        f"Once there was {a(trait)} {who} who lived {place}. One day the {who} found {find} and wanted to help. {end}"
    )
    return ask.format(a(who)), text


def lists(rng: random.Random, data: Path) -> Pair:
    """Three things of one kind."""
    pools = {
        "animals": [row[1] for row in table(data, "animals")],
        "foods": [row[0] for row in table(data, "foods")],
        "fruits": [row[0] for row in table(data, "foods") if row[1] == "fruit"],
        "vegetables": [row[0] for row in table(data, "foods") if row[1] == "vegetable"],
        "countries": [row[0] for row in table(data, "countries")],
        "jobs": [row[0] for row in table(data, "jobs")],
        "colours": list(COLOURED),
        "days of the week": DAYS,
        "months": MONTHS,
    }
    name = rng.choice(list(pools))
    count = rng.choice((2, 3, 3, 4))
    ask = rng.choice(("Name {} {}.", "List {} {}.", "Can you name {} {}?", "Give me {} {}."))
    picked = listed(rng.sample(pools[name], count))
    return ask.format(in_words(count), name), rng.choice(
        (f"{capital(picked)}.", f"{capital(in_words(count))} {name} are {picked}.")
    )


MAKERS: dict[str, Callable[[list[Row]], Iterator[Pair]]] = {
    "animals": animals,
    "foods": foods,
    "countries": countries,
    "jobs": jobs,
    "things": things,
    "pairs": words,
    "explain": explanations,
    "howto": guides,
    "feelings": feelings,
    "talk": talk,
    "everyday": everyday,
}
# Arithmetic has most rows and the least language in it; small talk and everyday questions are asked most.
SHARES = {
    "animals": 10, "foods": 6, "countries": 6, "jobs": 5, "things": 7, "pairs": 4, "explain": 9, "howto": 11,
    "feelings": 4, "talk": 6, "everyday": 28, "sums": 7, "calendar": 3, "story": 3, "list": 2,
}  # fmt: skip


def single_turns(data: Path = DATA) -> dict[str, list[Pair]]:
    """Every fixed question and answer, by group."""
    groups = {name: list(make(table(data, name))) for name, make in MAKERS.items()}
    groups["sums"] = list(sums())
    groups["calendar"] = list(calendar())
    return groups


def reworded(rng: random.Random, question: str) -> str:
    """The question as a hurried or a polite person types it; most often unchanged."""
    roll = rng.random()
    if roll < 0.12:
        question = rng.choice(OPENERS) + question
    if roll > 0.85:
        question = question.lower().rstrip("?.!") + rng.choice(("", "?"))
    return question


def dialogues(seed: int, count: int, data: Path = DATA) -> Iterator[list[Message]]:
    """`count` conversations: one to five turns, plain, or in the voice that the system message asks for."""
    rng = random.Random(seed)
    groups = single_turns(data)
    lively = [(question, answer) for question, answer in table(data, "lively")]
    lower = {word for pairs in groups.values() for _, answer in pairs for word in answer.split() if word.islower()}
    names = list(SHARES)
    weights = [SHARES[name] for name in names]
    for _ in range(count):
        messages: list[Message] = []
        register = tiny_registers.drawn(rng) if rng.random() < 0.38 else None
        if register:
            messages.append({"role": "system", "content": register.system})
        elif rng.random() < 0.15:
            messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
        for _ in range(rng.choices((1, 2, 3, 5), (78, 14, 6, 2))[0]):
            group = rng.choices(names, weights)[0]
            if group == "story":
                question, answer = story(rng)
            elif group == "list":
                question, answer = lists(rng, data)
            elif register and group == "everyday" and rng.random() < 0.8:
                question, answer = rng.choice(lively)
            else:
                question, answer = rng.choice(groups[group])
            messages.append({"role": "user", "content": reworded(rng, question)})
            messages.append({"role": "assistant", "content": tiny_registers.spoken(rng, answer, register, lower)})
        yield messages
