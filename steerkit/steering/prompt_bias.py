"""Which keys of a forward are the prompt's: the bookkeeping under `key_bias`.

A forward may be a prompt, a piece of it, or a token after it; its keys may be padding, or the last
ones that a sliding window kept. A hook in front of the decoder asks the cache how many keys came
before, so that every layer can be told what to add to each of its keys. Axes: B batch, Q and K
query and key positions, T prompt tokens.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from steerkit.attention.hook import AttentionCall
from steerkit.streaming.sink_cache import SinkCache

_MISMATCH = "the spans are a mask of {} tokens, the prompt has {}: make it from the padded prompt"


class Columns(NamedTuple):
    """What is added to the scores of prompt tokens: `bias` (B,T) for the first T, `outside` (B,1)
    for the rest, unless the prompt has T tokens (`exact`). `inside` (B,T): tokens of the spans.
    """

    bias: Tensor
    inside: Tensor
    outside: Tensor
    exact: bool


class PromptBias:
    """The columns of the prompts of a batch, and where the running forward stands in them."""

    def __init__(self, columns: Columns, keep_sinks: int) -> None:
        self.columns, self.keep_sinks = columns, keep_sinks
        self.seen: int | None = None  # None: nobody announced a forward
        self.fed = 0  # keys after it
        self.bias: Tensor | None = None  # (B, prompt), once the prompt's first forward is known
        self.version = 0  # of `bias`
        self.ready: dict[tuple[Any, ...], Tensor] = {}  # columns of the running forward

    def begin(self, seen: int, rows: int, new: int, attention_mask: object) -> None:
        """Announce a forward of `new` tokens after `seen`; refuse a prompt that does not fit."""
        (B, T), fed, exact = self.columns.bias.shape, seen + new, self.columns.exact
        if rows % B:
            raise ValueError(
                f"a batch of {rows} rows, spans for {B} prompts: give spans for each prompt (rows "
                "that continue the same prompt share them)"
            )
        if not exact and fed < T:
            raise ValueError(
                f"a span ends at token {T}, past the end of a prompt of {fed} tokens (a prompt "
                "that comes in chunks takes its spans as a bool mask (B, T))"
            )
        if not exact and self.bias is not None and T <= seen != self.fed:
            raise ValueError(
                f"the cache holds {seen} keys, not the {self.fed} read so far (assisted decoding, "
                "a cache used twice), so where the prompt ends is unclear: give the spans as a "
                "bool mask (B, T)"
            )
        if exact and fed < T and seen and new == 1:
            raise ValueError(_MISMATCH.format(T, seen))
        if self.bias is None or seen < T:
            self.bias = self._whole(T if exact else fed, rows // B, attention_mask)
            self.version += 1
        self.seen, self.fed = seen, fed
        self.ready.clear()

    def end(self) -> None:
        """A mask longer than the prompt would have been another prompt's."""
        if self.columns.exact and 0 < self.fed < self.columns.bias.shape[1]:
            raise ValueError(_MISMATCH.format(self.columns.bias.shape[1], self.fed))

    def _whole(self, length: int, repeats: int, attention_mask: object) -> Tensor:
        """(B,length): the columns, the rest of the prompt, and 0 for the sinks that are kept."""
        bias, inside, outside, _ = self.columns
        B, T = bias.shape
        real = torch.ones(B, length, dtype=torch.bool)
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            given = attention_mask[::repeats, :length].bool().cpu()
            real[:, : given.shape[1]] = given
        elif attention_mask is not None and self.keep_sinks:
            raise ValueError("keep_sinks needs the attention mask as (B, T), to tell padding")
        if pads := (inside & ~real[:, :T]).any(dim=1).nonzero().flatten().tolist():
            raise ValueError(
                f"rows {pads}: a span covers padding; spans are positions in the padded prompt, "
                "so add the padding on the left to them"
            )
        first = real & (real.cumsum(dim=1) <= self.keep_sinks)
        bias = torch.cat([bias, outside.expand(B, length - T)], dim=1)
        return bias.masked_fill(first, 0.0)

    def first_key(self, Q: int, K: int) -> int:
        """Position of the first of K keys: a sliding window keeps the last ones."""
        seen = K - Q if self.seen is None else self.seen
        return max(0, seen + Q - K)

    def rows(self, B: int, device: torch.device) -> Tensor:
        """What is added to the prompt's keys: (B, prompt) float32."""
        assert self.bias is not None  # begin() came first
        return self.bias.to(device).repeat_interleave(B // len(self.bias), dim=0)

    def column(self, call: AttentionCall) -> Tensor:
        """What is added to each key of this call: (B,K) float32."""
        (B, _, Q, _), K = call.query.shape, call.key.shape[2]
        key = (B, Q, K, call.key.device)
        if key not in self.ready:
            held = self.rows(B, call.key.device)[:, self.first_key(Q, K) :][:, :K]
            self.ready[key] = F.pad(held, (0, K - held.shape[1]))
        return self.ready[key]


@contextmanager
def announced(model: PreTrainedModel, prompt: PromptBias) -> Iterator[None]:
    """Tell `prompt` of every forward, before any layer runs."""
    base = model.base_model
    signature = inspect.signature(base.forward)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _refuse_sink_cache(base, args, kwargs)
        given = signature.bind_partial(*args, **kwargs).arguments if args else kwargs
        inputs, cache = given.get("input_ids"), given.get("past_key_values")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        seen = 0 if cache is None else int(cache.get_seq_length())
        prompt.begin(seen, *inputs.shape[:2], given.get("attention_mask"))

    def after(*_: object) -> None:
        prompt.seen = None

    with ExitStack() as stack:
        for hook in (
            base.register_forward_pre_hook(before, with_kwargs=True),
            base.register_forward_hook(after, always_call=True),
            # In front of the hook of a SinkCache, whose complaint would say less.
            model.register_forward_pre_hook(_refuse_sink_cache, with_kwargs=True, prepend=True),
        ):
            stack.callback(hook.remove)
        yield


def _refuse_sink_cache(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if any(isinstance(value, SinkCache) for value in (*args, *kwargs.values())):
        raise ValueError(
            "a SinkCache evicts and moves the prompt's keys, so spans would point at others: steer "
            "with a cache that keeps them (leave past_key_values out)"
        )
