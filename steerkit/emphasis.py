"""PASTA, post-hoc attention steering (2311.02262, equation 2), on any model behind the door.

In chosen heads the weights on tokens outside the emphasised spans are multiplied by alpha and each
row is renormalised, which is to add log(alpha) to the scores of those keys before the softmax. The
added bias depends on the key alone, so one more query/key dimension carries it through the causal
kernel, and no (Q,K) mask is made. Axes: B batch, H query heads, Q/K query/key positions, D head
size, T prompt tokens.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from steerkit.attention import Call, Edit, attached, install, probe
from steerkit.sink_cache import SinkCache


class Head(NamedTuple):
    """One attention head: `layer` and `index` count from 0, `index` counts *query* heads."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.index}"


Span = tuple[int, int] | tuple[int, int, float]
"""Tokens [start, end) of the prompt, left padding counted; a third number is the span's alpha."""
Spans = Tensor | Sequence[Sequence[Span]]
"""A bool mask (B,T), True = emphasised, or for each row of the batch its list of spans."""


@contextmanager
def emphasise(
    model: PreTrainedModel,
    spans: Spans,
    heads: Iterable[tuple[int, int]],
    *,
    alpha: float = 0.01,
    keep_sinks: int = 0,
) -> Iterator[None]:
    """Steer `heads` towards `spans` in every forward and `generate` inside the `with`.

    Weights on prompt tokens outside the union of a row's spans are multiplied by `alpha`; tokens
    that come later, and the first `keep_sinks` real tokens, keep weight 1. A span with an alpha of
    its own outweighs what is outside by 1 / that alpha; the smallest alpha of a row is what
    outside tokens are multiplied by. Rows made of one prompt (beams, several samples) share its
    spans. A mask states the prompt's length, which may then come in chunks.

    Raises ValueError for bad spans, heads or alphas, a prompt that does not hold the spans, spans
    on padding, and for a `SinkCache`, whose slots are no longer prompt positions.
    """
    columns = _log_weights(spans, alpha)
    if keep_sinks < 0:
        raise ValueError(f"keep_sinks={keep_sinks}: expected 0 (the paper) or more")
    with key_bias(model, columns, heads, keep_sinks=keep_sinks):
        yield


# Spans -> one number per prompt token


class Columns(NamedTuple):
    """What is added to the scores of prompt tokens: `bias` (B,T) for the first T, `outside` (B,1)
    for the rest, unless the prompt has T tokens (`exact`). `inside` (B,T): tokens of the spans.
    """

    bias: Tensor
    inside: Tensor
    outside: Tensor
    exact: bool


def _log_weights(spans: Spans, alpha: float) -> Columns:
    """log of equation 2's factor for each token: 0 inside, log(alpha) outside."""
    _refuse_alpha(alpha)
    inside, exact = span_mask(spans)
    strength = torch.ones(inside.shape, dtype=torch.float64)  # alpha by token, 1 outside
    if exact:
        strength[inside] = alpha
    else:
        for row, each in zip(strength, spans, strict=True):
            for start, end, *own in each:
                _refuse_alpha(own[0] if own else alpha)
                row[start:end] = row[start:end].clamp(max=own[0] if own else alpha)
    outside = strength.min(dim=1, keepdim=True).values
    bias = (outside / strength).log().float()
    return Columns(bias, inside, outside.log().float(), exact)


def _refuse_alpha(alpha: float) -> None:
    if not 0 < alpha <= 1:
        raise ValueError(
            f"alpha={alpha}: expected 0 < alpha <= 1 (1 = no steering, 0.01 = the paper's value)"
        )


def span_mask(spans: Spans) -> tuple[Tensor, bool]:
    """Bool (B,T) and whether T is the prompt's length; lists of spans reach to their last end."""
    if isinstance(spans, Tensor):
        if spans.dtype != torch.bool or spans.ndim != 2:
            raise ValueError(
                f"spans of {spans.dtype} and shape {tuple(spans.shape)}: expected a bool mask "
                "(B, T), True = emphasised"
            )
        if empty := (~spans.any(dim=1)).nonzero().flatten().tolist():
            raise ValueError(f"rows {empty} emphasise no token: mark at least one True in each row")
        return spans.detach().cpu().clone(), True
    ends = [_checked(row, number) for number, row in enumerate(spans)]
    if not ends:
        raise ValueError("no spans: expected for each row a list of (start, end), [[(5, 12)]]")
    inside = torch.zeros(len(ends), max(ends), dtype=torch.bool)
    for row, each in zip(inside, spans, strict=True):
        for start, end, *_ in each:
            row[start:end] = True
    return inside, False


