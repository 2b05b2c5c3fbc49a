"""The Bigram-Backcopy task (2410.13835, section 2): a model of one layer grows a sink in a minute.

Ids 0 .. V-1 are a Markov chain, the first of them triggers: after a trigger comes again the token
that stood before it. Id V never occurs in the chain: it is the paper's BOS, or, said otherwise,
StreamingLLM's learnable sink token. Axes: B batch, T tokens, V tokens of the chain.
"""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from steerkit.attention.hook import softmax_off_by_one
from steerkit.attention.record import WeightChunk, record_weights, value_norms
from steerkit.files import data_file, write_bytes
from steerkit.fit import Batches, fit
from steerkit.streaming.losses import recomputed_losses, token_losses

CACHE = 64  # tokens kept; training sequences are as long as a full cache and the current token
BATCH = 64
ARMS = ("vanilla", "common first token", "zero sink", "learnable sink")
SNAPSHOTS = (50, 100, 150, 200, 300, 400)
# Data seeds: training steps of seed s start at s * 10**6, held-out streams far above all of them.
_HELD_OUT = 10**9


@dataclass(frozen=True)
class Recipe:
    """One training: `arm` decides the first token (and the softmax), the rest task and model.

    `width` is the residual stream's, `inner` the MLP's; one layer, one head, tied embeddings.
    """

    arm: str = "learnable sink"
    tokens: int = 256
    triggers: int = 20
    often: float = 0.25
    width: int = 32
    inner: int = 64
    lr: float = 1e-2
    weight_decay: float = 0.1
    steps: int = 600
    seed: int = 0

    def __post_init__(self) -> None:
        if self.arm not in ARMS:
            raise ValueError(f"arm={self.arm!r}: expected one of {', '.join(ARMS)}")
        if not 0 < self.triggers < self.tokens:
            raise ValueError(
                f"triggers={self.triggers}: expected 0 < triggers < tokens = {self.tokens}"
            )


RUNS: dict[str, Recipe] = {arm: Recipe(arm) for arm in ARMS} | {
    "capacity to spare": Recipe(tokens=64, triggers=5, width=96, inner=192, lr=5e-3),
    "64 tokens": Recipe(tokens=64, triggers=5),
    "three times as wide": Recipe(width=96, inner=192, lr=5e-3),
    "rare triggers": Recipe(often=0.1),
    "40 triggers": Recipe(triggers=40),
    "slow": Recipe(lr=3e-3),
}


# The task


@cache
def chain(recipe: Recipe) -> Tensor:
    """Transition probabilities (V, V) after an idle token: a trigger with probability `often`.

    Its rows come from sparse Dirichlet distributions, the same for all seeds of training; the paper
    takes the bigrams of Shakespeare's characters.
    """
    draw, idle = np.random.default_rng(0), recipe.tokens - recipe.triggers
    to_idle = draw.dirichlet([8 / idle] * idle, recipe.tokens)
    to_trigger = draw.dirichlet([2 / recipe.triggers] * recipe.triggers, recipe.tokens)
    rows = np.hstack([recipe.often * to_trigger, (1 - recipe.often) * to_idle])
    return torch.from_numpy(rows)


def is_trigger(recipe: Recipe, ids: Tensor) -> Tensor:
    """Which tokens are triggers (not idle): same shape, boolean."""
    return ids < recipe.triggers


def sample(recipe: Recipe, B: int, T: int, *, seed: int) -> Tensor:
    """Crops of the endless stream, ids (B, T): no first token in front, equal for equal seeds."""
    if B < 1 or T < 1:
        raise ValueError(f"B={B}, T={T}: expected at least one sequence of one token")
    cumulative, draw = chain(recipe).cumsum(-1), torch.Generator().manual_seed(seed)
    warm = 8  # forget the start: an idle token, for two triggers in a row would copy for ever
    before = now = torch.randint(recipe.triggers, recipe.tokens, (B,), generator=draw)
    u = torch.rand(T + warm, B, 1, generator=draw, dtype=torch.float64)
    stream = []
    for t in range(T + warm):
        drawn = torch.searchsorted(cumulative[now], u[t]).squeeze(1).clamp(max=recipe.tokens - 1)
        before, now = now, torch.where(is_trigger(recipe, now), before, drawn)
        stream.append(now)
    return torch.stack(stream[warm:], 1)


def first_token(recipe: Recipe) -> int | None:
    """The id in front of every sequence: V, the chain's likeliest idle token, or none."""
    if recipe.arm == "learnable sink":
        return recipe.tokens
    if recipe.arm == "common first token":
        return recipe.triggers + int(chain(recipe).mean(0)[recipe.triggers :].argmax())
    return None


