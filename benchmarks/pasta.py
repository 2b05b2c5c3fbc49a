"""Ratios of steering against not steering, and against two other ways to steer: one process, one
thread, measured in turn.

    python benchmarks/pasta.py [--quick]

Plain is the model's own SDPA attention. "Full mask" adds log(alpha) to a (B,H,Q,K) mask made in
every layer; "literal" is equation 2 of PASTA (2311.02262) on materialised weights, as the official
library does it, as an edit of this package. What steering costs depends on the size of the heads,
so prefill is measured at 32, 64 and 128. Half of the heads of every layer are steered.
Machines shared with others make milliseconds drift; the ratios are medians of interleaved rounds,
on the clock of the one thread.
"""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager

import table
import torch
from table import Row
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from steerkit.attention.heads import Head
from steerkit.attention.hook import AttentionCall, Edit, attach
from steerkit.steering.pasta import emphasise
from steerkit.streaming.latency import interleaved

ALPHA = 0.01
LAYERS, HEADS, KV_HEADS, WIDTH = 4, 8, 8, 256  # heads of 32 numbers, and of 64 at twice the width


def span_of(T: int) -> tuple[int, int]:
    return T // 4, T // 4 + T // 16


def heads_of(model: PreTrainedModel) -> list[Head]:
    """Half of the heads of every layer: no layer keeps the stock call."""
    config = model.config
    half = range(0, config.num_attention_heads, 2)
    return [Head(layer, index) for layer in range(config.num_hidden_layers) for index in half]


def factor_of(T: int, K: int) -> Tensor:
    factor = torch.full((K,), ALPHA)
    factor[slice(*span_of(T))] = 1.0
    factor[T:] = 1.0
    return factor


def full_mask(T: int) -> Edit:
    def edit(call: AttentionCall) -> Tensor:
        (B, H, Q, _), K = call.query.shape, call.key.shape[2]
        bias = torch.zeros(B, H, Q, K)
        bias[:, ::2] = factor_of(T, K).log()
        later = torch.ones(Q, K, dtype=torch.bool).triu(K - Q + 1)
        return call.attend(mask=bias.masked_fill_(later, -math.inf))

    return edit


