"""Algorithm 1 without doing anything twice: the engine of `search`.

Steering one head of layer l changes nothing below l, and nothing in rows before the first span
(there every visible key is outside of it, and the row is renormalised). So a few prompts that begin
alike run once: rows before the spans go into a cache of keys and values; each layer's input and
attention, plain and with all heads steered, are kept. Then a head's variant starts behind the
attention of its own layer, with its own column of the steered one; the last layer goes on with the
rows that predict the answer, and only those meet the vocabulary.

Axes: B prompts, C variants, q rows from the first span on, A rows that predict the answer, K keys,
H query heads, D head size.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from steerkit.attention.hook import AttentionCall, attach_to_modules
from steerkit.steering.head_search import Prompt, padded
from steerkit.steering.key_bias import attend_biased


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

    def up_to_attention(self, hidden: Tensor, C: int) -> AttentionCall:
        """The attention call of these rows; the layer stops there."""
        calls = []

        def stop(call: AttentionCall) -> Tensor:
            calls.append(call)
            raise _Arrived

        with attach_to_modules({self.attention: stop}):
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
    """A few prompts, run once; `variants` scores any heads of a layer.

    Enter `use_attention_function` first.
    """

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
        cache = DynamicCache()  # without a config it keeps all keys; the masks do the windows
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

        def edit(call: AttentionCall) -> Tensor:
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
            stack.enter_context(attach_to_modules(dict.fromkeys(base.modules(), edit)))
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


def _attend_at(call: AttentionCall, at: Tensor) -> Tensor:
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
