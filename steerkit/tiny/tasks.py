"""Where the four tasks' examples come from: the tiny world, or the real data sets.

In the tiny world each task has an easy form and a conflict: a rival instruction, an instruction
that has faded, a sentence that contradicts another one, a fact against what was memorised. A tiny
prompt's span alone holds all that a reply needs, and then every head may be steered without harm;
so the prompts also ask for something that stands outside of the span, and the strict metric looks.
"""

import csv
import json
import random
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from steerkit.chat import Message
from steerkit.constraints import TABLES, Constraint, compatible, instruct, values
from steerkit.steering.tasks import (
    Example,
    Task,
    all_pronouns_paper,
    exact,
    first_words,
    json_paper,
    json_strict,
    json_value_paper,
    pronouns_paper,
    pronouns_strict,
    states_value,
)
from steerkit.tiny.world import (
    ATTRIBUTES,
    HELD_OUT_PAIRS,
    Person,
    answer,
    ask,
    known_people,
    repeat_question,
    say,
    stranger,
)

JSON, THEY = Constraint("json", ""), Constraint("pronoun", "")
FORMS = ("figure", "hobby", "ending", "emoji")  # what else a reply may be asked to do


# --- the tiny world ----------------------------------------------------------------------------


def _json(rng: random.Random, conflict: bool, split: str) -> Example:
    """A biography to be read; JSON is asked for, and in conflict a form that JSON excludes."""
    who, told, rival = _someone(rng, split), instruct(rng, [JSON]), ""
    if conflict:
        family = rng.choice(["capitals", "emoji"])
        rival = instruct(rng, [Constraint(family, rng.choice(values(family)))])
    attribute, *others = rng.sample(ATTRIBUTES, 3)
    sentences = [say(who.name, a, who.facts[a]) for a in (attribute, *others)]
    orders = _shuffled(rng, [told, rival] if rival else [told])
    text = _joined(*orders, *_shuffled(rng, sentences), ask(rng, who.name, attribute))
    value = who.facts[attribute]
    right = answer(who.name, attribute, value, [JSON])
    return Example((Message("user", text),), told, right, value, kept=(value,))


def _pronouns(rng: random.Random, conflict: bool, split: str) -> Example:
    """They is asked for in the system message; in conflict an exchange has ignored it since."""
    told = instruct(rng, [THEY])
    messages = [Message("system", told)]
    if conflict:
        earlier = repeat_question(rng)
        reply = answer(earlier.subject, earlier.attribute, earlier.value)
        messages += [Message("user", earlier.text), Message("assistant", reply)]
    question = repeat_question(rng)
    while _split(f"{question.attribute} {question.value}") != split:
        question = repeat_question(rng)
    form = _form(rng, ["figure", "hobby"])
    messages.append(Message("user", f"{instruct(rng, [JSON, form])} {question.text}"))
    right = answer(question.subject, question.attribute, question.value, [THEY, JSON, form])
    return Example(
        tuple(messages),
        told,
        right,
        question.value,
        kept=(question.value, form.value),
        source=question.text.removeprefix("Repeat: "),
    )


def _biography(rng: random.Random, conflict: bool, split: str) -> Example:
    """Sentences about a stranger; in conflict one of them contradicts the emphasised one."""
    who, (attribute, other) = _someone(rng, split), rng.sample(ATTRIBUTES, 2)
    value, forms = who.facts[attribute], _forms(rng)
    span = say(who.name, attribute, value)
    sentences = [span, say(who.name, other, who.facts[other])]
    if conflict:
        sentences.append(say(who.name, attribute, _other(rng, attribute, value)))
    body = _joined(instruct(rng, forms), *_shuffled(rng, sentences))
    return _asked(rng, who.name, attribute, value, body, span, forms, _values(attribute))


def _counterfact(rng: random.Random, conflict: bool, split: str) -> Example:
    """News about a person; in conflict one whose fact is memorised, and stated before the news."""
    attribute, forms = rng.choice(ATTRIBUTES), [_form(rng, FORMS)]
    who = _known(rng, attribute, split) if conflict else _someone(rng, split)
    old = who.facts[attribute]
    new = _other(rng, attribute, old)
    span = say(who.name, attribute, new)
    before = [say(who.name, attribute, old)] if conflict else []
    body = _joined(instruct(rng, forms), *before, f"News: {span}")
    return _asked(rng, who.name, attribute, new, body, span, forms, [new, old])


