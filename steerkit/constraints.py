"""Instructions whose obedience a program can verify: the tiny world's eight families."""

import json
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from steerkit.models import DATA

TABLES: dict = json.loads((DATA / "world.json").read_text(encoding="utf-8"))
FAMILIES = ("language", "figure", "hobby", "capitals", "ending", "json", "emoji", "pronoun")
EXCLUSIVE = frozenset(frozenset(pair) for pair in TABLES["exclusive"])
HELD_OUT_PAIRS = frozenset(frozenset(pair) for pair in TABLES["held_out_pairs"])
# Pairs that training shows in its second part only: after the first one the model obeyed none of
# them (figures' names were words it had never seen in capitals), so they cannot be held out.
LATE_PAIRS = frozenset(frozenset(pair) for pair in TABLES["late_pairs"])


class Constraint(NamedTuple):
    """One instruction: its family and value ("French"; "" where the family has one value only)."""

    family: str
    value: str

    def texts(self) -> list[str]:
        """All ways to say it; the last one is the short form ("Language: French.")."""
        forms = TABLES["instructions"][self.family]
        return [form.format(v=self.value) for form in [*forms["long"], forms["short"]]]

    def obeyed(self, reply: str) -> bool:
        """Does the reply satisfy the instruction?"""
        return VERIFIERS[self.family](reply.strip(), self.value)


def values(family: str) -> list[str]:
    """Every value of a family in the tiny world."""
    tables = {"language": [x for x in TABLES["languages"] if x != "English"]}
    tables |= {"figure": TABLES["figures"], "hobby": TABLES["hobbies"]}
    tables |= {"ending": TABLES["endings"], "emoji": TABLES["emoji"]}
    return tables.get(family, [""])


def compatible(families: Iterable[str]) -> bool:
    """May these families be asked for together? (A JSON reply cannot end with a given word.)"""
    families = list(families)
    pairs = {frozenset((a, b)) for a in families for b in families if a != b}
    return len(set(families)) == len(families) and not pairs & EXCLUSIVE


def _speaks(reply: str, language: str) -> bool:
    """A sentence frame of the language stands in the reply, and none of another language."""
    return _language_of(reply) == {language}


def _language_of(reply: str) -> set[str]:
    return {name for name, frames in _FRAMES.items() if any(f.search(reply) for f in frames)}


def _frame(template: str) -> re.Pattern[str]:
    pattern = (
        re.escape(template.removesuffix(".")).replace(r"\{n\}", r"\w+").replace(r"\{v\}", r"\w+")
    )
    return re.compile(pattern + r"(?!\w)", re.IGNORECASE)


def _parses(reply: str, _: str) -> bool:
    try:
        return isinstance(json.loads(reply), dict)
    except ValueError:
        return False


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
    "json": _parses,
    "emoji": lambda reply, v: reply.startswith(v),
    "pronoun": lambda reply, _: (
        bool(re.search(r"\bthey\b", reply, re.IGNORECASE))
        and not re.search(r"\b(she|he)\b", reply, re.IGNORECASE)
    ),
}
