"""StreamEval (2309.17453, section 4.5, Table 7): read values back from a stream that evicts.

The paper's data was never released. Here a stream of text lines, each stating a fact; every few
lines a question asks for a fact some lines back. The answer is there to be read while its line is
in the cache, and gone once it is evicted: that is what the method promises, and all it promises.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steerkit.streaming.losses import token_hits


class Fact(NamedTuple):
    """Texts: a line that states a value, a question that `answer` continues, what follows."""

    line: str
    question: str
    answer: str
    end: str


def register_fact(number: int, rng: random.Random) -> Fact:
    """The default line: a register's content, five digits, in the paper's manner."""
    value = f"{rng.randrange(10**5):05d}"
    return Fact(
        line=f"line {number}: the content of register {number} is <{value}>.\n",
        question=f"Tell me the content of register {number}: <",
        answer=value,
        end=">\n",
    )


class Query(NamedTuple):
    """A question in a stream: its answer is ids[start:stop]; the fact's line ended at `read`.

    `back` counts lines between question and fact.
    """

    start: int
    stop: int
    read: int
    back: int

    @property
    def distance(self) -> int:
        """Tokens from the end of the fact's line to the first token of the answer."""
        return self.start - self.read


class EvalStream(NamedTuple):
    """ids (1,T) of the whole stream, true answers included, and its questions in order."""

    ids: Tensor
    queries: list[Query]


def eval_stream(
    tokenizer: PreTrainedTokenizerBase,
    *,
    lines: int,
    every: int = 10,
    back: int | Sequence[int] = 20,
    fact: Callable[[int, random.Random], Fact] = register_fact,
    start: str | None = None,
    seed: int = 0,
) -> EvalStream:
    """A stream of `lines` facts; after each `every`, a question about the one `back` lines ago.

    Several values of `back` are drawn at random; no fact is asked twice. `fact(number, rng)`
    writes the texts, so that any model can be asked in its own language. `start` opens the stream
    (default: the tokenizer's first token). Texts are tokenised piece by piece.
    """
    choices = [back] if isinstance(back, int) else list(back)
    if lines < 1 or every < 1 or not choices or min(choices) < 1:
        raise ValueError(f"lines={lines}, every={every}, back={back}: expected numbers from 1 up")
    rng, ids, queries = random.Random(seed), [], []
    facts: list[tuple[Fact, int]] = []  # with the stream's length at the end of the line
    asked: set[int] = set()

    def write(text: str) -> None:
        ids.extend(tokenizer(text, add_special_tokens=False).input_ids)

    write(tokenizer.bos_token or "" if start is None else start)
    for number in range(lines):
        new = fact(number, rng)
        write(new.line)
        facts.append((new, len(ids)))
        open_choices = [b for b in choices if number >= b and number - b not in asked]
        if (number + 1) % every == 0 and open_choices:
            steps = rng.choice(open_choices)
            asked.add(number - steps)
            about, read = facts[number - steps]
            write(about.question)
            first = len(ids)
            write(about.answer)
            queries.append(Query(first, len(ids), read, steps))
            write(about.end)
    return EvalStream(torch.tensor([ids]), queries)


def eval_hits(
    model: PreTrainedModel,
    stream: EvalStream,
    *,
    sinks: int = 4,
    window: int | None = None,
    block: int = 256,
) -> Tensor:
    """Whether greedy decoding answers each question exactly: (queries,) boolean.

    One pass, as `token_losses` takes it; after each question it goes on with the true answer.
    """
    if not stream.queries:
        raise ValueError("no question in this stream: take more lines than the largest `back`")
    hits = token_hits(model, stream.ids, sinks=sinks, window=window, block=block)[0]
    # hits[t] is about token t + 1
    return torch.stack([hits[q.start - 1 : q.stop - 1].all() for q in stream.queries])


class Accuracy(NamedTuple):
    """Exact answers among `count` questions `back` lines (`tokens` tokens) from their fact."""

    back: int
    tokens: float
    accuracy: float
    count: int


def accuracy_by_distance(stream: EvalStream, hits: Tensor) -> list[Accuracy]:
    """Table 7's rows: accuracy for each distance in lines, nearest first."""
    return list(_rows(stream.queries, hits.tolist()))


def _rows(queries: Sequence[Query], hits: Sequence[bool]) -> Iterator[Accuracy]:
    for back in sorted({q.back for q in queries}):
        mine = [(q, hit) for q, hit in zip(queries, hits, strict=True) if q.back == back]
        n = len(mine)
        tokens = sum(q.distance for q, _ in mine) / n
        yield Accuracy(back, tokens, sum(hit for _, hit in mine) / n, n)
