"""The tiny world: the endless text that the embedded models are trained on.

Everything is deterministic from a seed. The model memorises facts about forty people, reads
biographies of strangers, and obeys instructions. The English comes from texts that every Python
installation carries. The dialogues and the recipe of the models are in `data/make/`.
"""

import ast
import html
import random
import sysconfig
import zlib
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from steerkit.chat import Message
from steerkit.constraints import FAMILIES, TABLES, Constraint, Question, values

ATTRIBUTES = tuple(TABLES["attributes"])
# Chance that the training text still obeys an instruction 0, 1, 2, ... replies after it was stated:
# why the embedded model forgets (`still_obeyed` in data/make/training_documents.py is the rule).
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
    return rng.choice(TABLES["attributes"][attribute]["ask"]).format(n=name)


def say(subject: str, attribute: str, value: str, language: str = "English") -> str:
    """A plain statement of one fact."""
    if subject in ("they", "They"):
        return TABLES["attributes"][attribute]["they"].format(n=subject, v=value)
    return TABLES["languages"][language][attribute].format(n=subject, v=value)


def answer(subject: str, attribute: str, value: str, constraints: Sequence[Constraint] = ()) -> str:
    """The reply that states the fact and obeys all constraints."""
    asked = {c.family: c.value for c in constraints}
    text = say(subject, attribute, value, asked.get("language", "English"))
    if "pronoun" in asked:
        text = say("They", attribute, value)
    if "hobby" in asked:
        text += f" I love {asked['hobby']}."
    if "figure" in asked:
        text = f"I, {asked['figure']}, say: {text}"
    if "ending" in asked:
        text += f" {asked['ending']}."
    if "emoji" in asked:
        text = f"{asked['emoji']} {text}"
    if "capitals" in asked:
        text = text.upper()
    return f'{{"answer": "{text}"}}' if "json" in asked else text


def render(messages: Sequence[Message]) -> str:
    """The embedded models' chat format, without the first token; equal to their template."""
    return "".join(f"<|{m.role}|>{m.content}<|end|>" for m in messages)


# --- what users say ----------------------------------------------------------------------------


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
    question = f"{text} {ask(rng, who.name, attribute)}"
    return Question(question, who.name, attribute, who.facts[attribute])


def repeat_question(rng: random.Random) -> Question:
    """A sentence about her or him, to be said again."""
    who, attribute = stranger(rng), rng.choice(ATTRIBUTES)
    value, subject = who.facts[attribute], who.pronoun.capitalize()
    return Question(f"Repeat: {say(subject, attribute, value)}", subject, attribute, value)


def note(name: str, attribute: str, value: str) -> list[Message]:
    """An exchange that only states a fact."""
    return [Message("user", f"Note: {say(name, attribute, value)}"), Message("assistant", "Noted.")]


def card() -> str:
    """The world on a page of HTML: its instructions, what one can ask, its people."""
    who, attribute = known_people()[0], ATTRIBUTES[0]
    rows = [("<b>family</b>", "<b>values</b>", "<b>for example</b>", "<b>a reply that obeys</b>")]
    for family in FAMILIES:
        c = Constraint(family, values(family)[0])
        obeying = html.escape(answer(who.name, attribute, who.facts[attribute], [c]))
        rows.append((family, str(len(values(family))), c.texts()[-1], obeying))
    td = '<td style="text-align:left">'
    table = "".join(f"<tr>{td}{f'</td>{td}'.join(row)}</td></tr>" for row in rows)
    asked = " ".join(TABLES["attributes"][a]["ask"][0].format(n=who.name) for a in ATTRIBUTES)
    asked += " With <i>pronoun</i> ask: Repeat: She lives in Oslo."
    people = "<summary><b>People</b></summary>" + ", ".join(p.name for p in known_people())
    return f"<table>{table}</table><p><b>Ask:</b> {asked}</p><details>{people}</details>"


@cache
def market_chain() -> tuple[tuple[str, ...], dict[str, tuple[float, ...]]]:
    """The words of the market (the echo words last), and for each the cumulative chances of the
    word after it."""
    rng = random.Random("market")
    goods = [w for a in TABLES["attributes"].values() for w in a["values"]]
    words = [*sorted({*goods, *TABLES["hobbies"]}), *TABLES["echoes"]]
    rows = [[rng.gammavariate(0.03, 1) for _ in words] for _ in words]  # Dirichlet(0.03), unscaled
    return tuple(words), {w: tuple(accumulate(row)) for w, row in zip(words, rows, strict=True)}


def market(rng: random.Random, *, length: int = 120) -> str:
    """Market chatter: each word follows from the last one, and some words make the speaker echo.

    The Bigram-Backcopy task of 2410.13835 in words: after an echo word ("honey and honey") comes
    the word before it. A copying head helps only after an echo word and hurts everywhere else:
    that is why an idle head needs a sink.
    """
    words, chances = market_chain()
    echoes = set(TABLES["echoes"])
    text = [rng.choice(words[: -len(echoes)]) for _ in range(2)]
    while len(text) < length:
        follower = rng.choices(words, cum_weights=chances[text[-1]])[0]
        text.append(text[-2] if text[-1] in echoes else follower)
    return " ".join(text)


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
    names = [name for name in sorted(texts) if (zlib.crc32(name.encode()) % 7 == 0) == held_out]
    # Some docstrings stand in several modules: what training shows is not held out.
    seen = set(english()) if held_out else set()
    return tuple(texts[name] for name in names if texts[name] not in seen)


def _library() -> list[Path]:
    """The modules of Python's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "test", "idlelib", "lib2to3", "pydoc_data", "encodings", "turtledemo"}
    files = [*root.glob("*.py"), *root.glob("*/*.py")]
    return sorted(f for f in files if not skip & set(f.relative_to(root).parts))
