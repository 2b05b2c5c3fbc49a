"""Instructions whose obedience a program can verify.

Two tables: "world", the eight families of the tiny world (data/world.json), and "real", families of
the Llama 2 paper's appendix A.3.5 and formats for real chat models (data/constraints.json).
"""

import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from steerkit.files import DATA, read_json

TABLES: dict = read_json(DATA / "world.json")
REAL: dict = read_json(DATA / "constraints.json")
FAMILIES = ("language", "figure", "hobby", "capitals", "ending", "json", "emoji", "pronoun")
HELD_OUT_PAIRS = frozenset(frozenset(pair) for pair in TABLES["held_out_pairs"])
_TABLES = {"world": TABLES, "real": REAL}


class Probe(NamedTuple):
    """A recall probe (Llama 2, Table 30): a question about the instruction, and what to expect.

    `answer` is the whole answer; `answer_without` the one of a model that got no instruction.
    """

    question: str
    answer: str
    answer_without: str


class Constraint(NamedTuple):
    """One instruction: its family and value ("French"; "" where the family has one value only)."""

    family: str
    value: str
    table: str = "world"

    def texts(self) -> list[str]:
        """All ways to say it; the last one is the short form ("Language: French.")."""
        forms = _table_of(self.family, self.table)["instructions"][self.family]
        return [form.format(v=self.value) for form in [*forms["long"], forms["short"]]]

    @property
    def probe(self) -> Probe | None:
        """The question about this instruction; None for families without one."""
        texts = _table_of(self.family, self.table)["probes"].get(self.family)
        return None if texts is None else Probe(texts[0], texts[1].format(v=self.value), texts[2])

    def obeyed(self, reply: str) -> bool:
        """Does the reply satisfy the instruction?"""
        real = _table_of(self.family, self.table) is REAL
        verifiers = REAL_VERIFIERS if real else VERIFIERS
        return verifiers[self.family](reply.strip(), self.value)

    def recalled(self, reply: str) -> bool:
        """Does an answer to the probe name the instruction's value?"""
        return re.search(rf"(?<!\w){re.escape(self.value)}(?!\w)", reply, re.IGNORECASE) is not None


class OwnConstraint(NamedTuple):
    """An instruction of your own, of no table: any function says whether a reply obeys it.

    With a `probe`, `recalled` says whether the answer to that question names the instruction.
    """

    obeyed: Callable[[str], bool]
    probe: Probe | None = None
    recalled: Callable[[str], bool] | None = None

    family = "own"


class Question(NamedTuple):
    """What the user says, and the fact that answers it: subject, attribute, value."""

    text: str
    subject: str
    attribute: str
    value: str


def instruct(rng: random.Random, constraints: Sequence[Constraint]) -> str:
    """The instructions in words, half of the time in their short form."""
    short = rng.random() < 0.5
    return " ".join(c.texts()[-1] if short else rng.choice(c.texts()[:-1]) for c in constraints)


def _table_of(family: str, table: str) -> dict:
    """The table; ValueError if there is no such table, or no such family in it."""
    known = {name: list(content["instructions"]) for name, content in _TABLES.items()}
    if family not in known.get(table, []):
        raise ValueError(f'"{family}" is no family of a table "{table}"; there are {known}')
    return _TABLES[table]


def values(family: str, table: str = "world") -> list[str]:
    """Every value of a family."""
    if _table_of(family, table) is REAL:
        return REAL["values"].get(family, [""])
    if family == "language":
        return [language for language in TABLES["languages"] if language != "English"]
    names = {"figure": "figures", "hobby": "hobbies", "ending": "endings", "emoji": "emoji"}
    return TABLES[names[family]] if family in names else [""]


def obeys(instruction: str, reply: str) -> bool | None:
    """Does the reply obey the tiny world's instructions in a text? None: the text holds none."""
    every = [Constraint(family, value) for family in FAMILIES for value in values(family)]
    text = instruction.casefold()
    asked = [c for c in every if any(form.casefold() in text for form in c.texts())]
    return all(c.obeyed(reply) for c in asked) if asked else None


def compatible(families: Iterable[str], table: str = "world") -> bool:
    """May these families be asked for together? (A JSON reply cannot end with a given word.)"""
    exclusive = [set(pair) for pair in _TABLES[table]["exclusive"]]
    return not any(a == b or {a, b} in exclusive for a, b in combinations(families, 2))


def as_constraint(own: Any) -> Constraint | OwnConstraint:
    """A constraint as it is; also a function (reply -> obeyed), or any object with `obeyed(reply)`,
    and perhaps `probe` and `recalled(reply)`."""
    if isinstance(own, Constraint):
        return own
    obeyed = getattr(own, "obeyed", own)
    probe, recalled = getattr(own, "probe", None), getattr(own, "recalled", None)
    if not callable(obeyed) or (probe and not callable(recalled)):
        raise ValueError(
            f"{own!r}: expected a Constraint, a function (reply -> obeyed), or an object with "
            "obeyed(reply), and with recalled(reply) if it has a probe"
        )
    return OwnConstraint(obeyed, probe, recalled)


