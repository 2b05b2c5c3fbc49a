"""The attention function: every read or edit of attention passes through it.

It is registered once, at import, under the name "steerkit" in transformers' `AttentionInterface`
*and* `AttentionMaskInterface`. (A name that is missing from the second gives attention that is
silently not causal.) Edits, recorders and the zero sink are stored on the attention modules for the
length of a `with`. Where a module has none of them, the function is transformers' own SDPA path.

Axes: B batch, L layers, H query heads, Hkv key heads, Q/K query/key positions, D head size,
T tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from steerkit.models import Model

ATTENTION_NAME = "steerkit"
# Keys of a module's `__dict__`. The spaces keep them apart from attributes.
_EDIT, _RECORDER, _ZERO_SINK = "steerkit edit", "steerkit recorder", "steerkit zero sink"


@dataclass(frozen=True)
class AttentionCall:
    """One attention call, rotary embedding applied: query (B,H,Q,D), key and value (B,Hkv,K,D).

    `mask` is None (causal), boolean (True = visible) or additive, and broadcasts to (B,H,Q,K).
    `options` holds what else the architecture passed (dropout, sliding_window, ...). `recorder`
    sees the call that is computed, so after the changes of an edit.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    options: dict[str, Any]
    recorder: "Callable[[AttentionCall], None] | None" = None

    @property
    def zero_sink(self) -> bool:
        """Whether this layer's softmax is softmax-off-by-one."""
        return _ZERO_SINK in self.module.__dict__

    def attend(self, **changes: Any) -> Tensor:
        """The layer's own attention -> (B,Q,H,D); `changes` replace fields for this computation.

        `call.attend(value=2 * call.value)` attends to doubled values and leaves `call` as it is.
        """
        call = replace(self, **changes) if changes else self
        if call.recorder is not None:
            call.recorder(call)
        return call._attend_off_by_one() if call.zero_sink else call._sdpa()

    def _attend_off_by_one(self) -> Tensor:
        """Softmax-off-by-one is softmax with one more key and value, both zero."""
        front = (0, 0, 1, 0)
        call = replace(self, key=F.pad(self.key, front), value=F.pad(self.value, front))
        if self.mask is None and self.query.shape[2] > 1:
            # A zero query in front keeps the causal diagonal in place, so that the fast kernels
            # without a mask stay available. Its output is dropped.
            return replace(call, query=F.pad(self.query, front))._sdpa()[:, 1:]

        if self.mask is not None:
            visible = True if self.mask.dtype == torch.bool else 0.0
            call = replace(call, mask=F.pad(self.mask, (1, 0), value=visible))
        return call._sdpa()

    def _sdpa(self) -> Tensor:
        tensors = (self.query, self.key, self.value, self.mask)
        options = self.options | {"scaling": self.scaling}
        return sdpa_attention_forward(self.module, *tensors, **options)[0]


Edit = Callable[[AttentionCall], Tensor]
"""An edit reads a call and returns its output (B,Q,H,D), usually `call.attend(...)`."""


def steerkit_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **other: Any
) -> tuple[Tensor, None]:
    """What transformers calls in each layer -> (output (B,Q,H,D), None for the weights)."""
    state = module.__dict__
    if _EDIT not in state and _ZERO_SINK not in state and _RECORDER not in state:
        return sdpa_attention_forward(module, query, key, value, mask, **other)

    scaling = other.pop("scaling", None) or query.shape[-1] ** -0.5
    recorder = state.get(_RECORDER)
    call = AttentionCall(module, query, key, value, mask, scaling, other, recorder)
    edit = state.get(_EDIT, AttentionCall.attend)
    return edit(call), None


