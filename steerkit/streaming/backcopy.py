"""The Bigram-Backcopy task (2410.13835, section 2): a model of one layer grows a sink in a minute.

The ids 0 to V - 1 form a Markov chain. The first of them are triggers: after a trigger the token
before it comes once more. All other tokens are idle: a head that copies must stay silent there.
Id V never occurs in the chain. It is the paper's BOS, and StreamingLLM's learnable sink token.
Axes: B batch, T tokens, V tokens of the chain.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from steerkit.attention.hook import softmax_off_by_one
from steerkit.attention.record import WeightChunk, record_weights, value_norms
from steerkit.files import DATA
from steerkit.models import Model
from steerkit.streaming.losses import recomputed_losses, token_losses

CACHE = 64  # tokens; training sequences are as long as a full cache and the current token
BATCH, WARMUP = 64, 50
ARMS = ("vanilla", "common first token", "zero sink", "learnable sink")
SNAPSHOTS = (50, 100, 150, 200, 300, 400)


@dataclass(frozen=True)
class Recipe:
    """One training. `arm` decides the first token (and the softmax), the rest task and model.

    tokens, triggers: of the chain. often: how often a trigger follows an idle token.
    width, inner: of the residual stream and the MLP. One layer, one head, tied embeddings.
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


RUNS: dict[str, Recipe] = {arm: Recipe(arm) for arm in ARMS} | {
    "capacity to spare": Recipe(tokens=64, triggers=5, width=96, inner=192, lr=5e-3),
    "64 tokens": Recipe(tokens=64, triggers=5),
    "three times as wide": Recipe(width=96, inner=192, lr=5e-3),
    "rare triggers": Recipe(often=0.1),
    "40 triggers": Recipe(triggers=40),
    "slow": Recipe(lr=3e-3),
}


# --- the task ----------------------------------------------------------------------------------


@cache
def chain(recipe: Recipe) -> Tensor:
    """Transition probabilities (V,V) after an idle token: a trigger with probability `often`.

    Sparse Dirichlet distributions, the same for all seeds of training. (The paper takes the bigrams
    of Shakespeare's characters.)
    """
    draw, idle = np.random.default_rng(0), recipe.tokens - recipe.triggers
    to_idle = draw.dirichlet([8 / idle] * idle, recipe.tokens)
    to_trigger = draw.dirichlet([2 / recipe.triggers] * recipe.triggers, recipe.tokens)
    return torch.from_numpy(np.hstack([recipe.often * to_trigger, (1 - recipe.often) * to_idle]))


def is_trigger(recipe: Recipe, ids: Tensor) -> Tensor:
    """Which tokens are triggers (not idle): same shape, boolean."""
    return ids < recipe.triggers


def crops(recipe: Recipe, B: int, T: int, *, seed: int) -> Tensor:
    """Random crops of the endless stream, without a first token in front: (B,T)."""
    cumulative, draw = chain(recipe).cumsum(-1), torch.Generator().manual_seed(seed)
    warm = 8  # steps to forget the start: it is idle, for two triggers would copy each other
    before = now = torch.randint(recipe.triggers, recipe.tokens, (B,), generator=draw)
    u = torch.rand(T + warm, B, 1, generator=draw, dtype=torch.float64)
    stream = []
    for t in range(T + warm):
        drawn = torch.searchsorted(cumulative[now], u[t]).squeeze(1).clamp(max=recipe.tokens - 1)
        before, now = now, torch.where(is_trigger(recipe, now), before, drawn)
        stream.append(now)
    return torch.stack(stream[warm:], 1)


def sequences(recipe: Recipe, B: int, T: int, *, seed: int) -> Tensor:
    """The arm's first token, if it has one, and a random crop behind it: (B,T).

    A learnable sink token has the id V; a common first token is the chain's likeliest idle one.
    """
    if recipe.arm in ("vanilla", "zero sink"):
        return crops(recipe, B, T, seed=seed)
    first = recipe.tokens
    if recipe.arm == "common first token":
        first = recipe.triggers + chain(recipe).mean(0)[recipe.triggers :].argmax().item()
    return torch.cat([torch.full((B, 1), first), crops(recipe, B, T - 1, seed=seed)], 1)


def batch(recipe: Recipe, step: int) -> Tensor:
    """What step `step` trains on: CACHE + 1 inputs and the last target, ids (64,66)."""
    return sequences(recipe, BATCH, CACHE + 2, seed=recipe.seed * 10**6 + step)


def held_out(recipe: Recipe, B: int, T: int) -> Tensor:
    """Streams (B,T) that no training saw; the same crops for every arm of a task."""
    # The training with seed s draws its batches from s * 10**6 and on.
    return sequences(recipe, B, T, seed=10**9)


def best_losses(recipe: Recipe, ids: Tensor) -> Tensor:
    """Losses in nats of a predictor that knows the chain: (B,T) -> (B,T-1).

    0 after a trigger, otherwise -log p. Wrong for position 1 if a trigger stands there: the token
    that it copies is outside the crop.
    """
    known = ids.clamp(max=recipe.tokens - 1)
    drawn = -chain(recipe)[known[:, :-1], known[:, 1:]].log()
    return torch.where(is_trigger(recipe, ids[:, :-1]), 0.0, drawn).float()


