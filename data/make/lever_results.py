"""The measurements behind notebook 06: every lever, strength, history and model, and side effects.

`python data/make/lever_results.py run --out DIR` makes them, one CSV file per part, model and seed,
and passes over those that are there (an hour and more a seed on one core; `longest` only when
named). `collect` joins them into data/levers.csv and data/endless.csv. Heads and strengths are
chosen on seed 0, whose dialogues are not reported.
"""

import argparse
import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from steerkit.attention.heads import Head, Heads, layer_and_head_counts
from steerkit.chat import (
    Message,
    dialogue_ids,
    pad_left,
    prompt_ids,
    prompt_text,
    stop_ids,
    template_pieces,
)
from steerkit.constraints import FAMILIES, Constraint, Question, values
from steerkit.files import DATA, write_text
from steerkit.gatt.dialogues import Plan, Sample, history
from steerkit.gatt.evaluation import adherence_by_turn
from steerkit.models import Model, Tokenizer, load
from steerkit.spans import Span, Spans, find_span
from steerkit.steering.head_search import every_head, score_heads
from steerkit.steering.levers import Lever, guided, plain, repeated, steered
from steerkit.steering.other_methods import additive_bias, split_softmax, spotlight
from steerkit.steering.pasta import emphasise
from steerkit.steering.scoring import Prompt
from steerkit.streaming.conversation import stream_chat
from steerkit.streaming.sink_cache import SinkCache
from steerkit.tiny.gatt import (
    HISTORIES,
    draw_constraints,
    evaluation_plans,
    judged,
    neutral,
    obeying,
)
from steerkit.tiny.world import fact_question

PROFILE, SEEDS = 0, (3, 4, 5)
MODELS = ("tiny", "tiny-gatt", "tiny-gatt-mixed")
TURNS = (3, 8, 20)
HEADS = 4  # searched, and as many random ones
CAPACITY = 252  # tokens in the cache of an endless dialogue
PARTS = ("sweep", "histories", "kept", "endless", "longest")

Method = Callable[[Model, Spans], AbstractContextManager]


# The levers

NATS, FEW_NATS = (1, 2, 3, 4.6, 6, 8), (3, 4.6, 8)
TARGETS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
EXPONENTS = (0.8, 0.5, 0.3, 0.2, 0.1, 0.02)
SCALES = (1.5, 2, 3, 4, 8, 16)

# Levers without a strength; the last one is a control: other words of about the same length.
FIXED: dict[str, Lever] = {
    "nothing": plain,
    "repeat always": repeated(lambda turn, last: True),
    "repeat in the latest": repeated(lambda turn, last: turn == last),
    "repeat every fourth": repeated(lambda turn, last: turn % 4 == 0),
    "repeat other words": repeated(lambda turn, last: turn == last, "Take your time."),
}


def methods(found: Heads, others: Heads) -> dict[str, tuple[Sequence[float], Callable]]:
    """By name: the strengths, weak to strong, and what makes a steering method of one of them."""

    def boost(bias: float) -> Method:
        return partial(additive_bias, bias=bias)

    def pasta(bias: float, heads: Heads) -> Method:
        return partial(emphasise, heads=heads, alpha=math.exp(-bias))

    return {
        "PASTA": (NATS, partial(pasta, heads=found)),
        "InstABoost": (NATS, boost),
        "SpotLight": (TARGETS, lambda target: partial(spotlight, target=target)),
        "SpotLight, exact": (TARGETS, lambda target: partial(spotlight, target=target, exact=True)),
        "split-softmax": (EXPONENTS, lambda exponent: partial(split_softmax, exponent=exponent)),
        # Controls: heads that nobody searched, the first token too, a span elsewhere.
        "random heads": (FEW_NATS, partial(pasta, heads=others)),
        "with the first token": (FEW_NATS, boost),
        "random span": (FEW_NATS, boost),
    }


def somewhere(span: Span, tokens: int) -> Span:
    """As many tokens elsewhere in the prompt, the same ones each time."""
    length = span[1] - span[0]
    start = random.Random(tokens).randrange(span[1], max(span[1] + 1, tokens - length))
    return start, start + length


WHERE = {"with the first token": lambda span, _: (0, span[1]), "random span": somewhere}


def arms(model: Model, tokenizer: Tokenizer) -> list[tuple[str, float, Lever, Method | None]]:
    """Every lever at every strength: name, strength, lever, and its method if it has one."""
    every = [(name, 0.0, lever, None) for name, lever in FIXED.items()]
    every += [("guidance", scale, guided(scale), None) for scale in SCALES]
    for name, (strengths, make) in methods(*searched_heads(model, tokenizer)).items():
        options = {"where": WHERE[name]} if name in WHERE else {}
        for strength in strengths:
            method = make(strength)
            lever = steered(method, **options)
            every.append((name, strength, lever, None if name in WHERE else method))
    return every


