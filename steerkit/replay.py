"""Algorithm 1 without doing anything twice: the engine of `heads.score_heads`.

Steering one head of layer l changes nothing below l, and nothing in rows before the first span
(there every visible key is outside of it, and the row is renormalised). So a few prompts that begin
alike run once: rows before the spans go into a cache of keys and values; each layer's input and
attention, plain and with all heads steered, are kept. Then a head's variant starts behind the
attention of its own layer, with its own column of the steered one; the last layer goes on with the
rows that predict the answer, and only those meet the vocabulary.

Axes: B prompts, C variants, q rows from the first span on, A rows that predict the answer, K keys,
H query heads, D head size.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from steerkit.attention import Call, attached, install
from steerkit.emphasis import Head
from steerkit.heads import HeadTable, Prompt, forced, load_table, padded
from steerkit.key_bias import attend_biased
from steerkit.progress import progress

_ROWS = {"cpu": 1024, "cuda": 65536}  # rows of tokens that one replayed forward holds
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


class _Given(nn.Module):
    """Stands where an attention module was, and returns what is known already."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return self.output, None


class _Arrived(Exception):
    """A layer's attention call has come to the door; nothing behind it runs."""


@dataclass
class _Layer:
    """A decoder layer as it was called, with its attention (B,q,H,D), plain and steered.

    `behind`: the attention module's children that ran after the attention, usually one projection.
    """

    module: nn.Module
    attention: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    plain: Tensor
    steered: Tensor
    behind: list[nn.Module]

    def __call__(self, hidden: Tensor, C: int) -> Tensor:
        """The layer on `hidden` (C*B,q,width), all else as it was."""
        B = len(hidden) // C
        args = tuple(_spread(value, B, C) for value in self.args)
        kwargs = {key: _spread(value, B, C) for key, value in self.kwargs.items()}
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs["hidden_states"] = hidden
        out = self.module(*args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]

    @property
    def hidden(self) -> Tensor:
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def up_to_attention(self, hidden: Tensor, C: int) -> Call:
        """The attention call of these rows; the layer stops there."""
        calls = []

        def stop(call: Call) -> Tensor:
            calls.append(call)
            raise _Arrived

        with attached({self.attention: stop}):
            try:
                self(hidden, C)
            except _Arrived:
                return calls[0]
        raise RuntimeError(f"{type(self.module).__name__} did not come to its attention")

    def behind_attention(self, hidden: Tensor, attention: Tensor, C: int) -> Tensor:
        """The rest of the layer, on any rows: (C*B,n,width) and (C*B,n,H,D) -> (C*B,n,width)."""
        out = attention.flatten(2)
        for module in self.behind:
            out = module(out)
        holder, name = _place(self.module, self.attention)
        holder._modules[name] = _Given(out)
        try:
            return self(hidden, C)
        finally:
            holder._modules[name] = self.attention


