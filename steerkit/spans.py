"""Spans from text: which tokens of a prompt are a phrase, a message, or marked.

A prompt is a text or a list of messages, which the tokenizer's chat template renders, open for the
next reply. Spans are [start, end) token positions in the prompt by itself; `encode` pads a batch on
the left and moves them. Every span is checked by decoding its tokens back.
"""

import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from steerkit.chat import Message

Prompt = str | Sequence[Message]
Span = tuple[int, int] | tuple[int, int, float]
"""Tokens [start, end) of the prompt, left padding counted; a third number is the span's alpha."""
Spans = Tensor | Sequence[Sequence[Span]]
"""A bool mask (B,T), True = emphasised, or for each row of the batch its list of spans."""
Reduce = Callable[..., Tensor]
"""Called as reduce(values, dim=-1), as in `torch.amax`, or `partial(torch.quantile, q=0.99)`."""
_MARKS = re.compile(r"\*\*(.+?)\*\*|<em>(.+?)</em>", re.DOTALL)
_LOOSE = re.compile(r"\*\*|</?em>")


def find_span(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    phrase: str,
    *,
    occurrence: int | None = None,
    message: int | None = None,
) -> tuple[int, int]:
    """Tokens [start, end) of `phrase`, which must stand in the prompt once.

    Otherwise `occurrence` says which one, from 0; -1 is the last. `message` looks in one message
    only (from 0, negative from the end).
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
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    phrase: str,
    *,
    message: int | None = None,
) -> list[tuple[int, int]]:
    """Tokens [start, end) of every occurrence of `phrase`, at least one.

    What only looks like it inside other tokens ("cat" in "category") is not an occurrence.
    """
    text = _tokenized(tokenizer, prompt)
    first, last = (
        (0, len(text.text)) if message is None else _content(tokenizer, prompt, message, text)
    )
    wanted = phrase.strip()
    if not wanted:
        raise ValueError(f"phrase {phrase!r} is empty")
    matches = [m.span() for m in re.finditer(re.escape(wanted), text.text[first:last])]
    covering = [text.covering(first + start, first + end) for start, end in matches]
    found = [span for span in covering if _same(text.decode(*span), wanted)]
    if covering and not found:
        raise ValueError(
            f"{wanted!r} does not end where tokens end: its tokens read "
            f"{text.decode(*covering[0])!r}; take those words as the phrase"
        )
    if not found:
        raise ValueError(f"{wanted!r} is not in the prompt {_short(text.text[first:last])!r}")
    return found


def message_span(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], index: int
) -> tuple[int, int]:
    """Tokens [start, end) of the content of message `index` (from 0, negative from the end)."""
    text = _tokenized(tokenizer, messages)
    return _checked(text, *_content(tokenizer, messages, index, text))


def read_marks(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt
) -> tuple[Prompt, list[tuple[int, int]]]:
    """The prompt without its marks, and the tokens that stood between them.

    Marks are `**...**` and `<em>...</em>`, and do not nest.
    """
    contents = [prompt] if isinstance(prompt, str) else [m.content for m in prompt]
    stripped = [_strip(content) for content in contents]
    if not any(ranges for _, ranges in stripped):
        raise ValueError(
            f"no marks in {_short(contents[-1])!r}: expected **emphasised** or <em>emphasised</em>"
        )
    if isinstance(prompt, str):
        plain, starts = stripped[0][0], [0]
        text = _tokenized(tokenizer, plain)
    else:
        plain = [m._replace(content=new) for m, (new, _) in zip(prompt, stripped, strict=True)]
        text = _tokenized(tokenizer, plain)
        starts = [
            _content(tokenizer, plain, i, text)[0] if ranges else 0
            for i, (_, ranges) in enumerate(stripped)
        ]
    return plain, [
        _checked(text, start + a, start + b)
        for start, (_, ranges) in zip(starts, stripped, strict=True)
        for a, b in ranges
    ]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    spans: Sequence[Sequence[tuple[int, int]]],
) -> tuple[BatchEncoding, list[list[tuple[int, int]]]]:
    """The prompts as one batch (B,T), padded on the left, and their spans where they now stand."""
    if len(prompts) != len(spans):
        raise ValueError(f"{len(prompts)} prompts, spans for {len(spans)}: one list for each")
    ids = [_tokenized(tokenizer, prompt).ids for prompt in prompts]
    inputs = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    pads = [inputs["input_ids"].shape[1] - len(row) for row in ids]
    return inputs, [
        [(pad + start, pad + end) for start, end in row]
        for pad, row in zip(pads, spans, strict=True)
    ]


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
    ends = [_last_end(row, number) for number, row in enumerate(spans)]
    if not ends:
        raise ValueError("no spans: expected for each row a list of (start, end), as [[(5, 12)]]")
    inside = torch.zeros(len(ends), max(ends), dtype=torch.bool)
    for row, each in zip(inside, spans, strict=True):
        for start, end, *_ in each:
            row[start:end] = True
    return inside, False


def _last_end(row: Sequence[Span], number: int) -> int:
    if not isinstance(row, Sequence) or not row or not all(_is_span(span) for span in row):
        raise ValueError(
            f"row {number} of the spans is {row!r}: expected a list of at least one (start, end), "
            "as in [[(5, 12)]] for one prompt"
        )
    for start, end, *_ in row:
        if not 0 <= start < end:
            raise ValueError(
                f"row {number}: span [{start}, {end}) is empty, reversed or negative: expected "
                "0 <= start < end"
            )
    return max(span[1] for span in row)


def _is_span(span: object) -> bool:
    return isinstance(span, Sequence) and len(span) in (2, 3)


class Turn(NamedTuple):
    """The tokens [start, end) of one message, its role's marks included.

    Turn n is the n-th user message and the reply to it; what comes before is turn 0.
    """

    number: int
    role: str
    start: int
    end: int


def find_turns(
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


def reduce_by_turn(
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


class _Text(NamedTuple):
    """A rendered prompt, its token ids, and the characters [start, end) that each stands for."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    tokenizer: PreTrainedTokenizerBase

    def covering(self, start: int, end: int) -> tuple[int, int]:
        """The tokens that hold any of these characters; pieces of one character included."""
        inside = [t for t, (a, b) in enumerate(self.offsets) if a < end and b > start]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)

    def decode(self, start: int, end: int) -> str:
        return self.tokenizer.decode(self.ids[start:end], clean_up_tokenization_spaces=False)


