"""GAtt measured: does an instruction of the first message still hold, and is it still known?

Turns count the user's messages from 1, as Table 30 of the Llama 2 paper (arXiv 2307.09288).
Axes: N dialogues, T turns of the longest one. NaN stands after the end of a shorter dialogue.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from steerkit.chat import BatchedChat, Message, check_request
from steerkit.gatt.dialogues import Plan, user_turns
from steerkit.models import Model, Tokenizer


class Adherence(NamedTuple):
    """Tensors (N, T) of 0/1 and NaN, and the replies that they judge.

    `obeyed`: all constraints hold. `right`: the value that was asked for stands in the reply.
    `recalled`: the recall probe at this turn was answered by the instruction's value; NaN at turns
    that were not probed, and for constraints without a probe.
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
    forced: Callable[[Plan, int], str] | None = None,
    lever: Callable[..., list[str]] | None = None,
    turns: Sequence[int] | None = None,
    probe_turns: Sequence[int] = (),
    max_new_tokens: int = 48,
    batch: int = 64,
) -> Adherence:
    """Greedy replies to each plan's messages, judged turn by turn.

    The instruction stands in the first message only, or in each one (`every`: the upper bound). The
    history is the model's own, unless `forced(plan, turn)` writes each reply into it after the
    model's was judged. `lever(model, tokenizer, dialogues, instructions)` replies in place of the
    model alone, for example with attention steered (`steering.levers`). At `probe_turns` (from 1)
    the dialogue forks: the recall probe takes the place of the user's message, and its answer does
    not stay in the history. With a `forced` history the model may reply at a few `turns` (from 1)
    only; the others are NaN.

    >>> import steerkit
    >>> from steerkit.constraints import Constraint
    >>> from steerkit.gatt.dialogues import Plan
    >>> model, tokenizer = steerkit.load("tiny", device="cpu")
    >>> users = ("Where does Anna Adler live?", "Which pet does Boris Bloom have?", "Who is he?")
    >>> plan = Plan((Constraint("hobby", "chess"),), "Hobby: chess.", users)
    >>> steerkit.adherence_by_turn(model, tokenizer, [plan]).obeyed
    tensor([[1., 0., 0.]])
    """
    check_request(plans=len(plans), batch=batch, probe_turns=min(probe_turns, default=1))
    if turns and not forced:
        raise ValueError(f"turns={turns}: the model's own history needs all of its replies")

    def answers(chat: BatchedChat, dialogues: list[list[Message]], plans: list[Plan]) -> list[str]:
        if lever is None:
            return chat.reply(dialogues, max_new_tokens=max_new_tokens)
        return lever(model, tokenizer, dialogues, [plan.instruction for plan in plans])

    replies: list[list[str]] = [[] for _ in plans]
    recalled = [[torch.nan] * len(plan.questions) for plan in plans]
    for start in tqdm(range(0, len(plans), batch), unit="batch", delay=2, leave=False):
        part = plans[start : start + batch]
        answer = partial(answers, BatchedChat(model, tokenizer))
        dialogues: list[list[Message]] = [[] for _ in part]
        for turn, active in user_turns(part, dialogues, every=every):
            if turn + 1 in probe_turns:
                probed = [(part[i], dialogues[i]) for i in active]
                for i, score in zip(active, _recall(answer, probed, turn), strict=True):
                    recalled[start + i][turn] = score
            texts = [""] * len(active)
            if turns is None or turn + 1 in turns:
                texts = answer([dialogues[i] for i in active], [part[i] for i in active])
            for i, text in zip(active, texts, strict=True):
                replies[start + i].append(text)
                written = forced(part[i], turn) if forced else text
                dialogues[i].append(Message("assistant", written))

    obeyed, right = [], []
    for plan, texts in zip(plans, replies, strict=True):
        obeyed.append([all(c.obeyed(text) for c in plan.constraints) for text in texts])
        right.append([plan.right(turn, text) for turn, text in enumerate(texts)])
    scores = _ragged(obeyed), _ragged(right)
    for score in scores if turns else ():
        skipped = [turn for turn in range(score.shape[1]) if turn + 1 not in turns]
        score[:, skipped] = torch.nan
    return Adherence(*scores, _ragged(recalled), replies)


def _recall(
    answer: Callable[..., list[str]], dialogues: Sequence[tuple[Plan, list[Message]]], turn: int
) -> list[float]:
    """On a fork of each dialogue: does the answer to the recall probe name the value?"""
    constraints = [next((c for c in plan.constraints if c.probe), None) for plan, _ in dialogues]
    forks = []
    for (plan, messages), constraint in zip(dialogues, constraints, strict=True):
        text = messages[-1].content  # without a probe any message keeps the batch whole
        if constraint is not None:
            text = text.removesuffix(plan.questions[turn].text) + constraint.probe.question
        forks.append([*messages[:-1], Message("user", text)])
    answers = zip(constraints, answer(forks, [plan for plan, _ in dialogues]), strict=True)
    return [torch.nan if c is None else float(c.recalled(text)) for c, text in answers]


def _ragged(scores: Sequence[Sequence[float]]) -> Tensor:
    """(N, T) of score lists of different lengths, NaN after the end of each."""
    tensors = [torch.tensor(line, dtype=torch.float32) for line in scores]
    return pad_sequence(tensors, batch_first=True, padding_value=torch.nan)


# Summaries


def survival(obeyed: Tensor) -> Tensor:
    """Turn of the first violation, from 1: (N, T) -> (N,); turns + 1 where there is none."""
    return obeyed.nan_to_num(0).cumprod(1).sum(1) + 1


def forgetting(obeyed: Tensor) -> Tensor:
    """Instruction forgetting ratio by transition (Multi-IF, 2410.15553): of the dialogues that
    obeyed at turn t, the share that does not at t + 1: (N, T) -> (T-1,), NaN where none obeyed."""
    before, after = obeyed[:, :-1], obeyed[:, 1:]
    forgot = (before == 1) & (after == 0)
    return forgot.sum(0) / ((before == 1) & ~after.isnan()).sum(0)
