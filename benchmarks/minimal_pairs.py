"""Minimal pairs made by rule: does a model prefer the grammatical one of two like sentences?

    python benchmarks/minimal_pairs.py --out data/minimal_pairs
    python evaluate_model.py --checkpoint FILE --no-text --task-folder data/minimal_pairs \\
        --tasks minimal_pairs --json FILE

A stand-in for BLiMP (Warstadt et al. 2020, https://arxiv.org/abs/1912.00582) where that can't be
had, and in its form, but not it: figures of the two can't be compared. Each paradigm is one
phenomenon of grammar. A model is right if it finds the good sentence of a pair more likely than
the bad one, which has the same number of words; chance is 50 %.

How frequent words are can't decide. Two sentences of a pair either hold the same words in another
order, or differ in a single word, and then a twin follows in which the two words change sides:

    The king is at home.       / The king are at home.
    The kings are at home.     / The kings is at home.

So a model that knows only the frequencies of words, or of parts of words, or prefers what is short,
gets exactly half of the first N pairs for any even N, ties counting half: so --limit may cut there.
What stands beside what may still decide, above all where the order of the words differs, so that
little training can lead to well over or under half of a paradigm.

The folder gets, per paradigm, JSON lines with `sentence_good` and `sentence_bad` and a task of
lm-evaluation-harness, and a group `minimal_pairs` with the mean. The tasks hold the folder's full
path: a folder that was moved has to be made again. The same options give the same pairs, and more
pairs begin with the fewer.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from hamner.errors import UserError, run
from hamner.files import write_json_lines, write_text_whole

Pair = tuple[str, str]  # a good sentence and a bad one
Maker = Callable[[random.Random], list[Pair]]  # a pair and its twin, or a pair of the same words

GROUP = "minimal_pairs"
MISSES = 1_000  # draws without anything new, after which a paradigm has run out


# ------------------------------------------------------------------------------- words


def phrases(text: str) -> list[str]:
    """The parts of a list with commas."""
    return [" ".join(part.split()) for part in text.split(",")]


IRREGULAR = {
    "man": "men", "woman": "women", "child": "children", "wife": "wives", "knife": "knives",
    "gentleman": "gentlemen", "have": "has", "go": "goes",
}  # fmt: skip

PEOPLE = """man woman child boy girl king queen teacher doctor soldier farmer student friend worker
writer artist lawyer judge priest merchant captain officer prince stranger guest lady servant sailor
hunter player driver gentleman""".split()
COUPLES = [pair.split() for pair in phrases("""man woman, boy girl, king queen, father mother,
brother sister, son daughter, prince princess, uncle aunt, husband wife, nephew niece,
gentleman lady, grandfather grandmother""")]  # fmt: skip
MEN = "John Peter James Thomas Robert David Paul George William Henry".split()
WOMEN = "Mary Anna Sarah Alice Emma Helen Jane Elizabeth Margaret Laura".split()
THINGS = """book letter picture table chair box coin ring sword map cup bottle hat coat lamp knife
basket candle clock boat wagon bell mirror drum flag""".split()
PLACES = phrases("""in the garden, in the house, in the village, in the market, in the forest,
in the street, in the kitchen, in the old town, near the river, near the church, on the island,
behind the school""")
# None that could be an object, as in `wanted that day`.
TIMES = phrases("""in the morning, in the evening, in the end, on Sunday, at night, before the war,
after the war, after dinner, in the summer""")
OPENINGS = phrases("""yesterday, one day, that night, at last, last year, in those days,
at that time""")

ADJECTIVES = "old new small large red white black heavy cheap strange broken beautiful".split()
# None that old books have with `an` and new ones with `a`, as `useful` and `European`.
VOWEL_ADJECTIVES = """old ugly ancient unusual expensive interesting important English Italian
enormous excellent ordinary odd elegant original""".split()
CONSONANT_ADJECTIVES = """new small large red white heavy cheap strange broken beautiful black
French German golden famous""".split()
THINGS_COMPARED = "old new small large heavy cheap strong clean dark long short thick".split()
PEOPLE_COMPARED = "old young tall strong rich poor kind weak wise proud".split()


def with_s(word: str) -> str:
    """A noun's plural, or a verb's third person."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def with_er(adjective: str) -> str:
    """The comparative."""
    if adjective.endswith("e"):
        return adjective + "r"
    if adjective.endswith("y"):
        return adjective[:-1] + "ier"
    return adjective + "er"


# ------------------------------------------------------------------------------- sentences


def sentence(text: str) -> str:
    """With a capital, and a full stop where there is no mark."""
    return text[0].upper() + text[1:] + ("" if text.endswith("?") else ".")


