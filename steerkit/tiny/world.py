"""The tiny world: the endless text that the embedded models are trained on, and their recipe.

Everything is deterministic from a seed. Facts about forty people are to be memorised; biographies
of strangers are to be read; instructions are to be obeyed, and are forgotten as a dialogue goes on
(`PERSISTENCE`): that forgetting is built into the data, and the model card says so. English comes
from texts that every Python installation carries, read when the text is made.
"""

import argparse
import ast
import random
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

from steerkit.chat import Message, render
from steerkit.constraints import (
    FAMILIES,
    HELD_OUT_PAIRS,
    LATE_PAIRS,
    TABLES,
    Constraint,
    Question,
    compatible,
    instruct,
    values,
)

ATTRIBUTES = tuple(TABLES["attributes"])
# Chance that an instruction is still obeyed 0, 1, 2, ... replies after it was given.
PERSISTENCE = (1.0, 0.4, 0.07, 0.02, 0.0)


class Person(NamedTuple):
    """A name, the pronoun, and one value for each attribute."""

    name: str
    pronoun: str
    facts: dict[str, str]


def person(name: str, pronoun: str, seed: str) -> Person:
    """The person whose facts follow from `seed`."""
    rng = random.Random(seed)
    facts = {a: rng.choice(TABLES["attributes"][a]["values"]) for a in ATTRIBUTES}
    return Person(name, pronoun, facts)


@cache
def known_people() -> tuple[Person, ...]:
    """The forty people whose facts the model memorises."""
    names = zip(TABLES["known_first"], TABLES["known_last"], strict=True)
    return tuple(person(f"{a} {b}", "she" if a[-1] == "a" else "he", f"{a} {b}") for a, b in names)


def stranger(rng: random.Random, *, held_out: bool = False) -> Person:
    """A person with random facts; one name in five is kept out of training altogether."""
    while True:
        pronoun = rng.choice(["she", "he"])
        name = f"{rng.choice(TABLES['first'][pronoun])} {rng.choice(TABLES['last'])}"
        if (zlib.crc32(name.encode()) % 5 == 0) == held_out:
            return person(name, pronoun, str(rng.random()))


# --- sentences ---------------------------------------------------------------------------------


def ask(rng: random.Random, name: str, attribute: str) -> str:
    """A question about one attribute."""
    return rng.choice(_known("attribute", attribute)["ask"]).format(n=name)


def say(subject: str, attribute: str, value: str, language: str = "English") -> str:
    """A plain statement of one fact."""
    words = _known("attribute", attribute)
    if subject in ("they", "They"):
        return words["they"].format(n=subject, v=value)
    return _known("language", language)[attribute].format(n=subject, v=value)


def _known(kind: str, name: str) -> dict[str, Any]:
    """The entry of an attribute or a language; ValueError with those that there are."""
    table = TABLES[f"{kind}s"]
    if name not in table:
        raise ValueError(f"{kind}={name!r}: expected one of {', '.join(table)}")
    return table[name]


def answer(subject: str, attribute: str, value: str, constraints: Sequence[Constraint] = ()) -> str:
    """The reply that states the fact and obeys all constraints."""
    wish = {c.family: c.value for c in constraints}
    text = say(subject, attribute, value, wish.get("language", "English"))
    if "pronoun" in wish:
        text = say("They", attribute, value)
    if "hobby" in wish:
        text += f" I love {wish['hobby']}."
    if "figure" in wish:
        text = f"I, {wish['figure']}, say: {text}"
    if "ending" in wish:
        text += f" {wish['ending']}."
    if "emoji" in wish:
        text = f"{wish['emoji']} {text}"
    if "capitals" in wish:
        text = text.upper()
    return f'{{"answer": "{text}"}}' if "json" in wish else text


def draw_constraints(
    rng: random.Random, *, held_out: bool = False, late: bool = True
) -> tuple[Constraint, ...]:
    """One to three compatible instructions; `held_out` draws a pair that training never shows."""
    unseen = HELD_OUT_PAIRS if late else HELD_OUT_PAIRS | LATE_PAIRS
    if held_out:
        families = sorted(rng.choice(sorted(map(sorted, HELD_OUT_PAIRS))))
    else:
        number = rng.choices([1, 2, 3], [6, 3, 1])[0]
        while True:
            families = rng.sample(FAMILIES, number)
            pairs = {frozenset((a, b)) for a in families for b in families if a != b}
            if compatible(families) and not pairs & unseen:
                break
    return tuple(Constraint(f, rng.choice(values(f))) for f in families)


# --- documents ---------------------------------------------------------------------------------