def sequences(recipe: Recipe, B: int, T: int, *, seed: int) -> Tensor:
    """Ids (B, T): the arm's first token, if it has one, and a random crop behind it."""
    first = first_token(recipe)
    if first is None:
        return sample(recipe, B, T, seed=seed)
    return torch.cat([torch.full((B, 1), first), sample(recipe, B, T - 1, seed=seed)], 1)


def batches(recipe: Recipe) -> Batches:
    """`fit`'s batches: CACHE + 1 inputs and the last target, ids (64, 66)."""
    start = recipe.seed * 10**6
    return lambda step: sequences(recipe, BATCH, CACHE + 2, seed=start + step)


def held_out(recipe: Recipe, B: int, T: int) -> Tensor:
    """Streams (B, T) that no training saw; the same crops for every arm of a task."""
    return sequences(recipe, B, T, seed=_HELD_OUT)


def best_losses(recipe: Recipe, ids: Tensor) -> Tensor:
    """Losses (B, T-1) in nats of one who knows the chain: none after a trigger.

    A sequence's second token must be idle to be known: a trigger there copies what was cut off.
    """
    now, following = ids[:, :-1], ids[:, 1:]
    rows = chain(recipe)[now.clamp(max=recipe.tokens - 1)]
    drawn = -rows.gather(-1, following.clamp(max=recipe.tokens - 1)[..., None]).log().squeeze(-1)
    return torch.where(is_trigger(recipe, now), 0.0, drawn).float()