def crossed(first: str, second: str, one: str, other: str) -> list[Pair]:
    """A pair and its twin, from two sentences with a gap, `_`.

    `one` is right in the first and wrong in the second; with `other` it is the other way round.
    """
    texts = ((first, one, other), (second, other, one))
    return [
        (sentence(text.replace("_", good)), sentence(text.replace("_", bad)))
        for text, good, bad in texts
    ]


def reordered(good: str, bad: str) -> list[Pair]:
    """A pair whose sentences hold the same words: it needs no twin."""
    return [(sentence(good), sentence(bad))]


def somebody(rng: random.Random) -> str:
    return rng.choice(MEN + WOMEN)


def place_or_time(rng: random.Random) -> str:
    return rng.choice(PLACES + TIMES)


# ------------------------------------------------------------------------------- nouns

# None that takes `that` and a clause, as `found that books ...` would begin one.
HANDLED = "bought sold lost kept wanted dropped carried painted used brought".split()


def determiner_noun(rng: random.Random, adjective: str = "") -> list[Pair]:
    """Mary sold this book at night. / Mary sold these book at night."""
    one, other = rng.choice([("this", "these"), ("that", "those")])
    noun, tail = rng.choice(THINGS), place_or_time(rng)
    start = f"{somebody(rng)} {rng.choice(HANDLED)} _ {adjective}"
    return crossed(f"{start}{noun} {tail}", f"{start}{with_s(noun)} {tail}", one, other)


def determiner_adjective_noun(rng: random.Random) -> list[Pair]:
    """Mary sold this old book at night. / Mary sold these old book at night."""
    return determiner_noun(rng, f"{rng.choice(ADJECTIVES)} ")


def article(rng: random.Random) -> list[Pair]:
    """Mary sold an old book at night. / Mary sold a old book at night."""
    start, tail = f"{somebody(rng)} {rng.choice(HANDLED)} _", place_or_time(rng)
    end = f"{rng.choice(THINGS)} {tail}"
    vowel, consonant = rng.choice(VOWEL_ADJECTIVES), rng.choice(CONSONANT_ADJECTIVES)
    return crossed(f"{start} {vowel} {end}", f"{start} {consonant} {end}", "an", "a")


NUMBERS = "two three four five six ten".split()


def ellipsis(rng: random.Random) -> list[Pair]:
    """Mary sold two old books and Paul sold six. / Mary sold two books and Paul sold six old."""
    one, other = rng.sample(MEN + WOMEN, 2)
    few, many = rng.sample([*NUMBERS, "several"], 2)
    verb, adjective = rng.choice(HANDLED), rng.choice(ADJECTIVES)
    things = with_s(rng.choice(THINGS))
    return reordered(
        f"{one} {verb} {few} {adjective} {things} and {other} {verb} {many}",
        f"{one} {verb} {few} {things} and {other} {verb} {many} {adjective}",
    )


def there_quantifiers(rng: random.Random) -> list[Pair]:
    """At last there were two boys in the house. / At last there were all boys in the house.

    `all` and `both` don't follow `there were`; of the others, none stands before `the`.
    """
    weak = rng.choice([*NUMBERS, "some", "many", "few", "no", "several"])
    strong = rng.choice(["all", "both"])
    opening, place = rng.choice(OPENINGS), rng.choice(PLACES)
    noun = with_s(rng.choice(PEOPLE + THINGS))
    return crossed(
        f"{opening} there were _ {noun} {place}",
        f"{opening} _ the {noun} were {place}",
        weak,
        strong,
    )


# ------------------------------------------------------------------------------- subject and verb

STATES = phrases("""in the garden, at home, very tired, well known, ready to leave, very happy here,
afraid of the dark, not very rich, on the way home, from another country, almost always right,
no longer young""")
VERB_PHRASES = phrases("""live in this town, work in the field, walk along the river,
sleep in the small room, play near the house, sit by the window, stand at the door,
wait in the street, sing in the church, know the truth, love the sea, need more money,
want a new horse, bring food to the village, remember the war, go to the market every day,
eat bread and fish, seem very tired, want to stay here, hope for peace, have a house in the city,
have two brothers, have come from the city, have seen the sea""")
BE = [("is", "are"), ("was", "were")]


def subject_verb(rng: random.Random) -> list[Pair]:
    """The boy lives in this town. / The boy live in this town."""
    noun = rng.choice(PEOPLE)
    one, other, rest = *rng.choice(BE), rng.choice(STATES)
    if rng.random() < 0.7:
        other, rest = rng.choice(VERB_PHRASES).split(maxsplit=1)
        one = with_s(other)
    return crossed(f"the {noun} _ {rest}", f"the {with_s(noun)} _ {rest}", one, other)


