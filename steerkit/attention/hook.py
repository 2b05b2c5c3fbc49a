"""The one door: every read or edit of attention passes through one function.

It is registered once, at import, under the name "steerkit" in transformers' `AttentionInterface`
*and* `AttentionMaskInterface` (a name missing from the second is silently not causal). What is
attached lives on the attention modules for the length of a `with`; where nothing is attached the
function is transformers' own SDPA path. Axes: B batch, L layers, H query heads, Q/K query/key
positions, D head size, T tokens.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

DOOR = "steerkit"
_EDIT = "_steerkit_edit"
_ZERO_SINK = "_steerkit_zero_sink"
_WATCH = "_steerkit_watch"
# Rows of weights are materialised in chunks of at most this many numbers: 4 MB, which stay in a
# core's cache (64 MB took twice the time); 16 times as many elsewhere, where launches cost more.
_CHUNK_NUMBERS = 2**20


@dataclass
class Call:
    """One attention call, rotary embedding applied: query (B,H,Q,D), key and value (B,Hkv,K,D).

    `mask` is None (causal), boolean (True = visible) or additive, and broadcasts to (B,H,Q,K).
    `options` holds what else the architecture passed (dropout, sliding_window, ...). A recorder's
    `watch` sees the call when it attends, so with what an edit made of it; edits' own calls have
    none.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    options: dict[str, Any]
    watch: "Callable[[Call], None] | None" = None

    @property
    def zero_sink(self) -> bool:
        """Whether this layer's softmax is softmax-off-by-one."""
        return _ZERO_SINK in self.module.__dict__

    def attend(self) -> Tensor:
        """The layer's own attention over what the call holds now -> (B,Q,H,D)."""
        if self.watch is not None:
            self.watch(self)
        if not self.zero_sink:
            return self._sdpa(self.query, self.key, self.value, self.mask)
        # One zero key with a zero value. A zero *query* in front keeps the causal diagonal in
        # place, so that the fast paths without a mask stay open; its row is dropped.
        front = (0, 0, 1, 0)
        key, value = F.pad(self.key, front), F.pad(self.value, front)
        if self.mask is not None or self.query.shape[2] == 1:
            wide = None if self.mask is None else F.pad(self.mask, (1, 0), value=_seen(self.mask))
            return self._sdpa(self.query, key, value, wide)
        return self._sdpa(F.pad(self.query, front), key, value, None)[:, 1:]

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return sdpa_attention_forward(
            self.module, query, key, value, mask, scaling=self.scaling, **self.options
        )[0]


Edit = Callable[[Call], Tensor]
"""An edit may read or change the call, and returns (B,Q,H,D), usually `call.attend()`."""


def _seen(mask: Tensor) -> bool | float:
    return True if mask.dtype == torch.bool else 0.0


