"""Spans of tokens: a phrase, or a turn of a dialogue.

A span is a pair [start, end) of token positions in its prompt. A dialogue is rendered by the
tokenizer's chat template, open for the next reply. The span of a phrase is checked: its tokens,
decoded, read as it does. `encode` pads a batch on the left and moves its spans.
"""

import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import BatchEncoding
from transformers import PreTrainedTokenizerBase as Tokenizer

from steerkit.chat import (
    Dialogue,
    Message,
    Prompt,
    as_messages,
    pad_left,
    prompt_ids,
    template_pieces,
    template_text,
)

Span = tuple[int, int]
Spans = Tensor | Sequence[Sequence[Span]]
"""A bool mask (B,T), True = in a span, or for each prompt of the batch its list of spans.
Positions count a batch's left padding."""

# --- phrases and messages ----------------------------------------------------------------------


def find_span(
    tokenizer: Tokenizer,
    prompt: Prompt,
    phrase: str,
    *,
    occurrence: int | None = None,
    message: int | None = None,
) -> Span:
    """Tokens [start, end) of `phrase`, which must stand in the prompt once.

    Otherwise `occurrence` says which one, from 0; -1 is the last. `message` looks in one message
    only (from 0, negative from the end).

    >>> from steerkit import find_span, load
    >>> _, tokenizer = load("tiny")
    >>> prompt = "Where does Anna Adler live? Hobby: chess."
    >>> start, end = find_span(tokenizer, prompt, "Hobby: chess.")
    >>> tokenizer.decode(tokenizer(prompt)["input_ids"][start:end]).strip()
    'Hobby: chess.'
    """
    spans = find_spans(tokenizer, prompt, phrase, message=message)
    if occurrence is None and len(spans) > 1:
        raise ValueError(
            f"{phrase!r} stands in the prompt {len(spans)} times: choose one by occurrence=0 to "
            f"{len(spans) - 1}, or take all with find_spans"
        )
    occurrence = occurrence or 0
    if not -len(spans) <= occurrence < len(spans):
        raise ValueError(
            f"occurrence={occurrence}: {phrase!r} stands in the prompt {len(spans)} times"
        )
    return spans[occurrence]


def find_spans(
    tokenizer: Tokenizer,
    prompt: Prompt,
    phrase: str,
    *,
    message: int | None = None,
) -> list[Span]:
    """Tokens [start, end) of every occurrence of `phrase`, at least one.

    What only looks like it inside other tokens ("cat" in "category") is not an occurrence.
    """
    phrase = phrase.strip()
    if not phrase:
        raise ValueError("the phrase is empty: give the words to look for")
    if message is None:
        text = _tokenized(tokenizer, prompt)
        first, last = 0, len(text.text)
    else:
        text, (first, last) = _message(tokenizer, prompt, message)
    matches = re.finditer(re.escape(phrase), text.text[first:last])
    covering = [text.covering(first + m.start(), first + m.end()) for m in matches]
    spans = [span for span in covering if _same_words(text.decode(*span), phrase)]
    if not covering:
        raise ValueError(f"{phrase!r} is not in the prompt {_short(text.text[first:last])!r}")
    if not spans:
        reads = text.decode(*covering[0])
        raise ValueError(
            f"{phrase!r} does not end where tokens end: its tokens read {reads!r}; take those words"
        )
    return spans


# --- batches -----------------------------------------------------------------------------------


def encode(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], spans: Sequence[Sequence[Span]]
) -> tuple[BatchEncoding, list[list[Span]]]:
    """The prompts as one batch (B,T), padded on the left, and their spans where they now stand."""
    if len(prompts) != len(spans):
        raise ValueError(f"{len(prompts)} prompts, spans for {len(spans)}: one list for each")
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    batch = pad_left(tokenizer, ids, range(len(ids)))
    return batch.inputs, batch.move(spans)


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
        _check_spans(row, number)
    inside = torch.zeros(len(spans), max(end for row in spans for _, end in row), dtype=torch.bool)
    for mask, row in zip(inside, spans, strict=True):
        for start, end in row:
            mask[start:end] = True
    return inside, False


