"""The scores of a few prompts with any heads steered: what `head_search` calls most of the time.

A prompt's score is the mean log-probability (nats) per token of its right answer, teacher forced.

Axes: B prompts, C heads that are scored in one forward, T tokens, L layers, H query heads, V
vocabulary.
"""

import copy
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from steerkit.attention import hook
from steerkit.attention.heads import Head
from steerkit.attention.hook import AttentionCall
from steerkit.models import Model
from steerkit.steering.key_bias import attend_biased
from steerkit.steering.pasta import log_weights


class Prompt(NamedTuple):
    """Token ids of a prompt, its spans [start, end), and the ids of the right answer."""

    ids: list[int]
    spans: list[tuple[int, int]]
    answer: list[int]

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.ids) + len(self.answer)

    @property
    def first(self) -> int:
        """Where the first span starts."""
        return min(start for start, _ in self.spans)


def padded(prompts: Sequence[Prompt], pad: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """ids, inside, target (B,T): prompt and answer, padded on the right, which no query sees.

    `inside`: tokens of full weight (the spans, the answer, the padding). `target`: the answer.
    """
    T = max(prompt.length for prompt in prompts)
    ids = torch.full((len(prompts), T), pad)
    inside = torch.ones(len(prompts), T, dtype=torch.bool)
    target = torch.zeros(len(prompts), T, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        n = len(prompt.ids)
        ids[row, : prompt.length] = torch.tensor([*prompt.ids, *prompt.answer])
        inside[row, :n] = False
        for start, end in prompt.spans:
            inside[row, start:end] = True
        target[row, n : prompt.length] = True
    return ids, inside, target


def answer_scores(logits: Tensor, ids: Tensor, target: Tensor) -> Tensor:
    """Mean log-probability per answer token: logits (B,T,V) that predict ids (B,T) -> (B,)."""
    each = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return (each * target).sum(1) / target.sum(1)


class PromptBatch:
    """A few prompts, run once without steering, then scored with one head steered at a time.

    What steering a head cannot change is computed once:

    - tokens before the first span. All keys they see are outside of the spans, so renormalising
      takes the bias away; their keys and values are a prefix cache. (Not where a sink, zero or
      learned, keeps its weight: then there is none);
    - the layers below the head. Their outputs are recorded, and returned again.

    Many heads fit in one forward: the batch holds each prompt C times. `switch` (L, B*C, H) is 1
    where a head is steered and 0 elsewhere.
    """

    @torch.no_grad()
    def __init__(self, model: Model, prompts: Sequence[Prompt], alpha: float) -> None:
        self.model = model
        ids, inside, target = (x.to(model.device) for x in padded(prompts))
        self.calls = hook.trace_attention(model, ids[:1, :1], every_layer=True)
        self.heads = max(call.query.shape[1] for call in self.calls.values())
        self.bias = log_weights(inside, alpha)[:, :-1]  # no query comes after the last token
        sinks = any(call.sink is not None for call in self.calls.values())
        first = 0 if sinks else min(prompt.first for prompt in prompts)
        self.prefix = DynamicCache() if first else None  # without a config it keeps all keys
        if first:
            model.base_model(input_ids=ids[:, :first], past_key_values=self.prefix, use_cache=True)
        self.ids, self.target = ids[:, first:], target[:, first:]
        # The vocabulary is needed from the first token of the shortest prompt's answer on.
        self.predicted = ids.shape[1] - min(len(prompt.ids) for prompt in prompts)
        self.outputs: dict[nn.Module, Any] = {}  # of the decoder layers
        with ExitStack() as stack:
            for layer in _decoder_layers(model, self.calls.values()):
                stack.enter_context(layer.register_forward_hook(self._record))
            self.baseline = self._scores(self._switch(1), []).cpu()  # (B,)

    def _record(self, layer: nn.Module, _: Any, output: Any) -> None:
        self.outputs[layer] = output

    @torch.no_grad()
    def scores(self, heads: Sequence[Head], tokens: int) -> Tensor:
        """Each head steered alone, at most `tokens` tokens in one forward -> (B, heads)."""
        scores, at_once = [], max(1, tokens // self.ids.numel())
        for start in range(0, len(heads), at_once):
            chunk = heads[start : start + at_once]
            C = len(chunk)
            switch = self._switch(C)
            for variant, (layer, index) in enumerate(chunk):
                switch[layer, variant::C, index] = 1
            steered = sorted({head.layer for head in chunk})
            scores.append(self._scores(switch, steered).view(-1, C).cpu())
        return torch.cat(scores, dim=1)

    @torch.enable_grad()
    def slopes(self) -> Tensor:
        """d score / d switch of every head, where no head is steered -> (B,L,H)."""
        switch = self._switch(1).requires_grad_()
        scores = self._scores(switch, range(len(self.calls)))
        return torch.autograd.grad(scores.sum(), switch)[0].transpose(0, 1).cpu()

    def _switch(self, C: int) -> Tensor:
        return torch.zeros(len(self.calls), len(self.ids) * C, self.heads, device=self.ids.device)

    def _scores(self, switch: Tensor, steered: Sequence[int]) -> Tensor:
        """Scores (B*C,), each prompt's variants side by side; `steered` layers are biased."""
        C = switch.shape[1] // len(self.ids)
        bias, ids, target = (_repeated(x, C) for x in (self.bias, self.ids, self.target))
        cache = copy.deepcopy(self.prefix)
        if cache is not None:
            cache.batch_repeat_interleave(C)

        def edit(call: AttentionCall, on: Tensor) -> Tensor:
            return attend_biased(call, on[:, : call.query.shape[1], None], bias)

        edits = {self.calls[layer].module: partial(edit, on=switch[layer]) for layer in steered}
        n = self.predicted
        inputs = {"past_key_values": cache, "use_cache": cache is not None, "logits_to_keep": n}
        attention = hook.use_attention_function(self.model)
        with attention, hook.attach_to_modules(edits), ExitStack() as stack:
            for layer in list(self.outputs)[: min(steered, default=0)]:
                known = _repeated(self.outputs[layer], C)
                returning = patch.object(layer, "forward", lambda *_, known=known, **__: known)
                stack.enter_context(returning)
            logits = self.model(ids[:, :-1], **inputs).logits
        return answer_scores(logits, ids[:, -n:], target[:, -n:])


def _decoder_layers(model: Model, calls: Iterable[AttentionCall]) -> list[nn.Module]:
    """The member of the model's layer list that holds each attention module."""
    layers = [x for m in model.base_model.modules() if isinstance(m, nn.ModuleList) for x in m]
    return [next(x for x in layers if call.module in list(x.modules())) for call in calls]


def _repeated(output: Any, C: int) -> Any:
    """A tensor (B,...), or a tuple that begins with one, C times for each prompt."""
    if isinstance(output, tuple):
        return tuple(_repeated(x, C) for x in output)
    return output.repeat_interleave(C, dim=0) if isinstance(output, Tensor) else output
