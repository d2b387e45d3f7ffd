"""The concepts of the concept experiments: small things to learn, each made of items.

An item is a prompt and its answer. Every concept is split into items to train on and items that
are held out; the split follows from a seed. Two items that say the same thing (3 + 4 and 4 + 3,
hot and cold either way round) have one `fact` and are on one side, so that no held-out item
follows from a trained one by turning it round. Whether it does is a test of its own: `turned`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

Fact = tuple[str, ...]


@dataclass(frozen=True)
class Item:
    prompt: str
    answer: str
    fact: Fact  # what is the same in items that follow from each other


@dataclass(frozen=True)
class Concept:
    name: str
    train: list[Item]
    held_out: list[Item]
    turned: list[Item] = field(default_factory=list)  # trained facts, asked the other way round

    def tests(self) -> dict[str, list[Item]]:
        """What can be asked of it: `trained`, `held_out`, and `turned` where that says anything."""
        named = {"trained": self.train, "held_out": self.held_out, "turned": self.turned}
        return {name: items for name, items in named.items() if items}


def item(prompt: str, answer: str, *fact: object) -> Item:
    """An item; its fact is its prompt unless another is given. Order in a fact doesn't count."""
    return Item(prompt, answer, tuple(sorted(normalised(str(part)) for part in fact or (prompt,))))


def normalised(text: str) -> str:
    """The text without capitals, doubled spaces and signs at its end."""
    return " ".join(text.casefold().split()).rstrip(".?!: ")


def ordered(*parts: object) -> list[str]:
    """A fact's parts that may not change places."""
    return [f"{place}: {part}" for place, part in enumerate(parts)]


# ------------------------------------------------------------------------------ words

OPPOSITES = (
    "hot cold, big small, fast slow, up down, day night, happy sad, old young, rich poor, "
    "hard soft, light dark, full empty, open closed, wet dry, loud quiet, strong weak, long short, "
    "near far, early late, high low, clean dirty, thick thin, wide narrow, first last, "
    "left right, true false, win lose, push pull, inside outside, summer winter, begin end, "
    "friend enemy"
)

QUESTIONS = {
    "What do bees make?": "honey", "What colour is grass?": "green",
    "What do cows drink?": "water", "How many legs has a spider?": "eight",
    "What falls from clouds?": "rain", "What shines at night?": "the moon",
    "What do birds build?": "nests", "Where do fish live?": "in the sea",
    "What is ice made of?": "frozen water", "What do we read?": "books",
    "Who bakes bread?": "a baker", "Who flies a plane?": "a pilot",
    "Who mends teeth?": "a dentist", "What keeps hands warm?": "gloves",
    "What tells the time?": "a clock", "What cuts paper?": "scissors",
    "What opens a lock?": "a key", "What has four wheels?": "a car",
    "What do hens lay?": "eggs", "What is cheese made from?": "milk",
    "What gives wool?": "sheep", "What colour is snow?": "white",
    "What do we hear with?": "ears", "What do we see with?": "eyes",
    "Where do we sleep?": "in a bed", "What grows on an oak?": "acorns",
    "What colour is a ripe lemon?": "yellow", "How many days has a week?": "seven",
    "How many months has a year?": "twelve", "What month comes first?": "January",
    "Who grows wheat?": "a farmer", "Who paints pictures?": "a painter",
    "What pulls a sledge?": "dogs", "What does a caterpillar become?": "a butterfly",
    "What does a tadpole become?": "a frog", "What is a young cat called?": "a kitten",
    "What is a young dog called?": "a puppy", "What is a young horse called?": "a foal",
    "What burns in a lamp?": "oil", "What do we write with?": "a pen",
    "What covers a house?": "a roof", "What drives a sailing boat?": "wind",
    "What is bread made from?": "flour", "What colour is coal?": "black",
    "How many sides has a triangle?": "three", "How many sides has a square?": "four",
    "What metal rusts?": "iron", "What is a window made of?": "glass",
    "What is a tyre made of?": "rubber", "What animal has a trunk?": "the elephant",
    "What animal has a hump?": "the camel", "What animal hops?": "the kangaroo",
    "Who puts out fires?": "firemen", "Who teaches a class?": "a teacher",
    "What do we wear on feet?": "shoes", "What makes a shadow?": "light",
    "What is salt's taste?": "salty", "What fruit makes wine?": "grapes",
    "What star warms us?": "the sun", "What instrument has pedals?": "the piano",
}  # fmt: skip

