"""Ghost Attention (Llama 2, arXiv 2307.09288, section 3.3 and appendix A.3.5): the training data.

1. Put the instruction in front of every user message and sample the replies, the best of a few
   candidates each: "a process analogous to rejection sampling" (`sample_dialogues`).
2. Leave the instruction in the first user message only, and train on the last reply (`make_rows`).

Axes: N dialogues, K candidates of each reply.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from tqdm import tqdm

from steerkit.chat import BatchedChat, Message, check_request, check_template, user_text
from steerkit.constraints import Constraint, OwnConstraint, Question, as_constraint, check_together
from steerkit.models import Model, Tokenizer

Row = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Plan:
    """A dialogue to be sampled: the instruction, and what the user says besides it.

    A constraint may be a function of your own, `reply -> obeyed`, or an object with such a method
    `obeyed`. A question may be plain text, or a message. A verified reply obeys all constraints and
    holds its question's `value` ("" asks for nothing). `probes` are the turns, from 0, whose
    message asks for an instruction; the constraint's `recalled` verifies the reply there.

    >>> brief = Plan((lambda reply: len(reply) < 40,), "Be brief.", ("Who?", "Where?"))
    >>> brief.message(0, every=False), brief.verified(0, "Ada.")
    ('Be brief. Who?', True)
    """

    constraints: tuple[Constraint | OwnConstraint, ...]
    instruction: str
    questions: tuple[Question, ...]
    probes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.constraints and not self.instruction.strip():
            raise ValueError("the instruction is empty: say what the constraints ask for")
        check_request(questions=self.questions)
        questions = (
            q if isinstance(q, Question) else Question(user_text(q), "", "", "")
            for q in self.questions
        )
        object.__setattr__(self, "constraints", tuple(map(as_constraint, self.constraints)))
        object.__setattr__(self, "questions", tuple(questions))
        check_together(self.constraints)

    def message(self, turn: int, *, every: bool) -> str:
        """The user's message at `turn` (from 0); the instruction leads it if `every`, or at 0."""
        text = self.questions[turn].text
        instructed = self.instruction and (every or turn == 0)
        return f"{self.instruction} {text}" if instructed else text

    def right(self, turn: int, reply: str) -> bool:
        """Does the reply hold the value that the question asks for?"""
        return self.questions[turn].value.casefold() in reply.casefold()

    def verified(self, turn: int, reply: str) -> bool:
        """Is the reply right and obedient; or, at a probe, does it name the instruction?"""
        if turn in self.probes and self.constraints:
            text = self.questions[turn].text
            asked_for = [c for c in self.constraints if c.probe and c.probe.question == text]
            return any(c.recalled(reply) for c in asked_for)
        return self.right(turn, reply) and all(c.obeyed(reply) for c in self.constraints)


class Sample(NamedTuple):
    """A sampled dialogue: the chosen reply of each turn, and whether its verifier passed it."""

    plan: Plan
    replies: tuple[str, ...]
    verified: tuple[bool, ...]


def user_turns(
    plans: Sequence[Plan], dialogues: Sequence[list[Message]], *, every: bool
) -> Iterator[tuple[int, list[int]]]:
    """Turn by turn, append the user's next message to each dialogue whose plan has one.

    Yields the turn (from 0) and the indices of these dialogues. The caller appends the replies.
    """
    for turn in range(max(len(plan.questions) for plan in plans)):
        active = [i for i, plan in enumerate(plans) if turn < len(plan.questions)]
        for i in active:
            dialogues[i].append(Message("user", plans[i].message(turn, every=every)))
        yield turn, active


# Rejection sampling


def sample_dialogues(
    model: Model,
    tokenizer: Tokenizer,
    plans: Sequence[Plan],
    *,
    candidates: int = 2,
    temperature: float = 0.7,
    max_new_tokens: int = 48,
    batch: int = 32,
    seed: int = 0,
) -> list[Sample]:
    """Rejection sampling: the best of `candidates` replies to each of the plans' user messages.

    The instruction leads every user message. The first reply that its verifier passes is chosen;
    if none passes, the first one. One `generate` holds `batch` dialogues with all their candidates.
    Raises ValueError for `candidates` < 1, and for a tokenizer without a fit chat template.

    Several GPUs, under `accelerate launch` (`PartialState` and `gather_object` are Accelerate's):
    `with PartialState().split_between_processes(plans) as mine:` sample `mine`, then
    `gather_object(samples)` gives all processes all samples, in the order of the plans.

    >>> import steerkit
    >>> from steerkit.constraints import Constraint
    >>> from steerkit.gatt.dialogues import Plan
    >>> model, tokenizer = steerkit.load("tiny", device="cpu")
    >>> users = ("Where does Anna Adler live?", "Which pet does Boris Bloom have?")
    >>> plan = Plan((Constraint("hobby", "chess"),), "Hobby: chess.", users)
    >>> sample = steerkit.sample_dialogues(model, tokenizer, [plan])[0]
    >>> sample.verified
    (True, True)
    """
    check_request(candidates=candidates, batch=batch, max_new_tokens=max_new_tokens)
    check_template(tokenizer)
    samples: list[Sample] = []
    for start in tqdm(range(0, len(plans), batch), unit="batch", delay=2, leave=False):
        chat = BatchedChat(model, tokenizer)
        draw = partial(chat.reply, max_new_tokens=max_new_tokens, temperature=temperature)
        with torch.random.fork_rng():
            torch.manual_seed(seed * 1_000_003 + start)
            samples += _sample_batch(chat, draw, plans[start : start + batch], candidates)
    return samples


