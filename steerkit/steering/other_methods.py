"""Other steering methods: other biases on the keys of a span.

Each method adds something to the scores of the spans' keys and nothing to the other keys. By
default it does so in all layers and heads, as its paper does; PASTA chooses heads. Spans as for
`emphasise`: (start, end) lists by prompt, or a bool mask (B,T).

All are one operator. Let psi be the share of its weight that a query puts on the spans without
steering. A bias of b nats multiplies the odds psi / (1 - psi) by exp(b), and keeps the proportions
on either side. The methods differ in b: a constant (`additive_bias`, `instaboost`, and PASTA with
b = -log(alpha)), or a function of psi (`spotlight`, `split_softmax`). So compare them at equal b,
not at their defaults. One more pass of the attention kernel computes psi, and no (Q,K) weights.

Axes: B batch, H query heads, Q query positions, T prompt tokens.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from steerkit.attention.heads import Heads
from steerkit.attention.hook import AttentionCall
from steerkit.models import Model
from steerkit.spans import Spans
from steerkit.steering.key_bias import Strength, key_bias, number


@contextmanager
def additive_bias(
    model: Model, spans: Spans, bias: float, *, heads: Heads | None = None
) -> Iterator[None]:
    """Add `bias` nats to the scores of the spans' keys: their weights are multiplied by exp(bias).

    The common form of the family. For the prompt it is PASTA with alpha = exp(-bias). Generated
    keys differ: in PASTA they weigh as much as the spans, here as much as all other keys.

    >>> import torch
    >>> from steerkit import additive_bias, load
    >>> model, tokenizer = load("tiny")
    >>> ids = tokenizer("Clara lives in Oslo.", return_tensors="pt")["input_ids"]
    >>> with torch.no_grad(), additive_bias(model, [[(0, 2)]], bias=0.0):
    ...     steered = model(ids).logits
    >>> torch.equal(steered, model(ids).logits)  # 0 nats: bit-equal to no steering
    True
    """
    if not math.isfinite(number(bias)):
        raise ValueError(f"bias={bias}: expected a finite number of nats (0 = no steering)")
    with key_bias(model, spans, heads, inside=bias):
        yield


@contextmanager
def instaboost(
    model: Model, spans: Spans, *, multiplier: float, heads: Heads | None = None
) -> Iterator[None]:
    """InstABoost (2506.13734): weights on the instruction times `multiplier`, then renormalised.

    As in the lines its authors publish: the attention pattern of every layer and head, times the
    multiplier, divided by its sum. Their later version states a constant bias log(multiplier) on
    the instruction's keys, which is the same operator.
    """
    if not 1 <= number(multiplier) < math.inf:
        raise ValueError(f"multiplier={multiplier}: expected a number >= 1 (1 = no steering)")
    with additive_bias(model, spans, math.log(multiplier), heads=heads):
        yield


@contextmanager
def spotlight(
    model: Model,
    spans: Spans,
    *,
    target: float = 0.1,
    heads: Heads | None = None,
    exact: bool = False,
) -> Iterator[None]:
    """SpotLight (2505.12025, equations 2-5): the bias depends on what the spans get already.

    Queries that put less than `target` of their weight on the spans get log(target / psi) added
    there, others nothing. After renormalising the share is target / (1 + target - psi): raised
    towards the target, and below it. With `exact` the bias is the difference of the log odds,
    logit(target) - logit(psi), and the share becomes the target. The equations were read in
    independent accounts of the paper, not in the paper itself.
    """
    if not 0 < number(target) < 1:
        raise ValueError(f"target={target}: expected a share of the weight, 0 < target < 1")

    def bias(psi: Tensor) -> Tensor:
        raised = target / psi
        odds = raised * (1 - psi) / (1 - target) if exact else raised
        return odds.log().clamp(min=0)

    with key_bias(model, spans, heads, inside=1.0, strength=_by_psi(bias)):
        yield


@contextmanager
def split_softmax(
    model: Model, spans: Spans, *, exponent: float, heads: Heads | None = None
) -> Iterator[None]:
    """Split-softmax (2402.10962): the spans' share psi of each query becomes psi ** exponent.

    Proportions within the spans and outside them stay, so the bias moves the log odds of psi to
    those of psi ** exponent. 1 = no steering, towards 0 = everything on the spans. Our reading of
    the paper's formula: weights are split into the spans and all the rest, the reply included.
    """
    if not 0 < number(exponent) <= 1:
        raise ValueError(f"exponent={exponent}: expected 0 < exponent <= 1 (1 = no steering)")

    def strength(psi: Tensor) -> Tensor:
        log_psi = psi.log()
        return (exponent - 1) * log_psi + (_log1mexp(log_psi) - _log1mexp(exponent * log_psi))

    inside = 0.0 if exponent == 1 else 1.0  # 0: bit-equal to no steering, and not only nearly
    with key_bias(model, spans, heads, inside=inside, strength=_by_psi(strength)):
        yield


def _by_psi(strength: Callable[[Tensor], Tensor]) -> Strength:
    """`strength` of psi, for every query that sees both a span and something else.

    Attention itself sums psi: over values that are 1 inside and 0 outside. No weights are made.
    """

    def of(call: AttentionCall, inside: Tensor) -> Tensor:
        value = torch.zeros_like(call.value)
        value[..., 0] = inside[:, None]  # `inside` (B,K) is the bias: 1 in the spans, else 0
        psi = call.attend(value=value, recorder=None)[..., 0].transpose(1, 2).float()  # (B,H,Q)
        undecided = (psi > 0) & (psi < 1)
        return torch.where(undecided, strength(psi.where(undecided, 0.5)), 0.0)

    return of


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0."""
    return (-torch.expm1(x)).log()
