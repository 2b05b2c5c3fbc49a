"""Memory: the peak of this process, and what a model of a given shape needs."""

import atexit
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config

from steerkit.files import write_json

USAGE_FILE = "STEERKIT_USAGE"  # environment variable: where a notebook's kernel writes its usage


def peak() -> dict[str, float | None]:
    """Peak memory of this process so far, in GiB: resident, and allocated by torch on the GPU."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss on Linux starts at the parent's peak
        kib = int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
    else:
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        kib //= 1024 if sys.platform == "darwin" else 1
    gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_initialized() else None
    return {"peak_gib": round(kib / 2**20, 2), "gpu_peak_gib": gpu and round(gpu, 2)}


def load_ipython_extension(shell: Any) -> None:
    """For a kernel that `steerkit run` starts: when it ends, write its peak memory, and its CPU
    time, which other processes on the machine do not lengthen as they do the time on the clock."""

    def write() -> None:
        usage = {"cpu_seconds": round(time.process_time(), 1), "memory": peak()}
        write_json(Path(os.environ[USAGE_FILE]), usage)

    atexit.register(write)


_QWEN = {  # hidden size, layers, query heads, key/value heads, MLP, vocabulary
    "0.5B": (896, 24, 14, 2, 4864, 151_936),
    "1.5B": (1536, 28, 12, 2, 8960, 151_936),
    "7B": (3584, 28, 28, 4, 18_944, 152_064),
}


def qwen(size: str) -> Qwen2Config:
    """The shape of Qwen2.5 of "0.5B", "1.5B" or "7B", as its checkpoints' config.json have it."""
    d, layers, heads, groups, mlp, vocabulary = _QWEN[size]
    return Qwen2Config(
        hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=vocabulary,
        num_key_value_heads=groups, intermediate_size=mlp, tie_word_embeddings=size != "7B",
    )  # fmt: skip


class Need(NamedTuple):
    """Computed memory of running a model, in GiB."""

    billions: float  # of parameters
    weights: float
    cache: float
    workspace: float

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.workspace


def need(config: PretrainedConfig, *, rows: int = 64, tokens: int = 2048, size: int = 2) -> Need:
    """What a forward without gradients over `rows` padded prompts of `tokens` tokens holds at
    `size` bytes a number: weights, keys and values of every layer, and one layer's work: the
    residual stream and its norm, and the larger of attention (a mask, and keys and values repeated
    for every query head, as SDPA does under a mask) and the MLP. Computed: allocators and
    kernels add to cache and workspace (on a CPU in float32, three shapes, 40 % were measured)."""
    config = config.get_text_config()
    d, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    D = getattr(config, "head_dim", None) or d // heads
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters, places = sum(p.numel() for p in model.parameters()), rows * tokens
    attention = places * (tokens + 4 * heads * D)
    mlp = places * 3 * (getattr(config, "intermediate_size", None) or 4 * d)
    numbers = parameters, places * 2 * layers * groups * D, places * 2 * d + max(attention, mlp)
    return Need(parameters / 1e9, *(size * n / 2**30 for n in numbers))
