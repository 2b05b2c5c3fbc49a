"""Milliseconds per token by cache size: Figure 10 of StreamingLLM (2309.17453) on any model.

Times on a shared machine drift, so what is compared runs in turn, round by round, and medians are
taken. On a CPU with one thread the clock counts the time that this process ran, not the time that
it waited for others. Trust the ratios more than the milliseconds.
"""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from transformers import DynamicCache, PreTrainedModel

from steerkit.streaming.sink_cache import SinkCache


def interleaved(
    steps: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 2
) -> dict[str, float]:
    """Median seconds of each step; every round runs each of them once, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(warmup + repeats):
        for name, step in steps.items():
            start = _now()
            step()
            seconds[name].append(_now() - start)
    return {name: statistics.median(values[warmup:]) for name, values in seconds.items()}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@torch.no_grad()
def decode_pace(model: PreTrainedModel, *, cache: int, repeats: int = 15) -> dict[str, float]:
    """Milliseconds to decode a token, by method, with `cache` tokens in sight (batch 1).

    Streaming keeps 4 + (`cache` - 4) keys. Dense has just as many at first and grows: its time is
    that of this length. Re-computation reads the last `cache` tokens anew. "no sinks" keeps as
    many keys as streaming, all recent: the difference is what moving the sinks costs.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(cache, device=model.device) % vocabulary)[None]
    streaming = SinkCache(model, sinks=4, window=cache - 4)
    recent = SinkCache(model, sinks=0, window=cache)
    dense = DynamicCache(config=model.config)
    for past in (streaming, recent, dense):
        for piece in ids.split(256, dim=1):
            model(piece, past_key_values=past)
    for full in (streaming, recent):
        model(ids[:, :2], past_key_values=full)  # from now on each step evicts
    steps = {
        "dense": lambda: model(ids[:, :1], past_key_values=dense),
        "re-computation": lambda: model(ids, use_cache=False, logits_to_keep=1),
        "streaming": lambda: model(ids[:, :1], past_key_values=streaming),
        "no sinks": lambda: model(ids[:, :1], past_key_values=recent),
    }
    return {name: 1e3 * s for name, s in interleaved(steps, repeats=repeats).items()}
