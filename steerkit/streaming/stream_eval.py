"""StreamEval (2309.17453, Table 7): read values back from a stream that evicts.

The paper's data was never released. Here a stream of text lines, each stating a fact; every few
lines a question asks for a fact some lines back. The answer can be read while its line is in the
cache, and is gone once the line is evicted: the method promises no more.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from steerkit.models import Model, Tokenizer
from steerkit.streaming.losses import token_losses


class Fact(NamedTuple):
    """Texts: a line that states a value, a question that `answer` continues, what follows."""

    line: str
    question: str
    answer: str
    end: str


class Query(NamedTuple):
    """A question in a stream: its answer is ids[start:stop].

    back: lines between question and fact. distance: tokens from the end of the fact's line to the
    first token of the answer.
    """

    start: int
    stop: int
    back: int
    distance: int


class EvalStream(NamedTuple):
    """ids (1,T) of the whole stream, true answers included, and its questions in order."""

    ids: Tensor
    queries: list[Query]


def eval_stream(
    tokenizer: Tokenizer,
    *,
    fact: Callable[[int, random.Random], Fact],
    lines: int,
    every: int = 10,
    back: Sequence[int] = (20,),
    seed: int = 0,
) -> EvalStream:
    """A stream of `lines` facts; after each `every`, a question about a fact some lines ago.

    How many lines is drawn from `back`; no fact is asked twice. `fact(number, rng)` writes the
    texts, so that any model can be asked in its own language. The tokenizer's first token opens the
    stream. Texts are tokenised piece by piece.
    """
    rng, ids, queries = random.Random(seed), [], []
    unasked: dict[int, tuple[Fact, int]] = {}  # with the stream's length at the end of the line

    def write(text: str) -> int:
        ids.extend(tokenizer(text, add_special_tokens=False).input_ids)
        return len(ids)

    write(tokenizer.bos_token or "")
    for number in range(lines):
        new = fact(number, rng)
        unasked[number] = new, write(new.line)
        possible = [n for n in back if number - n in unasked]
        if (number + 1) % every == 0 and possible:
            chosen = rng.choice(possible)
            about, read = unasked.pop(number - chosen)
            start, stop = write(about.question), write(about.answer)
            queries.append(Query(start, stop, chosen, distance=start - read))
            write(about.end)
    return EvalStream(torch.tensor([ids]), queries)


def eval_hits(
    model: Model, stream: EvalStream, *, sinks: int = 4, window: int | None = None
) -> Tensor:
    """Whether greedy decoding answers each question exactly: (queries,) boolean.

    One pass, as `token_losses` takes it; after each question it goes on with the true answer.
    """
    hits = token_losses(model, stream.ids, sinks=sinks, window=window, score=is_greedy)[0].bool()
    # hits[t] is about token t + 1
    return torch.stack([hits[q.start - 1 : q.stop - 1].all() for q in stream.queries])


def is_greedy(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether greedy decoding would choose the target: (B,n,V), (B,n) -> (B,n) boolean."""
    return logits.argmax(-1) == targets
