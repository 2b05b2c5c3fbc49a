"""Which heads to steer: PASTA's Algorithm 1 (2311.02262, section 3.2) and what is chosen from it.

Each head is steered alone and scored on a profiling set. The score of a prompt is the mean
log-probability (nats) per token of its right answer, teacher forced. Axes: N prompts, L layers, H
query heads.
"""

import json
import random
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steerkit.attention.hook import trace_attention
from steerkit.files import write_json, write_text
from steerkit.steering.pasta import Head, emphasise, refuse_alpha

_KIND = "steerkit head table 1"


class Prompt(NamedTuple):
    """Token ids of a prompt, its spans [start, end), and the ids of the right answer."""

    ids: list[int]
    spans: list[tuple[int, int]]
    answer: list[int]


def padded(prompts: Sequence[Prompt], pad: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """ids, keep, target (B,T): prompt and answer, padded on the right, where no row looks.

    `keep`: tokens of full weight, which are the spans, the answer and the padding. `target`: the
    answer's tokens.
    """
    T = max(len(p.ids) + len(p.answer) for p in prompts)
    ids = torch.full((len(prompts), T), pad)
    keep, target = torch.ones(2, len(prompts), T, dtype=torch.bool)
    target[:] = False
    for row, p in enumerate(prompts):
        _check(p)
        n = len(p.ids)
        ids[row, : n + len(p.answer)] = torch.tensor([*p.ids, *p.answer])
        keep[row, :n] = False
        for start, end in p.spans:
            keep[row, start:end] = True
        target[row, n : n + len(p.answer)] = True
    return ids, keep, target


def _check(prompt: Prompt) -> None:
    n = len(prompt.ids)
    if not prompt.spans or any(not 0 <= start < end <= n for start, end in prompt.spans):
        raise ValueError(
            f"spans {prompt.spans} of a prompt of {n} tokens: expected at least one, and "
            "0 <= start < end <= length"
        )


def answer_scores(logits: Tensor, ids: Tensor, target: Tensor) -> Tensor:
    """Mean log-probability per answer token: logits (B,T,V), ids and target (B,T) -> (B,)."""
    told = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (told * target[:, 1:]).sum(1) / target[:, 1:].sum(1)


# --- the table ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadTable:
    """Every head's score on every prompt, and the score with no head steered.

    `scores` (N,L,H), NaN where a head was not scored; `baseline` (N,); `about`: model, prompts,
    alpha, by which a table on disk is recognised.
    """

    scores: Tensor
    baseline: Tensor
    about: dict[str, Any]

    @property
    def mean(self) -> Tensor:
        """(L,H), mean over prompts."""
        return self.scores.mean(0)

    @property
    def gain(self) -> Tensor:
        """(L,H), mean over prompts of score - baseline: above 0 the head helps."""
        return (self.scores - self.baseline[:, None, None]).mean(0)

    def ranked(self) -> list[Head]:
        """All scored heads, best first."""
        return rank(self.mean)

    def top(self, k: int) -> list[Head]:
        """The `k` best heads."""
        ranked = self.ranked()
        if not 1 <= k <= len(ranked):
            raise ValueError(f"k={k}: expected 1 <= k <= {len(ranked)} scored heads")
        return ranked[:k]

    def save(self, path: str | Path) -> None:
        """As JSON, in one step."""
        _store(Path(path), self.about, self.scores, self.baseline)


def rank(mean: Tensor) -> list[Head]:
    """Heads by their value in (L,H), best first, without those that are NaN."""
    order = mean.nan_to_num(-torch.inf).flatten().argsort(descending=True, stable=True)
    heads = [Head(*divmod(i, mean.shape[1])) for i in order.tolist()]
    return [head for head in heads if not mean[head].isnan()]


def load_table(path: str | Path) -> HeadTable:
    """A table that `save` or `score_heads(resume=...)` wrote."""
    about, scores, baseline = _read(Path(path))
    return HeadTable(scores, baseline, about)


def _store(path: Path, about: Mapping[str, Any], scores: Tensor, baseline: Tensor) -> None:
    rows = [[round(x, 7) for x in row] for row in scores.flatten(1).tolist()]
    write_json(
        path,
        {
            "kind": _KIND,
            "about": about,
            "shape": list(scores.shape),
            "baseline": baseline.tolist(),
            "scores": [json.dumps(row).replace(" ", "") for row in rows],  # a line per prompt
        },
    )


def _read(path: Path) -> tuple[dict[str, Any], Tensor, Tensor]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["kind"] != _KIND:
            raise ValueError(f"kind {found['kind']!r}")
        scores = torch.tensor([json.loads(row) for row in found["scores"]], dtype=torch.float32)
        baseline = torch.tensor([float(x) for x in found["baseline"]])
        return found["about"], scores.reshape(found["shape"]), baseline
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{path}: not a whole head table ({error}); was it cut? delete it, or restore a copy"
        ) from error