def literal(T: int) -> Edit:
    def edit(call: AttentionCall) -> Tensor:
        (_, H, Q, _), K = call.query.shape, call.key.shape[2]
        key, value = (x.repeat_interleave(H // x.shape[1], 1) for x in (call.key, call.value))
        later = torch.ones(Q, K, dtype=torch.bool).triu(K - Q + 1)
        scores = call.query @ key.mT * call.scaling
        weights = scores.masked_fill_(later, -math.inf).softmax(-1)
        weights[:, ::2] *= factor_of(T, K)
        weights[:, ::2] /= weights[:, ::2].sum(-1, keepdim=True)
        return (weights @ value).transpose(1, 2)

    return edit


class Ways:
    """One model per way, each inside its own `with` for good: no switch falls into a measure."""

    def __init__(self, make: Callable[[], PreTrainedModel], T: int, stack: ExitStack) -> None:
        self.models = {name: make() for name in ("plain", "steered", "full mask", "literal")}
        model, layers = self.models["steered"], self.models["plain"].config.num_hidden_layers
        stack.enter_context(emphasise(model, [[span_of(T)]], heads_of(model), alpha=ALPHA))
        for name, edit in (("full mask", full_mask(T)), ("literal", literal(T))):
            stack.enter_context(attach(self.models[name], dict.fromkeys(range(layers), edit)))

    def steps(self, run: Callable[[PreTrainedModel], object]) -> dict[str, Callable[[], object]]:
        return {name: lambda model=model: run(model) for name, model in self.models.items()}


@contextmanager
def ways(make: Callable[[], PreTrainedModel], T: int) -> Iterator[Ways]:
    with ExitStack() as stack:
        yield Ways(make, T, stack)


GOALS = {"steered": "<= 1.10x", "full mask": "", "literal": ""}


def ratios(
    what: str,
    steps: dict[str, Callable[[], object]],
    repeats: int,
    only: Collection[str] = tuple(GOALS),
) -> list[Row]:
    """Each way and plain in turn; the slow ways in fewer rounds."""
    rows = []
    for name in only:
        goal = GOALS[name]
        rounds = repeats if goal else max(2, repeats // 3)
        pair = {key: steps[key] for key in ("plain", name)}
        seconds = interleaved(pair, repeats=rounds)
        how = f"{1e3 * seconds['plain']:.2f} -> {1e3 * seconds[name]:.2f} ms"
        ratio = seconds[name] / seconds["plain"]
        rows.append(Row(f"{what}: {name} / plain", ratio, "{:.2f}x", goal, how))
    return rows


def prefill(
    make: Callable[[], PreTrainedModel],
    T: int,
    ids: Tensor,
    repeats: int,
    only: Collection[str] = tuple(GOALS),
) -> list[Row]:
    with ways(make, T) as compared:
        run = compared.steps(lambda model: model(ids[:, :T], use_cache=False, logits_to_keep=1))
        size = compared.models["plain"].config.head_dim
        what = f"prefill, {T:,} tokens, heads of {size}"
        return ratios(what, run, repeats * max(1, 2048 // T), only)


def decode(make: Callable[[], PreTrainedModel], T: int, ids: Tensor, repeats: int) -> list[Row]:
    """One token after a prompt of T; the cache grows by one token a step, as in `generate`."""
    with ways(make, T) as compared:
        caches = {model: DynamicCache(config=model.config) for model in compared.models.values()}
        for model, cache in caches.items():
            model(ids[:, :T], past_key_values=cache, logits_to_keep=1)
        run = compared.steps(lambda model: model(ids[:, :1], past_key_values=caches[model]))
        return ratios(f"decode after {T:,} tokens", run, repeats)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


def memory(make: Callable[[], PreTrainedModel], lengths: list[int], ids: Tensor) -> list[Row]:
    """The largest tensor of one attention call, in numbers per token: flat, or growing with T."""
    found: dict[str, list[float]] = {}
    for T in lengths:
        with ways(make, T) as compared:
            for name, model in compared.models.items():
                with Largest() as largest:
                    model.base_model(input_ids=ids[:, :T], use_cache=False)
                found.setdefault(name, []).append(largest.numbers / T)
    rows = []
    for name, values in found.items():
        what = f"largest tensor per token, {lengths[0]:,} to {lengths[-1]:,} tokens: {name}"
        how = " -> ".join(f"{value:,.0f}" for value in values) + " numbers"
        goal = "<= 1.01x" if name == "steered" else ""
        rows.append(Row(what, values[-1] / values[0], "{:.2f}x", goal, how))
    return rows


def same_logits(make: Callable[[], PreTrainedModel], ids: Tensor) -> Row:
    """What is compared computes the same."""
    with ways(make, 200) as compared:
        out = {name: model(ids[:, :200]).logits for name, model in compared.models.items()}
    gap = max((out["steered"] - out[name]).abs().max().item() for name in ("full mask", "literal"))
    moved = (out["steered"] - out["plain"]).abs().max().item()
    assert gap < 1e-4 < moved, f"the ways differ by {gap}, steering moves logits by {moved}"
    how = f"steering moves them {moved:.1e}"
    return Row("largest difference in logits", gap, "{:.0e}", "< 1e-4", how)


def maker(width: int) -> Callable[[], PreTrainedModel]:
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=width // HEADS,
        max_position_embeddings=8192,
    )

    def make() -> PreTrainedModel:
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()

    return make


@torch.no_grad()
def measure(quick: bool) -> Iterator[Row]:
    make = maker(WIDTH)
    ids = torch.randint(2048, (1, 8192), generator=torch.Generator().manual_seed(0))
    lengths, repeats = ((64,), 1) if quick else ((512, 2048), 21)
    yield same_logits(make, ids)
    for T in lengths:
        yield from prefill(make, T, ids, repeats)
        yield from prefill(maker(2 * WIDTH), T, ids, (repeats + 1) // 2, only=("steered",))
        yield from prefill(maker(4 * WIDTH), T, ids, (repeats + 3) // 4, only=("steered",))
        yield from decode(make, T, ids, 16 * repeats)
    yield from memory(make, [128, 256] if quick else [512, 1024, 2048], ids)


if __name__ == "__main__":
    table.run(measure, __doc__)