PEOPLE_BESIDE = phrases("""owner of house, owner of ship, author of book, author of letter,
leader of army, leader of group, captain of ship, captain of team, friend of king, friend of queen,
brother of soldier, sister of doctor, son of farmer, daughter of teacher, enemy of king,
servant of lady, teacher of boy, guard at gate, priest from village, man with horse,
woman with basket, boy with dog, girl with flower""")
THINGS_BESIDE = phrases("""key to cabinet, key to room, door of house, door of church,
wall of garden, wall of castle, road to town, road to village, bridge over river, picture of king,
picture of horse, letter from soldier, letter to doctor, story about war, story about queen,
map of island, map of city, window of room, book about river, house near lake, tree behind church,
path through field, song about sailor""")
THING_STATES = phrases("""very old, quite new, hard to find, of great interest, not very good,
almost forgotten, rather strange, well known, better than before, of little use""")


def subject_verb_attractor(rng: random.Random) -> list[Pair]:
    """The keys to the cabinet are very old. / The keys to the cabinet is very old.

    The nearer noun always has the wrong number.
    """
    kinds = [(PEOPLE_BESIDE, STATES), (THINGS_BESIDE, THING_STATES)]
    nouns, states = rng.choice(kinds)
    noun, beside, near = rng.choice(nouns).split()
    one, other, rest = *rng.choice(BE), rng.choice(states)
    return crossed(
        f"the {noun} {beside} the {with_s(near)} _ {rest}",
        f"the {with_s(noun)} {beside} the {near} _ {rest}",
        one,
        other,
    )


DEALT_WITH = "helped followed met loved visited watched called saved".split()


def subject_verb_relative(rng: random.Random) -> list[Pair]:
    """The boy who met the kings is at home. / The boy who met the kings are at home.

    The nearer noun always has the wrong number; the verb between shows none.
    """
    noun, near = rng.sample(PEOPLE, 2)
    verb = rng.choice(DEALT_WITH)
    one, other, rest = *rng.choice(BE), rng.choice(STATES)
    clause = rng.choice([f"who {verb} the {{}}", f"that the {{}} {verb}"])
    return crossed(
        f"the {noun} {clause.format(with_s(near))} _ {rest}",
        f"the {with_s(noun)} {clause.format(near)} _ {rest}",
        one,
        other,
    )


# ------------------------------------------------------------------------------- pronouns

TO_ONESELF = phrases("""looked at _ in the mirror, saw _ in the water, asked _ what to do,
blamed _ for the war, hid _ in the forest, found _ in a small room, kept the money for _,
told _ to wait, thought only of _, hurt _ last year, washed _ in the river, could not save _,
felt sorry for _, talked about _ all day, bought _ a new coat, prepared _ for the journey,
warmed _ by the fire, defended _ with a sword, threw _ on the ground, said nothing about _""")


def anaphor_gender(rng: random.Random) -> list[Pair]:
    """The king hurt himself last year. / The king hurt herself last year."""
    rest = rng.choice(TO_ONESELF)
    if rng.random() < 0.5:
        man, woman = rng.choice(MEN), rng.choice(WOMEN)
    else:
        man, woman = (f"the {noun}" for noun in rng.choice(COUPLES))
    return crossed(f"{man} {rest}", f"{woman} {rest}", "himself", "herself")


def anaphor_number(rng: random.Random) -> list[Pair]:
    """The king hurt himself last year. / The king hurt themselves last year."""
    man, woman = rng.choice(COUPLES)
    noun, word = rng.choice([(man, "himself"), (woman, "herself")])
    rest = rng.choice(TO_ONESELF)
    return crossed(f"the {noun} {rest}", f"the {with_s(noun)} {rest}", word, "themselves")


CASES = [pair.split() for pair in phrases("he him, she her, they them, we us, I me")]
# None that takes a clause, as `thought he ...` would begin one.
MET = "helped followed met loved visited called left thanked stopped".split()


def pronoun_case(rng: random.Random) -> list[Pair]:
    """At last he met the king. / At last him met the king."""
    opening, verb, noun = rng.choice(OPENINGS), rng.choice(MET), rng.choice(PEOPLE)
    subject, object_ = rng.choice(CASES)
    return crossed(f"{opening} _ {verb} the {noun}", f"{opening} the {noun} {verb} _",
                   subject, object_)  # fmt: skip


