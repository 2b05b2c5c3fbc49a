"""Relatives of PASTA: other biases on the keys of a span, through the same door.

Each adds something to the scores of the spans' keys and nothing to the others; by default in all
layers and heads, as their papers do, where PASTA chooses heads. Spans as for `emphasise`: (start,
end) lists by row, or a bool mask (B,T). Two of them ask every query for psi, the weight that it
puts on the spans un-steered: one more pass of the same attention kernel, no (Q,K) weights.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steerkit.attention.hook import AttentionCall
from steerkit.spans import Spans, span_mask
from steerkit.steering.key_bias import Heads, Strength, key_bias, share
from steerkit.steering.prompt_bias import Columns


@contextmanager
def additive_bias(
    model: PreTrainedModel, spans: Spans, bias: float, *, heads: Heads | None = None
) -> Iterator[None]:
    """Add `bias` nats to the scores of the spans' keys: weights there times exp(bias).

    The common form of the family. For a prompt it is PASTA with alpha = exp(-bias), but not for
    keys generated later, which weigh as much as the spans in PASTA and as all others here.
    """
    if not math.isfinite(bias):
        raise ValueError(f"bias={bias}: expected a finite number of nats (0 = no steering)")
    with key_bias(model, _inside(spans, bias), heads):
        yield


@contextmanager
def instaboost(
    model: PreTrainedModel, spans: Spans, *, multiplier: float, heads: Heads | None = None
) -> Iterator[None]:
    """InstABoost (2506.13734): weights on the instruction times `multiplier`, rows renormalised.

    As in the lines its authors publish: the attention pattern of every layer and head, times the
    multiplier, divided by its sum. Their later version states a constant bias log(multiplier) on
    the instruction's keys, which is the same operator.
    """
    if not 1 <= multiplier < math.inf:
        raise ValueError(f"multiplier={multiplier}: expected a number >= 1 (1 = no steering)")
    with additive_bias(model, spans, math.log(multiplier), heads=heads):
        yield


@contextmanager
def spotlight(
    model: PreTrainedModel, spans: Spans, *, target: float = 0.1, heads: Heads | None = None
) -> Iterator[None]:
    """SpotLight (2505.12025, equations 2-5): a bias that depends on what the spans get already.

    Queries that put less than `target` of their weight on the spans get log(target / psi) added
    there, others nothing. After renormalising the share is target / (1 + target - psi): raised
    towards the target, and below it. Those equations were read in an independent implementation's
    account of them, bounds included, not in the paper itself.
    """
    if not 0 < target < 1:
        raise ValueError(f"target={target}: expected a share of the weight, 0 < target < 1")

    def strength(psi: Tensor) -> Tensor:
        return (target / psi).log().clamp(min=0)

    with key_bias(model, _inside(spans, 1.0), heads, strength=_by_share(strength)):
        yield


@contextmanager
def split_softmax(
    model: PreTrainedModel, spans: Spans, *, exponent: float, heads: Heads | None = None
) -> Iterator[None]:
    """Split-softmax (2402.10962): the spans' share psi of each row becomes psi ** exponent.

    Within the spans and outside them the proportions stay, so it is the bias that moves the log
    odds of psi to those of psi ** exponent. 1 = no steering, towards 0 = everything on the spans.
    Our reading of the paper's formula: the row is split into the spans and all the rest, the reply
    included.
    """
    if not 0 < exponent <= 1:
        raise ValueError(f"exponent={exponent}: expected 0 < exponent <= 1 (1 = no steering)")

    def strength(psi: Tensor) -> Tensor:
        log_psi = psi.log()
        return (exponent - 1) * log_psi + (_log1mexp(log_psi) - _log1mexp(exponent * log_psi))

    if exponent == 1:  # the same numbers, and not only nearly
        with additive_bias(model, spans, 0.0, heads=heads):
            yield
        return
    with key_bias(model, _inside(spans, 1.0), heads, strength=_by_share(strength)):
        yield


def _inside(spans: Spans, bias: float) -> Columns:
    inside, exact = span_mask(spans)
    return Columns(inside * bias, inside, torch.zeros(len(inside), 1), exact)


def _by_share(strength: Callable[[Tensor], Tensor]) -> Strength:
    """`strength` of psi, for every query that sees both a span and something else."""

    def of(call: AttentionCall, column: Tensor) -> Tensor:
        psi = share(call, column)  # (B,H,Q); the column is 1 inside
        undecided = (psi > 0) & (psi < 1)
        return torch.where(undecided, strength(psi.where(undecided, 0.5)), 0.0)

    return of


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0."""
    return (-torch.expm1(x)).log()
