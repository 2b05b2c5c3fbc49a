"""Who attends to whom in long texts: heat maps and shares (Figure 10 of Llama 2, 2307.09288).

Weights are reduced chunk by chunk, so no (L,H,T,T) is ever held. A maximum over a whole network is
saturated by attention sinks: `skip` leaves the first keys out.

Axes: L layers, H query heads, Q/K query/key positions, q/k those of one chunk, T tokens.
"""

import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from steerkit.attention.heads import Heads, heads_by_layer, layer_and_head_counts
from steerkit.attention.record import WeightChunk, record_weights
from steerkit.attention.rope import rope_kinds
from steerkit.chat import check_ids
from steerkit.models import Model
from steerkit.spans import Span, span_mask

# Heat maps


def attention_map(
    model: Model,
    ids: Tensor,
    *,
    bins: int = 64,
    reduce: str = "max",
    heads: Heads | None = None,
    skip: int = 0,
    sink: bool = False,
) -> Tensor:
    """Attention of one text, ids (1,T), neighbouring tokens binned -> (bins, bins).

    Rows are query bins, columns key bins; token t is in bin t * bins // T. A cell is the "max" or
    the "mean" over its causal pairs of tokens (all pairs if the model is bidirectional) and over
    `heads` as (layer, index), by default all. The first `skip` keys are left out. `sink` puts one
    more column in front, (bins, 1 + bins): what goes to a sink that is no key, a learned one say.

    >>> import steerkit
    >>> model, tokenizer = steerkit.load("tiny")
    >>> ids = tokenizer("A map of sixteen cells or so.", return_tensors="pt").input_ids
    >>> steerkit.attention_map(model, ids, bins=4).shape
    torch.Size([4, 4])
    """
    _check_text(model, ids)
    T = ids.shape[1]
    if reduce not in ("max", "mean"):
        raise ValueError(f'reduce={reduce!r}: expected "max" or "mean"')
    if not (1 <= bins <= T and 0 <= skip < T):
        raise ValueError(f"bins={bins}, skip={skip}: expected 1 <= bins <= {T}, 0 <= skip < {T}")
    chosen, edges = heads_by_layer(model, heads), bin_edges(T, bins)
    bin_of = torch.arange(T) * bins // T
    by_key, causal = torch.zeros(bins, T), True  # rows are binned at once, keys in the end
    on_sink = torch.zeros(bins, 1)

    def collect(cells: Tensor, weights: Tensor) -> None:  # (keys,), (heads,q,keys)
        if reduce == "max":
            torch.maximum(cells, weights.flatten(0, 1).amax(0).cpu(), out=cells)
        else:
            cells += weights.flatten(0, 1).sum(0).cpu()

    def record(chunk: WeightChunk) -> None:
        nonlocal causal
        indices, weights = chosen[chunk.layer], chunk.weights[0]
        weights = weights if len(indices) == len(weights) else weights[indices]  # (heads,q,k)
        rest = chunk.sink[0, indices, :, None] if sink else None  # (heads,q,1)
        if chunk.queries.start == 0:  # does the first query see later keys?
            causal &= not weights[:, 0, 1:].any()
        for row in range(bin_of[chunk.queries.start], bin_of[chunk.queries.stop - 1] + 1):
            first = max(0, edges[row] - chunk.queries.start)
            queries = slice(first, edges[row + 1] - chunk.queries.start)
            collect(by_key[row, chunk.keys], weights[:, queries])
            if sink:
                collect(on_sink[row], rest[:, queries])

    record_weights(model, ids, record, layers=chosen)
    by_key[:, :skip] = 0
    how = "amax" if reduce == "max" else "sum"
    cells = torch.zeros(bins, bins).scatter_reduce(1, bin_of.expand(bins, T), by_key, how)
    if reduce == "mean":
        n = sum(map(len, chosen.values()))
        on_sink /= bin_of.bincount()[:, None] * n
        cells = (cells.double() / (_pairs(T, bins, skip, causal) * n).clamp(min=1)).float()
    return torch.cat([on_sink, cells], dim=1) if sink else cells


def bin_max(weights: Tensor, edges: Sequence[int]) -> Tensor:
    """Largest weight in each pair of bins, over layers and heads: (L,H,T,T), (B+1,) -> (B,B).

    Bin b is the tokens [edges[b], edges[b + 1]), so bins may follow turns. Figure 10 in one line:
    M[b,c] is the maximum over layers, heads, queries in bin b and keys in bin c.
    """
    bins = list(pairwise(edges))
    by_key = torch.stack([weights[..., a:b, :].amax((0, 1, 2)) for a, b in bins])  # (B,T)
    return torch.stack([by_key[:, a:b].amax(1) for a, b in bins], dim=1)