AttentionInterface.register(ATTENTION_NAME, steerkit_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


@contextmanager
def use_attention_function(model: Model) -> Iterator[None]:
    """Let `model` call the attention function inside the `with`; leave the model as found.

    Raises ValueError for architectures that would be silently wrong or that never call it.
    """
    config = model.config
    if config._attn_implementation == ATTENTION_NAME:
        yield
        return
    calls_it = model._supports_attention_backend and model._can_set_attn_implementation()
    if not (calls_it and model._supports_sdpa):
        raise ValueError(
            f"{type(model).__name__}: steerkit needs attention that goes through transformers' "
            "AttentionInterface and runs on SDPA (no attention code of the model's own, no "
            "soft-capped scores, no learned sinks); use Llama, Qwen, GPT-NeoX or their like"
        )
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    previous = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    previous[""] = config._attn_implementation
    try:
        model.set_attn_implementation(ATTENTION_NAME)
        yield
    finally:
        model.set_attn_implementation(previous)


@contextmanager
def attach(model: Model, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Attach one edit per layer (0-based) for the length of the `with`. Nesting is refused.

    >>> import torch, steerkit
    >>> model, tokenizer = steerkit.load("tiny")
    >>> ids = tokenizer("The first token is a sink.", return_tensors="pt").input_ids
    >>> def without_values(call):
    ...     return call.attend(value=0 * call.value)
    >>> with torch.no_grad(), steerkit.attach(model, {0: without_values}):
    ...     changed = model(ids).logits
    >>> torch.equal(changed, model(ids).logits)
    False
    """
    modules = [call.module for call in trace_attention(model)]
    if unknown := [layer for layer in edits if not 0 <= layer < len(modules)]:
        raise ValueError(f"layers {unknown}: expected 0 <= layer < {len(modules)}")
    by_module = {modules[layer]: edit for layer, edit in edits.items()}
    with use_attention_function(model), attach_to_modules(by_module):
        yield


@contextmanager
def attach_to_modules(edits: Mapping[nn.Module, Any], kind: str = _EDIT) -> Iterator[None]:
    """`attach` for attention modules that are already known, inside `use_attention_function`.

    Recorders and zero sinks are stored in the same way, as another `kind` of state.
    """
    if any(kind in module.__dict__ for module in edits):
        raise ValueError(
            f"a {kind} is already attached to this model: leave its `with` before the next one"
        )
    try:
        for module, edit in edits.items():
            module.__dict__[kind] = edit
        yield
    finally:
        for module in edits:
            module.__dict__.pop(kind, None)


@contextmanager
def softmax_off_by_one(model: Model) -> Iterator[None]:
    """The zero sink of StreamingLLM's Table 3 (2309.17453): weights exp(s) / (1 + sum exp(s)).

    An architecture, not an edit: it has gradients, so train inside the `with`, and evaluate inside
    it too. Recorders, streams and edits compose with it. No checkpoint remembers it.
    """
    sinks = {call.module: True for call in trace_attention(model)}
    with use_attention_function(model), attach_to_modules(sinks, _ZERO_SINK):
        yield


def record_calls(
    model: Model, ids: Tensor, record: Callable[[int, AttentionCall], None], **inputs: Tensor
) -> None:
    """One forward over `ids` (B,T): `record(layer, call)` sees what each layer computes.

    Raises ValueError if some layer does not call the attention function once (linear attention, own
    kernels, an edit that does not attend): it would be left out silently.
    """
    layers, calls = model.config.get_text_config().num_hidden_layers, 0

    def number(call: AttentionCall) -> None:
        nonlocal calls
        if calls < layers:
            record(calls, call)
        calls += 1

    # Dropout draws random numbers in training mode: the generators are put back afterwards.
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        use_attention_function(model),
        attach_to_modules(dict.fromkeys(model.modules(), number), _RECORDER),
        torch.no_grad(),
        torch.random.fork_rng(devices),
    ):
        # The decoder without its LM head: recorders need no logits.
        model.base_model(input_ids=ids.to(model.device), use_cache=False, **inputs)
    if calls != layers:
        raise ValueError(
            f"{type(model).__name__}: {calls} attention calls of {layers} layers could be "
            "recorded; use an architecture with softmax attention throughout, and edits that call "
            "`call.attend()` once"
        )


def trace_attention(
    model: Model, ids: Tensor | None = None, **inputs: Tensor
) -> list[AttentionCall]:
    """The attention calls of one forward over a few tokens `ids` (B,T), first layer first.

    By default one token is run: enough to find each layer's attention module. Raises ValueError
    like `record_calls`, and if an edit is attached.
    """
    ids = torch.zeros(1, 1, dtype=torch.long) if ids is None else ids
    calls: list[AttentionCall] = []
    # No change to any layer, but inside another edit it is refused.
    with attach_to_modules(dict.fromkeys(model.modules(), AttentionCall.attend)):
        record_calls(model, ids, lambda _, call: calls.append(call), **inputs)
    return calls


# Layers and heads


class Head(NamedTuple):
    """One attention head: `layer` and `index` count from 0, `index` counts *query* heads.

    >>> from steerkit import Head
    >>> str(Head(layer=2, index=3))
    'L2H3'
    """

    layer: int
    index: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.index}"


Heads = Iterable[tuple[int, int]] | Mapping[str, Iterable[int]]
"""(layer, index) of each head, or the official head files' {"layer": [query heads]}."""


def layer_and_head_counts(model: Model) -> tuple[int, int]:
    """(L, H): layers, and query heads of each."""
    config = model.config.get_text_config()
    return config.num_hidden_layers, config.num_attention_heads


def heads_by_layer(model: Model, heads: Heads | None) -> dict[int, list[int]]:
    """{layer: its query heads} of `heads`, None for all; each head once, layers in order."""
    L, H = layer_and_head_counts(model)
    if heads is None:
        return {layer: list(range(H)) for layer in range(L)}
    if isinstance(heads, Mapping):
        heads = [(int(layer), index) for layer, indices in heads.items() for index in indices]
    chosen: dict[int, list[int]] = {}
    for head in sorted({Head(*head) for head in heads}):
        if not (0 <= head.layer < L and 0 <= head.index < H):
            raise ValueError(f"{head}: expected 0 <= layer < {L} and 0 <= index < {H} query heads")
        chosen.setdefault(head.layer, []).append(head.index)
    return chosen
