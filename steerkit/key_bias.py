"""One bias per key on the door: what PASTA and its relatives have in common.

strength(query) times column(key) is added to the scores of chosen heads. Being a product, it folds
into one more dimension of queries and keys, so the causal kernel stays and no (Q,K) mask is made;
a single query takes it as a mask of one row. Axes: B batch, H query heads, Q/K query/key positions,
D head size, T prompt tokens.
"""

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from steerkit.attention import Call, Edit, attached, install, probe
from steerkit.sink_cache import SinkCache

# A row of biases is made for so many keys more than asked for, and serves that many steps.
_ROOM = 256


class Head(NamedTuple):
    """One attention head: `layer` and `index` count from 0, `index` counts *query* heads."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.index}"


Heads = Iterable[tuple[int, int]] | Mapping[str, Iterable[int]]
"""Heads, or the official head files' {"layer": [query heads]}."""


class Columns(NamedTuple):
    """What is added to the scores of prompt tokens: `bias` (B,T) for the first T, `outside` (B,1)
    for the rest, unless the prompt has T tokens (`exact`). `inside` (B,T): tokens of the spans.
    """

    bias: Tensor
    inside: Tensor
    outside: Tensor
    exact: bool


Strength = Callable[[Call, Tensor], Tensor]
"""(call, column (B,K)) -> (B,H,Q), by which each query multiplies the column."""


@contextmanager
def key_bias(
    model: PreTrainedModel,
    columns: Columns,
    heads: Heads | None = None,
    *,
    keep_sinks: int = 0,
    strength: Strength | None = None,
) -> Iterator[None]:
    """Add `columns` to the scores of the prompt's keys in `heads` (None: all) inside the `with`.

    Keys after the prompt get 0, and so do the first `keep_sinks` real tokens.
    """
    if keep_sinks < 0:
        raise ValueError(f"keep_sinks={keep_sinks}: expected 0 or more first tokens")
    calls = probe(model, torch.zeros(1, 1, dtype=torch.long))
    chosen = _by_layer(heads, calls)
    prompt = _Prompt(columns, keep_sinks)
    active = bool((columns.bias != 0).any() or (columns.outside != 0).any())
    # Every layer is taken, so that a second `with` is refused whichever heads it steers.
    edits: dict[nn.Module, Edit] = {
        call.module: _steered(prompt, chosen[layer], strength)
        if active and layer in chosen
        else Call.attend
        for layer, call in enumerate(calls)
    }
    with install(model), attached(edits), _announced(model, prompt):
        yield
    prompt.end()


def _by_layer(heads: Heads | None, calls: Sequence[Call]) -> dict[int, list[int]]:
    """{layer: [query heads]}, checked against the model's own `calls`."""
    sizes = [call.query.shape[1] for call in calls]
    if heads is None:
        return {layer: list(range(size)) for layer, size in enumerate(sizes)}
    if isinstance(heads, Mapping):
        heads = [(int(layer), index) for layer, row in heads.items() for index in row]
    chosen: dict[int, list[int]] = defaultdict(list)
    for layer, index in heads:
        if not 0 <= layer < len(sizes):
            raise ValueError(f"{Head(layer, index)}: expected 0 <= layer < {len(sizes)} layers")
        if not 0 <= index < sizes[layer]:
            raise ValueError(
                f"{Head(layer, index)}: expected 0 <= index < {sizes[layer]} query heads (they "
                f"share {calls[layer].key.shape[1]} key/value heads, which are not steered)"
            )
        chosen[layer].append(index)
    return chosen


def _steered(prompt: "_Prompt", heads: list[int], strength: Strength | None) -> Edit:
    row = _Row(prompt, heads)

    def edit(call: Call) -> Tensor:
        if strength is None and call.query.shape[2] == 1:
            call.mask = _plus(row.of(call), call.mask)
            return call.attend()
        column = prompt.column(call)
        on = row.switch(call)[:, None]
        return attend_biased(call, on if strength is None else on * strength(call, column), column)

    return edit


