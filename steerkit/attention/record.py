"""Reading attention: weights are made chunk by chunk, so that no (L,H,T,T) need be held.

Recorders see what the model computes: inside `emphasise` the weights are the steered ones. The
model's output is untouched. Axes: B batch, L layers, H query heads, Hkv key heads, Q/K query/key
positions, q the queries of one chunk, D head size, T tokens.
"""

import math
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from steerkit.attention.hook import AttentionCall, layer_and_head_counts, record_calls
from steerkit.chat import check_ids
from steerkit.models import Model

# Numbers in one chunk of weights. On a CPU 4 MB stay in a core's cache (64 MB took twice the time).
# Other devices get 16 times as many, because there a launch costs more.
_CHUNK_NUMBERS = 2**20


class WeightChunk(NamedTuple):
    """Attention weights (B,H,q,K) of some successive queries of one layer."""

    layer: int
    queries: slice
    weights: Tensor


def record_weights(
    model: Model,
    ids: Tensor,
    record: Callable[[WeightChunk], None],
    *,
    layers: Collection[int] | None = None,
) -> None:
    """One forward over `ids` (B,T): `record` sees the weights of `layers`, by default of all.

    Chunks come layer by layer and query by query; one chunk is held at a time.
    """
    check_ids(model, ids)

    def record_call(layer: int, call: AttentionCall) -> None:
        if layers is None or layer in layers:
            for queries, weights in _weight_chunks(call):
                record(WeightChunk(layer, queries, weights))

    record_calls(model, ids, record_call)


def _weight_chunks(call: AttentionCall) -> Iterator[tuple[slice, Tensor]]:
    """The queries and their weights (B,H,q,K) in float32, chunk by chunk."""
    B, H, Q, _ = call.query.shape
    K = call.key.shape[2]
    key = call.key.repeat_interleave(H // call.key.shape[1], dim=1)  # (B,Hkv,K,D) -> (B,H,K,D)
    numbers = _CHUNK_NUMBERS * (1 if key.device.type == "cpu" else 16)
    step = max(1, numbers // (B * H * K))
    for start in range(0, Q, step):
        queries = slice(start, min(start + step, Q))
        scores = (call.query[:, :, queries] @ key.mT).float().mul_(call.scaling)
        yield queries, softmax(_masked(scores, call.mask, queries), call.zero_sink)


def _masked(scores: Tensor, mask: Tensor | None, queries: slice) -> Tensor:
    """Scores (B,H,q,K) under the mask's part for `queries`; changes `scores` in place."""
    if mask is None:  # causal, and without a cache query t is key t
        key = torch.arange(scores.shape[-1], device=scores.device)
        mask = key <= key[queries, None]
    elif mask.shape[-2] > 1:
        mask = mask[..., queries, :]
    if mask.dtype == torch.bool:
        return scores.masked_fill_(~mask, -math.inf)
    return scores.add_(mask)


def softmax(scores: Tensor, zero_sink: bool = False) -> Tensor:
    """Weights over the last axis; with `zero_sink` exp(s) / (1 + sum exp(s)), in all below 1."""
    if not zero_sink:
        return scores.softmax(-1)
    return F.pad(scores, (1, 0)).softmax(-1)[..., 1:]


def attention_weights(model: Model, ids: Tensor) -> Tensor:
    """All weights of one short text: ids (1,T) -> (L,H,T,T) float32 on the CPU.

    >>> import steerkit
    >>> model, tokenizer = steerkit.load("tiny")
    >>> ids = tokenizer("Who looks at whom?", return_tensors="pt").input_ids
    >>> weights = steerkit.attention_weights(model, ids)
    >>> weights.sum(-1).allclose(weights.new_ones(()))  # each query spreads a weight of one
    True
    """
    check_ids(model, ids, one_text=True)
    T = ids.shape[1]
    layers, heads = layer_and_head_counts(model)
    if layers * heads * T * T > 2**28:
        raise ValueError(f"{T} tokens have a gigabyte of weights or more: use attention_map")
    weights = torch.zeros(layers, heads, T, T)

    def record(chunk: WeightChunk) -> None:
        weights[chunk.layer, :, chunk.queries] = chunk.weights[0].cpu()

    record_weights(model, ids, record)
    return weights


def mean_weight_on_key(
    model: Model, ids: Tensor, *, k: int = 0, first: int | None = None
) -> Tensor:
    """Mean weight on key `k` over the queries >= `first` (default `k`): ids (B,T) -> (B,L,H).

    alpha_k of 2410.10781, section 3.
    """
    T = ids.shape[-1]
    first = k if first is None else first
    if not 0 <= k <= first < T:
        raise ValueError(f"k={k}, first={first}: expected 0 <= k <= first < {T} tokens")
    total = torch.zeros(len(ids), *layer_and_head_counts(model), dtype=torch.float64)

    def record(chunk: WeightChunk) -> None:
        on_key = chunk.weights[:, :, max(0, first - chunk.queries.start) :, k]  # (B,H,q)
        total[:, chunk.layer] += on_key.double().sum(-1).cpu()

    record_weights(model, ids, record)
    return (total / (T - first)).float()


def sink_metric(
    model: Model, ids: Tensor, *, eps: float = 0.3, k: int = 0, tokens: int = 64
) -> float:
    """Sink^eps_k of 2410.10781: fraction of heads with more than `eps` mean weight on key `k`.

    ids (B,T), of which the first `tokens` are used; the mean is over texts, layers and heads.

    >>> import steerkit
    >>> model, tokenizer = steerkit.load("tiny")
    >>> ids = tokenizer("Most heads look at the first token.", return_tensors="pt").input_ids
    >>> 0 <= steerkit.sink_metric(model, ids, tokens=ids.shape[1]) <= 1
    True
    """
    if not (0 < eps < 1 and k < tokens <= ids.shape[-1]):
        raise ValueError(
            f"eps={eps}, k={k}, tokens={tokens}: expected 0 < eps < 1 (0.3 in the paper) and "
            f"k < tokens <= {ids.shape[-1]}, the length of ids"
        )
    return (mean_weight_on_key(model, ids[:, :tokens], k=k) > eps).float().mean().item()


def value_norms(model: Model, ids: Tensor) -> Tensor:
    """Euclidean norm of each value vector: ids (B,T) -> (L,Hkv,T), mean over the batch."""
    check_ids(model, ids)
    norms: list[Tensor] = []

    def record(_: int, call: AttentionCall) -> None:
        norms.append(call.value.float().norm(dim=-1).mean(0).cpu())  # (B,Hkv,T,D) -> (Hkv,T)

    record_calls(model, ids, record)
    return torch.stack(norms)