def _tokenized(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> _Text:
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for: load a "
            "fast tokenizer (tokenizer.json)"
        )
    text = prompt if isinstance(prompt, str) else _render(tokenizer, prompt)
    made = tokenizer(text, add_special_tokens=isinstance(prompt, str), return_offsets_mapping=True)
    return _Text(text, made["input_ids"], made["offset_mapping"], tokenizer)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    rows = [m._asdict() for m in messages]
    return tokenizer.apply_chat_template(rows, add_generation_prompt=True, tokenize=False)


def _content(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, index: int, text: _Text
) -> tuple[int, int]:
    """Characters [start, end) of one message's content in the rendered prompt.

    Asked of the template itself: what changes when the content is replaced by a placeholder.
    """
    if isinstance(prompt, str) or not -len(prompt) <= index < len(prompt):
        raise ValueError(
            f"message {index}: expected a list of messages, and one of "
            f"{0 if isinstance(prompt, str) else len(prompt)}"
        )
    placeholder, messages = "\ue000content\ue001", list(prompt)
    content = messages[index].content
    messages[index] = messages[index]._replace(content=placeholder)
    before, found, after = _render(tokenizer, messages).partition(placeholder)
    end = len(text.text) - len(after)
    shown = text.text[len(before) : end]
    if not (found and text.text == before + shown + after and _same(shown, content)):
        raise ValueError(
            f"message {index}: the chat template does not show {_short(content)!r} once and as it "
            "is; look for a phrase instead"
        )
    return len(before), end


def _checked(text: _Text, start: int, end: int) -> tuple[int, int]:
    """The tokens of these characters, if they hold nothing else."""
    wanted = text.text[start:end]
    start, end = (
        start + len(wanted) - len(wanted.lstrip()),
        end - len(wanted) + len(wanted.rstrip()),
    )
    span = text.covering(start, end)
    if not wanted.strip() or not _same(text.decode(*span), wanted):
        raise ValueError(
            f"{wanted!r} does not end where tokens end: its tokens read {text.decode(*span)!r}; "
            "take those words"
        )
    return span


def _strip(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and the characters that were marked."""
    plain, ranges, end = "", [], 0
    for match in _MARKS.finditer(text):
        plain += text[end : match.start()]
        inner = match[1] or match[2]
        ranges.append((len(plain), len(plain) + len(inner)))
        plain, end = plain + inner, match.end()
    plain += text[end:]
    if loose := _LOOSE.search(plain):
        raise ValueError(
            f"{loose[0]!r} without a partner, nested or empty in {_short(text)!r}: marks are "
            "**...** and <em>...</em>"
        )
    return plain, ranges


def _same(a: str, b: str) -> bool:
    return a.split() == b.split()


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
