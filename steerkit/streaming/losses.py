"""StreamingLLM (2309.17453): losses of a long stream in a bounded cache, and endless talk.

Axes: B batch, T tokens of the stream, V vocabulary. Losses in nats.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from steerkit.attention.hook import use_attention_function
from steerkit.attention.rope import rope_kinds
from steerkit.progress import progress
from steerkit.streaming.latency import last_only
from steerkit.streaming.sink_cache import SinkCache

_BATCH_TOKENS = 8192  # tokens per forward of re-computation


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats: (B,n,V), (B,n) -> (B,n) float32."""
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none"
    ).view_as(targets)


def next_token_hit(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether greedy decoding would say the target: (B,n,V), (B,n) -> (B,n) boolean."""
    return logits.argmax(-1) == targets


@torch.no_grad()
def token_losses(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    sinks: int = 4,
    window: int | None = None,
    block: int = 256,
    cache: SinkCache | None = None,
    score: Callable[[Tensor, Tensor], Tensor] = next_token_loss,
) -> Tensor:
    """Loss of each next token of a stream, ids (B,T) -> (B,T-1) float32 on the CPU (section 4.1).

    `window=None` is dense: all earlier tokens are kept, and memory grows. Otherwise a token sees
    the first `sinks` tokens, the `window` before it and itself, at positions inside the cache:
    StreamingLLM, or window attention with `sinks=0`; memory and precision do not depend on T.
    Equal to one token per forward, whatever the `block` of tokens that one forward takes. A `cache`
    of one's own goes on where it stands, with its own sinks and window. `score` may judge a
    prediction otherwise.
    """
    check_ids(model, ids)
    if block < 1:
        raise ValueError(f"block={block}: expected at least 1 token per forward (256 suits a CPU)")
    T, streams = ids.shape[1], window is not None or cache is not None
    if not streams:
        _refuse_length(model, T - 1)
        held: Cache = DynamicCache(config=model.config)
    else:
        held = SinkCache(model, sinks=sinks, window=window) if cache is None else cache
    out = torch.empty(ids.shape[0], T - 1)
    door = use_attention_function(model) if streams else nullcontext()
    with door, progress(T - 1, unit="tokens") as update:
        for start in range(0, T - 1, block):
            piece = ids[:, start : start + block + 1].to(model.device)
            inputs = {"input_ids": piece[:, :-1], "past_key_values": held, "use_cache": True}
            with _memory(f"block={block}", "take a smaller block or window"):
                logits = model(**inputs).logits
            out[:, start : start + block] = score(logits, piece[:, 1:])
            update(piece.shape[1] - 1)
    return out


def token_hits(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    """Whether greedy decoding would say each next token: (B,T) -> (B,T-1) boolean on the CPU.

    Options as in `token_losses`.
    """
    return token_losses(model, ids, score=next_token_hit, **options).bool()


@torch.no_grad()
def recomputed_losses(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    length: int,
    positions: Sequence[int] | Tensor | None = None,
    first: Sequence[int] = (),
    batch: int | None = None,
) -> Tensor:
    """Sliding window with re-computation: each loss from a fresh forward over `length` tokens.

    ids (B,T) -> (B,P) at `positions` of `token_losses`' last axis (default: all T-1). Position p
    predicts token p+1 from tokens max(0, p+1-length) .. p. `first` holds token ids to put in front
    of each window that has left the stream's start, for a model whose texts always began with
    them. `batch` windows share a forward (default: about 8192 tokens), half as many when memory
    runs out.
    """
    check_ids(model, ids)
    T = ids.shape[1]
    if length < 1:
        raise ValueError(f"length={length}: expected a window of at least 1 token")
    wanted = (
        torch.arange(T - 1) if positions is None else torch.as_tensor(positions, dtype=torch.long)
    )
    if wanted.ndim != 1 or not len(wanted) or wanted.min() < 0 or wanted.max() >= T - 1:
        raise ValueError(
            f"positions: expected a non-empty list of 0 .. {T - 2}, the losses of {T} tokens"
        )
    _refuse_length(model, min(length, T - 1))
    full = wanted >= length - 1
    losses = torch.empty(ids.shape[0], len(wanted))
    if (
        not full.all()
    ):  # the first windows are prefixes of one another: one causal forward has them all
        head = ids[:, :length].to(model.device)
        early = next_token_loss(model(input_ids=head[:, :-1], use_cache=False).logits, head[:, 1:])
        losses[:, ~full] = early.cpu()[:, wanted[~full]]
    if full.any():
        batch = max(1, _BATCH_TOKENS // length) if batch is None else batch
        front = torch.tensor(first, dtype=torch.long, device=ids.device)
        losses[:, full] = _window_losses(model, ids, wanted[full], length, front, batch)
    return losses


def _window_losses(
    model: PreTrainedModel, ids: Tensor, ends: Tensor, length: int, front: Tensor, batch: int
) -> Tensor:
    """Last losses of the windows of `length` tokens, behind `front`, that end at `ends`: (B,P)."""
    if batch < 1:
        raise ValueError(f"batch={batch}: expected at least 1 window per forward")
    B, P = ids.shape[0], len(ends)
    rows = torch.arange(B).repeat_interleave(P)
    lasts = ends.repeat(B)
    keep = last_only(model)
    losses = torch.empty(B * P)
    offsets = torch.arange(1 - length, 1)
    start = 0
    with progress(B * P, unit="windows") as update:
        while start < B * P:
            row, last = rows[start : start + batch], lasts[start : start + batch]
            windows = ids[row[:, None], last[:, None] + offsets]
            windows = torch.cat([front.expand(len(row), -1), windows], 1).to(model.device)
            try:
                with _memory(f"one window of {length} tokens", "take a smaller length"):
                    logits = model(input_ids=windows, use_cache=False, **keep).logits[:, -1:]
            except torch.OutOfMemoryError:
                if len(row) == 1:
                    raise
                batch = len(row) // 2
                continue
            target = ids[row, last + 1].to(model.device)[:, None]
            losses[start : start + batch] = next_token_loss(logits, target)[:, 0]
            update(len(row))
            start += len(row)
    return losses.view(B, P)


@contextmanager
def _memory(what: str, remedy: str) -> Iterator[None]:
    """Out of memory in one line that says what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"out of memory with {what}: {remedy}, or load the model in bfloat16"
        ) from error


