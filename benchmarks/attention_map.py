"""What a heat map costs: time and largest tensor, against the library's own attention weights.

    python benchmarks/attention_map.py [--quick]

One process, one thread, measured in turn; the shape is that of a model of 0.5 B parameters with
random weights (of its 24 layers two, or one with --quick: layers follow each other, so time grows
with their number and the largest tensor does not). "Eager" is `output_attentions=True`, which holds
every weight of every layer; "plain" is the forward alone, without a map.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import table
import torch
from table import Row
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from steerkit.attention.maps import attention_map, span_share
from steerkit.streaming.latency import interleaved

HEADS = 14
EAGER_LIMIT = 2048  # tokens: beyond, eager weights of two layers take gigabytes


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that an operation makes; views of the weights are none."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.numbers, self.held = 0, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.held:
                self.numbers = max(self.numbers, x.numel())
        return out


def half_billion(layers: int) -> PreTrainedModel:
    config = Qwen2Config(
        vocab_size=256, hidden_size=896, intermediate_size=4864, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=2, max_position_embeddings=32_768,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).eval()


def eager(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The same map from the library's own weights, all layers at once."""
    model.set_attn_implementation("eager")
    weights = torch.stack(model.base_model(ids, output_attentions=True).attentions)
    model.set_attn_implementation("sdpa")
    T = ids.shape[1]
    return (
        weights.amax((0, 1, 2)).unflatten(1, (64, T // 64)).unflatten(0, (64, T // 64)).amax((1, 3))
    )


def largest(model: PreTrainedModel, step: Callable[[], object]) -> int:
    with Largest(model) as seen:
        step()
    return seen.numbers


@torch.no_grad()
def measure(quick: bool) -> Iterator[Row]:
    model = half_billion(1 if quick else 2)
    for T in (64, 128) if quick else (512, 2048, 8192):
        ids = torch.randint(0, 256, (1, T), generator=torch.Generator().manual_seed(0))
        steps: dict[str, Callable[[], object]] = {
            "plain": partial(model.base_model, ids, use_cache=False),
            "map, max": partial(attention_map, model, ids),
            "map, mean": partial(attention_map, model, ids, reduce="mean"),
            "span share": partial(span_share, model, ids, [(T // 4, T // 2)]),
        }
        if T <= EAGER_LIMIT:
            steps["eager, max"] = partial(eager, model, ids)
            gap = (attention_map(model, ids) - eager(model, ids)).abs().max().item()
            yield Row(f"map against eager, {T} tokens", gap, "{:.0e}", "< 1e-5", "largest weight")
        seconds = interleaved(steps, repeats=1 if quick else 3, warmup=1)
        for name in list(steps)[1:]:
            how = f"{seconds['plain']:.2f} -> {seconds[name]:.2f} s"
            goal = "<= 1.50x" if T == 8192 else ""
            ratio = seconds[name] / seconds["plain"]
            yield Row(f"{name} / plain, {T} tokens", ratio, "{:.2f}x", goal, how)
        numbers = {name: largest(model, step) for name, step in steps.items()}
        for name in list(steps)[1:]:
            how = f"{numbers['plain']:,} -> {numbers[name]:,} numbers"
            ratio = numbers[name] / numbers["plain"]
            yield Row(f"largest tensor: {name} / plain, {T} tokens", ratio, how=how)


if __name__ == "__main__":
    table.run(measure, __doc__)
