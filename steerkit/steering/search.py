"""The search over prompts and heads: batches, what is scored already, files, several processes."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steerkit.attention.hook import use_attention_function
from steerkit.progress import progress
from steerkit.steering.head_search import HeadTable, Prompt, forced, load_table
from steerkit.steering.pasta import Head
from steerkit.steering.replay import Replay

_ROWS = {"cpu": 1024, "cuda": 65536}  # rows of tokens that one replayed forward holds
# Nats by which the replay may differ from the model before it is refused; half precision rounds.
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.1

Score = Callable[[PreTrainedModel, list[Prompt], Sequence[Head], float], tuple[Tensor, Tensor]]
"""(model, prompts, heads, alpha) -> scores (heads,B) and, with no head steered, (B,)."""


@dataclass(frozen=True)
class Search:
    """Fills `table` with exact scores of any heads on any of the prompts."""

    model: PreTrainedModel
    prompts: Sequence[Prompt]
    table: HeadTable
    alpha: float
    batch: int
    after: Callable[[], None] = lambda: None  # called whenever the table has grown

    @cached_property
    def score(self) -> Score:
        """Replay where this architecture can be replayed, else one whole forward per head."""
        latest = max(self.prompts, key=lambda p: min(start for start, _ in p.spans))
        return _replayed if _fits(self.model, latest, self.alpha) else _one_by_one

    def fill(self, heads: Sequence[Head], rows: Sequence[int]) -> None:
        """Scores of `heads` on the prompts `rows`; what is in the table already is not computed."""
        if self.batch < 1:
            raise ValueError(f"batch={self.batch}: expected at least 1 prompt")
        with progress(len(heads) * len(rows), unit="head x prompt") as update:
            for some in self._batches(rows):
                self._score(some, heads)
                update(len(some) * len(heads))

    def _batches(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """Prompts that begin alike and end alike go together, as many as all heads leave room."""
        room = _most_rows(self.model) // self.table.scores.shape[2]
        begin = {i: min(start for start, _ in self.prompts[i].spans) for i in rows}
        end = {i: len(self.prompts[i].ids) + len(self.prompts[i].answer) for i in rows}
        some: list[int] = []
        for i in sorted(rows, key=lambda i: (begin[i] // 4, end[i])):
            more = [*some, i]
            width = max(end[j] for j in more) - min(begin[j] for j in more)
            if some and (len(more) > self.batch or len(more) * width > room):
                yield some
                more = [i]
            some = more
        yield some

    def _score(self, rows: list[int], heads: Sequence[Head]) -> None:
        """A batch; when memory runs out half of its prompts at a time, then half of the heads."""
        scores, baseline = self.table.scores, self.table.baseline
        if not baseline[rows].isnan().any():
            heads = [h for h in heads if scores[(rows, *h)].isnan().any()]
            if not heads:
                return
        prompts = [self.prompts[i] for i in rows]
        try:
            found, baseline[rows] = self.score(self.model, prompts, heads, self.alpha)
        except torch.OutOfMemoryError:
            if len(rows) == len(heads) == 1:
                raise
        else:
            for head, values in zip(heads, found, strict=True):
                scores[(rows, *head)] = values
            self.after()
            return
        prompts, several = len(rows) // 2, len(heads) // 2
        if prompts:
            self._score(rows[:prompts], heads)
            self._score(rows[prompts:], heads)
        else:
            self._score(rows, heads[:several])
            self._score(rows, heads[several:])


def _most_rows(model: PreTrainedModel) -> int:
    return _ROWS.get(model.device.type, _ROWS["cpu"])


def _replayed(
    model: PreTrainedModel, prompts: list[Prompt], heads: Sequence[Head], alpha: float
) -> tuple[Tensor, Tensor]:
    found = torch.empty(len(heads), len(prompts))
    with use_attention_function(model):
        replay = Replay(model, prompts, alpha)
        chunk = max(1, _most_rows(model) // replay.plain[..., 0].numel())
        for layer in sorted({h.layer for h in heads}):
            places = [i for i, h in enumerate(heads) if h.layer == layer]
            for start in range(0, len(places), chunk):
                some = places[start : start + chunk]
                found[some] = replay.variants(layer, [heads[i].index for i in some])
        return found, replay.baseline()


def _one_by_one(
    model: PreTrainedModel, prompts: list[Prompt], heads: Sequence[Head], alpha: float
) -> tuple[Tensor, Tensor]:
    options = {"alpha": alpha, "batch": len(prompts)}
    found = [forced(model, prompts, [head], **options) for head in heads]
    found = torch.stack(found) if found else torch.empty(0, len(prompts))
    return found, forced(model, prompts, [], **options)


def _fits(model: PreTrainedModel, prompt: Prompt, alpha: float) -> bool:
    """Asked by doing it: one prompt, one head of the first layer, so that all layers are replayed.

    No where layers pass more than hidden states, or logits are scaled after the vocabulary.
    """
    first = Head(0, 0)
    try:
        found = _replayed(model, [prompt], [first], alpha)[0]
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, StopIteration, TypeError):
        return False
    wanted = forced(model, [prompt], [first], alpha=alpha)
    tolerance = _TOLERANCE if model.dtype.itemsize > 2 else _HALF_TOLERANCE
    return bool((found[0] - wanted).abs() < tolerance)


def complete(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    heads: Sequence[Head],
    table: HeadTable,
    *,
    alpha: float,
    batch: int,
    save_every: float,
    resume: str | Path | None = None,
) -> HeadTable:
    """Fill `table` for `heads`, from a file if there is one, in this process's share."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    path = Path(resume) if resume is not None else None
    own = path.with_name(f"{path.name}.{rank}") if path and world > 1 else path
    for file in dict.fromkeys([path, own]):
        if file is not None and file.exists():
            _take(file, table)
    last = time.monotonic()

    def keep() -> None:
        nonlocal last
        if own is not None and time.monotonic() - last >= save_every:
            table.save(own)
            last = time.monotonic()

    work = Search(model, prompts, table, alpha, batch, after=keep)
    work.fill(heads[rank::world], range(len(prompts)))
    if world > 1:
        _merge(table)
    if path is not None and rank == 0:
        table.save(path)
    return table


def _take(path: Path, table: HeadTable) -> None:
    """What an earlier run left in `path`, if it is about the same."""
    found = load_table(path)
    for key, value in table.about.items():
        if found.about.get(key) != value:
            raise ValueError(
                f"{path}: a table of other {key} ({found.about.get(key)}, not {value}); give "
                "another file, or delete it"
            )
    _put(found.scores, found.baseline, table)


def _merge(table: HeadTable) -> None:
    """All processes' shares, in every process."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState(cpu=not torch.cuda.is_available())  # makes the processes one group
    for scores, baseline in gather_object([(table.scores, table.baseline)]):
        _put(scores, baseline, table)


def _put(scores: Tensor, baseline: Tensor, table: HeadTable) -> None:
    fresh, known = ~scores.isnan(), ~baseline.isnan()
    table.scores[fresh], table.baseline[known] = scores[fresh], baseline[known]
