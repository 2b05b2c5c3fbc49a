"""The attention function: every read or edit of attention passes through it.

transformers lets a model call any function in place of its own attention. Ours, "steerkit", passes
each call on to transformers' SDPA attention. For the length of a `with`, a layer may also have

- an edit, which computes something else from the call (`attach`),
- a recorder, which sees what is computed (`record_calls`),
- a zero sink, the architecture of `softmax_off_by_one`,
- a cache that evicts, and hands the edit one part of the keys after another (`SinkCache`).

They are stored on the layer's attention module, and nothing is left of them afterwards. Learned
sinks (gpt-oss: one score per head that takes weight and has no value) are part of the model, so
they are always computed.

One thread per model: what is attached belongs to the thread that entered the `with`, and a call
from another thread raises ValueError. Enter the `with` in the thread that calls `generate`. A
suspended generator or coroutine of the same thread cannot be told apart: until its `with` ends,
every call of the model is steered.

Axes: B batch, L layers, H query heads, Hkv key heads, Q/K query/key positions, D head size,
T tokens.
"""

import inspect
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

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
CACHE = "steerkit cache"
_KINDS = (_EDIT, _RECORDER, _ZERO_SINK, CACHE)
_LAYERS = "steerkit choice of layers"
_ONE_TOKEN = torch.zeros(1, 1, dtype=torch.long)  # enough to find each layer's attention module
# The fast kernels of accelerators want head sizes that are multiples of 8; a CPU's take any.
_ALIGN = {"cpu": 1}


