"""StreamingLLM one token per forward, written from the paper: nothing of steerkit is used here.

Keys are kept as the model makes them at position 0, not yet rotated. Each step rotates every key
and the query to its position in the cache, with the model's own cos and sin, and runs plain
softmax attention.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def rotate(x: Tensor, positions: Tensor, rotary: nn.Module) -> Tensor:
    """The model's own rotary embedding: (B,H,T,D), positions (T,) -> (B,H,T,D)."""
    cos, sin = rotary(x.float(), positions[None])
    if cos.shape[-1] == len(getattr(rotary, "inv_freq", ())):  # gpt-oss gives each angle once
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    d = cos.shape[-1]
    a, rest = x[..., :d], x[..., d:]
    half = torch.cat([-a[..., d // 2 :], a[..., : d // 2]], -1)
    return torch.cat([a * cos[:, None] + half * sin[:, None], rest], -1)


class Oracle:
    """Next-token logits of a stream under S sinks and R recent keys."""

    def __init__(
        self, model: nn.Module, sinks: int, window: int, *, clamp: bool = True, factor=None
    ) -> None:
        """`factor(weights, tokens)` steers: what multiplies the weights on those tokens' keys."""
        self.factor = factor
        self.model, self.S, self.R, self.clamp = copy.deepcopy(model), sinks, window, clamp
        self.rotary = next(m for m in model.modules() if hasattr(m, "inv_freq"))
        self.store: dict[nn.Module, list[Tensor]] = {}
        self.t = 0
        AttentionInterface.register(name := f"oracle{id(self)}", self.attend)
        AttentionMaskInterface.register(name, sdpa_mask)
        self.model.set_attn_implementation(name)

    def attend(self, module, query, key, value, mask, scaling=None, s_aux=None, **_):  # noqa: ANN001, ANN003, ANN201
        keys, values = self.store.get(module, [key[:, :, :0], value[:, :, :0]])
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        slots = torch.arange(keys.shape[2])
        if not self.clamp and self.t > self.S + self.R:  # a control: true distances
            slots = torch.cat([slots[: self.S], slots[self.S :] + self.t - self.S - self.R])
        k, q = rotate(keys, slots, self.rotary), rotate(query, slots[-1:], self.rotary)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        scores = (q @ k.mT) * (scaling or q.shape[-1] ** -0.5)
        if s_aux is not None:  # a learned sink: one more score, which has no value
            scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(len(q), -1, -1, -1)], -1)
        weights = scores.softmax(-1)[..., : k.shape[2]]
        if self.factor is not None:
            recent = range(max(self.S, self.t - self.R), self.t + 1)
            kept = torch.tensor([*range(min(self.S, self.t + 1)), *recent])
            on_sink = 1 - weights.sum(-1, keepdim=True)  # a learned one keeps its score
            weights = weights * self.factor(weights, kept)
            weights = weights / (weights.sum(-1, keepdim=True) + on_sink)
        out = weights @ v
        if keys.shape[2] > self.S + self.R:  # trimmed after each forward
            keys = torch.cat([keys[:, :, : self.S], keys[:, :, -self.R :]], 2)
            values = torch.cat([values[:, :, : self.S], values[:, :, -self.R :]], 2)
        self.store[module] = [keys, values]
        return out.transpose(1, 2).contiguous(), None

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """One token for each stream: (B,) -> logits (B,V)."""
        zero = torch.zeros(1, 1, dtype=torch.long)  # position 0 does not rotate: raw keys arrive
        out = self.model(input_ids=ids[:, None], position_ids=zero, use_cache=False)
        self.t += 1
        return out.logits[:, -1]

    def losses(self, ids: Tensor) -> Tensor:
        """(B,T) -> (B,T-1) nats."""
        steps = [self.step(ids[:, t]).log_softmax(-1) for t in range(ids.shape[1] - 1)]
        return -torch.stack(steps, 1).gather(-1, ids[:, 1:, None])[..., 0]

    def greedy(self, ids: Tensor, new: int) -> list[int]:
        """The prompt (1,T), then `new` greedy tokens."""
        for t in range(ids.shape[1]):
            logits = self.step(ids[:, t])
        out = []
        for _ in range(new):
            out.append(int(logits.argmax(-1)))
            logits = self.step(torch.tensor([out[-1]]))
        return out
