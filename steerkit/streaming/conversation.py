"""A conversation without end in constant memory (StreamingLLM, 2309.17453)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from steerkit.chat import Message, check_request, prompt_text, stop_ids, template_pieces, user_text
from steerkit.models import Model, Tokenizer
from steerkit.streaming.sink_cache import SinkCache


class StreamReply(NamedTuple):
    """One answer of `stream_chat`; `seen` and `kept` count the stream's tokens so far."""

    text: str
    ids: list[int]
    seen: int
    kept: int


@torch.no_grad()
def stream_chat(
    model: Model,
    tokenizer: Tokenizer,
    messages: Iterable[str | Message | Mapping[str, str]],
    *,
    system: str | None = None,
    pin: bool = False,
    sinks: int = 4,
    window: int = 1020,
    max_new_tokens: int = 128,
    choose: Callable[[Tensor], int | Tensor] = torch.argmax,
) -> Iterator[StreamReply]:
    """Answer user messages, one reply each, for as long as they come.

    The cache evicts what is neither sink nor recent: the model forgets it. With `pin` all tokens of
    the first message, and of the `system` message before it, are sinks: an instruction that stands
    there is never evicted, and memory stays constant. `messages` is read lazily; `choose` picks a
    token id from logits (V,). `generate` would do the same with a SinkCache, but it wants all ids
    of the conversation each time.

    >>> import steerkit
    >>> model, tokenizer = steerkit.load("tiny")
    >>> messages = ["Where does Anna Adler live?"] * 2
    >>> for reply in steerkit.stream_chat(model, tokenizer, messages, window=60):
    ...     print(reply.text)
    Anna Adler lives in Lisbon.
    Anna Adler lives in Lisbon.
    """
    check_request(messages=messages, max_new_tokens=max_new_tokens)
    opening = [] if system is None else [Message("system", system)]
    turns = [*opening, Message("user", ""), Message("assistant", ""), Message("user", "")]
    # `before` a later message: the end of the reply that it follows, and what opens a message.
    *_, before, after = template_pieces(tokenizer, turns)
    stops = set(stop_ids(model, tokenizer))
    unread: list[int] = []
    for number, message in enumerate(map(user_text, messages)):
        text = before + message + after
        if not number:
            text = prompt_text(tokenizer, [*opening, Message("user", message)])
        unread += tokenizer(text, add_special_tokens=False).input_ids
        if not number:
            cache = SinkCache(model, sinks=len(unread) if pin else sinks, window=window)
        reply: list[int] = []
        while len(reply) < max_new_tokens and not stops.intersection(reply[-1:]):
            inputs = torch.tensor([unread], device=model.device)
            logits = model(input_ids=inputs, past_key_values=cache, logits_to_keep=1).logits
            reply.append(int(choose(logits[0, -1])))
            unread = reply[-1:]
        if reply[-1] in stops:  # the template writes the end of a reply itself
            reply, unread = reply[:-1], []
        text = tokenizer.decode(reply, skip_special_tokens=True)
        yield StreamReply(text, reply, cache.seen, min(cache.seen, cache.state.capacity))
