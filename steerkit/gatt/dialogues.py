"""Ghost Attention (Llama 2, arXiv 2307.09288, section 3.3 and appendix A.3.5): the training data.

An instruction stands in every user message while replies are sampled, and in the first one only
when the model is trained on them; then only the last reply carries loss. Trainers are in
`gatt_training`, measurements in `gatt_eval`. Axes: B dialogues, K candidates, T tokens.
"""

import json
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steerkit.chat import BatchedChat, Message, check_template, reply
from steerkit.constraints import (
    FAMILIES,
    REAL,
    Constraint,
    Question,
    check_together,
    compatible,
    instruct,
    parse_list,
    values,
)
from steerkit.files import write_text
from steerkit.progress import progress
from steerkit.tiny.gates import question_for

Model = PreTrainedModel
Tokenizer = PreTrainedTokenizerBase
Row = dict[str, list[dict[str, str]]]
Ask = Callable[[random.Random, Sequence[Constraint]], Question]
Reward = Callable[[str, str], float]


@dataclass(frozen=True)
class Plan:
    """A dialogue to be sampled: the instruction, and what the user says besides it.

    A reply must hold its question's `value` ("" asks for nothing). `probes` are the turns, from 0,
    whose message asks for an instruction; one that was given is judged by `Constraint.recalled`.
    """

    constraints: tuple[Constraint, ...]
    instruction: str
    questions: tuple[Question, ...]
    probes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.instruction.strip() and self.constraints:
            raise ValueError("the instruction is empty: say what the constraints ask for")
        if not self.questions:
            raise ValueError("a dialogue without a user message: give at least one question")
        check_together(self.constraints)

    def message(self, turn: int, *, every: bool) -> str:
        """What the user says at `turn` (from 0); the instruction leads it if `every`, or at 0."""
        told = self.instruction and (every or turn == 0)
        text = self.questions[turn].text
        return f"{self.instruction} {text}" if told else text

    def right(self, turn: int, reply: str) -> bool:
        """Does the reply hold the value that was asked for?"""
        return self.questions[turn].value.casefold() in reply.casefold()

    def good(self, turn: int, reply: str) -> bool:
        """Does the reply obey and hold the value; or, at a probe, does it name the instruction?"""
        if turn in self.probes and self.constraints:
            return any(c.recalled(reply) for c in self.constraints if self._asked(c, turn))
        return self.right(turn, reply) and all(c.obeyed(reply) for c in self.constraints)

    def _asked(self, constraint: Constraint, turn: int) -> bool:
        probe = constraint.probe
        return probe is not None and probe.question == self.questions[turn].text


class Sample(NamedTuple):
    """A sampled dialogue: the best reply of each turn, and whether it passed its verifier."""

    plan: Plan
    replies: tuple[str, ...]
    good: tuple[bool, ...]


# Plans


def split_values(family: str, table: str = "world") -> tuple[list[str], list[str]]:
    """Values that GAtt trains on, and the quarter that it never sees (none of a single value)."""
    every = values(family, table)
    held_out = every[3::4]
    return [v for v in every if v not in held_out], held_out