def _checked(row: Sequence[Span], number: int) -> int:
    """The last end of one row's spans."""
    if not all(isinstance(span, Sequence) and len(span) in (2, 3) for span in row) or not row:
        raise ValueError(
            f"row {number}: {row!r}: expected a list of one or more (start, end), as in "
            "[[(5, 12)]] for one prompt"
        )
    for start, end, *_ in row:
        if not 0 <= start < end:
            raise ValueError(
                f"row {number}: span [{start}, {end}) is empty, reversed or negative: expected "
                "0 <= start < end"
            )
    return max(span[1] for span in row)


# Heads


def heads_by_layer(heads: Iterable[tuple[int, int]], calls: Sequence[Call]) -> dict[int, list[int]]:
    """{layer: [query heads]}, checked against the model's `calls` of `probe`."""
    chosen: dict[int, list[int]] = defaultdict(list)
    for layer, index in heads:
        if not 0 <= layer < len(calls):
            raise ValueError(f"{Head(layer, index)}: expected 0 <= layer < {len(calls)} layers")
        H, groups = calls[layer].query.shape[1], calls[layer].key.shape[1]
        if not 0 <= index < H:
            raise ValueError(
                f"{Head(layer, index)}: expected 0 <= index < {H} query heads "
                f"(they share {groups} key/value heads, which cannot be steered one by one)"
            )
        chosen[layer].append(index)
    return chosen


# One bias per key on the door


