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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steerkit.streaming.losses import token_losses


class Fact(NamedTuple):
    """Texts: a line that states a value, a question that `answer` continues, what follows."""

    line: str
    question: str
    answer: str
    end: str


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
    fact: Callable[[int, random.Random], Fact],
    lines: int,
    every: int = 10,
    back: int | Sequence[int] = 20,
    seed: int = 0,
) -> EvalStream:
    """A stream of `lines` facts; after each `every`, a question about the one `back` lines ago.

    Several values of `back` are drawn at random; no fact is asked twice. `fact(number, rng)`
    writes the texts, so that any model can be asked in its own language. The tokenizer's first
    token opens the stream. Texts are tokenised piece by piece.
    """
    distances = [back] if isinstance(back, int) else list(back)
    if lines < 1 or every < 1 or not distances or min(distances) < 1:
        raise ValueError(f"lines={lines}, every={every}, back={back}: expected numbers from 1 up")
    rng, ids, queries = random.Random(seed), [], []
    unasked: dict[int, tuple[Fact, int]] = {}  # with the stream's length at the end of the line

    def write(text: str) -> int:
        ids.extend(tokenizer(text, add_special_tokens=False).input_ids)
        return len(ids)

    write(tokenizer.bos_token or "")
    for number in range(lines):
        new = fact(number, rng)
        unasked[number] = new, write(new.line)
        possible = [distance for distance in distances if number - distance in unasked]
        if (number + 1) % every == 0 and possible:
            distance = rng.choice(possible)
            about, read = unasked.pop(number - distance)
            answer = write(about.question), write(about.answer)
            queries.append(Query(*answer, read, distance))
            write(about.end)
    return EvalStream(torch.tensor([ids]), queries)


def eval_hits(
    model: PreTrainedModel, stream: EvalStream, *, sinks: int = 4, window: int | None = None
) -> Tensor:
    """Whether greedy decoding answers each question exactly: (queries,) boolean.

    One pass, as `token_losses` takes it; after each question it goes on with the true answer.
    """
    if not stream.queries:
        raise ValueError("no question in this stream: take more lines than the largest `back`")
    hits = token_losses(model, stream.ids, sinks=sinks, window=window, score=is_greedy)[0].bool()
    # hits[t] is about token t + 1
    return torch.stack([hits[q.start - 1 : q.stop - 1].all() for q in stream.queries])


def is_greedy(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether greedy decoding would choose the target: (B,n,V), (B,n) -> (B,n) boolean."""
    return logits.argmax(-1) == targets


class Accuracy(NamedTuple):
    """Exact answers among `count` questions `back` lines (`tokens` tokens) from their fact."""

    back: int
    tokens: float
    accuracy: float
    count: int


def accuracy_by_distance(stream: EvalStream, hits: Tensor) -> list[Accuracy]:
    """Table 7's rows: accuracy for each distance in lines, nearest first."""
    distance = torch.tensor([query.distance for query in stream.queries]).double()
    back = torch.tensor([query.back for query in stream.queries])
    rows = []
    for lines in back.unique().tolist():
        asked = back == lines
        accuracy = hits[asked].double().mean().item()
        rows.append(Accuracy(lines, distance[asked].mean().item(), accuracy, int(asked.sum())))
    return rows