def searched_heads(model: Model, tokenizer: Tokenizer) -> tuple[list[Head], list[Head]]:
    """The heads that raise the obeying reply most where it is forgotten, and random ones."""
    prompts, turn = [], 3
    for plan in evaluation_plans(PROFILE, 4, held_out=False):
        messages = dialogue_at(plan, turn, "neutral")
        ids = prompt_ids(tokenizer, messages)
        whole = dialogue_ids(tokenizer, [*messages, Message("assistant", obeying(plan, turn - 1))])
        span = find_span(tokenizer, messages, plan.instruction)
        prompts.append(Prompt(ids, [span], whole[len(ids) :]))
    top = score_heads(model, prompts).top(HEADS)
    others = [head for head in every_head(*layer_and_head_counts(model)) if head not in top]
    return top, random.Random(PROFILE).sample(others, HEADS)


def dialogue_at(plan: Plan, turn: int, kind: str) -> list[Message]:
    """The messages up to the user's at `turn` (from 1), the replies before it as `kind` says."""
    written = tuple(HISTORIES[kind](plan, t) for t in range(turn))
    return history(Sample(plan, written, ()), turn - 1)


# Adherence


def replies(
    model: Model, tokenizer: Tokenizer, lever: Lever, plans: Sequence[Plan], kind: str
) -> pd.DataFrame:
    """By family and turn: how many replies, how many obeyed, how many were right."""
    forced = HISTORIES[kind]
    if kind in ("competing", "mixed"):  # nothing competes with a family's only value
        plans = [plan for plan in plans if len(values(plan.constraints[0].family)) > 1]
    chosen = TURNS if forced else None
    adherence = adherence_by_turn(
        model, tokenizer, plans, forced=forced, lever=lever, turns=chosen, batch=128
    )
    table = judged(plans, adherence).query("turn in @TURNS")
    scores = table.groupby(["family", "turn"])[["obeyed", "right"]]
    return scores.sum().assign(n=scores.size(), history=kind).reset_index()


def sweep(model: Model, tokenizer: Tokenizer, seed: int) -> pd.DataFrame:
    """Every lever at every strength among neutral replies, and what it breaks."""
    plans, tables = evaluation_plans(seed, 3, held_out=False), []
    for name, strength, lever, method in arms(model, tokenizer):
        table = replies(model, tokenizer, lever, plans, "neutral")
        broken = {}
        if not name.startswith("repeat"):  # without an instruction there is nothing to repeat
            broken = side_effects(model, tokenizer, lever, method, seed=seed)
        tables.append(table.assign(lever=name, strength=strength, split="seen", **broken))
        print(name, strength, flush=True)
    return pd.concat(tables)


def histories(
    model: Model, tokenizer: Tokenizer, seed: int, chosen: dict[str, float]
) -> pd.DataFrame:
    """Every lever at its chosen strength on every kind of history, seen and held-out values."""
    tables = []
    for name, strength, lever, _ in arms(model, tokenizer):
        if name in WHERE or strength != chosen.get(name, 0.0):
            continue
        for split, n in (("seen", 2), ("held-out", 1)):
            plans = evaluation_plans(seed, n, held_out=split == "held-out")
            for kind in HISTORIES:
                table = replies(model, tokenizer, lever, plans, kind)
                tables.append(table.assign(lever=name, strength=strength, split=split))
        print(name, strength, flush=True)
    return pd.concat(tables)


def choose(swept: pd.DataFrame) -> dict[str, float]:
    """Of each lever the strength that obeys most where little breaks.

    Little: at least 90 % of the facts are right, and half of the other instructions are kept that
    are kept without a lever. Where no strength is that mild, the weakest one is taken.
    """
    chosen, usual = {}, swept.loc[swept["lever"].eq("nothing"), "other"].iloc[0]
    for name, table in swept.query("strength > 0").groupby("lever"):
        rows = table.groupby("strength", sort=False).agg(
            obeyed=("obeyed", "sum"),
            right=("right", "sum"),
            n=("n", "sum"),
            other=("other", "first"),
        )
        mild = rows[(rows["right"] >= 0.9 * rows["n"]) & (rows["other"] >= 0.5 * usual)]
        chosen[name] = mild["obeyed"].idxmax() if len(mild) else rows.index[0]
    return chosen


