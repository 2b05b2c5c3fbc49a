"""Spans of tokens: a phrase, or a turn of a dialogue.

A span is a pair [start, end) of token positions in its prompt. A dialogue is rendered by the
tokenizer's chat template, open for the next reply. The span of a phrase is checked: its tokens,
decoded, read as it does.
"""

import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from steerkit.chat import Dialogue, Prompt, as_messages, prompt_text
from steerkit.models import Tokenizer

Span = tuple[int, int]
Spans = Tensor | Sequence[Sequence[Span]]
"""A bool mask (B,T), True = in a span, or for each prompt of the batch its list of spans.
Positions count a batch's left padding."""

# --- phrases -----------------------------------------------------------------------------------


def find_span(
    tokenizer: Tokenizer, prompt: Prompt, phrase: str, *, occurrence: int | None = None
) -> Span:
    """Tokens [start, end) of `phrase`, which must stand in the prompt once.

    Otherwise `occurrence` says which one, from 0; -1 is the last.

    >>> from steerkit import find_span, load
    >>> _, tokenizer = load("tiny")
    >>> prompt = "Where does Anna Adler live? Hobby: chess."
    >>> start, end = find_span(tokenizer, prompt, "Hobby: chess.")
    >>> tokenizer.decode(tokenizer(prompt)["input_ids"][start:end]).strip()
    'Hobby: chess.'
    """
    spans = find_spans(tokenizer, prompt, phrase)
    if occurrence is None and len(spans) == 1:
        return spans[0]
    if occurrence is None or not -len(spans) <= occurrence < len(spans):
        raise ValueError(
            f"occurrence={occurrence}: {phrase!r} stands in the prompt {len(spans)} times: choose "
            f"one by occurrence=0 to {len(spans) - 1}, or take all with find_spans"
        )
    return spans[occurrence]


def find_spans(tokenizer: Tokenizer, prompt: Prompt, phrase: str) -> list[Span]:
    """Tokens [start, end) of every occurrence of `phrase`, at least one.

    What only looks like it inside other tokens ("cat" in "category") is not an occurrence.
    """
    phrase = phrase.strip()
    if not phrase:
        raise ValueError("the phrase is empty: give the words to look for")
    text, ids, offsets = _tokenize(tokenizer, prompt)
    readings = {}  # span -> its tokens, decoded
    for match in re.finditer(re.escape(phrase), text):
        # Every token that holds any of these characters, pieces of one character included.
        inside = [t for t, (a, b) in enumerate(offsets) if a < match.end() and b > match.start()]
        start, end = min(inside, default=0), max(inside, default=-1) + 1
        readings[start, end] = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
    if not readings:
        raise ValueError(f"{phrase!r} is not in the prompt {text[:80]!r}")
    spans = [span for span, reading in readings.items() if reading.split() == phrase.split()]
    if not spans:
        reading = next(iter(readings.values()))
        raise ValueError(
            f"{phrase!r} does not end where tokens end: its tokens read {reading!r}; take those "
            "words"
        )
    return spans


def _tokenize(
    tokenizer: Tokenizer, prompt: Prompt, *, opened: bool = True
) -> tuple[str, list[int], list[tuple[int, int]]]:
    """A prompt's text, its token ids, and the characters [start, end) that each stands for."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for: load a "
            "fast tokenizer (tokenizer.json)"
        )
    text, plain = prompt_text(tokenizer, prompt, opened=opened), isinstance(prompt, str)
    encoded = tokenizer(text, add_special_tokens=plain, return_offsets_mapping=True)
    return text, encoded["input_ids"], encoded["offset_mapping"]


def span_mask(spans: Spans) -> tuple[Tensor, bool]:
    """Bool (B,T), True = in a span, and whether T is the prompt's length or only the last end."""
    if isinstance(spans, Tensor):
        if spans.dtype != torch.bool or spans.ndim != 2:
            raise ValueError(
                f"spans of {spans.dtype} and shape {tuple(spans.shape)}: expected a bool mask "
                "(B, T), True = emphasised"
            )
        if empty := (~spans.any(dim=1)).nonzero().flatten().tolist():
            raise ValueError(f"rows {empty} of the mask are empty: mark at least one token each")
        return spans.detach().cpu().clone(), True
    if not len(spans):
        raise ValueError("no spans: expected for each row a list of (start, end), as [[(5, 12)]]")
    for number, row in enumerate(spans):
        try:
            right = len(row) > 0 and all(start >= 0 and range(start, end) for start, end in row)
        except (TypeError, ValueError):  # no pairs
            right = False
        if not right:
            raise ValueError(
                f"row {number} of the spans is {row!r}: expected a list of at least one "
                "(start, end) with 0 <= start < end, as in [[(5, 12)]] for one prompt"
            )
    inside = torch.zeros(len(spans), max(end for row in spans for _, end in row), dtype=torch.bool)
    for mask, row in zip(inside, spans, strict=True):
        for start, end in row:
            mask[start:end] = True
    return inside, False


# --- turns -------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """The tokens [start, end) of one message, its role's marks included.

    Turn n is the n-th user message and the reply to it; what comes before is turn 0.
    """

    number: int
    role: str
    start: int
    end: int


def find_turns(tokenizer: Tokenizer, dialogue: Dialogue) -> tuple[Tensor, list[Turn]]:
    """Token ids (1,T) of a dialogue, not opened for a reply, and the tokens of each message.

    A message ends where the template's text would end if no message followed. Raises ValueError
    for a template that rewrites a message when others follow.
    """
    messages = as_messages(dialogue)
    whole, ids, offsets = _tokenize(tokenizer, messages, opened=False)
    ends = [0]
    for n in range(len(messages)):
        text = prompt_text(tokenizer, messages[: n + 1], opened=False)
        if not whole.startswith(text):
            raise ValueError(
                f"the chat template rewrites message {n} when others follow, so messages have no "
                "place of their own; use a template that only appends"
            )
        ends.append(sum(start < len(text) for start, _ in offsets))
    numbers = accumulate(int(message.role == "user") for message in messages)
    places = zip(numbers, messages, ends, ends[1:], strict=False)
    return torch.tensor([ids]), [Turn(n, m.role, start, end) for n, m, start, end in places]


def reduce_by_turn(
    values: Tensor, turns: Sequence[Turn], *, reduce: Callable[..., Tensor] = torch.mean
) -> Tensor:
    """Values (...,T) reduced over the tokens of each assistant message, in order -> (...,N).

    Called as `reduce(values, dim=-1)`, like `torch.amax` or `partial(torch.quantile, q=0.99)`.
    """
    if values.shape[-1] != turns[-1].end:
        raise ValueError(
            f"values of {values.shape[-1]} tokens, turns of {turns[-1].end}: they belong to "
            "different texts"
        )
    reduced = [reduce(values[..., t.start : t.end], dim=-1) for t in turns if t.role == "assistant"]
    return torch.stack(reduced, dim=-1)
