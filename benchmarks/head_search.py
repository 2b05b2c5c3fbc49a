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
from collections.abc import Iterator

import table
import torch
from table import Row
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from steerkit.models import load
from steerkit.steering.head_search import Prompt
from steerkit.steering.screening import compared
from steerkit.steering.tasks import few_shot, prompts
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
    return prompts(tokenizer, [few_shot(e, history) for e in examples])


def measure(quick: bool) -> Iterator[Row]:
    """Two rows for each kind of prompts and each model."""
    tiny, tokenizer = load("tiny", device="cpu")
    for kind, (name, shots) in list(TASK.items())[: 1 if quick else None]:
        some = task_prompts(tokenizer, name, 4 if quick else 16, shots)
        T = sum(len(p.ids) + len(p.answer) for p in some) / len(some)
        first = sum(p.spans[0][0] for p in some) / len(some)
        for model in (tiny,) if quick else (tiny, with_idle_layers(tiny)):
            found = compared(model, some, keep=KEEP, repeats=1 if quick else 3)
            what = f"{model.config.num_hidden_layers} layers, {kind}"
            how = f"{T:.0f} tokens, span from {first:.0f}; off by {found['off']:.0e} nats"
            yield Row(f"exact search, {what}", found["exact"], goal=">= 3x", how=how)
            how = f"{found['found']:.0%} of the top {KEEP}"
            yield Row(f"screen, {what}", found["screen"], goal=">= 10x", how=how)


if __name__ == "__main__":
    table.run(measure, __doc__)
