"""Which heads to steer: Algorithm 1 of PASTA (2311.02262, section 3.2).

Steer one head alone, score the model on profiling prompts, repeat for every head, take the best. A
prompt's score is the mean log-probability (nats) per token of its right answer, teacher forced.

- `naive_scores` is that loop, one forward per head.
- `score_heads` returns the same scores; it computes once what steering a head cannot change.
- `screen_heads` finds the best heads for a tenth of the price: one backward pass ranks all heads,
  and only the most promising are scored.
- `select_heads`, `shared_top_k`, `random_heads`: which heads to steer, given the scores.

Axes: N prompts, L layers, H query heads.
"""

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from steerkit.attention.heads import Head, Heads, heads_by_layer, layer_and_head_counts
from steerkit.files import read_json, write_text
from steerkit.models import Model
from steerkit.steering.pasta import check_alpha, emphasise
from steerkit.steering.scoring import Prompt, PromptBatch, answer_scores, padded

Prompts = Sequence[Prompt]
Measure = Callable[[Callable[..., AbstractContextManager] | None], Tensor]
"""measure(steer) -> (N,) numbers; `steer` is None, or (model, spans) -> a `with`."""


# --- the table ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadTable:
    """Every head's score on every prompt, and the score with no head steered.

    `scores` (N,L,H), NaN where a head was not scored; `baseline` (N,); `about` says of which model,
    task, alpha and number of prompts.
    """

    scores: Tensor
    baseline: Tensor
    about: dict[str, str | float]

    @property
    def mean(self) -> Tensor:
        """(L,H), mean over prompts."""
        return self.scores.mean(0)

    @property
    def gain(self) -> Tensor:
        """(L,H), mean over prompts of score - baseline: above 0 the head helps."""
        return (self.scores - self.baseline[:, None, None]).mean(0)

    def ranked(self) -> list[Head]:
        """All heads that were scored on all prompts, best first."""
        return rank(self.mean)

    def top(self, k: int) -> list[Head]:
        """The `k` best heads."""
        ranked = self.ranked()
        if not 1 <= k <= len(ranked):
            raise ValueError(f"k={k}: expected 1 <= k <= {len(ranked)} scored heads")
        return ranked[:k]

    def save(self, path: str | Path) -> None:
        """As JSON, in one step: a killed search leaves a whole table behind."""
        stored = {"about": self.about, "baseline": self.baseline.tolist()}
        write_text(Path(path), json.dumps(stored | {"scores": self.scores.tolist()}))


def load_table(path: str | Path) -> HeadTable:
    """A table that `save` or `score_heads(path=...)` wrote."""
    stored = read_json(Path(path))
    scores, baseline = torch.tensor(stored["scores"]), torch.tensor(stored["baseline"])
    return HeadTable(scores, baseline, stored["about"])


def rank(mean: Tensor) -> list[Head]:
    """Heads by their value in (L,H), best first, without those that are NaN."""
    order = mean.nan_to_num(-torch.inf).flatten().argsort(descending=True, stable=True)
    heads = [Head(*divmod(i, mean.shape[1])) for i in order.tolist()]
    return [head for head in heads if not mean[head].isnan()]


def _empty_table(model: Model, prompts: Prompts, alpha: float, task: str = "") -> HeadTable:
    """All scores are missing; ValueError for prompts and alphas that cannot be scored."""
    check_alpha(alpha)
    if not prompts:
        raise ValueError("no prompts: the heads are scored on at least one")
    for i, (ids, spans, answer) in enumerate(prompts):
        if not spans or any(not 0 <= start < end <= len(ids) for start, end in spans):
            given = f"prompt {i} of {len(ids)} tokens has spans {spans}"
            raise ValueError(f"{given}: expected at least one, and 0 <= start < end <= length")
        if not answer:
            raise ValueError(f"prompt {i} has no answer: give one, or score with score_heads_by")

    about = {"model": model.name_or_path, "task": task, "alpha": alpha, "prompts": len(prompts)}
    scores = torch.full((len(prompts), *layer_and_head_counts(model)), torch.nan)
    return HeadTable(scores, torch.full((len(prompts),), torch.nan), about)


# --- Algorithm 1 -------------------------------------------------------------------------------


def naive_scores(model: Model, prompts: Prompts, *, alpha: float = 0.01) -> HeadTable:
    """Algorithm 1 as the paper says it: steer one head after another, one whole forward each."""
    table = _empty_table(model, prompts, alpha)
    heads = _in_order(model, None)
    layer, index = torch.tensor(heads).T
    table.baseline[:], table.scores[:, layer, index] = _one_by_one(model, prompts, heads, alpha)
    return table


def _one_by_one(
    model: Model, prompts: Prompts, heads: list[Head], alpha: float
) -> tuple[Tensor, Tensor]:
    """The baseline (N,), and the scores (N, heads)."""
    score = partial(answer_scores_with_heads, model, prompts, alpha=alpha)
    return score([]), torch.stack([score([head]) for head in heads], dim=1)