def draw(
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
        chosen = rng.sample(sorted(families), min(number, len(families)))
        pools = [split_values(f, table)[held_out] for f in chosen]
        if compatible(chosen, table) and all(pools):
            pairs = zip(chosen, pools, strict=True)
            return tuple(Constraint(f, rng.choice(pool), table) for f, pool in pairs)


def make_plan(
    rng: random.Random,
    constraints: Sequence[Constraint],
    *,
    turns: int = 20,
    probes: bool = False,
    ask: Ask = question_for,
) -> Plan:
    """A plan with questions by `ask`; with `probes` each instruction is asked for at a random turn.

    Once only: after that its answer stands in the history, and to copy it is easier than to
    remember. And rather late, where it is hardest: the chance of a turn grows with its number.
    Without constraints two that were never given are asked for; the reply must say so.
    """
    questions = [ask(rng, constraints) for _ in range(turns)]
    if constraints:
        asked = [Question(c.probe.question, "", "", "") for c in constraints if c.probe]
        told = instruct(rng, constraints)
    else:
        untold = [p for f in FAMILIES if (p := Constraint(f, "").probe)]
        asked = [Question(p.question, "", "", p.untold) for p in rng.sample(untold, 2)]
        told = ""
    if not probes:
        return Plan(tuple(constraints), told, tuple(questions))
    # Weighted, and none twice: Efraimidis and Spirakis, 2006.
    by_chance = sorted(range(1, turns), key=lambda t: rng.random() ** (1 / t), reverse=True)
    at = by_chance[: len(asked)]
    for turn, question in zip(at, asked, strict=False):
        questions[turn] = question
    return Plan(tuple(constraints), told, tuple(questions), tuple(sorted(at)))


def real_question(rng: random.Random, _: Sequence[Constraint]) -> Question:
    """An everyday question for a real chat model, without a value to look for."""
    return Question(rng.choice(REAL["questions"]), "", "", "")


def dialogue_plan(
    messages: Sequence[Message], constraints: Sequence[Constraint], instruction: str
) -> Plan:
    """A plan from a dialogue of your own: its user messages, in turn with the assistant's.

    Raises ValueError for two user messages in a row, and for a dialogue without one.
    """
    roles = [m.role for m in messages if m.role != "system"]
    for i, (a, b) in enumerate(pairwise(roles)):
        if a == b:
            raise ValueError(
                f"messages {i} and {i + 1} are both the {a}'s: user and assistant must alternate; "
                "join them or put a reply in between"
            )
    users = [Question(m.content, "", "", "") for m in messages if m.role == "user"]
    if not users:
        raise ValueError(f"no user message among {len(messages)}: GAtt needs at least one")
    return Plan(tuple(constraints), instruction, tuple(users))


def own_values(
    model: Model, tokenizer: Tokenizer, kind: str, *, n: int = 40, rounds: int = 4, seed: int = 0
) -> list[str]:
    """Up to `n` hobbies, public figures, ... that the model itself names, as the paper's authors
    had Llama 2 do, "to avoid a mismatch between the instruction and the model's knowledge"."""
    asked = [Message("user", f"List {n} {kind}, one a line, names only.")]
    found: dict[str, None] = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for text in BatchedChat(model, tokenizer).reply(
            [asked] * rounds, max_new_tokens=12 * n, temperature=0.8
        ):
            found |= dict.fromkeys(parse_list(text))
    return list(found)[:n]


# Sampling


def sample_dialogues(
    model: Model,
    tokenizer: Tokenizer,
    plans: Sequence[Plan],
    *,
    candidates: int = 2,
    out: Path | None = None,
    every: bool = True,
    temperature: float = 0.7,
    max_new_tokens: int = 48,
    batch: int = 32,
    reward: Reward | None = None,
    seed: int = 0,
) -> list[Sample]:
    """Replies to each plan's user messages, the best of `candidates` per turn ("a process analogous
    to rejection sampling"): first by `Plan.good`, then by `reward(message, reply)`.

    The instruction leads each user message (`every`). A batch holds `batch` dialogues with all
    their candidates, in one `generate`. With `out` each dialogue becomes a line of JSON as soon as
    its batch is done; a run that was killed and is started again reads them, loses at most one torn
    line and ends with the same file. Raises ValueError for `candidates` < 1, for a tokenizer
    without a fit chat template, and for a file of other parameters.
    """
    if candidates < 1:
        raise ValueError(f"candidates={candidates}: expected at least 1 reply to choose from")
    check_template(tokenizer)
    how = _Sampling(candidates, every, temperature, max_new_tokens, batch, seed)
    settings = how._asdict() | {"plans": _digest(plans)}
    done = read_samples(out, settings) if out is not None else []
    if len(done) == len(plans):
        return done
    first = len(done) // batch * batch  # a batch that a kill has cut is made again
    with progress(sum(len(p.questions) for p in plans[first:]), unit="replies") as update:
        for start in range(first, len(plans), batch):
            talk = BatchedChat(model, tokenizer)
            with torch.random.fork_rng():
                torch.manual_seed(seed * 1_000_003 + start)
                chosen = _sample_batch(talk, plans[start : start + batch], how, reward, update)
            fresh = chosen[max(0, len(done) - start) :]
            if out is not None:
                _append(out, fresh)
            done += fresh
    return done


class _Sampling(NamedTuple):
    candidates: int
    every: bool
    temperature: float
    max_new_tokens: int
    batch: int
    seed: int


def _sample_batch(
    talk: BatchedChat,
    plans: Sequence[Plan],
    how: _Sampling,
    reward: Reward | None,
    update: Callable[[int], None],
) -> list[Sample]:
    K = how.candidates
    messages: list[list[Message]] = [[] for _ in plans]
    good: list[list[bool]] = [[] for _ in plans]
    for turn in range(max(len(plan.questions) for plan in plans)):
        live = [i for i, plan in enumerate(plans) if turn < len(plan.questions)]
        for i in live:
            messages[i].append(Message("user", plans[i].message(turn, every=how.every)))
        asked = [messages[i] for i in live for _ in range(K)]  # K rows a dialogue
        texts = talk.reply(asked, max_new_tokens=how.max_new_tokens, temperature=how.temperature)
        kept = []
        for row, i in enumerate(live):
            group, said = texts[row * K : (row + 1) * K], plans[i].questions[turn].text
            scores = [(plans[i].good(turn, x), reward(said, x) if reward else 0.0) for x in group]
            best = scores.index(max(scores))  # the first of equals
            good[i].append(scores[best][0])
            messages[i].append(Message("assistant", group[best]))
            if turn + 1 < len(plans[i].questions):
                kept += [row * K + best] * K
        update(len(live))
        if kept:
            talk.select(kept)
    replies = [tuple(m.content for m in rows[1::2]) for rows in messages]
    rows = zip(plans, replies, good, strict=True)
    return [Sample(plan, said, tuple(ok)) for plan, said, ok in rows]


def _digest(plans: Sequence[Plan]) -> int:
    return zlib.crc32(json.dumps([asdict(plan) for plan in plans]).encode())


def _append(out: Path, samples: Sequence[Sample]) -> None:
    with out.open("a", encoding="utf-8") as file:
        for s in samples:
            line = {"plan": asdict(s.plan), "replies": s.replies, "good": s.good}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()


def read_samples(path: Path, settings: dict[str, Any] | None = None) -> list[Sample]:
    """The dialogues of a samples file; a last line that a kill has torn is cut off.

    With `settings` the file is made ready for appending: begun if it is not there, and refused by
    ValueError if it was sampled with others.
    """
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        write_text(path, "".join(lines))
    if settings is not None:
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(settings) + "\n")
            return []
        if json.loads(lines[0]) != settings:
            raise ValueError(
                f"{path}: sampled with {lines[0].strip()}, now asked for {json.dumps(settings)}; "
                "remove the file or choose another"
            )
    return [_read(json.loads(line)) for line in lines[1:]]


