"""PASTA, post-hoc attention steering (2311.02262, equation 2), on any model behind the door.

In chosen heads the weights on tokens outside the emphasised spans are multiplied by alpha and each
row is renormalised, which is to add log(alpha) to the scores of those keys before the softmax: a
bias that depends on the key alone. Axes: B batch, T prompt tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steerkit.spans import Spans, span_mask
from steerkit.steering.key_bias import Head, Heads, key_bias
from steerkit.steering.prompt_bias import Columns

__all__ = ["Head", "emphasise"]


@contextmanager
def emphasise(
    model: PreTrainedModel,
    spans: Spans,
    heads: Heads,
    *,
    alpha: float = 0.01,
    keep_sinks: int = 0,
) -> Iterator[None]:
    """Steer `heads` towards `spans` in every forward and `generate` inside the `with`.

    Weights on prompt tokens outside the union of a row's spans are multiplied by `alpha`; tokens
    that come later keep weight 1 (as in the official code), and so do the first `keep_sinks` real
    tokens. A span with an alpha of its own weighs 1 / that alpha times what is outside; outside
    tokens are multiplied by the smallest alpha of their row. Rows made of one prompt (beams,
    several samples) share its spans.

    Lists of spans take the first forward for the prompt. A mask states its length: the prompt may
    then come in chunks, or with tokens after it, which keep weight 1 (an answer to be scored,
    assisted decoding).

    Raises ValueError for bad spans, heads or alphas, for a prompt that does not hold the spans,
    for spans on padding, and for a `SinkCache`, whose slots are no longer prompt positions.
    """
    with key_bias(model, log_weights(spans, alpha), heads, keep_sinks=keep_sinks):
        yield


def log_weights(spans: Spans, alpha: float) -> Columns:
    """Log of equation 2's factor for each token: 0 inside, log(alpha) outside."""
    refuse_alpha(alpha)
    inside, exact = span_mask(spans)
    alphas = torch.ones(inside.shape, dtype=torch.float64)  # 1 outside
    if isinstance(spans, Tensor):
        alphas[inside] = alpha
    else:
        for row, each in zip(alphas, spans, strict=True):
            for start, end, *own in each:
                refuse_alpha(own[0] if own else alpha)
                row[start:end].clamp_(max=own[0] if own else alpha)
    outside = alphas.min(dim=1, keepdim=True).values
    return Columns((outside / alphas).log().float(), inside, outside.log().float(), exact)


def refuse_alpha(alpha: float) -> None:
    if not 0 < alpha <= 1:
        raise ValueError(
            f"alpha={alpha}: expected 0 < alpha <= 1 (1 = no steering, 0.01 = the paper's value)"
        )
