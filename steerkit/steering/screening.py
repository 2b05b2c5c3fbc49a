"""Algorithm 1 at a tenth of the price: one backward pass ranks all heads, the best are scored.

Steering a head adds s log(alpha) to its scores outside the spans, s from 0 to 1. The slope of a
prompt's score in s, at s = 0, is known for every head after one backward pass; it is a first-order
guess of what the head will do at s = 1. Successive halving over prompts then scores the likely
heads exactly. What that loses against the whole search, and what it saves, is measured.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steerkit.attention.hook import AttentionCall, Edit, attach
from steerkit.steering.head_search import (
    HeadTable,
    Prompt,
    answer_scores,
    describe,
    naive_scores,
    padded,
    rank,
    refuse_examples,
    score_heads,
    shape,
)
from steerkit.steering.key_bias import attend_biased
from steerkit.steering.pasta import refuse_alpha
from steerkit.steering.search import Search
from steerkit.streaming.latency import interleaved


class Screen(NamedTuple):
    """`table`: exact scores of the finalists on all prompts, of others on some or none (NaN).

    `slopes` (L,H): the guess. `rounds`: (heads, prompts) that were scored exactly, in turn.
    """

    table: HeadTable
    slopes: Tensor
    rounds: list[tuple[int, int]]


def bias_slopes(
    model: PreTrainedModel, examples: Sequence[Prompt], *, alpha: float = 0.01, batch: int = 16
) -> Tensor:
    """d score / d s of every head at s = 0, by prompt: (N,L,H), from one backward pass each."""
    refuse_alpha(alpha)
    refuse_examples(examples)
    found = [_slopes(model, examples[i : i + batch], alpha) for i in range(0, len(examples), batch)]
    return torch.cat(found)


def _slopes(model: PreTrainedModel, examples: Sequence[Prompt], alpha: float) -> Tensor:
    ids, keep, target = (x.to(model.device) for x in padded(examples))
    L, H = shape(model)
    steps = torch.zeros(L, len(ids), H, device=ids.device, requires_grad=True)
    column = torch.log(torch.where(keep, 1.0, alpha))

    def at(layer: int) -> Edit:
        def edit(call: AttentionCall) -> Tensor:
            strength = steps[layer, :, : call.query.shape[1], None]  # (B,H,1)
            return attend_biased(call, strength, column[:, -call.key.shape[2] :])

        return edit

    with attach(model, {layer: at(layer) for layer in range(L)}), torch.enable_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        (slopes,) = torch.autograd.grad(answer_scores(logits, ids, target).sum(), steps)
    return slopes.transpose(0, 1).cpu()


def screen_heads(
    model: PreTrainedModel,
    examples: Sequence[Prompt],
    *,
    keep: int = 4,
    alpha: float = 0.01,
    share: float = 0.25,
    batch: int = 16,
    seed: int = 0,
) -> Screen:
    """The best `keep` heads, probably: slopes on a `share` of the prompts, then halving.

    A twelfth of the heads (at least `keep` + 2) meets some prompts; each round halves the heads and
    doubles the prompts, until `keep` + 2 have met all.
    """
    size = shape(model)
    n = size[0] * size[1]
    if not 1 <= keep <= n - 2:
        raise ValueError(f"keep={keep}: expected 1 <= keep <= {n - 2} of {n} heads")
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: expected a part of the prompts in (0, 1]")
    order = random.Random(f"screen {seed}").sample(range(len(examples)), len(examples))
    few = [examples[i] for i in order[: max(1, round(share * len(order)))]]
    slopes = bias_slopes(model, few, alpha=alpha, batch=batch).mean(0)
    about = describe(model, examples, alpha)
    empty = torch.full((len(examples), *size), torch.nan)
    table = HeadTable(empty, torch.full((len(examples),), torch.nan), about)
    heads, done, rounds = rank(slopes)[: max(keep + 2, n // 12)], 0, []
    search = Search(model, examples, table, alpha, batch)
    while True:
        times = max(0, (len(heads) // (keep + 2)).bit_length() - 1)  # halvings still to come
        upto = max(1, len(order) >> times)
        search.fill(heads, order[done:upto])
        rounds.append((len(heads), upto))
        if upto == len(order):
            return Screen(table, slopes, rounds)
        done, met = upto, table.scores[order[:upto]].mean(0)
        heads = [h for h in rank(met) if h in set(heads)][: max(keep + 2, len(heads) // 2)]


def lost(screen: Screen, table: HeadTable, k: int) -> dict[str, float]:
    """What screening lost against the whole search, at `k` heads.

    "found": share of the true top k that is among the screen's. "regret": nats per answer token by
    which the mean score of the screen's heads is below that of the true ones.
    """
    true, got = table.top(k), screen.table.top(k)
    mean = table.mean
    regret = sum(mean[h].item() for h in true) / k - sum(mean[h].item() for h in got) / k
    return {"found": len(set(true) & set(got)) / k, "regret": regret}


def compared(
    model: PreTrainedModel,
    examples: Sequence[Prompt],
    *,
    keep: int = 4,
    alpha: float = 0.01,
    repeats: int = 1,
) -> dict[str, float]:
    """How many times faster than the naive loop "exact" and "screen" are, in turn; what they lose.

    "off": largest difference of an exact score from the naive one, nats. Others as in `lost`.
    """
    tables: dict[str, Any] = {}
    steps = {
        "naive": lambda: tables.update(naive=naive_scores(model, examples, alpha=alpha)),
        "exact": lambda: tables.update(exact=score_heads(model, examples, alpha=alpha)),
        "screen": lambda: tables.update(
            screen=screen_heads(model, examples, keep=keep, alpha=alpha)
        ),
    }
    seconds = interleaved(steps, repeats=repeats, warmup=0)
    off = (tables["naive"].scores - tables["exact"].scores).abs().max().item()
    faster = {name: seconds["naive"] / seconds[name] for name in ("exact", "screen")}
    return faster | {"off": off} | lost(tables["screen"], tables["exact"], keep)
