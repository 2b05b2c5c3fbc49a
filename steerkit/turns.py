"""Where the messages of a dialogue stand among its tokens, read off the chat template."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from steerkit.chat import Message

Reduce = Callable[..., Tensor]
"""Called as reduce(values, dim=-1), as in `torch.amax`, or `partial(torch.quantile, q=0.99)`."""


class Turn(NamedTuple):
    """The tokens [start, end) of one message, its role's marks included.

    Turn n is the n-th user message and the reply to it; what comes before is turn 0.
    """

    number: int
    role: str
    start: int
    end: int


def turns(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[Tensor, list[Turn]]:
    """Token ids (1,T) of a dialogue and where its messages stand, from the chat template.

    Each message reaches from where the template's text grows by it. Raises ValueError for a
    template that rewrites earlier text, where no message has a place of its own.
    """
    if not messages:
        raise ValueError("no messages: give at least one")
    rows = [message._asdict() for message in messages]
    texts = [tokenizer.apply_chat_template(rows[: n + 1], tokenize=False) for n in range(len(rows))]
    if rewritten := [n for n, text in enumerate(texts) if not texts[-1].startswith(text)]:
        raise ValueError(
            f"the chat template rewrites message {rewritten[0]} when others follow, so messages "
            "have no place of their own; use a template that only appends"
        )
    encoded = tokenizer(texts[-1], add_special_tokens=False, return_offsets_mapping=True)
    starts = torch.tensor([start for start, _ in encoded["offset_mapping"]])
    ends = [int((starts < len(text)).sum()) for text in texts]
    numbers = accumulate(int(message.role == "user") for message in messages)
    places = zip(numbers, messages, [0, *ends], ends, strict=False)
    return (
        torch.tensor([encoded["input_ids"]]),
        [Turn(number, message.role, start, end) for number, message, start, end in places],
    )


def turn_of(turns: Sequence[Turn]) -> Tensor:
    """Number of the turn that each token belongs to: (T,)."""
    return torch.cat([torch.full((turn.end - turn.start,), turn.number) for turn in turns])


def by_turn(
    values: Tensor, turns: Sequence[Turn], *, role: str = "assistant", reduce: Reduce = torch.mean
) -> Tensor:
    """`reduce` values (...,T) over the tokens of each message of `role`, in order -> (...,N)."""
    if values.shape[-1] != turns[-1].end:
        raise ValueError(
            f"values of {values.shape[-1]} tokens, turns of {turns[-1].end}: they belong to "
            "different texts"
        )
    rows = [reduce(values[..., t.start : t.end], dim=-1) for t in turns if t.role == role]
    if not rows:
        raise ValueError(
            f"no message of role {role!r}: there are {sorted({t.role for t in turns})}"
        )
    return torch.stack(rows, dim=-1)