def bin_edges(T: int, bins: int) -> list[int]:
    """First token of each bin, and T: (bins + 1)."""
    return [-(-b * T // bins) for b in range(bins + 1)]


def _pairs(T: int, bins: int, skip: int, causal: bool) -> Tensor:
    """Number of pairs of tokens in each cell (bins, bins), in O(T bins)."""
    edges = torch.tensor(bin_edges(T, bins))
    visible = torch.arange(1, T + 1) if causal else torch.full((T,), T)  # keys below, by query
    keys = torch.minimum(edges[1:], visible[:, None]) - edges[:-1].clamp(min=skip)  # (T,bins)
    pairs = torch.zeros(bins, bins, dtype=torch.long)
    return pairs.index_add_(0, torch.arange(T) * bins // T, keys.clamp(min=0))


# Shares


class SpanAttention(NamedTuple):
    """What each query gives to a set of keys, (L,H,T) each."""

    share: Tensor  # sum of its weights, 0..1
    peak: Tensor  # largest of its weights


def span_attention(model: Model, ids: Tensor, spans: Sequence[Span]) -> SpanAttention:
    """Share and largest weight that every query of one text, ids (1,T), gives to `spans`.

    `spans` are token ranges [start, end); their union counts. The peak is Figure 10's quantity
    (2307.09288, section 3.3) before the maximum over queries, layers and heads is taken.
    """
    _check_text(model, ids)
    inside, _ = span_mask([spans])
    T = ids.shape[1]
    if (end := inside.shape[1]) > T:
        raise ValueError(f"the spans end at token {end}, past the {T} tokens of this text")
    keys = inside[0].nonzero()[:, 0]
    share, peak = torch.zeros(2, *layer_and_head_counts(model), T)

    def record(chunk: WeightChunk) -> None:
        here = keys[(keys >= chunk.keys.start) & (keys < chunk.keys.stop)] - chunk.keys.start
        if len(here):
            weights = chunk.weights[0, ..., here.to(chunk.weights.device)]  # (H,q,keys)
            share[chunk.layer, :, chunk.queries] = weights.sum(-1).cpu()
            peak[chunk.layer, :, chunk.queries] = weights.amax(-1).cpu()

    record_weights(model, ids, record)
    return SpanAttention(share, peak)


def span_share(model: Model, ids: Tensor, spans: Sequence[Span]) -> Tensor:
    """Attention mass that each query puts on the union of `spans`: ids (1,T) -> (L,H,T), in 0..1.

    >>> import steerkit
    >>> model, tokenizer = steerkit.load("tiny")
    >>> text = "Reply in capitals. Where is Lima?"
    >>> span = steerkit.find_span(tokenizer, text, "capitals")
    >>> ids = tokenizer(text, return_tensors="pt").input_ids
    >>> share = steerkit.span_share(model, ids, [span])
    >>> share[..., : span[0]].max().item()  # no query sees what comes after it
    0.0
    """
    return span_attention(model, ids, spans).share


def attention_received(
    model: Model, ids: Tensor, queries: Span, *, reduce: str = "max", heads: Heads | None = None
) -> Tensor:
    """The "max" or "mean" weight that each token of ids (1,T) gets from some queries -> (T,).

    `queries` is a range [start, end); `heads` are (layer, index), by default all. Holds (T,T): for
    texts that a person reads.
    """
    start, end = queries
    if not 0 <= start < end <= ids.shape[-1]:
        raise ValueError(f"queries [{start}, {end}): expected 0 <= start < end <= {ids.shape[-1]}")
    weights = attention_map(model, ids, bins=ids.shape[-1], reduce=reduce, heads=heads)[start:end]
    return weights.amax(0) if reduce == "max" else weights.mean(0)


# What comes in


def _check_text(model: Model, ids: Tensor) -> None:
    """One text, ids (1,T), that the model's positions reach to the end of.

    A rotary model computes attention at distances that it never saw, so there a long text is a
    warning. Learned positions end, so there it is an error.
    """
    check_ids(model, ids, one_text=True)
    T = ids.shape[1]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or T
    if limit < T and not rope_kinds(model):
        raise ValueError(f"{T} tokens, the model has {limit} learned positions: shorten the text")
    if limit < T:
        said = f"{T} tokens, the model was trained on {limit} positions: weights beyond say little"
        warnings.warn(said, stacklevel=3)