def check_together(constraints: Sequence[Constraint | OwnConstraint]) -> None:
    """ValueError for a pair that no reply can obey: two of one family, or two that exclude."""
    for a, b in combinations((c for c in constraints if isinstance(c, Constraint)), 2):
        if a.table != b.table or not compatible((a.family, b.family), a.table):
            raise ValueError(
                f'"{a.texts()[-1]}" and "{b.texts()[-1]}" contradict each other: no reply obeys '
                "both; drop one (data/*.json, `exclusive`, lists such pairs)"
            )


# Verifiers: (reply, value) -> obeyed. First the tiny world's.


def _speaks(reply: str, language: str) -> bool:
    """A sentence frame of the language stands in the reply, and none of another language."""
    frames = {name for name, frames in _FRAMES.items() if any(f.search(reply) for f in frames)}
    return frames == {language}


def _frame(template: str) -> re.Pattern[str]:
    pattern = re.sub(r"\\\{[nv]\\\}", r"\\w+", re.escape(template.removesuffix(".")))
    return re.compile(pattern + r"(?!\w)", re.IGNORECASE)


def _json(text: str) -> Any:
    """The value that the text stands for; ... if it is no JSON (null is None)."""
    try:
        return json.loads(text)
    except ValueError:
        return ...


_FRAMES = {
    name: [_frame(template) for template in templates.values()]
    for name, templates in TABLES["languages"].items()
}
VERIFIERS: dict[str, Callable[[str, str], bool]] = {
    "language": _speaks,
    "figure": lambda reply, v: f"i, {v}, say:".casefold() in reply.casefold(),
    "hobby": lambda reply, v: f"i love {v}.".casefold() in reply.casefold(),
    "capitals": lambda reply, _: reply.isupper(),
    "ending": lambda reply, v: reply.rstrip(".!").casefold().endswith(" " + v.casefold()),
    "json": lambda reply, _: isinstance(_json(reply), dict),
    "emoji": lambda reply, v: reply.startswith(v),
    "pronoun": lambda reply, _: (
        bool(re.search(r"\bthey\b", reply, re.IGNORECASE))
        and not re.search(r"\b(she|he)\b", reply, re.IGNORECASE)
    ),
}


# Those of real chat models. Where IFEval (arXiv 2311.07911) has the same instruction, its
# definition is followed: all capitals, no comma, end phrase, JSON (a code fence is allowed).


def main_language(text: str) -> str | None:
    """The language most of whose function words (data/constraints.json) stand in the text; None
    when they are below a tenth of all words, or when two languages are level."""
    words = re.findall(r"[^\W\d_]+", text.casefold())
    counts = {name: sum(w in known for w in words) for name, known in _FUNCTION_WORDS.items()}
    best, second = sorted(counts, key=counts.__getitem__, reverse=True)[:2]
    clear = counts[best] > counts[second] and counts[best] >= len(words) / 10
    return best if clear else None


def _fenced_json(reply: str, _: str) -> bool:
    text = re.sub(r"^```(?:json)?\s*|\s*```$", "", reply, flags=re.IGNORECASE)
    return _json(text) is not ...


def _sentences(reply: str) -> int:
    # An abbreviation's full stop is followed by a word in small letters; a decimal's by a digit.
    return len(re.findall(r"[.!?…]+(?=[\"')\]]*(?:\s+[^a-z\s]|\s*$))", reply.strip()))


def _emoji_only(reply: str, _: str) -> bool:
    characters = re.sub(r"[\s\u200d\ufe0e\ufe0f\u20e3]", "", reply)  # joiners of emojis go
    blocks = r"[\u2600-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff]+"
    return re.fullmatch(blocks, characters) is not None


def _mentions(reply: str, value: str) -> bool:
    """The value's stem is there: "chess" in "chessboard", "swimming" in "I swim"."""
    stem = re.sub(r"(?<=\w{4})ing$", "", value.casefold())
    stem = re.sub(r"([b-df-hj-np-tv-z])\1$", r"\1", stem) if stem != value.casefold() else stem
    return re.search(rf"(?<!\w){re.escape(stem)}", reply.casefold()) is not None


_FUNCTION_WORDS = {name: set(words.split()) for name, words in REAL["function_words"].items()}
REAL_VERIFIERS: dict[str, Callable[[str, str], bool]] = {
    "hobby": _mentions,
    "language": lambda reply, v: main_language(reply) == v,
    "figure": lambda reply, v: v.casefold() in reply.casefold(),
    "capitals": lambda reply, _: reply.isupper(),
    "lowercase": lambda reply, _: reply.islower(),
    "ending": lambda reply, v: reply.strip('"').rstrip(".!?").casefold().endswith(v.casefold()),
    "one sentence": lambda reply, _: _sentences(reply) == 1,
    "no comma": lambda reply, _: "," not in reply and bool(reply),
    "json": _fenced_json,
    "haiku": lambda reply, _: len([x for x in reply.splitlines() if x.strip()]) == 3,
    "emoji only": _emoji_only,
    "quotation": lambda reply, _: len(reply) > 2 and reply[0] == reply[-1] == '"',
}
