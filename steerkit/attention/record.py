"""Reading attention: weights are made chunk by chunk, so that no (L,H,T,T) need be held.

Recorders see what the model computes: inside `emphasise` the weights are the steered ones. The
model's output is untouched. Axes: B batch, L layers, H query heads, Hkv key heads, Q/K query/key
positions, q the queries of one chunk, D head size, T tokens.
"""

import math
from collections.abc import Callable, Container, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from steerkit.attention.heads import layer_and_head_counts
from steerkit.attention.hook import AttentionCall, layers_of, record_calls
from steerkit.chat import check_ids
from steerkit.models import Model

# Numbers in one chunk of weights. On a CPU 4 MB stay in a core's cache (64 MB took twice the time).
# Other devices get 16 times as many, because there a launch costs more.
_CHUNK_NUMBERS = 2**20


class WeightChunk(NamedTuple):
    """Attention weights (B,H,q,k) of successive queries of one layer, on the keys some of them see.

    `keys` says which: all other weights of these queries are 0.
    """

    layer: int
    queries: slice
    keys: slice
    weights: Tensor

    @property
    def sink(self) -> Tensor:
        """(B,H,q): what the queries give to a sink that is no key (learned, or off-by-one)."""
        return (1 - self.weights.sum(-1)).clamp(min=0)


def record_weights(
    model: Model,
    ids: Tensor,
    record: Callable[[WeightChunk], None],
    *,
    layers: Container[int] | None = None,
) -> None:
    """One forward over `ids` (B,T): `record` sees the weights of `layers`, by default of all.

    Chunks come layer by layer and query by query; one chunk is held at a time.
    """
    check_ids(model, ids)

    def record_call(layer: int, call: AttentionCall) -> None:
        if layers is None or layer in layers:
            for chunk in _weight_chunks(call):
                record(WeightChunk(layer, *chunk))

    record_calls(model, ids, record_call)


def _weight_chunks(call: AttentionCall) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries, the keys they see, and the weights (B,H,q,k) in float32, chunk by chunk."""
    B, H, Q, D = call.query.shape
    Hkv, K = call.key.shape[1:3]
    key = call.key.contiguous()
    sink = None if call.sink is None else call.sink.float()[:, None, None]  # (H,1,1)
    numbers = _CHUNK_NUMBERS * (1 if key.device.type == "cpu" else 16) // (B * H)
    start = 0
    while start < Q:
        # The last of `step` causal queries sees start + step keys: step * (start + step) numbers.
        step = (math.isqrt(start**2 + 4 * numbers) - start) // 2 if call.causal else numbers // K
        queries = slice(start, min(start + max(1, step), Q))
        keys, bias = _visible_keys(call, queries)
        grouped = call.query[:, :, queries].reshape(B, Hkv, -1, D)  # by the key head that they use
        scores = (grouped @ key[:, :, keys].mT).float().mul_(call.scaling)
        scores = scores.view(B, H, -1, scores.shape[-1])
        if call.causal:  # without a cache query t is key t
            later = torch.ones_like(scores[0, 0, :, queries], dtype=torch.bool).triu_(1)
            scores[..., queries].masked_fill_(later, -math.inf)
        if bias is not None:
            scores.add_(bias)
        yield queries, keys, softmax(scores, sink)
        start = queries.stop


def _visible_keys(call: AttentionCall, queries: slice) -> tuple[slice, Tensor | None]:
    """The range of keys that `queries` see, and what the mask adds to their scores, (...,q,k)."""
    if (mask := call.mask) is None:
        return slice(0, queries.stop if call.causal else call.key.shape[2]), None
    if mask.shape[-2] > 1:
        mask = mask[..., queries, :]
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    numbers = visible.flatten(0, -2).any(0).nonzero()
    keys = slice(int(numbers[0]), int(numbers[-1]) + 1)
    mask = mask[..., keys]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -math.inf)
    return keys, mask


def softmax(scores: Tensor, sink: Tensor | None = None) -> Tensor:
    """Weights over the last axis; `sink` (...,1) is one more score, whose weight is left out.

    The zero sink, torch.zeros(1), gives exp(s) / (1 + sum exp(s)): in all below 1.
    """
    if sink is None:
        return scores.softmax(-1)
    return torch.cat([sink.expand(*scores.shape[:-1], 1), scores], dim=-1).softmax(-1)[..., 1:]


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
        weights[chunk.layer, :, chunk.queries, chunk.keys] = chunk.weights[0].cpu()

    record_weights(model, ids, record)
    return weights


def mean_weight_on_key(
    model: Model, ids: Tensor, *, k: int | None = 0, first: int | None = None
) -> Tensor:
    """Mean weight on key `k` over the queries >= `first` (default `k`): ids (B,T) -> (B,L,H).

    alpha_k of 2410.10781, section 3. `k=None` is the sink that is no key: the learned one of
    gpt-oss and others, or that of softmax-off-by-one; 0 without.
    """
    T = ids.shape[-1]
    first = k or 0 if first is None else first
    if not 0 <= (k or 0) <= first < T:
        raise ValueError(f"k={k}, first={first}: expected 0 <= k <= first < {T} tokens")
    total = torch.zeros(len(ids), *layer_and_head_counts(model), dtype=torch.float64)

    def record(chunk: WeightChunk) -> None:
        queries = slice(max(0, first - chunk.queries.start), None)
        if k is None:
            total[:, chunk.layer] += chunk.sink[:, :, queries].double().sum(-1).cpu()
        elif chunk.keys.start <= k < chunk.keys.stop:
            on_key = chunk.weights[:, :, queries, k - chunk.keys.start]  # (B,H,q)
            total[:, chunk.layer] += on_key.double().sum(-1).cpu()

    record_weights(model, ids, record)
    return (total / (T - first)).float()


def sink_metric(
    model: Model, ids: Tensor, *, eps: float = 0.3, k: int | None = 0, tokens: int = 64
) -> float:
    """Sink^eps_k of 2410.10781: fraction of heads with more than `eps` mean weight on key `k`.

    ids (B,T), of which the first `tokens` are used; the mean is over texts, layers and heads.
    `k=None` asks for the sink that is no key, as in `mean_weight_on_key`.

    >>> import steerkit
    >>> model, tokenizer = steerkit.load("tiny")
    >>> ids = tokenizer("Most heads look at the first token.", return_tensors="pt").input_ids
    >>> 0 <= steerkit.sink_metric(model, ids, tokens=ids.shape[1]) <= 1
    True
    """
    if not (0 < eps < 1 and (k or 0) < tokens <= ids.shape[-1]):
        raise ValueError(
            f"eps={eps}, k={k}, tokens={tokens}: expected 0 < eps < 1 (0.3 in the paper) and "
            f"k < tokens <= {ids.shape[-1]}, the length of ids"
        )
    mean = mean_weight_on_key(model, ids[:, :tokens], k=k)[:, list(layers_of(model))]
    return (mean > eps).float().mean().item()


def value_norms(model: Model, ids: Tensor) -> Tensor:
    """Euclidean norm of each value vector: ids (B,T) -> (L,Hkv,T), mean over the batch."""
    check_ids(model, ids)
    norms: list[Tensor] = []

    def record(_: int, call: AttentionCall) -> None:
        norms.append(call.value.float().norm(dim=-1).mean(0).cpu())  # (B,Hkv,T,D) -> (Hkv,T)

    record_calls(model, ids, record)
    return torch.stack(norms)