class _Row:
    """The bias of one query in one layer, kept between steps: the prompt's part never changes."""

    def __init__(self, prompt: "_Prompt", heads: list[int]) -> None:
        self.prompt, self.heads = prompt, heads
        self.key: tuple[Any, ...] = ()

    def switch(self, call: Call) -> Tensor:
        """1 for steered heads and 0 for others: (H,) float32."""
        on = torch.zeros(call.query.shape[1])
        on[self.heads] = 1
        return on.to(call.query.device)

    def of(self, call: Call) -> Tensor:
        """(B,H,1,K), a window on a longer row."""
        B, K, prompt = call.query.shape[0], call.key.shape[2], self.prompt
        start = prompt.first_key(1, K)
        key = (prompt.version, B, call.query.dtype, call.query.device)
        if self.key != key or self.longer.shape[-1] < start + K:
            bias = prompt.rows(B, call.query.device)
            free = max(start + K, bias.shape[1]) + _ROOM - bias.shape[1]
            bias = F.pad(bias, (0, free))[:, None, None] * self.switch(call)[:, None, None]
            self.key, self.longer = key, bias.to(call.query.dtype)
        return self.longer[..., start : start + K]


# Arithmetic


def attend_biased(call: Call, strength: Tensor, column: Tensor) -> Tensor:
    """Attention with strength (.., H, Q or 1) times column (B,K) added to the scores -> (B,Q,H,D).

    PASTA in one line: strength 1 in steered heads and 0 elsewhere, column log(alpha) outside the
    span and 0 inside. More than one query carry it in a further dimension, `strength` in the query
    and column / scaling in the key, and the mask stays what it was.
    """
    B, H, Q, D = call.query.shape
    dtype = call.query.dtype
    if Q == 1:
        call.mask = _plus((strength[..., None] * column[:, None, None]).to(dtype), call.mask)
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
    """Numbers (B,K,n) that add up to x: one in float32, two in half precision, which rounds."""
    high = x.to(dtype)
    if dtype.itemsize > 2:
        return high[..., None]
    return torch.stack([high, (x - high).to(dtype)], dim=-1)


def _plus(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, -math.inf)
    return bias + mask


def share(call: Call, inside: Tensor) -> Tensor:
    """Weight each query puts on the keys `inside` (B,K), before any bias -> (B,H,Q).

    Attention itself sums it: over values that are 1 inside and 0 outside. No weights are made.
    """
    value = torch.zeros_like(call.value)
    value[..., 0] = inside[:, None]
    plain = Call(call.module, call.query, call.key, value, call.mask, call.scaling, call.options)
    return plain.attend()[..., 0].transpose(1, 2).float()


# Where a forward stands in its prompt


_MISMATCH = "the spans are a mask of {} tokens, the prompt has {}: make it from the padded prompt"


