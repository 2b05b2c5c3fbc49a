"""What a heat map costs: time and largest tensor, against the library's own attention weights.

    python benchmarks/attention_map.py [--quick]

One process, one thread, measured in turn; the shape is that of a model of 0.5 B parameters with
random weights (of its 24 layers two, or one with --quick: layers follow each other, so time grows
with their number and the largest tensor does not). "Eager" is `output_attentions=True`, which holds
every weight of every layer; "plain" is the forward alone, without a map.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from steerkit.maps import attention_map, span_share
from steerkit.timing import interleaved

LAYERS, HEADS = 24, 14
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


@torch.no_grad()
def eager(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The same map from the library's own weights, all layers at once."""
    model.set_attn_implementation("eager")
    weights = torch.stack(model.base_model(ids, output_attentions=True).attentions)
    model.set_attn_implementation("sdpa")
    T = ids.shape[1]
    return (
        weights.amax((0, 1, 2)).unflatten(1, (64, T // 64)).unflatten(0, (64, T // 64)).amax((1, 3))
    )


@torch.no_grad()
def plain(model: PreTrainedModel, ids: Tensor) -> None:
    model.base_model(ids, use_cache=False)


def largest(model: PreTrainedModel, step: Callable[[], object]) -> int:
    with Largest(model) as seen:
        step()
    return seen.numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one layer, shorter texts, one round")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    model = half_billion(1 if quick else 2)
    row = "{:>6}  {:<18}{:>10}{:>16}{:>22}"
    print(row.format("tokens", "what", "seconds", "times plain", "largest (numbers)"))
    for T in (256, 512) if quick else (512, 2048, 4096):
        ids = torch.randint(0, 256, (1, T), generator=torch.Generator().manual_seed(0))
        steps: dict[str, Callable[[], object]] = {
            "plain": partial(plain, model, ids),
            "map, max": partial(attention_map, model, ids),
            "map, mean": partial(attention_map, model, ids, reduce="mean"),
            "span share": partial(span_share, model, ids, [(T // 4, T // 2)]),
        }
        if T <= EAGER_LIMIT:
            steps["eager, max"] = partial(eager, model, ids)
            gap = (attention_map(model, ids) - eager(model, ids)).abs().max().item()
            print(f"{T:>6}  map against eager: {gap:.1e} at most")
        seconds = interleaved(steps, repeats=1 if quick else 3, warmup=1)
        for name, step in steps.items():
            ratio = f"{seconds[name] / seconds['plain']:.2f}"
            print(row.format(T, name, f"{seconds[name]:.2f}", ratio, f"{largest(model, step):,}"))
        print(f"{T:>6}  all weights of {LAYERS} layers would be {LAYERS * HEADS * T * T:,} numbers")


if __name__ == "__main__":
    main()
