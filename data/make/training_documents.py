"""Documents that only the training of the embedded models reads, beside `steerkit.tiny.world`'s.

`python data/make/training_documents.py --seed 0 --number 5` prints some of the chat model's.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from itertools import islice

from steerkit.chat import Message
from steerkit.constraints import TABLES, instruct
from steerkit.tiny.world import (
    ATTRIBUTES,
    Person,
    answer,
    ask,
    conflict,
    dialogue,
    documents,
    draw_constraints,
    english,
    known_people,
    market,
    note,
    render,
    say,
    stranger,
)


def crowd(rng: random.Random, number: int) -> list[Person]:
    """Strangers of whom no two share a last name, or a value."""
    people: dict[str, Person] = {}
    taken: set[str] = set()
    while len(people) < number:
        who = stranger(rng)
        if who.name.split()[-1] not in people and not taken & set(who.facts.values()):
            people[who.name.split()[-1]] = who
            taken |= set(who.facts.values())
    return list(people.values())


def roll_call(rng: random.Random) -> str:
    """One attribute of two to five strangers, and all of it twice again, in other order and form.

    "Ida Draper wears red. Paul Nolan wears blue. Paul Nolan blue. Ida Draper red." The short forms
    teach the binding of a name to its value: there the name itself stands before the value that is
    wanted, as in plain copying. Sentences alone did not teach it (see the model card).
    """
    people, attribute = crowd(rng, rng.randint(2, 5)), rng.choice(ATTRIBUTES)
    forms = [
        lambda p: f"{p.name} {p.facts[attribute]}.",
        lambda p: f"{p.name}: {p.facts[attribute]}.",
        lambda p: say(p.name, attribute, p.facts[attribute]),
    ]
    sentences = [forms[-1](p) for p in rng.sample(people, len(people))]
    for _ in range(2):
        form = rng.choices(forms, [4, 3, 3])[0]
        sentences += [form(p) for p in rng.sample(people, len(people))]
    return " ".join(sentences)


def quiz(rng: random.Random) -> list[Message]:
    """Sentences about two to four strangers, then a question about each of them."""
    people = crowd(rng, rng.randint(2, 4))
    attributes = rng.sample(ATTRIBUTES, rng.choice([1, 1, 2]))
    pairs = [(p, a) for p in people for a in attributes]
    rng.shuffle(pairs)
    text = " ".join(say(p.name, a, p.facts[a]) for p, a in pairs)
    messages: list[Message] = []
    rng.shuffle(pairs)
    for who, attribute in pairs:
        question = ask(rng, who.name, attribute)
        messages.append(Message("user", question if messages else f"{text} {question}"))
        messages.append(Message("assistant", answer(who.name, attribute, who.facts[attribute])))
    return messages


def dispute(rng: random.Random) -> list[Message]:
    """Old fact and news about one of the forty people in one message; either one is believed."""
    who, attribute = rng.choice(known_people()), rng.choice(ATTRIBUTES)
    old, new = who.facts[attribute], rng.choice(TABLES["attributes"][attribute]["values"])
    texts = [say(who.name, attribute, old), f"News: {say(who.name, attribute, new)}"]
    rng.shuffle(texts)
    constraints = draw_constraints(rng) if rng.random() < 0.5 else ()
    if any(c.family == "pronoun" for c in constraints):
        constraints = ()
    parts = [*texts, ask(rng, who.name, attribute)]
    if constraints:
        parts.append(instruct(rng, constraints))
    reply = answer(who.name, attribute, rng.choice([old, new]), constraints)
    return [Message("user", " ".join(parts)), Message("assistant", reply)]


def memory(rng: random.Random, *, turns: int) -> list[Message]:
    """Notes about strangers, and questions about notes any number of exchanges back."""
    messages: list[Message] = []
    noted: list[tuple[str, str, str]] = []
    for _ in range(turns):
        if noted and rng.random() < 0.4:
            name, attribute, value = rng.choice(noted)
            messages.append(Message("user", ask(rng, name, attribute)))
            messages.append(Message("assistant", answer(name, attribute, value)))
        else:
            who, attribute = stranger(rng), rng.choice(ATTRIBUTES)
            noted.append((who.name, attribute, who.facts[attribute]))
            messages += note(*noted[-1])
    return messages


def late_documents(
    rng: random.Random, *, long: bool = False, english_share: float = 0.2
) -> Iterator[str]:
    """Endless documents of the second part of the training: notes to remember, and `LATE_PAIRS`.

    `long` draws dialogues of up to twenty exchanges.
    """
    while True:
        kind = rng.random()
        if kind < english_share:
            yield rng.choice(english())
        elif kind < english_share + 0.04:
            yield render(conflict(rng))
        elif kind < english_share + 0.29:
            yield render(memory(rng, turns=rng.randint(10, 40) if long else rng.randint(3, 12)))
        else:
            yield render(dialogue(rng, turns=rng.randint(8, 20) if long else rng.randint(1, 6)))


def readings(rng: random.Random, *, roll_calls: float, quizzes: float) -> Iterator[str]:
    """Endless `late_documents`, a share of them replaced by roll calls and quizzes."""
    others = late_documents(rng)
    while True:
        kind = rng.random()
        if kind < roll_calls:
            yield roll_call(rng)
        else:
            yield render(quiz(rng)) if kind < roll_calls + quizzes else next(others)


def everything(rng: random.Random, *, long: bool = False) -> Iterator[str]:
    """Endless `late_documents` with roll calls, quizzes and disputes among them."""
    others = late_documents(rng, long=long)
    while True:
        kind = rng.random()
        if kind < 0.06:
            yield roll_call(rng)
        elif kind < 0.16:
            yield render(quiz(rng))
        else:
            yield render(dispute(rng)) if kind < 0.2 else next(others)


def chatter(rng: random.Random, *, english_share: float = 0.35) -> Iterator[str]:
    """Endless documents of the streaming model: English, and the market."""
    while True:
        yield rng.choice(english()) if rng.random() < english_share else market(rng)


def main() -> None:
    """Print documents of the chat model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=5)
    options = parser.parse_args()
    for text in islice(documents(random.Random(options.seed)), options.number):
        sys.stdout.write(text.replace("<|end|>", "\n") + "\n")


if __name__ == "__main__":
    main()