class _Prompt:
    """The columns of a prompt, and how many keys came before the running forward."""

    def __init__(self, columns: Columns, keep_sinks: int) -> None:
        self.columns, self.keep_sinks = columns, keep_sinks
        self.seen: int | None = None  # None: nobody announced a forward
        self.fed = 0  # keys after it
        self.bias: Tensor | None = None  # (B, prompt), once the prompt's first forward is known
        self.version = 0  # of `bias`
        self.ready: dict[tuple[Any, ...], Tensor] = {}  # columns of the running forward

    def begin(self, seen: int, rows: int, new: int, attention_mask: object) -> None:
        """Announce a forward of `new` tokens after `seen`; refuse a prompt that does not fit."""
        (B, T), fed, exact = self.columns.bias.shape, seen + new, self.columns.exact
        if rows % B:
            raise ValueError(
                f"a batch of {rows} rows, spans for {B} prompts: give spans for each prompt (rows "
                "that continue the same prompt share them)"
            )
        if not exact and fed < T:
            raise ValueError(
                f"a span ends at token {T}, past the end of a prompt of {fed} tokens (a prompt "
                "that comes in chunks takes its spans as a bool mask (B, T))"
            )
        if not exact and self.bias is not None and T <= seen != self.fed:
            raise ValueError(
                f"the cache holds {seen} keys, not the {self.fed} read so far (assisted decoding, "
                "a cache used twice), so where the prompt ends is unclear: give the spans as a "
                "bool mask (B, T)"
            )
        if exact and fed < T and seen and new == 1:
            raise ValueError(_MISMATCH.format(T, seen))
        if self.bias is None or seen < T:
            self.bias = self._whole(T if exact else fed, rows // B, attention_mask)
            self.version += 1
        self.seen, self.fed = seen, fed
        self.ready.clear()

    def end(self) -> None:
        """A mask longer than the prompt would have been another prompt's."""
        if self.columns.exact and 0 < self.fed < self.columns.bias.shape[1]:
            raise ValueError(_MISMATCH.format(self.columns.bias.shape[1], self.fed))

    def _whole(self, length: int, repeats: int, attention_mask: object) -> Tensor:
        """(B,length): the columns, the rest of the prompt, and 0 for the sinks that are kept."""
        bias, inside, outside, _ = self.columns
        B, T = bias.shape
        real = torch.ones(B, length, dtype=torch.bool)
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            given = attention_mask[::repeats, :length].bool().cpu()
            real[:, : given.shape[1]] = given
        elif attention_mask is not None and self.keep_sinks:
            raise ValueError("keep_sinks needs the attention mask as (B, T), to tell padding")
        if pads := (inside & ~real[:, :T]).any(dim=1).nonzero().flatten().tolist():
            raise ValueError(
                f"rows {pads}: a span covers padding; spans are positions in the padded prompt, "
                "so add the padding on the left to them"
            )
        first = real & (real.cumsum(dim=1) <= self.keep_sinks)
        bias = torch.cat([bias, outside.expand(B, length - T)], dim=1)
        return bias.masked_fill(first, 0.0)

    def first_key(self, Q: int, K: int) -> int:
        """Position of the first of K keys: a sliding window keeps the last ones."""
        seen = K - Q if self.seen is None else self.seen
        return max(0, seen + Q - K)

    def rows(self, B: int, device: torch.device) -> Tensor:
        """What is added to the prompt's keys: (B, prompt) float32."""
        assert self.bias is not None  # begin() came first
        return self.bias.to(device).repeat_interleave(B // len(self.bias), dim=0)

    def column(self, call: Call) -> Tensor:
        """What is added to each key of this call: (B,K) float32."""
        (B, _, Q, _), K = call.query.shape, call.key.shape[2]
        key = (B, Q, K, call.key.device)
        if key not in self.ready:
            held = self.rows(B, call.key.device)[:, self.first_key(Q, K) :][:, :K]
            self.ready[key] = F.pad(held, (0, K - held.shape[1]))
        return self.ready[key]


@contextmanager
def _announced(model: PreTrainedModel, prompt: _Prompt) -> Iterator[None]:
    """Tell `prompt` of every forward, before any layer runs."""
    base = model.base_model
    signature = inspect.signature(base.forward)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _refuse_sink_cache(base, args, kwargs)
        given = signature.bind_partial(*args, **kwargs).arguments if args else kwargs
        inputs, cache = given.get("input_ids"), given.get("past_key_values")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        seen = 0 if cache is None else int(cache.get_seq_length())
        prompt.begin(seen, *inputs.shape[:2], given.get("attention_mask"))

    def after(*_: object) -> None:
        prompt.seen = None

    with ExitStack() as stack:
        for hook in (
            base.register_forward_pre_hook(before, with_kwargs=True),
            base.register_forward_hook(after, always_call=True),
            # In front of the hook of a SinkCache, whose complaint would say less.
            model.register_forward_pre_hook(_refuse_sink_cache, with_kwargs=True, prepend=True),
        ):
            stack.callback(hook.remove)
        yield


def _refuse_sink_cache(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if any(isinstance(value, SinkCache) for value in (*args, *kwargs.values())):
        raise ValueError(
            "a SinkCache evicts and moves the prompt's keys, so spans would point at others: steer "
            "with a cache that keeps them (leave past_key_values out)"
        )