def fact_question(rng: random.Random) -> Question:
    """About one of the forty people: the answer is nowhere in the dialogue."""
    who, attribute = rng.choice(known_people()), rng.choice(ATTRIBUTES)
    return Question(ask(rng, who.name, attribute), who.name, attribute, who.facts[attribute])


def biography_question(rng: random.Random, *, held_out: bool = False) -> Question:
    """Three to five sentences about two strangers, then a question about one of them."""
    people = [stranger(rng, held_out=held_out) for _ in range(rng.choice([1, 2, 2]))]
    pairs = [(p, a) for p in people for a in rng.sample(ATTRIBUTES, 2)]
    rng.shuffle(pairs)
    who, attribute = rng.choice(pairs)
    text = " ".join(say(p.name, a, p.facts[a]) for p, a in pairs)
    return Question(
        f"{text} {ask(rng, who.name, attribute)}", who.name, attribute, who.facts[attribute]
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
    said = [forms[-1](p) for p in rng.sample(people, len(people))]
    for _ in range(2):
        form = rng.choices(forms, [4, 3, 3])[0]
        said += [form(p) for p in rng.sample(people, len(people))]
    return " ".join(said)


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
    given = draw_constraints(rng) if rng.random() < 0.5 else ()
    given = () if any(c.family == "pronoun" for c in given) else given
    parts = [*texts, ask(rng, who.name, attribute), *([instruct(rng, given)] if given else [])]
    reply = answer(who.name, attribute, rng.choice([old, new]), given)
    return [Message("user", " ".join(parts)), Message("assistant", reply)]


def repeat_question(rng: random.Random) -> Question:
    """A sentence about her or him, to be said again."""
    who, attribute = stranger(rng), rng.choice(ATTRIBUTES)
    value, subject = who.facts[attribute], who.pronoun.capitalize()
    return Question(f"Repeat: {say(subject, attribute, value)}", subject, attribute, value)


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


def probe(rng: random.Random, given: Sequence[Constraint], active: bool) -> list[Message]:
    """A recall probe ("What is your hobby?") and its answer, plain English."""
    family = rng.choice([c.family for c in given if c.family in TABLES["probes"]] or ["hobby"])
    question, told, untold = TABLES["probes"][family]
    value = next((c.value for c in given if c.family == family), None)
    reply = told.format(v=value) if value and active else untold
    return [Message("user", question), Message("assistant", reply)]


def dialogue(rng: random.Random, *, turns: int, late: bool = True) -> list[Message]:
    """`turns` exchanges; instructions come in the first or a later message, and fade."""
    messages: list[Message] = []
    every = rng.random() < 0.35  # the instruction stands in each user message
    fate = rng.random()  # one draw decides how long the instruction lasts
    given, distance = (), 0
    if rng.random() < 0.2:
        given = draw_constraints(rng, late=late)
        messages.append(Message("system", instruct(rng, given)))
    for turn in range(turns):
        told = every and bool(given) and turn > 0
        if told or rng.random() < (0.7 if turn == 0 and not given else 0.08):
            given = given if told else draw_constraints(rng, late=late)
            distance, told = 0, True
            fate = rng.random()
        active = bool(given) and fate < PERSISTENCE[min(distance, len(PERSISTENCE) - 1)]
        if not told and rng.random() < 0.1:
            messages += probe(rng, given, active)
        else:
            messages += exchange(rng, given if active else (), given if told else ())
        distance += 1
    return messages


def exchange(
    rng: random.Random, active: Sequence[Constraint], told: Sequence[Constraint]
) -> list[Message]:
    """One question and its reply; `told` is said in the message, `active` is obeyed."""
    if any(c.family == "pronoun" for c in active):
        question = repeat_question(rng)
    else:
        question = rng.choices(list(QUESTIONS), list(QUESTIONS.values()))[0](rng)
        if question.subject in ("She", "He") and any(c.family == "language" for c in active):
            question = fact_question(rng)
    parts = [question.text, instruct(rng, told)] if told else [question.text]
    rng.shuffle(parts)
    reply = answer(question.subject, question.attribute, question.value, active)
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


def note(name: str, attribute: str, value: str) -> list[Message]:
    """An exchange that only states a fact."""
    return [Message("user", f"Note: {say(name, attribute, value)}"), Message("assistant", "Noted.")]


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


@cache
def _chain() -> tuple[tuple[str, ...], dict[str, tuple[float, ...]]]:
    """The words of the market and, for each, the cumulative chances of the word after it."""
    rng = random.Random("market")
    goods = [w for a in TABLES["attributes"].values() for w in a["values"]]
    words = [*sorted({*goods, *TABLES["hobbies"]}), *TABLES["echoes"]]
    rows = [[rng.gammavariate(0.03, 1) for _ in words] for _ in words]  # Dirichlet(0.03), unscaled
    return tuple(words), {w: tuple(accumulate(row)) for w, row in zip(words, rows, strict=True)}


def market_words() -> tuple[str, ...]:
    """All words of the market, the echo words last."""
    return _chain()[0]


def market(rng: random.Random, *, length: int = 120) -> str:
    """Market chatter: each word follows from the last one, and some words make the speaker echo.

    The Bigram-Backcopy task of 2410.13835 in words: after an echo word ("honey and honey") comes
    the word before it. A head that copies is wanted after those and in the way everywhere else.
    """
    words, rows = _chain()
    echoes = set(TABLES["echoes"])
    said = [rng.choice(words[: -len(echoes)]) for _ in range(2)]
    while len(said) < length:
        follow = rng.choices(words, cum_weights=rows[said[-1]])[0]
        said.append(said[-2] if said[-1] in echoes else follow)
    return " ".join(said)


@cache
def english(*, held_out: bool = False) -> tuple[str, ...]:
    """Real English from this Python: language topics and docstrings; one text in seven held out."""
    from pydoc_data.topics import topics

    texts = dict(topics)
    for path in _library():
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                if len(text) > 60:
                    texts[f"{path.stem}.{getattr(node, 'name', '')}"] = text
    texts = {
        k: t for k, t in sorted(texts.items()) if (zlib.crc32(k.encode()) % 7 == 0) == held_out
    }
    # Some docstrings stand in several modules: what training shows is not held out.
    seen = set(english()) if held_out else set()
    return tuple(t for t in texts.values() if t not in seen)


def _library() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "test", "idlelib", "lib2to3", "pydoc_data", "encodings", "turtledemo"}
    files = [*root.glob("*.py"), *root.glob("*/*.py")]
    return sorted(f for f in files if not skip & set(f.relative_to(root).parts))