# ------------------------------------------------------------------------------- forms

# Past, participle, rest: none with which a participle could describe a noun, as `gone home` could.
PASTS = phrases("""took taken the key home, wrote written a long letter,
gave given the bread to the child, saw seen the sea, knew known the answer, ate eaten the apple,
broke broken the window, chose chosen the red one, stole stolen the horse,
spoke spoken to the judge, drew drawn a map, drank drunk the wine, wore worn a black coat,
threw thrown the stone, did done the work, drove driven the car home, rode ridden the white horse,
sang sung an old song, swam swum across the river, rang rung the bell,
blew blown out the candle, began begun the work, shook shaken the tree, tore torn the letter,
forgave forgiven the enemy""")


def irregular_past(rng: random.Random) -> list[Pair]:
    """The girl took the key home. / The girl taken the key home. After `had` the reverse."""
    noun, had = rng.choice(PEOPLE), rng.choice(["had", "had already", "had never"])
    subject = f"the {rng.choice([noun, with_s(noun)])}"
    past, participle, rest = rng.choice(PASTS).split(maxsplit=2)
    return crossed(f"{subject} _ {rest}", f"{subject} {had} _ {rest}", past, participle)


def comparative(rng: random.Random) -> list[Pair]:
    """The box was older than the cup. / The box was old than the cup. With `as` the reverse."""
    nouns, words = rng.choice([(PEOPLE, PEOPLE_COMPARED), (THINGS, THINGS_COMPARED)])
    (noun, than), word = rng.sample(nouns, 2), rng.choice(words)
    start = f"the {noun} {rng.choice(['is', 'was'])}"
    first, second = f"{start} _ than the {than}", f"{start} as _ as the {than}"
    return crossed(first, second, with_er(word), word)


# ------------------------------------------------------------------------------- clauses

# These need an object, take no second one, and have one form for past and participle.
TRANSITIVE = """found discovered destroyed wanted described mentioned needed owned liked admired
possessed preferred acquired""".split()
# None that `the cup` could complete, as in `remained the king`.
INTRANSITIVE = """slept arrived smiled laughed died came disappeared vanished listened hesitated
talked yawned sneezed dined""".split()


def transitivity(rng: random.Random) -> list[Pair]:
    """Mary found the cup at night. / Mary slept the cup at night. Without `the cup` the reverse.

    No noun with `the` is the subject: `the king found at night` would name a king.
    """
    subject = rng.choice([*MEN, *WOMEN, "he", "she", "we", "they"])
    thing, tail = rng.choice(THINGS), rng.choice(TIMES)
    needing, lacking = rng.choice(TRANSITIVE), rng.choice(INTRANSITIVE)
    return crossed(f"{subject} _ the {thing} {tail}", f"{subject} _ {tail}", needing, lacking)


def filler_gap(rng: random.Random) -> list[Pair]:
    """Mary knew what the king had found. / Mary knew that the king had found.

    Before `had found the sword` the reverse.
    """
    knew = rng.choice("knew learned remembered forgot heard understood saw".split())
    clause = f"the {rng.choice(PEOPLE)} had {rng.choice(TRANSITIVE)}"
    start, tail = f"{somebody(rng)} {knew} _ {clause}", place_or_time(rng)
    second = f"{start} the {rng.choice(THINGS)} {tail}"
    return crossed(f"{start} {tail}", second, "what", "that")


# None that takes two objects, as `bought the girl the house` does.
ASKED_FOR = "see discover want need remember forget mention describe learn lose hear".split()
DOING = [pair.split() for pair in phrases("""leaving house, opening box, reading letter,
visiting city, selling horse, hearing story, losing ring, finding key, cleaning room,
crossing river, closing door, building bridge, buying table, painting picture,
winning game""")]  # fmt: skip


def adjunct_island(rng: random.Random) -> list[Pair]:
    """What did Mary see after leaving the house? / What did Mary see the house after leaving?"""
    subject = rng.choice([somebody(rng), f"the {rng.choice(PEOPLE)}"])
    verb, after = rng.choice(ASKED_FOR), rng.choice(["after", "before"])
    doing, thing = rng.choice(DOING)
    start = f"what did {subject} {verb}"
    return reordered(
        f"{start} {after} {doing} the {thing}?", f"{start} the {thing} {after} {doing}?"
    )


def coordination(rng: random.Random) -> list[Pair]:
    """What did a and b see in the house? / What did a see and b in the house?"""
    one, other = rng.sample(PEOPLE, 2)
    verb, place = rng.choice("find see buy eat lose discover".split()), rng.choice(PLACES)
    start = f"what {rng.choice(['did', 'will', 'can'])} the {one}"
    return reordered(
        f"{start} and the {other} {verb} {place}?", f"{start} {verb} and the {other} {place}?"
    )


