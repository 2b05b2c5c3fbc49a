"""`SinkCache`: the cache of StreamingLLM (2309.17453, section 3.2), for streams without end.

A token attends to the first S tokens (the sinks), to the R tokens before it (the window) and to
itself. What is neither sink nor recent is evicted: its key and value are overwritten. With S = 2
and R = 4, after the tokens 0 to 8:

    slot      0    1  |  2    3    4    5    6
    token     0    1  |  7    8    4    5    6
              sinks   |  ring of R + 1 slots
                              |    |
                         newest    oldest: evicted by token 9

Positions are counted inside the cache, not in the text. The kept tokens in order, 0 1 4 5 6 7 8,
have the positions 0 to 6; so the newest token never stands beyond position S + R. The function
`visible` below says the same in code. `SinkCache` does it fast, without moving every key each time:

- A recent key has its true distance from the query. It stays as the model rotated it.
- Only a sink's distance differs from the text's, by the *excess* of the token's position in the
  text over S + R. For one query the S sink keys are rotated by the excess. In a block of queries
  each has its own excess: the sinks' scores are corrected instead.

Axes: B batch, H query heads, K keys, D head size, S sinks, R window, n new tokens of a forward.
"""

import copy
import weakref
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from steerkit.attention import hook
from steerkit.attention.hook import AttentionCall, Edit
from steerkit.attention.rope import Rotation, learn_rotations, rope_kinds
from steerkit.models import Model

# How far the model's positions may run ahead of the cache's before all keys are rotated back. The
# model's angles are float32, exact at small positions only. Keys in half precision lose more by
# each rotation than by a large angle, so they are rotated back more rarely.
_AHEAD_FLOAT32, _AHEAD_HALF = 256, 4096
_QUERY_CHUNK = 256  # queries that share one mask


def visible(t: int, sinks: int, window: int) -> list[int]:
    """The tokens that token t attends to; the place in this list is a token's position."""
    return [*range(min(sinks, t + 1)), *range(max(sinks, t - window), t + 1)]


