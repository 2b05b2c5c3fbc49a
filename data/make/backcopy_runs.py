"""The runs of notebook 05, stored in data/backcopy/: `python data/make/backcopy_runs.py --out DIR`.

Each of `backcopy.RUNS`, three seeds, 17 seconds each: the weights in half precision and the log of
the training. For seed 0 of the learnable sink also the SNAPSHOTS. A finished run is left alone.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save
from transformers import PreTrainedModel as Model

from steerkit.files import write_bytes, write_text
from steerkit.streaming import backcopy

LOG_EVERY = 50  # steps


def store_run(name: str, seed: int, out: Path) -> None:
    """Train RUNS[name] into out/<name>-seed<seed>/."""
    recipe = replace(backcopy.RUNS[name], seed=seed)
    folder = out / f"{name.replace(' ', '_')}-seed{seed}"
    if (folder / "log.jsonl").exists():  # written last
        return
    snapshots = backcopy.SNAPSHOTS if (name, seed) == ("learnable sink", 0) else ()

    def store(step: int, model: Model) -> None:
        if step in snapshots or step == recipe.steps:
            weights = {key: p.detach().half() for key, p in model.named_parameters()}
            write_bytes(folder / f"step-{step}.safetensors", save(weights))

    model = backcopy.new_model(recipe)
    with backcopy.architecture(recipe, model):
        losses = backcopy.train(model, recipe, recipe.steps, store)
    log = ""
    for first in range(0, recipe.steps, LOG_EVERY):
        mean = losses[first : first + LOG_EVERY].mean().item()
        log += json.dumps({"step": first + LOG_EVERY, "loss": mean}) + "\n"
    write_text(folder / "log.jsonl", log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="gets one folder per run and seed")
    parser.add_argument("--runs", nargs="+", choices=tuple(backcopy.RUNS), default=backcopy.RUNS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    options = parser.parse_args()
    for seed in options.seeds:
        for name in options.runs:
            store_run(name, seed, options.out)


if __name__ == "__main__":
    main()