class _Prompt:
    """The columns of a prompt, and where the running forward stands in it."""

    def __init__(self, columns: Columns, keep_sinks: int) -> None:
        self.columns, self.keep_sinks = columns, keep_sinks
        self.seen: int | None = None  # keys before this forward; None: nobody announced one
        self.bias: Tensor | None = None  # of the whole prompt, once its first forward is known
        self.ready: dict[tuple[Any, ...], Tensor] = {}  # columns of the running forward

    def begin(self, seen: int, new: int, attention_mask: Tensor | None) -> None:
        """Announce a forward of `new` tokens after `seen`; refuse a prompt that does not fit."""
        T, fed = self.columns.bias.shape[1], seen + new
        if fed < T and not self.columns.exact:
            raise ValueError(
                f"a span ends at {T}, past the end of a prompt of {fed} tokens (for a prompt in "
                "chunks give the spans as a bool mask (B, T))"
            )
        if seen < T < fed and self.columns.exact:
            raise ValueError(f"spans are a mask of {T} tokens, the prompt has {fed}")
        if self.bias is None or seen < T:
            length = T if self.columns.exact else fed
            self.bias = self._prompt_bias(length, attention_mask)
        self.seen = seen
        self.ready.clear()

    def _prompt_bias(self, length: int, attention_mask: Tensor | None) -> Tensor:
        """(B,length): the columns, the rest of the prompt, and the sinks kept at weight 1."""
        bias, inside, outside, _ = self.columns
        B, T = bias.shape
        real = torch.ones(B, length, dtype=torch.bool)
        if attention_mask is not None and attention_mask.ndim == 2:
            given = attention_mask[:: max(1, len(attention_mask) // B), :length].bool().cpu()
            real[:, : given.shape[1]] = given
        if pads := (inside & ~real[:, :T]).any(dim=1).nonzero().flatten().tolist():
            raise ValueError(
                f"rows {pads}: a span covers padding; count the left padding in (spans are "
                "positions in the padded prompt)"
            )
        first = real & (real.cumsum(dim=1) <= self.keep_sinks)
        bias = torch.cat([bias, outside.expand(B, length - T)], dim=1)
        return bias.masked_fill(first, 0.0)

    def column(self, call: Call) -> Tensor:
        """Added to each key of this call: (B,K) float32; keys after the prompt get 0."""
        (B, _, Q, _), K = call.query.shape, call.key.shape[2]
        key = (B, Q, K, call.key.device)
        if key not in self.ready:
            assert self.bias is not None  # begin() came first
            rows = len(self.bias)
            if B % rows:
                raise ValueError(
                    f"a batch of {B} rows for the spans of {rows} prompts: give each prompt its "
                    "spans"
                )
            seen = K - Q if self.seen is None else self.seen
            held = self.bias[:, max(0, seen + Q - K) :][:, :K]  # a sliding window keeps the last K
            held = F.pad(held, (0, K - held.shape[1])).to(call.key.device)
            self.ready[key] = held.repeat_interleave(B // rows, dim=0)
        return self.ready[key]


@contextmanager
def key_bias(
    model: PreTrainedModel,
    columns: Columns,
    heads: Iterable[tuple[int, int]],
    *,
    keep_sinks: int = 0,
) -> Iterator[None]:
    """Add `columns` to the scores of the prompt's keys in `heads`, everything else untouched."""
    calls = probe(model, torch.zeros(1, 1, dtype=torch.long))
    chosen = heads_by_layer(heads, calls)
    prompt = _Prompt(columns, keep_sinks)
    active = bool((columns.bias != 0).any())
    edits: dict[nn.Module, Edit] = {
        call.module: _steer(prompt, chosen[layer]) if active and layer in chosen else Call.attend
        for layer, call in enumerate(calls)
    }
    with install(model), attached(edits), _watched(model, prompt):
        yield


def _steer(prompt: _Prompt, heads: list[int]) -> Edit:
    def edit(call: Call) -> Tensor:
        on = call.query.new_zeros(call.query.shape[1])
        on[heads] = 1
        return attend_biased(call, on[:, None], prompt.column(call))

    return edit


def attend_biased(call: Call, strength: Tensor, column: Tensor) -> Tensor:
    """Attention with strength (.., H, Q or 1) times column (B,K) added to the scores -> (B,Q,H,D).

    One query takes an additive mask (B,H,1,K). More take one further dimension, 1 in the query,
    column / scaling in the key, so the mask stays what it was (None: the causal kernel).
    """
    B, H, Q, D = call.query.shape
    dtype = call.query.dtype
    if Q == 1:
        bias = (strength[..., None] * column[:, None, None]).to(dtype)  # (B,H,1,K)
        call.mask = _plus(bias, call.mask)
        return call.attend()
    parts = _parts(column / call.scaling, dtype)  # (B,K,n)
    n = parts.shape[-1]
    query = strength.to(dtype)[..., None].expand(B, H, Q, n)
    key = parts[:, None].expand(B, call.key.shape[1], -1, n)
    call.query = torch.cat([call.query, query], dim=-1)
    call.key = torch.cat([call.key, key], dim=-1)
    call.value = F.pad(call.value, (0, n))  # the fast kernels want one width for all three
    return call.attend()[..., :D]


def _parts(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers (B,K) whose sum is x: one in float32, two in half precision, which rounds."""
    high = x.to(dtype)
    if dtype == torch.float32:
        return high[..., None]
    return torch.stack([high, (x - high).to(dtype)], dim=-1)


def _plus(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, -math.inf)
    return bias + mask


@contextmanager
def _watched(model: PreTrainedModel, prompt: _Prompt) -> Iterator[None]:
    """Tell `prompt` of every forward: how many tokens the cache holds, and the padding."""

    def refuse(_: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        if isinstance(kwargs.get("past_key_values"), SinkCache):
            raise ValueError(
                "a SinkCache evicts and moves the prompt's keys, so spans would point at others: "
                "steer with a cache that keeps them (leave past_key_values out)"
            )

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        inputs = kwargs.get("input_ids", args[0] if args else None)
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        seen = 0 if cache is None else cache.get_seq_length()
        prompt.begin(seen, inputs.shape[1], kwargs.get("attention_mask"))

    def after(*_: object) -> None:
        prompt.seen = None

    base = model.base_model
    with ExitStack() as stack:
        for hook in (
            base.register_forward_pre_hook(before, with_kwargs=True),
            base.register_forward_hook(after, always_call=True),
            # In front of the hook of a SinkCache, whose complaint would say less.
            model.register_forward_pre_hook(refuse, with_kwargs=True, prepend=True),
        ):
            stack.callback(hook.remove)
        yield
