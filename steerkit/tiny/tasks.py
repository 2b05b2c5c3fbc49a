"""PASTA's four tasks in the tiny world.

Each task has an easy form and a conflict: a rival instruction, an instruction that has faded, a
sentence that contradicts another one, a fact against what was memorised. A short prompt's span may
hold all that a reply needs, and then every head could be steered without harm. So the prompts also
ask for something that stands outside of the span, and the strict metric looks at it.
"""

import random
import zlib
from collections.abc import Sequence

from steerkit.chat import Message
from steerkit.constraints import HELD_OUT_PAIRS, TABLES, Constraint, compatible, instruct, values
from steerkit.steering import tasks
from steerkit.steering.tasks import Example, Task
from steerkit.tiny import world
from steerkit.tiny.world import ATTRIBUTES, Person, answer, say

JSON, THEY = Constraint("json", ""), Constraint("pronoun", "")
FORMS = ("figure", "hobby", "ending", "emoji")  # what else a reply may be asked to do


def _json(rng: random.Random, conflict: bool, split: str) -> Example:
    """A biography to be read; JSON is asked for, and in conflict a form that JSON excludes."""
    who, instruction, rival = _someone(rng, split), instruct(rng, [JSON]), []
    if conflict:
        rival = [instruct(rng, [_form(rng, ["capitals", "emoji"])])]
    attribute, *others = rng.sample(ATTRIBUTES, 3)
    sentences = [say(who.name, a, who.facts[a]) for a in (attribute, *others)]
    instructions = _shuffled(rng, [instruction, *rival])
    parts = [*instructions, *_shuffled(rng, sentences), world.ask(rng, who.name, attribute)]
    value = who.facts[attribute]
    right = answer(who.name, attribute, value, [JSON])
    message = Message("user", " ".join(parts))
    return Example((message,), instruction, right, value, kept=(value,))


def _pronouns(rng: random.Random, conflict: bool, split: str) -> Example:
    """They is asked for in the system message; in conflict an exchange has ignored it since."""
    instruction = instruct(rng, [THEY])
    messages = [Message("system", instruction)]
    if conflict:
        earlier = world.repeat_question(rng)
        reply = answer(earlier.subject, earlier.attribute, earlier.value)
        messages += [Message("user", earlier.text), Message("assistant", reply)]
    question = world.repeat_question(rng)
    while _split(f"{question.attribute} {question.value}") != split:
        question = world.repeat_question(rng)
    form = _form(rng, ["figure", "hobby"])
    messages.append(Message("user", f"{instruct(rng, [JSON, form])} {question.text}"))
    right = answer(question.subject, question.attribute, question.value, [THEY, JSON, form])
    source, kept = question.text.removeprefix("Repeat: "), (question.value, form.value)
    return Example(tuple(messages), instruction, right, question.value, kept=kept, source=source)


def _biography(rng: random.Random, conflict: bool, split: str) -> Example:
    """Sentences about a stranger; in conflict one of them contradicts the emphasised one."""
    who, (attribute, other) = _someone(rng, split), rng.sample(ATTRIBUTES, 2)
    value, forms = who.facts[attribute], _forms(rng)
    span = say(who.name, attribute, value)
    sentences = [span, say(who.name, other, who.facts[other])]
    if conflict:
        sentences.append(say(who.name, attribute, _other(rng, attribute, value)))
    body = " ".join([instruct(rng, forms), *_shuffled(rng, sentences)])
    example = _asked(rng, who.name, attribute, span, body, forms)
    right = answer(who.name, attribute, value, forms)
    candidates = tuple(TABLES["attributes"][attribute]["values"])
    return example._replace(answer=right, value=value, candidates=candidates)


def _counterfact(rng: random.Random, conflict: bool, split: str) -> Example:
    """News about a person; in conflict one whose fact is memorised, and stated before the news."""
    attribute, forms = rng.choice(ATTRIBUTES), [_form(rng, FORMS)]
    who = _known(rng, attribute, split) if conflict else _someone(rng, split)
    old = who.facts[attribute]
    new = _other(rng, attribute, old)
    span = say(who.name, attribute, new)
    before = [say(who.name, attribute, old)] if conflict else []
    body = " ".join([instruct(rng, forms), *before, f"News: {span}"])
    example = _asked(rng, who.name, attribute, span, body, forms)
    right = answer(who.name, attribute, new, forms)
    return example._replace(answer=right, value=new, candidates=(new, old))


def _asked(
    rng: random.Random, name: str, attribute: str, span: str, body: str, forms: Sequence[Constraint]
) -> Example:
    """The body and a question; the other ways to ask are the paraphrases."""
    questions = _shuffled(rng, TABLES["attributes"][attribute]["ask"])
    first, *others = [(Message("user", f"{body} {text.format(n=name)}"),) for text in questions]
    kept = (name, *(c.value for c in forms))
    return Example(first, span, "", "", kept=kept, paraphrases=tuple(others))


def _split(key: str) -> str:
    return "profile" if zlib.crc32(f"split {key}".encode()) % 2 else "test"


def _someone(rng: random.Random, split: str) -> Person:
    """A stranger that training never shows, of this split."""
    while _split((who := world.stranger(rng, held_out=True)).name) != split:
        pass
    return who


def _known(rng: random.Random, attribute: str, split: str) -> Person:
    """One of the forty people, whose fact is of this split."""
    while _split(f"{(who := rng.choice(world.known_people())).name} {attribute}") != split:
        pass
    return who


def _form(rng: random.Random, families: Sequence[str]) -> Constraint:
    family = rng.choice(families)
    return Constraint(family, rng.choice(values(family)))


def _forms(rng: random.Random) -> list[Constraint]:
    """Two forms that go together, and that training combines."""
    while True:
        families = rng.sample(FORMS, 2)
        if compatible(families) and frozenset(families) not in HELD_OUT_PAIRS:
            return [Constraint(f, rng.choice(values(f))) for f in families]


def _other(rng: random.Random, attribute: str, value: str) -> str:
    return rng.choice([v for v in TABLES["attributes"][attribute]["values"] if v != value])


def _shuffled(rng: random.Random, items: Sequence[str]) -> list[str]:
    return rng.sample(list(items), len(items))


_JSON_PAPER = {"F. Acc": tasks.json_paper, "P. Acc": tasks.json_value_paper}
_PRONOUNS_PAPER = {"Acc": tasks.pronouns_paper, "A. Acc": tasks.all_pronouns_paper}
_VALUE = {"value": tasks.states_value}
_PARAPHRASED = {"ES": False, "PS": True}
_ALL = (
    Task("json", "JSON Formatting", _json, tasks.json_strict, _JSON_PAPER),
    Task("pronouns", "Pronouns Changing", _pronouns, tasks.pronouns_strict, _PRONOUNS_PAPER),
    Task("biasbios", "BiasBios", _biography, tasks.exact, _VALUE, {"Acc": False}),
    Task("counterfact", "CounterFact", _counterfact, tasks.exact, _VALUE, _PARAPHRASED),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