# --- the model ---------------------------------------------------------------------------------


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    """An untrained model from `recipe.seed`; the global generator is left as it was."""
    config = LlamaConfig(
        vocab_size=recipe.tokens + 1,
        hidden_size=recipe.width,
        intermediate_size=recipe.inner,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=CACHE + 1,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(config).eval()


def architecture(recipe: Recipe, model: Model) -> AbstractContextManager[None]:
    """What to train and evaluate `model` in: softmax-off-by-one for the zero sink."""
    return softmax_off_by_one(model) if recipe.arm == "zero sink" else nullcontext()


def train(
    model: Model, recipe: Recipe, steps: int, callback: Callable[[int, Model], None]
) -> Tensor:
    """Train a new model, inside its `architecture`; return the loss of each step in nats: (steps,).

    AdamW at a constant rate after a warm-up. `callback(step, model)` sees the model after each
    step, from 1.
    """
    # Norm gains are not decayed: pulling them to zero is a different prior.
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    losses = []
    model.train()
    for step in tqdm(range(1, steps + 1), delay=2, mininterval=1, leave=False):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, step / WARMUP)
        ids = batch(recipe, step - 1).to(model.device)
        logits = model(ids[:, :-1], use_cache=False).logits  # (B,T-1,V+1)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        callback(step, model)
    model.eval()
    return torch.stack(losses)


def load_run(name: str, seed: int = 0, *, step: int | None = None) -> tuple[Model, Recipe]:
    """A stored model of RUNS, and its recipe; `step` picks a snapshot (default: the last).

    Raises FileNotFoundError if that run or step is not stored: `data/make/backcopy_runs.py` makes
    them.
    """
    recipe = replace(RUNS[name], seed=seed)
    model, step = new_model(recipe), recipe.steps if step is None else step
    weights = load_file(_folder(name, seed) / f"step-{step}.safetensors")
    model.load_state_dict(weights, strict=False)  # the LM head is the embedding, stored once
    return model, recipe


def load_log(name: str, seed: int = 0) -> pd.DataFrame:
    """What training a stored run wrote down every 50 steps: step, tokens, loss (nats), ..."""
    return pd.read_json(_folder(name, seed) / "log.jsonl", lines=True)


def _folder(name: str, seed: int) -> Path:
    return DATA / "backcopy" / f"{name.replace(' ', '_')}-seed{seed}"


# --- what is measured --------------------------------------------------------------------------


def attention_stats(model: Model, ids: Tensor) -> Tensor:
    """How each query of ids (B,T) attends in a model of one layer, mean over heads: (2,B,T).

    Its weight on key 0, and over how many keys it spreads its weight (exp of the entropy).
    """
    parts: list[Tensor] = []

    def record(chunk: WeightChunk) -> None:
        weights = chunk.weights.cpu()  # (B,H,q,K)
        share = weights / weights.sum(-1, keepdim=True)  # with a zero sink the sum is less than 1
        keys = torch.special.entr(share).sum(-1).exp()
        parts.append(torch.stack([weights[..., 0], keys]).mean(2))  # (2,B,q)

    record_weights(model, ids, record)
    return torch.cat(parts, dim=-1)


def cache_losses(model: Model, ids: Tensor, sinks: Sequence[int]) -> Tensor:
    """Mean loss of each stream, with a cache of s + (CACHE - s) tokens for each s: (B,T) -> (S,B).

    The first 2 CACHE tokens are left out: every cache must have evicted.
    """
    losses = [token_losses(model, ids, sinks=s, window=CACHE - s) for s in sinks]
    return torch.stack(losses)[..., 2 * CACHE :].mean(-1)


def measure(model: Model, recipe: Recipe, ids: Tensor) -> dict[str, float]:
    """The four losses of StreamingLLM's Figure 3 on streams ids (B,T), and what the head does.

    "streaming" has one sink; "after triggers" and "idle, above best" split its loss. The head is
    read in sequences as long as in training, its weights after the first quarter.
    """
    window, streaming = (
        token_losses(model, ids, sinks=s, window=CACHE - s)[:, 2 * CACHE :] for s in (0, 1)
    )
    late = torch.arange(2 * CACHE, ids.shape[1] - 1)
    fresh = recomputed_losses(model, ids, length=CACHE + 1, positions=late[::8])
    trigger = is_trigger(recipe, ids.cpu())[:, late]
    above = streaming - best_losses(recipe, ids.cpu())[:, late]
    short, quarter = ids[:, : CACHE + 1], slice(CACHE // 4, None)
    idle = ~is_trigger(recipe, short.cpu()[:, quarter])
    first, keys = attention_stats(model, short)[..., quarter]
    norms = value_norms(model, short).mean((0, 1))  # (T,)
    numbers = {
        "dense": token_losses(model, ids)[:, late].mean(),
        "window": window.mean(),
        "streaming": streaming.mean(),
        "re-computation": fresh.mean(),
        "after triggers": streaming[trigger].mean(),
        "idle, above best": above[~trigger].mean(),
        "weight on first, idle": first[idle].mean(),
        "weight on first, trigger": first[~idle].mean(),
        "keys, idle": keys[idle].mean(),
        "value norm, first": norms[0],
        "value norm, others": norms[1:].mean(),
    }
    return {name: number.item() for name, number in numbers.items()}


def train_and_measure(
    recipe: Recipe, ids: Tensor, *, live: int, steps: Sequence[int] = (0, *SNAPSHOTS, 600)
) -> list[dict[str, float]]:
    """Train for `live` steps and `measure` on streams ids (B,T) at each of `steps`.

    Steps later than `live` are read from the stored run of the learnable sink. One dict for each
    step, with seed and step.
    """
    measured: list[dict[str, float]] = []

    def measure_at(step: int, model: Model) -> None:
        if step in steps:
            numbers = measure(model, recipe, ids)
            measured.append({"seed": recipe.seed, "step": step, **numbers})

    model = new_model(recipe).to(ids.device)
    measure_at(0, model)
    train(model, recipe, live, measure_at)
    for step in [step for step in steps if step > live]:
        stored, _ = load_run("learnable sink", recipe.seed, step=step)
        measure_at(step, stored.to(ids.device))
    return measured
