"""Algorithm 1 without doing anything twice: the engine of `heads.score_heads`.

Steering one head of layer l changes nothing below l, and nothing in rows before the first span
(there every visible key is outside of it, and the row is renormalised). So a batch of prompts runs
once: rows before the spans go into a cache of keys and values; each layer's input and attention,
plain and with all heads steered, are kept. Then a head's variant starts at its own layer, with its
own column of the steered attention, and only the answer's rows meet the vocabulary.

Axes: B prompts, C variants, q rows from the first span on, H query heads, D head size.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from steerkit.attention import Call, attached, install, probe
from steerkit.emphasis import Head
from steerkit.heads import HeadTable, Prompt, _read, padded
from steerkit.key_bias import attend_biased
from steerkit.progress import progress

_ROWS = {"cpu": 1024, "cuda": 65536}  # token rows that one replayed forward holds
# Nats by which the replay may differ from the model before it is refused; half precision rounds.
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.1


class _Rest(CacheLayerMixin):
    """The keys and values of a layer's first rows; what is added is seen, and not kept."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def lazy_initialization(self, *_: Tensor) -> None: ...

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        times = len(keys) // len(self.keys)
        first = (self.keys.repeat(times, 1, 1, 1), self.values.repeat(times, 1, 1, 1))
        return torch.cat([first[0], keys], dim=2), torch.cat([first[1], values], dim=2)

    def get_seq_length(self) -> int:
        return self.keys.shape[2]

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        rows = query if isinstance(query, int) else query.shape[0]
        return self.keys.shape[2] + rows, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class _Layer(NamedTuple):
    """One decoder layer as it was called, and its attention (B,q,H,D), plain and steered."""

    module: nn.Module
    attention: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    plain: Tensor
    steered: Tensor