# Side effects


def side_effects(
    model: Model,
    tokenizer: Tokenizer,
    lever: Lever,
    method: Method | None,
    *,
    n: int = 48,
    seed: int,
) -> dict[str, float]:
    """What a lever breaks, as shares of `n` replies each.

    `other`: of two instructions in one message the lever acts on the first one; is the second one
    obeyed? Without any instruction the lever acts on the first question, two turns later: is the
    reply `changed`, does it follow some instruction that nobody gave (`leak`), and what is the KL
    divergence to the plain model (`kl`, nats per token of its reply; attention methods only)?
    """
    rng = random.Random(f"side effects {seed}")
    pairs = [draw_constraints(rng, numbers=(0, 1)) for _ in range(n)]
    both = [
        [Message("user", f"{first.texts()[-1]} {second.texts()[-1]} {fact_question(rng).text}")]
        for first, second in pairs
    ]
    answers = lever(model, tokenizer, both, [first.texts()[-1] for first, _ in pairs])
    other = [second.obeyed(text) for (_, second), text in zip(pairs, answers, strict=True)]

    plans = [Plan((), "", three_questions(rng)) for _ in range(n)]
    quiet = [dialogue_at(plan, 3, "neutral") for plan in plans]
    wanted = [plan.questions[0].text for plan in plans]
    without, answers = (plain(model, tokenizer, quiet), lever(model, tokenizer, quiet, wanted))
    every = [Constraint(family, value) for family in FAMILIES for value in values(family)]
    leak = [any(c.obeyed(text) for c in every) for text in answers]
    changed = [a != b for a, b in zip(answers, without, strict=True)]
    broken = {"other": sum(other) / n, "changed": sum(changed) / n, "leak": sum(leak) / n}
    if method is not None:
        broken["kl"] = divergence(model, tokenizer, method, quiet, wanted, without)
    return broken


def kept(model: Model, tokenizer: Tokenizer, seed: int) -> pd.DataFrame:
    """The same without a lever: what a trained model keeps."""
    alone = side_effects(model, tokenizer, plain, None, seed=seed)
    return pd.DataFrame([{"lever": "nothing", "strength": 0.0, **alone}])


def three_questions(rng: random.Random) -> tuple[Question, ...]:
    """Three different ones, so that the first one's span is found once."""
    questions = tuple(fact_question(rng) for _ in range(3))
    return questions if len({q.text for q in questions}) == 3 else three_questions(rng)


@torch.no_grad()
def divergence(
    model: Model,
    tokenizer: Tokenizer,
    method: Method,
    dialogues: Sequence[list[Message]],
    wanted: Sequence[str],
    answers: Sequence[str],
) -> float:
    """KL(plain || steered) in nats per token of the plain model's replies."""
    prompts = [prompt_ids(tokenizer, messages) for messages in dialogues]
    tails = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers]
    batch = pad_left(
        tokenizer, [a + b for a, b in zip(prompts, tails, strict=True)], range(len(tails))
    )
    pairs = zip(dialogues, wanted, strict=True)
    spans = [[find_span(tokenizer, messages, text)] for messages, text in pairs]
    p = model(**batch.inputs).logits.log_softmax(-1)
    with method(model, batch.move(spans)):
        q = model(**batch.inputs).logits.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)  # (B, T)
    means = [row[-len(tail) - 1 : -1].mean() for row, tail in zip(kl, tails, strict=True)]
    return torch.stack(means).mean().item()


# Dialogues without end


def endless(
    model: Model,
    tokenizer: Tokenizer,
    seed: int,
    *,
    turns: int = 200,
    every: int = 10,
    pins: Sequence[bool] = (False, True),
    kinds: Sequence[str] = ("own", "neutral"),
) -> pd.DataFrame:
    """One dialogue per family through a cache of `CAPACITY` tokens, its instruction evicted or
    pinned, on the model's own history and on a neutral one: replies at each `every`th turn."""
    lines, answers = [], {"own": own_replies, "neutral": replies_among}
    for plan in evaluation_plans(seed, 1, held_out=False, turns=turns):
        family = plan.constraints[0].family
        for pin in pins:
            for kind in kinds:
                texts = answers[kind](model, tokenizer, plan, pin=pin, every=every)
                for turn, text in texts.items():
                    obeyed = plan.constraints[0].obeyed(text)
                    right = plan.right(turn - 1, text)
                    lines.append((family, kind, pin, turn, int(obeyed), int(right)))
        print(family, flush=True)
    return pd.DataFrame(lines, columns=["family", "history", "pinned", "turn", "obeyed", "right"])


