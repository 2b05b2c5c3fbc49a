"""Head search against the naive loop: one process, one thread, measured in turn.

    python benchmarks/head_search.py [--quick]

The naive loop steers one head after another and runs the whole model each time, as Algorithm 1 of
PASTA (2311.02262) says. The exact search returns the same scores; the screen returns the best heads
after one backward pass and a few exact scores. Prompts are the embedded tasks as the kit draws
them. What is saved depends on where the first span begins: at the third token in JSON and Pronouns,
a third into the prompt in BiasBios and CounterFact, late in the prompt after two exchanges. The
model of twelve layers is the embedded one with idle layers in between, so that it has heads worth
finding. Ratios are medians of interleaved rounds, on the clock of the one thread.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import table
import torch
from table import Row
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from steerkit.models import load
from steerkit.steering.head_search import naive_scores, score_heads, screen_heads, screening_regret
from steerkit.steering.scoring import Prompt
from steerkit.steering.tasks import few_shot, to_prompts
from steerkit.streaming.latency import interleaved
from steerkit.tiny.tasks import TASKS

KEEP = 3  # heads to find
TASK = {
    "span at the start (json)": ("json", 0),
    "span inside (biasbios)": ("biasbios", 0),
    "span late (biasbios, two exchanges)": ("biasbios", 2),
}


def with_idle_layers(model: PreTrainedModel) -> PreTrainedModel:
    """The model with an idle layer after each of its own: twice the layers, the same replies."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers *= 2
    deep = LlamaForCausalLM(config).eval()
    deep.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for i, layer in enumerate(deep.model.layers):
            layer.load_state_dict(model.model.layers[i // 2].state_dict())
            if i % 2:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
    return deep


def task_prompts(tokenizer: PreTrainedTokenizerBase, name: str, n: int, shots: int) -> list[Prompt]:
    """The task's prompts after `shots` exchanges of the same kind."""
    history = TASKS[name].examples(shots, seed=1, split="profile")
    examples = TASKS[name].examples(n, seed=0, split="profile")
    return to_prompts(tokenizer, [few_shot(e, history) for e in examples])


def time_searches(
    model: PreTrainedModel, prompts: Sequence[Prompt], repeats: int
) -> dict[str, float]:
    """How many times faster than the naive loop "exact" and "screen" are, and what they lose.

    "off": largest difference of an exact score from the naive one, nats. Others as in
    `screening_regret`.
    """
    results: dict[str, Any] = {}
    steps = {
        "naive": lambda: results.update(naive=naive_scores(model, prompts)),
        "exact": lambda: results.update(exact=score_heads(model, prompts)),
        "screen": lambda: results.update(screen=screen_heads(model, prompts, keep=KEEP)),
    }
    seconds = interleaved(steps, repeats=repeats, warmup=0)
    exact = results["exact"]
    ratios = {name: seconds["naive"] / seconds[name] for name in ("exact", "screen")}
    ratios["off"] = (results["naive"].scores - exact.scores).abs().max().item()
    return ratios | screening_regret(results["screen"], exact, KEEP)


def measure(quick: bool) -> Iterator[Row]:
    """Two rows for each kind of prompts and each model."""
    tiny, tokenizer = load("tiny", device="cpu")
    for kind, (name, shots) in list(TASK.items())[: 1 if quick else None]:
        some = task_prompts(tokenizer, name, 4 if quick else 16, shots)
        T = sum(len(p.ids) + len(p.answer) for p in some) / len(some)
        first = sum(p.spans[0][0] for p in some) / len(some)
        for model in (tiny,) if quick else (tiny, with_idle_layers(tiny)):
            found = time_searches(model, some, 1 if quick else 3)
            what = f"{model.config.num_hidden_layers} layers, {kind}"
            how = f"{T:.0f} tokens, span from {first:.0f}; off by {found['off']:.0e} nats"
            yield Row(f"exact search, {what}", found["exact"], how=how)
            how = f"{found['found']:.0%} of the top {KEEP}"
            yield Row(f"screen, {what}", found["screen"], goal=">= 10x", how=how)


if __name__ == "__main__":
    table.run(measure, __doc__)
