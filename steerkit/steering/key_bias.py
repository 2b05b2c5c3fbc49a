"""One bias per key on the door: what PASTA and its relatives have in common.

strength(query) times column(key) is added to the scores of chosen heads. Being a product, it folds
into one more dimension of queries and keys, so the causal kernel stays and no (Q,K) mask is made;
a single query, and a CPU's kernel, take it as a mask of one row. Axes: B batch, H query heads, Q/K
query/key positions, D head size, T prompt tokens.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from steerkit.attention.hook import (
    AttentionCall,
    Edit,
    attach_to_modules,
    trace_attention,
    use_attention_function,
)
from steerkit.steering.prompt_bias import Columns, PromptBias, announced

# A row of biases is made for so many keys more than asked for, and serves that many steps.
_ROOM = 256
# The fast kernels of accelerators want head sizes that are multiples of 8; a CPU's take any.
_ALIGN = {"cpu": 1}
# The kernel behind SDPA on a CPU takes a mask beside the causal one, which SDPA refuses: a row of
# biases costs it 3 % of a forward, one more dimension up to 15 % (measured at head size 32).
_KERNEL = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
# It knows grouped queries since torch 2.9 (pytorch #157893), and does not check for them.
_GROUPS = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 9)


class Head(NamedTuple):
    """One attention head: `layer` and `index` count from 0, `index` counts *query* heads."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.index}"


Heads = Iterable[tuple[int, int]] | Mapping[str, Iterable[int]]
"""Heads, or the official head files' {"layer": [query heads]}."""


Strength = Callable[[AttentionCall, Tensor], Tensor]
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
    calls = trace_attention(model, torch.zeros(1, 1, dtype=torch.long))
    chosen = _by_layer(heads, calls)
    prompt = PromptBias(columns, keep_sinks)
    active = bool((columns.bias != 0).any() or (columns.outside != 0).any())
    # Every layer is taken, so that a second `with` is refused whichever heads it steers.
    edits: dict[nn.Module, Edit] = {
        call.module: _steered(prompt, chosen[layer], strength)
        if active and layer in chosen
        else AttentionCall.attend
        for layer, call in enumerate(calls)
    }
    with use_attention_function(model), attach_to_modules(edits), announced(model, prompt):
        yield
    prompt.end()


def _by_layer(heads: Heads | None, calls: Sequence[AttentionCall]) -> dict[int, list[int]]:
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


def _steered(prompt: PromptBias, heads: list[int], strength: Strength | None) -> Edit:
    row = _Row(prompt, heads)

    def edit(call: AttentionCall) -> Tensor:
        if strength is None and call.query.shape[2] == 1:
            call.mask = _plus(row.of(call), call.mask)
            return call.attend()
        column = prompt.column(call)
        on = row.switch(call)[:, None]
        return attend_biased(call, on if strength is None else on * strength(call, column), column)

    return edit


class _Row:
    """The bias of one query in one layer, kept between steps: the prompt's part never changes."""

    def __init__(self, prompt: PromptBias, heads: list[int]) -> None:
        self.prompt, self.heads = prompt, heads
        self.key: tuple[Any, ...] = ()

    def switch(self, call: AttentionCall) -> Tensor:
        """1 for steered heads and 0 for others: (H,) float32."""
        on = torch.zeros(call.query.shape[1])
        on[self.heads] = 1
        return on.to(call.query.device)

    def of(self, call: AttentionCall) -> Tensor:
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


def attend_biased(call: AttentionCall, strength: Tensor, column: Tensor) -> Tensor:
    """Attention with strength (.., H, Q or 1) times column (B,K) added to the scores -> (B,Q,H,D).

    PASTA in one line: strength 1 in steered heads and 0 elsewhere, column log(alpha) outside the
    span and 0 inside. More than one query carry it in a further dimension, `strength` in the query
    and column / scaling in the key, and the mask stays what it was; where the kernel takes a row
    of biases as it is, it gets that.
    """
    B, H, Q, D = call.query.shape
    dtype = call.query.dtype
    if Q == 1:
        call.mask = _plus((strength[..., None] * column[:, None, None]).to(dtype), call.mask)
        return call.attend()
    if strength.shape[-1] == 1 and _takes_a_row(call):
        row = (strength[..., None] * column[:, None, None]).expand(B, H, 1, -1)
        given = (call.query, call.key, call.value, 0.0, True)
        return _KERNEL(*given, attn_mask=row, scale=call.scaling)[0].transpose(1, 2)
    parts = _parts(column / call.scaling, dtype)
    align = _ALIGN.get(call.query.device.type, 8)
    parts = F.pad(parts, (0, -(D + parts.shape[-1]) % align))  # (B,K,n)
    n = parts.shape[-1]
    query = strength.to(dtype)[..., None].expand(B, H, Q, n)
    key = parts[:, None].expand(B, call.key.shape[1], -1, n)
    call.query = torch.cat([call.query, query], dim=-1)
    call.key = torch.cat([call.key, key], dim=-1)
    width = call.value.shape[-1]
    call.value = F.pad(call.value, (0, n))  # the fast kernels want one width for all three
    return call.attend()[..., :width]


def _takes_a_row(call: AttentionCall) -> bool:
    """A causal prompt on a CPU, with nobody to see the call, and no gradients to keep."""
    return (
        _KERNEL is not None
        and call.query.device.type == "cpu"
        and call.query.dtype != torch.float64  # the mask is float32
        and call.mask is None
        and call.recorder is None
        and not call.zero_sink
        and not torch.is_grad_enabled()
        and not call.options.get("dropout")
        and call.options.get("is_causal") is not False
        and getattr(call.module, "is_causal", True)
        and call.query.shape[2] == call.key.shape[2]
        and call.query.shape[-1] == call.value.shape[-1]
        and (_GROUPS or call.query.shape[1] == call.key.shape[1])
    )


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


def share(call: AttentionCall, inside: Tensor) -> Tensor:
    """Weight each query puts on the keys `inside` (B,K), before any bias -> (B,H,Q).

    Attention itself sums it: over values that are 1 inside and 0 outside. No weights are made.
    """
    value = torch.zeros_like(call.value)
    value[..., 0] = inside[:, None]
    plain = replace(call, value=value, recorder=None)
    return plain.attend()[..., 0].transpose(1, 2).float()