def check_ids(model: PreTrainedModel, ids: Tensor) -> None:
    """A stream is (B,T) token ids of this vocabulary, T >= 2. Raises ValueError."""
    if not isinstance(ids, Tensor):
        raise ValueError(f"ids are a {type(ids).__name__}: expected a tensor of token ids (B, T)")
    if ids.ndim != 2:
        raise ValueError(
            f"ids of shape {tuple(ids.shape)}: expected (B, T); add the batch axis with ids[None]"
        )
    if ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"ids of type {ids.dtype}: expected integer token ids")
    if ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(
            f"ids of shape {tuple(ids.shape)}: expected at least two tokens, one to predict"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"ids from {low} to {high}: the model's vocabulary is 0 .. {vocabulary - 1}"
        )


@torch.no_grad()
def window_drift(model: PreTrainedModel, ids: Tensor, *, length: int, every: int = 100) -> Tensor:
    """How far window attention's states are from a fresh forward's over the same `length` tokens.

    ids (1,T) -> (T // every, L+1): for the last of each `every` tokens, after each layer (0: the
    embedding), relative to the norm. It is why re-computation is another method, and better.
    """
    check_ids(model, ids)
    if not 2 <= length <= every <= ids.shape[1]:
        raise ValueError(
            f"length={length}, every={every}: expected 2 <= length <= every <= {ids.shape[1]}"
        )
    cache, rows = SinkCache(model, sinks=0, window=length - 1), []
    for end in range(every, ids.shape[1] + 1, every):
        piece = ids[:, end - every : end].to(model.device)
        model(piece[:, :-1], past_key_values=cache)
        kept = model(piece[:, -1:], past_key_values=cache, output_hidden_states=True).hidden_states
        fresh = model(piece[:, -length:], output_hidden_states=True).hidden_states
        pairs = ((a[0, -1].float(), b[0, -1].float()) for a, b in zip(kept, fresh, strict=True))
        rows.append(torch.stack([(a - b).norm() / b.norm() for a, b in pairs]))
    return torch.stack(rows).cpu()