def _sample_batch(
    chat: BatchedChat, draw: Callable[..., list[str]], plans: Sequence[Plan], candidates: int
) -> list[Sample]:
    """`draw` gives one sampled reply of `chat` to each dialogue.

    When a dialogue ends before the others, the cache behind them starts anew: slower, no more.
    """
    dialogues: list[list[Message]] = [[] for _ in plans]
    for turn, active in user_turns(plans, dialogues, every=True):
        replies = draw([dialogues[i] for i in active for _ in range(candidates)])
        chosen = []  # of the drawn replies, each once for every candidate of the next turn
        for n, i in enumerate(active):
            group = range(n * candidates, (n + 1) * candidates)
            best = next((k for k in group if plans[i].verified(turn, replies[k])), group[0])
            dialogues[i].append(Message("assistant", replies[best]))
            chosen += [best] * candidates
        chat.select(chosen)

    samples = []
    for plan, messages in zip(plans, dialogues, strict=True):
        replies = tuple(m.content for m in messages[1::2])
        verified = tuple(plan.verified(turn, text) for turn, text in enumerate(replies))
        samples.append(Sample(plan, replies, verified))
    return samples


# Training data


def history(sample: Sample, turn: int, *, every: bool = False) -> list[Message]:
    """Messages up to the user's at `turn` (from 0): the instruction in the first one only, or in
    `every` one."""
    messages = []
    for t in range(turn):
        messages.append(Message("user", sample.plan.message(t, every=every)))
        messages.append(Message("assistant", sample.replies[t]))
    return [*messages, Message("user", sample.plan.message(turn, every=every))]


def make_rows(
    samples: Sequence[Sample],
    *,
    histories: Sequence[Sequence[Sample]] | None = None,
    per_dialogue: int = 6,
    seed: int = 0,
) -> list[Row]:
    """GAtt's training rows: {"prompt": history, "completion": the reply at one turn}.

    Each dialogue gives `per_dialogue` rows, cut at its probes and at random turns after the first.
    TRL puts no loss on a prompt, so all earlier turns, assistant messages included, carry none.
    Only verified replies are taught.

    So the earlier replies may be anything. In the paper they are the sample's own, which obey.
    `histories` lists the kinds to draw from, `samples` themselves among them if they are wanted.
    Each kind answers the same questions, one sample for each dialogue: without the instruction
    (`neutral_plans`), or under another one (`competing_plans`). A dialogue draws one kind for all
    its rows. Where that history does not obey, the model can only learn to read the instruction.

    >>> import steerkit
    >>> from steerkit.constraints import Constraint
    >>> from steerkit.gatt.dialogues import Plan, Sample
    >>> plan = Plan((Constraint("hobby", "chess"),), "Hobby: chess.", ("Who?", "Where?"))
    >>> replies = ("Ada. I love chess.", "Rome. I love chess.")
    >>> row = steerkit.make_rows([Sample(plan, replies, verified=(True, True))])[0]
    >>> [message["content"] for message in row["prompt"]]
    ['Hobby: chess. Who?', 'Ada. I love chess.', 'Where?']
    >>> row["completion"]
    [{'role': 'assistant', 'content': 'Rome. I love chess.'}]
    """
    kinds = [samples] if histories is None else histories
    lengths = [[len(sample.replies) for sample in kind] for kind in [samples, *kinds]]
    if any(length != lengths[0] for length in lengths):
        raise ValueError("histories: expected one sample a dialogue, with as many replies")
    # Kinds take turns in a random order, so that each gets its share of a few dialogues, too.
    order = random.Random(f"histories {seed}").sample(range(len(samples)), len(samples))
    replies = {i: kinds[n % len(kinds)][i].replies for n, i in enumerate(order)}
    rows = []
    for i, turn in choose_replies(samples, per_dialogue=per_dialogue, seed=seed):
        written = samples[i]._replace(replies=replies[i])
        prompt = [message._asdict() for message in history(written, turn)]
        completion = [Message("assistant", samples[i].replies[turn])._asdict()]
        rows.append({"prompt": prompt, "completion": completion})
    return rows


def neutral_plans(plans: Sequence[Plan]) -> list[Plan]:
    """The same questions without the instruction: sampled, they give histories that ignore it."""
    return [replace(plan, constraints=(), instruction="", probes=()) for plan in plans]


def competing_plans(plans: Sequence[Plan], *, seed: int = 0) -> list[Plan]:
    """The same questions under the instruction of another dialogue, of the same family if there is
    one: sampled, they give histories that obey something else."""
    rng, competing = random.Random(seed), []
    for plan in plans:
        others = [p for p in plans if p.constraints and not {*p.constraints} & {*plan.constraints}]
        if not others:
            raise ValueError(f"{plan.instruction!r}: no other dialogue has another instruction")
        families = {c.family for c in plan.constraints}
        rivals = [p for p in others if families & {c.family for c in p.constraints}]
        other = rng.choice(rivals or others)
        competing.append(replace(other, questions=plan.questions, probes=()))
    return competing


def choose_replies(
    samples: Sequence[Sample], *, per_dialogue: int = 6, seed: int = 0
) -> list[tuple[int, int]]:
    """Verified replies to teach, shuffled: (dialogue, turn), both from 0."""
    check_request(per_dialogue=per_dialogue)
    rng, chosen = random.Random(seed), []
    for i, sample in enumerate(samples):
        turns = [t for t in range(1, len(sample.replies)) if sample.verified[t]]
        probes = [t for t in turns if t in sample.plan.probes][:per_dialogue]
        others = [t for t in turns if t not in probes]
        more = rng.sample(others, min(per_dialogue - len(probes), len(others)))
        chosen += [(i, t) for t in probes + more]
    rng.shuffle(chosen)
    return chosen