@torch.no_grad()
def answer_scores_with_heads(
    model: Model, prompts: Prompts, heads: Heads, *, alpha: float = 0.01, batch: int = 16
) -> Tensor:
    """Scores (N,) of the prompts with `heads` steered together; no heads: without steering."""
    scores, heads = [], list(heads)
    for start in range(0, len(prompts), batch):
        ids, inside, target = padded(prompts[start : start + batch])
        with emphasise(model, inside, heads, alpha=alpha) if heads else nullcontext():
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits.cpu()
        scores.append(answer_scores(logits[:, :-1], ids[:, 1:], target[:, 1:]))
    return torch.cat(scores)


def score_heads_by(
    model: Model, measure: Measure, *, heads: Heads | None = None, alpha: float = 0.01
) -> HeadTable:
    """A table by any metric of prompts, with one head steered after another.

    The paper's own way: one run of generations per head, for tasks without a right answer to force.
    """
    baseline = measure(None).float()
    scores = torch.full((len(baseline), *layer_and_head_counts(model)), torch.nan)
    for head in _in_order(model, heads):
        scores[:, *head] = measure(partial(emphasise, heads=[head], alpha=alpha)).float()
    return HeadTable(scores, baseline, {"model": model.name_or_path, "alpha": alpha})


def score_heads(
    model: Model,
    prompts: Prompts,
    *,
    heads: Heads | None = None,
    alpha: float = 0.01,
    tokens: int | None = None,
    path: str | Path | None = None,
    task: str = "",
) -> HeadTable:
    """Score every head (or `heads`) alone on all prompts: Algorithm 1, exactly.

    `tokens` is the most that one forward reads (default: 1,024 on a CPU, 8,192 elsewhere): lower it
    when memory runs out. With `path` the table is written there as it grows, and a later call goes
    on where it ends; the file says of which model, `task` and alpha it is:

        prompts = to_prompts(tokenizer, read_examples("json.jsonl"))
        table = score_heads(model, prompts, path="json.table", task="json")

    Each prompt is scored by itself, so several processes can share the prompts. In a script that
    `accelerate launch` starts, all get the same table in this way:

        with PartialState().split_between_processes(prompts) as share:
            table = score_heads(model, share)
        scores, baseline = zip(*gather_object([(table.scores, table.baseline)]))
        table = HeadTable(torch.cat(scores), torch.cat(baseline), table.about)

    >>> from steerkit import load, score_heads
    >>> from steerkit.steering.tasks import to_prompts
    >>> from steerkit.tiny.tasks import TASKS
    >>> model, tokenizer = load("tiny")
    >>> examples = TASKS["biasbios"].examples(4, seed=0, split="profile")
    >>> table = score_heads(model, to_prompts(tokenizer, examples), heads=[(0, 0), (2, 0), (2, 3)])
    >>> [str(head) for head in table.ranked()]
    ['L2H0', 'L2H3', 'L0H0']
    """
    table = _empty_table(model, prompts, alpha, task)
    if path is not None and Path(path).exists():
        earlier = load_table(path)
        if earlier.about != table.about:
            raise ValueError(f"{path}: a table of {earlier.about}, not of {table.about}")
        table = earlier
    _fill(model, prompts, table, _in_order(model, heads), range(len(prompts)), tokens, path)
    return table


def every_head(layers: int, heads: int) -> list[Head]:
    """All heads, layer by layer."""
    return [Head(layer, index) for layer in range(layers) for index in range(heads)]


def _in_order(model: Model, heads: Heads | None) -> list[Head]:
    """`heads` (None: all) layer by layer, if the model has them."""
    by_layer = heads_by_layer(model, heads)
    return [Head(layer, index) for layer, indices in by_layer.items() for index in indices]