REPORTS = phrases("they say that, we know that, people think that, it seems that, I believe that")
EVER = phrases("""been to the city, seen the sea, heard this story, read this book, lived here,
lost a war, spoken to the judge, told the truth, eaten fish, owned a horse""")
ANY = "gold money food water help books letters horses bread wine".split()


def npi_scope(rng: random.Random) -> list[Pair]:
    """They say that no boy who met the kings has ever lived here. / ... that the boy who met no ...

    `ever` and `any` need a negation of their own clause: one in the relative clause doesn't reach.
    """
    noun, near = rng.sample(PEOPLE, 2)
    near, report, verb = with_s(near), rng.choice(REPORTS), rng.choice(DEALT_WITH)
    if rng.random() < 0.5:
        who, rest = f"{noun} who {verb}", f"{near} has ever {rng.choice(EVER)}"
        return reordered(f"{report} no {who} the {rest}", f"{report} the {who} no {rest}")
    start, rest = f"{report} the {with_s(noun)} who have", f"found any {rng.choice(ANY)}"
    clause = f"{verb} the {near} have"
    return reordered(f"{start} {clause} not {rest}", f"{start} not {clause} {rest}")


# ------------------------------------------------------------------------------- the set

PARADIGMS: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (
        determiner_noun, determiner_adjective_noun, article, subject_verb, subject_verb_attractor,
        subject_verb_relative, anaphor_gender, anaphor_number, pronoun_case, irregular_past,
        comparative, transitivity, filler_gap, adjunct_island, coordination, ellipsis,
        there_quantifiers, npi_scope,
    )
}  # fmt: skip


def make_pairs(paradigm: str, count: int, seed: int) -> list[Pair]:
    """So many pairs, twins one after the other; no sentence comes twice.

    Raises:
        UserError: the paradigm hasn't got so many.
    """
    rng, maker = random.Random(f"{seed} {paradigm}"), PARADIGMS[paradigm]
    pairs: list[Pair] = []
    seen: set[str] = set()
    misses = 0
    while len(pairs) < count and misses < MISSES:
        drawn = maker(rng)
        sentences = {each for pair in drawn for each in pair}
        misses = misses + 1 if sentences & seen else 0
        if not misses:
            pairs += drawn
            seen |= sentences
    if len(pairs) < count:
        raise UserError(f"--pairs {count}: {paradigm} has only about {len(pairs)}: ask for fewer")
    return pairs


def task_of(paradigm: str, rows: Path) -> dict[str, Any]:
    """The harness's task, as its own BLiMP has it, on the rows of a file.

    A sentence stands where a document begins, with no space before it.
    """
    return {
        "task": f"{GROUP}_{paradigm}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "target_delimiter": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def group_of(paradigms: Iterable[str]) -> dict[str, Any]:
    """The harness's group: the mean of the paradigms' accuracies."""
    return {
        "group": GROUP,
        "task": [f"{GROUP}_{paradigm}" for paradigm in paradigms],
        "aggregate_metric_list": [
            {"metric": "acc", "aggregation": "mean", "weight_by_size": False}
        ],
        "metadata": {"version": 1.0},
    }


def write_set(folder: Path, count: int, seed: int) -> None:
    """All paradigms' rows and tasks, and the group."""
    made = {paradigm: make_pairs(paradigm, count, seed) for paradigm in PARADIGMS}
    for paradigm, pairs in made.items():
        path = folder / f"{paradigm}.jsonl"
        rows = [{"sentence_good": good, "sentence_bad": bad} for good, bad in pairs]
        write_json_lines(path, rows)
        write_yaml(folder / f"{paradigm}.yaml", task_of(paradigm, path))
    write_yaml(folder / f"{GROUP}.yaml", group_of(made))


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    write_text_whole(path, [yaml.safe_dump(content, sort_keys=False)])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--pairs", type=int, default=200, metavar="N", help="of each paradigm")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.pairs < 2 or arguments.pairs % 2:
        raise UserError(
            f"--pairs must be an even number from 2 on, got {arguments.pairs}: pairs come in twos"
        )
    try:
        write_set(arguments.out, arguments.pairs, arguments.seed)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"can't write to {arguments.out}: {reason}; name another --out") from None
    print(f"{len(PARADIGMS)} paradigms of {arguments.pairs:,} pairs written to {arguments.out}")
    return 0


if __name__ == "__main__":
    run(main)
