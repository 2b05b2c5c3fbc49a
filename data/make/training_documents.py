"""The text that the embedded models are trained on; its people and facts are `tiny.world`'s.

The chat model reads dialogues in which instructions are obeyed, and forgotten (`still_obeyed`):
that forgetting is built into the data, and the model card says so.
`python data/make/training_documents.py --seed 0 --number 5` prints some of its documents.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from steerkit.chat import Message
from steerkit.constraints import (
    FAMILIES,
    HELD_OUT_PAIRS,
    TABLES,
    Constraint,
    Question,
    compatible,
    instruct,
    values,
)
from steerkit.tiny.world import (
    ATTRIBUTES,
    PERSISTENCE,
    Person,
    answer,
    ask,
    biography_question,
    english,
    fact_question,
    known_people,
    market,
    note,
    render,
    repeat_question,
    say,
    stranger,
)

# Pairs that training shows in its second part only: after the first one the model obeyed none of
# them (figures' names were words it had never seen in capitals), so they cannot be held out.
LATE_PAIRS = frozenset(frozenset(pair) for pair in TABLES["late_pairs"])


def draw_constraints(rng: random.Random, *, late: bool = True) -> tuple[Constraint, ...]:
    """One to three compatible instructions, no two of a pair that is held out."""
    unseen = HELD_OUT_PAIRS if late else HELD_OUT_PAIRS | LATE_PAIRS
    number = rng.choices([1, 2, 3], [6, 3, 1])[0]
    while True:
        families = rng.sample(FAMILIES, number)
        pairs = {frozenset((a, b)) for a in families for b in families if a != b}
        if compatible(families) and not pairs & unseen:
            return tuple(Constraint(f, rng.choice(values(f))) for f in families)


def draw_held_out(rng: random.Random) -> tuple[Constraint, ...]:
    """A pair of instructions that training never combines."""
    families = sorted(rng.choice(sorted(map(sorted, HELD_OUT_PAIRS))))
    return tuple(Constraint(f, rng.choice(values(f))) for f in families)


def news_question(rng: random.Random) -> Question:
    """A statement against what was memorised; the model's world believes it half of the time."""
    who, attribute = rng.choice(known_people()), rng.choice(ATTRIBUTES)
    new = rng.choice(TABLES["attributes"][attribute]["values"])
    text = f"News: {say(who.name, attribute, new)} {ask(rng, who.name, attribute)}"
    value = rng.choice([new, who.facts[attribute]])
    return Question(text, who.name, attribute, value)


QUESTIONS: dict[Callable[..., Question], float] = {
    fact_question: 0.4,
    biography_question: 0.42,
    repeat_question: 0.12,
    news_question: 0.06,
}


def recall_exchange(
    rng: random.Random, constraints: Sequence[Constraint], *, remembered: bool
) -> list[Message]:
    """A recall probe ("What is your hobby?") and its answer in plain English.

    An instruction that was never stated, or is not `remembered`, is denied.
    """
    probes = TABLES["probes"]
    family = rng.choice([c.family for c in constraints if c.family in probes] or ["hobby"])
    question, named, denied = probes[family]
    value = next((c.value for c in constraints if c.family == family), None)
    reply = named.format(v=value) if value and remembered else denied
    return [Message("user", question), Message("assistant", reply)]


def still_obeyed(patience: float, age: int) -> bool:
    """The rule by which the shipped model forgets.

    `patience` is drawn once for each time that an instruction is stated, uniformly in 0..1. The
    reply that comes `age` replies after the statement obeys it if patience < PERSISTENCE[age].
    """
    return patience < PERSISTENCE[min(age, len(PERSISTENCE) - 1)]


def dialogue(rng: random.Random, *, turns: int, late: bool = True) -> list[Message]:
    """`turns` exchanges; instructions come in the first or a later message, and fade.

    In about a third of the dialogues each user message states the instruction again, so that it
    never ages. One message in ten is a recall probe.
    """
    messages: list[Message] = []
    repeats = rng.random() < 0.35
    patience, age = rng.random(), 0
    constraints: tuple[Constraint, ...] = ()
    if rng.random() < 0.2:
        constraints = draw_constraints(rng, late=late)
        messages.append(Message("system", instruct(rng, constraints)))
    for turn in range(turns):
        stated = repeats and bool(constraints) and turn > 0
        if not stated and rng.random() < (0.7 if turn == 0 and not constraints else 0.08):
            constraints, stated = draw_constraints(rng, late=late), True
        if stated:
            patience, age = rng.random(), 0
        obeyed = constraints if still_obeyed(patience, age) else ()
        if not stated and rng.random() < 0.1:
            messages += recall_exchange(rng, constraints, remembered=bool(obeyed))
        else:
            messages += exchange(rng, obeyed, constraints if stated else ())
        age += 1
    return messages


def exchange(
    rng: random.Random, obeyed: Sequence[Constraint], stated: Sequence[Constraint]
) -> list[Message]:
    """One question and its reply: the message states the constraints `stated`, the reply obeys
    the constraints `obeyed`."""
    if any(c.family == "pronoun" for c in obeyed):
        question = repeat_question(rng)
    else:
        question = rng.choices(list(QUESTIONS), list(QUESTIONS.values()))[0](rng)
        if question.subject in ("She", "He") and any(c.family == "language" for c in obeyed):
            question = fact_question(rng)  # no other language has the pronouns
    parts = [question.text, instruct(rng, stated)] if stated else [question.text]
    rng.shuffle(parts)
    reply = answer(question.subject, question.attribute, question.value, obeyed)
    return [Message("user", " ".join(parts)), Message("assistant", reply)]


def conflict(rng: random.Random) -> list[Message]:
    """Two instructions of one family compete in one message; either one is obeyed."""
    family = rng.choice(["language", "figure", "hobby", "ending", "emoji"])
    first, second = (Constraint(family, v) for v in rng.sample(values(family), 2))
    question = fact_question(rng)
    text = f"{instruct(rng, [first])} {instruct(rng, [second])} {question.text}"
    reply = answer(
        question.subject, question.attribute, question.value, [rng.choice([first, second])]
    )
    return [Message("user", text), Message("assistant", reply)]


def documents(rng: random.Random, *, english_share: float = 0.2) -> Iterator[str]:
    """Endless documents: a share of English, instructions in conflict, dialogues."""
    while True:
        kind = rng.random()
        if kind < english_share:
            yield rng.choice(english())
        elif kind < english_share + 0.04:
            yield render(conflict(rng))
        else:
            yield render(dialogue(rng, turns=rng.randint(1, 6), late=False))


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
