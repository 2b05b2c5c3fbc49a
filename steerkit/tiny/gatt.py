"""Ghost Attention on the embedded model: plans in the tiny world, forced histories, measurements.

The `table` "real" draws constraints and questions for real chat models instead.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle

import pandas as pd
import torch
from torch import Tensor

from steerkit.constraints import FAMILIES, REAL, Constraint, Question, compatible, instruct, values
from steerkit.gatt.dialogues import Plan
from steerkit.gatt.evaluation import Adherence, adherence_by_turn
from steerkit.models import Model, Tokenizer
from steerkit.tiny.world import answer, fact_question, repeat_question

PROBE_TURNS = (2, 4, 6, 20)  # Table 30
DIALOGUES = 160  # sampled for one training
_FAMILIES = {"world": FAMILIES, "real": tuple(REAL["instructions"])}


# What the user asks


def question_for(rng: random.Random, constraints: Sequence[Constraint]) -> Question:
    """A question on which the constraints can show: pronouns need a sentence to be repeated."""
    pronoun = any(c.family == "pronoun" for c in constraints)
    return repeat_question(rng) if pronoun else fact_question(rng)


def training_question(rng: random.Random, constraints: Sequence[Constraint]) -> Question:
    """A quarter asks to repeat a sentence about her or him, whatever the instruction.

    If only "pronoun" dialogues did, the question alone would teach to say "they".
    """
    return repeat_question(rng) if rng.random() < 0.25 else question_for(rng, constraints)


def real_question(rng: random.Random, _: Sequence[Constraint]) -> Question:
    """An everyday question for a real chat model, without a value to look for."""
    return Question(rng.choice(REAL["questions"]), "", "", "")


# Plans


def split_values(family: str, table: str = "world") -> tuple[list[str], list[str]]:
    """Values that GAtt trains on, and the quarter that it never sees (none of a single value)."""
    every = values(family, table)
    held_out = every[3::4]
    return [v for v in every if v not in held_out], held_out


def draw_constraints(
    rng: random.Random,
    *,
    families: Sequence[str] = FAMILIES,
    held_out: bool = False,
    numbers: Sequence[int] = (6, 3, 1),
    table: str = "world",
) -> tuple[Constraint, ...]:
    """One, two or three compatible instructions, `numbers` their weights (appendix A.3.5)."""
    while True:
        number = rng.choices(range(1, len(numbers) + 1), numbers)[0]
        drawn = rng.sample(sorted(families), min(number, len(families)))
        pools = [split_values(f, table)[held_out] for f in drawn]
        if compatible(drawn, table) and all(pools):
            pairs = zip(drawn, pools, strict=True)
            return tuple(Constraint(f, rng.choice(pool), table) for f, pool in pairs)


def make_plan(
    rng: random.Random,
    constraints: Sequence[Constraint],
    *,
    turns: int = 20,
    probes: bool = False,
    ask: Callable[..., Question] = question_for,
) -> Plan:
    """A plan with questions by `ask(rng, constraints)`.

    With `probes` it asks for each instruction at a random turn. Once only: after that its answer
    stands in the history, and to copy it is easier than to remember. And rather late, where it is
    hardest: the chance of a turn grows with its number.
    Without constraints it asks for two that were never stated; the reply must say so.
    """
    questions = [ask(rng, constraints) for _ in range(turns)]
    if constraints:
        asked = [Question(c.probe.question, "", "", "") for c in constraints if c.probe]
        instruction = instruct(rng, constraints)
    else:
        unstated = [p for f in FAMILIES if (p := Constraint(f, "").probe)]
        asked = [Question(p.question, "", "", p.answer_without) for p in rng.sample(unstated, 2)]
        instruction = ""
    at = []
    if probes:  # weighted, without replacement: Efraimidis and Spirakis, 2006
        by_chance = sorted(range(1, turns), key=lambda t: rng.random() ** (1 / t), reverse=True)
        at = by_chance[: len(asked)]
    for turn, question in zip(at, asked, strict=False):
        questions[turn] = question
    return Plan(tuple(constraints), instruction, tuple(questions), tuple(sorted(at)))


def training_plans(
    seed: int, *, dialogues: int = DIALOGUES, turns: int = 20, table: str = "world"
) -> list[Plan]:
    """What is sampled for one seed: one dialogue in eight has no instruction at all."""
    # Languages twice: one that was never trained on is the hardest thing that is asked.
    families = [*_FAMILIES[table], "language"]
    rng = random.Random(f"plans {seed}")
    pools = {f: split_values(f, table)[0] for f in _FAMILIES[table]}
    # Each value equally often: the commonest one would become the guess of a late reply.
    value_cycle = {f: cycle(rng.sample(pool, len(pool))) for f, pool in pools.items()}
    drawn = []
    for i in range(dialogues):
        constraints = draw_constraints(rng, families=families, table=table) if i % 8 else ()
        drawn.append([c._replace(value=next(value_cycle[c.family])) for c in constraints])
    tiny = table == "world"  # a real model's words for "no instruction" are not known
    ask = training_question if tiny else real_question
    return [make_plan(rng, c, turns=turns, probes=bool(c) or tiny, ask=ask) for c in drawn]


def evaluation_plans(
    seed: int,
    n: int,
    *,
    held_out: bool,
    families: Sequence[str] | None = None,
    turns: int = 20,
    table: str = "world",
) -> list[Plan]:
    """`n` dialogues of one instruction for each family that has such values."""
    rng = random.Random(f"evaluation {seed} {held_out}")
    fit = [f for f in families or _FAMILIES[table] if split_values(f, table)[held_out]]
    options = {"held_out": held_out, "table": table}
    drawn = [draw_constraints(rng, families=[f], **options) for f in fit for _ in range(n)]
    ask = question_for if table == "world" else real_question
    return [make_plan(rng, constraints, turns=turns, ask=ask) for constraints in drawn]


def mixed_plans(n: int, *, turns: int, seed: str) -> list[Plan]:
    """`n` dialogues of one instruction, all families and all values, as the base was trained."""
    rng = random.Random(seed)
    per_family = -(-n // len(FAMILIES))
    drawn = [Constraint(f, rng.choice(values(f))) for f in FAMILIES for _ in range(per_family)]
    rng.shuffle(drawn)
    return [
        Plan((c,), instruct(rng, [c]), tuple(question_for(rng, [c]) for _ in range(turns)))
        for c in drawn[:n]
    ]


# Forced histories: replies written by us instead of the model


def obeying(plan: Plan, turn: int) -> str:
    """A right reply that obeys: the history of a perfect model."""
    return world_reply(plan, turn, plan.constraints)


def neutral(plan: Plan, turn: int) -> str:
    """A right reply that ignores the instruction."""
    return world_reply(plan, turn, ())


def competing(plan: Plan, turn: int) -> str:
    """A right reply that obeys another value of each family: another language, another figure."""
    rivals = []
    for c in plan.constraints:
        others = [v for v in values(c.family, c.table) if v != c.value]
        if others:
            rivals.append(c._replace(value=random.Random(f"{c} {turn}").choice(others)))
    return world_reply(plan, turn, rivals)


def stops(plan: Plan, turn: int) -> str:
    """Obeys for five turns, then ignores the instruction."""
    return obeying(plan, turn) if turn < 5 else neutral(plan, turn)


def mixed(plan: Plan, turn: int) -> str:
    """Obeys, ignores the instruction, or obeys another one: drawn anew at each turn."""
    return random.Random(f"{plan} {turn}").choice([obeying, neutral, competing])(plan, turn)


def world_reply(plan: Plan, turn: int, constraints: Sequence[Constraint]) -> str:
    """The tiny world's reply to a plan's message at `turn` (from 0) under these constraints."""
    q = plan.questions[turn]
    return answer(q.subject, q.attribute, q.value, constraints)


# With "own" the model's replies stay.
HISTORIES = {"own": None} | {f.__name__: f for f in (neutral, competing, stops, mixed)}


# Measurements


def measure(
    model: Model,
    tokenizer: Tokenizer,
    plans: Mapping[str, Sequence[Plan]],
    *,
    every: bool = False,
    max_new_tokens: int = 48,
) -> pd.DataFrame:
    """`judged` replies to the plans of each split, and recall probes at the turns of Table 30."""
    options = {"every": every, "probe_turns": PROBE_TURNS, "max_new_tokens": max_new_tokens}
    parts = []
    for split, part in plans.items():
        adherence = adherence_by_turn(model, tokenizer, part, **options)
        parts.append(judged(part, adherence).assign(split=split))
    return pd.concat(parts, ignore_index=True)


def judged(plans: Sequence[Plan], adherence: Adherence) -> pd.DataFrame:
    """One line a reply: family, dialogue, turn (from 1), obeyed, right, recalled (0/1 or NaN)."""
    N, T = adherence.obeyed.shape
    index = pd.MultiIndex.from_product([range(N), range(1, T + 1)], names=["dialogue", "turn"])
    names = ("obeyed", "right", "recalled")
    scores = {name: getattr(adherence, name).flatten().numpy() for name in names}
    table = pd.DataFrame(scores, index).reset_index()
    table.insert(0, "family", [plans[i].constraints[0].family for i in table["dialogue"]])
    return table


def by_dialogue(replies: pd.DataFrame, column: str = "obeyed") -> Tensor:
    """`judged` lines of one arm -> (N, T), dialogues of all seeds; T are the turns with scores."""
    scored = replies.dropna(subset=column)
    table = pd.concat(
        part.pivot(index=["seed", "dialogue"], columns="turn", values=column)
        for _, part in scored.groupby("split", sort=False)
    )
    return torch.tensor(table.to_numpy())
