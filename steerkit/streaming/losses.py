"""Losses of a long text: StreamingLLM against what it replaces (2309.17453, section 4.1).

`token_losses` reads a text once, with all tokens cached (dense) or few (window attention,
StreamingLLM). `recomputed_losses` reads the last tokens anew for each token. Axes: B batch, T
tokens, V vocabulary, P positions, L layers. Losses in nats.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from steerkit.attention.hook import use_attention_function
from steerkit.attention.rope import rope_kinds
from steerkit.chat import check_ids
from steerkit.models import Model
from steerkit.streaming.sink_cache import SinkCache, changes_with_length

_BATCH_TOKENS = 8192  # tokens per forward of re-computation


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """In nats, for each token: (B,n,V), (B,n) -> (B,n) float32."""
    nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return nats.view_as(targets)


@torch.no_grad()
def token_losses(
    model: Model,
    ids: Tensor,
    *,
    sinks: int = 4,
    window: int | None = None,
    block: int = 256,
    cache: SinkCache | None = None,
    score: Callable[[Tensor, Tensor], Tensor] = negative_log_likelihood,
) -> Tensor:
    """Loss of each next token of a stream: ids (B,T) -> (B,T-1) float32 on the CPU.

    `window=None` is dense: all earlier tokens are kept, and memory grows. Otherwise a token sees
    the first `sinks` tokens, the `window` tokens before it and itself, at positions inside the
    cache: StreamingLLM, or window attention with `sinks=0`. Then memory and precision do not
    depend on T. The result is that of one token per forward; `block` tokens per forward are faster.
    A token costs a tenth to a third more than in a plain forward over sinks + window tokens, where
    it sees half of them on average (benchmarks/streaming.py).

    A `cache` continues its own stream, with its own sinks and window. `score(logits, targets)` may
    judge the predictions otherwise.

    >>> import steerkit
    >>> model, tokenizer = steerkit.load("tiny-stream")
    >>> ids = tokenizer("Rome is far from here. " * 30, return_tensors="pt").input_ids
    >>> losses = steerkit.token_losses(model, ids, sinks=4, window=60)
    >>> losses.shape[1] == ids.shape[1] - 1
    True
    """
    ids = _checked(model, ids)
    if block < 1:
        raise ValueError(f"block={block}: expected at least 1 token per forward (256 suits a CPU)")
    T, dense = ids.shape[1], window is None and cache is None
    if dense:
        _refuse_length(model, T - 1)
        past = DynamicCache(config=model.config)
        past.prompt_length = T - 1  # for steering: it comes in blocks
    else:
        past = SinkCache(model, sinks=sinks, window=window) if cache is None else cache
    scores = torch.empty(ids.shape[0], T - 1)
    # A SinkCache switches the attention function itself, but for each forward anew.
    with nullcontext() if dense else use_attention_function(model):
        for start in tqdm(range(0, T - 1, block), unit="block", delay=2, leave=False):
            piece = ids[:, start : start + block + 1].to(model.device)
            logits = model(input_ids=piece[:, :-1], past_key_values=past, use_cache=True).logits
            scores[:, start : start + block] = score(logits, piece[:, 1:])
    return scores


@torch.no_grad()
def recomputed_losses(
    model: Model,
    ids: Tensor,
    *,
    length: int,
    positions: Sequence[int] | Tensor | None = None,
    first: Sequence[int] = (),
) -> Tensor:
    """Sliding window with re-computation: each loss from a fresh forward over `length` tokens.

    ids (B,T) -> (B,P) at `positions` of `token_losses`' last axis (default: all T-1). Position p
    predicts token p+1 from tokens max(0, p+1-length) to p. `first`: token ids in front of each
    window that has left the start of the stream, for a model whose texts always began with them.

    >>> import steerkit
    >>> model, tokenizer = steerkit.load("tiny-stream")
    >>> ids = tokenizer("Rome is far from here. " * 30, return_tensors="pt").input_ids
    >>> steerkit.recomputed_losses(model, ids, length=64, positions=[80, 100]).shape
    torch.Size([1, 2])
    """
    ids = _checked(model, ids)
    T = ids.shape[1]
    at = torch.arange(T - 1) if positions is None else torch.as_tensor(positions, dtype=torch.long)
    if at.ndim != 1 or not len(at) or at.min() < 0 or at.max() >= T - 1:
        raise ValueError(f"positions: expected some of 0 .. {T - 2}, the losses of {T} tokens")
    _refuse_length(model, min(length, T - 1))
    losses = torch.empty(ids.shape[0], len(at))
    early = at < length - 1
    if early.any():  # their windows begin with the stream: one causal forward has them all
        start = ids[:, :length].to(model.device)
        logits = model(input_ids=start[:, :-1], use_cache=False).logits
        losses[:, early] = negative_log_likelihood(logits, start[:, 1:]).cpu()[:, at[early]]
    if not early.all():
        windows = ids.unfold(1, length + 1, 1)[:, at[~early] - length + 1].flatten(0, 1)
        front = torch.tensor(first, dtype=torch.long, device=ids.device).expand(len(windows), -1)
        windows = torch.cat([front, windows], dim=1)  # (B*P, tokens), the last one is the target
        nats, pieces = [], windows.split(max(1, _BATCH_TOKENS // length))
        for piece in tqdm(pieces, unit="batch", delay=2, leave=False):
            inputs, target = piece[:, :-1].to(model.device), piece[:, -1:].to(model.device)
            logits = model(input_ids=inputs, use_cache=False, logits_to_keep=1).logits
            nats.append(negative_log_likelihood(logits, target).cpu())
        losses[:, ~early] = torch.cat(nats).view(len(ids), -1)
    return losses


def _checked(model: Model, ids: Tensor) -> Tensor:
    """`ids` (B,T) as int64; ValueError if they are no texts, or if the model sees its targets."""
    check_ids(model, ids)
    layers = model.base_model.modules()
    causal = [layer.is_causal for layer in layers if hasattr(layer, "is_causal")]
    if causal and not any(causal):
        raise ValueError(
            f"{type(model).__name__} is bidirectional: it sees each token that it should predict, "
            "so its losses mean nothing; use a causal language model"
        )
    return ids.long()


def _refuse_length(model: Model, tokens: int) -> None:
    """Positions beyond a learned table, or where frequencies begin to change."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    static = rope_kinds(model) and not changes_with_length(model)
    if limit is not None and tokens > limit and not static:
        raise ValueError(
            f"{tokens} tokens at once: this model's positions end, or change their meaning, "
            f"at {limit}; cut the stream, or use a model with static rotary positions"
        )
