"""Spans from text: which tokens of a prompt are a phrase, a message, or marked.

A prompt is a text or a list of messages, which the tokenizer's chat template renders, open for the
next reply. Spans are [start, end) token positions in the prompt by itself; `encode` pads a batch on
the left and moves them. Every span is checked by decoding its tokens back.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from transformers import BatchEncoding, PreTrainedTokenizerBase

from steerkit.chat import Message

Prompt = str | Sequence[Message]
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