class Replay:
    """One batch of prompts, run once; `variants` scores any heads of a layer."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Prompt], alpha: float) -> None:
        self.model = model
        ids, keep, target = (x.to(model.device) for x in padded(prompts))
        self.first = min(start for p in prompts for start, _ in p.spans)
        # The last token is nobody's context, and the rows before the first span stay as they are.
        self.ids, self.target = ids[:, self.first :], target[:, self.first :]
        column = torch.log(torch.where(keep[:, :-1], 1.0, alpha))
        self.answer = self.target[:, 1:].any(0)  # rows that predict an answer's token
        cache = self._rest(ids[:, : self.first])
        self.layers, self.after, self.plain = self._record(ids[:, self.first : -1], cache, column)

    def _rest(self, ids: Tensor) -> Cache | None:
        if self.first == 0:
            return None
        cache = DynamicCache(config=self.model.config)
        self.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        return Cache(layers=[_Rest(layer.keys, layer.values) for layer in cache.layers])

    def _record(
        self, ids: Tensor, cache: Cache | None, column: Tensor
    ) -> tuple[list[_Layer], list[nn.Module], Tensor]:
        """Run the rest of the rows: each layer's call, what follows the last, and the output."""
        base, calls = self.model.base_model, probe(self.model, ids[:1, :1])
        attention = [call.module for call in calls]
        modules = _decoder_layers(base, attention)
        called: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        both: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        order: list[nn.Module] = []

        def edit(call: Call) -> Tensor:
            plain = replace(call).attend()
            ones = column.new_ones(call.query.shape[1], 1)
            steered = attend_biased(replace(call), ones, column[:, -call.key.shape[2] :])
            both[call.module] = (plain, steered)
            return plain

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            order.append(module)
            called[module] = (args, kwargs)

        children = [m for m in base.children() if not isinstance(m, nn.ModuleList)]
        with ExitStack() as stack:
            for module in [*modules, *children]:
                hook = module.register_forward_pre_hook(note, with_kwargs=True)
                stack.callback(hook.remove)
            with _through(self.model, dict.fromkeys(attention, edit)):
                out = base(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
        after = order[order.index(modules[-1]) + 1 :]
        pairs = zip(modules, attention, strict=True)
        layers = [_Layer(m, a, *called[m], *both[a]) for m, a in pairs]
        return layers, after, out.last_hidden_state

    @torch.no_grad()
    def baseline(self) -> Tensor:
        """Scores (B,) with no head steered."""
        return self._scores(self.plain[:, self._answers()], 1)[0]

    @torch.no_grad()
    def variants(self, layer: int, indices: Sequence[int]) -> Tensor:
        """Scores (C,B) with each of these heads of `layer` steered alone."""
        plain, steered = self.layers[layer].plain, self.layers[layer].steered
        rows = plain[None].repeat(len(indices), 1, 1, 1, 1)  # (C,B,q,H,D)
        for variant, index in enumerate(indices):
            rows[variant, :, :, index] = steered[:, :, index]
        return self._finish(layer, rows.flatten(0, 1), len(indices))

    def _finish(self, start: int, attention: Tensor, C: int) -> Tensor:
        """From layer `start`, its attention given (C*B,q,H,D), to the scores (C,B)."""
        B = len(self.ids)
        hidden = _spread(_hidden(self.layers[start]), B, C)
        given = self.layers[start].attention
        with _through(self.model, {given: lambda _: attention}):
            for layer in self.layers[start:]:
                hidden = _call(layer, hidden, B, C)
        hidden = hidden[:, self._answers()]
        for module in self.after:
            hidden = module(hidden)
        return self._scores(hidden, C)

    def _answers(self) -> Tensor:
        """The rows that predict an answer's token of any prompt."""
        return self.answer.nonzero()[:, 0]

    def _scores(self, hidden: Tensor, C: int) -> Tensor:
        """Output rows (C*B,answers,width) to scores (C,B)."""
        logits = self.model.get_output_embeddings()(hidden)
        told = logits.float().log_softmax(-1)
        next_ids = self.ids[:, 1:][:, self.answer].repeat(C, 1)
        target = self.target[:, 1:][:, self.answer].repeat(C, 1)
        each = told.gather(-1, next_ids[..., None])[..., 0] * target
        return (each.sum(1) / target.sum(1)).reshape(C, -1).cpu()


@contextmanager
def _through(model: PreTrainedModel, edits: dict[nn.Module, Callable[[Call], Tensor]]) -> Iterator:
    with install(model), attached(edits):
        yield


def _decoder_layers(base: nn.Module, attention: Sequence[nn.Module]) -> list[nn.Module]:
    """The members of the model's list of layers that hold the attention modules."""
    holders = {
        inner: layer
        for stack in base.modules()
        if isinstance(stack, nn.ModuleList)
        for layer in stack
        for inner in layer.modules()
    }
    return [holders[module] for module in attention]


def _hidden(layer: _Layer) -> Tensor:
    return layer.args[0] if layer.args else layer.kwargs["hidden_states"]


def _call(layer: _Layer, hidden: Tensor, B: int, C: int) -> Tensor:
    args = tuple(_spread(a, B, C) for a in layer.args)
    kwargs = {key: _spread(value, B, C) for key, value in layer.kwargs.items()}
    if args:
        args = (hidden, *args[1:])
    else:
        kwargs["hidden_states"] = hidden
    out = layer.module(*args, **kwargs)
    return out if isinstance(out, Tensor) else out[0]


def _spread(value: Any, B: int, C: int) -> Any:
    """Tensors of the batch repeated for C variants; tuples of them too; the rest as it is."""
    if isinstance(value, tuple):
        return tuple(_spread(v, B, C) for v in value)
    if isinstance(value, Tensor) and value.ndim > 1 and len(value) == B and C > 1:
        return value.repeat(C, *[1] * (value.ndim - 1))
    return value


# --- the search over batches -------------------------------------------------------------------


def search(
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
    share = heads[rank::world]
    score = engine(model, prompts[0], share, alpha)
    everything = list(range(len(prompts)))
    last = time.monotonic()

    def keep() -> None:
        nonlocal last
        if own is not None and time.monotonic() - last >= save_every:
            table.save(own)
            last = time.monotonic()

    fill(score, model, prompts, everything, share, table, alpha=alpha, batch=batch, after=keep)
    if world > 1:
        _merge(table)
    if path is not None and rank == 0:
        table.save(path)
    return table


Score = Callable[
    [PreTrainedModel, Sequence[Prompt], list[int], Sequence[Head], HeadTable, float], Tensor
]


def fill(
    score: Score,
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    rows: Sequence[int],
    heads: Sequence[Head],
    table: HeadTable,
    *,
    alpha: float,
    batch: int,
    after: Callable[[], None] | None = None,
) -> None:
    """Scores of `heads` on the prompts `rows` into the table; `after` is called after a batch."""
    with progress(len(heads) * len(rows), unit="head x prompt") as update:
        for some in _batches(prompts, rows, batch):
            for part, baseline in _halving(score, model, prompts, some, heads, table, alpha):
                table.baseline[part] = baseline
                if after is not None:
                    after()
            update(len(some) * len(heads))


def _batches(prompts: Sequence[Prompt], rows: Sequence[int], batch: int) -> Iterator[list[int]]:
    """Prompts whose spans begin alike, and whose lengths are alike, go together."""
    if batch < 1:
        raise ValueError(f"batch={batch}: expected at least 1 prompt")
    order = sorted(
        rows, key=lambda i: (min(s for s, _ in prompts[i].spans) // 8, len(prompts[i].ids))
    )
    for start in range(0, len(order), batch):
        yield order[start : start + batch]


def _halving(
    score: Score,
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    rows: list[int],
    heads: Sequence[Head],
    table: HeadTable,
    alpha: float,
) -> Iterator[tuple[list[int], Tensor]]:
    """Score a batch, or its halves when memory runs out; what is in the table already is not."""
    if not table.baseline[rows].isnan().any():
        heads = [h for h in heads if table.scores[(rows, *h)].isnan().any()]
        if not heads:
            return
    try:
        baseline = score(model, prompts, rows, heads, table, alpha)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
    else:
        yield rows, baseline
        return
    for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        yield from _halving(score, model, prompts, half, heads, table, alpha)


def _replayed(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    rows: list[int],
    heads: Sequence[Head],
    table: HeadTable,
    alpha: float,
) -> Tensor:
    with torch.no_grad():
        replay = Replay(model, [prompts[i] for i in rows], alpha)
    width = replay.ids[:, 1:].numel()
    chunk = max(1, _ROWS.get(model.device.type, _ROWS["cpu"]) // width)
    for layer in sorted({h.layer for h in heads}):
        indices = [h.index for h in heads if h.layer == layer]
        for start in range(0, len(indices), chunk):
            some = indices[start : start + chunk]
            for index, values in zip(some, replay.variants(layer, some), strict=True):
                table.scores[rows, layer, index] = values
    return replay.baseline()


def _one_by_one(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    rows: list[int],
    heads: Sequence[Head],
    table: HeadTable,
    alpha: float,
) -> Tensor:
    from steerkit.heads import forced

    some = [prompts[i] for i in rows]
    for head in heads:
        table.scores[rows, head.layer, head.index] = forced(
            model, some, [head], alpha=alpha, batch=len(some)
        )
    return forced(model, some, [], batch=len(some))


def engine(model: PreTrainedModel, prompt: Prompt, heads: Sequence[Head], alpha: float) -> Score:
    """Replay where this architecture can be replayed, else one whole forward per head."""
    return _replayed if _fits(model, prompt, heads, alpha) else _one_by_one


def _fits(model: PreTrainedModel, prompt: Prompt, heads: Sequence[Head], alpha: float) -> bool:
    """Asked by doing it: one prompt, one head.

    No where layers pass more than hidden states, or logits are scaled after the vocabulary.
    """
    from steerkit.heads import forced

    if not heads:
        return True
    head = max(heads)
    try:
        with torch.no_grad():
            replay = Replay(model, [prompt], alpha)
        found = replay.variants(head.layer, [head.index])[0]
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError):
        return False
    wanted = forced(model, [prompt], [head], alpha=alpha)
    tolerance = _TOLERANCE if model.dtype.itemsize > 2 else _HALF_TOLERANCE
    return bool((found - wanted).abs() < tolerance)


def _take(path: Path, table: HeadTable) -> None:
    """What an earlier run left in `path`, if it is about the same."""
    about, scores, baseline = _read(path)
    for key, value in table.about.items():
        if about.get(key) != value:
            raise ValueError(
                f"{path}: a table of other {key} ({about.get(key)}, not {value}); give another "
                "file, or delete it"
            )
    fresh = ~scores.isnan()
    table.scores[fresh] = scores[fresh]
    known = ~baseline.isnan()
    table.baseline[known] = baseline[known]


def _merge(table: HeadTable) -> None:
    """All processes' shares, in every process."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState(cpu=not torch.cuda.is_available())  # makes the processes one group
    for scores, baseline in gather_object([(table.scores, table.baseline)]):
        fresh, known = ~scores.isnan(), ~baseline.isnan()
        table.scores[fresh] = scores[fresh]
        table.baseline[known] = baseline[known]