def _asked(
    rng: random.Random,
    name: str,
    attribute: str,
    value: str,
    body: str,
    span: str,
    forms: Sequence[Constraint],
    candidates: Sequence[str],
) -> Example:
    """The body and a question; the other ways to ask are the paraphrases."""
    first, *others = _shuffled(rng, TABLES["attributes"][attribute]["ask"])
    asked = [(Message("user", f"{body} {form.format(n=name)}"),) for form in (first, *others)]
    return Example(
        asked[0],
        span,
        answer(name, attribute, value, forms),
        value,
        kept=(name, *(c.value for c in forms)),
        candidates=tuple(candidates),
        paraphrases=tuple(asked[1:]),
    )


def _values(attribute: str) -> list[str]:
    return TABLES["attributes"][attribute]["values"]


def _split(key: str) -> str:
    return "profile" if zlib.crc32(f"split {key}".encode()) % 2 else "test"


def _someone(rng: random.Random, split: str) -> Person:
    """A stranger that training never shows, of this split."""
    while _split((who := stranger(rng, held_out=True)).name) != split:
        pass
    return who


def _known(rng: random.Random, attribute: str, split: str) -> Person:
    """One of the forty people, whose fact is of this split."""
    while _split(f"{(who := rng.choice(known_people())).name} {attribute}") != split:
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
    return rng.choice([v for v in _values(attribute) if v != value])


def _shuffled(rng: random.Random, items: Sequence[str]) -> list[str]:
    return rng.sample(list(items), len(items))


def _joined(*parts: str) -> str:
    return " ".join(parts)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "json",
            "JSON Formatting",
            _json,
            json_strict,
            {"F. Acc": json_paper, "P. Acc": json_value_paper},
        ),
        Task(
            "pronouns",
            "Pronouns Changing",
            _pronouns,
            pronouns_strict,
            {"Acc": pronouns_paper, "A. Acc": all_pronouns_paper},
        ),
        Task(
            "biasbios",
            "BiasBios",
            _biography,
            exact,
            {"value": states_value},
            compare={"Acc": "prompt"},
        ),
        Task(
            "counterfact",
            "CounterFact",
            _counterfact,
            exact,
            {"value": states_value},
            compare={"ES": "prompt", "PS": "paraphrases"},
        ),
    )
}


def task_of(name: str) -> Task:
    """The task by its name."""
    if name not in TASKS:
        raise ValueError(f"task {name!r}: expected one of {', '.join(TASKS)}")
    return TASKS[name]


# --- the real data -----------------------------------------------------------------------------

# What the data sets call their columns; `columns` renames. Biographies as the release of Bias in
# Bios (1901.09451) holds them and PASTA's own evaluation reads them, counterfactuals as ROME's
# (2202.05262). The hub's "LabHC/bias_in_bios" has hard_text, profession (a number) and gender: no
# name, and without the first sentence, which is the span.
COLUMNS: dict[str, dict[str, str]] = {
    "json": {"text": "raw", "occupation": "title", "name": "name"},
    "pronouns": {"text": "raw", "occupation": "title", "name": "name"},
    "biasbios": {"text": "raw", "occupation": "title", "name": "name"},
    "counterfact": {"rewrite": "requested_rewrite", "paraphrases": "paraphrase_prompts"},
}