def describe(model: PreTrainedModel, prompts: Sequence[Prompt], alpha: float) -> dict[str, Any]:
    """What a table is about: changes when the model's weights, the prompts or alpha do."""
    crc = 0
    for tensor in model.state_dict().values():  # the ends of each tensor tell models apart
        if tensor.is_meta:  # offloaded
            continue
        ends = torch.cat([tensor.flatten()[:64], tensor.flatten()[-64:]]).float().cpu()
        crc = zlib.crc32(ends.numpy().tobytes(), crc)
    text = json.dumps([list(p) for p in prompts])
    return {
        "model": type(model).__name__,
        "weights": f"{crc:08x}",
        "prompts": f"{zlib.crc32(text.encode()):08x}",
        "alpha": alpha,
        "score": "mean log-probability per answer token (nats)",
    }


# --- scoring -----------------------------------------------------------------------------------


def score_heads(
    model: PreTrainedModel,
    examples: Sequence[Prompt],
    *,
    heads: Iterable[tuple[int, int]] | None = None,
    alpha: float = 0.01,
    resume: str | Path | None = None,
    batch: int = 16,
    save_every: float = 10.0,
) -> HeadTable:
    """Score every head (or `heads`) alone on all prompts: Algorithm 1, exactly.

    The result is the naive loop's (`naive_scores`): prompts and layers share what steering one head
    does not change (see `replay`). With `resume` the table is kept in that file, written at most
    every `save_every` seconds, and a later call goes on where it ends. Under `accelerate launch`
    each process scores its share of the heads and all return the whole table. `batch` prompts at a
    time, halved when memory runs out.
    """
    from steerkit.steering.search import complete  # which imports this module

    refuse_alpha(alpha)
    refuse_examples(examples)
    about = describe(model, examples, alpha)
    L, H = shape(model)
    wanted = every_head(L, H) if heads is None else [Head(*h) for h in heads]
    check_heads(wanted, (L, H))
    scores = torch.full((len(examples), L, H), torch.nan)
    table = HeadTable(scores, torch.full((len(examples),), torch.nan), about)
    options = {"alpha": alpha, "batch": batch, "save_every": save_every}
    return complete(model, examples, wanted, table, resume=resume, **options)


def naive_scores(
    model: PreTrainedModel,
    examples: Sequence[Prompt],
    *,
    heads: Iterable[tuple[int, int]] | None = None,
    alpha: float = 0.01,
    batch: int = 16,
) -> HeadTable:
    """The loop as the paper says it, one head after another, one whole forward each: the oracle."""
    refuse_alpha(alpha)
    refuse_examples(examples)
    L, H = shape(model)
    wanted = every_head(L, H) if heads is None else [Head(*h) for h in heads]
    scores = torch.full((len(examples), L, H), torch.nan)
    for head in wanted:
        scores[(slice(None), *head)] = forced(model, examples, [head], alpha=alpha, batch=batch)
    baseline = forced(model, examples, [], alpha=alpha, batch=batch)
    return HeadTable(scores, baseline, describe(model, examples, alpha))


@torch.no_grad()
def forced(
    model: PreTrainedModel,
    examples: Sequence[Prompt],
    heads: Iterable[tuple[int, int]],
    *,
    alpha: float = 0.01,
    batch: int = 16,
) -> Tensor:
    """Scores (N,) with any set of heads steered together; none: un-steered."""
    found, heads = [], list(heads)
    for start in range(0, len(examples), batch):
        ids, keep, target = padded(examples[start : start + batch])
        with emphasise(model, keep, heads, alpha=alpha) if heads else nullcontext():
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        found.append(answer_scores(logits.cpu(), ids, target))
    return torch.cat(found)


def score_heads_by(
    model: PreTrainedModel,
    measure: Callable[[Callable[..., AbstractContextManager] | None], Tensor],
    *,
    heads: Iterable[tuple[int, int]] | None = None,
    alpha: float = 0.01,
    name: str = "a metric of replies",
) -> HeadTable:
    """A table by any metric: `measure(steer)` -> (N,), `steer` None or (model, spans) -> `with`.

    The paper's own way: one run of generations per head, for tasks without a right answer to force.
    """
    L, H = shape(model)
    baseline = measure(None).float()
    scores = torch.full((len(baseline), L, H), torch.nan)
    for head in every_head(L, H) if heads is None else [Head(*h) for h in heads]:
        scores[(slice(None), *head)] = measure(
            partial(emphasise, heads=[head], alpha=alpha)
        ).float()
    return HeadTable(scores, baseline, describe(model, [], alpha) | {"score": name})


def shape(model: PreTrainedModel) -> tuple[int, int]:
    """Layers and query heads, asked of the model itself; the largest layer's heads."""
    calls = trace_attention(model, torch.zeros(1, 1, dtype=torch.long))
    return len(calls), max(call.query.shape[1] for call in calls)


def every_head(layers: int, heads: int) -> list[Head]:
    """All heads, layer by layer."""
    return [Head(layer, index) for layer in range(layers) for index in range(heads)]


