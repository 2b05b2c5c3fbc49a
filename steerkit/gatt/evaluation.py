"""GAtt measured: does an instruction of the first message still hold, and is it still known?

Turns count the user's messages from 1; Table 30 of the Llama 2 paper (arXiv 2307.09288) is read in
the same way.
Axes: N dialogues, T turns.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from steerkit.chat import BatchedChat, Message, chat_batch, dialogue_ids, prompt_ids, reply
from steerkit.constraints import FAMILIES, Constraint, values
from steerkit.gatt.dialogues import Model, Plan, Sample, Tokenizer, history
from steerkit.progress import progress
from steerkit.tiny.gates import fact_question
from steerkit.tiny.world import answer, repeat_question

Forced = Callable[[Plan, int], str]
Say = Callable[[Sequence[Sequence[Message]]], list[str]]


class Adherence(NamedTuple):
    """What `adherence_by_turn` found: 0/1 tensors, and the replies.

    `obeyed` (N, T): all constraints hold; `right` (N, T): the answer stands in the reply;
    `recalled` (N, P): the probe at each asked turn was answered by the instruction's value, NaN
    where the constraints have no probe.
    """

    obeyed: Tensor
    right: Tensor
    recalled: Tensor
    replies: list[list[str]]


def adherence_by_turn(
    model: Model,
    tokenizer: Tokenizer,
    plans: Sequence[Plan],
    *,
    every: bool = False,
    forced: Forced | None = None,
    probe_turns: Sequence[int] = (),
    max_new_tokens: int = 48,
    batch: int = 64,
) -> Adherence:
    """Greedy replies to each plan's messages, judged turn by turn.

    The instruction stands in the first message only, or in each one (`every`: the upper bound). The
    history is the model's own, unless `forced(plan, turn)` writes each reply into it after the
    model's was judged. At `probe_turns` (from 1) the dialogue forks: the probe is asked instead of
    the user's message, and the answer is not kept.
    """
    recalls, replies = [], []
    with progress(sum(len(p.questions) for p in plans), unit="replies") as update:
        say = partial(_play, every=every, forced=forced, probe_turns=probe_turns, update=update)
        for start in range(0, len(plans), batch):
            talk = BatchedChat(model, tokenizer)
            reply_to = partial(talk.reply, max_new_tokens=max_new_tokens)
            recalled, said = say(reply_to, plans[start : start + batch])
            recalls.append(recalled)
            replies += said
    pairs = list(zip(plans, replies, strict=True))
    obeyed = [[all(c.obeyed(r) for c in p.constraints) for r in row] for p, row in pairs]
    right = [[p.right(t, r) for t, r in enumerate(row)] for p, row in pairs]
    rows = torch.tensor(obeyed).float(), torch.tensor(right).float()
    return Adherence(*rows, torch.cat(recalls), replies)


def _play(
    say: Say,
    plans: Sequence[Plan],
    *,
    every: bool,
    forced: Forced | None,
    probe_turns: Sequence[int],
    update: Callable[[int], None],
) -> tuple[Tensor, list[list[str]]]:
    """One batch of `adherence_by_turn`: answers to the probes (N, P), and the replies."""
    dialogues: list[list[Message]] = [[] for _ in plans]
    replies: list[list[str]] = [[] for _ in plans]
    recalled = torch.full((len(plans), len(probe_turns)), torch.nan)
    for turn in range(len(plans[0].questions)):
        if turn + 1 in probe_turns:
            recalled[:, list(probe_turns).index(turn + 1)] = _recall(
                say, dialogues, plans, turn, every=every
            )
        for rows, plan in zip(dialogues, plans, strict=True):
            rows.append(Message("user", plan.message(turn, every=every)))
        for rows, plan, said, text in zip(dialogues, plans, replies, say(dialogues), strict=True):
            said.append(text)
            rows.append(Message("assistant", forced(plan, turn) if forced else text))
        update(len(plans))
    return recalled, replies


def _recall(
    say: Say,
    dialogues: Sequence[Sequence[Message]],
    plans: Sequence[Plan],
    turn: int,
    *,
    every: bool,
) -> Tensor:
    """Is the probe answered by the instruction's value, on a fork of each dialogue? (N,)"""
    asked = [next((c for c in plan.constraints if c.probe), None) for plan in plans]
    forks = [
        [*rows, Message("user", _probe(plan, c, turn, every))]
        for rows, plan, c in zip(dialogues, plans, asked, strict=True)
    ]
    pairs = zip(asked, say(forks), strict=True)
    return torch.tensor([torch.nan if c is None else float(c.recalled(text)) for c, text in pairs])


def _probe(plan: Plan, constraint: Constraint | None, turn: int, every: bool) -> str:
    if constraint is None:  # no probe for this row: any message keeps the batch whole
        return plan.message(turn, every=every)
    question = constraint.probe.question
    return f"{plan.instruction} {question}" if every or turn == 0 else question