def _read(line: dict[str, Any]) -> Sample:
    plan = line["plan"]
    plan["constraints"] = tuple(Constraint(*c) for c in plan["constraints"])
    plan |= {"questions": tuple(Question(*q) for q in plan["questions"])}
    plan["probes"] = tuple(plan["probes"])
    return Sample(Plan(**plan), tuple(line["replies"]), tuple(line["good"]))


# Rows for training


def history(sample: Sample, turn: int, *, every: bool = False) -> list[Message]:
    """Messages up to the user's at `turn` (from 0): the instruction in the first one only."""
    messages = []
    for t in range(turn):
        messages.append(Message("user", sample.plan.message(t, every=every)))
        messages.append(Message("assistant", sample.replies[t]))
    return [*messages, Message("user", sample.plan.message(turn, every=every))]


def make_rows(
    samples: Sequence[Sample], *, per_dialogue: int = 6, first: int = 1, seed: int = 0
) -> list[Row]:
    """GAtt's training rows: {"prompt": history, "completion": the reply at one turn}.

    Each dialogue gives `per_dialogue` rows, cut at its probes and at random turns from `first` on
    (0 is the first turn). TRL puts no loss on a prompt: all earlier turns, assistant messages
    included, are silent. Only replies that passed their verifier are taught.
    """
    return [
        {
            "prompt": _dicts(history(s, t)),
            "completion": _dicts([Message("assistant", s.replies[t])]),
        }
        for s, t in _taught(samples, per_dialogue, first, seed)
    ]


def make_all_turns_rows(rows: Sequence[Row]) -> list[Row]:
    """The same dialogues as whole messages: TRL then puts the loss on every assistant turn.

    This is the ablation that the paper argues against and does not measure.
    """
    return [{"messages": row["prompt"] + row["completion"]} for row in rows]


def make_pairs(
    model: Model,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    *,
    per_dialogue: int = 6,
    first: int = 1,
    seed: int = 0,
    max_new_tokens: int = 48,
) -> list[Row]:
    """DPO's rows {"prompt", "chosen", "rejected"}, prompts as GAtt's.

    Chosen is the reply that was sampled with the instruction repeated, and verified. Rejected is
    what the model says when it reads the instruction in the first message only, if that fails.
    Without an instruction nothing fails: there the rejected reply follows one of another dialogue,
    slipped into the last message, or DPO would only ever learn to obey.
    """
    rng, taught = random.Random(seed), _taught(samples, per_dialogue, first, seed)
    told = [s.plan.instruction for s in samples if s.plan.instruction]
    prompts = [history(s, t) for s, t in taught]
    tempting = [
        m
        if s.plan.instruction or not told
        else [*m[:-1], Message("user", f"{rng.choice(told)} {m[-1].content}")]
        for (s, _), m in zip(taught, prompts, strict=True)
    ]
    lapses = reply(model, tokenizer, tempting, max_new_tokens=max_new_tokens, batch=32)
    return [
        {
            "prompt": _dicts(messages),
            "chosen": _dicts([Message("assistant", s.replies[t])]),
            "rejected": _dicts([Message("assistant", lapse)]),
        }
        for (s, t), messages, lapse in zip(taught, prompts, lapses, strict=True)
        if lapse != s.replies[t] and not (s.plan.constraints and s.plan.good(t, lapse))
    ]


def _taught(
    samples: Sequence[Sample], per_dialogue: int, first: int, seed: int
) -> list[tuple[Sample, int]]:
    """Verified replies to teach, shuffled: (dialogue, turn)."""
    rng, chosen = random.Random(seed), []
    for s in samples:
        good = [t for t in range(first, len(s.replies)) if s.good[t]]
        asked = [t for t in good if t in s.plan.probes][:per_dialogue]
        rest = [t for t in good if t not in asked]
        more = rng.sample(rest, min(per_dialogue - len(asked), len(rest)))
        chosen += [(s, t) for t in asked + more]
    rng.shuffle(chosen)
    return chosen


def _dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [m._asdict() for m in messages]