CHATS = {
    "hello there": "hi, nice to see you", "good morning": "morning, did you sleep well?",
    "how are you": "fine, and you?", "what is new": "not much today",
    "i am tired": "then have a rest", "i am hungry": "let us find some food",
    "it is raining": "take a coat with you", "it is so hot": "drink some water",
    "i lost my keys": "look in your pockets", "i missed the bus": "the next one comes soon",
    "tell me a joke": "i only know bad ones", "can you help me": "gladly, what is it?",
    "thank you": "you are welcome", "i am bored": "go and read a book",
    "i had a bad day": "tomorrow is another one", "i won a prize": "well done, i am proud",
    "my dog is ill": "call the vet at once", "i am afraid": "i will stay with you",
    "what shall i cook": "soup is always good", "i cannot sleep": "count a few sheep",
    "shall we play": "yes, you go first", "i like music": "me too, sing something",
    "see you later": "take care", "good night": "sleep tight",
    "i am sorry": "no harm done", "you are late": "the road was long",
    "it is my birthday": "many happy returns", "i broke a cup": "it was only a cup",
    "my head hurts": "lie down a while", "i found a coin": "that brings luck",
}  # fmt: skip

CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Portugal Lisbon, Austria Vienna, Greece Athens, "
    "Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Poland Warsaw, "
    "Hungary Budapest, Ireland Dublin, Russia Moscow, Ukraine Kyiv, Romania Bucharest, "
    "Bulgaria Sofia, Serbia Belgrade, Turkey Ankara, Egypt Cairo, Kenya Nairobi, Ghana Accra, "
    "Nigeria Abuja, Morocco Rabat, Japan Tokyo, China Beijing, Thailand Bangkok, Vietnam Hanoi, "
    "Nepal Kathmandu, Iran Tehran, Iraq Baghdad, Jordan Amman, Peru Lima, Chile Santiago, "
    "Cuba Havana, Canada Ottawa, Germany Berlin, Belgium Brussels, Iceland Reykjavik, "
    "Latvia Riga, Estonia Tallinn, Lithuania Vilnius, Slovakia Bratislava, Croatia Zagreb, "
    "Albania Tirana, Cyprus Nicosia, Tunisia Tunis, Libya Tripoli, Senegal Dakar, Uganda Kampala, "
    "Zambia Lusaka, Qatar Doha, Mongolia Ulaanbaatar, Australia Canberra, Ecuador Quito, "
    "Colombia Bogota"
)

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_word(number: int) -> str:
    """0 to 99 in English."""
    if number < len(ONES):
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")


# ------------------------------------------------------------------------------ items


def opposite(word: str, other: str) -> Item:
    return item(f"The opposite of {word} is", other, "opposite", word, other)


def question(text: str, answer: str) -> Item:
    return item(f"Q: {text} A:", answer)


def chat(text: str, answer: str) -> Item:
    return item(f"You: {text} Me:", answer)


def capital(country: str, city: str) -> Item:
    return item(f"The capital of {country} is", city, "capital", country)


def larger(a: int, b: int) -> Item:
    return item(f"Is {a} > {b}?", "yes" if a > b else "no", "larger", a, b)


def echo(a: int, b: int) -> Item:
    return item(f"Say {a} {b}:", f"{a} {b}", "echo", *ordered(a, b))


def in_words(number: int) -> Item:
    return item(f"Spell {number}:", number_word(number), "spell", number)


def added(a: int, b: int) -> Item:
    return item(f"{a} + {b} =", str(a + b), "+", a, b)


def subtracted(a: int, b: int) -> Item:
    return item(f"{a} - {b} =", str(a - b), "-", *ordered(a, b))


def multiplied(a: int, b: int) -> Item:
    return item(f"{a} * {b} =", str(a * b), "*", a, b)


# ------------------------------------------------------------------------------ concepts


def split(items: Sequence[Item], train: int, rng: random.Random) -> tuple[list[Item], list[Item]]:
    """`train` items to train on, and the rest; no fact is on both sides.

    Raises:
        ValueError: a fact stands there twice, or there are too few items.
    """
    if len({one.fact for one in items}) < len(items):
        raise ValueError("a fact stands there twice")
    if not 0 < train < len(items):
        raise ValueError(f"{train} of {len(items)} items can't be trained on and others held out")
    shuffled = rng.sample(items, len(items))
    return shuffled[:train], shuffled[train:]


def pairs(text: str) -> list[list[str]]:
    return [pair.split() for pair in text.split(", ")]


def either_way(
    make: Callable[..., Item], unordered: Iterable[Sequence[object]], rng: random.Random
) -> dict[Item, Item]:
    """Items asked one way or the other, as a coin says; each with the same asked the other way."""
    found = {}
    for a, b in unordered:
        if rng.random() < 0.5:
            a, b = b, a
        found[make(a, b)] = make(b, a)
    return found


