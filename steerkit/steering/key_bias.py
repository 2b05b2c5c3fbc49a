"""One bias per key and head: what PASTA and the other steering methods have in common.

A method adds a bias to the attention scores of the prompt's keys in chosen heads, before the
softmax. The bias is strength(query) times bias(key), and a product fits into the dot product of
query and key: prefill appends one dimension to both. So the causal kernel stays, and no (Q,K) mask
is made. Decoding has one query, and adds the bias as a (B,H,1,K) mask.

Axes: B batch, H query heads, Q/K query/key positions, D head size, T tokens of the spans' mask,
P prompt tokens.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerkit.attention import hook
from steerkit.attention.heads import Heads, heads_by_layer
from steerkit.attention.hook import AttentionCall
from steerkit.models import Model
from steerkit.spans import Spans, span_mask

Strength = Callable[[AttentionCall, Tensor], Tensor]
"""(call, bias (B,K)) -> (B,H,Q), the factor by which each query multiplies the bias."""


@contextmanager
def key_bias(
    model: Model,
    spans: Spans,
    heads: Heads | None = None,
    *,
    inside: float = 0.0,
    outside: float = 0.0,
    strength: Strength | None = None,
) -> Iterator[None]:
    """Bias the prompt's keys in `heads` (None: all) in every forward inside the `with`.

    Scores of the spans' keys get `inside` nats, scores of the prompt's other keys get `outside`.
    Keys after the prompt get 0.
    """
    prompt, chosen = PromptState(spans, inside, outside), heads_by_layer(model, heads)
    calls = hook.trace_attention(model)
    # All layers get an edit, so that a second `with` is refused whichever heads it steers.
    edits = {call.module: AttentionCall.attend for call in calls.values()}
    for layer, indices in chosen.items():
        if inside or outside:  # without a bias the stock call stays: the result is bit-equal
            edits[calls[layer].module] = _biased(prompt, calls[layer], indices, strength)
    with (
        hook.use_attention_function(model),
        hook.attach_to_modules(edits),
        track_prompt(model, prompt, next(iter(edits))),
    ):
        yield
    prompt.check_complete()


def _biased(
    prompt: "PromptState", call: AttentionCall, heads: list[int], strength: Strength | None
) -> hook.Edit:
    """The edit of one layer; `call` is any earlier call of it."""
    steered = torch.zeros(call.query.shape[1], 1, device=call.query.device)
    steered[heads] = 1

    def edit(call: AttentionCall) -> Tensor:
        bias = prompt.bias_of(call)
        factor = steered if strength is None else steered * strength(call, bias)
        return attend_biased(call, factor, bias)

    return edit


class PromptState:
    """Which cached keys belong to the prompt, through prefill, chunks, decoding and beams.

    Before each forward the state learns its tokens and how many keys the cache holds (`seen`). It
    must know the prompt's length P: keys from P on were generated and get no bias. A mask (B,T)
    states it, P = T, and so does a cache with a `prompt_length`. Lists of spans do not, they only
    end at T; then the first forward is taken for the whole prompt:

        state          forward                  what it is                 next state
        ------------   ----------------------   ------------------------   -----------------------
        no prompt      any                      the prompt                 prompt, P = all tokens
        prompt of P    seen >= T                tokens after the prompt    prompt of P
        prompt of P    seen = P, two or more    unclear: a second chunk?   refused
        prompt of P    seen < T                 another prompt             prompt, P = all tokens
        prompt of P    seen = 0, begins with    unclear: generated tokens  refused
                       the prompt, goes on      without a cache?

    Beams and samples: a batch of n * B repeats each prompt's bias n times. A sliding window holds
    the last K keys, so the first key of a forward need not be the prompt's first.
    """

    def __init__(self, spans: Spans, inside: float, outside: float) -> None:
        self.spans, self.length_known = span_mask(spans)  # (B,T)
        self.end = 1 + int(self.spans.any(dim=0).nonzero().max())  # of the last span
        self.inside, self.outside = inside, outside
        self.total = 0  # keys in the cache after the running forward, or the last one
        self.prompt = torch.empty(0, 0)  # tokens of the last forward that was taken for a prompt
        self._set_prompt(self.spans.shape[1])

    def _set_prompt(self, P: int) -> None:
        spans = F.pad(self.spans, (0, P - self.spans.shape[1]))
        self.bias = torch.where(spans, self.inside, self.outside)  # (B,P) float32
        self.padded: dict[tuple[int, torch.device], Tensor] = {}  # `bias`, then 0: (B,K) or wider

    def begin_forward(self, tokens: Tensor, cache: Any, attention_mask: object) -> None:
        """Go to the next state; ValueError for a prompt that does not fit the spans.

        `tokens` are ids (B,n) or embeddings (B,n,width).
        """
        if self.end > getattr(cache, "never_evicted", self.end):
            raise ValueError(
                f"a span ends at token {self.end}, and this cache (SinkCache) evicts all but the "
                f"first {cache.never_evicted} tokens: make it with sinks={self.end} or more"
            )
        seen = 0 if cache is None else int(cache.get_seq_length())
        batch, new = tokens.shape[:2]
        (B, T), total = self.spans.shape, seen + new
        if batch % B:
            raise ValueError(f"a batch of {batch} rows, spans for {B} prompts: expected as many")
        told = getattr(cache, "prompt_length", None)
        if self.length_known:
            if told is None and total < T and seen and new == 1:  # decoding, before the mask ends
                raise ValueError(_mismatch(T, seen))
        elif (told or total) < T:
            raise ValueError(
                f"a span ends at token {T}, past the end of a prompt of {told or total} tokens "
                f"({_AS_MASK} if the prompt comes in chunks; {_GUIDANCE})"
            )
        elif told:
            self._set_prompt(told)
        elif self.total == 0 or seen < T:
            self._refuse_more_of(tokens[:: batch // B], seen)
            self._set_prompt(total)
        elif seen != self.total or (seen == self.bias.shape[1] and new > 1):
            raise ValueError(
                f"{new} tokens after {seen} in the cache, {self.total} read so far, so where the "
                f"prompt ends is unclear: {_AS_MASK}"
            )
        if seen < T and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            real = attention_mask[:: batch // B, :T].bool().cpu()
            covered = self.spans[:, : real.shape[1]] & ~real
            if rows := covered.any(dim=1).nonzero().flatten().tolist():
                raise ValueError(
                    f"rows {rows}: a span covers padding; count the padding on the left"
                )
        self.total = total

    def _refuse_more_of(self, tokens: Tensor, seen: int) -> None:
        """ValueError for a new prompt that is the last one and more: without a cache, a reply."""
        P = self.prompt.shape[1]
        again = 0 < P < tokens.shape[1] and tokens[:, :P].equal(self.prompt)
        self.prompt = tokens[:, :0] if seen else tokens.detach().clone()
        if again and not seen:
            raise ValueError(
                f"{tokens.shape[1]} tokens that begin with the {P} of the last prompt: without a "
                f"cache, where the prompt ends is unclear: {_AS_MASK}"
            )

    def check_complete(self) -> None:
        """ValueError for a mask that is longer than the prompt: it was made for another one."""
        T = self.spans.shape[1]
        if self.length_known and 0 < self.total < T:
            raise ValueError(_mismatch(T, self.total))

    def bias_of(self, call: AttentionCall) -> Tensor:
        """What is added to each key of this call: (B,K) float32."""
        if not self.total:
            raise ValueError("the prompt is unknown: call the model, not one of its layers")
        (B, K), device = (call.query.shape[0], call.key.shape[2]), call.key.device
        if call.tokens is not None:
            bias = F.pad(self.bias, (0, 1)).to(device)  # tokens after the prompt have none
            every = bias[:, call.tokens.clamp(max=self.bias.shape[1])]
            return every.repeat_interleave(B // len(bias), dim=0)
        end = max(self.total, K)
        bias = self.padded.get((B, device))
        if bias is None or bias.shape[1] < end:
            bias = self.bias.to(device).repeat_interleave(B // len(self.bias), dim=0)
            bias = F.pad(bias, (0, max(0, end + 256 - bias.shape[1])))  # for the next tokens, too
            self.padded[B, device] = bias
        return bias[:, end - K : end]  # a sliding window has dropped the first keys


_AS_MASK = "give the spans as a bool mask (B, T)"
_GUIDANCE = "leave out guidance_scale: classifier-free guidance reads a second prompt"


def _mismatch(T: int, length: int) -> str:
    advice = f"make it from the padded prompt ({_GUIDANCE})"
    return f"a mask of {T} tokens, the prompt has {length}: {advice}"


@contextmanager
def track_prompt(model: Model, prompt: PromptState, attention: nn.Module) -> Iterator[None]:
    """Tell `prompt` of every forward inside the `with`, before any layer runs.

    Several modules around `attention`, any layer's, take tokens: the model, its decoder, ... Which
    of them are called differs by architecture and caller. The outermost one counts.
    """
    around = [module for module in model.modules() if attention in module.modules()]
    signatures = {module: inspect.signature(module.forward) for module in around}
    entered: list[nn.Module] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(module)
        if len(entered) > 1:
            return
        inputs = signatures[module].bind_partial(*args, **kwargs).arguments if args else kwargs
        tokens, cache = inputs.get("input_ids"), inputs.get("past_key_values")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        prompt.begin_forward(tokens, cache, inputs.get("attention_mask"))

    def after(*_: Any) -> None:
        entered.pop()

    with ExitStack() as stack:
        for module, signature in signatures.items():
            if "input_ids" in signature.parameters:
                # Before the hooks of the cache itself, whose complaint would say less.
                options = {"with_kwargs": True, "prepend": True}
                stack.enter_context(module.register_forward_pre_hook(before, **options))
                stack.enter_context(module.register_forward_hook(after, always_call=True))
        yield


# Arithmetic


def number(value: object) -> float:
    """`value` if it is a number, else NaN: no bound holds for it, and no comparison fails."""
    return value if isinstance(value, Real) else math.nan


def attend_biased(call: AttentionCall, strength: Tensor, bias: Tensor) -> Tensor:
    """Attention with strength * bias added to the scores -> (B,Q,H,D); `call` is not changed.

    `strength` (..., H, Q or 1) says how much of the bias each query takes, `bias` (B,K) float32
    what each key offers. PASTA: strength 1 in steered heads and 0 elsewhere, bias log(alpha)
    outside the spans and 0 inside.
    """
    dtype = call.query.dtype
    if call.query.shape[2] == 1:
        mask = (strength[..., None] * bias[:, None, None]).to(dtype)  # (B,H,1,K)
        return call.attend(mask=add_mask(mask, call.mask))
    # scaling * [q, strength] . [k, bias / scaling] = scaling * q.k + strength * bias
    offered = hook.exact_parts(bias / call.scaling, dtype)[:, None]  # (B,1,K,n)
    taken = strength[..., None].expand(*strength.shape, offered.shape[-1])  # (...,H,Q,n)
    return call.widened(taken, offered).attend()[..., : call.value.shape[-1]]


def add_mask(bias: Tensor, mask: Tensor | None) -> Tensor:
    """Scores, or what is added to them, under a mask of either kind."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, -math.inf)
    return bias + mask
