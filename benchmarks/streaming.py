"""Ratios of streaming against the official way: one process, one thread, measured in turn.

    python benchmarks/streaming.py [--quick]

The baseline is written here after the official code's semantics: one token per forward, keys cached
before rotary embedding, concatenated, all turned anew at every step, plain matrix products and
softmax, the cache trimmed afterwards. Decode is compared on two sizes: the wider the model, the
more of the time is the cache's; with fewer key/value heads (--kv-heads 4) it is less. Machines
shared with others make milliseconds drift; the ratios are medians of interleaved rounds, on the
clock of the one thread.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import sdpa_mask

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from steerkit.attention import install
from steerkit.sink_cache import SinkCache
from steerkit.streaming import next_token_loss, token_losses
from steerkit.timing import columns, decode_pace, interleaved

SINKS = 4
BLOCK = 256
Row = tuple[str, str, str, str]  # what, goal, measured, how


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

    def turn(self, x: Tensor, first: int) -> Tensor:
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
        turned, values = self.turn(k, 0), v
        if groups > 1:
            turned, values = (x.repeat_interleave(groups, 1) for x in (turned, v))
        weights = (self.turn(q, last) @ turned.mT * scaling).softmax(-1)
        if last >= SINKS + self.window:
            k = torch.cat([k[:, :, :SINKS], k[:, :, -self.window :]], dim=2)
            v = torch.cat([v[:, :, :SINKS], v[:, :, -self.window :]], dim=2)
        self.keys[module], self.values[module] = k, v
        return (weights @ values).transpose(1, 2).contiguous(), None

    def step(self, token: Tensor) -> Tensor:
        """(1,1) ids -> (1,1,V) logits; position 0 does not turn, so raw keys arrive."""
        at_zero = torch.zeros(1, 1, dtype=torch.long)
        return self.model(input_ids=token, position_ids=at_zero, use_cache=False).logits


def perplexity(model: PreTrainedModel, window: int, ids: Tensor, repeats: int) -> Row:
    """Tokens per second of one block of 256, cache full, against the official loop."""
    official, cache = Official(model, window), SinkCache(model, sinks=SINKS, window=window)
    official.fill()
    tokens, piece = 8, ids[:, : BLOCK + 1]

    def slow() -> None:
        for t in range(tokens):
            next_token_loss(official.step(ids[:, t : t + 1]), ids[:, t + 1 : t + 2])

    def fast() -> None:
        logits = model(piece[:, :-1], past_key_values=cache).logits
        next_token_loss(logits, piece[:, 1:])

    for start in range(0, SINKS + window + BLOCK, BLOCK):
        model(ids[:, start : start + BLOCK], past_key_values=cache)
    with install(model):  # as token_losses does
        seconds = interleaved({"slow": slow, "fast": fast}, repeats=repeats)
    ratio = (seconds["slow"] / tokens) / (seconds["fast"] / BLOCK)
    rate = f"{tokens / seconds['slow']:,.0f} -> {BLOCK / seconds['fast']:,.0f} tokens/s"
    return f"perplexity, cache {SINKS}+{window}", ">= 20x", f"{ratio:.1f}x", rate


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
    return name, goal, f"{seconds['official'] / seconds['ring']:.1f}x", times


def flatness(model: PreTrainedModel, lengths: list[int], ids: Tensor, repeats: int) -> list[Row]:
    """Time per token after short and long streams, in turn: by block and token by token."""
    caches = {}
    for length in lengths:
        caches[length] = SinkCache(model, sinks=SINKS, window=252)
        for start in range(0, length, BLOCK):
            piece = ids[:, start % 4096 :][:, : min(BLOCK, length - start)]
            model(piece, past_key_values=caches[length])
    rows = []
    for name, n, rounds in (("block of 256", BLOCK, repeats), ("decode", 1, 8 * repeats)):
        steps = {
            str(length): lambda cache=cache, n=n: model(ids[:, :n], past_key_values=cache)
            for length, cache in caches.items()
        }
        seconds = interleaved(steps, repeats=rounds)
        times = [1e3 * seconds[str(length)] / n for length in lengths]
        at = " / ".join(f"{length:,}" for length in lengths)
        values = " / ".join(f"{t:.3f}" for t in times)
        ratio = f"{max(times) / min(times) - 1:+.1%}"
        rows.append((f"{name}, after {at} tokens", "<= 10 %", ratio, f"{values} ms/token"))
    return rows


def door(model: PreTrainedModel, T: int, ids: Tensor, repeats: int) -> Row:
    """A forward through the door with nothing attached, against stock SDPA."""
    through = with_attention(model, "steerkit", AttentionInterface()["steerkit"])
    steps = {
        "stock": lambda: model(ids[:, :T], use_cache=False),
        "door": lambda: through(ids[:, :T], use_cache=False),
    }
    seconds = interleaved(steps, repeats=repeats)
    more = seconds["door"] / seconds["stock"] - 1
    times = f"{1e3 * seconds['stock']:.2f} -> {1e3 * seconds['door']:.2f} ms"
    return f"the door, nothing attached, {T} tokens", "<= +2 %", f"{more:+.1%}", times


def same_losses(model: PreTrainedModel, ids: Tensor) -> Row:
    """What is compared computes the same: largest difference in nats."""
    official, ids = Official(model, 28), ids[:, :200]
    steps = [
        next_token_loss(official.step(ids[:, t : t + 1]), ids[:, t + 1 : t + 2])
        for t in range(ids.shape[1] - 1)
    ]
    ours = token_losses(model, ids, sinks=SINKS, window=28)
    gap = (torch.cat(steps, 1) - ours).abs().max().item()
    assert gap < 1e-4, f"the baseline and token_losses differ by {gap} nats"
    return "largest difference in loss, cache 4+28", "< 1e-4", f"{gap:.0e}", "nats, 199 tokens"


def figure10(model: PreTrainedModel, sizes: list[int], repeats: int) -> list[Row]:
    rows = []
    for size in sizes:
        pace = {p.method: p for p in decode_pace(model, cache=size, repeats=repeats)}
        slow, fast = pace["re-computation"].milliseconds, pace["streaming"].milliseconds
        dense = pace["dense"].milliseconds
        how = f"re-computation {slow:.1f}, dense {dense:.2f}, streaming {fast:.2f} ms/token"
        rows.append((f"re-computation / streaming, {size}", "", f"{slow / fast:.1f}x", how))
    return rows


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
def measure(quick: bool, layers: int, width: int, kv_heads: int) -> list[Row]:
    model = random_model(layers, width, kv_heads)
    ids = torch.randint(2048, (1, 8192), generator=torch.Generator().manual_seed(0))
    repeats = 2 if quick else 25
    rows = [same_losses(model, ids)]
    rows += [perplexity(model, w, ids, repeats) for w in ((60,) if quick else (252, 1020))]
    sizes = [64, 128] if quick else [256, 1024, 2048, 4096]
    rows += [decode(model, size, ids, 4 * repeats) for size in sizes]
    if not quick:  # a small model spends its time elsewhere
        rows += [decode(random_model(12, 768, 12), size, ids, 9) for size in (1024, 4096)]
    rows += flatness(model, [500, 2000] if quick else [1000, 10_000, 100_000], ids, repeats)
    rows += [door(model, T, ids, 4 * repeats) for T in (1, 64 if quick else 512)]
    return rows + figure10(model, sizes, 3 if quick else 9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, for the test suite")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--kv-heads", type=int, default=8, help="of 8; 8 as in Llama-2-7B and 13B")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.quick, options.layers, options.width, options.kv_heads)
    print(
        f"Llama, {options.layers} layers x {options.width}, 8 heads, {options.kv_heads} key/value "
        "heads, float32, one CPU thread"
    )
    print(columns([("what", "goal", "measured", "how"), *rows]))


if __name__ == "__main__":
    main()