def refuse_examples(examples: Sequence[Prompt]) -> None:
    """ValueError for no examples, or for one without an answer or with spans not in the prompt."""
    if not examples:
        raise ValueError("no examples: the heads are scored on at least one prompt")
    for example in examples:
        _check(example)
    if empty := [i for i, p in enumerate(examples) if not p.answer]:
        raise ValueError(
            f"examples {empty[:5]} have no answer: heads are scored by the answer's "
            "log-probability; give answers, or rank by replies with score_heads_by"
        )


def check_heads(heads: Iterable[Head], size: tuple[int, int], source: str = "heads") -> None:
    """ValueError unless all heads are of a model of `size` (layers, heads)."""
    outside = [h for h in heads if not (0 <= h[0] < size[0] and 0 <= h[1] < size[1])]
    if outside:
        raise ValueError(
            f"{source}: {Head(*outside[0])} is not in a model of {size[0]} layers of {size[1]} "
            "heads; are these heads another model's?"
        )


# --- the official head files -------------------------------------------------------------------


def write_heads(path: str | Path, heads: Iterable[tuple[int, int]]) -> None:
    """The official library's format, {"layer": [heads]}."""
    rows: dict[str, list[int]] = {}
    for layer, index in heads:
        rows.setdefault(str(layer), []).append(index)
    write_text(Path(path), json.dumps(rows) + "\n")


def read_heads(path: str | Path, model: PreTrainedModel | None = None) -> list[Head]:
    """Heads of an official file; with `model`, ValueError when it cannot have them."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        heads = [Head(int(layer), index) for layer, row in rows.items() for index in row]
        if not all(isinstance(h.index, int) and h.layer >= 0 <= h.index for h in heads):
            raise ValueError("an index is not a number from 0")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f'{path}: not a head file ({error}); expected {{"layer": [heads]}}'
        ) from error
    if not heads:
        raise ValueError(f"{path}: no heads in it")
    if model is not None:
        check_heads(heads, shape(model), str(path))
    return heads


# --- choosing ----------------------------------------------------------------------------------


def intersection(tables: Iterable[HeadTable], k: int) -> list[Head]:
    """Heads among the top `k` of every table, by mean rank: multi-task selection.

    Of all tables but one task's own: task-agnostic selection for that task.
    """
    return _together(tables, k, all)


def union(tables: Iterable[HeadTable], k: int) -> list[Head]:
    """Heads among the top `k` of any table, by mean rank."""
    return _together(tables, k, any)


def _together(
    tables: Iterable[HeadTable], k: int, how: Callable[[Iterable[bool]], bool]
) -> list[Head]:
    tables = list(tables)
    tops = [set(table.top(k)) for table in tables]
    ranks = [{head: i for i, head in enumerate(table.ranked())} for table in tables]
    chosen = [h for h in ranks[0] if how(h in top for top in tops)]
    return sorted(chosen, key=lambda h: sum(rank[h] for rank in ranks))


def common(tables: Sequence[HeadTable], size: int) -> tuple[list[Head], int]:
    """The intersection of the smallest top-k that holds at least `size` heads, and that k."""
    n = len(tables[0].ranked())
    if not 1 <= size <= n:
        raise ValueError(f"size={size}: expected 1 <= size <= {n} scored heads")
    k = next(k for k in range(1, n + 1) if len(intersection(tables, k)) >= size)
    return intersection(tables, k)[:size], k


def choices(tables: Mapping[str, HeadTable], task: str, size: int) -> dict[str, list[Head]]:
    """`size` heads for `task` as the paper chooses them, from the tables of several tasks.

    "task-specific": its own best. "multi-task": the best of all tables together. "task-agnostic":
    of all tables but its own.
    """
    others = [table for name, table in tables.items() if name != task]
    return {
        "task-agnostic": common(others, size)[0],
        "multi-task": common(list(tables.values()), size)[0],
        "task-specific": tables[task].top(size),
    }


def chance_overlap(n: int, k: int, tasks: int) -> float:
    """Heads that `tasks` random choices of k out of n share on average: n (k/n)^tasks."""
    if not 0 <= k <= n:
        raise ValueError(f"k={k}: expected 0 <= k <= n={n}")
    return n * (k / n) ** tasks


def random_heads(
    size: tuple[int, int], k: int, *, seed: int, without: Iterable[Head] = ()
) -> list[Head]:
    """`k` heads drawn from a model of `size` (layers, heads): the control of a selection."""
    pool = [h for h in every_head(*size) if h not in set(without)]
    if not 1 <= k <= len(pool):
        raise ValueError(f"k={k}: expected 1 <= k <= {len(pool)} heads to draw from")
    return random.Random(f"random heads {seed}").sample(pool, k)


def stability(table: HeadTable, k: int, *, resamples: int = 500, seed: int = 0) -> Tensor:
    """How often each head is among the top `k` when the prompts are drawn anew: (L,H) in 0..1."""
    N = len(table.scores)
    draw = torch.Generator().manual_seed(seed)
    often = torch.zeros(table.mean.shape)
    for _ in range(resamples):
        rows = torch.randint(N, (N,), generator=draw)
        for head in rank(table.scores[rows].mean(0))[:k]:
            often[head] += 1 / resamples
    return often
