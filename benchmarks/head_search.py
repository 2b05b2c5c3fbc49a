"""Head search against the naive loop: one process, one thread, measured in turn.

    python benchmarks/head_search.py [--quick]

The naive loop steers one head after another and runs the whole model each time, as Algorithm 1 of
PASTA (2311.02262) says. The exact search returns the same scores; the screen returns the best heads
after one backward pass and a few exact scores. Prompts are the embedded BiasBios, alone and after
two exchanges: what is saved depends on where the first span begins. The model of twelve layers is
the embedded one with idle layers in between, so that it has heads worth finding. Ratios are medians
of interleaved rounds, on the clock of the one thread.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from steerkit.heads import HeadTable, Prompt, naive_scores, score_heads
from steerkit.models import load
from steerkit.screening import chosen, screen_heads
from steerkit.task_data import TASKS
from steerkit.tasks import few_shot, prompts
from steerkit.timing import interleaved


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


def task_prompts(tokenizer: PreTrainedTokenizerBase, n: int, shots: int) -> list[Prompt]:
    """BiasBios, after `shots` exchanges of the same kind: the more, the later the span begins."""
    task = TASKS["biasbios"]
    history = task.examples(shots, seed=1, split="profile")
    examples = task.examples(n, seed=0, split="profile")
    return prompts(tokenizer, [few_shot(e, history) for e in examples])


def compare(model: PreTrainedModel, some: list[Prompt], repeats: int, keep: int) -> None:
    """One line: how many times faster, and whether the results are the same."""
    found: dict[str, HeadTable] = {}
    steps = {
        "naive": lambda: found.update(naive=naive_scores(model, some)),
        "exact": lambda: found.update(exact=score_heads(model, some)),
        "screen": lambda: found.update(screen=screen_heads(model, some, keep=keep)),
    }
    seconds = interleaved(steps, repeats=repeats, warmup=0)
    error = (found["naive"].scores - found["exact"].scores).abs().max().item()
    T = sum(len(p.ids) + len(p.answer) for p in some) / len(some)
    first = sum(p.spans[0][0] for p in some) / len(some)
    name = f"{model.config.num_hidden_layers:2d} layers, {T:.0f} tokens, span from {first:.0f}:"
    true, got = found["exact"].top(keep), chosen(found["screen"], keep)
    print(
        f"{name} exact {seconds['naive'] / seconds['exact']:5.2f}x (off by {error:.0e} nats)  "
        f"screen {seconds['naive'] / seconds['screen']:5.1f}x, {len(set(true) & set(got))} of the "
        f"top {keep}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer prompts, one round")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    n, repeats = (8, 1) if quick else (32, 3)
    tiny, tokenizer = load("tiny", device="cpu")
    deep = with_idle_layers(tiny)
    for shots in (0, 2):
        some = task_prompts(tokenizer, n, shots)
        for model in (tiny, deep):
            compare(model, some, repeats, keep=3)


if __name__ == "__main__":
    main()
