"""A conversation without end in constant memory (StreamingLLM, 2309.17453, section 4.4)."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from steerkit.chat import Message, stop_ids, template_pieces
from steerkit.streaming.losses import last_only
from steerkit.streaming.sink_cache import SinkCache


class StreamReply(NamedTuple):
    """One answer of `stream_chat`; `seen` and `kept` count the stream's tokens so far."""

    text: str
    ids: list[int]
    seen: int
    kept: int


def most_likely(logits: Tensor) -> int:
    """The most likely token: logits (V,) -> id."""
    return int(logits.argmax())


def stream_chat(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    messages: Iterable[str],
    *,
    system: str | None = None,
    sinks: int = 4,
    window: int = 1020,
    max_new_tokens: int = 128,
    choose: Callable[[Tensor], int] = most_likely,
) -> Iterator[StreamReply]:
    """Answer user messages, one reply each, for as long as they come.

    The cache evicts what is neither sink nor recent: the model forgets it. `messages` is read
    lazily; `choose` picks a token id from logits (V,). `generate` would do the same with a
    SinkCache, but it wants all ids of the conversation each time.

    >>> import steerkit
    >>> model, tokenizer = steerkit.load("tiny")
    >>> messages = ["Where does Anna Adler live?"] * 2
    >>> for reply in steerkit.stream_chat(model, tokenizer, messages, window=60):
    ...     print(reply.text)
    Anna Adler lives in Lisbon.
    Anna Adler lives in Lisbon.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: expected at least 1")
    if isinstance(messages, str):  # its characters would each be a message
        raise ValueError(f"messages={messages[:40]!r}: expected several texts; put it into a list")
    first, later = _template_around(tokenizer, system)
    cache = SinkCache(model, sinks=sinks, window=window)
    stops = stop_ids(model, tokenizer)
    unread: list[int] = []  # the last token of a reply cut short: the model has not read it yet
    for number, message in enumerate(messages):
        before, after = later if number else first
        new = tokenizer(before + message + after, add_special_tokens=False).input_ids
        reply = _decode(model, cache, unread + new, max_new_tokens, stops, choose)
        ended = reply[-1] in stops
        reply, unread = (reply[:-1], []) if ended else (reply, reply[-1:])
        text = tokenizer.decode(reply, skip_special_tokens=True)
        yield StreamReply(text, reply, cache.seen, min(cache.seen, sinks + window + 1))


@torch.no_grad()
def _decode(
    model: PreTrainedModel,
    cache: SinkCache,
    ids: list[int],
    limit: int,
    stops: list[int],
    choose: Callable[[Tensor], int],
) -> list[int]:
    """Read `ids`, then choose up to `limit` tokens; the last one is not read."""
    reply: list[int] = []
    while len(reply) < limit and not (reply and reply[-1] in stops):
        inputs = torch.tensor([reply[-1:] or ids], device=model.device)
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True, **last_only(model))
        reply.append(choose(output.logits[0, -1]))
    return reply


def _template_around(
    tokenizer: Tokenizer, system: str | None
) -> tuple[tuple[str, str], tuple[str, str]]:
    """What the chat template writes (before, after) the first user message, and a later one.

    "Before" a later message begins with the end of the reply that it follows.
    """
    opening = [] if system is None else [Message("system", system)]
    opening.append(Message("user", ""))
    *front, after = template_pieces(tokenizer, opening)
    more = [*opening, Message("assistant", ""), Message("user", "")]
    *_, later_before, later_after = template_pieces(tokenizer, more)
    return ((system or "").join(front), after), (later_before, later_after)