def _fill(
    model: Model,
    prompts: Prompts,
    table: HeadTable,
    heads: list[Head],
    which: Iterable[int],
    tokens: int | None = None,
    path: str | Path | None = None,
) -> None:
    """Write the scores of `heads` on the prompts `which` into the table, where they are missing."""
    layer, index = torch.tensor(heads).T
    missing = [i for i in which if table.scores[i, layer, index].isnan().any()]
    if not missing:
        return

    # Prompts of similar first span and length go together; all heads of a layer fit in one forward.
    tokens = tokens or (1024 if model.device.type == "cpu" else 8192)  # more is no faster
    missing.sort(key=lambda i: (prompts[i].first // 4, prompts[i].length))
    longest = max(prompts[i].length - prompts[i].first for i in missing)
    size = max(1, tokens // table.scores.shape[2] // longest)
    naive = False
    for start in tqdm(range(0, len(missing), size), unit="batch", delay=2, leave=False):
        batch = missing[start : start + size]
        options = model, [prompts[i] for i in batch], heads, table.about["alpha"]
        found = None if naive else _compute_once(*options, tokens, check=start == 0)
        naive = found is None
        table.baseline[batch], scores = found or _one_by_one(*options)
        table.scores[torch.tensor(batch)[:, None], layer, index] = scores
        if path is not None:
            table.save(path)


def _compute_once(
    model: Model, prompts: Prompts, heads: list[Head], alpha: float, tokens: int, check: bool
) -> tuple[Tensor, Tensor] | None:
    """As `_one_by_one`, with less work; None where layers exchange more than hidden states.

    For example keys of lower layers. `check` compares two heads with the naive loop: the
    last, whose lower layers are not computed again, and the first, whose bias passes through them.
    """
    try:
        batch = PromptBatch(model, prompts, alpha)
        scores = batch.scores(heads, tokens)
    except (AttributeError, IndexError, KeyError, TypeError):
        return None
    if check:
        _, naive = _one_by_one(model, prompts[:1], [heads[0], heads[-1]], alpha)
        tolerance = 1e-3 if model.dtype.itemsize > 2 else 0.1  # nats
        if (scores[:1, [0, -1]] - naive).abs().max() > tolerance:
            return None
    return batch.baseline, scores


# --- the screen --------------------------------------------------------------------------------


def bias_slopes(model: Model, prompts: Prompts, *, alpha: float = 0.01, batch: int = 16) -> Tensor:
    """First-order guess of what steering each head does to each score: (N,L,H), nats.

    Steering adds s log(alpha) to a head's scores outside the spans, s from 0 to 1. One backward
    pass gives the slope in s at s = 0 for every head.
    """
    parts = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    return torch.cat([PromptBatch(model, part, alpha).slopes() for part in parts])


def screen_heads(
    model: Model, prompts: Prompts, *, keep: int = 4, alpha: float = 0.01
) -> HeadTable:
    """The best `keep` heads, probably: slopes on a quarter of the prompts, then halving.

    A twelfth of the heads, at least `keep` + 2, is scored exactly on some prompts. Each round
    halves the heads and doubles the prompts, until `keep` + 2 heads have met all prompts. Only
    these are ranked in the table; scores that were not computed are NaN.
    """
    table = _empty_table(model, prompts, alpha)
    N, heads = len(prompts), table.scores[0].numel()
    finalists = min(keep + 2, heads)
    order = random.Random("screen 0").sample(range(N), N)
    sample = [prompts[i] for i in order[: max(1, round(N / 4))]]
    slopes = bias_slopes(model, sample, alpha=alpha).mean(0)
    candidates, scored = rank(slopes)[: max(finalists, heads // 12)], 0
    halvings = (len(candidates) // finalists).bit_length() - 1
    for halving in reversed(range(halvings + 1)):
        until = max(1, N >> halving)
        _fill(model, prompts, table, sorted(candidates), order[scored:until])
        best = rank(table.scores[order[:until]].mean(0))  # only candidates have no NaN there
        candidates, scored = best[: max(finalists, len(candidates) // 2)], until
    return table


def screening_regret(screen: HeadTable, table: HeadTable, k: int) -> dict[str, float]:
    """What screening lost against the whole search, at `k` heads.

    "found": share of the true top k that is among the screen's. "regret": nats per answer token by
    which the mean score of the screen's heads is below that of the true ones.
    """
    true, screened, mean = table.top(k), screen.top(k), table.mean
    regret = sum(mean[h].item() for h in true) / k - sum(mean[h].item() for h in screened) / k
    return {"found": len(set(true) & set(screened)) / k, "regret": regret}


# --- which heads to steer ----------------------------------------------------------------------


def intersection(tables: Iterable[HeadTable], k: int) -> list[Head]:
    """Heads among the top `k` of every table, by mean rank."""
    ranked = [table.ranked() for table in tables]
    shared = set.intersection(*(set(heads[:k]) for heads in ranked))
    return sorted(shared, key=lambda head: (sum(heads.index(head) for heads in ranked), head))


def shared_top_k(tables: Sequence[HeadTable], size: int) -> list[Head]:
    """`size` heads of the smallest k at which the top k of all tables share so many."""
    shared = (intersection(tables, k) for k in range(size, len(tables[0].ranked()) + 1))
    return next(heads for heads in shared if len(heads) >= size)[:size]


def select_heads(tables: Mapping[str, HeadTable], task: str, size: int) -> dict[str, list[Head]]:
    """`size` heads for `task` as the paper chooses them, from the tables of several tasks.

    "task-specific": its own best. "multi-task": the best of all tables together. "task-agnostic":
    of all tables but its own.
    """
    own = tables[task].top(size)
    others = [table for name, table in tables.items() if name != task]
    return {
        "task-agnostic": shared_top_k(others, size),
        "multi-task": shared_top_k(list(tables.values()), size),
        "task-specific": own,
    }


def random_heads(size: tuple[int, int], k: int, *, seed: int) -> list[Head]:
    """`k` heads drawn from a model of `size` (layers, heads): the control of a selection."""
    return random.Random(f"random heads {seed}").sample(every_head(*size), k)


def stability(table: HeadTable, k: int, *, resamples: int = 500, seed: int = 0) -> Tensor:
    """How often each head is among the top `k` when the prompts are drawn anew: (L,H) in 0..1."""
    N = len(table.scores)
    draw = torch.Generator().manual_seed(seed)
    often = torch.zeros(table.mean.shape)
    for _ in range(resamples):
        drawn = torch.randint(N, (N,), generator=draw)
        for head in rank(table.scores[drawn].mean(0))[:k]:
            often[head] += 1 / resamples
    return often