def _refuse_length(model: PreTrainedModel, tokens: int) -> None:
    """Positions beyond a learned table, or where frequencies begin to change."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    kinds = rope_kinds(model)
    static = kinds and not any("dynamic" in kind or kind == "longrope" for kind in kinds)
    if limit is not None and tokens > limit and not static:
        raise ValueError(
            f"{tokens} tokens at once: this model's positions end, or change their meaning, "
            f"at {limit}; cut the stream, or use a model with static rotary positions"
        )


# Talk without end


class Reply(NamedTuple):
    """One answer of `stream_chat`; `seen` and `kept` count the stream's tokens so far."""

    text: str
    ids: list[int]
    seen: int
    kept: int


def greedy(logits: Tensor) -> int:
    """The most likely token of (V,) logits."""
    return int(logits.argmax())


def stream_chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Iterable[str],
    *,
    system: str | None = None,
    sinks: int = 4,
    window: int = 1020,
    max_new_tokens: int = 128,
    choose: Callable[[Tensor], int] = greedy,
) -> Iterator[Reply]:
    """Answer user messages, one `Reply` each, for as long as they come, in constant memory.

    The cache evicts what is neither sink nor recent: the model forgets it. `messages` is read
    lazily; `choose` picks a token id from (V,) logits. No id tensor grows, as it does in
    `generate`.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: expected at least 1")
    if isinstance(messages, str):  # its characters would each be a message
        raise ValueError(f"messages={messages[:40]!r}: expected several texts; put it into a list")
    opening, between = _turn_texts(tokenizer, system)
    cache = SinkCache(model, sinks=sinks, window=window)
    stops = _stop_ids(model, tokenizer)
    unread: list[int] = []  # a reply cut short: its last token has not been fed yet
    for number, message in enumerate(messages):
        before, after = between if number else opening
        text = before + message + after
        ids = unread + tokenizer(text, add_special_tokens=False).input_ids
        reply = _reply(model, cache, ids, max_new_tokens, stops, choose)
        ended = reply[-1] in stops
        said, unread = (reply[:-1], []) if ended else (reply, reply[-1:])
        text = tokenizer.decode(said, skip_special_tokens=True)
        yield Reply(text, said, cache.seen, min(cache.seen, sinks + window + 1))


@torch.no_grad()
def _reply(
    model: PreTrainedModel,
    cache: SinkCache,
    ids: list[int],
    limit: int,
    stops: set[int],
    choose: Callable[[Tensor], int],
) -> list[int]:
    """Feed `ids`, then decode up to `limit` tokens; the last one is not fed."""
    out: list[int] = []
    while len(out) < limit and not (out and out[-1] in stops):
        inputs = torch.tensor([out[-1:] or ids], device=model.device)
        logits = model(input_ids=inputs, past_key_values=cache, use_cache=True, **last_only(model))
        out.append(choose(logits.logits[0, -1]))
    return out


def _turn_texts(
    tokenizer: PreTrainedTokenizerBase, system: str | None
) -> tuple[tuple[str, str], tuple[str, str]]:
    """What the chat template puts (before, after) the first user message, and a later one.

    A later message's "before" begins with the end of the reply that it follows.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: a conversation needs one")
    users, said = ("USERFIRST", "USERSECOND"), "ASSISTANTFIRST"
    rows = [{"role": "system", "content": system}] if system is not None else []
    rows.append({"role": "user", "content": users[0]})

    def render(rows: list[dict[str, str]]) -> str:
        return tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)

    before, after = render(rows).split(users[0])
    rows += [{"role": "assistant", "content": said}, {"role": "user", "content": users[1]}]
    later = render(rows).split(said)[1].split(users[1])
    return (before, after), (later[0], later[1])


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    stops = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])}
    return found - {None}