def first_tokens(tokenizer: Tokenizer, plan: Plan, pin: bool) -> int:
    """The sinks: the whole first message, or the usual four tokens."""
    message = Message("user", plan.message(0, every=False))
    return len(prompt_ids(tokenizer, [message])) if pin else 4


def own_replies(
    model: Model, tokenizer: Tokenizer, plan: Plan, *, pin: bool, every: int
) -> dict[int, str]:
    """The model reads its own replies: by turn (from 1) its text."""
    messages = [plan.message(turn, every=False) for turn in range(len(plan.questions))]
    window = CAPACITY - first_tokens(tokenizer, plan, pin)
    stream = stream_chat(model, tokenizer, messages, pin=pin, window=window, max_new_tokens=48)
    texts = {turn: reply.text for turn, reply in enumerate(stream, 1)}
    return {turn: text for turn, text in texts.items() if turn % every == 0}


@torch.no_grad()
def replies_among(
    model: Model,
    tokenizer: Tokenizer,
    plan: Plan,
    *,
    pin: bool,
    every: int,
    forced: Callable[[Plan, int], str] = neutral,
) -> dict[int, str]:
    """The model reads `forced` replies; what it says itself is not kept."""
    sinks = first_tokens(tokenizer, plan, pin)
    cache = SinkCache(model, sinks=sinks, window=CAPACITY - sinks)
    *_, before, after = template_pieces(
        tokenizer, [Message("user", ""), Message("assistant", ""), Message("user", "")]
    )
    texts, piece = {}, prompt_text(tokenizer, [Message("user", plan.message(0, every=False))])
    for turn in range(1, len(plan.questions) + 1):
        logits = read(model, cache, tokenizer(piece, add_special_tokens=False)["input_ids"])
        if turn % every == 0:
            texts[turn] = greedy(model, tokenizer, deepcopy(cache), logits)
        if turn < len(plan.questions):
            piece = forced(plan, turn - 1) + before + plan.message(turn, every=False) + after
    return texts


def read(model: Model, cache: SinkCache, ids: Sequence[int]) -> torch.Tensor:
    """Logits (V,) after these tokens."""
    inputs = torch.tensor([ids], device=model.device)
    return model(input_ids=inputs, past_key_values=cache, logits_to_keep=1).logits[0, -1]


def greedy(model: Model, tokenizer: Tokenizer, cache: SinkCache, logits: torch.Tensor) -> str:
    ids, stops = [], set(stop_ids(model, tokenizer))
    while len(ids) < 48 and (token := int(logits.argmax())) not in stops:
        ids.append(token)
        logits = read(model, cache, [token])
    return tokenizer.decode(ids, skip_special_tokens=True)


# Runs


def run(part: str, name: str, seed: int, out: Path) -> pd.DataFrame:
    """One part of one model and seed, from its file if it is in `out`."""
    path = out / f"{part}-{name}-{seed}.csv"
    if path.exists():
        return pd.read_csv(path)
    model, tokenizer = load(name)
    if part == "histories":
        chosen = choose(run("sweep", name, PROFILE, out))
        table = histories(model, tokenizer, seed, chosen)
    else:
        longest = partial(endless, turns=2000, every=100, pins=(True,), kinds=("neutral",))
        parts = {"sweep": sweep, "kept": kept, "endless": endless, "longest": longest}
        table = parts[part](model, tokenizer, seed)
    table = table.assign(model=name, part=part, seed=seed)
    write_text(path, table.to_csv(index=False, lineterminator="\n"))
    return table


def collect(out: Path, seeds: Sequence[int]) -> None:
    """Join the files of `out` into data/levers.csv and data/endless.csv."""
    tables = {"levers": [], "endless": []}
    files = dict.fromkeys(PARTS, "levers") | dict.fromkeys(("endless", "longest"), "endless")
    for part in PARTS:
        for name in MODELS:
            for path in (out / f"{part}-{name}-{seed}.csv" for seed in seeds):
                if path.exists():
                    tables[files[part]].append(pd.read_csv(path))
    for name, parts in tables.items():
        text = pd.concat(parts).to_csv(index=False, lineterminator="\n", float_format="%.4g")
        write_text(DATA / f"{name}.csv", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("run", "collect"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:-1])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # a model this small is no faster on two
    if options.command == "collect":
        collect(options.out, options.seeds)
        return
    for part in options.parts:
        for seed in options.seeds:
            for name in options.models:
                run(part, name, seed, options.out)


if __name__ == "__main__":
    main()
