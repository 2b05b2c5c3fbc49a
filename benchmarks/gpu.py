"""The kit at the size of a 7B model on a CUDA GPU: speed and memory, random weights.

    python benchmarks/gpu.py [--quick] [--json FILE]

In bfloat16, under SDPA's fused kernels, batch 1. Random weights tell nothing about losses or heads.
Without a CUDA GPU, and with --quick, a small float32 model takes the place of the large one: this
rehearses every line and measures nothing of interest. "One by one" is one forward a token with the
same cache; the official code does the same, and joins its cache anew for each token.
"""

from collections.abc import Iterator

import table
import torch
from table import Row
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from steerkit.attention.maps import attention_map
from steerkit.attention.record import attention_weights
from steerkit.steering.pasta import emphasise
from steerkit.streaming.latency import decode_pace, interleaved
from steerkit.streaming.losses import token_losses
from steerkit.streaming.sink_cache import SinkCache

CUDA = torch.cuda.is_available()
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
LARGE = {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32}


def random_model(large: bool) -> PreTrainedModel:
    """A Llama of 7B, or a small one, on the GPU if there is one."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 32 if large else 4, "max_position_embeddings": 32_768}
    config = LlamaConfig(
        vocab_size=32_000 if large else 256, **(LARGE if large else SMALL), **heads
    )
    with torch.device("cuda" if CUDA else "cpu"):
        dtype = torch.bfloat16 if CUDA else torch.float32
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def gib() -> float:
    """The most memory that was held since the last call, in GiB."""
    if not CUDA:
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def latency(model: PreTrainedModel, cache: int) -> Row:
    """Figure 10 of StreamingLLM (2309.17453): the paper's ratio is up to 22.2 at 4,096 on 7B."""
    pace = decode_pace(model, cache=cache, repeats=5)
    how = ", ".join(f"{name} {ms:.2f} ms" for name, ms in pace.items())
    what = f"decode, cache {cache:,}: re-computation / streaming"
    return Row(what, pace["re-computation"] / pace["streaming"], how=how)


def perplexity(model: PreTrainedModel, window: int, ids: Tensor) -> Row:
    """Losses of a stream, read in blocks or token by token, on a cache that is full."""
    cache = SinkCache(model, sinks=4, window=window)
    token_losses(model, ids[:, : window + 300], cache=cache)  # full from here on
    few, block = 16, min(1024, ids.shape[1] - 1)
    steps = {
        "one by one": lambda: token_losses(model, ids[:, : few + 1], cache=cache, block=1),
        "blocks": lambda: token_losses(model, ids[:, : block + 1], cache=cache, block=block),
    }
    seconds = interleaved(steps, repeats=5)
    slow, fast = few / seconds["one by one"], block / seconds["blocks"]
    ratio, how = fast / slow, f"{slow:,.0f} -> {fast:,.0f} tokens/s"
    return Row(f"perplexity, cache 4+{window:,}, over one by one", ratio, goal=">= 100x", how=how)


def steering(model: PreTrainedModel, ids: Tensor) -> Row:
    """One prompt, two heads of each layer steered."""
    heads = [(layer, head) for layer in range(model.config.num_hidden_layers) for head in (0, 2)]

    def steered() -> None:
        with emphasise(model, [[(8, 40)]], heads):
            model(ids, use_cache=False, logits_to_keep=1)

    steps = {"plain": lambda: model(ids, use_cache=False, logits_to_keep=1), "steered": steered}
    seconds = interleaved(steps, repeats=5)
    how = f"{1e3 * seconds['plain']:.1f} -> {1e3 * seconds['steered']:.1f} ms"
    ratio = seconds["steered"] / seconds["plain"]
    return Row(f"PASTA, prefill of {ids.shape[1]:,}: steered / plain", ratio, "{:.2f}x", "", how)


def heat_map(model: PreTrainedModel, ids: Tensor) -> Iterator[Row]:
    """The map's time and memory; then the weights themselves, against those of eager attention."""
    gib()  # from here on
    steps = {
        "plain": lambda: model.base_model(ids, use_cache=False),
        "map": lambda: attention_map(model, ids, bins=48),
    }
    seconds = interleaved(steps, repeats=3)
    how = f"{seconds['plain']:.3f} -> {seconds['map']:.3f} s, peak {gib():.1f} GiB"
    ratio = seconds["map"] / seconds["plain"]
    yield Row(f"heat map of {ids.shape[1]:,} tokens / plain", ratio, "{:.2f}x", "<= 1.50x", how)
    model.set_attn_implementation("eager")
    eager = torch.stack(model.base_model(ids[:, :256], output_attentions=True).attentions)[:, 0]
    model.set_attn_implementation("sdpa")
    gap = (attention_weights(model, ids[:, :256]).cpu() - eager.float().cpu()).abs().max().item()
    yield Row("weights under the fused kernel against eager's", gap, "{:.0e}", "< 2e-2")


def long_stream(model: PreTrainedModel, window: int, tokens: int) -> Row:
    """Memory at the end of the stream over that after its first tenth."""
    cache, peaks = SinkCache(model, sinks=4, window=window), []
    vocabulary = model.config.vocab_size
    for start in range(10):
        draw = torch.Generator().manual_seed(start)
        piece = torch.randint(vocabulary, (1, tokens // 10 + 1), generator=draw)
        gib()
        token_losses(model, piece, cache=cache, block=1024)
        peaks.append(max(gib(), 1e-9))
    how = f"{cache.seen:,} tokens, {peaks[-1]:.2f} GiB"
    return Row("stream: peak memory, last tenth / first", peaks[-1] / peaks[0], "{:.3f}x", "", how)


@torch.no_grad()
def measure(quick: bool) -> Iterator[Row]:
    large = CUDA and not quick
    model, window = random_model(large), 1020 if large else 60
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, 8192 if large else 512), generator=draw)
    ids = ids.to(model.device)
    for cache in (256, 512, 1024, 2048, 4096) if large else (64,):
        yield latency(model, cache)
    yield perplexity(model, window, ids)
    yield steering(model, ids)
    yield from heat_map(model, ids)
    yield long_stream(model, window, 1_000_000 if large else 5_000)


if __name__ == "__main__":
    table.run(measure, __doc__)
