"""PASTA, post-hoc attention steering (2311.02262, equation 2).

In the steered heads the attention weights on tokens outside the emphasised spans are multiplied by
alpha, and each query's weights are renormalised. Weights are exponentials of scores, so that is the
same as adding log(alpha) to the scores of those keys before the softmax.

Axes: B batch, T prompt tokens.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from steerkit.attention.heads import Heads
from steerkit.models import Model
from steerkit.spans import Spans
from steerkit.steering.key_bias import key_bias, number


@contextmanager
def emphasise(
    model: Model, spans: Spans, heads: Heads | None, *, alpha: float = 0.01
) -> Iterator[None]:
    """Steer `heads` (None: all) towards `spans` in every forward and `generate` inside the `with`.

    Weights on prompt tokens outside the union of a row's spans are multiplied by `alpha`. Generated
    tokens keep weight 1, as in the official code. Rows made of one prompt (beams, several samples)
    share its spans.

    `spans` are lists of (start, end), one list per prompt, and the first forward is taken for the
    prompt. Or a bool mask (B,T), which states the prompt's length: the prompt may then come in
    chunks, or together with tokens after it (an answer to be scored, assisted decoding), or again
    and again without a cache, longer by what was generated.

    Raises ValueError for bad spans, heads or alpha, for a prompt that does not hold the spans, for
    lists where the prompt's end is unclear, for spans on padding, and for spans that a `SinkCache`
    would evict: all must lie in its sinks (make the cache before the `with`). `verify.verify` shows
    that steering is on, and equals equation 2, on your model.

    >>> from steerkit import emphasise, find_span, load, reply
    >>> model, tokenizer = load("tiny")
    >>> city = "Igor Barton lives in Paris. Igor Barton lives in Madrid."
    >>> prompt = [{"role": "user", "content": f"{city} Tell me the city of Igor Barton."}]
    >>> reply(model, tokenizer, [prompt])
    ['Igor Barton lives in Madrid.']
    >>> span = find_span(tokenizer, prompt, "Igor Barton lives in Paris.")
    >>> with emphasise(model, [[span]], heads=[(2, 0), (2, 3)], alpha=0.01):
    ...     reply(model, tokenizer, [prompt])
    ['Igor Barton lives in Paris.']
    """
    check_alpha(alpha)
    with key_bias(model, spans, heads, outside=math.log(alpha)):
        yield


def log_weights(inside: Tensor, alpha: float) -> Tensor:
    """Log of equation 2's factor for each token, bool -> float32: 0 inside, log(alpha) outside."""
    return torch.where(inside, 0.0, math.log(alpha))


def check_alpha(alpha: float) -> None:
    """ValueError unless alpha is a number and 0 < alpha <= 1."""
    if not 0 < number(alpha) <= 1:
        raise ValueError(f"alpha={alpha}: expected 0 < alpha <= 1 (1 = no steering, paper: 0.01)")