def _door(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    if options.get("s_aux") is not None:
        raise ValueError(
            f"{type(module).__name__} has learned sinks (s_aux), which SDPA would drop silently"
        )
    state = module.__dict__
    if _EDIT not in state and _ZERO_SINK not in state and _WATCH not in state:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scaling = options.pop("scaling", None) or query.shape[-1] ** -0.5
    watch = state.get(_WATCH)
    call = Call(module, query, key, value, attention_mask, scaling, options, watch)
    return state.get(_EDIT, Call.attend)(call), None


AttentionInterface.register(DOOR, _door)
AttentionMaskInterface.register(DOOR, sdpa_mask)


@contextmanager
def install(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` attend through the door inside the `with`; leave it as found.

    Raises ValueError, with the reason, for architectures that would be silently wrong or never ask
    the door.
    """
    config = model.config
    if config._attn_implementation == DOOR:
        yield
        return
    _refuse_unsupported(model)
    previous: dict[str, Any] = {"": config._attn_implementation}
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            previous[name] = getattr(config, name)._attn_implementation
    try:
        model.set_attn_implementation(DOOR)
        yield
    finally:
        model.set_attn_implementation(previous)


def _refuse_unsupported(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if not (model._supports_attention_backend and model._can_set_attn_implementation()):
        raise ValueError(
            f"{name} has its own attention code and does not ask transformers' AttentionInterface, "
            "so steerkit cannot read or edit it; use one that does (Llama, Qwen, GPT-NeoX, ...)"
        )
    if not model._supports_sdpa:
        raise ValueError(
            f"{name} cannot run on SDPA (soft-capped scores or learned sinks), so steerkit's "
            "attention would differ from its own; use an architecture with a plain softmax"
        )


@contextmanager
def attach(model: PreTrainedModel, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Attach one edit per layer (0-based) for the length of the `with`. Nesting is refused."""
    modules = attention_modules(model)
    if unknown := [layer for layer in edits if not 0 <= layer < len(modules)]:
        raise ValueError(f"layers {unknown}: expected 0 <= layer < {len(modules)}")
    with install(model), attached({modules[layer]: edit for layer, edit in edits.items()}):
        yield


@contextmanager
def attached(edits: Mapping[nn.Module, Edit]) -> Iterator[None]:
    """`attach` for attention modules that are already known, inside `install`."""
    if any(_EDIT in module.__dict__ for module in edits):
        raise ValueError(
            "an edit is already attached to this model: leave its `with` before the next one"
        )
    try:
        for module, edit in edits.items():
            module.__dict__[_EDIT] = edit
        yield
    finally:
        for module in edits:
            module.__dict__.pop(_EDIT, None)


@contextmanager
def softmax_off_by_one(model: PreTrainedModel) -> Iterator[None]:
    """The zero sink of StreamingLLM's Table 3 (2309.17453): weights exp(s) / (1 + sum exp(s)).

    An architecture, not an edit: it has gradients, so train inside the `with`; evaluate inside it
    too, where recorders, streams and edits compose with it. No checkpoint remembers it.
    """
    modules = attention_modules(model)
    if any(_ZERO_SINK in module.__dict__ for module in modules):
        raise ValueError(
            "softmax_off_by_one is already on for this model: one zero sink is the method"
        )
    with install(model):
        try:
            for module in modules:
                module.__dict__[_ZERO_SINK] = True
            yield
        finally:
            for module in modules:
                module.__dict__.pop(_ZERO_SINK, None)


def probe(model: PreTrainedModel, ids: Tensor, **inputs: Tensor) -> list[Call]:
    """The attention calls of one forward over a few tokens `ids` (B,T), first layer first.

    Raises ValueError if some layer does not attend through the door (linear attention, own
    kernels).
    """
    calls: list[Call] = []

    def record(call: Call) -> Tensor:
        calls.append(call)
        return call.attend()

    devices = [model.device] if model.device.type == "cuda" else []
    everywhere = dict.fromkeys(model.modules(), record)
    # The generator is kept as it was: dropout draws from it when the model is in training mode.
    with install(model), attached(everywhere), torch.no_grad(), torch.random.fork_rng(devices):
        model(input_ids=ids.to(model.device), use_cache=False, **inputs)
    layers = model.config.get_text_config().num_hidden_layers
    if len(calls) != layers:
        raise ValueError(
            f"{type(model).__name__}: {len(calls)} of {layers} layers attend through "
            "AttentionInterface, the others would be left out silently; use an architecture with "
            "softmax attention throughout"
        )
    return calls


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention module of each layer. Found by asking one token, not by name."""
    return [call.module for call in probe(model, torch.zeros(1, 1, dtype=torch.long))]


# Recorders


class Rows(NamedTuple):
    """Attention weights (B,H,q,K) of query rows `start` to `start + q`; `layer` counts from 0."""

    layer: int
    start: int
    weights: Tensor


def record_rows(
    model: PreTrainedModel,
    ids: Tensor,
    reduce: Callable[[Rows], None],
    *,
    layers: Collection[int] | None = None,
    edges: Sequence[int] | None = None,
) -> None:
    """One forward over `ids` (B,T); `reduce` sees the layers' weights, a chunk of rows at a time.

    `layers` (default all): whose weights are made. `edges`: a chunk is the rows from one to the
    next, instead of as many as fit. The model's output is untouched, and one chunk is held at a
    time. What is attached stays in force: inside `emphasise` the weights are the steered ones.
    """

    def watch(layer: int, call: Call) -> None:
        if layers is not None and layer not in layers:
            return
        for start, weights in _weight_chunks(call, edges):
            reduce(Rows(layer, start, weights))

    watch_forward(model, ids, watch)


def watch_forward(model: PreTrainedModel, ids: Tensor, watch: Callable[[int, Call], None]) -> None:
    """One forward over `ids` (B,T): `watch(layer, call)` sees what each layer attends to.

    Layers are counted as they come: nothing is probed, so edits that know their prompt may stay.
    Raises ValueError for a model, or an edit, whose attention would be left out silently.
    """
    layers, seen = model.config.get_text_config().num_hidden_layers, count()

    def number(call: Call) -> None:
        if (layer := next(seen)) < layers:
            watch(layer, call)

    everywhere = list(model.modules())
    if any(_WATCH in module.__dict__ for module in everywhere):
        raise ValueError("this model is being recorded already: let that recording end first")
    with install(model), torch.no_grad():
        try:
            for module in everywhere:
                module.__dict__[_WATCH] = number
            _base(model)(input_ids=_checked(ids).to(model.device), use_cache=False)
        finally:
            for module in everywhere:
                module.__dict__.pop(_WATCH, None)
    if (calls := next(seen)) != layers:
        raise ValueError(
            f"{type(model).__name__}: {calls} attention calls of {layers} layers could be "
            "recorded; use softmax attention throughout, and edits that call `call.attend()` once"
        )


def _base(model: PreTrainedModel) -> nn.Module:
    """The decoder without its vocabulary head: recorders need no logits."""
    return model.base_model


def _checked(ids: Tensor) -> Tensor:
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(
            f"ids of shape {tuple(ids.shape)}: expected (B, T) with at least two tokens"
        )
    return ids


def _weight_chunks(call: Call, edges: Sequence[int] | None = None) -> Iterator[tuple[int, Tensor]]:
    """(first row, weights (B,H,q,K) in float32) for successive chunks of query rows."""
    B, H, Q, _ = call.query.shape
    K = call.key.shape[2]
    key = call.key.repeat_interleave(H // call.key.shape[1], dim=1)  # (B,Hkv,K,D) -> (B,H,K,D)
    numbers = _CHUNK_NUMBERS * (1 if key.device.type == "cpu" else 16)
    edges = edges or [*range(0, Q, max(1, numbers // (B * H * K))), Q]
    for start, stop in pairwise(edges):
        rows = slice(start, stop)
        scores = (call.query[:, :, rows] @ key.mT).float() * call.scaling
        yield (
            start,
            softmax(scores + _additive(call.mask, rows, Q, K, scores.device), call.zero_sink),
        )


def _additive(mask: Tensor | None, rows: slice, Q: int, K: int, device: torch.device) -> Tensor:
    """Rows of a mask as additive values; None is causal, aligned to the last key."""
    if mask is None:
        query = torch.arange(rows.start, rows.stop, device=device)[:, None] + (K - Q)
        mask = torch.arange(K, device=device) <= query
    elif mask.shape[-2] > 1:
        mask = mask[..., rows, :]
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=device).masked_fill(~mask, -math.inf)
    return mask.float()


def softmax(scores: Tensor, zero_sink: bool = False) -> Tensor:
    """Weights over the last axis; with `zero_sink` exp(s) / (1 + sum exp(s)), less than 1 a row."""
    if not zero_sink:
        return scores.softmax(-1)
    return F.pad(scores, (1, 0)).softmax(-1)[..., 1:]


def attention_weights(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """All weights of one short input: ids (1,T) -> (L,H,T,T) float32 on the CPU."""
    config = model.config.get_text_config()
    T = ids.shape[-1]
    numbers = config.num_hidden_layers * config.num_attention_heads * T * T
    if ids.ndim != 2 or ids.shape[0] != 1 or numbers > 2**28:
        raise ValueError(
            f"ids of shape {tuple(ids.shape)} ask for {numbers:,} weights: expected (1, T) and "
            f"at most {2**28:,}; use record_rows, token0_mass or a shorter text"
        )
    out = torch.zeros(config.num_hidden_layers, config.num_attention_heads, T, T)

    def keep(rows: Rows) -> None:
        out[rows.layer, :, rows.start : rows.start + rows.weights.shape[2]] = rows.weights[0].cpu()

    record_rows(model, ids, keep)
    return out


def key_mass(
    model: PreTrainedModel, ids: Tensor, *, k: int = 0, first: int | None = None
) -> Tensor:
    """Mean weight on key `k` over query rows >= `first` (default `k`): ids (B,T) -> (B,L,H).

    alpha_k of 2410.10781, section 3.
    """
    B, T = _checked(ids).shape
    first = k if first is None else first
    if not 0 <= k <= first < T:
        raise ValueError(f"k={k}, first={first}: expected 0 <= k <= first < {T} tokens")
    config = model.config.get_text_config()
    total = torch.zeros(
        B, config.num_hidden_layers, config.num_attention_heads, dtype=torch.float64
    )

    def add(rows: Rows) -> None:
        seen = rows.weights[:, :, max(0, first - rows.start) :, k]  # (B,H,q)
        total[:, rows.layer] += seen.double().sum(-1).cpu()

    record_rows(model, ids, add)
    return (total / (T - first)).float()


def token0_mass(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean weight on token 0, ids (B,T) -> (L,H), of all queries but 0, which has no choice."""
    return key_mass(model, ids, first=1).mean(0)


def sink_metric(
    model: PreTrainedModel, ids: Tensor, *, eps: float = 0.3, k: int = 0, tokens: int = 64
) -> float:
    """Sink^eps_k of 2410.10781: fraction of heads with more than `eps` mean weight on key `k`.

    ids (B,T): the first `tokens` of each row are used; the mean is over rows, layers and heads.
    """
    if not 0 < eps < 1:
        raise ValueError(f"eps={eps}: expected 0 < eps < 1 (0.3 in the paper)")
    if not k < tokens <= ids.shape[-1]:
        raise ValueError(
            f"tokens={tokens}: expected k={k} < tokens <= {ids.shape[-1]}, the length of ids"
        )
    return (key_mass(model, ids[:, :tokens], k=k) > eps).float().mean().item()


def value_norms(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Euclidean norm of each value vector: ids (B,T) -> (L,Hkv,T), mean over the batch."""
    norms: list[Tensor] = []

    def watch(_: int, call: Call) -> None:
        norms.append(call.value.float().norm(dim=-1).mean(0).cpu())  # (B,Hkv,T,D) -> (Hkv,T)

    watch_forward(model, ids, watch)
    return torch.stack(norms)
