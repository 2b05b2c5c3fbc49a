"""Who attends to whom, in long texts: heat maps and shares made chunk by chunk (Figure 10 of Llama
2, 2307.09288), so that no (L,H,T,T) is ever held.

Whatever is attached to the model stays in force: inside `emphasise` the weights are the steered
ones. A literal maximum over a network is saturated by attention sinks; `skip` leaves the first keys
out. Axes: L layers, H query heads, Q/K query/key positions, T tokens, N turns or groups.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from steerkit.attention.record import WeightChunk, record_weights
from steerkit.spans import span_mask

Spans = Tensor | Sequence[tuple[int, int]]
"""A bool mask (T,), or a list of token ranges [start, end); their union counts."""


# Heat maps


def attention_map(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    bins: int = 64,
    reduce: str = "max",
    layers: Iterable[int] | None = None,
    heads: Iterable[tuple[int, int]] | None = None,
    skip: int = 0,
) -> Tensor:
    """Attention of one text, ids (T,) or (1,T), neighbouring tokens binned -> (bins, bins).

    Rows are query bins, columns key bins, token t in bin t * bins // T. A cell is the "max" or the
    "mean" over its causal pairs of tokens and over `layers`, or `heads` as (layer, index), by
    default all. Cells in the future are 0. The first `skip` keys are left out.
    """
    ids = one_text(model, ids)
    T = ids.shape[1]
    if not 1 <= bins <= T:
        raise ValueError(f"bins={bins}: expected 1 <= bins <= {T}, the number of tokens")
    if not 0 <= skip < T:
        raise ValueError(f"skip={skip}: expected 0 <= skip < {T}, the number of tokens")
    cells = _Cells(T, bins, skip)
    chosen = _chosen(model, layers, heads)
    if reduce not in ("max", "mean"):
        raise ValueError(f'reduce={reduce!r}: expected "max" or "mean"')

    def record(chunk: WeightChunk) -> None:
        weights = chunk.weights[0, chosen[chunk.layer]]  # (heads,q,K)
        if reduce == "max":
            cells.add(chunk.start, weights.amax(0), "amax")
        else:
            cells.add(chunk.start, weights.sum(0), "sum")

    record_weights(model, ids, record, layers=chosen)
    if reduce == "max":
        return cells.total.cpu()
    pairs = cells.pairs() * sum(len(index) for index in chosen.values())
    return (cells.total.double().cpu() / pairs.clamp(min=1)).float()


class _Cells:
    """The cells of a binned map, filled chunk by chunk."""

    def __init__(self, T: int, bins: int, skip: int) -> None:
        self.T, self.bins, self.skip = T, bins, skip
        self.bin_of = torch.arange(T) * bins // T
        self.total = torch.zeros(bins, bins)

    def add(self, start: int, weights: Tensor, how: str) -> None:
        """weights (q,K) of query rows from `start` into their cells, by "amax" or "sum"."""
        weights[:, : self.skip] = 0
        self.total, bin_of = self.total.to(weights.device), self.bin_of.to(weights.device)
        columns = weights.new_zeros(len(weights), self.bins)
        columns.scatter_reduce_(1, bin_of.expand(len(weights), -1), weights, how)
        rows = bin_of[start : start + len(weights), None].expand_as(columns)
        self.total.scatter_reduce_(0, rows, columns, how)

    def edges(self) -> list[int]:
        """First token of each bin, and T: (bins + 1)."""
        return [-(-b * self.T // self.bins) for b in range(self.bins + 1)]

    def pairs(self) -> Tensor:
        """Number of causal pairs in each cell (bins, bins), in O(T bins)."""
        edges = torch.tensor(self.edges())
        seen = torch.arange(1, self.T + 1)[:, None]  # query i sees keys below i + 1
        counts = torch.minimum(edges[1:], seen) - edges[:-1].clamp(min=self.skip)
        pairs = torch.zeros(self.bins, self.bins, dtype=torch.long)
        return pairs.index_add_(0, self.bin_of, counts.clamp(min=0))


def _chosen(
    model: PreTrainedModel,
    layers: Iterable[int] | None,
    heads: Iterable[tuple[int, int]] | None,
) -> dict[int, list[int]]:
    """{layer: query heads} that are looked at."""
    config = model.config.get_text_config()
    L, H = config.num_hidden_layers, config.num_attention_heads
    if layers is not None and heads is not None:
        raise ValueError("layers and heads were both given: heads name their layers, give one")
    pairs = [(layer, h) for layer in (range(L) if layers is None else layers) for h in range(H)]
    pairs = pairs if heads is None else [tuple(head) for head in heads]
    if wrong := [pair for pair in pairs if not (0 <= pair[0] < L and 0 <= pair[1] < H)]:
        raise ValueError(
            f"(layer, head) {wrong[0]}: expected 0 <= layer < {L} and 0 <= head < {H} query heads"
        )
    if not pairs:
        raise ValueError("no heads: give at least one layer or (layer, head), or None for all")
    return {layer: sorted({h for at, h in pairs if at == layer}) for layer, _ in sorted(pairs)}


# Shares


class Attended(NamedTuple):
    """What each query row gives to a set of keys, (L,H,T) each."""

    share: Tensor  # sum of its weights, 0..1
    peak: Tensor  # largest of its weights


def span_attention(model: PreTrainedModel, ids: Tensor, spans: Spans) -> Attended:
    """Share and largest weight that every query of one text, ids (T,) or (1,T), gives to `spans`.

    The peak is Figure 10's quantity (2307.09288, section 3.3) before the maximum over queries,
    layers and heads is taken.
    """
    ids = one_text(model, ids)
    keys = key_mask(spans, ids.shape[1]).nonzero()[:, 0].to(model.device)
    found = Attended(*(_per_head(model, ids.shape[1]) for _ in range(2)))

    def record(chunk: WeightChunk) -> None:
        weights = chunk.weights[0].index_select(-1, keys)  # (H,q,span)
        here = slice(chunk.start, chunk.start + weights.shape[1])
        found.share[chunk.layer, :, here] = weights.sum(-1).cpu()
        found.peak[chunk.layer, :, here] = weights.amax(-1).cpu()

    record_weights(model, ids, record)
    return found


def span_share(model: PreTrainedModel, ids: Tensor, spans: Spans) -> Tensor:
    """Attention mass that each query puts on the union of `spans`: ids (T,) or (1,T) -> (L,H,T)."""
    return span_attention(model, ids, spans).share


def attention_received(
    model: PreTrainedModel,
    ids: Tensor,
    queries: tuple[int, int],
    *,
    reduce: str = "max",
    heads: Iterable[tuple[int, int]] | None = None,
) -> Tensor:
    """What each token gets from the queries [start, end): the "max" or "mean" weight -> (T,).

    Over `heads` as (layer, index), by default all; ids (T,) or (1,T).
    """
    ids = one_text(model, ids)
    start, end = queries
    if not 0 <= start < end <= ids.shape[1]:
        raise ValueError(f"queries [{start}, {end}): expected 0 <= start < end <= {ids.shape[1]}")
    if reduce not in ("max", "mean"):
        raise ValueError(f'reduce={reduce!r}: expected "max" or "mean"')
    chosen = _chosen(model, None, heads)
    found = torch.zeros(ids.shape[1])

    def record(chunk: WeightChunk) -> None:
        first, last = (max(0, row - chunk.start) for row in (start, end))
        here = chunk.weights[0, chosen[chunk.layer], first:last]  # (heads,q,K)
        if here.shape[1] and reduce == "max":
            torch.maximum(found, here.amax((0, 1)).cpu(), out=found)
        elif here.shape[1]:
            found.add_(here.sum((0, 1)).cpu())

    record_weights(model, ids, record, layers=chosen)
    rows_read = (end - start) * sum(len(index) for index in chosen.values())
    return found if reduce == "max" else found / rows_read


def _per_head(model: PreTrainedModel, T: int) -> Tensor:
    config = model.config.get_text_config()
    return torch.zeros(config.num_hidden_layers, config.num_attention_heads, T)


# What comes in


def key_mask(spans: Spans, T: int) -> Tensor:
    """The union of `spans` as a bool mask (T,)."""
    row = spans.flatten()[None] if isinstance(spans, Tensor) else [list(spans)]
    inside, exact = span_mask(row)
    if (ends := inside.shape[1]) > T or (exact and ends < T):
        far = (
            f"mask of {ends}" if exact else "span [{}, {})".format(*max(spans, key=lambda s: s[1]))
        )
        raise ValueError(
            f"{far}: expected at most {T}, the number of tokens (a mask as many): what belongs to "
            "another text cannot be measured in this one"
        )
    return F.pad(inside[0], (0, T - ends))


def one_text(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """`ids` as (1,T), checked against the model's positions.

    More tokens than a rotary model was trained on only warn: its attention is still computed, but
    at distances that it never saw. Learned positions end, so there it is an error.
    """
    ids = torch.as_tensor(ids)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise ValueError(
            f"ids of shape {tuple(ids.shape)}: expected one text of two tokens or more"
        )
    T, config = ids.shape[1], model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or limit >= T:
        return ids
    known = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not known]
    if any(limit <= table.num_embeddings < T for table in tables):
        raise ValueError(
            f"{T} tokens, and {type(model).__name__} has {limit} learned positions: shorten the "
            "text"
        )
    warnings.warn(
        f"{T} tokens, and the model was trained on {limit} positions: weights beyond them are "
        "computed, but say little about the model at work",
        stacklevel=3,
    )
    return ids