@dataclass(frozen=True)
class AttentionCall:
    """One attention call, rotary embedding applied: query (B,H,Q,D), key and value (B,Hkv,K,D).

    `mask` is None (see `causal`), boolean (True = visible) or additive, and is broadcast to
    (B,H,Q,K). `options` holds what else the architecture passed (dropout, sliding_window, ...).
    `recorder` sees the call that is computed, so after the changes of an edit. `tokens` (K,) are
    the numbers of the keys' tokens, where a cache has evicted some; None: the last K, in order.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    options: dict[str, Any]
    recorder: "Callable[[AttentionCall], None] | None" = None
    tokens: Tensor | None = None

    @property
    def causal(self) -> bool:
        """Whether SDPA hides later keys by itself: without a mask, unless bidirectional."""
        stated = self.options.get("is_causal")
        is_causal = getattr(self.module, "is_causal", True) if stated is None else stated
        return self.mask is None and self.query.shape[2] > 1 and is_causal

    @property
    def learned_sink(self) -> Tensor | None:
        """The learned sink's score of each query head, (H,), where the architecture has one."""
        return self.options.get("s_aux")

    @property
    def sink(self) -> Tensor | None:
        """Score of a key without a value, (H,): learned, or 0 in softmax-off-by-one; else None."""
        if _attached(self.module, _ZERO_SINK):
            return self.query.new_zeros(self.query.shape[1])
        return self.learned_sink

    def attend(self, **changes: Any) -> Tensor:
        """The layer's own attention -> (B,Q,H,D); `changes` replace fields for this computation.

        `call.attend(value=2 * call.value)` attends to doubled values and leaves `call` as it is.
        """
        call = replace(self, **changes) if changes else self
        if call.mask is not None and call.mask.ndim < 4:  # SDPA takes four axes
            call = replace(call, mask=call.mask[(None,) * (4 - call.mask.ndim)])
        if call.recorder is not None:
            call.recorder(call)
        return call._sdpa() if call.sink is None else call._attend_with_sink()

    def widened(self, query: Tensor, key: Tensor) -> "AttentionCall":
        """More dimensions (...,Q,n) and (...,K,n), which add scaling * query . key to the scores.

        They broadcast over batch and heads. Values, and with them the output, get as many zeros:
        the fast kernels want one width for all three.
        """
        n = query.shape[-1]
        fill = -(self.query.shape[-1] + n) % _ALIGN.get(self.query.device.type, 8)

        def wider(x: Tensor, more: Tensor) -> Tensor:
            more = F.pad(more.to(x.dtype), (0, fill))
            return torch.cat([x, more.expand(*x.shape[:3], -1)], dim=-1)

        value = F.pad(self.value, (0, n + fill))
        return replace(self, query=wider(self.query, query), key=wider(self.key, key), value=value)

    def _attend_with_sink(self) -> Tensor:
        """Attention beside a sink: one more score in the softmax, whose weight has no value.

        SDPA has no such score, so the sink becomes one more key, in front of the others, with zeros
        as its value. If the key is zeros as well, its score is q . 0 = 0, the zero sink. A learned
        score s needs one more dimension: s / scaling in every query, 1 in the sink's key and 0 in
        the others. So the sink's score is s, and all other scores are what they were.
        """
        front = (0, 0, 1, 0)
        call = replace(self, key=F.pad(self.key, front), value=F.pad(self.value, front))
        if self.learned_sink is not None:
            score = exact_parts(self.learned_sink / self.scaling, self.query.dtype)  # (H,n)
            is_sink = F.pad(torch.ones_like(score[:1]), (0, 0, 0, self.key.shape[2]))  # 1, 0, 0 ...
            call = call.widened(score[:, None], is_sink)

        width = self.value.shape[-1]
        if self.mask is None and self.query.shape[2] > 1:
            # A zero query in front keeps the causal diagonal in place, so that the fast kernels
            # without a mask stay available. Its output is dropped.
            return replace(call, query=F.pad(call.query, front))._sdpa()[:, 1:, :, :width]

        if self.mask is not None:
            visible = True if self.mask.dtype == torch.bool else 0.0
            call = replace(call, mask=F.pad(self.mask, (1, 0), value=visible))
        return call._sdpa()[..., :width]

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
    if other.get("s_aux") is None and not any(kind in module.__dict__ for kind in _KINDS):
        return sdpa_attention_forward(module, query, key, value, mask, **other)

    scaling = other.pop("scaling", None) or query.shape[-1] ** -0.5
    recorder = _attached(module, _RECORDER)
    call = AttentionCall(module, query, key, value, mask, scaling, other, recorder)
    edit = _attached(module, _EDIT) or AttentionCall.attend
    cache = _attached(module, CACHE)
    return edit(call) if cache is None else cache(call, edit), None


def _attached(module: nn.Module, kind: str) -> Any:
    """What is attached to `module`, or None; ValueError in a thread that did not attach it."""
    if kind not in module.__dict__:
        return None
    attached, thread = module.__dict__[kind]
    # The backward pass has threads of its own, in which checkpointed layers run once more.
    backward = torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1
    if not backward and thread != threading.get_ident():
        raise ValueError(
            "another thread has attached an edit or a recorder to this model: use a model in one "
            "thread at a time, and enter the `with` in the thread that calls the model"
        )
    return attached


