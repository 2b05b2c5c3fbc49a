"""One bench for all levers that keep an instruction, on the embedded model.

A lever has a strength, and no default is fair: PASTA's is 4.6 nats, InstABoost's 1.1. So each is
measured at several strengths, for what it brings (adherence) and for what it breaks.
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd

from steerkit.chat import Message, dialogue_ids, prompt_ids
from steerkit.constraints import FAMILIES, Constraint, values
from steerkit.gatt.dialogues import Plan, Sample, history
from steerkit.gatt.evaluation import adherence_by_turn
from steerkit.models import Model, Tokenizer
from steerkit.spans import Span, find_span
from steerkit.steering.levers import Lever, guided, plain, repeated, steered
from steerkit.steering.other_methods import additive_bias, split_softmax, spotlight
from steerkit.steering.pasta import emphasise
from steerkit.steering.scoring import Prompt
from steerkit.tiny.gatt import HISTORIES, draw_constraints, judged, obeying
from steerkit.tiny.world import fact_question

Heads = Sequence[tuple[int, int]]
Strengths = tuple[Sequence[float], Callable[[float], Lever]]
NATS = (1, 2, 3, 4, 5, 6, 7, 8)
TARGETS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)


def levers(heads: Heads, random_heads: Heads) -> dict[str, Strengths]:
    """Each lever's strengths, weak to strong, and what makes the lever of one of them."""

    def boost(bias: float, **options: object) -> Lever:
        return steered(partial(additive_bias, bias=bias), **options)

    def pasta(bias: float, heads: Heads) -> Lever:
        return steered(partial(emphasise, heads=heads, alpha=math.exp(-bias)))

    def somewhere(span: Span, tokens: int) -> Span:
        """As many tokens elsewhere in the prompt, the same ones each time."""
        length = span[1] - span[0]
        start = random.Random(tokens).randrange(span[1], max(span[1] + 1, tokens - length))
        return start, start + length

    return {
        "PASTA": (NATS, partial(pasta, heads=heads)),
        "InstABoost": (NATS, boost),
        "SpotLight": (TARGETS, lambda target: steered(partial(spotlight, target=target))),
        "SpotLight, exact": (
            TARGETS,
            lambda target: steered(partial(spotlight, target=target, exact=True)),
        ),
        "split-softmax": (
            (0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02),
            lambda exponent: steered(partial(split_softmax, exponent=exponent)),
        ),
        "guidance": ((1.5, 2, 3, 4, 6, 8, 12, 16), guided),
        # Controls: heads that nobody searched, the first token with the span, a span elsewhere.
        "random heads": (NATS, partial(pasta, heads=random_heads)),
        "with the first token": (NATS, partial(boost, where=lambda span, _: (0, span[1]))),
        "random span": (NATS, partial(boost, where=somewhere)),
    }


# Levers without a strength; the last one is the control: other words of about the same length.
FIXED: dict[str, Lever] = {
    "nothing": plain,
    "repeat always": repeated(lambda turn, last: True),
    "repeat in the latest": repeated(lambda turn, last: turn == last),
    "repeat every fourth": repeated(lambda turn, last: turn % 4 == 0),
    "repeat other words": repeated(lambda turn, last: turn == last, "Thanks for that."),
}


def measure(
    model: Model,
    tokenizer: Tokenizer,
    lever: Lever,
    plans: Sequence[Plan],
    *,
    kind: str,
    turns: Sequence[int],
) -> pd.DataFrame:
    """`judged` replies at some turns (from 1) of one kind of history; on its own one, at all."""
    forced = HISTORIES[kind]
    if kind in ("competing", "mixed"):  # nothing competes with a family's only value
        plans = [plan for plan in plans if len(values(plan.constraints[0].family)) > 1]
    chosen = turns if forced else None
    adherence = adherence_by_turn(
        model, tokenizer, plans, forced=forced, lever=lever, turns=chosen, batch=128
    )
    return judged(plans, adherence).dropna(subset="obeyed").assign(history=kind)


def search_prompts(tokenizer: Tokenizer, plans: Sequence[Plan], *, turn: int) -> list[Prompt]:
    """What heads are searched on: dialogues that forgot, and the reply that would obey."""
    prompts = []
    for plan in plans:
        written = Sample(plan, tuple(HISTORIES["neutral"](plan, t) for t in range(turn)), ())
        messages = history(written, turn - 1)
        reply = [*messages, Message("assistant", obeying(plan, turn - 1))]
        ids = prompt_ids(tokenizer, messages)
        span = find_span(tokenizer, messages, plan.instruction)
        prompts.append(Prompt(ids, [span], dialogue_ids(tokenizer, reply)[len(ids) :]))
    return prompts


def side_effects(
    model: Model, tokenizer: Tokenizer, lever: Lever, *, n: int = 64, seed: int = 0
) -> dict[str, float]:
    """What a lever breaks, as shares of `n` replies each.

    `other`: of two instructions in one message the lever acts on the first one; is the second one
    obeyed? Without any instruction the lever acts on the first question, two turns later: is the
    reply `changed`, does it follow some instruction that nobody gave (`leak`)?
    """
    rng = random.Random(f"side effects {seed}")
    pairs = [draw_constraints(rng, numbers=(0, 1)) for _ in range(n)]
    asked = [fact_question(rng).text for _ in pairs]
    both = [
        [Message("user", f"{first.short} {second.short} {question}")]
        for (first, second), question in zip(pairs, asked, strict=True)
    ]
    replies = lever(model, tokenizer, both, [first.short for first, _ in pairs])
    other = [second.obeyed(text) for (_, second), text in zip(pairs, replies, strict=True)]

    plans = [Plan((), "", tuple(fact_question(rng) for _ in range(3))) for _ in range(n)]
    quiet = [history(Sample(p, tuple(obeying(p, t) for t in range(2)), ()), 2) for p in plans]
    without = plain(model, tokenizer, quiet)
    with_lever = lever(model, tokenizer, quiet, [plan.questions[0].text for plan in plans])
    every = [Constraint(family, value) for family in FAMILIES for value in values(family)]
    leak = [any(c.obeyed(text) for c in every) for text in with_lever]
    changed = [a != b for a, b in zip(with_lever, without, strict=True)]
    return {"other": sum(other) / n, "changed": sum(changed) / n, "leak": sum(leak) / n}
