"""`SinkCache`: the cache of StreamingLLM (2309.17453, section 3.2): sink tokens + a ring of recent
keys.

A token attends to S sinks, to the R keys before it and to itself, at positions counted inside the
cache: the query of token t sits at slot min(t, S + R). Seen from the query: recent keys at their
true distance, sink i at distance min(t, S + R) - i. So recent keys stay as the model rotated them,
and only S keys turn per token. Axes: B batch, H query heads, K key positions, D head size, S sinks,
R window, n new tokens of one forward.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from steerkit.attention.hook import AttentionCall, attach_to_modules, use_attention_function
from steerkit.attention.rope import Rotation, learn_rotations, rope_kinds

# How far the model's positions may run ahead of the cache's before they restart. Its angles are
# float32, so small positions are exact; keys in half precision lose more by being turned again, and
# restart seldom.
_AHEAD_FLOAT32, _AHEAD_HALF = 256, 4096
_QUERY_CHUNK = 256


class _Stream:
    """What the layers of one cache share: where the stream stands, and the forward now running."""

    def __init__(self, sinks: int, window: int) -> None:
        self.sinks, self.window, self.capacity = sinks, window, sinks + window + 1
        self.restart()

    def restart(self) -> None:
        self.seen = 0  # tokens of the whole stream
        self.shift = 0  # what re-basing took off the model's positions
        self.origin = 0  # token t sits in ring slot (t - S - origin) % (R + 1)
        self.n = 0  # new tokens of the running forward, 0 between forwards
        self.updated = 0  # layers that have stored them
        self.tables: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}
        self.bias: tuple[tuple[Any, ...], Tensor | None] = ((), None)

    @property
    def fits(self) -> bool:
        """The forward evicts nothing, or has one query: the model's own attention is right."""
        return self.n == 1 or self.seen + self.n <= self.capacity

    @property
    def slot(self) -> int:
        """Ring slot of the next token, and of the oldest key once the ring is full."""
        return (self.seen - self.sinks - self.origin) % (self.window + 1)

    def table(
        self, rotation: Rotation, queries: range, sign: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Turn by sign * (model's position - in-cache position) of new tokens, for all layers."""
        key = (id(rotation), queries.start, device)
        if key not in self.tables:
            t = torch.arange(queries.start, queries.stop) + self.seen
            excess = t - self.shift - t.clamp(max=self.sinks + self.window)
            self.tables[key] = rotation.table(sign * excess.to(device))
        return self.tables[key]

    def advance(self) -> None:
        if not self.fits:
            self.origin = self.seen + self.n - self.capacity  # a block leaves the ring sorted
        self.seen += self.n
        self.n = 0
        self.tables.clear()

    def visible_bias(self, call: AttentionCall, first: int, rest: int) -> Tensor:
        """0 / -inf (B,H,n,K): keys are the sinks and the tokens from `rest`, queries from `first`.

        Kept between calls: in a long stream every block has the same one, and layers rewrite the
        sink columns.
        """
        (B, H, n, _), K, query = call.query.shape, call.key.shape[2], call.query
        key = (B, H, n, K, first - rest, min(first, self.sinks), query.dtype, query.device)
        if self.bias[0] != key:
            t = torch.arange(first, first + n, device=query.device)[:, None]
            j = torch.arange(rest, rest + K - self.sinks, device=query.device)
            sink = torch.arange(self.sinks, device=query.device)
            seen = torch.cat([sink <= t, (j <= t) & (j >= t - self.window)], dim=1)
            bias = query.new_zeros(B, H, n, K).masked_fill_(~seen, float("-inf"))
            self.bias = (key, bias)
        bias = self.bias[1]
        assert bias is not None
        return bias


class SinkLayer(CacheLayerMixin):
    """Keys and values of one layer, allocated once: slots [S sinks | ring of R + 1]."""

    def __init__(self, stream: _Stream, rotation: Rotation | None) -> None:
        super().__init__()
        self.stream, self.rotation = stream, rotation

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def slots(states: Tensor, count: int) -> Tensor:
            return states.new_zeros(*states.shape[:2], count, states.shape[3])

        self.keys = slots(key_states, self.stream.capacity)
        self.values = slots(value_states, self.stream.capacity)
        self.sink_keys = slots(key_states, self.stream.sinks)  # as the model first rotated them
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store n new keys and values (B,Hkv,n,D); return those that this forward attends to."""
        stream, n = self.stream, key_states.shape[2]
        if n != stream.n:
            raise ValueError(
                f"{n} new keys, {stream.n} announced: call the model this SinkCache was made for"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.keys.shape[0]:
            raise ValueError(
                f"a batch of {key_states.shape[0]} rows for a cache of {self.keys.shape[0]}: "
                "call reset() first"
            )
        S, seen = stream.sinks, stream.seen
        if seen < S:
            self.sink_keys[:, :, seen : seen + n] = key_states[:, :, : S - seen]
        stream.updated += 1
        return (self._append if stream.fits else self._roll)(key_states, value_states)

    def _append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Into the slots in place: the ring's order does not matter to a single query."""
        stream, n = self.stream, key.shape[2]
        S, seen = stream.sinks, stream.seen
        start = seen if seen < stream.capacity else S + stream.slot
        self.keys[:, :, start : start + n], self.values[:, :, start : start + n] = key, value
        held = min(seen + n, stream.capacity)
        return self.keys[:, :, :held], self.values[:, :, :held]

    def _roll(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys in the stream's order, for a block of queries; the ring is left sorted."""
        S, R = self.stream.sinks, self.stream.window
        keys, values = self._in_order(self.keys, key), self._in_order(self.values, value)
        self.keys[:, :, S:], self.values[:, :, S:] = keys[:, :, -R - 1 :], values[:, :, -R - 1 :]
        self.values[:, :, :S] = values[:, :, :S]
        self.keys[:, :, :S] = keys[:, :, :S] = self.sink_keys
        return keys, values

    def _in_order(self, slots: Tensor, new: Tensor) -> Tensor:
        stream = self.stream
        S, held = stream.sinks, slots[:, :, : stream.seen]
        ring = held[:, :, S:]
        if stream.seen >= stream.capacity:
            ring = ring.roll(-stream.slot, 2)
        return torch.cat([held[:, :, :S], ring, new], dim=2)

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention of a block of queries at once, equal to one at a time -> (B,n,H,D)."""
        stream, n = self.stream, call.query.shape[2]
        S, R, seen = stream.sinks, stream.window, stream.seen
        query, key, value = call.query, call.key, call.value
        oldest = max(S, seen - R - 1)  # the token whose key follows the sinks
        out = []
        for a in range(0, n, _QUERY_CHUNK):
            queries = range(a, min(a + _QUERY_CHUNK, n))
            start = oldest if n <= _QUERY_CHUNK else max(oldest, seen + a - R)
            band = slice(S + start - oldest, S + seen + queries.stop - oldest)
            call.query, call.key, call.value = query[:, :, a : queries.stop], key, value
            if band != slice(S, key.shape[2]):
                call.key = torch.cat([key[:, :, :S], key[:, :, band]], dim=2)
                call.value = torch.cat([value[:, :, :S], value[:, :, band]], dim=2)
            call.mask = stream.visible_bias(call, seen + a, start)
            if S:
                call.mask[..., :S] = self._sink_bias(call, queries)
            out.append(call.attend())
        return torch.cat(out, dim=1) if len(out) > 1 else out[0]

    def _sink_bias(self, call: AttentionCall, queries: range) -> Tensor:
        """(B,H,n,S) that brings sinks to their distance: (turned q - q) . k_sink * scaling."""
        S = self.stream.sinks
        B, H, n, D = call.query.shape
        bias = call.query.new_zeros(B, H, n, S)
        if self.rotation:
            query = call.query.float()
            table = self.stream.table(self.rotation, queries, -1, query.device)
            turned = self.rotation.rotate(query, table)
            grouped = (turned - query).view(
                B, -1, H // self.sink_keys.shape[1], n, D
            )  # (B,Hkv,G,n,D)
            scores = grouped @ self.sink_keys.float().mT[:, :, None] * call.scaling
            bias = scores.view(B, H, n, S).to(bias.dtype)
        first = self.stream.seen + queries.start
        if first < S:
            t = torch.arange(first, first + n, device=bias.device)[:, None]
            bias.masked_fill_(torch.arange(S, device=bias.device) > t, float("-inf"))
        return bias

    def rebase(self, steps: int) -> None:
        """Take `steps` off the positions of the ring's keys."""
        if self.rotation and self.is_initialized:
            table = self.rotation.table(torch.tensor([-steps], device=self.keys.device))
            ring = self.keys[:, :, self.stream.sinks :]
            ring.copy_(self.rotation.rotate(ring, table))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, offset of the first): a block brings its own mask, so it asks for the plain causal
        one.
        """
        seen = self.stream.seen
        if self.stream.n > 1 and not self.stream.fits:
            return query_length, seen
        keys = min(seen + query_length, self.stream.capacity)
        return keys, seen + query_length - keys

    def get_seq_length(self) -> int:
        """Tokens seen, not kept: `generate` slices its input by this."""
        return self.stream.seen

    def get_max_length(self) -> int:
        """-1: no limit, a stream may go on for ever."""
        return -1

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values, self.sink_keys] if self.is_initialized else []

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the batch axis of everything stored (beam search)."""
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
            self.sink_keys = change(self.sink_keys)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.each(lambda x: x[indices])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                "SinkCache cannot take tokens back: what it evicted is gone; generate without "
                "assisted decoding and prompt lookup"
            )


class SinkCache(Cache):
    """The `sinks` first and `window` most recent tokens: `generate(..., past_key_values=cache)`.

    Endless: positions are counted inside the cache, memory and time per token do not depend on the
    length of the stream. Takes prompts longer than itself, further turns, batches of equal length
    and beam search, and belongs to `model`: a forward hook, gone with the cache, sets the positions
    and watches for what would be silently wrong (padding, foreign positions), which raises
    ValueError. Inference only.
    """

    evicts = True  # asked by methods that need all keys of the prompt, at their places

    def __init__(self, model: PreTrainedModel, *, sinks: int = 4, window: int = 1020) -> None:
        for name, value in {"sinks": sinks, "window": window}.items():
            if not isinstance(value, int):
                raise ValueError(f"{name}={value!r}: expected a whole number of tokens")
        if sinks < 0:
            raise ValueError(
                f"sinks={sinks}: expected 0 (window attention) or more (4 in the paper)"
            )
        if window < 1:
            raise ValueError(f"window={window}: expected at least 1 recent key (1020 in the paper)")
        calls, rotations = learn_rotations(model)
        _refuse_unstreamable(model, calls, sinks + window + 1)
        self.stream = _Stream(sinks, window)
        layers = [SinkLayer(self.stream, rotation) for rotation in rotations]
        super().__init__(layers=layers)
        self._model = model
        self._edits = {call.module: layer.attend for call, layer in zip(calls, layers, strict=True)}
        self._forward = ExitStack()
        weakref.finalize(self, _remove, _hook(model, weakref.ref(self)))

    @property
    def seen(self) -> int:
        """Tokens of the stream so far, evicted ones included."""
        return self.stream.seen

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values: constant from the first forward on."""
        return sum(x.nbytes for layer in self.layers for x in layer.tensors())

    def reset(self) -> None:
        """Forget the stream; the next forward begins a new one."""
        super().reset()
        self.stream.restart()

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Announce a forward to the layers; returns its arguments with the cache's positions."""
        stream, inputs = self.stream, kwargs.get("input_ids", args[0] if args else None)
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if stream.n:
            raise ValueError(
                "the last forward with this SinkCache did not finish: call reset() and start anew"
            )
        if torch.is_grad_enabled():
            raise ValueError("SinkCache keeps no gradients: call the model under torch.no_grad()")
        _refuse_padding(kwargs, stream.seen, inputs.shape[1])
        stream.n, stream.updated = inputs.shape[1], 0
        self._rebase()
        start = stream.seen - stream.shift
        positions = torch.arange(start, start + stream.n, device=inputs.device)[None]
        if stream.n == 1 and stream.seen >= stream.capacity - 1 and stream.sinks:
            self._turn_sinks()
        if not stream.fits:
            self._forward.enter_context(use_attention_function(self._model))
            self._forward.enter_context(attach_to_modules(self._edits))
        return kwargs | {"position_ids": positions, "attention_mask": None}

    def _rebase(self) -> None:
        """Restart the model's positions at the cache's own, S + R, before they run far ahead."""
        stream = self.stream
        ahead = stream.seen - stream.shift - (stream.sinks + stream.window)
        limit = _AHEAD_FLOAT32 if self._model.dtype == torch.float32 else _AHEAD_HALF
        if ahead > 0 and ahead + stream.n > limit:
            for layer in self.layers:
                layer.rebase(ahead)
            stream.shift += ahead

    def _turn_sinks(self) -> None:
        """Before a single query: all sinks to their new distance, one operation for all layers."""
        alike = defaultdict(list)
        for layer in self.layers:
            if layer.rotation:
                sink_keys = layer.sink_keys
                alike[id(layer.rotation), sink_keys.shape, sink_keys.device].append(layer)
        for layers in alike.values():
            rotation = layers[0].rotation
            table = self.stream.table(rotation, range(1), 1, layers[0].sink_keys.device)
            turned = rotation.rotate(torch.stack([layer.sink_keys for layer in layers]), table)
            for layer, keys in zip(layers, turned, strict=True):
                layer.keys[:, :, : self.stream.sinks] = keys

    def _end(self) -> None:
        """Leave the model as found; `_begin` refuses where an unfinished forward left n."""
        self._forward.close()
        if self.stream.n and self.stream.updated == len(self.layers):
            self.stream.advance()


def _hook(model: nn.Module, cache: "weakref.ref[SinkCache]") -> list[Any]:
    """Hooks around the model's forward that act only on calls carrying this cache."""

    def mine(kwargs: dict[str, Any]) -> "SinkCache | None":
        given = kwargs.get("past_key_values")
        return given if given is not None and given is cache() else None

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = mine(kwargs)
        return None if found is None else (args, found._begin(args, kwargs))

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if found := mine(kwargs):
            found._end()

    return [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True, always_call=True),
    ]


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _refuse_padding(kwargs: dict[str, Any], seen: int, n: int) -> None:
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and (mask.ndim != 2 or bool((mask[:, -n if seen else 0 :] == 0).any())):
        raise ValueError(
            "padding in the attention mask: pads would become sinks; batch prompts of equal "
            "length only"
        )
    if positions is not None and bool(
        (positions != torch.arange(seen, seen + n, device=positions.device)).any()
    ):
        raise ValueError(
            f"position_ids {positions.flatten()[:3].tolist()}...: this cache has seen {seen} "
            f"tokens and counts on from there; leave position_ids out"
        )


def _refuse_unstreamable(model: PreTrainedModel, calls: list[AttentionCall], keys: int) -> None:
    """What would be silently wrong, decided on features: RoPE type and what each layer passes."""
    if kinds := {kind for kind in rope_kinds(model) if "dynamic" in kind or kind == "longrope"}:
        raise ValueError(
            f"RoPE type {sorted(kinds)[0]!r} changes its frequencies with length, so cached keys "
            "cannot be moved; set a static type (default, linear, yarn, llama3) in rope_parameters"
        )
    if (chunk := getattr(model.config.get_text_config(), "attention_chunk_size", None)) is not None:
        raise ValueError(
            f"attention_chunk_size={chunk}: chunked attention and a sink cache exclude each other"
        )
    for layer, call in enumerate(calls):
        local = call.options.get("sliding_window")
        if local is not None and local < keys:
            raise ValueError(
                f"layer {layer} sees only the last {local} tokens (sliding_window), fewer than the "
                f"{keys} of this cache: choose sinks + window <= {local - 1}"
            )
        if call.options.get("position_bias") is not None or not getattr(
            call.module, "is_causal", True
        ):
            raise ValueError(
                f"layer {layer} is not causal attention by rotary positions alone: it cannot stream"
            )