@dataclass
class StreamState:
    """Where the stream of one cache stands. All layers share it; a forward changes it once.

    seen: tokens of the stream before the running forward.
    shift: the model gives token t the position t - shift.
    new: tokens of the running forward; 0 between forwards.
    shared: what all layers of the running forward need, made by the first of them.
    """

    sinks: int
    window: int
    seen: int = 0
    shift: int = 0
    new: int = 0
    shared: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def capacity(self) -> int:
        return self.sinks + self.window + 1

    @property
    def is_block(self) -> bool:
        """Several queries, and not all kept keys are visible to all: the mask is not causal."""
        return self.new > 1 and self.seen + self.new > self.capacity

    def oldest(self, start: int = 0) -> int:
        """The first token behind the sinks that the new token number `start` attends to."""
        return max(self.sinks, self.seen + start - self.window)

    def share(self, make: Callable[..., Any], *args: Hashable) -> Any:
        """`make(*args)`, computed once for all layers of a forward. Nobody writes into it."""
        key = (make.__name__, *args)
        if key not in self.shared:
            self.shared[key] = make(*args)
        return self.shared[key]

    def slots(self, start: int, stop: int) -> tuple[slice, slice]:
        """Slots of the tokens `start` to `stop` behind the sinks: up to the ring's end, and on."""
        first = self.sinks + (start - self.sinks) % (self.window + 1)
        end = first + max(0, stop - start)
        over = max(0, end - self.capacity)
        return slice(first, end - over), slice(self.sinks, self.sinks + over)

    def table(self, rotation: Rotation, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rotation of each new token by its excess: the model's position minus the cache's."""
        t = torch.arange(self.seen, self.seen + self.new, device=device)
        return rotation.table(t - self.shift - t.clamp(max=self.sinks + self.window))

    def tokens(self, start: int, stop: int, device: torch.device) -> Tensor:
        """The keys' tokens, for the new tokens `start` to `stop` of a block: sinks and band."""
        recent = torch.arange(self.oldest(start), self.seen + stop, device=device)
        return torch.cat([torch.arange(self.sinks, device=device), recent])

    def tokens_by_slot(self, device: torch.device) -> Tensor:
        """Each slot's token, once the cache is full and holds the newest one."""
        newest, ring = self.seen + self.new - 1, self.window + 1
        slots = torch.arange(self.capacity, device=device)
        age = (newest - slots) % ring  # of the token in a slot of the ring
        return slots.where(slots < self.sinks, newest - age)

    def mask(self, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """0 or -inf for the new tokens `start` to `stop`: (1,1,n,K), sinks first."""
        t = torch.arange(self.seen + start, self.seen + stop, device=device)[:, None]
        sink = torch.arange(self.sinks, device=device)
        recent = torch.arange(self.oldest(start), self.seen + stop, device=device)
        seen = torch.cat([sink <= t, (recent <= t) & (recent >= t - self.window)], dim=1)
        bias = torch.zeros(seen.shape, dtype=dtype, device=device)
        return bias.masked_fill_(~seen, float("-inf"))[None, None]


class SinkLayer(CacheLayerMixin):
    """Keys and values (B,Hkv,S+R+1,D) of one layer, in slots that are allocated once."""

    def __init__(self, state: StreamState, rotation: Rotation | None) -> None:
        super().__init__()
        self.state, self.rotation = state, rotation  # rotation None: the layer has no positions

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        B, heads, _, D = key_states.shape
        self.keys = key_states.new_zeros(B, heads, self.state.capacity, D)
        self.values = value_states.new_zeros(B, heads, self.state.capacity, value_states.shape[3])
        self.sink_keys = key_states.new_zeros(B, heads, self.state.sinks, D)  # never rotated again
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store n new keys and values (B,Hkv,n,D); return those that this forward attends to."""
        state, n = self.state, key_states.shape[2]
        if n != state.new:
            raise ValueError(f"{n} new keys: call the model this SinkCache was made for, no other")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if state.is_block:
            return self._store_block(key_states, value_states)
        self._store(key_states, value_states)
        if state.sinks and self.rotation and n == 1:
            table = state.share(state.table, self.rotation, self.keys.device)
            self.keys[:, :, : state.sinks] = self.rotation.rotate(self.sink_keys, table)
        held = min(state.seen + n, state.capacity)
        return self.keys[:, :, :held], self.values[:, :, :held]

    def _store(self, key: Tensor, value: Tensor) -> None:
        """Put the new tokens into their slots; of a long block only the last R + 1 and sinks."""
        state, end = self.state, self.state.seen + key.shape[2]
        if state.seen < state.sinks:
            new = slice(state.seen, min(end, state.sinks))
            count = new.stop - new.start
            self.values[:, :, new] = value[:, :, :count]
            self.keys[:, :, new] = self.sink_keys[:, :, new] = key[:, :, :count]
        first = max(state.sinks, state.seen, end - state.window - 1)
        for slots in state.slots(first, end):
            new = slice(first - state.seen, first - state.seen + slots.stop - slots.start)
            self.keys[:, :, slots], self.values[:, :, slots] = key[:, :, new], value[:, :, new]
            first += slots.stop - slots.start

    def _store_block(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store a block that evicts; return the sinks, the kept tokens and the block, in order."""
        state = self.state
        sinks, ring = slice(min(state.seen, state.sinks)), state.slots(state.oldest(), state.seen)
        keys = [self.sink_keys[:, :, sinks], *(self.keys[:, :, slots] for slots in ring), key]
        values = [*(self.values[:, :, slots] for slots in (sinks, *ring)), value]
        ordered = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        self._store(key, value)
        return ordered

    def attend(self, call: AttentionCall, edit: Edit) -> Tensor:
        """`edit` of a call that sees what the cache kept -> (B,n,H,D).

        Of a block of queries, the result equals one query at a time.
        """
        state = self.state
        if not state.is_block:
            return edit(replace(call, tokens=state.share(state.tokens_by_slot, call.key.device)))
        starts = range(0, call.query.shape[2], _QUERY_CHUNK)
        return torch.cat([edit(self._chunk(call, start)) for start in starts], dim=1)

    def _chunk(self, call: AttentionCall, start: int) -> AttentionCall:
        """The same for the new tokens from `start` on: the sinks and a band of recent keys."""
        state, S, key, value = self.state, self.state.sinks, call.key, call.value
        query = call.query[:, :, start : start + _QUERY_CHUNK]
        stop = start + query.shape[2]
        shift = S - state.oldest()  # a token's place among the call's keys, minus its number
        band = slice(state.oldest(start) + shift, state.seen + stop + shift)
        if band != slice(S, key.shape[2]):
            key, value = (torch.cat([x[:, :, :S], x[:, :, band]], dim=2) for x in (key, value))
        mask = state.share(state.mask, start, stop, query.dtype, query.device)  # (1,1,n,K)
        if S and self.rotation:
            sinks = mask[..., :S] + self._sink_bias(query, start, call.scaling)
            mask = torch.cat([sinks, mask[..., S:].expand(*sinks.shape[:3], -1)], dim=3)
        tokens = state.share(state.tokens, start, stop, query.device)
        return replace(call, query=query, key=key, value=value, mask=mask, tokens=tokens)

    def _sink_bias(self, query: Tensor, start: int, scaling: float) -> Tensor:
        """What brings sinks to their distance: (rotated q - q) . k_sink, (B,H,n,D) -> (B,H,n,S)."""
        B, H, n, D = query.shape
        cos, sin = self.state.share(self.state.table, self.rotation, query.device)
        back = cos[start : start + n], -sin[start : start + n]
        difference = self.rotation.rotate(query.float(), back) - query.float()
        grouped = difference.view(B, -1, H // self.sink_keys.shape[1], n, D)  # (B,Hkv,G,n,D)
        scores = grouped @ self.sink_keys.float().mT[:, :, None] * scaling
        return scores.view(B, H, n, -1).to(query.dtype)

    def rotate_back(self, steps: int) -> None:
        """Take `steps` off the positions of the ring's keys."""
        if self.rotation and self.is_initialized:
            table = self.rotation.table(torch.tensor([-steps], device=self.keys.device))
            ring = self.keys[:, :, self.state.sinks :]
            ring.copy_(self.rotation.rotate(ring, table))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, number of the first one's token); a block brings its own mask."""
        end = self.state.seen + query_length
        keys = min(end, self.state.capacity)
        return keys, end - keys

    def get_seq_length(self) -> int:
        """Tokens seen, not kept: `generate` slices its input by this."""
        return self.state.seen

    def get_max_length(self) -> int:
        """-1: no limit, a stream may go on for ever."""
        return -1

    def reset(self) -> None:
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: stream i goes on as stream beam_idx[i]."""
        super().reorder_cache(beam_idx)
        self.sink_keys = self.sink_keys.index_select(0, beam_idx.to(self.sink_keys.device))

    def crop(self, tokens_to_remove: int) -> None:
        """Assisted decoding takes tokens back; what was evicted for them is gone."""
        if tokens_to_remove:
            raise ValueError("SinkCache cannot take tokens back: use no assisted decoding")


class SinkCache(Cache):
    """The first `sinks` and the last `window` tokens: `generate(..., past_key_values=cache)`.

    Memory and time per token do not depend on the length of the stream. Takes prompts longer than
    itself, further turns, batches of equal length and beam search. Inference only.

    The cache belongs to `model`. `generate` has no `with` in which positions could be set, so a
    forward hook sets them: it acts only on forwards that carry this cache, and it stays on the
    model until the cache is deleted. The hook raises ValueError for what would be silently wrong:
    padding, foreign positions, gradients, a forward that did not end.

    >>> import steerkit
    >>> model, tokenizer = steerkit.load("tiny")
    >>> cache = steerkit.SinkCache(model, sinks=4, window=20)
    >>> ids = tokenizer("Rome is far from here. " * 20, return_tensors="pt").input_ids
    >>> new = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
    >>> cache.seen == new.shape[1] - 1, cache.layers[0].keys.shape[2]
    (True, 25)
    """

    def __init__(self, model: Model, *, sinks: int = 4, window: int = 1020) -> None:
        for name, value, least in (("sinks", sinks, 0), ("window", window, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: expected a whole number, {least} or more")
        # An adapter (PEFT) wraps the model, and its `generate` calls the model inside.
        model = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
        calls, rotations = learn_rotations(model)
        _refuse_unstreamable(model, calls, sinks + window + 1)
        self.state = StreamState(sinks, window)
        layers = [SinkLayer(self.state, rotation) for rotation in rotations]
        super().__init__(layers=layers)
        self._model = model
        self._edits = {call.module: layer.attend for call, layer in zip(calls, layers, strict=True)}
        self._forward = ExitStack()
        for handle in self._hook_forward():
            weakref.finalize(self, handle.remove)

    @property
    def seen(self) -> int:
        """Tokens of the stream so far, evicted ones included."""
        return self.state.seen

    @property
    def never_evicted(self) -> int:
        """The first tokens, which alone can be steered: asked by the steering methods."""
        return self.state.sinks

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values: constant from the first forward on."""
        tensors = [(x.keys, x.values, x.sink_keys) for x in self.layers if x.is_initialized]
        return sum(x.nbytes for layer in tensors for x in layer)

    def reset(self) -> None:
        """Forget the stream; the next forward begins a new one."""
        super().reset()
        self.state.seen = self.state.shift = self.state.new = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "SinkCache":
        """The same stream in a cache of its own, for the same model (not a copy of the model)."""
        other = SinkCache(self._model, sinks=self.state.sinks, window=self.state.window)
        vars(other.state).update(copy.deepcopy(vars(self.state), memo))
        memo[id(self.state)] = other.state  # which all layers of the copy share
        for layer, mine in zip(other.layers, self.layers, strict=True):
            vars(layer).update(copy.deepcopy(vars(mine), memo))
        return other

    def __copy__(self) -> "SinkCache":
        return copy.deepcopy(self)

    def __reduce__(self) -> Any:
        raise ValueError(
            "a SinkCache belongs to its model and cannot be pickled: save the stream's token ids, "
            "and read them into a new SinkCache"
        )

    def _hook_forward(self) -> list[Any]:
        """Hooks around the model's forward that act only on calls that carry this cache."""
        number = id(self)  # a reference would keep the cache alive

        def before(_: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            cache = kwargs.get("past_key_values")
            return (args, cache._begin(args, kwargs)) if id(cache) == number else None

        def after(_: Model, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            cache = kwargs.get("past_key_values")
            if id(cache) == number:
                cache._end(finished=output is not None)

        return [
            self._model.register_forward_pre_hook(before, with_kwargs=True),
            self._model.register_forward_hook(after, with_kwargs=True, always_call=True),
        ]

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Prepare a forward; return its keyword arguments with the positions of this stream."""
        inputs = kwargs.get("input_ids", args[0] if args else None)
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        state, n = self.state, inputs.shape[1]
        if state.new:
            raise ValueError("the last forward did not finish: call reset() and start anew")
        if torch.is_grad_enabled():
            raise ValueError("SinkCache keeps no gradients: call the model under torch.no_grad()")
        _refuse_misplaced(kwargs, state.seen, n)
        state.new = n
        self._restart_positions()
        steered = self._model.config._attn_implementation == hook.ATTENTION_NAME
        if state.is_block or (steered and state.seen + n > state.capacity):
            self._forward.enter_context(hook.use_attention_function(self._model))
            self._forward.enter_context(hook.attach_to_modules(self._edits, hook.CACHE))
        positions = torch.arange(state.seen, state.seen + n, device=inputs.device) - state.shift
        return kwargs | {"position_ids": positions[None], "attention_mask": None}

    def _restart_positions(self) -> None:
        """Set the model's positions back to the cache's, S + R, before they run far ahead."""
        state = self.state
        ahead = state.seen - state.shift - (state.sinks + state.window)
        limit = _AHEAD_FLOAT32 if self._model.dtype == torch.float32 else _AHEAD_HALF
        if ahead > 0 and ahead + state.new > limit:
            for layer in self.layers:
                layer.rotate_back(ahead)
            state.shift += ahead

    def _end(self, finished: bool) -> None:
        """Leave the model as found. After a forward that broke off, `new` stays and says so."""
        self._forward.close()
        self.state.shared.clear()
        if finished:
            self.state.seen += self.state.new
            self.state.new = 0


def _refuse_misplaced(kwargs: dict[str, Any], seen: int, n: int) -> None:
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and (mask.ndim != 2 or (mask[:, -n if seen else 0 :] == 0).any()):
        raise ValueError("padding would become sinks: batch prompts of equal length, without mask")
    expected = torch.arange(seen, seen + n)
    if not n or (positions is not None and not positions.cpu().eq(expected).all()):
        raise ValueError(
            f"these inputs do not follow the {seen} tokens of the cache: if it holds another "
            "stream, call reset(); if you give position_ids, leave them out"
        )


def changes_with_length(model: Model) -> str | None:
    """The model's RoPE type, if it changes the frequencies with the length of the text."""
    kinds = sorted(rope_kinds(model))
    return next((kind for kind in kinds if "dynamic" in kind or kind == "longrope"), None)


def _refuse_unstreamable(model: Model, calls: list[AttentionCall], keys: int) -> None:
    """What would be silently wrong, decided on features: RoPE type and what each layer passes."""
    if model._is_stateful:
        raise ValueError(
            f"{type(model).__name__} carries a state beside its keys (Mamba, convolution), which a "
            "SinkCache does not hold: stream a model with attention alone"
        )
    if kind := changes_with_length(model):
        raise ValueError(
            f"RoPE type {kind!r} changes its frequencies with length, so cached keys cannot be "
            "moved; set a static type (default, linear, yarn, llama3) in rope_parameters"
        )
    if (chunk := getattr(model.config.get_text_config(), "attention_chunk_size", None)) is not None:
        raise ValueError(f"attention_chunk_size={chunk}: chunks do not see sinks of earlier ones")
    for layer, call in enumerate(calls):
        local = call.options.get("sliding_window")
        if local is not None and local < keys:
            raise ValueError(
                f"layer {layer} sees only the last {local} tokens (sliding_window), fewer than the "
                f"{keys} of this cache: choose sinks + window <= {local - 1}"
            )