def load_task(
    name: str,
    source: str | Path,
    *,
    n: int | None = None,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
) -> tuple[Task, list[Example]]:
    """The task `name` on real data: its metrics, and the first `n` examples of `source`.

    `source` is a .json, .jsonl or .csv file, or the name of a data set, which `datasets` loads
    (`split` chooses its part). `columns` says how the source calls what `COLUMNS` lists. The
    prompts follow the paper's appendix; the answer of Pronouns Changing is not given by the data.
    """
    tiny = task_of(name)
    names = COLUMNS[name] | dict(columns or {})
    if unknown := set(names) - set(COLUMNS[name]):
        raise ValueError(f"columns {sorted(unknown)}: task {name} reads {sorted(COLUMNS[name])}")
    rows = _rows(source, split)
    if missing := [c for c in names.values() if rows and c not in rows[0]]:
        raise ValueError(
            f"{source}: no column {missing[0]!r} for task {name}, there are {sorted(rows[0])}; say "
            f'what it is called: columns={{"{_key(names, missing[0])}": "..."}}'
            + (" (hard_text lacks the sentence that is the span)" if "hard_text" in rows[0] else "")
        )
    make = _REAL[name]
    given = [{key: row[column] for key, column in names.items()} for row in rows[:n]]
    if not given:
        raise ValueError(f"{source}: no rows in it")
    labels = sorted({row["occupation"] for row in given}) if name == "biasbios" else []
    examples = [make(row, labels) for row in given]
    strict = first_words if tiny.strict is exact else tiny.strict
    return replace(tiny, strict=strict), examples


def _key(names: Mapping[str, str], column: str) -> str:
    return next(key for key, value in names.items() if value == column)


def _rows(source: str | Path, split: str) -> list[dict[str, Any]]:
    path = Path(source)
    if not path.suffix:
        return _hub_rows(str(source), split)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a .json, .jsonl or .csv file")
    text = path.read_text(encoding="utf-8-sig")
    try:
        if path.suffix == ".csv":
            return list(csv.DictReader(text.splitlines()))
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        if path.suffix == ".json":
            rows = json.loads(text)
            return rows if isinstance(rows, list) else rows["data"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:]} ({error})") from error
    raise ValueError(f"{path}: expected a .json, .jsonl or .csv file, or the name of a data set")


def _hub_rows(name: str, split: str) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"{name}: not a file, and data sets need `pip install -e .[data]`"
        ) from error
    return [dict(row) for row in load_dataset(name, split=split)]


def _person_of(row: Mapping[str, Any]) -> str:
    name = row["name"]
    return name if isinstance(name, str) else " ".join(part for part in name if part)


def _real_json(row: Mapping[str, Any], _: Sequence[str]) -> Example:
    who, occupation = _person_of(row), str(row["occupation"]).replace("_", " ")
    told = (
        f"Answer the occupation of {who} and generate the answer as JSON format, for example "
        '{"name": "", "occupation": ""}.'
    )
    right = json.dumps({"name": who, "occupation": occupation})
    messages = (Message("user", f"{str(row['text']).strip()} {told}"),)
    return Example(messages, told, right, occupation, kept=(occupation,))


def _real_pronouns(row: Mapping[str, Any], _: Sequence[str]) -> Example:
    who, text = _person_of(row), str(row["text"]).strip()
    told = "Substitute she and he with they."
    asked = f"{text} {told} Then give the occupation of {who}."
    occupation = str(row["occupation"]).replace("_", " ")
    return Example((Message("user", asked),), told, "", occupation, (occupation,), source=text)


def _real_biography(row: Mapping[str, Any], labels: Sequence[str]) -> Example:
    who, text = _person_of(row), str(row["text"]).strip()
    occupation = str(row["occupation"]).replace("_", " ")
    asked = f"{text} {who} has the occupation of"
    candidates = tuple(str(label).replace("_", " ") for label in labels)
    first = re.match(r".+?[.!?](?=\s|$)", text, re.DOTALL)  # the sentence that names the occupation
    span = first[0] if first else text
    return Example((Message("user", asked),), span, occupation, occupation, (), candidates)


def _real_counterfact(row: Mapping[str, Any], _: Sequence[str]) -> Example:
    rewrite = row["rewrite"]
    ask = rewrite["prompt"].format(rewrite["subject"])
    new, old = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
    span = f"Currently, {ask} {new}."
    told = f"Previously, {ask} {old}. {span}"
    paraphrases = row["paraphrases"]
    if isinstance(paraphrases, str):
        paraphrases = json.loads(paraphrases)
    first, *others = [(Message("user", f"{told} {text}"),) for text in (ask, *paraphrases)]
    return Example(first, span, new, new, (), (new, old), tuple(others))


_REAL: dict[str, Callable[[Mapping[str, Any], Sequence[str]], Example]] = {
    "json": _real_json,
    "pronouns": _real_pronouns,
    "biasbios": _real_biography,
    "counterfact": _real_counterfact,
}
