"""Ratios of streaming against the official way: one process, one thread, measured in turn.

    python benchmarks/streaming.py [--quick]

The baseline is written here after the official code's semantics: one token per forward, keys cached
before rotary embedding, concatenated, all rotated anew at every step, plain matrix products and
softmax, the cache trimmed afterwards. Random weights; 4 layers x 256 with as many key/value heads
as query heads, like Llama-2-7B, and for decoding also 12 layers x 768: the wider the model, the
more of the time is the cache's. Machines shared with others make milliseconds drift; the ratios are
medians of interleaved rounds, on the clock of the one thread.
"""

import copy
from collections.abc import Callable, Iterator

import table
import torch
from attention_map import half_billion
from table import Row
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import sdpa_mask

from steerkit.attention.hook import use_attention_function
from steerkit.streaming.latency import decode_pace, interleaved
from steerkit.streaming.losses import negative_log_likelihood, token_losses
from steerkit.streaming.sink_cache import SinkCache

SINKS = 4
BLOCK = 256


def with_attention(model: PreTrainedModel, name: str, function: Callable) -> PreTrainedModel:
    """A copy that attends by `function`, so that no switch falls into a measured time."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    other = copy.deepcopy(model)
    other.set_attn_implementation(name)
    return other


class Official:
    """One token per forward with in-cache positions; `fill` stands in for a long stream."""

    def __init__(self, model: PreTrainedModel, window: int) -> None:
        self.model, self.window = with_attention(model, f"official-{window}", self.attend), window
        self.keys: dict[nn.Module, Tensor] = {}
        self.values: dict[nn.Module, Tensor] = {}
        zero = torch.zeros(1)
        slots = torch.arange(SINKS + window + 1)
        self.cos, self.sin = model.model.rotary_emb(zero, slots[None])  # (1,slots,D), once

    def fill(self) -> None:
        config = self.model.config
        shape = (1, config.num_key_value_heads, SINKS + self.window, config.head_dim)
        for layer in self.model.model.layers:
            self.keys[layer.self_attn] = torch.randn(shape)
            self.values[layer.self_attn] = torch.randn(shape)

    def rotate(self, x: Tensor, first: int) -> Tensor:
        cos, sin = (t[:, first : first + x.shape[2]] for t in (self.cos, self.sin))
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scaling: float,
        **_: object,
    ) -> tuple[Tensor, None]:
        if module in self.keys:
            k = torch.cat([self.keys[module], k], dim=2)
            v = torch.cat([self.values[module], v], dim=2)
        last, groups = k.shape[2] - 1, q.shape[1] // k.shape[1]
        rotated, values = self.rotate(k, 0), v
        if groups > 1:
            rotated, values = (x.repeat_interleave(groups, 1) for x in (rotated, v))
        weights = (self.rotate(q, last) @ rotated.mT * scaling).softmax(-1)
        if last >= SINKS + self.window:
            k = torch.cat([k[:, :, :SINKS], k[:, :, -self.window :]], dim=2)
            v = torch.cat([v[:, :, :SINKS], v[:, :, -self.window :]], dim=2)
        self.keys[module], self.values[module] = k, v
        return (weights @ values).transpose(1, 2).contiguous(), None

    def step(self, token: Tensor) -> Tensor:
        """(1,1) ids -> (1,1,V) logits; position 0 does not rotate, so raw keys arrive."""
        at_zero = torch.zeros(1, 1, dtype=torch.long)
        return self.model(input_ids=token, position_ids=at_zero, use_cache=False).logits


def perplexity(model: PreTrainedModel, window: int, ids: Tensor, repeats: int) -> Row:
    """Tokens per second of one block of 256, cache full, against the official loop."""
    official, cache = Official(model, window), SinkCache(model, sinks=SINKS, window=window)
    official.fill()
    tokens, piece = 8, ids[:, : BLOCK + 1]

    def slow() -> None:
        for t in range(tokens):
            negative_log_likelihood(official.step(ids[:, t : t + 1]), ids[:, t + 1 : t + 2])

    def fast() -> None:
        logits = model(piece[:, :-1], past_key_values=cache).logits
        negative_log_likelihood(logits, piece[:, 1:])

    for start in range(0, SINKS + window + BLOCK, BLOCK):
        model(ids[:, start : start + BLOCK], past_key_values=cache)
    with use_attention_function(model):  # as token_losses does
        seconds = interleaved({"slow": slow, "fast": fast}, repeats=repeats)
    ratio = (seconds["slow"] / tokens) / (seconds["fast"] / BLOCK)
    rate = f"{tokens / seconds['slow']:,.0f} -> {BLOCK / seconds['fast']:,.0f} tokens/s"
    return Row(f"perplexity, cache {SINKS}+{window}", ratio, goal=">= 25x", how=rate)


def decode(model: PreTrainedModel, size: int, ids: Tensor, repeats: int) -> Row:
    """One token at a time with a full cache of `size`, against the official way."""
    window = size - SINKS
    official, cache = Official(model, window), SinkCache(model, sinks=SINKS, window=window)
    official.fill()
    for start in range(0, size + BLOCK, BLOCK):
        model(ids[:, start : start + BLOCK], past_key_values=cache)
    token = ids[:, :1]
    steps = {
        "official": lambda: official.step(token),
        "ring": lambda: model(token, past_key_values=cache),
    }
    seconds = interleaved(steps, repeats=repeats)
    deep = model.config.num_hidden_layers >= 12
    goal = ">= 3x" if size == 4096 and deep else ""
    times = f"{1e3 * seconds['official']:.2f} -> {1e3 * seconds['ring']:.2f} ms/token"
    name = f"decode, cache {size}, {model.config.num_hidden_layers} x {model.config.hidden_size}"
    return Row(name, seconds["official"] / seconds["ring"], goal=goal, how=times)


def flatness(
    model: PreTrainedModel, lengths: list[int], ids: Tensor, repeats: int
) -> Iterator[Row]:
    """Time per token after the longest stream / the shortest, in turn: by block, token by token."""
    caches = {}
    for length in lengths:
        caches[length] = SinkCache(model, sinks=SINKS, window=252)
        for start in range(0, length, BLOCK):
            piece = ids[:, start % 4096 :][:, : min(BLOCK, length - start)]
            model(piece, past_key_values=caches[length])
    for name, n, rounds in (("block of 256", BLOCK, repeats), ("decode", 1, 8 * repeats)):
        steps = {
            length: lambda cache=cache, n=n: model(ids[:, :n], past_key_values=cache)
            for length, cache in caches.items()
        }
        seconds = interleaved(steps, repeats=rounds)
        times = " / ".join(f"{1e3 * seconds[length] / n:.3f}" for length in lengths)
        what = f"{name}, after {lengths[-1]:,} / after {lengths[0]:,} tokens"
        ratio = seconds[lengths[-1]] / seconds[lengths[0]]
        yield Row(what, ratio, "{:.2f}x", "<= 1.10x", f"{times} ms/token")


def nothing_attached(model: PreTrainedModel, T: int, ids: Tensor, repeats: int) -> Row:
    """A forward through the attention function with nothing attached, against stock SDPA."""
    through = with_attention(model, "steerkit", AttentionInterface()["steerkit"])
    steps = {
        "stock": lambda: model(ids[:, :T], use_cache=False),
        "ours": lambda: through(ids[:, :T], use_cache=False),
    }
    seconds = interleaved(steps, repeats=repeats)
    times = f"{1e3 * seconds['stock']:.2f} -> {1e3 * seconds['ours']:.2f} ms"
    ratio = seconds["ours"] / seconds["stock"]
    return Row(
        f"attention function, nothing attached, {T} tokens", ratio, "{:.2f}x", "<= 1.02x", times
    )


def same_losses(model: PreTrainedModel, ids: Tensor) -> Row:
    """What is compared computes the same: largest difference in nats."""
    official, ids = Official(model, 28), ids[:, :200]
    steps = [
        negative_log_likelihood(official.step(ids[:, t : t + 1]), ids[:, t + 1 : t + 2])
        for t in range(ids.shape[1] - 1)
    ]
    ours = token_losses(model, ids, sinks=SINKS, window=28)
    gap = (torch.cat(steps, 1) - ours).abs().max().item()
    return Row(
        "largest difference in loss, cache 4+28", gap, "{:.0e}", "< 1e-4", "nats, 199 tokens"
    )


def figure10(model: PreTrainedModel, size: int, repeats: int) -> Row:
    """Milliseconds to decode one token with `size` tokens in sight."""
    ms = decode_pace(model, cache=size, repeats=repeats)
    how = f"{ms['re-computation']:.1f} -> {ms['streaming']:.2f} ms/token, dense {ms['dense']:.2f}"
    what = f"re-computation / streaming, {size} tokens"
    return Row(what, ms["re-computation"] / ms["streaming"], how=how)


def losses_pace(model: PreTrainedModel, window: int, ids: Tensor, repeats: int) -> Row:
    """Time per token of `token_losses`, cache full, against a plain forward over as many tokens.

    More than 1: each token sees the whole window, in a plain forward on average half of it, and
    sinks at changing distances need a mask. Vocabulary 256: an LM head would add to both.
    """
    n, cache = SINKS + window, SinkCache(model, sinks=SINKS, window=window)
    token_losses(model, ids[:, : n + BLOCK], cache=cache)  # fills the cache
    steps = {
        "plain": lambda: model(ids[:, :n], use_cache=False),
        "losses": lambda: token_losses(model, ids[:, : n + 1], cache=cache),
    }
    seconds = interleaved(steps, repeats=repeats, warmup=1)
    how = f"{1e3 * seconds['plain'] / n:.2f} -> {1e3 * seconds['losses'] / n:.2f} ms/token"
    what = f"token_losses at {SINKS}+{window} / a plain forward, shape of 0.5 B parameters"
    return Row(what, seconds["losses"] / seconds["plain"], "{:.2f}x", how=how)


def random_model(layers: int, width: int, kv_heads: int) -> PreTrainedModel:
    heads = max(8, kv_heads)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width // heads,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def measure(quick: bool) -> Iterator[Row]:
    model = random_model(1, 32, 4) if quick else random_model(4, 256, 8)
    ids = torch.randint(2048, (1, 8192), generator=torch.Generator().manual_seed(0))
    repeats, sizes = (2, [64, 128]) if quick else (25, [256, 1024, 2048, 4096])
    yield same_losses(model, ids)
    for window in (60,) if quick else (252, 1020):
        yield perplexity(model, window, ids, repeats)
    layers, window = (1, 60) if quick else (2, 1020)
    yield losses_pace(half_billion(layers), window, ids % 256, 1 if quick else 5)
    for size in sizes:
        yield decode(model, size, ids, 4 * repeats)
    for size in () if quick else (1024, 4096):
        yield decode(random_model(12, 768, 12), size, ids, 9)
    yield from flatness(model, [500, 2000] if quick else [1000, 10_000, 100_000], ids, repeats)
    for T in (1, 64 if quick else 512):
        yield nothing_attached(model, T, ids, 4 * repeats)
    for size in sizes:
        yield figure10(model, size, 3 if quick else 9)


if __name__ == "__main__":
    table.run(measure, __doc__)