# The model


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    """An untrained model from `recipe.seed`; the global generator is left as it was."""
    config = LlamaConfig(
        vocab_size=recipe.tokens + 1,
        hidden_size=recipe.width,
        intermediate_size=recipe.inner,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=CACHE + 1,
        tie_word_embeddings=True,
        bos_token_id=recipe.tokens,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(config).eval()


def architecture(recipe: Recipe, model: PreTrainedModel) -> AbstractContextManager[None]:
    """What to train and evaluate `model` in: softmax-off-by-one for the zero sink."""
    return softmax_off_by_one(model) if recipe.arm == "zero sink" else nullcontext()


# What is measured


class Looks(NamedTuple):
    """Where each query looks, (B, T) each: its weight on key 0 and on its own token, and over how
    many keys it spreads (exp of the entropy; 1 = a single one).
    """

    first: Tensor
    itself: Tensor
    keys: Tensor


def looks(model: PreTrainedModel, ids: Tensor) -> Looks:
    """Read from one forward over ids (B, T); mean over heads and layers."""
    parts: list[Tensor] = []

    def keep(rows: WeightChunk) -> None:
        w = rows.weights.cpu()  # (B, H, q, K)
        own = w.diagonal(rows.start, 2, 3)  # (B, H, q)
        share = w / w.sum(-1, keepdim=True)  # the zero sink's rows sum to less than 1
        keys = torch.special.entr(share).sum(-1).exp()
        parts.append(torch.stack([w[..., 0], own, keys]).mean(2))  # (3, B, q)

    record_weights(model, ids, keep)
    layers = model.config.num_hidden_layers
    found = torch.cat(parts, -1).unflatten(-1, (layers, ids.shape[1])).mean(-2)  # (3, B, T)
    return Looks(*found)


def cache_losses(model: PreTrainedModel, ids: Tensor, sinks: Sequence[int]) -> Tensor:
    """Mean loss of each stream with caches of s + (CACHE - s) tokens: ids (B, T) -> (S, B) nats.

    The first 2 CACHE tokens are left out: every cache must have evicted.
    """
    losses = [token_losses(model, ids, sinks=s, window=CACHE - s) for s in sinks]
    return torch.stack(losses)[..., 2 * CACHE :].mean(-1)


def measure(model: PreTrainedModel, recipe: Recipe, ids: Tensor) -> dict[str, float]:
    """The four losses of StreamingLLM's Figure 3 on streams ids (B, T), and what the head does.

    "streaming" keeps one token; "after triggers" and "idle, above best" split its loss.
    """
    window, streaming = (
        token_losses(model, ids, sinks=s, window=CACHE - s)[:, 2 * CACHE :] for s in (0, 1)
    )
    late = torch.arange(2 * CACHE, ids.shape[1] - 1)
    fresh = recomputed_losses(model, ids, length=CACHE + 1, positions=late[::8])
    trigger = is_trigger(recipe, ids.cpu())[:, late]
    above = streaming - best_losses(recipe, ids.cpu())[:, late]
    return {
        "dense": token_losses(model, ids)[:, late].mean().item(),
        "window": window.mean().item(),
        "streaming": streaming.mean().item(),
        "re-computation": fresh.mean().item(),
        "after triggers": streaming[trigger].mean().item(),
        "idle, above best": above[~trigger].mean().item(),
        **_head(model, recipe, ids[:, : CACHE + 1]),
    }


def _head(model: PreTrainedModel, recipe: Recipe, ids: Tensor) -> dict[str, float]:
    """Weights and values in sequences as long as in training; weights after the first quarter."""
    idle = ~is_trigger(recipe, ids.cpu()[:, CACHE // 4 :])
    seen = Looks(*(x[:, CACHE // 4 :] for x in looks(model, ids)))
    norms = value_norms(model, ids).mean((0, 1))  # (T,)
    return {
        "weight on first, idle": seen.first[idle].mean().item(),
        "weight on first, trigger": seen.first[~idle].mean().item(),
        "weight on itself, idle": seen.itself[idle].mean().item(),
        "keys, idle": seen.keys[idle].mean().item(),
        "value norm, first": norms[0].item(),
        "value norm, others": norms[1:].mean().item(),
    }


# Trainings, shipped and live


def train(name: str, seed: int, out: Path, *, progress: bool = True) -> None:
    """Train RUNS[name] into out/<name>-seed<seed>/: log, weights, for seed 0 of the learnable sink
    also the SNAPSHOTS. A killed training continues; a finished one is left alone.
    """
    recipe = _recipe(name, seed)
    folder = Path(out) / folder_name(name, seed)
    if (folder / f"step-{recipe.steps}.safetensors").exists():
        return
    model = new_model(recipe)
    wanted = SNAPSHOTS if (name, seed) == ("learnable sink", 0) else ()

    def snapshot(step: int, model: PreTrainedModel) -> None:
        if step in wanted or step == recipe.steps:
            weights = {k: p.detach().half() for k, p in model.named_parameters()}
            write_bytes(folder / f"step-{step}.safetensors", save(weights))

    with architecture(recipe, model):
        fit(model, batches(recipe), **settings(recipe), out=folder, every=200, callback=snapshot,
            progress=progress)  # fmt: skip
    (folder / "state.safetensors").unlink()  # the optimizer is no part of the result


def settings(recipe: Recipe) -> dict[str, float]:
    """`fit`'s settings: warm-up of 50 steps, then a constant rate."""
    return {
        "steps": recipe.steps,
        "lr": recipe.lr,
        "weight_decay": recipe.weight_decay,
        "warmup": 50,
        "decay": 0.0,
    }


def _recipe(name: str, seed: int) -> Recipe:
    if name not in RUNS:
        raise ValueError(f"run {name!r}: expected one of {', '.join(RUNS)}")
    return replace(RUNS[name], seed=seed)


def folder_name(name: str, seed: int) -> str:
    """The folder of one shipped run."""
    return f"{name.replace(', ', '-').replace(' ', '_')}-seed{seed}"


def load_run(
    name: str, seed: int = 0, *, step: int | None = None, folder: Path | None = None
) -> tuple[LlamaForCausalLM, Recipe]:
    """A shipped model and its recipe; `step` picks a snapshot (default: the last).

    Raises ValueError for an unknown name, FileNotFoundError if that run or step is not stored.
    """
    recipe = _recipe(name, seed)
    folder = data_file("backcopy") if folder is None else Path(folder)
    path = folder / folder_name(name, seed) / f"step-{step or recipe.steps}.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"{path.parent.name} has no step {step or recipe.steps}; train it with "
            "`python -m steerkit.streaming.backcopy train --out DIR`"
        )
    model = new_model(recipe)
    _put(model, load_file(path))
    return model, recipe


def _put(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def grow(
    recipe: Recipe, ids: Tensor, *, live: int, steps: Sequence[int] = (0, *SNAPSHOTS, 600)
) -> list[dict[str, float]]:
    """Train for `live` steps and `measure` on streams ids (B, T) at each of `steps`: rows with seed
    and step. Steps later than `live` are read from the shipped run of the learnable sink.
    """
    rows: list[dict[str, float]] = []

    def look(step: int, model: PreTrainedModel) -> None:
        if step in steps:
            rows.append({"seed": recipe.seed, "step": step, **measure(model, recipe, ids)})

    model = new_model(recipe).to(ids.device)
    look(0, model)
    fit(model, batches(recipe), **settings(replace(recipe, steps=live)), callback=look)
    for step in steps:
        if step > live:
            look(step, load_run("learnable sink", recipe.seed, step=step)[0].to(ids.device))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m steerkit.streaming.backcopy train --out DIR`: reproduce data/backcopy/."""
    parser = argparse.ArgumentParser(
        prog="python -m steerkit.streaming.backcopy", description=main.__doc__
    )
    parser.add_argument("command", choices=("train",))
    parser.add_argument("--out", type=Path, required=True, help="one folder per run and seed here")
    parser.add_argument("--runs", nargs="+", choices=tuple(RUNS), default=tuple(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    args = parser.parse_args(argv)
    for seed in args.seeds:
        for name in args.runs:
            train(name, seed, args.out)


if __name__ == "__main__":
    main()