def _check_spans(row: object, number: int) -> None:
    pairs = isinstance(row, Sequence) and all(isinstance(x, Sequence) and len(x) == 2 for x in row)
    if not pairs or not row:
        raise ValueError(
            f"row {number} of the spans is {row!r}: expected a list of at least one (start, end), "
            "as in [[(5, 12)]] for one prompt"
        )
    for start, end in row:
        if not 0 <= start < end:
            raise ValueError(
                f"row {number}: span [{start}, {end}) is empty, reversed or negative: expected "
                "0 <= start < end"
            )


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

    A message ends where the template's text ends if the dialogue ends with it. Raises ValueError
    for a template that writes another end when more messages follow.
    """
    messages = as_messages(dialogue)
    text, contents = _contents(tokenizer, messages, opened=False)
    ends = [0]
    for n, (_, content_end) in enumerate(contents):
        closing = template_pieces(tokenizer, messages[: n + 1], opened=False)[-1]
        if not text.text.startswith(closing, content_end):
            raise ValueError(
                f"the chat template rewrites the end of message {n} when others follow, so "
                "messages have no place of their own; use a template that only appends"
            )
        ends.append(text.tokens_before(content_end + len(closing)))
    numbers = accumulate(int(message.role == "user") for message in messages)
    places = zip(numbers, messages, ends, ends[1:], strict=False)
    return torch.tensor([text.ids]), [Turn(n, m.role, start, end) for n, m, start, end in places]


def reduce_by_turn(
    values: Tensor,
    turns: Sequence[Turn],
    *,
    role: str = "assistant",
    reduce: Callable[..., Tensor] = torch.mean,
) -> Tensor:
    """Values (...,T) reduced over the tokens of each message of `role`, in order -> (...,N).

    Called as `reduce(values, dim=-1)`, like `torch.amax` or `partial(torch.quantile, q=0.99)`.
    """
    if values.shape[-1] != turns[-1].end:
        raise ValueError(
            f"values of {values.shape[-1]} tokens, turns of {turns[-1].end}: they belong to "
            "different texts"
        )
    reduced = [reduce(values[..., t.start : t.end], dim=-1) for t in turns if t.role == role]
    if not reduced:
        raise ValueError(
            f"no message of role {role!r}: there are {sorted({t.role for t in turns})}"
        )
    return torch.stack(reduced, dim=-1)


# --- characters and tokens ---------------------------------------------------------------------


class _Text(NamedTuple):
    """A prompt's text, its token ids, and the characters [start, end) that each stands for."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    tokenizer: Tokenizer

    def covering(self, start: int, end: int) -> Span:
        """The tokens that hold any of these characters; pieces of one character included."""
        inside = [t for t, (a, b) in enumerate(self.offsets) if a < end and b > start]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)

    def tokens_before(self, character: int) -> int:
        """How many tokens begin before this character."""
        return sum(start < character for start, _ in self.offsets)

    def decode(self, start: int, end: int) -> str:
        return self.tokenizer.decode(self.ids[start:end], clean_up_tokenization_spaces=False)


def _tokenized(tokenizer: Tokenizer, prompt: Prompt, *, opened: bool = True) -> _Text:
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for: load a "
            "fast tokenizer (tokenizer.json)"
        )
    plain = isinstance(prompt, str)
    text = prompt if plain else template_text(tokenizer, prompt, opened=opened)
    encoded = tokenizer(text, add_special_tokens=plain, return_offsets_mapping=True)
    return _Text(text, encoded["input_ids"], encoded["offset_mapping"], tokenizer)


def _contents(
    tokenizer: Tokenizer, messages: Sequence[Message], *, opened: bool = True
) -> tuple[_Text, list[tuple[int, int]]]:
    """The dialogue's text, and the characters [start, end) of each message's content.

    Templates may trim a content; where one shows anything else, this raises ValueError.
    """
    text = _tokenized(tokenizer, messages, opened=opened)
    pieces = template_pieces(tokenizer, messages, opened=opened)
    places, end = [], 0
    for n, (before, message, after) in enumerate(zip(pieces, messages, pieces[1:], strict=False)):
        start, content = end + len(before), message.content
        trimmed = (content, content.strip(), content.lstrip(), content.rstrip())
        shown = [x for x in trimmed if text.text.startswith(before + x + after, end)]
        if not shown:
            raise ValueError(
                f"message {n}: the chat template does not show {_short(content)!r} as it is; look "
                "for a phrase instead"
            )
        end = start + len(shown[0])
        places.append((start, end))
    return text, places


def _message(tokenizer: Tokenizer, dialogue: Prompt, index: int) -> tuple[_Text, tuple[int, int]]:
    """The dialogue's text, and the characters of the content of message `index`."""
    number = 0 if isinstance(dialogue, str) else len(dialogue)
    if not -number <= index < number:
        raise ValueError(f"message {index}: expected a list of messages, and one of {number}")
    text, contents = _contents(tokenizer, as_messages(dialogue))
    return text, contents[index]


def _same_words(a: str, b: str) -> bool:
    return a.split() == b.split()


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