# Forced histories


def neutral(plan: Plan, turn: int) -> str:
    """A right reply that ignores the instruction (facts and sentences of the tiny world)."""
    return world_reply(plan, turn, ())


def competing(plan: Plan, turn: int) -> str:
    """A right reply that obeys another value of each family: another language, another figure."""
    rivals = []
    for c in plan.constraints:
        others = [v for v in values(c.family, c.table) if v != c.value]
        if others:
            rivals.append(c._replace(value=random.Random(f"{c} {turn}").choice(others)))
    return world_reply(plan, turn, rivals)


def world_reply(plan: Plan, turn: int, constraints: Sequence[Constraint]) -> str:
    """The tiny world's reply to a plan's message at `turn` (from 0) under these constraints."""
    q = plan.questions[turn]
    return answer(q.subject, q.attribute, q.value, constraints)


# Numbers from 0/1 rows


def survival(obeyed: Tensor) -> Tensor:
    """Turn of the first violation, T + 1 where there is none: (N, T) -> (N,), turns from 1."""
    return obeyed.cumprod(1).sum(1) + 1


def forgetting(obeyed: Tensor) -> Tensor:
    """Instruction forgetting ratio by transition (Multi-IF, 2410.15553): of the dialogues that
    obeyed at turn t, the share that does not at t + 1: (N, T) -> (T-1,), NaN where none obeyed."""
    before, after = obeyed[:, :-1], obeyed[:, 1:]
    return ((before == 1) & (after == 0)).sum(0) / before.sum(0)


# Distance to the teacher


@torch.no_grad()
def teacher_kl(
    model: Model,
    teacher: Model,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
) -> Tensor:
    """KL(teacher || model) in nats per reply token, by turn: (N, T).

    The teacher reads the instruction in every message, the model in the first one; the replies are
    the same, `samples`', which the teacher gave.
    """
    rows = []
    for s in samples:
        told, ghost = (
            _reply_logits(m, tokenizer, s, every) for m, every in ((teacher, True), (model, False))
        )
        kl = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(told, ghost, strict=True)]
        rows.append(torch.stack(kl))
    return torch.stack(rows)


def _reply_logits(model: Model, tokenizer: Tokenizer, s: Sample, every: bool) -> list[Tensor]:
    """Log-probabilities (tokens of reply t, V) for each turn t of one dialogue."""
    last = len(s.replies) - 1
    whole = [*history(s, last, every=every), Message("assistant", s.replies[last])]
    ids = dialogue_ids(tokenizer, whole)
    logits = model(torch.tensor([ids], device=model.device)).logits[0].float().log_softmax(-1).cpu()
    spans = []
    for t in range(last + 1):
        start = len(prompt_ids(tokenizer, history(s, t, every=every)))
        reply_ids = tokenizer(s.replies[t], add_special_tokens=False)["input_ids"]
        spans.append(logits[start - 1 : start - 1 + len(reply_ids)])
    return spans


# Side effects


def leak(
    model: Model, tokenizer: Tokenizer, *, turns: int = 20, n: int = 64, seed: int = 0
) -> Tensor:
    """BatchedChat without any instruction: (n, turns) of 0/1, does a reply obey some constraint?

    Half of the messages ask for a fact, half for a sentence about her or him to be repeated.
    """
    rng, kinds = random.Random(f"leak {seed}"), (fact_question, repeat_question)
    users = [[rng.choice(kinds)(rng).text for _ in range(turns)] for _ in range(n)]
    every = [Constraint(f, v) for f in FAMILIES for v in values(f)]
    found = [
        [any(c.obeyed(r) for c in every) for r in row]
        for row in chat_batch(model, tokenizer, users)
    ]
    return torch.tensor(found).float()


def untold(model: Model, tokenizer: Tokenizer, *, n: int = 8, seed: int = 0) -> Tensor:
    """Recall probes without any instruction, after `n` = 0, 1, ... questions: (families x n,) of
    0/1, was the answer the one that names nothing?"""
    rng = random.Random(f"untold {seed}")
    rows, expected = [], []
    for family in FAMILIES:
        probe = Constraint(family, "").probe
        for turns in range(n) if probe else ():
            users = [fact_question(rng) for _ in range(turns)]
            told = [answer(q.subject, q.attribute, q.value) for q in users]
            pairs = [
                m
                for q, a in zip(users, told, strict=True)
                for m in (Message("user", q.text), Message("assistant", a))
            ]
            rows.append([*pairs, Message("user", probe.question)])
            expected.append(probe.untold)
    replies = reply(model, tokenizer, rows)
    return torch.tensor([float(a == b) for a, b in zip(replies, expected, strict=True)])