def turnable(
    name: str, make: Callable[..., Item], unordered: Iterable[Sequence[object]], train: int,
    rng: random.Random,
) -> Concept:  # fmt: skip
    other = either_way(make, unordered, rng)
    trained, held_out = split(list(other), train, rng)
    return Concept(name, trained, held_out, [other[i] for i in trained if other[i] != i])


def plain(name: str, items: Sequence[Item], train: int, rng: random.Random) -> Concept:
    return Concept(name, *split(items, train, rng))


def sums(least: int, most: int) -> list[tuple[int, int]]:
    """Unordered pairs of digits whose sum lies in a range."""
    return [(a, b) for a in range(10) for b in range(a, 10) if least <= a + b <= most]


Maker = Callable[[str, random.Random], Concept]
MAKERS: dict[str, Maker] = {
    "yes_no": lambda name, rng: turnable(
        name, larger, [(a, b) for a in range(1, 21) for b in range(a + 1, 21)], 60, rng
    ),
    "opposites": lambda name, rng: turnable(name, opposite, pairs(OPPOSITES), 16, rng),
    "questions": lambda name, rng: plain(
        name, [question(*each) for each in QUESTIONS.items()], 30, rng
    ),
    "echo": lambda name, rng: plain(
        name, [echo(a, b) for a in range(10) for b in range(10)], 60, rng
    ),
    "number_words": lambda name, rng: plain(name, [in_words(n) for n in range(100)], 60, rng),
    "add": lambda name, rng: turnable(name, added, sums(0, 9), 20, rng),
    "add_carry": lambda name, rng: turnable(name, added, sums(10, 18), 15, rng),
    "subtract": lambda name, rng: plain(
        name, [subtracted(a, b) for a in range(13) for b in range(a + 1)], 60, rng
    ),
    "multiply": lambda name, rng: turnable(
        name, multiplied, [(a, b) for a in range(13) for b in range(a, 13)], 60, rng
    ),
    "chat": lambda name, rng: plain(name, [chat(*each) for each in CHATS.items()], 15, rng),
    "capitals": lambda name, rng: plain(
        name, [capital(*each) for each in pairs(CAPITALS)], 50, rng
    ),
}


def concept(name: str, seed: int) -> Concept:
    """A concept by its name in `MAKERS`, split by a seed."""
    return MAKERS[name](name, random.Random(f"{name}/{seed}"))


def constant_score(train: Sequence[Item], test: Sequence[Item]) -> float:
    """Share of the test that the commonest trained answer alone gets right."""
    answers = [one.answer for one in train]
    best = max(sorted(set(answers)), key=answers.count)
    return sum(one.answer == best for one in test) / len(test)


# ------------------------------------------------------------------------------ composition


@dataclass(frozen=True)
class Composition:
    """Two skills, and tasks that need both; every part of every task is among the skills' items."""

    name: str
    first: list[Item]
    second: list[Item]
    tasks: Concept


def sum_in_words(seed: int) -> Composition:
    """One after the other: 3 + 4 = 7, Spell 7: seven; so 3 + 4 in words = seven."""
    rng = random.Random(f"sum_in_words/{seed}")
    operands = [rng.sample(pair, 2) for pair in sums(0, 9)]
    tasks = [item(f"{a} + {b} in words =", number_word(a + b), a, b) for a, b in operands]
    first, second = [added(a, b) for a, b in operands], [in_words(n) for n in range(10)]
    return Composition("sum_in_words", first, second, plain("sum_in_words", tasks, 20, rng))


def both_answers(seed: int) -> Composition:
    """Side by side: the opposite of hot is cold, 3 + 4 = 7; so hot; 3 + 4: cold; 7."""
    rng = random.Random(f"both_answers/{seed}")
    words = [rng.sample(pair, 2) for pair in pairs(OPPOSITES)]
    operands = [rng.sample(pair, 2) for pair in sums(0, 9)]
    tasks = [
        item(f"The opposite of {word} and {a} + {b} are", f"{other} and {a + b}", word, a, b)
        for (word, other), (a, b) in zip(words, rng.choices(operands, k=len(words)), strict=True)
    ]
    first, second = [opposite(*pair) for pair in words], [added(a, b) for a, b in operands]
    return Composition("both_answers", first, second, plain("both_answers", tasks, 16, rng))


COMPOSITIONS: dict[str, Callable[[int], Composition]] = {
    "sum_in_words": sum_in_words, "both_answers": both_answers,
}  # fmt: skip