class Replay:
    """A few prompts, run once; `variants` scores any heads of a layer. Enter `install` first."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, prompts: Sequence[Prompt], alpha: float) -> None:
        self.model = model
        ids, keep, target = (x.to(model.device) for x in padded(prompts))
        first = min(start for p in prompts for start, _ in p.spans)
        # The last token is nobody's context, and the rows before the first span stay as they are.
        target = target[:, first + 1 :]
        self.count = target.sum(1)
        self.at = target.byte().argsort(dim=1, descending=True, stable=True)  # answers' rows first
        self.at = self.at[:, : int(self.count.max())]  # (B,A)
        self.real = target.gather(1, self.at)
        self.answer = ids[:, first + 1 :].gather(1, self.at)
        column = torch.log(torch.where(keep[:, :-1], 1.0, alpha))
        cache = self._cached(ids[:, :first]) if first else None
        self.layers, self.after, self.plain = self._record(ids[:, first:-1], cache, column)

    def _cached(self, ids: Tensor) -> Cache:
        cache = DynamicCache(config=self.model.config)
        self.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        return Cache(layers=[_Rest(layer.keys, layer.values) for layer in cache.layers])

    def _record(
        self, ids: Tensor, cache: Cache | None, column: Tensor
    ) -> tuple[list[_Layer], list[nn.Module], Tensor]:
        """Run the rest of the rows: each layer's call, what follows the last, and the output."""
        base = self.model.base_model
        stacks = [m for m in base.modules() if isinstance(m, nn.ModuleList)]
        holder = {m: layer for stack in stacks for layer in stack for m in layer.modules()}
        both: dict[nn.Module, tuple[Tensor, Tensor, int]] = {}  # of each attention module, in turn
        called: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        order: list[nn.Module] = []

        def edit(call: Call) -> Tensor:
            plain = replace(call).attend()
            ones = column.new_ones(call.query.shape[1], 1)
            steered = attend_biased(replace(call), ones, column[:, -call.key.shape[2] :])
            both[call.module] = (plain, steered, len(order))
            return plain

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            order.append(module)
            if holder.get(module) is module:  # a layer itself
                called[module] = (args, kwargs)

        with ExitStack() as stack:
            for module in base.modules():
                hook = module.register_forward_pre_hook(note, with_kwargs=True)
                stack.callback(hook.remove)
            stack.enter_context(attached(dict.fromkeys(base.modules(), edit)))
            out = base(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
        layers = []
        for attention, (plain, steered, start) in both.items():
            module, own = holder[attention], set(attention.children())
            behind = [m for m in order[start:] if m in own]
            layers.append(_Layer(module, attention, *called[module], plain, steered, behind))
        last = max(i for i, m in enumerate(order) if m in holder)
        return layers, order[last + 1 :], out.last_hidden_state

    @torch.no_grad()
    def baseline(self) -> Tensor:
        """Scores (B,) with no head steered."""
        return self._told(_rows(self.plain, self.at), 1)[0]

    @torch.no_grad()
    def variants(self, layer: int, indices: Sequence[int]) -> Tensor:
        """Scores (C,B) with each of these heads of `layer` steered alone."""
        C, own, last = len(indices), self.layers[layer], self.layers[-1]
        at = self.at.repeat(C, 1)
        attention = own.plain.repeat(C, 1, 1, 1, 1)  # (C,B,q,H,D)
        for variant, index in enumerate(indices):
            attention[variant, :, :, index] = own.steered[:, :, index]
        attention, hidden = attention.flatten(0, 1), own.hidden.repeat(C, 1, 1)
        if own is last:
            attention, hidden = _rows(attention, at), _rows(hidden, at)
            return self._told(self._after(own.behind_attention(hidden, attention, C)), C)
        hidden = own.behind_attention(hidden, attention, C)
        for module in self.layers[layer + 1 : -1]:
            hidden = module(hidden, C)
        attention = _attend_at(last.up_to_attention(hidden, C), at)
        hidden = last.behind_attention(_rows(hidden, at), attention, C)
        return self._told(self._after(hidden), C)

    def _after(self, hidden: Tensor) -> Tensor:
        for module in self.after:
            hidden = module(hidden)
        return hidden

    def _told(self, hidden: Tensor, C: int) -> Tensor:
        """Output rows (C*B,A,width) to scores (C,B)."""
        logits = self.model.get_output_embeddings()(hidden).float()
        told = logits.gather(-1, self.answer.repeat(C, 1)[..., None])[..., 0]
        each = (told - logits.logsumexp(-1)).unflatten(0, (C, -1)) * self.real
        return (each.sum(-1) / self.count).cpu()


def _rows(x: Tensor, at: Tensor) -> Tensor:
    """Rows `at` (B,A) of x (B,q,...) -> (B,A,...)."""
    return x[torch.arange(len(at), device=at.device)[:, None], at]


def _attend_at(call: Call, at: Tensor) -> Tensor:
    """The attention of rows `at` (B,A) alone -> (B,A,H,D)."""
    Q, K = call.query.shape[2], call.key.shape[2]
    if call.mask is None:  # causal
        mask = (torch.arange(K, device=at.device) <= at[..., None] + (K - Q))[:, None]
    else:
        mask = _rows(call.mask.expand(len(at), -1, Q, -1).transpose(1, 2), at).transpose(1, 2)
    query = _rows(call.query.transpose(1, 2), at).transpose(1, 2)
    return replace(call, query=query, mask=mask).attend()


def _place(layer: nn.Module, module: nn.Module) -> tuple[nn.Module, str]:
    """Which part of the layer holds the module, and under which name."""
    return next(
        (holder, name)
        for holder in layer.modules()
        for name, child in holder.named_children()
        if child is module
    )


def _spread(value: Any, B: int, C: int) -> Any:
    """Tensors of the batch repeated for C variants; tuples of them too; the rest as it is."""
    if isinstance(value, tuple):
        return tuple(_spread(v, B, C) for v in value)
    if isinstance(value, Tensor) and value.ndim > 1 and len(value) == B and C > 1:
        return value.repeat(C, *[1] * (value.ndim - 1))
    return value


# --- the search over batches -------------------------------------------------------------------


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
        return _replayed if _fits(self.model, self.prompts[0], self.alpha) else _one_by_one

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
        """A batch, or its halves when memory runs out."""
        scores, baseline = self.table.scores, self.table.baseline
        if not baseline[rows].isnan().any():
            heads = [h for h in heads if scores[(rows, *h)].isnan().any()]
            if not heads:
                return
        prompts = [self.prompts[i] for i in rows]
        try:
            found, baseline[rows] = self.score(self.model, prompts, heads, self.alpha)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        else:
            for head, values in zip(heads, found, strict=True):
                scores[(rows, *head)] = values
            self.after()
            return
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            self._score(half, heads)


def _most_rows(model: PreTrainedModel) -> int:
    return _ROWS.get(model.device.type, _ROWS["cpu"])


def _replayed(
    model: PreTrainedModel, prompts: list[Prompt], heads: Sequence[Head], alpha: float
) -> tuple[Tensor, Tensor]:
    found = torch.empty(len(heads), len(prompts))
    with install(model):
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
    return torch.stack(found), forced(model, prompts, [], **options)


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