def exact_parts(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers (...,n) that add up to x (...): two in half precision, which rounds, else one."""
    high = x.to(dtype)
    if dtype.itemsize > 2:
        return high[..., None]
    return torch.stack([high, (x.float() - high).to(dtype)], dim=-1)


# A name that is missing from the second gives attention that is silently not causal.
AttentionInterface.register(ATTENTION_NAME, steerkit_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


@contextmanager
def use_attention_function(model: Model) -> Iterator[None]:
    """Inside the `with`, `model` calls the attention function; afterwards what it called before.

    Raises ValueError for architectures that would be silently wrong or that never call it.
    """
    config = model.config
    if config._attn_implementation == ATTENTION_NAME:
        yield
        return
    if config.is_encoder_decoder or not model._can_set_attn_implementation():
        raise ValueError(_OWN_CODE.format(type(model).__name__))
    parts = {"": config} | {name: getattr(config, name, None) for name in config.sub_configs}
    previous = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    try:
        if model not in _CHECKED:
            _refuse_own_masks(model)
            _refuse_uncomputed(model)
            _CHECKED.add(model)
        model.set_attn_implementation(ATTENTION_NAME)
        with model.register_forward_pre_hook(_refuse_weights, with_kwargs=True):
            yield
    finally:
        model.set_attn_implementation(previous)


def _refuse_weights(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions=True: the attention function returns no weights; leave it out, and "
            "read them with steerkit.attention_weights inside the same `with`"
        )


_CHECKED: weakref.WeakSet[Model] = weakref.WeakSet()  # models that need no second look
_OWN_CODE = (
    "{}: its attention does not go through transformers' AttentionInterface (attention code or "
    "masks of the model's own), or it is an encoder and a decoder; use Llama, Qwen or GPT-NeoX"
)


def _refuse_own_masks(model: Model) -> None:
    """ValueError if a new name of the function changes the model, padding included.

    Asked only where transformers does not promise that it does not.
    """
    if model._supports_attention_backend or not model._supports_sdpa:
        return
    ids = torch.arange(12).view(2, 6)
    real = (ids >= ids[:, :1] * 4 // 3).long()  # two pads in the second row
    states = []
    for name in ("sdpa", ATTENTION_NAME):
        model.set_attn_implementation(name)
        states.append(_forward(model, ids, attention_mask=real.to(model.device)))
    if not torch.allclose(*states, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ValueError(_OWN_CODE.format(type(model).__name__))


def _refuse_uncomputed(model: Model) -> None:
    """ValueError unless learned sinks are all that keeps transformers from running it on SDPA."""
    if model._supports_sdpa:
        return
    model.set_attn_implementation(ATTENTION_NAME)
    known = {*inspect.signature(sdpa_attention_forward).parameters, "s_aux"}

    def check(call: AttentionCall) -> Tensor:
        eager = getattr(sys.modules[type(call.module).__module__], "eager_attention_forward", None)
        read = inspect.signature(eager).parameters if eager else call.options
        more = sorted(name for name in {*read} - known if call.options.get(name) is not None)
        if call.key.shape[2] != call.query.shape[2]:
            more.append("keys that stand for several tokens")
        if more or "s_aux" not in call.options:
            raise ValueError(
                f"{type(model).__name__}: SDPA cannot compute its attention: "
                f"{', '.join(more) or 'transformers does not say why'} (softcap means soft-capped "
                "scores, as in Gemma-2); use Llama, Qwen, GPT-NeoX or their like"
            )
        return call.attend()

    with attach_to_modules(dict.fromkeys(model.modules(), check)):
        _forward(model, _ONE_TOKEN.expand(1, 256))  # enough to compress keys


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
    calls = trace_attention(model)
    if unknown := [layer for layer in edits if layer not in calls]:
        raise ValueError(f"layers {unknown}: expected ints in {layers_of(model)}")
    by_module = {calls[layer].module: edit for layer, edit in edits.items()}
    with use_attention_function(model), attach_to_modules(by_module):
        yield


@contextmanager
def attach_to_modules(edits: Mapping[nn.Module, Any], kind: str = _EDIT) -> Iterator[None]:
    """`attach` for attention modules that are already known, inside `use_attention_function`.

    Recorders and zero sinks are stored in the same way, as another `kind` of state.
    """
    if any(_attached(module, kind) for module in edits):
        raise ValueError(
            f"a {kind} is already attached to this model: leave its `with` before the next one "
            "(make a SinkCache before you enter it)"
        )
    try:
        for module, edit in edits.items():
            module.__dict__[kind] = edit, threading.get_ident()
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
    calls = trace_attention(model).values()
    if any(call.sink is not None for call in calls):
        raise ValueError(f"{type(model).__name__} has learned sinks, or a zero sink, already")
    sinks = {call.module: True for call in calls}
    with use_attention_function(model), attach_to_modules(sinks, _ZERO_SINK):
        yield


@contextmanager
def softmax_layers_only(model: Model) -> Iterator[list[int]]:
    """Steer, read and map a hybrid model: inside the `with`, its softmax layers alone.

    Hybrids (Qwen3-Next, LFM2, Jamba) have linear attention, convolutions or Mamba in other layers,
    and are refused without this. Layers keep the model's numbers; a warning says which are left
    out, and in what is recorded they are 0. Streaming and `score_heads` need every layer.
    """
    calls: list[AttentionCall] = []
    _run_recorded(model, _ONE_TOKEN, calls.append)
    layers = [call.module.layer_idx for call in calls]
    left_out = sorted({*layers_of(model)} - {*layers})
    if not layers or layers != sorted({*layers}):
        raise ValueError(f"softmax layers {layers}: expected some, each with a module of its own")
    if left_out:
        warnings.warn(f"layers {left_out} have no softmax attention and are left out", stacklevel=3)
    with attach_to_modules({model: layers}, _LAYERS):
        yield layers


def layers_of(model: Model, *, every: bool = False) -> Sequence[int]:
    """The model's layers; inside `softmax_layers_only` those with softmax, unless `every`."""
    chosen = None if every else _attached(model, _LAYERS)
    return chosen or range(model.config.get_text_config().num_hidden_layers)


def record_calls(
    model: Model,
    ids: Tensor,
    record: Callable[[int, AttentionCall], None],
    *,
    every_layer: bool = False,
    **inputs: Tensor,
) -> None:
    """One forward over `ids` (B,T): `record(layer, call)` sees what each layer computes.

    Raises ValueError if some layer does not call the attention function once (linear attention, own
    kernels, an edit that does not attend): it would be left out silently. `every_layer` raises it
    inside `softmax_layers_only` too.
    """
    layers = layers_of(model, every=every_layer)
    modules: list[nn.Module] = []

    def number(call: AttentionCall) -> None:
        if len(modules) < len(layers):
            record(layers[len(modules)], call)
        modules.append(call.module)

    _run_recorded(model, ids, number, **inputs)
    if len(modules) != len(layers):
        found = {getattr(module, "layer_idx", None) for module in modules}
        raise ValueError(
            f"{type(model).__name__}: {len(modules)} attention calls of {len(layers)} layers could "
            f"be recorded (none in {sorted({*layers} - found)}); use softmax attention throughout "
            "(or `softmax_layers_only`), and edits that call `call.attend()` once"
        )


def _run_recorded(
    model: Model, ids: Tensor, record: Callable[[AttentionCall], None], **inputs: Any
) -> None:
    recorders = dict.fromkeys(model.modules(), record)
    with use_attention_function(model), attach_to_modules(recorders, _RECORDER):
        _forward(model, ids, **inputs)


@torch.no_grad()
def _forward(model: Model, ids: Tensor, **inputs: Any) -> Tensor:
    """Last hidden states (B,T,width) of ids (B,T), without the LM head."""
    # Dropout draws random numbers in training mode: the generators are put back afterwards.
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        return model.base_model(input_ids=ids.to(model.device), use_cache=False, **inputs)[0]


def trace_attention(
    model: Model, ids: Tensor = _ONE_TOKEN, **inputs: Any
) -> dict[int, AttentionCall]:
    """{layer: its attention call} of one forward over a few tokens `ids` (B,T).

    By default one token is run: enough to find each layer's attention module. Raises ValueError
    like `record_calls`, and if an edit is attached.
    """
    calls: dict[int, AttentionCall] = {}
    # No change to any layer, but inside another edit it is refused.
    unchanged = dict.fromkeys(model.modules(), AttentionCall.attend)
    with use_attention_function(model), attach_to_modules(unchanged):
        record_calls(model, ids, calls.__setitem__, **inputs)
    return calls