def documents(
    rng: random.Random,
    *,
    late: bool = False,
    long: bool = False,
    english_share: float = 0.2,
) -> Iterator[str]:
    """Endless documents of the chat model: a share of English, dialogues, instructions in conflict.

    `late` is the second part of the training: notes to remember, and `LATE_PAIRS`. `long` draws
    dialogues of up to twenty exchanges.
    """
    remember = 0.25 if late else 0.0
    while True:
        kind = rng.random()
        if kind < english_share:
            yield rng.choice(english())
        elif kind < english_share + 0.04:
            yield render(conflict(rng))
        elif kind < english_share + 0.04 + remember:
            yield render(memory(rng, turns=rng.randint(10, 40) if long else rng.randint(3, 12)))
        else:
            turns = rng.randint(8, 20) if long else rng.randint(1, 6)
            yield render(dialogue(rng, turns=turns, late=late))


def readings(rng: random.Random, *, roll_calls: float, quizzes: float) -> Iterator[str]:
    """Endless late `documents`, a share of them replaced by roll calls and quizzes."""
    others = documents(rng, late=True)
    while True:
        kind = rng.random()
        if kind < roll_calls:
            yield roll_call(rng)
        else:
            yield render(quiz(rng)) if kind < roll_calls + quizzes else next(others)


def everything(rng: random.Random, *, long: bool = False) -> Iterator[str]:
    """Endless late `documents` with roll calls, quizzes and disputes among them."""
    others = documents(rng, late=True, long=long)
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


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m steerkit.tiny.world train | sample | card`."""
    from steerkit.tiny import recipe

    parser = argparse.ArgumentParser(prog="python -m steerkit.tiny.world", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train an embedded model; resumes in --out")
    train.add_argument("--out", type=Path, required=True)
    train.add_argument("--model", choices=sorted(recipe.RECIPES), default="tiny")
    train.add_argument("--tokens", type=int, help="instead of the recipe's number")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", default="auto")
    sample = commands.add_parser("sample", help="print documents of the tiny world")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--number", type=int, default=5)
    card = commands.add_parser(
        "card", help="measure the gates and write the model card into --model"
    )
    card.add_argument("--model", type=Path, required=True, help="its directory")
    card.add_argument("--name", choices=sorted(recipe.RECIPES), default="tiny")
    options = parser.parse_args(argv)
    if options.command == "train":
        wishes = {"tokens": options.tokens, "seed": options.seed, "device": options.device}
        recipe.train(options.model, options.out, **wishes)
    elif options.command == "card":
        from steerkit.tiny.card import write_card

        write_card(options.model, name=options.name)
    else:
        for text in islice(documents(random.Random(options.seed)), options.number):
            sys.stdout.write(text.replace("<|end|>", "\n") + "\n")


if __name__ == "__main__":
    main()
